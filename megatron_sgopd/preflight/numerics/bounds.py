"""Exact values and gradients in float64, and how far fp32 arithmetic may be from them.

The bounds are first-order rounding analyses of the textbook form (subtract the maximum, exp, sum,
log; log p = (x - m) - log s), with the terms of the case at hand put in. u = 2^-24 is fp32's unit
roundoff. Three errors make up all others:

    log s   SUM + log2(N) roundings of a sum of N terms in blocks or pairs, and every term's own,
            u |x - m| on average over p (the argument of exp is rounded)
    log p   that, and 2 u |log p|: two subtractions
    p       relative to it: that of log p, and 3 u for exp and the quotient

Rounding errors of a sum are taken at their bound, as if all had one sign; measured errors are
therefore several times smaller. Nothing here depends on how far a row is shifted: x - m is exact.

Inputs may hold -inf. Shapes: T tokens, N vocabulary entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

U32 = 2.0**-24
TINY = 2.0**-126  # smallest normal fp32: smaller numbers may be flushed to 0
SUM = 6  # exp 2, the factor that brings a rank's sum to the common maximum 3, log 1
FAR = -1e30  # stands for -inf: its exp is 0, and 0 times it is 0
ROUNDOFF = {  # of the gradient's own dtype, and half its smallest number
    torch.float32: (U32, 2.0**-150),
    torch.float64: (2.0**-53, 0.0),
    torch.bfloat16: (2.0**-8, 2.0**-134),
    torch.float16: (2.0**-11, 2.0**-25),
}


@dataclass(frozen=True)
class Exact:
    """Per-token losses [T] and the student's gradient of their sum [T, N], each with its bound."""

    values: Tensor
    values_bound: Tensor
    gradient: Tensor
    gradient_bound: Tensor


@dataclass(frozen=True)
class Softmax:
    """log p [T, N], p, and the fp32 errors of both."""

    log_p: Tensor
    p: Tensor
    log_error: Tensor  # absolute, [T, N]
    relative_error: Tensor  # of p, [T, N]


def finite(logits: Tensor) -> Tensor:
    """Puts a number in the place of -inf."""
    return torch.where(logits == -math.inf, FAR, logits)


def softmax(logits: Tensor, logit_error: Tensor | None = None) -> Softmax:
    """Computes the softmax of float64 logits [T, N] that are themselves off by `logit_error` [T,
    N].
    """
    x = finite(logits)
    log_p = x.log_softmax(-1)
    p = log_p.exp()
    size = log_p.abs()
    sum_error = U32 * (SUM + math.log2(x.shape[-1]) + (p * size).sum(-1, keepdim=True))
    log_error = 2 * U32 * size + sum_error
    if logit_error is not None:
        log_error = log_error + logit_error + (p * logit_error).sum(-1, keepdim=True)
    return Softmax(log_p, p, log_error, log_error + 3 * U32)


def mean_ratio(s: Softmax, ratio: Tensor, ratio_error: Tensor) -> Exact:
    """D = E_p[ratio], gradient p (ratio - D): reverse KL, one half of JSD, the candidates' reward.

    `ratio` [T, N] is log p minus something whose own dependence on the student adds nothing.
    """
    depth = U32 * (SUM + math.log2(ratio.shape[-1]))  # of the sum over the vocabulary
    value = (s.p * ratio).sum(-1)
    terms = s.p * ((s.relative_error + depth) * ratio.abs() + ratio_error)
    value_bound = terms.sum(-1) + U32 * value.abs()
    centred = ratio - value[:, None]
    off = ratio_error + value_bound[:, None] + (s.relative_error + 2 * U32) * centred.abs()
    lost = TINY * (1 + centred.abs().clamp(max=1e4))  # where p is flushed to 0
    return Exact(value, value_bound, s.p * centred, s.p * off + lost)


def reverse_kl(student: Softmax, target: Softmax) -> Exact:
    """KL(student || target) = E_p[log p - log q]."""
    ratio = student.log_p - target.log_p
    error = student.log_error + target.log_error + U32 * ratio.abs()
    return mean_ratio(student, ratio, error)


