"""The plain form of `vocab_parallel.distillation_loss`: full logits, autograd, no collectives.

What the fast path is tested against, and the shortest statement of what it computes. It takes whole
rows [T, V] (gather the shards first) and differentiates by autograd in the dtype it is given.
"""

from __future__ import annotations

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
) -> Tensor:
    """Sum over the masked-in tokens of token_scale * (weight D(lambda) - additive log p(y)).

    Arguments as in `vocab_parallel.distillation_loss`, with logits [T, V] in full. `lambdas` is not
    needed here: the coefficients' own lambda is applied row by row.
    """
    rows = {"student": student, "teacher": teacher, "reference": reference}
    logp = {k: (x / temperature).log_softmax(-1) for k, x in rows.items() if x is not None}
    picked = {k: x.gather(-1, tokens[:, None])[:, 0] for k, x in logp.items()}
    sampled = {k: x.detach() for k, x in picked.items()}
    weight, lam, additive = coefficients(
        ReferenceStatistics(sampled["student"], sampled.get("teacher"), sampled.get("reference"))
    )
    if teacher is None:
        divergence = torch.zeros_like(picked["student"])
    elif estimator == "sampled":
        advantage = sampled["teacher"] - sampled["student"]
        if reference is not None:
            advantage = advantage + (lam - 1) * (sampled["teacher"] - sampled["reference"])
        divergence = -advantage * picked["student"]
    elif candidate_lambda is not None:
        a2 = (logp["teacher"] - logp["student"]).detach()
        row_lambda = candidate_lambda(a2, torch.arange(len(tokens), device=tokens.device))
        reward = a2 + (row_lambda - 1) * (logp["teacher"] - logp["reference"]).detach()
        divergence = -(logp["student"].exp() * reward).sum(-1)
    else:
        target = logp["teacher"]
        if reference is not None:
            target = lam[:, None] * target + (1 - lam[:, None]) * logp["reference"]
        target = target.log_softmax(-1).detach()
        divergence = (logp["student"].exp() * (logp["student"] - target)).sum(-1)
    token_losses = weight * divergence - additive * picked["student"]
    scale = torch.ones_like(token_losses) if token_scale is None else token_scale
    return (token_losses * scale * mask).sum()
