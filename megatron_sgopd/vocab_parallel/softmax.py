"""Exact softmax statistics of sharded rows, and their merge.

A shard of a softmax is (m, s, y): its maximum, its sum of exp((x - m) / temperature) and the
sampled token's logit. Maximum and sum stay apart until a log-prob is formed as (y - m) - log s: a
merged number of about 28 loses the last 1e-6 nats, and the gate reads the sign of T - S.

What a rank sends is fp32; what is merged from it is float64, which costs nothing on a few numbers a
token and keeps the differences of log-probs exact to what was sent.

Shapes: n tokens, W ranks, C columns a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

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
    """Which columns an objective's first pass fills."""

    teacher: bool = False  # whether the model came as rows
    reference: bool = False
    targets: int = 0  # extrapolated teachers with a softmax of their own
    sums: int = 0  # beside the student's entropy
    entropy: bool = True

    @property
    def num_columns(self) -> int:
        return 3 * (1 + self.teacher + self.reference) + 2 * self.targets + self.num_sums

    @property
    def num_sums(self) -> int:
        return self.sums + self.entropy


@dataclass(frozen=True)
class Columns:
    """A token's statistics as views of one tensor [..., C, n], which is what travels."""

    storage: Tensor
    student: Softmax
    teacher: Softmax | None
    reference: Softmax | None
    targets: tuple[Softmax, ...]
    entropy: Tensor | None  # sum of e (x - m), e = exp((x - m) / temperature)
    sums: tuple[Tensor, ...]

    @classmethod
    def of(cls, storage: Tensor, layout: Layout) -> Columns:
        rows: Iterator[Tensor] = iter(storage.unbind(-2))

        def softmax(wanted: bool) -> Softmax | None:
            return Softmax(next(rows), next(rows), next(rows)) if wanted else None

        student = softmax(True)
        assert student is not None
        teacher, reference = softmax(layout.teacher), softmax(layout.reference)
        targets = tuple(Softmax(next(rows), next(rows)) for _ in range(layout.targets))
        entropy = next(rows) if layout.entropy else None
        return cls(storage, student, teacher, reference, targets, entropy, tuple(rows))

    @classmethod
    def empty(cls, layout: Layout, n: int, dtype: torch.dtype, device: torch.device) -> Columns:
        storage = torch.empty(layout.num_columns, n, dtype=dtype, device=device)
        return cls.of(storage, layout)

    def at(self, block: slice, layout: Layout) -> Columns:
        """The columns of a block's tokens, as views."""
        return Columns.of(self.storage[..., block], layout)

    def sums_are_finite(self, layout: Layout) -> bool:
        """False where a logit is -inf (or NaN): then every product with it is NaN or infinite."""
        first = self.storage.shape[-2] - layout.num_sums
        return math.isfinite(float(self.storage[first:].sum()))


@dataclass(frozen=True)
class Merged:
    """A softmax over the whole vocabulary, beside the shards that it was merged from.

    `weight` [W, n] is each shard's exp((m_r - m) / temperature), `shift` [W, n] its centre minus
    the merged one; both None of a single shard, where they are 1 and 0.
    """

    softmax: Softmax
    log_total: Tensor
    weight: Tensor | None
    shift: Tensor | None

    def logprobs(self, temperature: float) -> Tensor:
        """Log-probs of the sampled tokens."""
        assert self.softmax.token is not None, "this softmax was made without its token"
        return over(self.softmax.token - self.softmax.maximum, temperature) - self.log_total


def over(values: Tensor, temperature: float) -> Tensor:
    """values / temperature, without an operation where it is 1."""
    return values if temperature == 1.0 else values / temperature


def merge(shards: Softmax, temperature: float) -> Merged:
    """Shards [W, n] in float64 -> the softmax of all columns."""
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

    sums [W, n] of e_r (value - its centre in shard r); `shift` [W, n] is that centre minus the
    merged centre of the value, and None of a single shard.
    """
    if shift is None:
        return sums[0] / merged.softmax.total
    assert merged.weight is not None
    moved = torch.where(of.total > 0, sums + shift * of.total, 0.0)
    return (merged.weight * moved).sum(0) / merged.softmax.total
