"""The two halves of the loss with the method's coefficients between them.

*Statistics*: each rank reduces its shard of every row to a few numbers, one all-gather over the
tensor-parallel group brings them together, every rank merges them alike. `coefficients` turns the
merged log-probs into (weight, lambda, additive) per token. *Gradient*: each rank writes the
gradient of its own logits; backward only multiplies it by the incoming scalar.

Collectives: one for a whole micro-batch, whatever the number of chunks (two with a per-candidate
gate); none in backward. Arithmetic is fp32 on any input type, float64 on float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.vocab_parallel.gradients import (
    ActiveCoefficients,
    CandidateLambda,
    candidate_gradient,
    kl_gradient,
    sampled_gradient,
)
from megatron_sgopd.vocab_parallel.shard import Rows, Shard, is_logprobs, num_local_rows
from megatron_sgopd.vocab_parallel.statistics import Lambda, Models, is_one, merged_statistics

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Statistics:
    """Per token [T], without gradient; 0 where the mask is 0."""

    student_logprobs: Tensor
    teacher_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    student_entropy: Tensor


@dataclass(frozen=True)
class LossResult:
    """`loss` is the differentiable scalar; the rest is for metrics: [T], without gradient."""

    loss: Tensor
    token_losses: Tensor  # before token_scale; 0 where masked out
    statistics: Statistics
    weight: Tensor
    lam: Tensor
    additive: Tensor


def distillation_loss(
    student: Rows,
    teacher: Rows | None,
    *,
    reference: Rows | None = None,
    tokens: Tensor,
    mask: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int,
    coefficients: Callable[[Statistics], tuple[Tensor, Tensor, Tensor]],
    lambdas: Sequence[Lambda] = (1.0, 1.8),
    estimator: str = "sampled",
    temperature: float = 1.0,
    token_scale: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    candidate_lambda: CandidateLambda | None = None,
) -> LossResult:
    """Sum over masked-in tokens of token_scale * (weight D(lambda) - additive log p_student(y)).

    D is -[(T-S) + (lambda-1)(T-R)] log p_student(y), bracket detached (`sampled`), or the exact
    KL(student || softmax(lambda t + (1-lambda) r)) (`full_vocab`); arXiv 2602.12125, 2606.09304.

    Args:
        student: this rank's logits [T, V]; or (hidden [T, D], head [V, D]), which materialises
            them and sums the hidden's gradient over the group (a collective in backward).
        teacher, reference: the same; for `sampled` also log-probs [T]. Never differentiated.
        tokens: ids of the sampled tokens, [T]. mask: [T], nonzero where a token is trained on.
        group: the tensor-parallel group, None for one rank. Rank i holds rows [i V, (i + 1) V).
        vocab_size: rows from here on are padding and enter no softmax.
        coefficients: merged statistics -> (weight, lambda, additive), [T] each.
        lambdas: at most two, each a number or [T]; `full_vocab` prepares their targets, and every
            token's lambda must be one of them.
        token_scale: [T], the normalisation (1/(B |y_i|) for a mean of means); None is 1.
        chunk_tokens: rows projected at once.
        candidate_lambda: the per-candidate gate, (a2 [n, V], token indices [n]) -> lambda [n, V],
            in place of the row's lambda; `full_vocab` with teacher and reference.
    Raises:
        ValueError: shapes or options that do not fit, naming both sides.
    """
    logits = _student_logits(student, group)
    given = {"student": logits.detach(), "teacher": teacher, "reference": reference}
    models: Models = {name: rows for name, rows in given.items() if rows is not None}
    full = estimator == "full_vocab" and teacher is not None
    _check(models, estimator, lambdas, candidate_lambda)
    shard = Shard.of(
        logits.detach(),
        tokens=tokens,
        mask=mask,
        group=group,
        vocab_size=vocab_size,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    with torch.no_grad():
        merged = merged_statistics(shard, models, lambdas if full and not candidate_lambda else ())
        everywhere = {k: shard.to_all_tokens(merged[k]) for k in (*models, "entropy")}
        stats = Statistics(
            everywhere["student"],
            everywhere.get("teacher"),
            everywhere.get("reference"),
            everywhere["entropy"],
        )
        weight, lam, additive = coefficients(stats)
        scale = torch.ones_like(weight) if token_scale is None else token_scale
        active = ActiveCoefficients(
            *(c.to(shard.dtype)[shard.active] for c in (weight, lam, additive, scale))
        )
        if not full:
            divergence, grad = sampled_gradient(shard, models, merged, active)
        elif candidate_lambda is not None:
            divergence, grad = candidate_gradient(shard, models, merged, active, candidate_lambda)
        else:
            divergence, grad = kl_gradient(shard, models, merged, active, lambdas)
        losses = active.weight * divergence - active.additive * merged["student"]
        total = (losses * active.scale).sum()
    loss = _GradientInForward.apply(logits, total, grad)
    return LossResult(loss, shard.to_all_tokens(losses), stats, weight, lam, additive)


def sampled_logprobs(
    rows: Rows,
    *,
    tokens: Tensor,
    mask: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Log-probs [T] of `tokens` under sharded rows, 0 where the mask is 0; one collective.

    The scoring pass of a frozen model. Arguments as in `distillation_loss`.
    """
    with torch.no_grad():
        shard = Shard.of(
            rows,
            tokens=tokens,
            mask=mask,
            group=group,
            vocab_size=vocab_size,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
        )
        return shard.to_all_tokens(merged_statistics(shard, {"student": rows})["student"])


def _check(
    models: Models,
    estimator: str,
    lambdas: Sequence[Lambda],
    candidate_lambda: CandidateLambda | None,
) -> None:
    if estimator not in ("sampled", "full_vocab"):
        raise ValueError(f"estimator is {estimator!r}; allowed are 'sampled' and 'full_vocab'")
    if not 1 <= len(lambdas) <= 2:
        raise ValueError(f"one or two lambdas are allowed, got {len(lambdas)}")
    width = num_local_rows(models["student"])
    for name in ("teacher", "reference"):
        rows = models.get(name)
        if rows is None:
            continue
        if is_logprobs(rows):
            if estimator == "full_vocab":
                raise ValueError(
                    f"full_vocab needs the {name}'s rows (logits [T, V] or hidden and head); got "
                    "log-probs [T], which serve `sampled` only"
                )
        elif num_local_rows(rows) != width:
            raise ValueError(
                f"the {name} holds {num_local_rows(rows)} vocabulary rows on this rank and the "
                f"student {width}: pad both vocabularies to the same size"
            )
    extrapolates = candidate_lambda is not None or not all(is_one(lam) for lam in lambdas)
    compares = estimator == "full_vocab" and "teacher" in models
    if compares and extrapolates and "reference" not in models:
        raise ValueError(f"lambdas {tuple(lambdas)} need a reference; none was given")


def _student_logits(student: Rows, group: dist.ProcessGroup | None) -> Tensor:
    if isinstance(student, Tensor):
        return student
    hidden, head = student
    if group is not None and group.size() > 1:
        hidden = _SumGradientOverGroup.apply(hidden, group)
    return hidden @ head.T


class _GradientInForward(torch.autograd.Function):
    """Hands out a loss whose gradient with respect to the local logits is known already."""

    @staticmethod
    def forward(ctx, logits: Tensor, total: Tensor, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(grad)
        return total.clone()

    @staticmethod
    def backward(ctx, factor: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return grad * factor.to(grad.dtype), None, None


class _SumGradientOverGroup(torch.autograd.Function):
    """Megatron's f operator: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
