"""The paper's two ideas as pure functions, and the methods they are compared with.

The sign-consistency gate (arXiv 2606.09304): extrapolate the distillation where the teacher's wish
and the verifier's verdict agree, do not where they conflict. Phased teacher sampling: replace part
of the batch by verifier-endorsed teacher rollouts at cold start and fade them out.

Every advantage is in ascent form: the update follows E[A grad log p_student(y_t)]. S, T, R are the
log-probabilities of the sampled token under student, teacher and reference. Each reading the paper
leaves open is a named option; docs/method.md has the evidence for the defaults.

A *method* is a coefficient function: it turns per-token statistics and the verifier's outcome into
(weight, lambda, additive), from which the loss of a token is

    weight * D(lambda) - additive * log p_student(y_t),

D being -[(T-S) + (lambda-1)(T-R)] log p_student(y_t), detached in the bracket, for the `sampled`
estimator, and KL(student || softmax(lambda t + (1-lambda) r)) for `full_vocab`.

Shapes: T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_sgopd.config.phases import teacher_fraction, teacher_slots

__all__ = ["coefficients", "teacher_fraction", "teacher_slots"]  # what others may rely on
GROUP_STD_EPS = 1e-6  # docs/method.md, "The gate": a1 = (c - mean) / (std + 1e-6)

CHOICES = {
    "verifier_signal": ("group_norm", "mean_only", "sign"),
    "teacher_signal": ("t_minus_s", "t_minus_r"),
    "conflict": ("plain", "interpolate", "shrink", "verifier_mix"),
    "ce_weighting": ("none", "dft"),
}


class TokenLogprobs(Protocol):
    """The models' log-probs [T] of the sampled tokens, as a coefficient function reads them."""

    @property
    def student_logprobs(self) -> Tensor: ...
    @property
    def teacher_logprobs(self) -> Tensor | None: ...
    @property
    def reference_logprobs(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Outcome:
    """Describes what the rollouts say of each token, [T] each."""

    verifier_advantage: Tensor  # a1 of the token's rollout, float
    is_correct: Tensor  # bool
    is_imitated: Tensor  # bool: a teacher's or a data set's token, learnt by cross-entropy
    sampled_logprobs: Tensor | None = None  # by the engine; needed for importance weights only
    sequence_ids: Tensor | None = None  # int: tokens of one rollout share theirs
    batch_sums: Tensor | None = None  # a method's own sums over the step's global batch
    imitates: bool = True  # False: no token is imitated, and nobody need look

    def select(self, places: Tensor | slice) -> Outcome:
        """The same of some tokens: their places among the T."""

        def at(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[places]

        return Outcome(
            self.verifier_advantage[places],
            self.is_correct[places],
            self.is_imitated[places],
            at(self.sampled_logprobs),
            at(self.sequence_ids),
            self.batch_sums,
            self.imitates,
        )


class Coefficients(NamedTuple):
    """Per-token coefficients of the loss, [T] each, without gradient.

    `lam` is a number; inside a method it is a bool instead where that suffices: whether the token
    takes the last of the method's lambdas.
    """

    weight: Tensor
    lam: Tensor
    additive: Tensor


@dataclass(frozen=True)
class MethodOptions:
    """The options of all methods; names and defaults are the recipe's (`distill.*`)."""

    lambda_uniform: float = 1.25
    verifier_signal: str = "group_norm"
    teacher_signal: str = "t_minus_s"
    lambda_high: float = 1.8
    lambda_low: float = 1.0
    conflict: str = "plain"
    beta: float = 1.0
    eps: float = 0.0
    forbid_sign_flip: bool = False
    on_teacher_rollouts: bool = False
    adv_clip: float | None = None
    ce_weight: float = 1.0
    ce_weighting: str = "none"
    tis_cap: float | None = None  # None: no truncated importance sampling

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


# -- the verifier's signal, a1 ---------------------------------------------------------------------


def verifier_advantages(is_correct: Sequence[bool], signal: str = "group_norm") -> list[float]:
    """a1 of each of the G student rollouts of one prompt.

    `group_norm` (c - mean)/(std + 1e-6), population std; `mean_only` c - mean; `sign` 2c - 1. With
    one rollout there is no group: 2c - 1 whatever the signal. Only its sign enters the gate, except
    under `verifier_mix` and in `grpo`.
    """
    if signal not in CHOICES["verifier_signal"]:
        raise ValueError(f"verifier_signal is {signal!r}; allowed are group_norm, mean_only, sign")
    c = [float(v) for v in is_correct]
    if len(c) == 1 or signal == "sign":
        return [2.0 * v - 1.0 for v in c]
    mean = sum(c) / len(c)
    if signal == "mean_only":
        return [v - mean for v in c]
    if all(v == c[0] for v in c):
        return [0.0] * len(c)  # exactly: rounding in the mean must not open the gate
    std = math.sqrt(sum((v - mean) ** 2 for v in c) / len(c))
    return [(v - mean) / (std + GROUP_STD_EPS) for v in c]


# -- the gate --------------------------------------------------------------------------------------


def sign_consistency_gate(a1: Tensor, a2: Tensor, eps: float = 0.0) -> Tensor:
    """g = 1[a1 * a2 > 0], strict; closed on ties: a1 = 0 or |a2| <= eps. Bool, broadcast shape.

    Signs are multiplied, not values, so that no product underflows to a tie.
    """
    return (torch.sign(a1) * torch.sign(a2) > 0) & (a2.abs() > eps)


def teacher_signal(stats: TokenLogprobs, which: str = "t_minus_s") -> Tensor:
    """a2 [T]: T - S (the reverse-KL advantage), or T - R (the teacher's implicit reward)."""
    if which == "t_minus_s":
        return _teacher(stats) - stats.student_logprobs
    return _teacher(stats) - _reference(stats)


def candidate_lambda(
    a1: Tensor, a2: Tensor, *, eps: float = 0.0, lambda_high: float = 1.8, lambda_low: float = 1.0
) -> Tensor:
    """A lambda per vocabulary entry: the gate applied to a2 [T, V] with the rollout's a1 [T, 1]."""
    gate = sign_consistency_gate(a1, a2, eps)
    return _choose(gate, lambda_high, lambda_low, a2)


# -- methods ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """Describes how a method turns statistics and outcomes into coefficients.

    `token_local`: a token's coefficients depend on that token alone, so that the loss may ask about
    some tokens at a time. `summarize` (statistics, outcome) -> [k]: sums over a micro-batch, which
    the trainer adds up over the optimizer step's global batch before any gradient is made
    (`Outcome.batch_sums`; one more forward pass of the student).
    """

    function: Callable[[TokenLogprobs, Outcome, MethodOptions], Coefficients]
    lambdas: Callable[[MethodOptions], tuple[float, ...]] = lambda opt: (1.0,)
    needs_teacher: bool = True
    token_local: bool = True
    summarize: Callable[[TokenLogprobs, Outcome], Tensor] | None = None


def coefficients(method: str, **options: object) -> CoefficientFunction:
    """The coefficient function of a method: (statistics, outcome) -> (weight, lambda, additive).

    Args:
        method: a name of `METHODS`.
        options: fields of `MethodOptions`.
    Raises:
        ValueError: unknown method or option, naming what is allowed.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(sorted(METHODS))}")
    allowed = {f.name for f in fields(MethodOptions)}
    if unknown := sorted(set(options) - allowed):
        raise ValueError(f"unknown option {unknown[0]!r}; allowed are {', '.join(sorted(allowed))}")
    return CoefficientFunction(METHODS[method], MethodOptions(**options))  # type: ignore[arg-type]


@dataclass(frozen=True)
class CoefficientFunction:
    """A method with its options; called, it gives numbers for every token."""

    method: Method
    options: MethodOptions

    @property
    def lambdas(self) -> tuple[float, ...]:
        """The values that a token's lambda can take."""
        return self.method.lambdas(self.options)

    def __call__(self, stats: TokenLogprobs, outcome: Outcome) -> Coefficients:
        result = self.decide(stats, outcome)
        return result._replace(lam=self._numbers(result.lam, result.weight))

    def decide(self, stats: TokenLogprobs, outcome: Outcome) -> Coefficients:
        """The same with lambda as a bool, where the method only chooses between its two."""
        opt = self.options
        result = self.method.function(stats, outcome, opt)
        if opt.adv_clip is not None:
            result = self._clip(result, stats, opt.adv_clip)
        if opt.tis_cap is not None:
            tis = importance_weights(stats, outcome, opt.tis_cap)
            result = result._replace(weight=result.weight * tis, additive=result.additive * tis)
        return _imitate(result, stats, outcome, opt) if outcome.imitates else result

    def for_batch(self, outcome: Outcome) -> BatchCoefficients:
        """The function of the statistics alone that the loss asks."""
        return (TokenCoefficients if self.method.token_local else BatchCoefficients)(self, outcome)

    def _clip(self, c: Coefficients, stats: TokenLogprobs, limit: float) -> Coefficients:
        """Shrinks the weight so that |A| <= limit; the sign of A stays."""
        if stats.teacher_logprobs is None:
            return c
        size = _advantage(stats, self._numbers(c.lam, c.weight)).abs().clamp(min=limit)
        return c._replace(weight=c.weight * (limit / size))

    def _numbers(self, lam: Tensor, like: Tensor) -> Tensor:
        if lam.dtype != torch.bool:
            return lam
        return _choose(lam, self.lambdas[-1], self.lambdas[0], like)


@dataclass(frozen=True)
class BatchCoefficients:
    """A coefficient function with a micro-batch's outcomes: statistics -> coefficients."""

    function: CoefficientFunction
    outcome: Outcome

    def __call__(self, stats: TokenLogprobs) -> Coefficients:
        return self.function.decide(stats, self.outcome)


@dataclass(frozen=True)
class TokenCoefficients(BatchCoefficients):
    """One that looks at a token at a time, and so can be asked about some of them."""

    def select(self, places: Tensor | slice) -> TokenCoefficients:
        """The function of the tokens at these places, [n]."""
        return TokenCoefficients(self.function, self.outcome.select(places))


def _one_lambda(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool)


def _sft(stats: TokenLogprobs, outcome: Outcome, opt: MethodOptions) -> Coefficients:
    zero = torch.zeros_like(stats.student_logprobs)
    return Coefficients(zero, _one_lambda(zero), zero + opt.ce_weight)


def _grpo(stats: TokenLogprobs, outcome: Outcome, opt: MethodOptions) -> Coefficients:
    zero = torch.zeros_like(stats.student_logprobs)
    return Coefficients(zero, _one_lambda(zero), outcome.verifier_advantage.to(zero.dtype))


def _opd(stats: TokenLogprobs, outcome: Outcome, opt: MethodOptions) -> Coefficients:
    """OPD, and with a lambda of its own G-OPD / ExOPD (arXiv 2602.12125): one for every token."""
    zero = torch.zeros_like(stats.student_logprobs)
    return Coefficients(zero + 1.0, _one_lambda(zero), zero)


def _sg_opd(stats: TokenLogprobs, outcome: Outcome, opt: MethodOptions) -> Coefficients:
    """SG-OPD (arXiv 2606.09304): lambda_high where the gate is open; else one of four readings.

    plain, interpolate: lambda_low (1, or between 0 and 1). shrink: weight beta, lambda 1.
    verifier_mix: lambda 1 and beta * a1 added to the advantage.
    """
    zero = torch.zeros_like(stats.student_logprobs)
    gate = gate_of(stats, outcome, opt)
    weight, additive = zero + 1.0, zero
    if opt.conflict == "shrink":
        weight = _choose(gate, 1.0, opt.beta, zero)
    elif opt.conflict == "verifier_mix":
        additive = torch.where(gate, zero, opt.beta * outcome.verifier_advantage.to(zero.dtype))
    if not opt.forbid_sign_flip:
        return Coefficients(weight, gate, additive)
    # Where the extrapolation would turn the update round, plain OPD: perhaps a third lambda.
    lam = _choose(gate, opt.lambda_high, opt.lambda_low, zero)
    a2 = teacher_signal(stats, "t_minus_s")
    flips = torch.sign(_advantage(stats, lam)) * torch.sign(a2) < 0
    return Coefficients(weight, torch.where(flips, torch.ones_like(lam), lam), additive)


def _opdvr(stats: TokenLogprobs, outcome: Outcome, opt: MethodOptions) -> Coefficients:
    """OPDVR (arXiv 2608.24696): A = z max(0, z a2), z = 2c - 1: conflicting tokens are dropped."""
    zero = torch.zeros_like(stats.student_logprobs)
    z = _choose(outcome.is_correct, 1.0, -1.0, zero)
    keep = sign_consistency_gate(z, teacher_signal(stats), opt.eps)
    return Coefficients(keep.to(zero.dtype), _one_lambda(zero), zero)


def _grpd(stats: TokenLogprobs, outcome: Outcome, opt: MethodOptions) -> Coefficients:
    """GRPD (beside OPDVR): A = sign(a1) max(0, sign(a1) a2), a1 normalised over the group."""
    zero = torch.zeros_like(stats.student_logprobs)
    keep = sign_consistency_gate(outcome.verifier_advantage, teacher_signal(stats), opt.eps)
    return Coefficients(keep.to(zero.dtype), _one_lambda(zero), zero)


METHODS: dict[str, Method] = {
    "sft": Method(_sft, needs_teacher=False),
    "grpo": Method(_grpo, needs_teacher=False),
    "opd": Method(_opd),
    "exopd": Method(_opd, lambda opt: (opt.lambda_uniform,)),
    "sg_opd": Method(_sg_opd, lambda opt: (opt.lambda_low, opt.lambda_high)),
    "opdvr": Method(_opdvr),
    "grpd": Method(_grpd),
}
GATED = frozenset({"sg_opd", "opdvr", "grpd"})  # methods that read the sign of T - S


def gate_of(stats: TokenLogprobs, outcome: Outcome, opt: MethodOptions) -> Tensor:
    """The gate of each token [T], bool: what `sg_opd` acts on and every run logs."""
    a2 = teacher_signal(stats, opt.teacher_signal)
    return sign_consistency_gate(outcome.verifier_advantage, a2, opt.eps)


def importance_weights(stats: TokenLogprobs, outcome: Outcome, cap: float) -> Tensor:
    """Truncated importance weights min(exp(S_trainer - S_engine), cap), [T]."""
    if outcome.sampled_logprobs is None:
        raise ValueError("importance weights need the engine's log-probs; the rollouts have none")
    return (stats.student_logprobs - outcome.sampled_logprobs).exp().clamp(max=cap)


def _imitate(
    c: Coefficients, stats: TokenLogprobs, outcome: Outcome, opt: MethodOptions
) -> Coefficients:
    """Tokens not sampled by the student take cross-entropy: no gate, TIS or advantage.

    The log-ratio would not be a policy gradient there: its mean under the teacher is the forward
    KL, never negative (docs/method.md). `dft` weighs a token by the student's own probability of it
    (arXiv 2508.05629). With `on_teacher_rollouts` only tokens whose gate is open are imitated; the
    rollout was endorsed, so a1 counts as +1 there.
    """
    ce = torch.full_like(c.additive, opt.ce_weight)
    if opt.ce_weighting == "dft":
        ce = ce * stats.student_logprobs.exp()
    if opt.on_teacher_rollouts and stats.teacher_logprobs is not None:
        a2 = teacher_signal(stats, opt.teacher_signal)
        ce = ce * sign_consistency_gate(torch.ones_like(a2), a2, opt.eps)
    where = outcome.is_imitated
    return c._replace(
        weight=torch.where(where, torch.zeros_like(ce), c.weight),
        additive=torch.where(where, ce, c.additive),
    )


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """torch.where of two numbers, exact in `like`'s dtype (of itself it would round to fp32)."""
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


def _advantage(stats: TokenLogprobs, lam: Tensor) -> Tensor:
    """A = (T - S) + (lambda - 1)(T - R); the reference is read only where lambda is not 1."""
    a2 = _teacher(stats) - stats.student_logprobs
    if stats.reference_logprobs is None:
        return a2
    return a2 + (lam - 1.0) * (_teacher(stats) - stats.reference_logprobs)


def _teacher(stats: TokenLogprobs) -> Tensor:
    if stats.teacher_logprobs is None:
        raise ValueError("this method compares with a teacher, and no teacher was given")
    return stats.teacher_logprobs


def _reference(stats: TokenLogprobs) -> Tensor:
    if stats.reference_logprobs is None:
        raise ValueError("lambda other than 1 and t_minus_r need a reference; none was given")
    return stats.reference_logprobs
