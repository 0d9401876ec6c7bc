"""This package's loss as the suite calls it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sgopd.sgopd import Coefficients, Outcome, coefficients
from megatron_sgopd.vocab_parallel import distillation_loss

Summed = tuple[Tensor, Tensor]  # (sum over the tokens, values [T] without gradient)


def _plain(
    student: Tensor,
    teacher: Tensor | None,
    tokens: Tensor,
    group: ProcessGroup,
    vocab_size: int,
    mask: Tensor,
    **options: Any,
) -> Summed:
    """A divergence of weight 1, or cross-entropy where no teacher is given."""
    one = torch.ones(len(tokens))
    weight = torch.zeros_like(one) if teacher is None else one
    result = distillation_loss(
        student,
        teacher,
        tokens=tokens,
        mask=mask,
        group=group,
        vocab_size=vocab_size,
        coefficients=lambda stats: Coefficients(weight, one, one - weight),
        lambdas=(1.0,),
        estimator="full_vocab" if teacher is not None else "sampled",
        **options,
    )
    return result.loss, result.token_losses


def reverse_kl(
    student: Tensor, teacher: Tensor, *, group: ProcessGroup, vocab_size: int, mask: Tensor
) -> Summed:
    """KL(student || teacher) over the whole vocabulary."""
    tokens = torch.zeros(len(mask), dtype=torch.long)  # of no consequence here
    return _plain(student, teacher, tokens, group, vocab_size, mask)


def forward_kl(
    student: Tensor, teacher: Tensor, *, group: ProcessGroup, vocab_size: int, mask: Tensor
) -> Summed:
    """KL(teacher || student)."""
    tokens = torch.zeros(len(mask), dtype=torch.long)
    return _plain(student, teacher, tokens, group, vocab_size, mask, divergence="forward_kl")


def jsd(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float,
    group: ProcessGroup,
    vocab_size: int,
    mask: Tensor,
) -> Summed:
    """The generalised Jensen-Shannon divergence."""
    tokens = torch.zeros(len(mask), dtype=torch.long)
    return _plain(student, teacher, tokens, group, vocab_size, mask, divergence="jsd", beta=beta)


def nll(
    student: Tensor, tokens: Tensor, *, group: ProcessGroup, vocab_size: int, mask: Tensor
) -> Summed:
    """-log p(token)."""
    return _plain(student, None, tokens, group, vocab_size, mask)


def gated_reverse_kl(
    student: Tensor,
    teacher: Tensor,
    reference: Tensor,
    *,
    tokens: Tensor,
    signs: Tensor,
    lambdas: tuple[float, float],
    group: ProcessGroup,
    vocab_size: int,
    mask: Tensor,
) -> Summed:
    """SG-OPD's row gate, with the signs as the verifier's advantage."""
    outcome = Outcome(signs, signs > 0, torch.zeros(len(signs), dtype=torch.bool))
    method = coefficients("sg_opd", lambda_low=lambdas[0], lambda_high=lambdas[1])
    result = distillation_loss(
        student,
        teacher,
        reference=reference,
        tokens=tokens,
        mask=mask,
        group=group,
        vocab_size=vocab_size,
        coefficients=lambda stats: method(stats, outcome),
        lambdas=lambdas,
        estimator="full_vocab",
    )
    return result.loss, result.token_losses


loss = SimpleNamespace(
    reverse_kl=reverse_kl,
    forward_kl=forward_kl,
    jsd=jsd,
    nll=nll,
    gated_reverse_kl=gated_reverse_kl,
    distillation_loss=distillation_loss,
)
