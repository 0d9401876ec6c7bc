"""The plain form of `vocab_parallel.distillation_loss`: full logits, autograd, no collectives.

What the fast path is tested against, and the shortest statement of what it computes. It takes whole
rows [T, V] (gather the shards first) and differentiates by autograd in the dtype it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceStatistics:
    """Log-probs of the sampled tokens, [T] each, without gradient."""

    student_logprobs: Tensor
    teacher_logprobs: Tensor | None
    reference_logprobs: Tensor | None


def distillation_loss_reference(
    student: Tensor,
    teacher: Tensor | None,
    *,
    reference: Tensor | None = None,
    tokens: Tensor,
    mask: Tensor,
    coefficients: Callable[[ReferenceStatistics], tuple[Tensor, Tensor, Tensor]],
    lambdas: Sequence[float | Tensor] = (1.0, 1.8),
    estimator: str = "sampled",
    temperature: float = 1.0,
    token_scale: Tensor | None = None,
    candidate_lambda: Callable[[Tensor, Tensor], Tensor] | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    top_k: int | None = None,
) -> Tensor:
    """Sum over the masked-in tokens of token_scale * (weight D(lambda) - additive log p(y)).

    Arguments as in `vocab_parallel.distillation_loss`, with logits [T, V] in full. Coefficients'
    lambdas are applied row by row; a bool chooses of `lambdas`.
    """
    rows = {"student": student, "teacher": teacher, "reference": reference}
    logp = {k: (x / temperature).log_softmax(-1) for k, x in rows.items() if x is not None}
    picked = {k: x.gather(-1, tokens[:, None])[:, 0] for k, x in logp.items()}
    sampled = {k: x.detach() for k, x in picked.items()}
    weight, lam, additive = coefficients(
        ReferenceStatistics(sampled["student"], sampled.get("teacher"), sampled.get("reference"))
    )
    if lam.dtype == torch.bool:
        first, last = (torch.as_tensor(x, dtype=student.dtype) for x in (lambdas[0], lambdas[-1]))
        lam = torch.where(lam, last, first)
    if teacher is None:
        values = torch.zeros_like(picked["student"])
    elif estimator == "sampled":
        advantage = sampled["teacher"] - sampled["student"]
        if reference is not None:
            advantage = advantage + (lam - 1) * (sampled["teacher"] - sampled["reference"])
        values = -advantage * picked["student"]
    elif candidate_lambda is not None:
        a2 = (logp["teacher"] - logp["student"]).detach()
        row_lambda = candidate_lambda(a2, torch.arange(len(tokens), device=tokens.device))
        reward = a2 + (row_lambda - 1) * (logp["teacher"] - logp["reference"]).detach()
        values = -(logp["student"].exp() * reward).sum(-1)
    else:
        target = logp["teacher"]
        if reference is not None:
            target = lam[:, None] * target + (1 - lam[:, None]) * logp["reference"]
        log_p, log_q = logp["student"], target.log_softmax(-1).detach()
        if top_k is not None:
            log_p, log_q = with_tail(log_p, log_q, top_k)
        values = divergence_of(log_p, log_q, divergence, beta)
    token_losses = weight * values - additive * picked["student"]
    scale = torch.ones_like(token_losses) if token_scale is None else token_scale
    return (token_losses * scale * mask).sum()


def divergence_of(log_p: Tensor, log_q: Tensor, name: str, beta: float) -> Tensor:
    """Divergence [T] of student log-probs and target log-probs over the same outcomes [T, n].

    jsd: beta KL(q || m) + (1-beta) KL(p || m), m = (1-beta) p + beta q; beta 0 is forward and 1
    reverse KL.
    """
    if name == "jsd" and 0.0 < beta < 1.0:
        log_m = torch.logaddexp(log_p + math.log(1.0 - beta), log_q + math.log(beta))
        return beta * _kl(log_q, log_m) + (1.0 - beta) * _kl(log_p, log_m)
    if name == "forward_kl" or (name == "jsd" and beta == 0.0):
        return _kl(log_q, log_p)
    return _kl(log_p, log_q)


def with_tail(log_p: Tensor, log_q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest outcomes of q (ties by the lower id) and one for all others, [T, k + 1]."""
    order = torch.argsort(log_q, dim=-1, descending=True, stable=True)
    rows = []
    for log in (log_p, log_q):
        ordered = log.gather(-1, order)
        tail = ordered[:, k:].logsumexp(-1, keepdim=True)
        rows.append(torch.cat([ordered[:, :k], tail], -1))
    return rows[0], rows[1]


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b), where a is 0 nothing."""
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), torch.zeros_like(a)).sum(-1)
