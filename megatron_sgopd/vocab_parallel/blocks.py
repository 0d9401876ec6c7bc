"""Rows in blocks that stay in the cache, in plain PyTorch.

A pass over whole rows would read and write main memory once per operation. Here every operation of
a pass runs on a few rows at a time, in scratch memory that the processor's cache holds, so that a
model's rows are read once per pass.

Exponentials are taken as 2^(c x), c = log2(e) / temperature: on CPUs torch.exp2 is vectorised where
torch.exp goes through a vendor's library (0.29 against 0.82 ns an element on an AMD EPYC), and any
temperature is in the factor c.

Shapes: n tokens of a chunk, b rows of a block, V valid vocabulary rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel.softmax import Softmax

# All buffers of a pass together. On CPUs each is then about a second-level cache; from 0.5 to
# 4 MiB a buffer the speed is flat (LOG.md). GPUs run few large operations instead.
SCRATCH_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
LEAST_ROWS = 4  # of a block, however wide: what is done once a block must not show

Place = slice | Tensor  # where a block's tokens are in a matrix: a range of rows, or their indices


@dataclass(frozen=True)
class Chunk:
    """Tokens that go through statistics, coefficients and gradient together.

    The matrices hold logits [rows, V] of all models, valid columns only; `place` says which rows
    are the chunk's n tokens. A matrix that is scratch may be overwritten between the passes.
    """

    student: Tensor
    teacher: Tensor | None
    reference: Tensor | None
    place: Place
    index: Tensor  # [n] the tokens' places among all T
    local_token: Tensor  # [n] column of the sampled token
    owned: Tensor  # [n] whether this rank has it
    narrow: Tensor | None = None  # where Triton puts the gradient; None: over the student's rows
    student_is_scratch: bool = False
    frozen_is_scratch: bool = False

    def __len__(self) -> int:
        return len(self.local_token)

    def rows(self, block: slice) -> Place:
        """Find the block's tokens in the matrices; a slice wherever they lie together."""
        if isinstance(self.place, slice):
            return slice(self.place.start + block.start, self.place.start + block.stop)
        return together(self.place[block])

    def tokens_of(self, matrix: Tensor) -> Tensor:
        """The sampled tokens' logits [n]; -inf where another rank holds them."""
        if matrix.shape[-1] == 0:
            return matrix.new_full((len(self),), -torch.inf, dtype=torch.float32)
        place = self.place
        if isinstance(place, slice):
            place = torch.arange(place.start, place.stop, device=matrix.device)
        picked = matrix[place, self.local_token]
        return picked.masked_fill(~self.owned, -torch.inf)

    def subtract_at_tokens(self, values: Tensor, block: slice, amount: Tensor) -> None:
        """values[token] -= amount [b] in a block [b, V], where this rank holds the token.

        Before the block is rounded to the matrix's type: p - 1 of a near-certain token would be
        lost in the difference of two rounded numbers.
        """
        rows = self.owned[block].nonzero()[:, 0]
        values[rows, self.local_token[block][rows]] -= amount[rows].to(values.dtype)

    def set_at_tokens(self, values: Tensor) -> None:
        """Puts values [n] in the student's rows where this rank holds the sampled token."""
        own = self.owned.nonzero()[:, 0]
        rows = own + self.place.start if isinstance(self.place, slice) else self.place[own]
        self.student[rows, self.local_token[own]] = values[own].to(self.student.dtype)


def together(indices: Tensor) -> Place:
    """Indices as a slice where they are consecutive; on GPUs looking would cost a wait."""
    if indices.is_cuda or not len(indices):
        return indices
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first == len(indices) - 1 else indices


