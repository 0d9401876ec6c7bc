"""What a run leaves behind: metrics.jsonl, sums reduced over ranks, spans of time, progress.

Names are `area/quantity`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

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


class MetricsWriter:
    """Appends one JSON object a step to metrics.jsonl; on resume cuts it back to the checkpoint."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Keeps the lines of steps up to `first_step` (steps done) and goes on after them."""
        kept = [row for row in read_metrics(path) if row["step"] <= first_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row; floats keep 7 significant digits."""
        row: dict[str, Any] = {"step": step}
        row |= {k: float(f"{v:.7g}") for k, v in sorted(metrics.items())}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a half-written last line (a killed run) is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


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
