"""The objective of a recipe: from one micro-batch's rows to its loss and what to log of it.

Knows the method, the estimator and the sampling temperature; knows no trainer. `Scores` is what
the frozen models handed over beforehand.

Shapes: R x L tokens of a micro-batch, flattened to T where the mathematics begins; V local rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd import sgopd
from megatron_sgopd.config.schema import DistillConfig, RolloutConfig
from megatron_sgopd.training.packing import MicroBatch
from megatron_sgopd.vocab_parallel import LossResult, Rows, Statistics, distillation_loss

Sums = dict[str, tuple[Tensor, Tensor]]  # metric name -> (sum, count), scalars


@dataclass(frozen=True)
class Scores:
    """Teacher's and reference's side of a micro-batch: log-probs [T], or (hidden, head)."""

    teacher: Rows | None = None
    reference: Rows | None = None


@dataclass(frozen=True)
class Objective:
    """Describes what the recipe asks of each token."""

    method: str
    options: sgopd.MethodOptions
    estimator: str
    lambdas: tuple[float, ...]
    temperature: float
    chunk_tokens: int | None
    candidate_gate: bool
    divergence: str = "reverse_kl"
    beta: float = 0.5
    top_k: int | None = None

    @classmethod
    def from_config(cls, distill: DistillConfig, rollout: RolloutConfig, eps: float) -> Objective:
        """Makes the objective of a resolved recipe; eps is the gate's tie width as a number."""
        gate = distill.gate
        options = sgopd.MethodOptions(
            lambda_uniform=distill.lambda_uniform,
            verifier_signal=gate.verifier_signal,
            teacher_signal=gate.teacher_signal,
            lambda_high=gate.lambda_high,
            lambda_low=gate.lambda_low,
            conflict=gate.conflict,
            beta=gate.beta,
            eps=eps,
            forbid_sign_flip=gate.forbid_sign_flip,
            on_teacher_rollouts=gate.on_teacher_rollouts,
            adv_clip=distill.adv_clip,
            ce_weight=distill.phases.ce_weight,
            ce_weighting=distill.phases.ce_weighting,
            tis_cap=rollout.tis_cap if rollout.tis == "token" else None,
        )
        if distill.method == "sft":  # nothing was sampled: cross-entropy as it stands
            options = sgopd.MethodOptions(ce_weight=1.0)
        return cls(
            method=distill.method,
            options=options,
            estimator=distill.estimator,
            lambdas=sgopd.METHODS[distill.method].lambdas(options),
            temperature=1.0 if distill.method == "sft" else rollout.temperature,
            chunk_tokens=distill.chunk_tokens,
            candidate_gate=distill.method == "sg_opd" and gate.full_vocab_mode == "candidate",
            divergence=distill.divergence,
            beta=distill.jsd_beta,
            top_k=distill.top_k,
        )

    @cached_property
    def function(self) -> sgopd.CoefficientFunction:
        """The method's coefficient function, its options checked once."""
        return sgopd.coefficients(self.method, **vars(self.options))

    def for_statistics(self) -> Objective:
        """The same scoring with coefficients that decide nothing, for passes without gradient."""
        return replace(
            self,
            method="opd",
            options=sgopd.MethodOptions(),
            lambdas=(1.0,),
            candidate_gate=False,
            divergence="reverse_kl",
            top_k=None,
        )

    @property
    def is_gated(self) -> bool:
        """Tells whether coefficients depend on the sign of T - S, so that ties must be known."""
        return self.method in sgopd.GATED

    @property
    def needs_teacher(self) -> bool:
        return sgopd.METHODS[self.method].needs_teacher

    @property
    def needs_reference(self) -> bool:
        extrapolates = any(lam != 1.0 for lam in self.lambdas)
        reads_it = self.options.teacher_signal == "t_minus_r" and self.method == "sg_opd"
        return self.needs_teacher and (extrapolates or reads_it)

    def loss(
        self,
        student: Rows,
        micro_batch: MicroBatch,
        scores: Scores,
        *,
        group: dist.ProcessGroup | None,
        vocab_size: int,
        sum_hidden_gradient: bool = True,
        batch_sums: Tensor | None = None,
    ) -> LossResult:
        """Sum of token_scale times the token losses; logits [T, V] given are overwritten.

        `batch_sums`: the method's own sums over the step's global batch, if it has any.
        """
        outcome = replace(outcome_of(micro_batch), batch_sums=batch_sums)
        gate = self.options

        def per_candidate(a2: Tensor, index: Tensor) -> Tensor:
            a1 = outcome.verifier_advantage[index][:, None]
            return sgopd.candidate_lambda(
                a1, a2, eps=gate.eps, lambda_high=gate.lambda_high, lambda_low=gate.lambda_low
            )

        return distillation_loss(
            student,
            scores.teacher,
            reference=scores.reference,
            tokens=micro_batch.targets.flatten(),
            mask=micro_batch.loss_mask.flatten(),
            group=group,
            vocab_size=vocab_size,
            coefficients=self.function.for_batch(outcome),
            lambdas=self.lambdas,
            estimator=self.estimator,
            temperature=self.temperature,
            token_scale=micro_batch.token_scale.flatten(),
            candidate_lambda=per_candidate if self.candidate_gate else None,
            divergence=self.divergence,
            beta=self.beta,
            top_k=self.top_k,
            overwrite_student=True,
            chunk_tokens=self.chunk_tokens,
            sum_hidden_gradient=sum_hidden_gradient,
        )


