"""Reverse KL to the extrapolated teacher: KL(softmax(x) || softmax(lambda t + (1-lambda) r)).

With d = (x - t) - (lambda-1)(t - r), about the models' maxima, log p - log q = d / temperature +
a constant of the token, and the row's gradient is p (log p - log q - KL) (docs/method.md). E_p d is
linear in lambda, so the sums of e (x - t) and e (t - r) serve every lambda; only the target's
normaliser is its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel.blocks import (
    Chunk,
    centre,
    destination,
    exponentials,
    load,
    scale_and_shift,
    weighted_sum,
)
from megatron_sgopd.vocab_parallel.objective import (
    Coefficients,
    Constants,
    Found,
    Lambda,
    Objective,
    is_one,
)
from megatron_sgopd.vocab_parallel.softmax import Columns, Merged, Softmax, mean, merge, over


class TowardTarget(Objective):
    """Describes what objectives with an extrapolated teacher as target have in common."""

    def merge_targets(
        self, chunk: Chunk, shards: Columns, found: Found
    ) -> Iterator[tuple[Lambda, Merged]]:
        """(lambda, softmax of its target about the merged centres) for each of `lambdas`.

        A shard's target maximum is relative to the shard's own centres of teacher and reference.
        """
        assert found.teacher is not None
        own = iter(shards.targets)
        for lam in self.lambdas:
            if is_one(lam):
                assert shards.teacher is not None
                yield lam, found.teacher
                continue
            target = next(own)
            if found.teacher.shift is not None:
                assert found.reference is not None and found.reference.shift is not None
                extra = self.less_one(lam, chunk)
                moved = found.teacher.shift + extra * (found.teacher.shift - found.reference.shift)
                target = Softmax(target.maximum + moved, target.total)
            yield lam, merge(target, self.temperature)

    def less_one(self, lam: Lambda, chunk: Chunk) -> Lambda:
        """lambda - 1 of the chunk's tokens: a number or [n]."""
        return lam[chunk.index].double() - 1.0 if isinstance(lam, Tensor) else lam - 1.0

    def target_block(
        self, lam: Lambda, chunk: Chunk, block: slice, t: Tensor, gap: Tensor, out: Tensor
    ) -> Tensor:
        """The target's logits t + (lambda-1)(t - r) about the centres of t and r, to `out`."""
        extra = self.extrapolate(lam, chunk, block)
        if isinstance(extra, Tensor):
            torch.addcmul(t, gap, extra, out=out)
        else:
            torch.add(t, gap, alpha=extra, out=out)
        if self.careful:  # where the teacher excludes a column, whatever the reference says
            if isinstance(extra, Tensor):  # and where lambda is 1, whatever the reference excludes
                out.copy_(torch.where(extra == 0, t, out))
            out.masked_fill_(t == -torch.inf, -torch.inf)
        return out


