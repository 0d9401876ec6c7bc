"""The loss's Triton kernels on one GPU: right first, then how fast. Started by gpu_bench.sh.

  check    losses and gradients against float64, logits of -inf among them, and hidden states
  rates    what this GPU copies and multiplies in this run
  kernels  each pass of each objective on T 16,384 x V 18,992 (an eighth of Qwen's vocabulary)
  calls    whole calls, forward and backward, beside plain PyTorch and peers; their memory
  fused    from hidden states of 2,048 to all 151,936 columns: time, memory, and time by kernel
  tiles    both passes with other tiles than the chosen ones

A short table comes last. Times are medians. A floor is the design's bytes at the rate of a copy (in
the logits' type every model's row is read twice and the gradient written once), and for hidden
states the products besides.

Shapes: T tokens, V vocabulary rows, D hidden.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_sgopd.bench.baselines import baseline_variants
from megatron_sgopd.bench.cases import Case
from megatron_sgopd.bench.gpu_check import is_right
from megatron_sgopd.bench.inputs import Batch, Student, draw
from megatron_sgopd.bench.machine import Rates, measure_rates
from megatron_sgopd.bench.measure import times
from megatron_sgopd.bench.variants import Loss, Variant, our_loss, plain_variants
from megatron_sgopd.vocab_parallel import distillation_loss, triton_kernels
from megatron_sgopd.vocab_parallel.blocks import Chunk
from megatron_sgopd.vocab_parallel.choice import Choice, make_objective
from megatron_sgopd.vocab_parallel.shard import Shard

SECTIONS = ("check", "rates", "kernels", "calls", "fused", "tiles")
TOKENS, SHARD, VOCABULARY, HIDDEN = 16_384, 18_992, 151_936, 2048
# Milliseconds on an H200.
TARGETS = {
    "reverse_kl": 0.85,
    "sampled": 0.68,
    "gated_reverse_kl": 1.16,  # 15 % above its bytes
    "fused": 66.0,
    "fused gated": 83.0,
}
BYTES = {"reverse_kl": 10, "sampled": 8, "gated_reverse_kl": 14}  # an element, in bf16
REPEATS = 20


@dataclass(frozen=True)
class Row:
    """A line of the last table."""

    what: str
    ms: float
    target_ms: float | None = None
    floor_ms: float | None = None
    extra_mb: float | None = None

    def line(self) -> str:
        def number(value: float | None, digits: int) -> str:
            return "" if value is None else f"{value:.{digits}f}"

        share = "" if self.floor_ms is None else f"{self.floor_ms / self.ms:.0%}"
        cells = (number(self.ms, 3), number(self.target_ms, 2), number(self.floor_ms, 3), share)
        return f"{self.what:<52}" + "".join(f"{c:>10}" for c in (*cells, number(self.extra_mb, 0)))


HEAD = f"{'':<52}" + "".join(f"{c:>10}" for c in ("ms", "target", "floor", "reached", "extra MB"))


@dataclass
class Bench:
    """What the sections share."""

    deadline: float
    rows: list[Row]
    rates: Rates

    def has_time(self, seconds: float, what: str) -> bool:
        left = self.deadline - time.monotonic()
        if left < seconds:
            print(f"{what}: left out, {left:.0f} s are left of --seconds")
        return left >= seconds

    def add_ours(self, what: str, measured: Callable[[], tuple[float, float]]) -> None:
        seconds, extra = measured()
        self.add(what, seconds, extra_mb=extra)

    def add_peer(self, what: str, measured: Callable[[], tuple[float, float]]) -> None:
        """A line of (seconds, MB); a peer may fail in any way, and the others are measured."""
        try:
            self.add_ours(what, measured)
        except Exception as error:
            print(f"{what}: {type(error).__name__}: {str(error).splitlines()[:1]}")

    def add(self, what: str, seconds: float, **more: float | None) -> None:
        self.rows.append(Row(what, seconds * 1e3, **more))
        print(self.rows[-1].line())


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    about = torch.cuda.get_device_properties(0)
    print(f"{about.name}, {about.multi_processor_count} multiprocessors, torch {torch.__version__}")
    assumed = Rates(3e12, 4.3e12, 50e12, 780e12)  # an H200's, until `rates` has measured
    bench = Bench(time.monotonic() + arguments.seconds, [], assumed)
    sections: dict[str, Callable[[Bench], bool]] = {
        "check": lambda bench: is_right(),
        "rates": rates,
        "kernels": kernels,
        "calls": calls,
        "fused": fused,
        "tiles": tiles,
    }
    try:
        for name in arguments.only:
            print(f"\n-- {name}", flush=True)
            if not sections[name](bench):
                print(f"gpu_bench: {name} failed, nothing more is measured", file=sys.stderr)
                return 1
    finally:  # what was measured is shown, whatever came then
        print("\n".join(["", HEAD, *(row.line() for row in bench.rows)]), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps([asdict(row) for row in bench.rows], indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_bench.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table's rows there")
    parser.add_argument(
        "--seconds", type=float, default=500.0, help="after which no section starts (%(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    return parser


# -- timing ----------------------------------------------------------------------------------------


def on_the_gpu(function: Callable[[], object], before: Callable[[], object] = list) -> float:
    """The median seconds a call takes on the GPU; `before` is not counted."""
    seconds = []
    for i in range(REPEATS + 3):
        before()
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which all is launched that follows
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if i >= 3:
            seconds.append(start.elapsed_time(end) / 1e3)
    return median(seconds)


def by_the_clock(function: Callable[[], object], repeats: int) -> float:
    """The median seconds until a call's work is done."""
    seconds = []
    for i in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        if i > 0:
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def risen(function: Callable[[], object]) -> float:
    """The MB by which memory is higher at a call's highest than before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# -- check, rates, kernels, tiles ------------------------------------------------------------------


def rates(bench: Bench) -> bool:
    bench.rates = measure_rates("cuda")
    print(bench.rates.line())
    return True


@dataclass(frozen=True)
class Passes:
    """Both passes of one objective on given rows, ready to be launched alone."""

    statistics: Callable[[], object]
    gradient: Callable[[], object]
    restore: Callable[[], object]  # the student's rows, which the gradient lies over


def passes(kind: str, tokens: int, width: int, dtype: torch.dtype) -> Passes:
    """All rows open: the reference is read in both passes."""
    torch.manual_seed(0)
    base = torch.empty(tokens, width, device="cuda", dtype=dtype).normal_(0.0, 3.0)
    count = {"sampled": 2, "reverse_kl": 2, "gated_reverse_kl": 3}[kind]
    rows = [base + torch.randn_like(base) for _ in range(count)]
    reference = rows[2] if count > 2 else None
    lambdas = (1.0, 1.8) if count > 2 else (1.0,)
    estimator = "sampled" if kind == "sampled" else "full_vocab"
    places = torch.arange(tokens, device="cuda")
    shard = Shard.from_rows(
        rows[0],
        tokens=places % width,
        mask=torch.ones_like(places),
        group=None,
        vocab_size=width,
        temperature=1.0,
    )
    choice = Choice(estimator, "reverse_kl", 0.5, None, lambdas, None, "triton")
    models: dict[str, Any] = dict(zip(("student", "teacher", "reference"), rows, strict=False))
    objective = make_objective(choice, shard, models)
    chunk = Chunk(
        rows[0], rows[1], reference, slice(0, tokens), shard.active, shard.local_token, shard.owned
    )
    local = objective.statistics(chunk)
    one = torch.ones(tokens, device="cuda")
    factors = triton_kernels.Factors(
        1e-3 * one, None, 1e-3 * one, None if reference is None else 0.8 * one
    )
    return Passes(
        lambda: objective.statistics(chunk),
        lambda: triton_kernels.gradient(objective, chunk, local, factors),
        lambda: rows[0].copy_(base),
    )


def kernels(bench: Bench) -> bool:
    for kind, per_element in BYTES.items():
        each = passes(kind, TOKENS, SHARD, torch.bfloat16)
        first = on_the_gpu(each.statistics)
        second = on_the_gpu(each.gradient, each.restore)
        moved = per_element * TOKENS * SHARD / bench.rates.copied_bytes * 1e3
        print(f"{kind}: statistics {first * 1e3:.3f} ms, gradient {second * 1e3:.3f} ms")
        words = f"kernels, {kind}, {TOKENS} x {SHARD}"
        bench.add(words, first + second, target_ms=TARGETS[kind], floor_ms=moved)
        del each
        torch.cuda.empty_cache()
    return True


def tiles(bench: Bench) -> bool:
    """Statistics and gradient in ms for other tiles; the chosen one's first."""
    for kind, tokens, width, dtype in (
        ("reverse_kl", TOKENS, SHARD, torch.bfloat16),
        ("gated_reverse_kl", TOKENS, SHARD, torch.bfloat16),
        ("reverse_kl", 512, VOCABULARY, torch.float32),
    ):
        each = passes(kind, tokens, width, dtype)
        K = 16 // dtype.itemsize
        found = [f"chosen {_both(each)}"]
        for U, L in ((1, 128), (1, 256), (2, 128), (2, 256), (2, 512), (4, 128)):
            if not bench.has_time(60, "tiles"):
                return True
            tile = triton_kernels.Tile(U, L, K)
            with mock.patch.object(triton_kernels.Tile, "of", lambda matrices, tile=tile: tile):
                found.append(f"{U}x{L} {_both(each)}")
        print(f"{kind}, {tokens} x {width}, {dtype}: " + ", ".join(found), flush=True)
        del each
        torch.cuda.empty_cache()
    return True