def forward_kl(student: Softmax, target: Softmax) -> Exact:
    """KL(target || student) = E_q[log q - log p], gradient p - q."""
    turned = reverse_kl(target, student)
    # Of a tail, log q and log p are its mass, and q is spread over it as p is.
    spread = torch.where(student.p > 0, student.p / student.log_p.exp(), 1.0)
    reached = target.log_p.exp() * spread
    off = target.log_error + (spread < 1) * (student.relative_error + student.log_error)
    gradient = student.p - reached
    bound = student.p * student.relative_error + reached * (off + 3 * U32)
    return Exact(turned.values, turned.values_bound, gradient, bound + U32 * gradient.abs() + TINY)


def with_tail(s: Softmax, kept: Tensor) -> Softmax:
    """Makes what is not `kept` [T, N] one outcome: at all of its places the log-prob of its mass.

    p stays, so that an expectation over N entries is one over the outcomes.
    """
    p = s.p.masked_fill(kept, 0.0)
    mass = p.sum(-1, keepdim=True)
    depth = U32 * (SUM + math.log2(p.shape[-1]))
    error = (p * s.relative_error).sum(-1, keepdim=True) / mass + depth + U32 * mass.log().abs()
    return Softmax(
        torch.where(kept, s.log_p, mass.log()),
        s.p,
        torch.where(kept, s.log_error, error),
        s.relative_error,
    )


def jsd(student: Softmax, target: Softmax, beta: float) -> Exact:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q, for beta inside (0, 1).

    Gradient (1 - beta) p (rho - E_p[rho]) with rho = log p - log m: what log m adds by its own
    dependence on p sums to the derivative of sum m = 1, which is 0.
    """
    ours, of_the_other = student.log_p + math.log1p(-beta), target.log_p + math.log(beta)
    log_m = torch.logaddexp(ours, of_the_other)
    part = (ours - log_m).exp()  # of m, the student's
    m_error = part * student.log_error + (1 - part) * target.log_error
    m_error = m_error + 3 * U32 * (2 + log_m.abs())
    own = student.log_p - log_m
    own_part = mean_ratio(student, own, student.log_error + m_error + U32 * own.abs())
    other = target.log_p - log_m
    other_part = mean_ratio(target, other, target.log_error + m_error + U32 * other.abs())
    return Exact(
        (1 - beta) * own_part.values + beta * other_part.values,
        (1 - beta) * own_part.values_bound + beta * other_part.values_bound,
        (1 - beta) * own_part.gradient,
        (1 - beta) * own_part.gradient_bound,
    )


def nll(student: Softmax, tokens: Tensor) -> Exact:
    """-log p(token), gradient p - onehot."""
    at = tokens[:, None]
    onehot = torch.zeros_like(student.p).scatter_(-1, at, 1.0)
    bound = student.p * student.relative_error + 2 * U32 * onehot
    return Exact(
        -student.log_p.gather(-1, at)[:, 0],
        student.log_error.gather(-1, at)[:, 0],
        student.p - onehot,
        bound + TINY,
    )


def extrapolated(
    teacher: Tensor, reference: Tensor, lam: Tensor | float, logit_error: Tensor | None = None
) -> Softmax:
    """The target lam t + (1 - lam) r of raw logits [T, N]; lam a number or [T, 1].

    Formed from the logits as they are, so their size enters: three roundings of its terms, none
    where lam is 1. `logit_error` [T, N] is what lam t + (1 - lam) r is off by beside that.
    """
    lam = torch.as_tensor(lam, dtype=teacher.dtype)
    teacher, reference = finite(teacher), finite(reference)
    size = lam * teacher.abs() + (lam - 1).abs() * reference.abs()
    error = torch.where(lam == 1, 0.0, 3 * U32 * size)
    return softmax(
        teacher + (lam - 1) * (teacher - reference),
        error if logit_error is None else error + logit_error,
    )


def rounded_to(dtype: torch.dtype, exact: Exact, weights: Tensor, mask: Tensor) -> Exact:
    """The losses' weighted sum over the mask: gradients in `dtype`, 0 where the mask is False."""
    roundoff, least = ROUNDOFF[dtype]
    w = (weights * mask)[:, None]
    gradient = exact.gradient * w
    bound = exact.gradient_bound * w + (roundoff + U32) * gradient.abs()
    return Exact(
        torch.where(mask, exact.values, 0.0),
        torch.where(mask, exact.values_bound, 0.0),
        gradient,
        torch.where(mask[:, None], bound + least, 0.0),
    )