class ReverseKL(TowardTarget):
    """Exact reverse KL; the row gate chooses between the targets of two lambdas."""

    name = "reverse KL"
    triton_sums = "reverse"
    keeps = True
    one_pass = True

    @property
    def num_buffers(self) -> int:  # type: ignore[override]
        return 4 if self.layout.reference else 3

    def block_statistics(self, chunk: Chunk, block: slice, columns: Columns) -> None:
        a, e, t, *more = self.scratch(chunk).buffers(block.stop - block.start)
        rows = chunk.rows(block)
        assert chunk.teacher is not None and columns.teacher is not None
        t = centre(load(chunk.teacher, rows, t), columns.teacher, t)
        exponentials(t, self.c, columns.teacher, e)
        gap = None
        if columns.reference is not None and chunk.reference is not None:
            r = centre(load(chunk.reference, rows, more[0]), columns.reference, more[0])
            exponentials(r, self.c, columns.reference, e)
            gap = torch.sub(t, r, out=more[0])
            for lam, target in zip(self.extrapolated, columns.targets, strict=True):
                h = self.target_block(lam, chunk, block, t, gap, a)
                exponentials(centre(h, target, a), self.c, target, a)
        e = self.student_block(chunk, block, columns, a, e)
        d = torch.sub(a, t, out=t)
        self.entropy_sum(a, e, columns, a)
        weighted_sum(d, e, columns.sums[0], a, self.careful)
        if gap is not None and self.extrapolated:
            weighted_sum(gap, e, columns.sums[1], a, self.careful)
        if chunk.frozen_is_scratch:
            chunk.teacher[rows] = d
            if gap is not None and chunk.reference is not None:
                chunk.reference[rows] = gap

    def complete(self, chunk: Chunk, shards: Columns, found: Found) -> None:
        """Adds E_p (x - t) and E_p (t - r), about the models' maxima."""
        shift = found.models.shift
        if shift is None:
            found.expected = shards.all_sums[0] / found.student_total
            return
        shift = (shift[:, :-1] - shift[:, 1:])[:, : self.layout.sums]
        found.expected = mean(shards.all_sums, shards.student, found.student, shift)

    def add_divergences(self, chunk: Chunk, shards: Columns, found: Found) -> None:
        assert found.expected is not None
        values = []
        for lam, target in self.merge_targets(chunk, shards, found):
            expected, offset = found.expected[0], target.log_total - found.student.log_total
            if not is_one(lam):
                less_one = self.less_one(lam, chunk)
                more = less_one * found.expected[1]
                if isinstance(less_one, Tensor):
                    more = torch.where(less_one == 0, 0.0, more)  # which may be infinite
                expected = expected - more
                offset = offset + over(target.softmax.maximum, self.temperature)
            values.append(over(expected, self.temperature) + offset)
        found.divergences = tuple(values)

    def divergence(self, chunk: Chunk, local: Columns, found: Found, c: Coefficients) -> Tensor:
        return self.choose(found.divergences, c)

    def gradient(
        self, chunk: Chunk, local: Columns, found: Found, c: Coefficients, divergence: Tensor
    ) -> None:
        constants = self.constants(found, c)
        if (kernels := self.kernels(chunk.student)) is not None:
            assert constants.bias is not None
            extra = None if constants.less is None else -constants.less[:, 0]
            slope, bias = constants.slope[:, 0], constants.bias[:, 0]
            factors = kernels.Factors(bias, constants.additive, slope, extra)
            kernels.gradient(self, chunk, local, factors)
            return
        for block in self.scratch(chunk).blocks(len(chunk)):
            self.block_gradient(chunk, block, local.at(block), constants.part(block))

    def constants(self, found: Found, c: Coefficients) -> Constants:
        """Split weight / (total tau) (d - E_p d) + additive / total; d is the chosen lambda's."""
        weight, additive = c.per_logit(self.temperature)
        extra = c.lam - 1.0 if self.extrapolated else None
        assert found.expected is not None
        expected, total = found.expected[0], found.student_total
        # An expectation may be infinite where it does not count, also by another rank's columns.
        finite = not self.careful and self.shard.size == 1
        if extra is not None:
            more = extra * found.expected[1]
            expected = expected - (more if finite else torch.where(extra == 0, 0.0, more))
        if found.models.shift is not None:  # the rows' d is about this shard's centres
            share, shift = self.own(found.student)
            total = total / share
            assert found.teacher is not None
            moved = shift - self.own(found.teacher)[1]
            if extra is not None and found.reference is not None:
                gap = self.own(found.teacher)[1] - self.own(found.reference)[1]
                moved = moved - extra * gap
            expected = expected - moved
        slope = over(weight / total, self.temperature)
        bias = -slope * expected
        if not finite:
            bias = torch.where(weight == 0, 0.0, bias)
        if additive is not None:
            bias = bias + additive / total
        columns = torch.stack([slope, bias] if extra is None else [slope, bias, -extra])
        slope, bias, *less = columns.to(self.shard.dtype).unsqueeze(-1).unbind(0)
        return Constants(slope, bias, less[0] if less else None, additive)

    def block_gradient(
        self, chunk: Chunk, block: slice, columns: Columns, constants: Constants
    ) -> None:
        """Writes a block's gradient from its tokens' constants."""
        less = constants.less
        opened = less is not None and bool(less.any())
        e, d, gap = self._terms(chunk, block, columns, opened)
        if opened and less is not None and gap is not None:
            if self.careful:
                gap.nan_to_num_(0.0, 0.0, 0.0)
            d = torch.addcmul(d, gap, less, out=d)
        if self.careful:  # a token of weight 0 may have an infinite divergence
            d.masked_fill_(constants.slope == 0, 0.0)
        assert constants.bias is not None
        scale_and_shift(d, constants.slope, constants.bias)
        rows = chunk.rows(block)
        out = torch.mul(e, d, out=destination(chunk.student, rows, d))
        if self.careful:
            out.masked_fill_(e == 0, 0.0)
        self.finish(chunk, block, out, constants.additive)

    def _terms(
        self, chunk: Chunk, block: slice, columns: Columns, opened: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(e, x - t, t - r) of a block: kept from the first pass, or made again."""
        scratch, rows = self.scratch(chunk), chunk.rows(block)
        a, e, d, *more = scratch.buffers(block.stop - block.start)
        assert chunk.teacher is not None and columns.teacher is not None
        if chunk.frozen_is_scratch:
            gap = chunk.reference[rows] if opened and chunk.reference is not None else None
            return chunk.student[rows], chunk.teacher[rows], gap
        if scratch.still_holds(chunk, block):
            return e, d, more[0] if more else None
        self.again(chunk.student, rows, columns.student, a)
        torch.exp2(torch.mul(a, self.c, out=e), out=e)
        t = self.again(chunk.teacher, rows, columns.teacher, d)
        gap = None
        if opened and columns.reference is not None and chunk.reference is not None:
            r = self.again(chunk.reference, rows, columns.reference, more[0])
            gap = torch.sub(t, r, out=r)
        return e, torch.sub(a, t, out=d), gap
