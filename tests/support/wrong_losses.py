"""A plain vocabulary-parallel reverse KL with its gate, and what one wrong line makes of it.

`Correct` is autograd over collectives. Each other class changes one line of it, the way published
code has been wrong; the conformance suite must reject every one of them.

Shapes: T tokens, V vocabulary columns held by this rank.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    """All-reduce forward; backward: all-reduce (`reduce_back`), or each rank's own."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Any, reduce_back: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group if reduce_back else None
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        out = grad.clone()
        if ctx.group is not None:
            dist.all_reduce(out, group=ctx.group)
        return out, None, None


class Correct:
    """The loss of a token is the same number on all ranks, its graph each rank's own."""

    dtype = torch.float32

    def sum_of_exp(self, e: Tensor, group: Any) -> Tensor:
        # Every rank's terms depend on the sum, so backward adds up what all ranks ask of it.
        return _Sum.apply(e.sum(-1, keepdim=True), group, True)

    def sum_of_terms(self, terms: Tensor, group: Any) -> Tensor:
        # The sum is the loss itself, which every rank differentiates for its own columns.
        return _Sum.apply(terms.sum(-1), group, False)

    def columns(self, x: Tensor, group: Any, vocab_size: int) -> Tensor:
        held = vocab_size - group.rank() * x.shape[-1]
        return x[:, : max(0, held)].to(self.dtype)

    def max_and_sum(self, x: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        m = x.new_full((x.shape[0], 1), -torch.inf)
        if x.shape[-1]:
            m = x.detach().amax(-1, keepdim=True)
        dist.all_reduce(m, op=dist.ReduceOp.MAX, group=group)
        return m, self.sum_of_exp((x - m).exp(), group)

    def log_softmax(self, x: Tensor, group: Any) -> Tensor:
        # exp of -inf is 0, and a finite stand-in keeps its term 0 instead of 0 times infinity.
        m, s = self.max_and_sum(x, group)
        return (x - m).clamp(min=-1e30) - s.log()

    def reverse_kl(
        self, student: Tensor, teacher: Tensor, *, group: Any, vocab_size: int, mask: Tensor
    ) -> Tensor:
        p, q = (
            self.log_softmax(self.columns(x, group, vocab_size), group) for x in (student, teacher)
        )
        return self.kl(p, q, group).float().masked_fill(~mask, 0.0)

    def ratio(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        # Where the teacher alone is at -inf the divergence is infinite and must not look finite.
        return log_p - log_q.masked_fill((log_q < -1e29) & (log_p > -1e29), -torch.inf)

    def kl(self, log_p: Tensor, log_q: Tensor, group: Any) -> Tensor:
        return self.sum_of_terms(log_p.exp() * self.ratio(log_p, log_q), group)

    def token_logprob(self, x: Tensor, tokens: Tensor, group: Any) -> Tensor:
        """Log-prob of the tokens [T], without gradient."""
        m, s = self.max_and_sum(x.detach(), group)
        return (self.picked(x.detach(), tokens, group) - m[:, 0]) - s[:, 0].log()

    def picked(self, x: Tensor, tokens: Tensor, group: Any) -> Tensor:
        local = tokens - group.rank() * self.width
        owned = (local >= 0) & (local < x.shape[-1])
        out = x.new_zeros(len(tokens))
        if x.shape[-1]:
            out = x.gather(-1, local.clamp(0, x.shape[-1] - 1)[:, None])[:, 0] * owned
        dist.all_reduce(out, group=group)
        return out

    def gated_reverse_kl(
        self,
        student: Tensor,
        teacher: Tensor,
        reference: Tensor,
        *,
        tokens: Tensor,
        signs: Tensor,
        lambdas: tuple[float, float],
        group: Any,
        vocab_size: int,
        mask: Tensor,
    ) -> Tensor:
        self.width = student.shape[-1]
        s, t, r = (self.columns(x, group, vocab_size) for x in (student, teacher, reference))
        log_ratio = self.token_logprob(t, tokens, group) - self.token_logprob(s, tokens, group)
        lam = torch.where(signs * log_ratio > 0, lambdas[1], lambdas[0])[:, None]
        target = self.log_softmax(t + (lam - 1) * (t - r), group)
        return self.kl(self.log_softmax(s, group), target, group).masked_fill(~mask, 0.0)


class NormaliserWithoutGradient(Correct):
    def sum_of_exp(self, e: Tensor, group: Any) -> Tensor:
        return _Sum.apply(e.sum(-1, keepdim=True), group, False)


class NormaliserHeldConstant(Correct):
    def sum_of_exp(self, e: Tensor, group: Any) -> Tensor:
        return _Sum.apply(e.detach().sum(-1, keepdim=True), group, True)


class LocalSumNotReduced(Correct):
    def sum_of_terms(self, terms: Tensor, group: Any) -> Tensor:
        return terms.sum(-1)


class GradientOfLocalSum(Correct):
    """The value is reduced; p (log p - log q - KL), its gradient, takes this rank's part of KL."""

    def columns(self, x: Tensor, group: Any, vocab_size: int) -> Tensor:
        out = super().columns(x, group, vocab_size)
        if x.requires_grad:
            self.student = out
        return out

    def kl(self, log_p: Tensor, log_q: Tensor, group: Any) -> Tensor:
        p, ratio = log_p.exp().detach(), self.ratio(log_p, log_q).detach()
        local = (p * ratio).sum(-1, keepdim=True)
        value = _Sum.apply(local[:, 0], group, False)
        return _WithGradient.apply(self.student, value, p * (ratio - local))


class _WithGradient(torch.autograd.Function):
    """Values [T] whose gradient with respect to the rows [T, V] is known."""

    @staticmethod
    def forward(ctx, rows: Tensor, value: Tensor, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(grad)
        return value.clone()

    @staticmethod
    def backward(ctx, factor: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return ctx.saved_tensors[0] * factor[:, None], None, None


class GradientReducedTwice(Correct):
    def sum_of_terms(self, terms: Tensor, group: Any) -> Tensor:
        return _Sum.apply(terms.sum(-1), group, True)


class Bfloat16Arithmetic(Correct):
    dtype = torch.bfloat16


class PaddingCounted(Correct):
    def columns(self, x: Tensor, group: Any, vocab_size: int) -> Tensor:
        return x.to(self.dtype)


class MergedNormaliser(Correct):
    def token_logprob(self, x: Tensor, tokens: Tensor, group: Any) -> Tensor:
        m, s = self.max_and_sum(x.detach(), group)
        return self.picked(x.detach(), tokens, group) - (m + s.log())[:, 0]


correct = Correct()
normaliser_without_gradient = NormaliserWithoutGradient()
normaliser_held_constant = NormaliserHeldConstant()
local_sum_not_reduced = LocalSumNotReduced()
gradient_of_local_sum = GradientOfLocalSum()
gradient_reduced_twice = GradientReducedTwice()
bfloat16_arithmetic = Bfloat16Arithmetic()
padding_counted = PaddingCounted()
merged_normaliser = MergedNormaliser()


class SumOnly(Correct):
    """Right, and returns nothing per token."""

    def reverse_kl(self, *args: Any, **options: Any) -> Tensor:
        return super().reverse_kl(*args, **options).sum()

    gated_reverse_kl = None  # type: ignore[assignment]  # whose cases want a value per token


class WritesIntoTheTeacher(Correct):
    def reverse_kl(self, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        value = super().reverse_kl(student, teacher, **options)
        teacher -= 1.0
        return value


class Random(Correct):
    """The last bits of a value are other ones each time and on each rank."""

    def sum_of_terms(self, terms: Tensor, group: Any) -> Tensor:
        g = torch.Generator()
        g.seed()
        value = super().sum_of_terms(terms, group)
        return value * (1 + 3e-7 * torch.rand(value.shape, generator=g))


class Trouble(Correct):
    """What a rank may do to the others, chosen by the case's vocabulary."""

    def reverse_kl(
        self, student: Tensor, teacher: Tensor, *, group: Any, vocab_size: int, mask: Tensor
    ) -> Tensor:
        if group.rank() == 1 and vocab_size == 16:
            raise RuntimeError("one rank alone")
        if group.rank() == 1 and vocab_size == 18:
            os._exit(3)
        if group.rank() == 1 and vocab_size == 20:  # leaves the other in a collective
            return (student * 0).sum(-1)
        return super().reverse_kl(student, teacher, group=group, vocab_size=vocab_size, mask=mask)


sum_only = SumOnly()
writes_into_the_teacher = WritesIntoTheTeacher()
random = Random()
trouble = Trouble()
