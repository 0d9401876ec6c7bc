"""`sgopd doctor --numerics`: the conformance suite of the losses, on this package's or another."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_sgopd.config.errors import ConfigError

ONLY_THERE = ("function", "world", "json")  # options that mean nothing without --numerics


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--numerics",
        action="store_true",
        help="instead, without a recipe: try a vocabulary-parallel loss on known cases",
    )
    command.add_argument(
        "--function",
        metavar="MODULE:NAME",
        help="with --numerics: whose loss; this package's own by default, others' are in "
        "megatron_sgopd.preflight.numerics.peers",
    )
    command.add_argument(
        "--world", metavar="N,N", help="with --numerics: how many ranks; the default is 1,2,4"
    )
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="with --numerics: writes the results there too"
    )


def check_numerics(arguments: argparse.Namespace) -> int:
    """Exit code 0: all cases passed; 1: one failed; 2: the function cannot be tried."""
    from megatron_sgopd.preflight.numerics.adapter import OURS, WORLDS, check_name, load
    from megatron_sgopd.preflight.numerics.suite import as_json, run_suite, table, verdict

    if arguments.recipe is not None:
        raise ConfigError(f"doctor --numerics takes no recipe; got {arguments.recipe}")
    if arguments.parallel:
        raise ConfigError("doctor takes --parallel, for a recipe, or --numerics; not both")
    name = arguments.function or OURS
    check_name(name)
    worlds = _worlds(arguments.world)
    file: Path | None = arguments.json
    if file is not None and (file.is_dir() or not file.resolve().parent.is_dir()):
        raise ConfigError(f"--json {file}: a file in a folder that is there is wanted")
    adapter = load(name)  # imports torch
    if not (worlds := [w for w in worlds if w in adapter.worlds]):
        works = ", ".join(str(w) for w in adapter.worlds)
        asked = arguments.world or ",".join(str(w) for w in WORLDS)
        raise ConfigError(f"--world {asked}: {name} says it works at {works} alone")
    results = run_suite(adapter, worlds)
    print(f"{name}\n" + "\n".join(table(results)))
    if arguments.json is not None:
        text = json.dumps(as_json(adapter, results), indent=1, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(verdict(results))
    return int(not all(result.passed for result in results))


def refuse_elsewhere(arguments: argparse.Namespace) -> None:
    """Raises ConfigError where an option of --numerics stands without it."""
    for option in ONLY_THERE:
        if getattr(arguments, option) is not None:
            raise ConfigError(f"--{option} goes with `sgopd doctor --numerics`")


def _worlds(text: str | None) -> list[int]:
    from megatron_sgopd.preflight.numerics.adapter import WORLDS

    if text is None:
        return [1, 2, 4]
    try:
        worlds = sorted({int(word) for word in text.split(",")})
    except ValueError:
        worlds = []
    if not worlds or not set(worlds) <= set(WORLDS):
        allowed = ", ".join(str(w) for w in WORLDS)
        raise ConfigError(f"--world is {text!r}; it wants numbers of {allowed}, such as 1,2,4")
    return worlds
