"""The command line: `sgopd train RECIPE [key=value …]`; each command is a file in `cli/`.

Arguments and recipe are checked before torch is imported, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_sgopd.cli import doctor, serve, show_config, train
from megatron_sgopd.config.errors import ConfigError

COMMANDS = (train, show_config, serve, doctor)  # in the order of the help


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: done, or stopped on request with a checkpoint; 1: failed; 2: bad recipe."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"sgopd: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sgopd", description="Sign-gated on-policy distillation on Megatron-Core."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
