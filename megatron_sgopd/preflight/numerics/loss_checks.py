"""The check of `distillation_loss` on one rank: every method, estimator and form of its inputs.

The gradient comes from the plain reference (`vocab_parallel_reference`: full logits, autograd) in
float64; the tokens' values, which it does not tell apart, and all bounds from `bounds`.

Shapes: T tokens, N vocabulary entries in all, V columns held by this rank, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.preflight.numerics import bounds
from megatron_sgopd.preflight.numerics.bounds import U32, Exact, Softmax
from megatron_sgopd.preflight.numerics.cases import CHUNKS
from megatron_sgopd.preflight.numerics.checks import Setting, worst
from megatron_sgopd.preflight.numerics.inputs import expected_columns
from megatron_sgopd.preflight.numerics.outcome import Reading
from megatron_sgopd.preflight.numerics.problem import MODELS, Problem, problem_of, product_error
from megatron_sgopd.vocab_parallel.reference import distillation_loss_reference

# -- exact values, gradients and bounds ------------------------------------------------------------


def exact_of(p: Problem) -> Exact:
    """The tokens' unscaled values [T], and the logits' gradient [T, N] of the loss."""
    weight, lam, additive = (c.double() for c in p.coefficients(p.statistics()))
    if p.loss.estimator == "sampled":
        exact = sampled(p, weight, lam, additive)
    else:
        exact = full(p, weight, lam, additive)
    bound = exact.gradient_bound * p.scale[:, None] / p.loss.temperature + bounds.TINY
    return replace(exact, gradient=reference_gradient(p), gradient_bound=bound)


def reference_gradient(p: Problem) -> Tensor:
    """Computes the gradient by autograd on full logits in float64, [T, N]."""
    logits = {m: bounds.finite(x) for m, x in p.logits.items()}
    student = logits["student"].clone().requires_grad_()
    distillation_loss_reference(
        student,
        logits["teacher"],
        reference=logits["reference"],
        coefficients=p.coefficients,
        **p.options,
    ).backward()
    assert student.grad is not None, "the reference differentiates"
    return student.grad


def sampled(p: Problem, weight: Tensor, lam: Tensor, additive: Tensor) -> Exact:
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
    each, offs = toward[:, None], off[:, None]
    bound = offs * (s.p + onehot)
    bound = bound + each.abs() * (s.p * s.relative_error + 3 * U32 * (s.p + onehot))
    value = -toward * log["student"]
    value_bound = off * log["student"].abs() + toward.abs() * error["student"]
    return Exact(value, value_bound + 3 * U32 * value.abs(), each * (s.p - onehot), bound)


def full(p: Problem, weight: Tensor, lam: Tensor, additive: Tensor) -> Exact:
    """weight D - additive log p(y), D the divergence or the candidates' expected reward."""
    student = p.softmax("student")
    part = candidate_reward(p) if p.loss.candidate else divergence(p, student, lam)
    own = bounds.nll(student, p.inputs.tokens)
    size = (weight * part.values).abs() + (additive * own.values).abs()
    value_bound = weight.abs() * part.values_bound + additive.abs() * own.values_bound
    w, a = weight[:, None], additive[:, None]
    bound = w.abs() * part.gradient_bound + a.abs() * own.gradient_bound
    terms = (w * part.gradient).abs() + (a * own.gradient).abs()
    return Exact(
        weight * part.values + additive * own.values,
        value_bound + 2 * U32 * size,
        w * part.gradient + a * own.gradient,
        bound + 3 * U32 * terms,
    )