class Scratch:
    """Buffers [b, V] for one objective's passes, and which block they still hold."""

    def __init__(
        self,
        num_buffers: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        limit: int,
        share: float = 1.0,
    ) -> None:
        """`limit`: rows that there are; no block is longer. `share`: of SCRATCH_BYTES."""
        budget = int(share * SCRATCH_BYTES["cuda" if device.type == "cuda" else "cpu"])
        row_bytes = num_buffers * max(1, width) * dtype.itemsize
        self.num_rows = max(1, min(max(LEAST_ROWS, budget // row_bytes), limit))
        self._buffers = [
            torch.empty(self.num_rows, width, dtype=dtype, device=device)
            for _ in range(num_buffers)
        ]
        self._held: tuple[Chunk, int] | None = None

    def hold(self, chunk: Chunk, block: slice) -> None:
        """Notes that the buffers hold the first pass's results of a block."""
        self._held = (chunk, block.start)

    def still_holds(self, chunk: Chunk, block: slice) -> bool:
        """Tells whether they do; if not, the caller is going to overwrite them."""
        held = self._held is not None and self._held[0] is chunk and self._held[1] == block.start
        if not held:
            self._held = None
        return held

    def buffers(self, b: int) -> list[Tensor]:
        return [buffer[:b] for buffer in self._buffers]

    def blocks(self, n: int) -> Iterator[slice]:
        for i in range(0, n, self.num_rows):
            yield slice(i, min(i + self.num_rows, n))


def load(matrix: Tensor, rows: Place, out: Tensor) -> Tensor:
    """A block's logits in the type of `out`: a view of the matrix where it serves, else `out`."""
    if isinstance(rows, slice):
        view = matrix[rows]
        return view if view.dtype == out.dtype else out.copy_(view)
    if matrix.dtype == out.dtype:
        return torch.index_select(matrix, 0, rows, out=out)
    return out.copy_(matrix.index_select(0, rows))


def destination(matrix: Tensor, rows: Place, scratch: Tensor) -> Tensor:
    """Choose where a block's result is written: the matrix itself where its rows are a view."""
    direct = isinstance(rows, slice) and matrix.dtype == scratch.dtype
    return matrix[rows] if direct else scratch


def store(matrix: Tensor, rows: Place, values: Tensor) -> None:
    """Puts a block's result, which `destination` gave, where it belongs."""
    if not isinstance(rows, slice):
        matrix.index_copy_(0, rows, values.to(matrix.dtype))
    elif matrix.dtype != values.dtype:
        matrix[rows].copy_(values)


def exponent(temperature: float) -> float:
    """The factor c of exp(x / temperature) = 2^(c x)."""
    return math.log2(math.e) / temperature


def centre(x: Tensor, softmax: Softmax, out: Tensor) -> Tensor:
    """x - max to `out`, which may be x; the maximum [b] into the softmax's column."""
    if x.shape[-1] == 0:
        softmax.maximum.fill_(-torch.inf)
        return out
    torch.amax(x, -1, out=softmax.maximum)
    return recentre(x, softmax, out)


def recentre(x: Tensor, softmax: Softmax, out: Tensor) -> Tensor:
    """x minus the maximum that is known, to `out`; rows of -inf alone stay as they are."""
    finite = softmax.maximum.clamp(min=torch.finfo(x.dtype).min)
    return torch.sub(x, finite[:, None], out=out)


def exponentials(centred: Tensor, c: float, softmax: Softmax, out: Tensor) -> Tensor:
    """2^(c centred) to `out`, its row sums into the softmax's column."""
    torch.mul(centred, c, out=out)
    torch.exp2(out, out=out)
    torch.sum(out, -1, out=softmax.total)
    return out


def exp_(values: Tensor) -> Tensor:
    """exp(values) in place."""
    return values.mul_(math.log2(math.e)).exp2_()


def scale_and_shift(values: Tensor, slope: Tensor, bias: Tensor) -> Tensor:
    """slope values + bias in place, with slope and bias [b, 1].

    In two operations: addcmul with a broadcast first operand takes five times as long on CPUs.
    """
    return values.mul_(slope).add_(bias)


def weighted_sum(
    values: Tensor, weights: Tensor, out: Tensor, product: Tensor, careful: bool = False
) -> None:
    """Row sums of values * weights to `out` [b]. Pairwise, as torch.sum is; a dot product is not.

    `product` takes the products. `careful`: a weight of 0 makes 0 of an infinite value too.
    """
    torch.mul(values, weights, out=product)
    if careful:
        product.masked_fill_(weights == 0, 0.0)
    torch.sum(product, -1, out=out)
