"""Holds what the commands share: the recipe argument, and a rank's place in its job."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sgopd.config.errors import ConfigError

Commands = Any  # argparse's subparsers, which have no public type


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """A command without arguments yet."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text.capitalize() + "."
    )
    command.set_defaults(run=run)
    return command


def add_recipe(command: argparse.ArgumentParser, optional: bool = False) -> None:
    """RECIPE [key=value …]."""
    text = "a YAML file, such as recipes/…"
    command.add_argument("recipe", metavar="RECIPE", nargs="?" if optional else None, help=text)
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as distill.gate.lambda_high=1.5"
    )


def rank_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """This process's place in a job that torchrun or srun started; None when started by hand."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {k: environment[k] for k in ("RANK", "WORLD_SIZE")}
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if k not in environment]
        if missing:
            raise ConfigError(
                f"started by srun without {' and '.join(missing)}: export the first node's name "
                "and a free port before srun"
            )
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_NTASKS"],
            "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        }
    return None


@contextmanager
def as_rank(folder: Path) -> Iterator[None]:
    """Runs all that a rank does; a failing import is a failure too. Errors go into `folder`."""
    from megatron_sgopd.distributed.failure import die_with_parent, failing_together

    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun killed takes its ranks with it
        die_with_parent()
    # Megatron wants kernels of one device queued in order where TP overlaps with compute.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with failing_together(folder, int(os.environ["RANK"])):
        from megatron_sgopd.distributed.megatron_cpu import quiet

        quiet()  # before anything imports Megatron
        yield
