"""The command line: `sgopd train RECIPE [key=value …]`; each command is a file in `cli/`.

Arguments and recipe are checked before torch is imported, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_sgopd.cli import (
    bench,
    cluster,
    compare,
    config,
    doctor,
    evaluate,
    jobs,
    launch,
    plan,
    rescore,
    serve,
    train,
)
from megatron_sgopd.config.errors import ConfigError

COMMANDS = (  # in the order of the help
    train,
    config,
    plan,
    doctor,
    launch,
    jobs,
    serve,
    evaluate,
    compare,
    rescore,
    bench,
    cluster,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: done, or stopped on request with a checkpoint; 1: failed; 2: bad recipe."""
    arguments = _parse(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"sgopd: {error}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes key=value in one place alone; here it may stand behind options too."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "overrides") and all(_is_override(r) for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


class _Version(argparse.Action):
    """Prints the versions and ends; they are read only then."""

    def __call__(self, *_: object) -> None:
        from megatron_sgopd.versions import describe, installed

        print(f"sgopd {installed('megatron_sgopd') or 'not installed'}; {describe()}")
        raise SystemExit(0)


def _is_override(text: str) -> bool:
    return "=" in text and not text.startswith("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sgopd", description="Sign-gated on-policy distillation on Megatron-Core."
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="this project's and its libraries' versions"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
