"""Names and rules of a run's folder: its files, who asks it to stop, what a resume may change.

An evaluation's folder has the same recipe, status, STOP and errors. docs/run_folder.md lists all.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sgopd.atomic_files import write_file
from megatron_sgopd.config.load import diff, load_config, to_yaml
from megatron_sgopd.config.schema import Config

RECIPE = "config.yaml"  # resolved, with what was measured
STATUS = "status"  # running, stopped, finished or failed
STOP = "STOP"  # a person, a signal or Slurm asks for the end after this step
ERRORS = "errors"  # a record for each rank that failed
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"

# What may change between a run and its resumption without making it another run.
RESUMABLE = (
    "num_steps",
    "logging.",
    "checkpoint.",
    "evaluation.",
    # How answers are judged must not change halfway; where and how fast may.
    "verifier.timeout_s",
    "verifier.num_workers",
    "verifier.memory_mb",
    "rollout.vllm.",  # where servers are and how they are reached
    "parallel.distrib",
    # Another way to the same sums: what somebody changes who ran out of memory.
    "parallel.micro_batch",
    "parallel.recompute",
    "parallel.hidden_states",
    "model.teacher.offload",
    "model.reference.offload",
    "optimizer.offload",
)


def claim_run_folder(config: Config, folder: Path, *, resuming: bool) -> None:
    """Writes the resolved recipe and removes what an earlier attempt left. On the first rank.

    Raises:
        ValueError: the folder holds checkpoints of a run with other settings, naming them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if resuming and (folder / RECIPE).exists():
        changed = diff(load_config(folder / RECIPE), config)
        if config.distill.gate.eps == "auto":
            changed.pop("distill.gate.eps", None)  # what was measured stands in the folder's
        _refuse_another_run(changed, folder)
    clear_attempt(folder)
    write_recipe(folder, config)


def clear_attempt(folder: Path) -> None:
    """Removes the request to stop and the errors of an earlier attempt."""
    (folder / STOP).unlink(missing_ok=True)
    shutil.rmtree(folder / ERRORS, ignore_errors=True)


def write_recipe(folder: Path, config: Config) -> None:
    """Writes the resolved recipe."""
    write_file(folder / RECIPE, to_yaml(config))


def read_recipe(folder: Path) -> str:
    """Reads the resolved recipe's text."""
    return (folder / RECIPE).read_text(encoding="utf-8")


def set_status(folder: Path, status: str) -> None:
    """Writes what the run is: running, stopped, finished or failed."""
    write_file(folder / STATUS, status, "\n")


def read_status(folder: Path) -> str | None:
    """Reads what the run is; None where nothing was begun."""
    path = folder / STATUS
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def ask_to_stop(folder: Path) -> None:
    """Asks the run to stop after its step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOP).touch()


class StopRequest:
    """Tells whether the end was asked for: SIGTERM or SIGUSR1 to this process, or FOLDER/STOP.

    `looks`: whether this rank looks for the file; one is enough.
    """

    def __init__(self, folder: Path, *, looks: bool = True) -> None:
        self._folder, self._looks, self._signalled = folder, looks, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self._signalled = True

    def __call__(self) -> bool:
        return self._signalled or (self._looks and (self._folder / STOP).exists())


def _refuse_another_run(changed: Mapping[str, tuple[Any, Any]], folder: Path) -> None:
    """Raises ValueError if a setting changed that makes it another run."""
    other = {key: values for key, values in changed.items() if not key.startswith(RESUMABLE)}
    if other:
        listed = "; ".join(f"{k} was {a!r}, now {b!r}" for k, (a, b) in sorted(other.items()))
        raise ValueError(
            f"{folder} holds checkpoints of a run with other settings ({listed}): set them back "
            "to resume it, or choose another name or logging.run_dir"
        )
