"""Forward KL and the generalised Jensen-Shannon divergence, to the extrapolated teacher.

With p the student's and q the target's distribution, and beta strictly between 0 and 1:

    forward KL          KL(q || p);  the row's gradient is p - q
    JSD(beta)           beta KL(q || m) + (1-beta) KL(p || m),  m = (1-beta) p + beta q;
                        the row's gradient is (1-beta) p (log(p/m) - KL(p || m))

The end points are special cases and not limits: beta 0 names forward KL and 1 reverse KL, while
JSD(beta) itself goes to 0 at both ends (JSD(beta) / beta to forward KL, JSD(beta) / (1-beta) to
reverse KL); arXiv 2306.13649. The mixture needs both normalisers, so that JSD takes a pass and a
collective more.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from megatron_sgopd.vocab_parallel.objective import (
    Coefficients,
    Found,
    is_one,
    part,
)
from megatron_sgopd.vocab_parallel.reverse_kl import TowardTarget
from megatron_sgopd.vocab_parallel.softmax import Columns, Softmax, mean

LARGEST = 80.0  # |log p - log q| beyond which the mixture is one of the two, in fp32 and below


class BothRows(TowardTarget):
    """Objectives whose gradient pass reads the target's row beside the student's."""

    @property
    def num_buffers(self) -> int:  # type: ignore[override]
        return 5 if self.layout.reference else 4

    def block_statistics(self, chunk: Chunk, block: slice, columns: Columns) -> None:
        a, e, t, other, *more = self.scratch(chunk).buffers(block.stop - block.start)
        rows = chunk.rows(block)
        assert chunk.teacher is not None and columns.teacher is not None
        self.student_block(chunk, block, columns, a, e)
        self.entropy_sum(a, e, columns, other)
        t = centre(load(chunk.teacher, rows, t), columns.teacher, t)
        exponentials(t, self.c, columns.teacher, other)
        gap = t
        if columns.reference is not None and chunk.reference is not None:
            r = centre(load(chunk.reference, rows, e), columns.reference, e)
            exponentials(r, self.c, columns.reference, other)
            gap = torch.sub(t, r, out=more[0])
        own = iter(columns.targets)
        for i, lam in enumerate(self.lambdas):
            if is_one(lam):
                h, softmax = t, columns.teacher
                torch.exp2(torch.mul(t, self.c, out=e), out=e)
            else:
                softmax = next(own)
                h = self.target_block(lam, chunk, block, t, gap, other)
                h = centre(h, softmax, other)
                exponentials(h, self.c, softmax, e)
            if columns.sums:
                self.cross_sum(h, a, e, columns.sums[i], other)

    def cross_sum(self, h: Tensor, x: Tensor, e: Tensor, out: Tensor, other: Tensor) -> None:
        """Sum of e_h (h - x) about the maxima, for the objectives that have it."""

    def target_rows(
        self, chunk: Chunk, local: Columns, found: Found, c: Coefficients
    ) -> Iterator[tuple[slice, Tensor, Tensor, list[Tensor]]]:
        """(block, x - m, h - m of the chosen target, scratch to use) of each block."""
        scratch = self.scratch(chunk)
        chosen = self.target_maximum(local, c)
        extra = (c.lam - 1.0).to(self.shard.dtype) if self.extrapolated else None
        assert chunk.teacher is not None
        for block in scratch.blocks(len(chunk)):
            a, e, h, *more = scratch.buffers(block.stop - block.start)
            rows = chunk.rows(block)
            columns = local.at(block)
            assert columns.teacher is not None
            x = self.again(chunk.student, rows, columns.student, a)
            t = self.again(chunk.teacher, rows, columns.teacher, h)
            if extra is not None and bool((extra[block] != 0).any()):
                assert chunk.reference is not None and columns.reference is not None
                r = self.again(chunk.reference, rows, columns.reference, e)
                gap = torch.sub(t, r, out=r)
                if self.careful:
                    gap.nan_to_num_(0.0, 0.0, 0.0)
                t.addcmul_(gap, extra[block, None])
                t.sub_(chosen[block, None])
            yield block, x, t, [e, *more]

    def target_maximum(self, local: Columns, c: Coefficients) -> Tensor:
        """The chosen targets' maxima about this shard's centres, [n]."""
        zero = torch.zeros_like(local.student.total)
        own = iter(local.targets)
        maxima = [
            zero if is_one(lam) else next(own).centre.clamp(max=torch.finfo(zero.dtype).max)
            for lam in self.lambdas
        ]
        return self.choose(maxima, c)

    def local_log_totals(self, found: Found, c: Coefficients) -> tuple[Tensor, Tensor]:
        """log of what exponentials about this shard's centres are divided by: student, target."""
        totals = []
        for merged in (found.student, *found.targets):
            _, shift = self.own(merged)
            totals.append(merged.log_total - shift / self.temperature)
        return totals[0], self.choose(totals[1:], c)


