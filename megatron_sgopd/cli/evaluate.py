"""`sgopd evaluate RECIPE|HF_DIR [key=value …]`: starts its ranks, or is one."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path

from megatron_sgopd.cli.common import Commands, add_command, as_rank, rank_environment
from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.evaluation import config_for_model
from megatron_sgopd.config.layout import replica_size
from megatron_sgopd.config.load import load_config
from megatron_sgopd.config.recipe_files import RECIPES
from megatron_sgopd.config.schema import Config, ModelConfig, StudentConfig

PROTOCOL = RECIPES / "evaluation_paper.yaml"


def add(commands: Commands) -> None:
    text = "score a model on benchmarks: avg@k, pass@k, greedy; run again, it goes on"
    command = add_command(commands, "evaluate", evaluate, text)
    command.add_argument(
        "target",
        metavar="RECIPE|HF_DIR",
        help="a recipe, whose student is evaluated under its settings; or a Hugging Face directory "
        "(or hub name), under the paper's protocol (recipes/evaluation_paper.yaml)",
    )
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as evaluation.n=8")
    command.add_argument(
        "--model", metavar="student|teacher|HF_DIR", help="of a RECIPE; default: student"
    )
    command.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="in the place of the recipe's; may come several times",
    )
    command.add_argument(
        "--out", metavar="DIR", help="samples, scores, logs; default: runs/evaluations/NAME"
    )


def evaluate(arguments: argparse.Namespace) -> int:
    """Exit code 0: scored, or stopped on request; 1: failed; 2: cannot be."""
    place = rank_environment(os.environ)
    if place is not None:
        os.environ.update(place)
        return _run_rank(config_of(arguments, int(place["WORLD_SIZE"])))
    config = config_of(arguments)
    from megatron_sgopd.distributed.torchrun import run_ranks
    from megatron_sgopd.evaluation.job import prepare, score_again

    try:
        plan = prepare(config)
        if score_again(plan):
            return 0
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return run_ranks(
        replica_size(config.parallel) * (config.parallel.data_parallel_size or 1),
        ["evaluate", *_again(arguments)],
        plan.folder,
        stopping="stopping; what is answered is kept",
    )


def config_of(arguments: argparse.Namespace, world_size: int | None = None) -> Config:
    """The resolved config of the evaluation."""
    target, model = arguments.target, arguments.model
    is_recipe = target.endswith((".yaml", ".yml"))
    unread = ["data.train", *([] if is_recipe else ["name", "model.student.hf_path"])]
    config = load_config(target if is_recipe else PROTOCOL, arguments.overrides, unread=unread)
    if is_recipe:
        model = model or "student"
        own = "" if model == "student" else f"-{_label(model)}"
        config = replace(config, name=config.name + own)
    elif model is not None:
        raise ConfigError(f"--model {model}: goes with a RECIPE; {target} is a model itself")
    else:
        student = StudentConfig(hf_path=target)
        config = replace(
            config, name=_label(target), model=ModelConfig(student, dtype=config.model.dtype)
        )
    if arguments.benchmark:
        sets = dict(_benchmark(text) for text in arguments.benchmark)
        if len(sets) < len(arguments.benchmark):
            raise ConfigError("--benchmark: a name comes twice")
        config = replace(config, evaluation=replace(config.evaluation, data=None, benchmarks=sets))
    folder = arguments.out or f"runs/evaluations/{config.name}"
    config = replace(config, logging=replace(config.logging, run_dir=folder))
    return resolve(config_for_model(config, model or "student", world_size), world_size)


def _label(model: str) -> str:
    """A name for a directory: its last two parts, since many are called hf."""
    parts = [p for p in Path(model).parts if p not in ("/", ".", "..")]
    return re.sub(r"[^\w.+-]", "_", "-".join(parts[-2:])) or "model"


def _benchmark(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise ConfigError(f"--benchmark {text}: NAME=FILE is wanted, such as aime24=aime24.jsonl")
    return name, file


def _again(arguments: argparse.Namespace) -> list[str]:
    """The same arguments, for the ranks."""
    given = [arguments.target, *arguments.overrides]
    for text in arguments.benchmark:
        given += ["--benchmark", text]
    for option in ("model", "out"):
        if (value := getattr(arguments, option)) is not None:
            given += [f"--{option}", value]
    return given


def _run_rank(config: Config) -> int:
    with as_rank(Path(config.logging.run_dir or "")):
        from megatron_sgopd.evaluation.job import main

        main(config)
    return 0
