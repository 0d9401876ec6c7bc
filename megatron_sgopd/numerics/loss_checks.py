"""The check of `distillation_loss` on one rank: every method, estimator and form of its inputs.

Value and gradient come from the plain reference (`vocab_parallel_reference`: full logits, autograd)
in float64; their bounds from `bounds`, put together as the loss is. With models given as (hidden
[T, D], head [N, D]) the logits are matrix products, whose own rounding enters as an error of the
logits; gradients are then of hidden states and head.

Shapes: T tokens, N vocabulary entries in all, V columns held by this rank, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd import sgopd
from megatron_sgopd.numerics import bounds
from megatron_sgopd.numerics.bounds import U32, Exact, Softmax
from megatron_sgopd.numerics.cases import CHUNKS, Case, Loss
from megatron_sgopd.numerics.checks import Setting, worst
from megatron_sgopd.numerics.inputs import Inputs, expected_columns
from megatron_sgopd.numerics.outcome import Reading
from megatron_sgopd.vocab_parallel_reference import distillation_loss_reference

MODELS = ("student", "teacher", "reference")
LAMBDAS = {"sg_opd": (1.0, 1.8), "exopd": (1.25,)}
WIDTHS = {"student": 16, "teacher": 24, "reference": 16}  # D: a teacher may have its own


@dataclass(frozen=True)
class Problem:
    """One case in full: float64 logits [T, N] of all models and what the loss is told of them."""

    loss: Loss
    inputs: Inputs
    hidden: dict[str, tuple[Tensor, Tensor]]  # (hidden, head) by model; empty for logits
    options: dict[str, Any]  # what fast path and reference both take
    scale: Tensor  # [T]

    def logits(self, model: str) -> Tensor:
        rows: Tensor = getattr(self.inputs, model)
        return rows

    def logit_error(self, model: str) -> Tensor:
        """What the logits over the temperature are off by, [T, N]."""
        t = self.loss.temperature
        error = torch.zeros_like(self.logits(model))
        if model in self.hidden:
            hidden, head = self.hidden[model]
            error = product_error(hidden, head.T)
        if t != 1.0:  # the quotient's own rounding, of the logits as they are
            error = error + U32 * self.logits(model).abs()
        return error / t

    def softmax(self, model: str) -> Softmax:
        return bounds.softmax(self.logits(model) / self.loss.temperature, self.logit_error(model))


def product_error(a: Tensor, b: Tensor) -> Tensor:
    """Rounding error of a @ b in fp32, whatever the order of summation: n u |a| |b|."""
    return a.shape[-1] * U32 * (a.abs() @ b.abs())


def problem_of(case: Case, x: Inputs) -> Problem:
    assert case.loss is not None, f"{case.name} has no options of the loss"
    loss, hidden = case.loss, {}
    if loss.hidden:
        hidden = draw_hidden(case)
        x = replace(x, **{k: h @ w.T for k, (h, w) in hidden.items()})
    advantage = x.signs.double() * 0.7
    outcome = sgopd.Outcome(advantage, x.signs > 0, torch.zeros(len(x.signs)).bool())
    function = sgopd.coefficients(loss.method, lambda_uniform=1.25)
    scale = x.weights if loss.token_scale else torch.ones_like(x.weights)
    a1 = advantage[:, None]
    options = {
        "tokens": x.tokens,
        "mask": x.mask,
        "coefficients": lambda stats: function(stats, outcome),
        "lambdas": LAMBDAS.get(loss.method, (1.0,)),
        "estimator": loss.estimator,
        "temperature": loss.temperature,
        "token_scale": scale.float() if loss.token_scale else None,
        "candidate_lambda": (lambda a2, i: sgopd.candidate_lambda(a1[i].to(a2), a2))
        if loss.candidate
        else None,
    }
    return Problem(loss, x, hidden, options, scale)


def draw_hidden(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """(hidden [T, D], head [N, D]) of every model; logits have a standard deviation of 3."""
    g = torch.Generator().manual_seed(77 + case.rows.seed)
    dtype, out = getattr(torch, case.rows.dtype), {}
    for name in MODELS:
        width = WIDTHS[name]
        hidden = torch.randn(case.rows.tokens, width, generator=g, dtype=torch.float64)
        head = torch.randn(case.rows.vocab, width, generator=g, dtype=torch.float64)
        out[name] = (hidden.to(dtype).double(), (head * 3 / width**0.5).to(dtype).double())
    return out


# -- exact values, gradients and bounds ------------------------------------------------------------


def exact_of(p: Problem) -> tuple[Tensor, Exact]:
    """The loss, and the tokens' unscaled values with the logits' gradient [T, N] of that loss."""
    student = p.logits("student").clone().requires_grad_()
    kept: list[Any] = []

    def coefficients(stats: Any) -> Any:
        kept.append((stats, p.options["coefficients"](stats)))
        return kept[-1][1]

    frozen = (p.logits("teacher"), p.logits("reference"))
    options = p.options | {"coefficients": coefficients}
    loss = distillation_loss_reference(student, frozen[0], reference=frozen[1], **options)
    loss.backward()
    weight, lam, additive = (c.double() for c in kept[0][1])
    build = sampled_bounds if p.loss.estimator == "sampled" else full_bounds
    formula = build(p, weight, lam, additive)
    assert student.grad is not None, "the reference differentiates"
    return loss.detach(), replace(formula, gradient=student.grad)


def sampled_bounds(p: Problem, weight: Tensor, lam: Tensor, additive: Tensor) -> Exact:
    """-(w A + a) log p(y) with A = (T - S) + (lam - 1)(T - R) held constant."""
    at = p.inputs.tokens[:, None]
    soft = {m: p.softmax(m) for m in MODELS}
    log, error = (
        {m: getattr(s, name).gather(-1, at)[:, 0] for m, s in soft.items()}
        for name in ("log_p", "log_error")
    )
    advantage = log["teacher"] - log["student"] + (lam - 1) * (log["teacher"] - log["reference"])
    extra = (lam - 1).abs()
    size = log["teacher"].abs() + log["student"].abs()
    size = size + extra * (log["teacher"].abs() + log["reference"].abs())
    off = error["teacher"] + error["student"] + extra * (error["teacher"] + error["reference"])
    off = weight.abs() * (off + 2 * U32 * size)  # of the bracket, its own roundings included
    toward = weight * advantage + additive
    s = soft["student"]
    onehot = torch.zeros_like(s.p).scatter_(-1, at, 1.0)
    towards, offs = toward.abs()[:, None], off[:, None]
    bound = offs * (s.p + onehot) + towards * (s.p * s.relative_error + 3 * U32 * (s.p + onehot))
    value = -toward * log["student"]
    value_bound = off * log["student"].abs() + toward.abs() * error["student"]
    value_bound = value_bound + 3 * U32 * value.abs()
    per_logit = p.scale[:, None] / p.loss.temperature
    return Exact(value, value_bound, bound, bound * per_logit + bounds.TINY)


def full_bounds(p: Problem, weight: Tensor, lam: Tensor, additive: Tensor) -> Exact:
    """weight D - additive log p(y), D the divergence or the candidates' expected reward."""
    student = p.softmax("student")
    part = candidate_reward(p) if p.loss.candidate else divergence(p, student, lam)
    own = bounds.nll(student, p.inputs.tokens)
    value = weight * part.values + additive * own.values
    size = (weight * part.values).abs() + (additive * own.values).abs()
    value_bound = weight.abs() * part.values_bound + additive.abs() * own.values_bound
    w, a = weight.abs()[:, None], additive.abs()[:, None]
    bound = w * part.gradient_bound + a * own.gradient_bound
    bound = bound + 3 * U32 * (w * part.gradient.abs() + a * own.gradient.abs())
    per_logit = p.scale[:, None] / p.loss.temperature
    return Exact(value, value_bound + 2 * U32 * size, bound, bound * per_logit + bounds.TINY)


