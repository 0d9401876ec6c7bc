"""`sgopd jobs list|status|logs`: the experiments that `sgopd launch` submitted."""

from __future__ import annotations

import argparse

from megatron_sgopd.cli.common import Commands, add_command
from megatron_sgopd.cli.launch import with_nemo_run


def add(commands: Commands) -> None:
    text = "show experiments that were launched: list, status, logs"
    command = commands.add_parser("jobs", help=text, description=text.capitalize() + ".")
    kinds = command.add_subparsers(metavar="WHAT", required=True)
    add_command(kinds, "list", show_all, "print the experiments' ids")
    state = add_command(kinds, "status", show_status, "print the state of each run")
    logs = add_command(kinds, "logs", show_logs, "print what the runs have said")
    for each in (state, logs):
        each.add_argument(
            "experiment", metavar="EXPERIMENT", help="its id, or its title: the newest"
        )
    logs.add_argument("--run", dest="one", metavar="NAME", help="that run of a sweep alone")


def show_all(arguments: argparse.Namespace) -> int:
    with_nemo_run()
    from megatron_sgopd.launch.nemo.experiments import experiments

    print("\n".join(experiments()) or "no experiments (NEMORUN_HOME, else ~/.nemo_run)")
    return 0


def show_status(arguments: argparse.Namespace) -> int:
    with_nemo_run()
    from megatron_sgopd.launch.nemo.experiments import status

    print("\n".join(status(arguments.experiment)))
    return 0


def show_logs(arguments: argparse.Namespace) -> int:
    with_nemo_run()
    from megatron_sgopd.launch.nemo.experiments import logs

    print("\n".join(logs(arguments.experiment, arguments.one)))
    return 0
