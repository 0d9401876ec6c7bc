"""Both passes of an objective as Triton kernels for NVIDIA GPUs, launched on a chunk.

The kernels are in `triton_statistics` and `triton_gradient`. They read a chunk's matrices as they
lie: any strides, rows by a slice or by indices, fp32, bf16 or fp16. They take no memory beyond a
few numbers a token and never wait for the GPU.

Shapes: n tokens of a chunk, V valid vocabulary rows of this rank, C columns of statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from megatron_sgopd.vocab_parallel.blocks import Chunk
from megatron_sgopd.vocab_parallel.softmax import Columns
from megatron_sgopd.vocab_parallel.triton_gradient import gradient_kernel
from megatron_sgopd.vocab_parallel.triton_rows import FORWARD, REVERSE
from megatron_sgopd.vocab_parallel.triton_statistics import statistics_kernel

if TYPE_CHECKING:
    from megatron_sgopd.vocab_parallel.objective import Objective

SUMS = {"none": 0, "reverse": REVERSE.value, "forward": FORWARD.value}
READ_BYTES = 16  # what a thread reads at once
# By TRITON_INTERPRET=1 when this module was imported; then the kernels run on CPUs.
INTERPRETED = not isinstance(statistics_kernel, triton.JITFunction)


@dataclass(frozen=True)
class Tile:
    """Describes how a program walks along a row: L lanes read K neighbouring columns U times."""

    U: int
    L: int
    K: int

    @classmethod
    def from_matrices(cls, matrices: Sequence[Tensor]) -> Tile:
        """Two reads a lane of each model, as wide as there are; no more lanes than a row needs.

        Three models in 16 bits get one read each: two would take 94 registers a thread, with which
        half as many have place on a multiprocessor.
        """
        itemsize, width = min(m.element_size() for m in matrices), matrices[0].shape[-1]
        U = 1 if len(matrices) > 2 and itemsize == 2 else 2
        K = READ_BYTES // itemsize
        L = 256
        while L > 32 and width < L * U * K:
            L //= 2
        return cls(U, L, K)


def statistics(objective: Objective, chunk: Chunk) -> Columns:
    """This shard's columns of a chunk, the sampled tokens' logits among them."""
    layout, n, student = objective.layout, len(chunk), chunk.student
    columns = Columns.empty(layout, n, torch.float32, student.device)
    if n == 0:
        return columns
    matrices, models = _models(chunk)
    tile = Tile.from_matrices(matrices)
    sum_at = _sum_at(objective)
    with torch.cuda.device_of(student):
        statistics_kernel[(n,)](
            out=columns.storage,
            extra=_extra(objective, chunk),
            n=n,
            c=objective.c,
            HAS_TEACHER=layout.teacher,
            HAS_REFERENCE=layout.reference,
            TARGETS=layout.targets,
            ENTROPY=layout.entropy,
            SUMS=SUMS[objective.triton_sums or "none"],
            SUM_AT=sum_at,
            U=tile.U,
            L=tile.L,
            K=tile.K,
            num_warps=tile.L // 32,
            enable_fp_fusion=True,
            **models,
            **_places(chunk),
        )
    if objective.triton_sums == "forward":
        for i, source in enumerate(_sum_sources(objective)):
            if sum_at[source] != i:
                columns.sums[i].copy_(columns.sums[sum_at[source]])
    return columns


@dataclass(frozen=True)
class Factors:
    """Constants of a chunk's rows, [n] each; with d = (x - t) - extra (t - r), the gradient is

    none, reverse   e_x (slope d + bias)
    forward         e_x bias + e_h slope, h = t + extra (t - r) - maximum

    about the shard's own centres, minus `at_token` at the sampled token.
    """

    bias: Tensor
    at_token: Tensor | None
    slope: Tensor | None = None
    extra: Tensor | None = None
    maximum: Tensor | None = None

    def as_rows(self) -> tuple[Tensor, ...]:
        given = (self.slope, self.bias, self.extra, self.maximum, self.at_token)
        zero = torch.zeros_like(self.bias, dtype=torch.float32)
        return tuple(zero if v is None else v.float().contiguous() for v in given)


def gradient(objective: Objective, chunk: Chunk, local: Columns, factors: Factors) -> None:
    """Writes the gradient over the student's rows, or to the chunk's `narrow`.

    That may be a view of the same memory whose rows start where the student's do, in a narrower
    type: each program reads ahead of what it writes.
    """
    if len(chunk) == 0 or chunk.student.shape[-1] == 0:
        return
    matrices, models = _models(chunk)
    out = chunk.student if chunk.narrow is None else chunk.narrow
    same_memory = out.untyped_storage().data_ptr() == chunk.student.untyped_storage().data_ptr()
    narrows = same_memory and out.element_size() < chunk.student.element_size()
    tile = Tile.from_matrices(matrices)
    softmaxes = [s or local.student for s in (local.student, local.teacher, local.reference)]
    with torch.cuda.device_of(out):
        gradient_kernel[(len(chunk),)](
            out=out,
            out_stride=out.stride(0),
            out_step=out.stride(1),
            maxima=tuple(s.maximum for s in softmaxes),
            factors=factors.as_rows(),
            c=objective.c,
            HAS_REFERENCE=local.reference is not None and factors.extra is not None,
            SUMS=SUMS[objective.triton_sums or "none"],
            NARROWS=narrows,
            BLOCK=tile.U * tile.L * tile.K,
            num_warps=tile.L // 32,
            enable_fp_fusion=True,
            **models,
            **_places(chunk),
        )


def _models(chunk: Chunk) -> tuple[list[Tensor], dict[str, Any]]:
    """(the matrices there are, the kernels' arguments for them)."""
    given = (chunk.student, chunk.teacher, chunk.reference)
    models = tuple(chunk.student if m is None else m for m in given)
    steps = tuple(m.stride(1) for m in models)
    arguments = {
        "models": models,
        "strides": tuple(m.stride(0) for m in models),
        "steps": steps,
        "width": chunk.student.shape[-1],
        "WIDE": max(steps) > 1,
    }
    return [m for m in given if m is not None], arguments


def _places(chunk: Chunk) -> dict[str, Any]:
    """The kernels' arguments for where a chunk's tokens are."""
    is_slice = isinstance(chunk.place, slice)
    return {
        "place": chunk.index if isinstance(chunk.place, slice) else chunk.place,
        "first": chunk.place.start if isinstance(chunk.place, slice) else 0,
        "tokens": chunk.local_token,
        "owned": chunk.owned,
        "HAS_PLACE": not is_slice,
    }


def _extra(objective: Objective, chunk: Chunk) -> Tensor:
    """lambda - 1 of the extrapolated targets, [targets, n]."""
    lambdas = objective.extrapolated if objective.layout.targets else ()
    out = torch.empty(len(lambdas), len(chunk), device=chunk.student.device)
    for row, lam in zip(out, lambdas, strict=True):
        if isinstance(lam, Tensor):
            row.copy_(lam[chunk.index].double() - 1.0)
        else:
            row.fill_(lam - 1.0)
    return out


def _sum_sources(objective: Objective) -> list[int]:
    """Tells whose exponentials weigh each sum of the forward KL: 0 the teacher's, 1 and 2 a
    target's.
    """
    sources, target = [], 0
    for lam in objective.lambdas:
        is_teacher = not isinstance(lam, Tensor) and lam == 1.0
        target += not is_teacher
        sources.append(0 if is_teacher else target)
    return sources


def _sum_at(objective: Objective) -> tuple[int, int, int]:
    """Tells where the forward KL's sums of the teacher and of two targets go; -1: not wanted."""
    sources = _sum_sources(objective) if objective.triton_sums == "forward" else []
    first, second, third = (sources.index(i) if i in sources else -1 for i in range(3))
    return first, second, third