def _both(each: Passes) -> str:
    first, second = on_the_gpu(each.statistics), on_the_gpu(each.gradient, each.restore)
    return f"{first * 1e3:.3f} + {second * 1e3:.3f}"


# -- whole calls -----------------------------------------------------------------------------------


def calls(bench: Bench) -> bool:
    """By the clock, forward and backward, the logits written over."""
    for objective in ("reverse_kl", "gated_reverse_kl", "sampled"):
        form = "sampled" if objective == "sampled" else "logits"
        case = Case(form, objective, TOKENS, SHARD, "bf16", 1, 0)
        missing: dict[str, str] = {}
        variants = [
            *plain_variants(case, "cuda"),
            Variant("ours", partial(our_loss, case), ours=True),
            Variant(
                "ours, plain PyTorch", with_backend("torch", partial(our_loss, case)), ours=True
            ),
            *(v for v in baseline_variants(case, "cuda", missing) if not v.needs_megatron),
        ]
        batch = draw(case, "cuda")
        for variant in variants:
            if bench.has_time(30, f"{objective}, {variant.name}"):
                add = bench.add_ours if variant.ours else bench.add_peer
                add(f"call, {objective}: {variant.name}", partial(measure_call, variant, batch))
        for name, reason in missing.items():
            print(f"left out: {name}: {reason}")
        del batch
        torch.cuda.empty_cache()
    return True


