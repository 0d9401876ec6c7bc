"""Whole runs of the real trainer on a tiny world, inside the pool's ranks."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

import megatron_sgopd.train as trainer
from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.load import load_config
from megatron_sgopd.config.schema import Config
from megatron_sgopd.distributed.groups import shutdown
from megatron_sgopd.run import Run
from megatron_sgopd.training.engines import Engines
from megatron_sgopd.training.weight_sync import StaleWeights
from megatron_sgopd.types import EngineLost


class PlannedFault(RuntimeError):
    """Raised by a rank on purpose."""


def run(recipe: str, overrides: Sequence[str], fault: tuple[str, int] | None = None) -> str:
    """Trains as `sgopd train` does on a rank. `fault`: ("stop" | "die", after this many steps).

    "stop" touches RUN_DIR/STOP as a user would; "die" raises on every rank. Returns the status.
    """
    config = resolve(load_config(recipe, overrides), dist.get_world_size())
    plain_log = trainer.log

    def log(run: Run, metrics: Any, rollouts: Any) -> None:
        plain_log(run, metrics, rollouts)
        if fault is not None and run.state.step == fault[1]:
            if fault[0] == "die":
                raise PlannedFault("planned")
            if run.is_first:
                (run.folder / "STOP").touch()

    trainer.log = log
    try:
        trainer.train(config)
    except PlannedFault:
        return "died"
    finally:
        assert not multiprocessing.active_children(), "a run leaves no process behind"
        trainer.log = plain_log
        shutdown()
        dist.barrier()
    return (Path(config.logging.run_dir or "") / "status").read_text().strip()


def run_ahead(recipe: str, overrides: Sequence[str], fault: tuple[str, int] | None = None) -> str:
    """`run`, with rollouts of the next step made before a checkpoint, as one step off.

    RUN_DIR/made lists the steps whose rollouts were made. (The recipe's check keeps the embedded
    engine from it, which cannot decode while it trains: here it decodes for the checkpoint.)
    """
    plain_resolve, plain_make = globals()["resolve"], trainer.make_batch

    def resolve_ahead(config: Config, world_size: int) -> Config:
        resolved = plain_resolve(config, world_size)
        return replace(resolved, rollout=replace(resolved.rollout, max_policy_lag=1))

    def make_batch(run: Run, step: int) -> Any:
        if run.is_first:
            with open(run.folder / "made", "a") as file:
                file.write(f"{step}\n")
        return plain_make(run, step)

    globals()["resolve"], trainer.make_batch = resolve_ahead, make_batch
    try:
        return run(recipe, overrides, fault)
    finally:
        globals()["resolve"], trainer.make_batch = plain_resolve, plain_make


def run_without_engines(recipe: str, overrides: Sequence[str], where: str) -> str:
    """`run`, whose engine is lost ("final evaluation") or answers with stale weights ("push" of the
    third step); what is said."""
    plain_evaluate, plain_push = trainer.evaluate_and_write, Engines.push_weights

    def evaluate_and_write(run: Run, name: str) -> Any:
        raise EngineLost("planned")

    def push(self: Engines, policy_version: int) -> dict[str, float]:
        if policy_version == 3:
            raise StaleWeights("planned")
        return plain_push(self, policy_version)

    if where == "push":
        Engines.push_weights = push  # type: ignore[method-assign]
    else:
        trainer.evaluate_and_write = evaluate_and_write
    try:
        return run(recipe, overrides)
    except (EngineLost, StaleWeights) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        trainer.evaluate_and_write = plain_evaluate
        Engines.push_weights = plain_push  # type: ignore[method-assign]


def run_with_scores(recipe: str, overrides: Sequence[str], scores: Sequence[float]) -> str:
    """`run`, with these results of its evaluations during training."""

    def evaluate_during(run: Run) -> dict[str, float]:
        return {"evaluation/avg_at_k": scores[run.state.step - 1]}

    plain, trainer.evaluate_during = trainer.evaluate_during, evaluate_during
    try:
        return run(recipe, overrides)
    finally:
        trainer.evaluate_during = plain


def error_of(recipe: str, overrides: Sequence[str]) -> str:
    """The error every rank raises alike, so that none is left waiting in a collective."""
    try:
        run(recipe, overrides)
    except ValueError as error:
        return str(error)
    return "no error"


def metrics_without_time(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what rightly differs between two runs."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