def outcome_of(micro_batch: MicroBatch) -> sgopd.Outcome:
    """Returns what the rollouts say of each token, flattened to [T]."""
    imitated = micro_batch.is_imitated.flatten()
    return sgopd.Outcome(
        verifier_advantage=micro_batch.verifier_advantage.flatten(),
        is_correct=micro_batch.is_correct.flatten(),
        is_imitated=imitated,
        sampled_logprobs=micro_batch.sampled_logprobs.flatten(),
        sequence_ids=micro_batch.sequence_ids.flatten(),
        imitates=bool(imitated.any()),
    )


def token_metrics(objective: Objective, micro_batch: MicroBatch, result: LossResult) -> Sums:
    """(sum, count) of everything a step logs about its tokens; sums add up over micro-batches.

    Of the student's own tokens, except `train/imitated_nll`. `engine/mismatch_kl` is the k3
    estimate of KL(engine || trainer), exp(d) - 1 - d with d = trainer - engine.
    """
    stats, options, outcome = result.statistics, objective.options, outcome_of(micro_batch)
    trained = micro_batch.loss_mask.flatten()
    own, imitated = trained & ~outcome.is_imitated, trained & outcome.is_imitated
    sums: Sums = {}
    mean = partial(_add_mean, sums)
    if stats.student_entropy is not None:
        mean("student/entropy", stats.student_entropy, trained)
    if bool(imitated.any()):
        mean("train/imitated_nll", -stats.student_logprobs, imitated)
    if not bool(own.any()):
        return sums
    assert outcome.sampled_logprobs is not None, "outcome_of always carries them"
    gap = stats.student_logprobs - outcome.sampled_logprobs
    mean("engine/mismatch_kl", gap.exp() - 1.0 - gap, own)
    if options.tis_cap is not None:
        mean("engine/tis_clip_rate", (gap.exp() > options.tis_cap).float(), own)
    if stats.teacher_logprobs is None:
        return sums
    mixed = own & (outcome.verifier_advantage != 0)
    a2 = sgopd.teacher_signal(stats)
    gate = sgopd.gate_of(stats, outcome, options) if _can_gate(stats, options) else None
    mean("distill/reverse_kl", -a2, own)
    mean("distill/reverse_kl_correct", -a2, own & outcome.is_correct)
    mean("distill/reverse_kl_wrong", -a2, own & ~outcome.is_correct)
    mean("distill/token_loss", result.token_losses, own)
    if gate is not None:
        mean("gate/open_rate", gate.float(), own)
        mean("gate/open_rate_mixed", gate.float(), mixed)
        mean("gate/tie_rate", (a2.abs() <= options.eps).float(), own)
    if stats.reference_logprobs is not None:
        advantage = a2 + (result.lam - 1.0) * (stats.teacher_logprobs - stats.reference_logprobs)
        mean("gate/sign_flip_rate", (torch.sign(advantage) * torch.sign(a2) < 0).float(), own)
        if options.adv_clip is not None:
            mean("distill/adv_clip_rate", (advantage.abs() > options.adv_clip).float(), own)
    return sums


def _can_gate(stats: Statistics, options: sgopd.MethodOptions) -> bool:
    return options.teacher_signal == "t_minus_s" or stats.reference_logprobs is not None


def _add_mean(sums: Sums, name: str, values: Tensor, where: Tensor) -> None:
    sums[name] = ((values.float() * where).sum(), where.sum().float())
