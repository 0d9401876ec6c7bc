"""`sgopd compare DIR DIR`: two models' evaluations, as paired differences."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sgopd.atomic_files import write_json
from megatron_sgopd.cli.common import Commands, add_command
from megatron_sgopd.config.errors import ConfigError


def add(commands: Commands) -> None:
    text = "compare two evaluations problem by problem: the first less the second"
    command = add_command(commands, "compare", compare, text)
    command.add_argument(
        "first",
        type=Path,
        metavar="DIR",
        help="of a finished `sgopd evaluate`, or of a training run",
    )
    command.add_argument("second", type=Path, metavar="DIR", help="the baseline's")
    command.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there too")


def compare(arguments: argparse.Namespace) -> int:
    """Exit code 0: compared; 2: they cannot be."""
    from megatron_sgopd.evaluation import folder
    from megatron_sgopd.evaluation.tables import comparison_table

    try:
        comparison = folder.compare(arguments.first, arguments.second)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for which in ("first", "second"):
        print(f"{which:<6}  {comparison[which]['name']}  {comparison[which]['model']['path']}")
    print(comparison_table(comparison))
    print(
        "Differences in points, with 95 % bootstrap intervals over problems; they do not hold what "
        "another seed of a training would change."
    )
    for note in comparison["notes"]:
        print(f"not the same: {note}")
    if arguments.json:
        write_json(arguments.json, comparison)
    return 0
