"""The variants of a case: plain PyTorch, ours, and the baselines that are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_sgopd import sgopd
from megatron_sgopd.bench import plain
from megatron_sgopd.bench.cases import JSD_BETA, LAMBDA_HIGH, MAIN, Case
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
    main_grad: bool = False  # the head has Megatron's fp32 buffer, which counts as an input
    origin: tuple[tuple[str, str], ...] = ()  # package, version and module of a baseline

    @property
    def is_plain(self) -> bool:
        return self.name == "plain"


def plain_variants(case: Case, device: str) -> list[Variant]:
    """Make plain PyTorch; on a GPU also compiled."""
    function = partial(plain.loss, case)
    module = f"{plain.__name__}.{case.objective}"
    origin = (("package", "torch"), ("version", torch.__version__), ("module", module))
    made = [Variant("plain", function, origin=origin)]
    if device == "cuda" and case.tp == 1:
        compiled = torch.compile(function, dynamic=False)
        made.append(Variant("plain, torch.compile", compiled, is_compiled=True, origin=origin))
    return made


# -- ours ------------------------------------------------------------------------------------------


def our_loss(
    case: Case,
    student: Rows,
    batch: Batch,
    *,
    token_local: bool = True,
    overwrite_student: bool = True,
    entropy: bool = False,
) -> Tensor:
    """Call `distillation_loss` with the method that the trainer would take for the case.

    Without `token_local` the method is asked once about all tokens, as one that looks at whole
    rollouts is: the statistics of all tokens then come first, and every row is read twice.
    `entropy`: with the student's entropy, which training shows and no baseline computes.
    """
    is_gated = case.objective == "gated_reverse_kl"
    method = sgopd.coefficients("sg_opd" if is_gated else "opd", lambda_high=LAMBDA_HIGH)
    function = method.for_batch(batch.outcome)
    divergence = case.objective if case.objective in ("forward_kl", "jsd") else "reverse_kl"

    def per_candidate(a2: Tensor, index: Tensor) -> Tensor:
        return sgopd.candidate_lambda(batch.advantages[index, None], a2, lambda_high=LAMBDA_HIGH)

    is_sampled = case.form == "sampled"
    return distillation_loss(
        student,
        batch.teacher_logprobs if is_sampled else batch.teacher,
        reference=batch.reference,
        tokens=batch.tokens,
        mask=batch.mask,
        group=batch.group,
        vocab_size=batch.vocab,
        coefficients=function if token_local else function.__call__,  # which has no `select`
        lambdas=method.lambdas,
        estimator="sampled" if is_sampled else "full_vocab",
        candidate_lambda=per_candidate if case.objective == "candidate" else None,
        divergence=divergence,
        beta=JSD_BETA,
        overwrite_student=overwrite_student and isinstance(student, Tensor),
        student_entropy=entropy,
    ).loss


def our_variants(case: Case) -> list[Variant]:
    """Make the loss in one pass over the student's logits; keeping them; in two passes."""
    made = [Variant("ours", partial(our_loss, case), ours=True)]
    if case.form != "fused" and case.objective in MAIN and case.tp == 1:
        two_passes = partial(our_loss, case, token_local=False)
        made.append(Variant("ours, two passes", two_passes, ours=True))
        if not case.is_large:
            entropy = partial(our_loss, case, entropy=True)
            made.append(Variant("ours, entropy too", entropy, ours=True))
        if not case.is_large and not case.has_reference:
            kept = partial(our_loss, case, overwrite_student=False)
            made.append(Variant("ours, logits kept", kept, ours=True))
    if case.form == "fused":  # as the trainer has it
        made.append(Variant("ours, main_grad", partial(our_loss, case), ours=True, main_grad=True))
    return made
