"""`sgopd rescore DIR [key=value …]`: an evaluation's samples under another verifier, no engine."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sgopd.cli.common import Commands, add_command
from megatron_sgopd.config.checks import check
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.load import diff, load_config
from megatron_sgopd.config.schema import Config

READ = ("verifier.", "evaluation.k", "evaluation.bootstrap_samples")


def add(commands: Commands) -> None:
    text = "score an evaluation's samples again, by another verifier or k; no engine runs"
    command = add_command(commands, "rescore", rescore, text)
    command.add_argument("folder", type=Path, metavar="DIR", help="of a finished `sgopd evaluate`")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="verifier.name=…, evaluation.k=…"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="an evaluation folder of its own; default: DIR/rescored/VERIFIER",
    )


def rescore(arguments: argparse.Namespace) -> int:
    """Exit code 0: scored; 2: cannot be."""
    folder = arguments.folder
    config = _config(folder, arguments.overrides)
    out = arguments.out or folder / "rescored" / config.verifier.name
    if out.resolve() == folder.resolve():
        raise ConfigError(f"--out {out} is the evaluation itself: choose another folder")
    from megatron_sgopd.evaluation.rescore import rescore_folder
    from megatron_sgopd.evaluation.tables import scores_table

    try:
        summary = rescore_folder(folder, out, config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(f"{scores_table(summary)}\n{out / 'summary.json'}")
    return 0


def _config(folder: Path, overrides: list[str]) -> Config:
    recipe = folder / "config.yaml"
    if not recipe.is_file():
        raise ConfigError(
            f"{folder} holds no evaluation (no config.yaml): give a folder that `sgopd evaluate` "
            "left"
        )
    before, config = (load_config(recipe, o, unread=["data.train"]) for o in ([], overrides))
    if other := [key for key in diff(before, config) if not key.startswith(READ)]:
        raise ConfigError(
            f"rescore does not read {other[0]}: the samples are what they are; it takes "
            "verifier.*, evaluation.k and evaluation.bootstrap_samples"
        )
    check(config)
    return config