class ForwardKL(BothRows):
    """KL(target || student)."""

    name = "forward KL"
    triton_sums = "forward"

    def cross_sum(self, h: Tensor, x: Tensor, e: Tensor, out: Tensor, other: Tensor) -> None:
        weighted_sum(torch.sub(h, x, out=other), e, out, other, self.careful)

    def complete(self, chunk: Chunk, shards: Columns, found: Found) -> None:
        targets, values = [], []
        own = iter(shards.targets)
        for i, (lam, target) in enumerate(self.merge_targets(chunk, shards, found)):
            shard: Softmax | None = shards.teacher if is_one(lam) else next(own)
            assert shard is not None
            shift = None
            if target.shift is not None and found.student.shift is not None:
                shift = target.shift - found.student.shift
            expected = mean(shards.sums[i], shard, target, shift) / self.temperature
            targets.append(target)
            values.append(expected + found.student.log_total - target.log_total)
        found.targets, found.divergences = tuple(targets), tuple(values)

    def divergence(self, chunk: Chunk, local: Columns, found: Found, c: Coefficients) -> Tensor:
        return self.choose(found.divergences, c)

    def gradient(
        self, chunk: Chunk, local: Columns, found: Found, c: Coefficients, divergence: Tensor
    ) -> None:
        weight, additive = c.per_logit(self.temperature)
        student, target = self.local_log_totals(found, c)
        toward = weight if additive is None else weight + additive
        of_p = (toward * (-student).exp()).to(self.shard.dtype)[:, None]
        of_q = (-weight * (-target).exp()).to(self.shard.dtype)[:, None]
        if (kernels := self.kernels(chunk.student)) is not None:
            extra = c.lam - 1.0 if self.extrapolated else None
            maximum = self.target_maximum(local, c)
            factors = kernels.Factors(of_p[:, 0], additive, of_q[:, 0], extra, maximum)
            kernels.gradient(self, chunk, local, factors)
            return
        for block, x, h, _ in self.target_rows(chunk, local, found, c):
            x.mul_(self.c).exp2_().mul_(of_p[block])
            rows = chunk.rows(block)
            out = destination(chunk.student, rows, x)
            torch.addcmul(x, h.mul_(self.c).exp2_(), of_q[block], out=out)
            self.finish(chunk, block, out, part(additive, block))


class JensenShannon(BothRows):
    """beta KL(q || m) + (1-beta) KL(p || m)."""

    name = "Jensen-Shannon divergence"
    beta: float

    def complete(self, chunk: Chunk, shards: Columns, found: Found) -> None:
        found.targets = tuple(m for _, m in self.merge_targets(chunk, shards, found))

    def divergence(self, chunk: Chunk, local: Columns, found: Found, c: Coefficients) -> Tensor:
        student, target = self.local_log_totals(found, c)
        sums = torch.empty(2, len(chunk), dtype=self.shard.dtype, device=student.device)
        for block, p, q, w, d, other in self._mixture(chunk, local, found, c, student, target):
            weighted_sum(w, p, sums[0, block], other)
            weighted_sum(d.sub_(w), q, sums[1, block], other)
        of_p, of_q = self.shard.all_gather(sums).double().sum(0)
        self._student_to_mixture = -of_p
        return self.beta * of_q - (1.0 - self.beta) * of_p

    def gradient(
        self, chunk: Chunk, local: Columns, found: Found, c: Coefficients, divergence: Tensor
    ) -> None:
        weight, additive = c.per_logit(self.temperature)
        student, target = self.local_log_totals(found, c)
        slope = (-(1.0 - self.beta) * weight).to(self.shard.dtype)[:, None]
        constant = -(1.0 - self.beta) * weight * self._student_to_mixture
        constant = constant if additive is None else constant + additive
        bias = constant.to(self.shard.dtype)[:, None]
        for block, p, _, w, _, _ in self._mixture(chunk, local, found, c, student, target):
            rows = chunk.rows(block)
            scale_and_shift(w, slope[block], bias[block])
            out = destination(chunk.student, rows, w)
            torch.mul(p, w, out=out)
            self.finish(chunk, block, out, part(additive, block))

    def _mixture(
        self,
        chunk: Chunk,
        local: Columns,
        found: Found,
        c: Coefficients,
        student: Tensor,
        target: Tensor,
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """(block, p, q, w = log(m / p), d = log q - log p, scratch) of each block."""
        dtype, tau = self.shard.dtype, self.temperature
        log_p, log_q = (-student).to(dtype)[:, None], (-target).to(dtype)[:, None]
        for block, x, h, (w, other, *_) in self.target_rows(chunk, local, found, c):
            for rows, constant in ((x, log_p), (h, log_q)):
                rows.div_(tau) if tau != 1.0 else None
                rows.add_(constant[block])
            d = torch.sub(h, x, out=other)
            if self.careful:
                d.nan_to_num_(0.0)
            d.clamp_(-LARGEST, LARGEST)
            torch.log1p(torch.expm1(d, out=w).mul_(self.beta), out=w)
            yield block, exp_(x), exp_(h), w, d, torch.empty_like(w)
