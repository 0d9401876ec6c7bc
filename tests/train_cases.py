"""Whole runs of the real trainer on a tiny world, inside the pool's ranks."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sgopd.assemble import Run
from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.load import load_config
from megatron_sgopd.parallel import shutdown
from megatron_sgopd.train import train


class PlannedFault(RuntimeError):
    """Raised by a rank on purpose."""


def run(recipe: str, overrides: Sequence[str], fault: tuple[str, int] | None = None) -> str:
    """Trains as `sgopd train` does on a rank. `fault`: ("stop" | "die", after this many steps).

    "stop" touches RUN_DIR/STOP as a user would; "die" raises on every rank. Returns the status.
    """
    config = resolve(load_config(recipe, overrides), dist.get_world_size())
    plain_log = Run.log

    def log(self: Run, spans: Any) -> None:
        plain_log(self, spans)
        if fault is not None and self.state.step == fault[1]:
            if fault[0] == "die":
                raise PlannedFault("planned")
            if self.is_first:
                (self.dir / "STOP").touch()

    Run.log = log  # type: ignore[method-assign]
    try:
        train(config)
    except PlannedFault:
        return "died"
    finally:
        assert not multiprocessing.active_children(), "a run leaves no process behind"
        Run.log = plain_log  # type: ignore[method-assign]
        shutdown()
        dist.barrier()
    return (Path(config.logging.run_dir or "") / "status").read_text().strip()


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
