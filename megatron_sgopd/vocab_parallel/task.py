"""One call of the loss: what it was asked, what is known of a chunk, and the result of all.

Shapes: T tokens, n tokens of a chunk, N active tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel.blocks import Chunk, Place
from megatron_sgopd.vocab_parallel.choice import Choice
from megatron_sgopd.vocab_parallel.objective import Coefficients, Found, Objective
from megatron_sgopd.vocab_parallel.shard import Shard
from megatron_sgopd.vocab_parallel.softmax import Columns


@dataclass(frozen=True)
class Statistics:
    """The models' statistics per token [T], without gradient; 0 where the mask is 0."""

    student_logprobs: Tensor
    teacher_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    student_entropy: Tensor | None  # None where not wanted, and of top k: it reads no whole rows


CoefficientFunction = Callable[[Statistics], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class LossResult:
    """`loss` is the differentiable scalar; the rest is for metrics: [T], without gradient."""

    loss: Tensor
    token_losses: Tensor  # before token_scale; 0 where masked out
    statistics: Statistics
    weight: Tensor
    lam: Tensor  # the number, also where the coefficients chose by a bool
    additive: Tensor


@dataclass(frozen=True)
class Piece:
    """Describes what is known of a chunk's tokens in the end, float64 [n] each."""

    found: Found
    coefficients: Coefficients
    losses: Tensor
    infinite: Tensor  # bool: the loss is, although the student's row has a softmax

    def scaled_losses(self) -> Tensor:
        scale = self.coefficients.scale
        return self.losses if scale is None else self.losses * scale


@dataclass(frozen=True)
class Task:
    objective: Objective
    choice: Choice
    function: CoefficientFunction
    token_scale: Tensor | None

    @property
    def shard(self) -> Shard:
        return self.objective.shard

    @property
    def sliceable(self) -> bool:
        return hasattr(self.function, "select")

    def ask(self, function: Any, found: Found, places: Place | None) -> Coefficients:
        """The method's coefficients of the tokens at `places`; None: of all active ones.

        All T are shown then, those that are masked out as 0. Log-probs are shown in float64.
        """
        shard, every = self.shard, places is None and not self.shard.all_active
        shown = (
            found.student_logprobs,
            found.teacher_logprobs,
            found.reference_logprobs,
            found.entropy,
        )
        if every:
            shown = tuple(None if v is None else shard.spread(v) for v in shown)  # type: ignore[assignment]
        given = function(Statistics(*shown))
        _check_shapes(given, shown[0].shape)
        weight, lam, additive = given
        if every:
            weight, lam, additive = (v[shard.active] for v in (weight, lam, additive))
        places = shard.active if places is None else places
        values, is_last = self.choice.chosen(lam, places)
        scale = None if self.token_scale is None else self.token_scale[places].double()
        return Coefficients(weight.double(), values, is_last, additive.double(), scale)

    def finish(
        self, chunk: Chunk, local: Columns, found: Found, c: Coefficients, write: bool
    ) -> Piece:
        """Losses of a chunk and, with `write`, the gradient over its student's rows."""
        divergence = self.objective.divergence(chunk, local, found, c)
        infinite = _is_infinite(divergence, found, c)
        if not infinite.is_cuda:  # a GPU's are looked at once, with all chunks: see `total`
            self.refuse(infinite)
        losses = _times(c.weight, divergence) - _times(c.additive, found.student_logprobs)
        if write and self.shard.valid:
            self.objective.gradient(chunk, local, found, c, divergence)
        return Piece(found, c, losses, infinite)

    def refuse(self, infinite: Tensor) -> None:
        """Raises ValueError where a token's loss is infinite."""
        if bool(infinite.any()):
            raise ValueError(
                f"{int(infinite.sum())} of {len(infinite)} tokens have an infinite "
                f"{self.objective.name}, or none that is a number: one model excludes (a logit of "
                "-inf) what the other gives probability to, or holds NaN or +inf. Exclude the same "
                "columns in every model, or mask these tokens"
            )

    def result(self, pieces: Sequence[Piece], loss: Tensor) -> LossResult:
        """Everything of the pieces as [T]."""

        def joined(values: Sequence[Tensor | None]) -> Tensor | None:
            if any(v is None for v in values):
                return None
            return self.shard.to_all_tokens(torch.cat([v for v in values if v is not None]))

        def all_of(values: Sequence[Tensor]) -> Tensor:
            out = joined(values)
            assert out is not None
            return out

        found = [p.found for p in pieces]
        statistics = Statistics(
            all_of([f.student_logprobs for f in found]),
            joined([f.teacher_logprobs for f in found]),
            joined([f.reference_logprobs for f in found]),
            joined([f.entropy for f in found]),
        )
        return LossResult(
            loss,
            all_of([p.losses for p in pieces]),
            statistics,
            all_of([p.coefficients.weight for p in pieces]),
            all_of([p.coefficients.lam for p in pieces]),
            all_of([p.coefficients.additive for p in pieces]),
        )

    def total(self, pieces: Sequence[Piece]) -> Tensor:
        """The loss. Raises ValueError where it is infinite."""
        self.refuse(torch.cat([p.infinite for p in pieces]))
        sums = [p.scaled_losses().sum() for p in pieces]
        return torch.stack(sums).sum().to(self.shard.dtype)


def _check_shapes(coefficients: tuple[Any, Any, Any], shape: torch.Size) -> None:
    """Raises ValueError where coefficients are not one for each token that was shown."""
    if any(getattr(v, "shape", None) != shape for v in coefficients):
        came = [list(v.shape) if isinstance(v, Tensor) else v for v in coefficients]
        raise ValueError(
            f"the coefficients (weight, lambda, additive) are {came[0]}, {came[1]} and {came[2]}; "
            f"tensors {list(shape)} are wanted, a value for each token"
        )


def _is_infinite(divergence: Tensor, found: Found, c: Coefficients) -> Tensor:
    infinite = ~divergence.isfinite() & (c.weight != 0) & ~found.student.softmax.total.isnan()
    return infinite | (found.student_logprobs.isinf() & (c.additive != 0))


def _times(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, 0 where the factor is 0 whatever the value."""
    return torch.where(factor == 0, 0.0, factor * value)
