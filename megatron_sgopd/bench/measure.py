"""One case's numbers: interleaved times, peak memory, collectives, gradient error.

Shapes: T tokens, V vocabulary rows of this rank, D hidden.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.bench import plain
from megatron_sgopd.bench.cases import Case
from megatron_sgopd.bench.inputs import Batch, Student
from megatron_sgopd.bench.variants import Variant

MIN_ROUNDS = 3
WARM_UP_TOKENS = 16
EXACT_ROWS = 32  # of the float64 gradient at once
COLLECTIVES = (  # torch 2.13 has two of them under another name as well
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
)


# -- time ------------------------------------------------------------------------------------------


def times(
    variants: Sequence[Variant], batch: Batch, *, rounds: int, budget_s: float
) -> dict[str, list[float]]:
    """Time forward and backward in seconds, a list over rounds for each variant: A B C A B C …

    The rounds end early, not before the third, when they have taken longer than `budget_s`.
    """
    student, original = Student(batch.student), _buffer(batch).clone()
    clock = _clock(batch)
    found: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for done in range(-1, rounds):  # the first warms up
        spent = sum(sum(seconds) for seconds in found.values())
        if done >= MIN_ROUNDS and spent > budget_s:
            break
        for variant in variants:
            student.restore(original)
            rows = student.rows(main_grad=variant.main_grad)
            _wait(batch)
            start = clock()
            variant.loss(rows, batch).backward()
            _wait(batch)
            seconds = _slowest(clock() - start, batch)
            if done >= 0:
                found[variant.name].append(seconds)
    return found


def time_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Give the median over rounds of this time over that one's in the same round."""
    return median(a / b for a, b in zip(times, base, strict=True))


def _clock(batch: Batch) -> Callable[[], float]:
    """Choose a single thread's processor time, which others disturb less; else the wall's."""
    is_alone = batch.group is None and batch.tokens.device.type == "cpu"
    return time.process_time if is_alone else time.perf_counter


def _wait(batch: Batch) -> None:
    if batch.tokens.is_cuda:
        torch.cuda.synchronize()
    if batch.group is not None:
        dist.barrier(batch.group)


def _slowest(seconds: float, batch: Batch) -> float:
    if batch.group is None:
        return seconds
    worst = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=batch.group)
    return float(worst)


def _buffer(batch: Batch) -> Tensor:
    return batch.student[0] if isinstance(batch.student, tuple) else batch.student


# -- memory, collectives and error of one run ------------------------------------------------------


def once(variant: Variant, batch: Batch, exact: Sequence[Tensor] | None) -> dict[str, Any]:
    """Measure memory above the inputs' at its peak (gradient included), collectives, error.

    The peak of a process is looked at, so this is for one that has done nothing else. What a
    variant loads or compiles in its first run is no part of the figure.
    """
    counts = _count_collectives(variant, batch)
    if variant.is_compiled:
        variant.loss(_copy(batch).rows(), batch).backward()
    student = Student(batch.student)
    rows = student.rows(main_grad=variant.main_grad)
    with _peak(batch) as peak:
        variant.loss(rows, batch).backward()
    found = counts | {"extra_bytes": peak()}
    if exact is not None:
        scale = len(batch.tokens) if variant.is_mean else 1
        pairs = zip(student.gradients(), exact, strict=True)
        found["gradient_rel_error"] = max(_relative_error(g, e, scale) for g, e in pairs)
    return found


def _count_collectives(variant: Variant, batch: Batch) -> dict[str, Any]:
    """Count forward and backward apart; on a few tokens where no rank waits for another."""
    part = batch.select(slice(WARM_UP_TOKENS if batch.group is None else None))
    rows = _copy(part).rows(main_grad=variant.main_grad)
    with _counted_collectives() as forward:
        loss = variant.loss(rows, part)
    with _counted_collectives() as backward:
        loss.backward()
    return {"collectives_forward": len(forward), "collectives_backward": len(backward)}


@contextmanager
def _counted_collectives() -> Iterator[list[str]]:
    """Collect the names of torch.distributed's functions as they are called.

    Everybody here looks them up when calling. A dispatch mode or the profiler would see them too,
    and would import torch's compiler in every process.
    """
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    kept = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    for name, function in kept.items():
        setattr(dist, name, counted(name, function))
    try:
        yield calls
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def _copy(batch: Batch) -> Student:
    """Copy the student's rows: some variants write over them."""
    buffer = _buffer(batch).clone()
    is_fused = isinstance(batch.student, tuple)
    return Student((buffer, batch.student[1]) if is_fused else buffer)


@contextmanager
def _peak(batch: Batch) -> Iterator[Callable[[], int]]:
    """Give a function: the bytes by which memory has risen at its highest since."""
    if batch.tokens.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - before
        return
    return_freed_memory()  # while it is resident it would hide a rise
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    resident = _status_bytes("VmRSS")
    yield lambda: _status_bytes("VmHWM") - resident


def return_freed_memory() -> None:
    """Hand it to the system, whatever the allocator's setting."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"Linux states {key} of every process")


# -- the float64 gradient --------------------------------------------------------------------------


def exact_gradients(case: Case, whole: Batch) -> list[Tensor]:
    """Compute in float64 that of the logits; or of the hidden states and of the head."""
    objective = plain.OBJECTIVES[case.objective]
    buffer = _buffer(whole)
    gradients = [torch.empty(buffer.shape, dtype=torch.float64, device=buffer.device)]
    heads = {}
    if isinstance(whole.student, tuple) and isinstance(whole.teacher, tuple):
        heads = {"student": whole.student[1].double(), "teacher": whole.teacher[1].double()}
        gradients.append(torch.zeros_like(heads["student"]))
    for start in range(0, len(whole.tokens), EXACT_ROWS):
        part = slice(start, start + EXACT_ROWS)
        block = _widened(whole.select(part), heads)
        assert isinstance(block.student, Tensor), "widened to logits"
        logits = block.student.requires_grad_()
        objective(logits, block).backward()
        assert logits.grad is not None, "backward has run"
        if heads:
            gradients[0][part] = logits.grad @ heads["student"]
            gradients[1].addmm_(logits.grad.T, buffer[part].double())
        else:
            gradients[0][part] = logits.grad
    return gradients


def _widened(block: Batch, heads: dict[str, Tensor]) -> Batch:
    """Widen a block to float64, hidden states projected."""

    def logits(name: str) -> Tensor | None:
        rows = getattr(block, name)
        if isinstance(rows, tuple):
            return rows[0].double() @ heads[name].T
        return None if rows is None else rows.double()

    student = logits("student")
    assert student is not None, "the student is always there"
    teacher, reference = logits("teacher"), logits("reference")
    return replace(block, student=student, teacher=teacher, reference=reference)


def _relative_error(gradient: Tensor, exact: Tensor, scale: float) -> float:
    """Sum in blocks, so that no copy of full size is made."""
    wrong = norm = 0.0
    for g, e in zip(gradient.split(EXACT_ROWS), exact.split(EXACT_ROWS), strict=True):
        wrong += float((g.double() * scale - e).square().sum())
        norm += float(e.square().sum())
    return (wrong / norm) ** 0.5
