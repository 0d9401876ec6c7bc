"""`sgopd train RECIPE [key=value …]`: starts its ranks, or is one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_sgopd.cli.common import Commands, add_command, add_recipe, as_rank, rank_environment
from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.engines import PLACES
from megatron_sgopd.config.layout import replica_size
from megatron_sgopd.config.load import diff, load_config
from megatron_sgopd.config.schema import Config


def add(commands: Commands) -> None:
    text = "run a recipe; on the same run directory, resume it"
    add_recipe(add_command(commands, "train", train, text))


def train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.recipe, arguments.overrides)
    place = rank_environment(os.environ)
    if place is not None:
        os.environ.update(place)
        return _run_rank(resolve(config, int(place["WORLD_SIZE"])))
    resolved = resolve(config)
    from megatron_sgopd.distributed.torchrun import run_ranks

    run_dir = Path(resolved.logging.run_dir or "")
    if is_finished(resolved, run_dir):
        print(
            f"{resolved.name}: finished already, see {run_dir}/summary.json. Raise num_steps to go "
            "on (from its last checkpoint, if it kept one), or give another name or "
            "logging.run_dir to run it again"
        )
        return 0
    return run_ranks(
        replica_size(resolved.parallel) * (resolved.parallel.data_parallel_size or 1),
        ["train", arguments.recipe, *arguments.overrides],
        run_dir,
    )


def is_finished(config: Config, run_dir: Path) -> bool:
    """Tells whether the folder holds this very run, done (measured gate.eps and servers aside)."""
    status, written = run_dir / "status", run_dir / "config.yaml"
    if not (status.is_file() and written.is_file() and (run_dir / "summary.json").is_file()):
        return False
    changed = set(diff(load_config(written), config)) - {"distill.gate.eps", *PLACES}
    return status.read_text(encoding="utf-8").strip() == "finished" and not changed


def _run_rank(config: Config) -> int:
    with as_rank(Path(config.logging.run_dir or "")):
        from megatron_sgopd.train import main as train_main

        train_main(config)
    return 0
