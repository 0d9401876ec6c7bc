"""A process of one allocator setting that measures a list of cases.

    python -m megatron_sgopd.bench.worker FD < JOB

JOB is a `Job` as JSON; what is found goes to the file descriptor FD, one JSON object a line:
{"refused": reason}; or {"missing": {baseline: reason}}, {"rates": …}, and for each case
{"rows": […], "failed": {…}}.
Standard output stays free for what the baselines print.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.bench import measure
from megatron_sgopd.bench.baselines import baseline_variants, start_megatron
from megatron_sgopd.bench.cases import Case
from megatron_sgopd.bench.inputs import Batch, draw
from megatron_sgopd.bench.job import Job
from megatron_sgopd.bench.machine import Rates, measure_rates
from megatron_sgopd.bench.processes import ChildFailed, isolated, join_group, on_ranks
from megatron_sgopd.bench.variants import Variant, our_variants, plain_variants
from megatron_sgopd.distributed.failure import die_with_parent

Task = Callable[[Batch], Any]
ALL = "all variants together"


def main(job: Job, results: TextIO) -> None:
    def say(**found: Any) -> None:
        print(json.dumps(found), file=results, flush=True)

    torch.set_num_threads(1)
    if job.device == "cuda" and not torch.cuda.is_available():
        say(refused=f"--device cuda: this torch ({torch.__version__}) finds no GPU here")
        return
    missing: dict[str, str] = {}
    for case in job.cases:  # imports every baseline, before anything is forked
        variants_of(case, job.device, missing)
    gc.collect()
    gc.freeze()  # collecting what imports have made takes longer than most of what is measured
    say(missing=missing)
    rates: Rates = _in_child(job.device, lambda: measure_rates(job.device))
    say(rates=asdict(rates), line=rates.line())
    for case in job.cases:
        try:
            rows, failed = _in_child(job.device, partial(case_rows, case, job, rates))
        except ChildFailed as error:
            rows, failed = [], {ALL: str(error)}
        say(case=case.label, rows=rows, failed=failed)


def variants_of(case: Case, device: str, missing: dict[str, str]) -> list[Variant]:
    """List plain PyTorch first: the others' times are divided by its own."""
    plain = plain_variants(case, device)
    return [*plain, *our_variants(case), *baseline_variants(case, device, missing)]


def case_rows(case: Case, job: Job, rates: Rates) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure the rows of a case, and say why a variant has none."""
    variants = variants_of(case, job.device, {})
    batch = draw(case, job.device)
    exact = measure.exact_gradients(case, batch) if job.with_error else None
    found, failed = {}, {}
    for variant in variants:  # each in a process of its own, so that a failure is its own too
        task: Task = partial(_once, variant, exact)
        try:
            found[variant.name] = _run(case, job.device, batch, [variant], task)
        except ChildFailed as error:
            failed[variant.name] = str(error)
    working = [variant for variant in variants if variant.name in found]
    if "plain" in failed:
        return [], failed
    try:
        task = partial(measure.times, working, rounds=job.rounds, budget_s=job.budget_s)
        times = _run(case, job.device, batch, working, task)
    except ChildFailed as error:
        return [], failed | {ALL: str(error)}
    floor = rates.floor_seconds(case)
    rows = [_row(case, job, v, found[v.name], times, floor) for v in working]
    other = [v.name for v in working if not v.ours and not v.is_plain]
    for row in (row for row in rows if row["ours"]):
        row["time_ratio_to"] = {
            name: measure.time_ratio(times[row["name"]], times[name]) for name in other
        }
    return rows, failed


def _row(
    case: Case,
    job: Job,
    variant: Variant,
    found: dict[str, Any],
    times: dict[str, list[float]],
    floor: float,
) -> dict[str, Any]:
    own = times[variant.name]
    return {
        "name": variant.name,
        "form": case.form,
        "objective": case.objective,
        "ours": variant.ours,
        "time_ratio_to_plain": measure.time_ratio(own, times["plain"]),
        "extra_memory_shards": found["extra_bytes"] / case.shard_bytes,
        "collectives_forward": found["collectives_forward"],
        "collectives_backward": found["collectives_backward"],
        "gradient_rel_error": found.get("gradient_rel_error"),
        "tokens": case.tokens,
        "vocab": case.vocab,
        "tp": case.tp,
        "dtype": case.dtype,
        "device": job.device,
        "allocator": job.allocator,
        "time_ms": 1e3 * median(own),
        "floor_ms": 1e3 * floor,
        "rounds": len(own),
        **dict(variant.origin),
    }


def _once(variant: Variant, exact: list[Tensor] | None, batch: Batch) -> dict[str, Any]:
    if batch.group is not None and exact is not None:  # this rank's columns
        exact = [g.chunk(batch.group.size(), dim=1)[batch.group.rank()] for g in exact]
    return measure.once(variant, batch, exact)


def _run(case: Case, device: str, batch: Batch, variants: Sequence[Variant], task: Task) -> Any:
    """Run the task on the case's inputs, in fresh processes: one, or a group's ranks."""
    with_megatron = any(variant.needs_megatron for variant in variants)

    def on_rank() -> Any:
        measure.return_freed_memory()
        if with_megatron:
            start_megatron(case.tp)
        assert dist.group.WORLD is not None, "a rank has joined its group"
        return task(batch.shard(dist.group.WORLD))

    def alone() -> Any:
        measure.return_freed_memory()
        if with_megatron and not dist.is_initialized():
            with tempfile.TemporaryDirectory(prefix="sgopd-bench-") as folder:
                join_group(Path(folder, "store"), 0, 1, "nccl" if device == "cuda" else "gloo")
                start_megatron(1)
        return task(batch)

    return _in_child(device, alone) if case.tp == 1 else on_ranks(case.tp, on_rank)[0]


def _in_child(device: str, function: Callable[[], Any]) -> Any:
    """Run in a process of its own on a CPU; CUDA cannot be forked, and counts its memory."""
    if device == "cpu":
        return isolated(function)
    try:
        return function()
    except RuntimeError as error:
        raise ChildFailed(str(error)) from error


if __name__ == "__main__":
    die_with_parent()
    warnings.filterwarnings("ignore")  # the baselines' imports
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as stream:
        main(Job.from_json(sys.stdin.read()), stream)
