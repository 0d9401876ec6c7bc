"""The sampled-token objective: D = -sg[(T-S) + (lambda-1)(T-R)] log p(y); arXiv 2602.12125.

Its gradient is a multiple of p - onehot(y), so that nothing but the student's rows is read again.
Teacher and reference may have come as log-probs; then they are not read at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel.blocks import (
    Chunk,
    centre,
    destination,
    exponentials,
    load,
    store,
    weighted_sum,
)
from megatron_sgopd.vocab_parallel.objective import Coefficients, Constants, Found, Objective
from megatron_sgopd.vocab_parallel.softmax import Columns


class Sampled(Objective):
    """Policy gradient on the sampled token, with an advantage that is held constant."""

    name = "sampled divergence"
    scratch_share = 0.325  # it needs little memory otherwise, and small blocks cost it little
    triton_sums = "none"
    keeps = True
    one_pass = True

    @property
    def num_buffers(self) -> int:  # type: ignore[override]
        return 2 if self.layout.entropy else 1

    def block_statistics(self, chunk: Chunk, block: slice, columns: Columns) -> None:
        e, *more = self.scratch(chunk).buffers(block.stop - block.start)
        for softmax, matrix in (
            (columns.teacher, chunk.teacher),
            (columns.reference, chunk.reference),
        ):
            if softmax is not None and matrix is not None:
                x = load(matrix, chunk.rows(block), e)
                exponentials(centre(x, softmax, e), self.c, softmax, e)
        a = more[0] if more else None
        e = self.student_block(chunk, block, columns, a, e)  # last: its results may be kept
        if a is not None:
            self.entropy_sum(a, e, columns, a)

    def repair(self, chunk: Chunk, columns: Columns) -> None:
        if not chunk.student_is_scratch:
            super().repair(chunk, columns)
            return
        self.careful = True
        assert columns.entropy is not None  # its sum is what -inf spoils; exponentials are there
        for block in self.scratch(chunk).blocks(len(chunk)):
            e, other = self.scratch(chunk).buffers(block.stop - block.start)
            e = load(chunk.student, chunk.rows(block), e)
            torch.log(e, out=other).mul_(self.temperature)
            weighted_sum(other, e, columns.entropy[block], other, careful=True)

    def divergence(self, chunk: Chunk, local: Columns, found: Found, c: Coefficients) -> Tensor:
        return -advantage(found, c) * found.student_logprobs

    def gradient(
        self, chunk: Chunk, local: Columns, found: Found, c: Coefficients, divergence: Tensor
    ) -> None:
        constants = self.constants(found, c)
        if (kernels := self.kernels(chunk.student)) is not None:
            toward = self.toward(found, c)
            factors = kernels.Factors(bias=constants.slope[:, 0], at_token=toward)
            kernels.gradient(self, chunk, local, factors)
            return
        for block in self.scratch(chunk).blocks(len(chunk)):
            self.block_gradient(chunk, block, local.at(block), constants.part(block))
        self.finish_tokens(chunk, found, c)

    def toward(self, found: Found, c: Coefficients) -> Tensor:
        """weight A + additive, [n]: the gradient is that times p - onehot(y)."""
        weight, additive = c.per_logit(self.temperature)
        toward = torch.where(weight == 0, 0.0, weight * advantage(found, c))
        return toward if additive is None else toward + additive

    def constants(self, found: Found, c: Coefficients) -> Constants:
        slope = self.toward(found, c) / found.student_total
        if found.models.weight is not None:
            slope = slope * self.own(found.student)[0]
        return Constants(slope.to(self.shard.dtype)[:, None], None, None, None)

    def block_gradient(
        self, chunk: Chunk, block: slice, columns: Columns, constants: Constants
    ) -> None:
        scratch, rows = self.scratch(chunk), chunk.rows(block)
        e, *_ = scratch.buffers(block.stop - block.start)
        if chunk.student_is_scratch:
            e = load(chunk.student, rows, e)
        elif not scratch.still_holds(chunk, block):
            self.again(chunk.student, rows, columns.student, e).mul_(self.c).exp2_()
        out = destination(chunk.student, rows, e)
        torch.mul(e, constants.slope, out=out)
        store(chunk.student, rows, out)

    def finish_tokens(self, chunk: Chunk, found: Found, c: Coefficients) -> None:
        """Sets what p - 1 makes, in float64: of a near-certain token it is lost in a difference."""
        chunk.set_at_tokens(self.toward(found, c) * found.student_logprobs.expm1())


def advantage(found: Found, c: Coefficients) -> Tensor:
    """A = (T-S) + (lambda-1)(T-R), [n]; the reference is read only where there is one."""
    if found.teacher_logprobs is None:
        return torch.zeros_like(found.student_logprobs)
    wish = found.teacher_logprobs - found.student_logprobs
    if found.reference_logprobs is None:
        return wish
    return wish + (c.lam - 1.0) * (found.teacher_logprobs - found.reference_logprobs)
