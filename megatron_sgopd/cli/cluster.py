"""`sgopd cluster place|preflight|account|table`: what the scripts in slurm/ ask, without torch.

They end with exit code 0 where they could answer, 2 for a recipe that cannot be.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from megatron_sgopd.atomic_files import write_file
from megatron_sgopd.cli.common import Commands, add_command, add_recipe
from megatron_sgopd.cli.train import is_finished
from megatron_sgopd.config.load import load_config
from megatron_sgopd.launch.placement import Placement, place


def add(commands: Commands) -> None:
    text = "answer the scripts of slurm/: places, checks of a node, a failure's account"
    asked = commands.add_parser("cluster", help=text, description=text.capitalize() + ".")
    kinds = asked.add_subparsers(metavar="WHAT", required=True)
    where = add_command(kinds, "place", show_placement, "print where a job's processes go")
    check = add_command(kinds, "preflight", preflight, "check this node, and print one line")
    for command in (where, check):
        command.add_argument("--nodes", required=True, help="names, with commas between them")
        command.add_argument("--processes-per-node", required=True, type=int)
        command.add_argument("--job", required=True, type=int, help="the job's number")
        add_recipe(command)
    check.add_argument("--node", required=True, help="this one's name")
    check.add_argument("--token", required=True, help="what RUN_DIR/.preflight holds")
    merged = add_command(kinds, "table", table, "print and write one table of evaluations")
    merged.add_argument("out", metavar="OUT", type=Path)
    merged.add_argument(
        "wanted", metavar="MODEL/NAME", nargs="+", help="evaluations there should be, below OUT"
    )
    why = add_command(kinds, "account", account, "print why a run failed")
    why.add_argument("run_dir", metavar="RUN_DIR", type=Path)


def _on_gpus() -> bool:
    return os.environ.get("SGOPD_DEVICE") != "cpu"


def _placement(arguments: argparse.Namespace) -> Placement:
    return place(
        load_config(arguments.recipe, arguments.overrides),
        arguments.nodes.split(","),
        arguments.processes_per_node,
        arguments.job,
        on_gpus=_on_gpus(),
    )


def show_placement(arguments: argparse.Namespace) -> int:
    placement = _placement(arguments)
    print("\n".join(placement.assignments()))
    print(f"FINISHED={int(is_finished(placement.config, placement.run_dir))}")
    return 0


def preflight(arguments: argparse.Namespace) -> int:
    """NODE: PROBLEM; … or NODE: ok; then what its clock says."""
    from megatron_sgopd.launch.node_check import problems

    found = list(
        problems(_placement(arguments), arguments.node, arguments.token, on_gpus=_on_gpus())
    )
    print(f"{arguments.node} {time.time():.0f} {'; '.join(found) or 'ok'}", flush=True)
    return 0


def account(arguments: argparse.Namespace) -> int:
    """Exit code 2: a mistake in the recipe, which another try would meet again."""
    from megatron_sgopd.distributed.failure import account, first_error

    record = first_error(arguments.run_dir)
    if record is None or record["echo"]:
        print("no rank left an error of its own: Slurm's words above name what was killed")
        return 0
    print(account(arguments.run_dir, record))
    return 2 if record["type"] == "ConfigError" else 0


def table(arguments: argparse.Namespace) -> int:
    """Exit code 1: some are missing."""
    from megatron_sgopd.evaluation.tables import SUMMARY, models_table, read_summaries

    rows = read_summaries(arguments.out)
    text = models_table(rows)
    for name, content in (("table.json", json.dumps(rows, indent=1)), ("table.txt", text)):
        write_file(arguments.out / name, content, "\n")
    print(text)
    missing = [each for each in arguments.wanted if not (arguments.out / each / SUMMARY).is_file()]
    if missing:
        print(
            f"{len(missing)} of {len(arguments.wanted)} evaluations are missing, see "
            f"{arguments.out}/logs: {', '.join(missing)}"
        )
    return int(bool(missing))
