"""`sgopd plan RECIPE --nodes N --gpus-per-node G [key=value …]`: does it fit, and how fast."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import fields, replace
from pathlib import Path

from megatron_sgopd.atomic_files import write_file
from megatron_sgopd.cli.common import Commands, add_command, add_recipe
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.load import load_config
from megatron_sgopd.preflight.plan.hardware import DEFAULT_GPU, GIB, GPUS, Assumptions, Gpu
from megatron_sgopd.preflight.plan.job import Cluster
from megatron_sgopd.preflight.plan.planner import make_plan
from megatron_sgopd.preflight.plan.report import as_json, lines

ASSUMPTIONS = [field.name for field in fields(Assumptions)]


def add(commands: Commands) -> None:
    text = "memory per rank and time per step of a recipe on a cluster, and what to change"
    command = add_command(commands, "plan", plan, text)
    add_recipe(command)
    command.add_argument("--nodes", type=int, required=True)
    command.add_argument("--gpus-per-node", type=int, required=True)
    command.add_argument("--gpu", choices=sorted(GPUS), default=None, help=f"default {DEFAULT_GPU}")
    command.add_argument("--gpu-memory-gb", type=float, help="GiB of a GPU, in place of its own")
    command.add_argument("--json", metavar="FILE", help="write the plan there too")
    group = command.add_argument_group("assumptions of the time estimate (docs/planning.md)")
    for name in ASSUMPTIONS:
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X")


def plan(arguments: argparse.Namespace) -> int:
    """Exit code 0: it fits; 1: it does not."""
    for name in ("nodes", "gpus_per_node", "gpu_memory_gb", *ASSUMPTIONS):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    config = load_config(arguments.recipe, arguments.overrides)
    cluster = Cluster(arguments.nodes, arguments.gpus_per_node)
    given = {name: getattr(arguments, name) for name in ASSUMPTIONS}
    made = make_plan(
        config, cluster, _gpu(arguments), {k: v for k, v in given.items() if v is not None}
    )
    print("\n".join(lines(made)))
    if arguments.json:
        _write(Path(arguments.json), json.dumps(as_json(made), indent=2))
    return 0 if made.fits else 1


def _gpu(arguments: argparse.Namespace) -> Gpu:
    gpu = GPUS[arguments.gpu or DEFAULT_GPU]
    if arguments.gpu_memory_gb is None:
        return gpu
    memory = int(arguments.gpu_memory_gb * GIB)
    speeds = arguments.gpu or f"GPUs with the speed of {DEFAULT_GPU}"
    return replace(gpu, name=speeds, memory_bytes=memory)


def _write(path: Path, text: str) -> None:
    if not path.parent.is_dir():  # a folder of that name is more likely a typing error
        raise ConfigError(f"--json {path} cannot be written (no folder {path.parent})")
    try:
        write_file(path, text, "\n")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written ({error.strerror})") from error
