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
    weighted_sum,
)
from megatron_sgopd.vocab_parallel.objective import Coefficients, Found, Objective
from megatron_sgopd.vocab_parallel.softmax import Columns


class Sampled(Objective):
    """Policy gradient on the sampled token, with an advantage that is held constant."""

    name = "sampled divergence"
    num_buffers = 2
    scratch_share = 0.3  # nothing is done once a block: smaller ones are as quick
    triton_sums = "none"
    keeps = True

    def block_statistics(self, chunk: Chunk, block: slice, columns: Columns) -> None:
        a, e = self.scratch(chunk).buffers(block.stop - block.start)
        for softmax, matrix in (
            (columns.teacher, chunk.teacher),
            (columns.reference, chunk.reference),
        ):
            if softmax is not None and matrix is not None:
                x = load(matrix, chunk.rows(block), a)
                exponentials(centre(x, softmax, a), self.c, softmax, a)
        e = self.student_block(chunk, block, columns, a, e)  # last: its results may be kept
        self.entropy_sum(a, e, columns, a)

    def repair(self, chunk: Chunk, columns: Columns) -> None:
        if not chunk.student_is_scratch:
            super().repair(chunk, columns)
            return
        self.careful = True
        assert columns.entropy is not None  # its sum is what -inf spoils; exponentials are there
        for block in self.scratch(chunk).blocks(len(chunk)):
            a, other = self.scratch(chunk).buffers(block.stop - block.start)
            e = load(chunk.student, chunk.rows(block), a)
            torch.log(e, out=other).mul_(self.temperature)
            weighted_sum(other, e, columns.entropy[block], other, careful=True)

    def divergence(self, chunk: Chunk, local: Columns, found: Found, c: Coefficients) -> Tensor:
        return -advantage(found, c) * found.student_logprobs

    def gradient(
        self, chunk: Chunk, local: Columns, found: Found, c: Coefficients, divergence: Tensor
    ) -> None:
        weight, additive = c.per_logit(self.temperature)
        toward = torch.where(weight == 0, 0.0, weight * advantage(found, c)) + additive
        share, _ = self.own(found.student)
        slope = (toward * share / found.student.softmax.total).to(self.shard.dtype)
        if (kernels := self.kernels(chunk.student)) is not None:
            kernels.gradient(self, chunk, local, kernels.Factors(bias=slope, at_token=toward))
            return
        scratch = self.scratch(chunk)
        for block in scratch.blocks(len(chunk)):
            a, e = scratch.buffers(block.stop - block.start)
            rows = chunk.rows(block)
            if chunk.student_is_scratch:
                e = load(chunk.student, rows, e)
            elif not scratch.still_holds(chunk, block):
                self.again(chunk.student, rows, local.at(block, self.layout).student, a)
                torch.exp2(torch.mul(a, self.c, out=e), out=e)
            out = destination(chunk.student, rows, a)
            torch.mul(e, slope[block, None], out=out)
            self.finish(chunk, block, out, toward[block])


def advantage(found: Found, c: Coefficients) -> Tensor:
    """A = (T-S) + (lambda-1)(T-R), [n]; the reference is read only where there is one."""
    if found.teacher_logprobs is None:
        return torch.zeros_like(found.student_logprobs)
    wish = found.teacher_logprobs - found.student_logprobs
    if found.reference_logprobs is None:
        return wish
    return wish + (c.lam - 1.0) * (found.teacher_logprobs - found.reference_logprobs)
