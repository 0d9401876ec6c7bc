"""Measures what this machine can do, and by it the least time that a case needs.

The floor of an objective: its exponentials, or its bytes where those take longer, and its matrix
products. On a GPU the bytes decide, on a CPU the exponentials.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sgopd.bench.cases import Case
from megatron_sgopd.bench.inputs import TORCH_DTYPES

# Exponentials (of the JSD one is a logarithm) an element: one for each softmax, when a row is read
# once. The fused form reads a chunk twice, for the statistics and for the gradient: one more.
EXPONENTIALS = {
    "reverse_kl": 2,
    "forward_kl": 2,
    "jsd": 3,
    "gated_reverse_kl": 3,
    "candidate": 3,
    "sampled": 1,
}
# Reads and writes an element: each model's logits once, the gradient once.
ACCESSES = {
    "reverse_kl": 3,
    "forward_kl": 3,
    "jsd": 3,
    "gated_reverse_kl": 4,
    "candidate": 4,
    "sampled": 2,
}
# Matrix products of tokens x vocabulary x hidden: the two models' logits, the student's gradients.
FUSED_PRODUCTS = 4
REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """Measured: elements, bytes and floating-point operations a second."""

    exponentials: float
    copied_bytes: float  # read and written
    fp32_flops: float
    bf16_flops: float

    def floor_seconds(self, case: Case) -> float:
        """Give the least time of a case's forward and backward on one rank."""
        elements = case.tokens * case.vocab // case.tp
        width = case.shard_bytes / elements
        calls = EXPONENTIALS[case.objective] + (case.form == "fused")
        exponentials = calls * elements / self.exponentials
        moved = ACCESSES[case.objective] * elements * width / self.copied_bytes
        seconds = max(exponentials, moved)
        if case.form == "fused":
            flops = self.fp32_flops if case.dtype == "fp32" else self.bf16_flops
            seconds += FUSED_PRODUCTS * 2 * elements * case.hidden / flops
        return seconds

    def line(self) -> str:
        return (
            f"{self.exponentials / 1e9:.2f} G exp2/s, copy {self.copied_bytes / 1e9:.1f} GB/s, "
            f"GEMM fp32 {self.fp32_flops / 1e9:.0f} and bf16 {self.bf16_flops / 1e9:.0f} GFLOP/s"
        )


def measure_rates(device: str) -> Rates:
    """Measure for seconds on a CPU, for less on a GPU."""
    is_gpu = device == "cuda"
    # A block that stays in the cache: torch.exp2 is the faster of torch's two on a CPU.
    block = torch.randn(1 << 24 if is_gpu else 1 << 16, device=device)
    out = torch.empty_like(block)
    exponentials = block.numel() / _fastest(lambda: torch.exp2(block, out=out), 1 if is_gpu else 50)
    source = torch.zeros(1 << 28 if is_gpu else 1 << 26, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _fastest(lambda: target.copy_(source))
    return Rates(exponentials, copied, *(_flops(device, d) for d in TORCH_DTYPES.values()))


def _flops(device: str, dtype: torch.dtype) -> float:
    """Time the four products of a chunk: two projections, two gradients."""
    n, d, v = (4096, 2048, 32_768) if device == "cuda" else (256, 512, 16_384)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    hidden, head, logits = random(n, d), random(v, d), random(n, v)

    def products() -> None:
        torch.mm(hidden, head.T, out=logits)
        torch.mm(hidden, head.T, out=logits)
        torch.mm(logits, head)
        torch.mm(logits.T, hidden)

    return FUSED_PRODUCTS * 2 * n * d * v / _fastest(products)


def _fastest(function: Callable[[], object], calls: int = 1) -> float:
    """Give the seconds of one call, the best of a few repeats after a warm-up."""

    is_gpu = torch.cuda.is_initialized()
    clock = time.perf_counter if is_gpu else time.process_time

    def once() -> float:
        start = clock()
        for _ in range(calls):
            function()
        if is_gpu:
            torch.cuda.synchronize()
        return (clock() - start) / calls

    once()
    return min(once() for _ in range(REPEATS))