def divergence(p: Problem, student: Softmax, lam: Tensor) -> Exact:
    """Computes the student's from the target of each token's lambda, top k and tail where asked."""
    t, lam = p.loss.temperature, lam[:, None]
    off = lam * p.logit_error("teacher") + (lam - 1).abs() * p.logit_error("reference")
    teacher, reference = p.logits["teacher"] / t, p.logits["reference"] / t
    target = bounds.extrapolated(teacher, reference, lam, off)
    if p.loss.top_k is not None:
        # Ties at rank k go to the lower id.
        best = target.log_p.argsort(dim=-1, descending=True, stable=True)[:, : p.loss.top_k]
        kept = torch.zeros_like(target.p, dtype=torch.bool).scatter_(-1, best, True)
        student, target = bounds.with_tail(student, kept), bounds.with_tail(target, kept)
    beta = {"reverse_kl": 1.0, "forward_kl": 0.0}.get(p.loss.divergence, p.loss.beta)
    if beta == 1.0:
        return bounds.reverse_kl(student, target)
    return bounds.forward_kl(student, target) if beta == 0.0 else bounds.jsd(student, target, beta)


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
    exact, mask = exact_of(p), p.inputs.mask
    student, leaves, frozen = rows_of(setting, p)
    result = setting.function(
        student,
        frozen[0],
        reference=None if p.loss.top_k else frozen[1],
        group=dist.group.WORLD,
        vocab_size=setting.case.rows.vocab,
        coefficients=p.function,
        **p.options,
        **p.extras(CHUNKS),
    )
    result.loss.backward()
    values, values_bound = (torch.where(mask, x, 0.0) for x in (exact.values, exact.values_bound))
    total = (values * p.scale).sum()
    added = U32 * (2 + len(mask)) * (values * p.scale).abs().sum()
    s, at = p.softmax("student"), p.inputs.tokens[:, None]
    log_p, log_error = (x.gather(-1, at)[:, 0] * mask for x in (s.log_p, s.log_error))
    return [
        worst("value", result.token_losses.double() - values, values_bound),
        worst(
            "sum",
            (result.loss.detach().double() - total)[None],
            ((values_bound * p.scale).sum() + added)[None],
        ),
        worst("log-prob", result.statistics.student_logprobs.double() - log_p, log_error),
        *gradient_readings(setting, p, leaves, exact),
    ]


def rows_of(setting: Setting, p: Problem) -> tuple[Any, list[Tensor], list[Any]]:
    """The student's rows, the leaves under them, and the frozen models' rows."""
    if p.hidden:
        pairs = []
        for i, name in enumerate(MODELS):
            hidden, head = p.hidden[name]
            shard = setting.columns(head.T, i).T.contiguous()  # rows of padding: large garbage
            pairs.append((hidden.to(p.dtype), shard))
        leaves = [x.requires_grad_() for x in pairs[0]]
        if p.loss.main_grad:
            leaves[1].main_grad = torch.zeros(leaves[1].shape)  # type: ignore[attr-defined]
        return tuple(leaves), leaves, pairs[1:]
    rows = [setting.columns(p.logits[name], i) for i, name in enumerate(MODELS)]
    leaf = rows[0].requires_grad_()
    # What is written over must not be a leaf, and a model's output never is one.
    student = leaf * 1.0 if p.loss.overwrite else leaf
    if p.loss.logprobs:
        at = p.inputs.tokens[:, None]
        rows[1:] = [p.softmax(m).log_p.gather(-1, at)[:, 0].float() for m in MODELS[1:]]
    return student, [leaf], rows[1:]


def gradient_of(leaf: Tensor) -> Tensor:
    """Returns a leaf's gradient in float64; from `main_grad` where it has one."""
    grad: Tensor | None = getattr(leaf, "main_grad", leaf.grad)
    if grad is None:
        raise TypeError("left no gradient on one of the student's rows")
    return grad.double()


def gradient_readings(
    setting: Setting, p: Problem, leaves: list[Tensor], exact: Exact
) -> list[Reading]:
    """Compares the gradients of the logits, or of hidden states and head."""
    roundoff, least = bounds.ROUNDOFF[p.dtype]
    grad = exact.gradient
    got = [gradient_of(leaf) for leaf in leaves]
    bound = torch.where(p.inputs.mask[:, None], exact.gradient_bound, 0.0)

    def own(x: Tensor) -> Tensor:
        return expected_columns(x, setting.case.rows, setting.rank, setting.world)

    if not p.hidden:
        bound = bound + p.inputs.mask[:, None] * (roundoff * grad.abs() + least)
        return [worst("gradient", got[0] - own(grad), own(bound))]
    hidden, head = p.hidden["student"]
    off = bound @ head.abs() + product_error(grad, head)
    off_head = bound.T @ hidden.abs() + product_error(grad.T, hidden)
    if roundoff > U32:  # the logits' gradient, the products and their sum over the ranks
        off = off + 3 * roundoff * (grad.abs() @ head.abs())
        off_head = off_head + 3 * roundoff * (grad.T.abs() @ hidden.abs())
    return [
        worst("hidden's gradient", got[0] - grad @ head, off),
        worst(
            "head's gradient",
            got[1] - own((grad.T @ hidden).T).T,
            own(off_head.T).T,
        ),
    ]