def divergence(p: Problem, student: Softmax, lam: Tensor) -> Exact:
    t, lam = p.loss.temperature, lam[:, None]
    off = lam * p.logit_error("teacher") + (lam - 1).abs() * p.logit_error("reference")
    teacher, reference = p.logits("teacher") / t, p.logits("reference") / t
    return bounds.reverse_kl(student, bounds.extrapolated(teacher, reference, lam, off))


def candidate_reward(p: Problem) -> Exact:
    """-E_p A, A(v) = (T - S)(v) + (lam(v) - 1)(T - R)(v) held constant."""
    s, t, r = (p.softmax(m) for m in MODELS)
    a2 = t.log_p - s.log_p
    lam = p.options["candidate_lambda"](a2, torch.arange(len(a2)))
    extra = (lam - 1).abs()
    reward = a2 + (lam - 1) * (t.log_p - r.log_p)
    size = t.log_p.abs() + s.log_p.abs() + extra * (t.log_p.abs() + r.log_p.abs())
    error = t.log_error + s.log_error + extra * (t.log_error + r.log_error) + 2 * U32 * size
    return bounds.mean_ratio(s, -reward, error)


# -- the check -------------------------------------------------------------------------------------


def check_loss(setting: Setting) -> list[Reading]:
    """Loss, tokens' values, log-probs and gradients against float64."""
    p = problem_of(setting.case, setting.inputs)
    loss, exact = exact_of(p)
    mask, dtype = setting.inputs.mask, getattr(torch, setting.case.rows.dtype)
    student, frozen = rows_of(setting, p)
    chunks = {"chunk_tokens": CHUNKS} if p.loss.chunked else {}
    result = setting.function(
        student,
        frozen[0],
        reference=frozen[1],
        group=dist.group.WORLD,
        vocab_size=setting.case.rows.vocab,
        **p.options,
        **chunks,
    )
    result.loss.backward()
    values_bound = torch.where(mask, exact.values_bound, 0.0)
    values = torch.where(mask, exact.values, 0.0)
    s = p.softmax("student")
    at = setting.inputs.tokens[:, None]
    log_p, log_error = (x.gather(-1, at)[:, 0] * mask for x in (s.log_p, s.log_error))
    total = (values_bound + 2 * U32 * values.abs()) * p.scale
    summed = total.sum()[None] + U32 * len(mask) * (values * p.scale).abs().sum()
    return [
        worst("value", result.token_losses.double() - values, values_bound),
        worst("sum", (result.loss.detach().double() - loss)[None], summed),
        worst("log-prob", result.statistics.student_logprobs.double() - log_p, log_error),
        *gradient_readings(setting, p, student, exact, dtype),
    ]


