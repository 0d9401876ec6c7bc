"""Exact softmax statistics of sharded rows, and their merge.

A shard of a softmax is (m, s, y): its maximum, its sum of exp((x - m) / temperature) and the
sampled token's logit. Maximum and sum stay apart until a log-prob is formed as (y - m) - log s: a
merged number of about 28 loses the last 1e-6 nats, and the gate reads the sign of T - S.

What a rank sends is fp32; what is merged from it is float64, which costs nothing on a few numbers a
token and keeps the differences of log-probs exact to what was sent.

Shapes: n tokens, M models, W ranks, C columns a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """One model's softmax over a shard's or all columns, [..., n] each."""

    maximum: Tensor
    total: Tensor  # sum of exp((x - maximum) / temperature)
    token: Tensor | None = None  # the sampled token's logit; -inf on ranks that do not hold it

    @property
    def centre(self) -> Tensor:
        """The maximum, or 0 where a shard holds nothing finite: what rows are centred about."""
        return self.maximum.masked_fill(self.maximum == -torch.inf, 0.0)


@dataclass(frozen=True)
class Layout:
    """Describes which columns an objective's first pass fills, in their order.

    Maximum, total and sampled token of student, teacher and reference; maximum and total of each
    target; the entropy's sum; the objective's own sums.
    """

    teacher: bool = False  # whether the model came as rows
    reference: bool = False
    targets: int = 0  # extrapolated teachers with a softmax of their own
    sums: int = 0  # beside the student's entropy
    entropy: bool = True

    @property
    def num_models(self) -> int:
        return 1 + self.teacher + self.reference

    @property
    def first_sum(self) -> int:
        """The column of the entropy's sum, which the objective's own follow."""
        return 3 * self.num_models + 2 * self.targets

    @property
    def num_columns(self) -> int:
        return self.first_sum + self.entropy + self.sums


@dataclass(frozen=True)
class Columns:
    """A token's statistics as views of one tensor [..., C, n], which is what travels."""

    storage: Tensor
    layout: Layout

    @classmethod
    def empty(cls, layout: Layout, n: int, dtype: torch.dtype, device: torch.device) -> Columns:
        return cls(torch.empty(layout.num_columns, n, dtype=dtype, device=device), layout)

    def at(self, block: slice) -> Columns:
        """The columns of a block's tokens, as views."""
        return Columns(self.storage[..., block], self.layout)

    @cached_property
    def models(self) -> Softmax:
        """Student, teacher and reference, as far as they came as rows: [..., M, n]."""
        num = self.layout.num_models
        rows = self.storage[..., : 3 * num, :].unflatten(-2, (num, 3))
        return Softmax(*rows.unbind(-2))

    @cached_property
    def student(self) -> Softmax:
        return self._model(0)

    @cached_property
    def teacher(self) -> Softmax | None:
        return self._model(1) if self.layout.teacher else None

    @cached_property
    def reference(self) -> Softmax | None:
        return self._model(self.layout.num_models - 1) if self.layout.reference else None

    @cached_property
    def targets(self) -> tuple[Softmax, ...]:
        first = 3 * self.layout.num_models
        starts = range(first, first + 2 * self.layout.targets, 2)
        return tuple(Softmax(self._row(i), self._row(i + 1)) for i in starts)

    @cached_property
    def entropy(self) -> Tensor | None:
        """The sum of e (x - m), e = exp((x - m) / temperature)."""
        return self._row(self.layout.first_sum) if self.layout.entropy else None

    @cached_property
    def sums(self) -> tuple[Tensor, ...]:
        return self.all_sums.unbind(-2)

    @cached_property
    def all_sums(self) -> Tensor:
        """The objective's own sums, [..., layout.sums, n]."""
        first = self.layout.first_sum + self.layout.entropy
        return self.storage[..., first : first + self.layout.sums, :]

    def sums_are_finite(self) -> bool:
        """False where a logit is -inf (or NaN): then every product with it is NaN or infinite.

        The targets' totals too, of which a column that several models exclude makes NaN.
        """
        products = self._products
        return products is None or math.isfinite(float(products.sum()))

    @cached_property
    def _products(self) -> Tensor | None:
        first = 3 * self.layout.num_models
        return self.storage[first:] if first < self.layout.num_columns else None

    def _row(self, i: int) -> Tensor:
        return self.storage[..., i, :]

    def _model(self, i: int) -> Softmax:
        return Softmax(self._row(3 * i), self._row(3 * i + 1), self._row(3 * i + 2))


@dataclass(frozen=True)
class Merged:
    """Softmaxes over the whole vocabulary, beside the shards that they were merged from.

    `weight` [W, ..., n] is each shard's exp((m_r - m) / temperature), `shift` its centre minus the
    merged one; both None of a single shard, where they are 1 and 0.
    """

    softmax: Softmax
    log_total: Tensor
    weight: Tensor | None
    shift: Tensor | None

    def __getitem__(self, i: int) -> Merged:
        """One of the softmaxes of [M, n]."""
        s = self.softmax
        token = None if s.token is None else s.token[i]
        weight = None if self.weight is None else self.weight[:, i]
        shift = None if self.shift is None else self.shift[:, i]
        return Merged(Softmax(s.maximum[i], s.total[i], token), self.log_total[i], weight, shift)

    def logprobs(self, temperature: float) -> Tensor:
        """Log-probs of the sampled tokens."""
        assert self.softmax.token is not None, "this softmax was made without its token"
        return over(self.softmax.token - self.softmax.maximum, temperature) - self.log_total


def over(values: Tensor, temperature: float) -> Tensor:
    """values / temperature, without an operation where it is 1."""
    return values if temperature == 1.0 else values / temperature


def merge(shards: Softmax, temperature: float) -> Merged:
    """Shards [W, ..., n] in float64 -> the softmax of all columns, [..., n]."""
    if shards.maximum.shape[0] == 1:
        token = None if shards.token is None else shards.token[0]
        total = shards.total[0]
        return Merged(Softmax(shards.maximum[0], total, token), total.log(), None, None)
    maximum = shards.maximum.amax(0)
    shift = shards.centre - maximum.masked_fill(maximum == -torch.inf, 0.0)
    weight = (shift / temperature).exp().masked_fill(shards.total == 0, 0.0)
    token = None if shards.token is None else shards.token.amax(0)
    total = (weight * shards.total).sum(0)
    return Merged(Softmax(maximum, total, token), total.log(), weight, shift)


def mean(sums: Tensor, of: Softmax, merged: Merged, shift: Tensor | None) -> Tensor:
    """E of a quantity under a merged softmax, [n], from shards' sums about their own centres.

    sums [W, ..., n] of e_r (value - its centre in shard r); `shift` is that centre minus the merged
    centre of the value, and None of a single shard.
    """
    if shift is None:
        return sums[0] / merged.softmax.total
    assert merged.weight is not None
    total, weight = of.total, merged.weight
    if sums.dim() > total.dim():  # several quantities
        total, weight = total[:, None], weight[:, None]
    moved = torch.where(total > 0, sums + shift * total, 0.0)
    return (weight * moved).sum(0) / merged.softmax.total
