"""The variants of a case: plain PyTorch, ours, and the baselines that are installed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_sgopd import sgopd
from megatron_sgopd.bench import plain
from megatron_sgopd.bench.cases import JSD_BETA, LAMBDA_HIGH, Case
from megatron_sgopd.bench.inputs import Batch
from megatron_sgopd.vocab_parallel import Rows, distillation_loss

Loss = Callable[[Rows, Batch], Tensor]  # the student's rows, and the rest -> scalar


@dataclass(frozen=True)
class Variant:
    """One way to compute a case's objective: the sum over its tokens, or their mean."""

    name: str
    loss: Loss
    ours: bool = False
    is_mean: bool = False
    needs_megatron: bool = False  # Megatron's process groups
    is_compiled: bool = False
    origin: tuple[tuple[str, str], ...] = ()  # package, version and module of a baseline

    @property
    def is_plain(self) -> bool:
        return self.name == "plain"


def plain_variants(case: Case, device: str) -> list[Variant]:
    """Plain PyTorch; on a GPU also compiled."""
    function = partial(plain.loss, case)
    module = f"{plain.__name__}.{case.objective}"
    origin = (("package", "torch"), ("version", torch.__version__), ("module", module))
    made = [Variant("plain", function, origin=origin)]
    if device == "cuda" and case.tp == 1:
        compiled = torch.compile(function)
        made.append(Variant("plain, torch.compile", compiled, is_compiled=True, origin=origin))
    return made


# -- ours ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneLambda:
    """Plain distillation: weight 1, lambda 1. Token-local, so that slices may be asked for."""

    def __call__(self, stats: Any) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones_like(stats.student_logprobs)
        return one, one, torch.zeros_like(one)

    def select(self, index: Any) -> OneLambda:
        return self


@dataclass(frozen=True)
class SignGate:
    """lambda_high where the teacher's and the verifier's signs agree. Token-local."""

    advantages: Tensor

    def __call__(self, stats: Any) -> tuple[Tensor, Tensor, Tensor]:
        a2 = stats.teacher_logprobs - stats.student_logprobs
        gate = sgopd.sign_consistency_gate(self.advantages, a2)
        lam = torch.where(gate, a2.new_tensor(LAMBDA_HIGH), a2.new_tensor(1.0))
        return torch.ones_like(a2), lam, torch.zeros_like(a2)

    def select(self, index: Any) -> SignGate:
        return SignGate(self.advantages[index])


def our_loss(
    case: Case, student: Rows, batch: Batch, *, token_local: bool, **options: Any
) -> Tensor:
    """`distillation_loss` on the case."""
    is_gated = case.objective == "gated_reverse_kl"
    function = SignGate(batch.advantages) if is_gated else OneLambda()
    if case.objective == "candidate":
        options["candidate_lambda"] = lambda a2, i: sgopd.candidate_lambda(
            batch.advantages[i, None], a2, lambda_high=LAMBDA_HIGH
        )
    if case.objective in ("forward_kl", "jsd"):
        options |= {"divergence": case.objective, "beta": JSD_BETA}
    is_sampled = case.form == "sampled"
    return distillation_loss(
        student,
        batch.teacher_logprobs if is_sampled else batch.teacher,
        reference=batch.reference,
        tokens=batch.tokens,
        mask=batch.mask,
        group=batch.group,
        vocab_size=batch.vocab,
        # A bound method has no `select`: the loss must then finish all statistics first.
        coefficients=function if token_local else function.__call__,
        lambdas=(1.0, LAMBDA_HIGH) if is_gated else (1.0,),
        estimator="sampled" if is_sampled else "full_vocab",
        **options,
    ).loss


def our_variants(case: Case) -> list[Variant]:
    """The single pass over the student's logits; and what keeps them, or needs two passes."""
    known = inspect.signature(distillation_loss).parameters
    if case.objective in ("forward_kl", "jsd") and "divergence" not in known:
        return []
    write: dict[str, Any] = {"overwrite_student": True} if "overwrite_student" in known else {}
    one_pass = partial(our_loss, case, token_local=True)
    two_passes = partial(our_loss, case, token_local=False)
    if case.form == "fused":
        return [Variant("ours", one_pass, ours=True)]
    made = [Variant("ours", partial(one_pass, **write), ours=True)]
    if case.tp == 1 and case.objective in ("reverse_kl", "gated_reverse_kl"):
        made.append(Variant("ours, two passes", partial(two_passes, **write), ours=True))
    if case.tp == 1 and case.objective == "reverse_kl":
        made.append(Variant("ours, logits kept", one_pass, ours=True))
    return made
