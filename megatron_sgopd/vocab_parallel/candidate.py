"""The gate applied to every vocabulary entry: D = -E_p A, A(v) = (T-S)(v) + (lambda(v)-1)(T-R)(v).

A is made of log-probs: with raw logits the normalisers would not cancel (docs/method.md). So the
normalisers are merged first, and E_p A takes a pass and a collective more. The row's gradient is
-p (A - E_p A).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel.blocks import (
    Chunk,
    centre,
    destination,
    exp_,
    exponentials,
    load,
    scale_and_shift,
    weighted_sum,
)
from megatron_sgopd.vocab_parallel.objective import Coefficients, Found, Objective, part
from megatron_sgopd.vocab_parallel.softmax import Columns

# (a2 [b, V], places of the b tokens among all T) -> lambda [b, V]
CandidateLambda = Callable[[Tensor, Tensor], Tensor]


class Candidate(Objective):
    """A lambda per vocabulary entry in place of the row's."""

    name = "gated reverse KL of candidates"
    num_buffers = 4
    candidate_lambda: CandidateLambda

    def block_statistics(self, chunk: Chunk, block: slice, columns: Columns) -> None:
        a, e, *_ = self.scratch(chunk).buffers(block.stop - block.start)
        self.student_block(chunk, block, columns, a, e)
        self.entropy_sum(a, e, columns, a)
        for softmax, matrix in (
            (columns.teacher, chunk.teacher),
            (columns.reference, chunk.reference),
        ):
            assert softmax is not None and matrix is not None, "the gate compares three models"
            x = load(matrix, chunk.rows(block), a)
            exponentials(centre(x, softmax, a), self.c, softmax, a)

    def divergence(self, chunk: Chunk, local: Columns, found: Found, c: Coefficients) -> Tensor:
        sums = self._expected(chunk, local, found)
        if not self.careful and not bool(sums.isfinite().all()):  # perhaps where it does not count
            self.careful = True
            sums = self._expected(chunk, local, found)
        return -self.shard.all_gather(sums).double().sum(0)[0]

    def _expected(self, chunk: Chunk, local: Columns, found: Found) -> Tensor:
        """This shard's part of E_p A, [1, n]."""
        sums = torch.empty(1, len(chunk), dtype=self.shard.dtype, device=chunk.owned.device)
        for block, p, advantage, other in self._advantages(chunk, local, found):
            weighted_sum(advantage, p, sums[0, block], other, self.careful)
        return sums

    def gradient(
        self, chunk: Chunk, local: Columns, found: Found, c: Coefficients, divergence: Tensor
    ) -> None:
        weight, additive = c.per_logit(self.temperature)
        slope = (-weight).to(self.shard.dtype)[:, None]
        bias = torch.where(weight == 0, 0.0, -weight * divergence)  # which may be infinite
        bias = bias if additive is None else bias + additive
        bias = bias.to(self.shard.dtype)[:, None]
        for block, p, advantage, _ in self._advantages(chunk, local, found):
            rows = chunk.rows(block)
            if self.careful:
                advantage.masked_fill_(slope[block] == 0, 0.0)
            scale_and_shift(advantage, slope[block], bias[block])
            out = destination(chunk.student, rows, advantage)
            torch.mul(p, advantage, out=out)
            if self.careful:
                out.masked_fill_(p == 0, 0.0)
            self.finish(chunk, block, out, part(additive, block))

    def _advantages(
        self, chunk: Chunk, local: Columns, found: Found
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(block, p, A, scratch) of each block."""
        scratch, constants = self.scratch(chunk), {}
        for name in ("student", "teacher", "reference"):
            merged = getattr(found, name)
            constant = self.own(merged)[1] / self.temperature - merged.log_total
            constants[name] = constant.to(self.shard.dtype)[:, None]
        for block in scratch.blocks(len(chunk)):
            s, t, r, other = scratch.buffers(block.stop - block.start)
            columns = local.at(block)
            for name, out in (("student", s), ("teacher", t), ("reference", r)):
                matrix, softmax = getattr(chunk, name), getattr(columns, name)
                self.again(matrix, chunk.rows(block), softmax, out)
                if self.temperature != 1.0:
                    out.div_(self.temperature)
                out.add_(constants[name][block])
            torch.sub(t, r, out=r)
            a2 = torch.sub(t, s, out=t)
            if self.careful:  # a column that both models exclude says nothing
                a2.nan_to_num_(0.0, torch.inf, -torch.inf)
                r.nan_to_num_(0.0, torch.inf, -torch.inf)
            extra = self.candidate_lambda(a2, chunk.index[block]) - 1.0
            advantage = r.mul_(extra)
            if self.careful:  # an infinite difference counts only where lambda is not 1
                advantage.masked_fill_(extra == 0, 0.0)
                advantage.masked_fill_(a2 == -torch.inf, 0.0)  # excluded by the teacher anyway
            yield block, exp_(s), a2.add_(advantage), other
