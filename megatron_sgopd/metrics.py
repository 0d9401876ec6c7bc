"""Writes metrics.jsonl, reduces sums over ranks, takes times, and shows progress.

Names are `area/quantity`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_sgopd.atomic_files import read_json_lines, write_json_lines
from megatron_sgopd.config.schema import LoggingConfig
from megatron_sgopd.run_folder import METRICS
from megatron_sgopd.types import Rollout

Sums = dict[str, tuple[Tensor, Tensor]]


def add_up(parts: Iterable[Sums]) -> Sums:
    """Adds (sum, count) pairs by name; a name may be missing from some parts."""
    total: Sums = {}
    for part in parts:
        for name, (s, n) in part.items():
            s0, n0 = total.get(name, (torch.zeros_like(s), torch.zeros_like(n)))
            total[name] = (s0 + s, n0 + n)
    return total


def reduced_means(
    sums: Sums, names: Iterable[str], group: dist.ProcessGroup | None, device: torch.device
) -> dict[str, float]:
    """sum/count over a group, float64, one all-reduce. Names nobody counted are left out.

    Without a group, over all ranks. `names` lists every name any rank may have, so that all ranks
    send the same vector.
    """
    order = sorted(names)
    zero = torch.zeros((), device=device)
    flat = torch.stack(
        [
            torch.stack([x.to(device).double() for x in sums.get(name, (zero, zero))])
            for name in order
        ]
    )
    dist.all_reduce(flat, group=group)
    return {name: (s / n).item() for name, (s, n) in zip(order, flat, strict=True) if n.item() > 0}


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most that the fullest GPU has held since the last call; {} on CPUs. Collective."""
    if device.type != "cuda":
        return {}
    peak = torch.tensor(float(torch.cuda.max_memory_allocated(device)), device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    torch.cuda.reset_peak_memory_stats(device)
    return {"memory/peak_gib": peak.item() / 2**30}


def mismatch_kl(engine: Tensor, trainer: Tensor) -> float:
    """Mean of exp(d) - 1 - d with d = trainer - engine, of log-probs of the same tokens.

    On tokens the engine sampled, the low-variance estimate of KL(engine || trainer). NaN counts as
    infinite; beyond 30 nats a token counts as 30.
    """
    gap = (trainer.double() - engine.double()).clamp(-30, 30)
    value = float((torch.expm1(gap) - gap).mean())
    return value if value == value else float("inf")


class StepLog:
    """Writes a run's metrics.jsonl, and now and then a step's rollouts."""

    def __init__(self, folder: Path, logging: LoggingConfig, first_step: int) -> None:
        """Keeps the lines of steps up to `first_step` (steps done) and goes on after them."""
        self._folder, self._logging = folder, logging
        path = folder / METRICS
        write_json_lines(path, [r for r in read_json_lines(path) if r["step"] <= first_step])
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a step's row; floats keep 7 significant digits."""
        row: dict[str, Any] = {"step": step}
        row |= {k: float(f"{v:.7g}") for k, v in sorted(metrics.items())}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def write_rollouts(
        self, step: int, rollouts: Sequence[Rollout], decode: Callable[[Sequence[int]], str]
    ) -> None:
        """Writes rollouts/step-N.jsonl where `logging.rollouts_every` says so."""
        logging = self._logging
        if not logging.rollouts_every or not (step == 1 or step % logging.rollouts_every == 0):
            return
        rows = [
            {
                "step": step,
                "prompt": rollout.prompt.text,
                "completion": decode(rollout.completion.token_ids),
                "answer": rollout.prompt.answer,
                "is_correct": rollout.is_correct,
                "source": rollout.source,
                "verifier_advantage": rollout.verifier_advantage,
            }
            for rollout in rollouts[: logging.rollouts_kept]
        ]
        write_json_lines(self._folder / "rollouts" / f"step-{step:06d}.jsonl", rows)

    def close(self) -> None:
        """Closes metrics.jsonl."""
        self._file.close()


class Clock:
    """Seconds spent in named spans of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun, self._cpu_begun = time.perf_counter(), time.process_time()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        key = f"time/{name}_s"
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    def take(self, whole: str | None = None) -> dict[str, float]:
        """The spans since the last call; `whole` names all the time since then.

        Beside it `WHOLE_cpu`, what this process computed of it: the rest is waiting.
        """
        now, cpu = time.perf_counter(), time.process_time()
        if whole is not None:
            self.add(whole, now - self._begun)
            self.add(f"{whole}_cpu", cpu - self._cpu_begun)
        taken, self.seconds, self._begun, self._cpu_begun = self.seconds, {}, now, cpu
        return taken


def progress_bar(
    description: str, total: int, *, initial: int = 0, show: bool = True, unit: str = "it"
) -> tqdm[Any]:
    """A bar with rate and ETA; silent on ranks that should not show one."""
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        disable=not show,
        unit=unit,
        dynamic_ncols=True,
        smoothing=0.1,
    )
