"""This package's loss as the suite calls it, with the back end chosen automatically or by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sgopd import vocab_parallel
from megatron_sgopd.sgopd import Coefficients, Outcome, coefficients
from megatron_sgopd.vocab_parallel import LossResult

Summed = tuple[Tensor, Tensor]  # (sum over the tokens, values [T] without gradient)


@dataclass(frozen=True)
class Ours:
    """The capabilities of `adapter`, all of them `distillation_loss`."""

    backend: str
    needs: tuple[str, ...] = ()

    def distillation_loss(self, *args: Any, **options: Any) -> LossResult:
        """The function itself."""
        return vocab_parallel.distillation_loss(*args, backend=self.backend, **options)

    def reverse_kl(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        group: ProcessGroup,
        vocab_size: int,
        mask: Tensor,
    ) -> Summed:
        return self._divergence(student, teacher, group, vocab_size, mask)

    def forward_kl(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        group: ProcessGroup,
        vocab_size: int,
        mask: Tensor,
    ) -> Summed:
        return self._divergence(student, teacher, group, vocab_size, mask, divergence="forward_kl")

    def jsd(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        beta: float,
        group: ProcessGroup,
        vocab_size: int,
        mask: Tensor,
    ) -> Summed:
        return self._divergence(
            student, teacher, group, vocab_size, mask, divergence="jsd", beta=beta
        )

    def nll(
        self, student: Tensor, tokens: Tensor, *, group: ProcessGroup, vocab_size: int, mask: Tensor
    ) -> Summed:
        """Cross-entropy: weight 0, additive term 1."""
        one = torch.ones(len(mask))
        result = self.distillation_loss(
            student,
            None,
            tokens=tokens,
            mask=mask,
            group=group,
            vocab_size=vocab_size,
            coefficients=lambda stats: Coefficients(0 * one, one, one),
            lambdas=(1.0,),
        )
        return result.loss, result.token_losses

    def gated_reverse_kl(
        self,
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
        result = self.distillation_loss(
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

    def _divergence(
        self,
        student: Tensor,
        teacher: Tensor,
        group: ProcessGroup,
        vocab_size: int,
        mask: Tensor,
        **options: Any,
    ) -> Summed:
        """Calls the loss with weight 1 and lambda 1; which token was sampled does not matter."""
        one = torch.ones(len(mask))
        result = self.distillation_loss(
            student,
            teacher,
            tokens=torch.zeros(len(mask), dtype=torch.long),
            mask=mask,
            group=group,
            vocab_size=vocab_size,
            coefficients=lambda stats: Coefficients(one, one, 0 * one),
            lambdas=(1.0,),
            estimator="full_vocab",
            **options,
        )
        return result.loss, result.token_losses


loss = Ours("auto")
triton = Ours("triton", needs=("triton",))  # on a CPU with TRITON_INTERPRET=1