def rows_of(setting: Setting, p: Problem) -> tuple[Any, list[Any]]:
    """The student's rows, which want gradients, and the frozen models' as the case gives them."""
    dtype = getattr(torch, setting.case.rows.dtype)
    if p.hidden:
        pairs = []
        for i, name in enumerate(MODELS):
            hidden, head = p.hidden[name]
            shard = setting.columns(head.T, i).T.contiguous()  # rows of padding: large garbage
            pairs.append((hidden.to(dtype), shard))
        student = tuple(x.requires_grad_() for x in pairs[0])
        return student, pairs[1:]
    rows = [setting.columns(p.logits(name), i) for i, name in enumerate(MODELS)]
    if p.loss.logprobs:
        at = setting.inputs.tokens[:, None]
        given = [p.softmax(m).log_p.gather(-1, at)[:, 0].float() for m in MODELS[1:]]
        return rows[0].requires_grad_(), given
    return rows[0].requires_grad_(), rows[1:]


def gradient_readings(
    setting: Setting, p: Problem, student: Any, exact: Exact, dtype: torch.dtype
) -> list[Reading]:
    mask = setting.inputs.mask[:, None]
    grad = exact.gradient
    bound = torch.where(mask, exact.gradient_bound, 0.0)
    roundoff, least = bounds.ROUNDOFF[dtype]

    def mine(x: Tensor) -> Tensor:
        return expected_columns(x, setting.case.rows, setting.rank, setting.world)

    if not p.hidden:
        bound = bound + torch.where(mask, roundoff * grad.abs() + least, 0.0)
        return [worst("gradient", student.grad.double() - mine(grad), mine(bound))]
    hidden, head = p.hidden["student"]
    off = bound @ head.abs() + product_error(grad, head)
    off_head = bound.T @ hidden.abs() + product_error(grad.T, hidden)
    wanted = mine((grad.T @ hidden).T).T
    return [
        worst("hidden's gradient", student[0].grad.double() - grad @ head, off),
        worst("head's gradient", student[1].grad.double() - wanted, mine(off_head.T).T),
    ]