def measure_call(variant: Variant, batch: Batch) -> tuple[float, float]:
    seconds = median(times([variant], batch, rounds=10, budget_s=10.0)[variant.name])
    student = Student(batch.student)
    return seconds, risen(lambda: variant.loss(student.rows(), batch).backward())


def with_backend(name: str, loss: Loss) -> Loss:
    chosen = partial(distillation_loss, backend=name)

    def run(student: Any, batch: Batch) -> Tensor:
        with mock.patch("megatron_sgopd.bench.variants.distillation_loss", chosen):
            return loss(student, batch)

    return run


# -- from hidden states ----------------------------------------------------------------------------


def fused(bench: Bench) -> bool:
    """A head with fp32 `main_grad`, as Megatron's; peers give its gradient in the head's type."""
    case = Case("fused", "reverse_kl", TOKENS, VOCABULARY, "bf16", 1, HIDDEN)
    batch = draw(case, "cuda")
    assert isinstance(batch.student, tuple)
    main_grad = torch.zeros(batch.student[1].shape, device="cuda")
    ours = partial(run_fused, main_grad=main_grad)
    unit = 2.0 * TOKENS * VOCABULARY * HIDDEN / bench.rates.bf16_flops
    moved = TOKENS * VOCABULARY / bench.rates.copied_bytes
    shape = f"{TOKENS} x {HIDDEN} x {VOCABULARY}"
    reference = (batch.student[0] * 0.9, batch.student[1] * 1.02)
    for name, objective, models, per_element in (
        ("fused", "reverse_kl", 2, 18),
        ("fused gated", "gated_reverse_kl", 3, 26),
    ):
        if not bench.has_time(30, name):
            continue
        given = replace(batch, reference=reference if models > 2 else None)
        call = partial(
            ours, batch=given, loss=partial(our_loss, replace(case, objective=objective))
        )
        seconds, extra = by_the_clock(call, 7), risen(call)
        floor = ((models + 2) * unit + per_element * moved) * 1e3
        bench.add(f"{name}, {shape}: ours", seconds, target_ms=TARGETS[name], floor_ms=floor,
                  extra_mb=extra)  # fmt: skip
        by_kernel(call)
    peers(bench, case, batch)
    return True


def run_fused(batch: Batch, loss: Loss, main_grad: Tensor | None = None) -> None:
    assert isinstance(batch.student, tuple)
    hidden, head = (x.detach().requires_grad_() for x in batch.student)
    if main_grad is not None:
        head.main_grad = main_grad  # type: ignore[attr-defined]
    loss((hidden, head), batch).backward()


def by_kernel(call: Callable[[], object]) -> None:
    """Where a call's time on the GPU goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:10]
    for event in found:
        ms = event.self_device_time_total / 1e3
        print(f"    {ms:8.2f} ms {event.count:5d} x  {event.key[:90]}")


def time_and_memory(call: Callable[[], object]) -> tuple[float, float]:
    return by_the_clock(call, 3), risen(call)


def peers(bench: Bench, case: Case, batch: Batch) -> None:
    missing: dict[str, str] = {}
    for variant in baseline_variants(case, "cuda", missing):
        if bench.has_time(60, variant.name):
            call = partial(run_fused, batch, variant.loss)
            bench.add_peer(f"fused: {variant.name}", partial(time_and_memory, call))
            torch.cuda.empty_cache()
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
