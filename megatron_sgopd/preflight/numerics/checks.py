"""The checks of one divergence on one rank: what a function returned beside what is exact.

Every check gives readings: an error, its bound, and whether the one is within the other. Of tensors
the element with the largest share of its own bound is the reading.

Shapes: T tokens, N vocabulary entries in all, V columns held by this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.preflight.numerics import bounds
from megatron_sgopd.preflight.numerics.bounds import Exact
from megatron_sgopd.preflight.numerics.cases import CHUNKS, Case
from megatron_sgopd.preflight.numerics.inputs import (
    Inputs,
    draw,
    expected_columns,
    local_columns,
)
from megatron_sgopd.preflight.numerics.outcome import Reading

LAMBDAS = (1.0, 1.8)  # of the gated cases: the paper's
# Kept apart, maximum and sum are off by a few u of 1 where their sum is off by half a unit of 28,
# 16 u: of tokens whose T - S is of that size far fewer signs turn. Half is asked for.
SHARE_OF_MERGED = 0.5


@dataclass(frozen=True)
class Setting:
    """A case on this rank: the function, the inputs in full, and this rank's columns."""

    function: Callable[..., Any]
    case: Case
    inputs: Inputs
    rank: int
    world: int

    @classmethod
    def from_function(cls, function: Callable[..., Any], case: Case) -> Setting:
        return cls(function, case, draw(case.rows), dist.get_rank(), dist.get_world_size())

    def columns(self, x: Tensor, which: int) -> Tensor:
        return local_columns(x, self.case.rows, which, self.rank, self.world)

    def shards(self) -> list[Tensor]:
        """Student and teacher [T, V]."""
        return [self.columns(self.inputs.student, 0), self.columns(self.inputs.teacher, 1)]

    def call(self, student: Tensor, teacher: Tensor, part: slice) -> Any:
        """The function on the tokens of `part`."""
        x, capability = self.inputs, self.case.capability
        options: dict[str, Any] = {
            "group": dist.group.WORLD,
            "vocab_size": self.case.rows.vocab,
            "mask": x.mask[part],
        }
        if capability == "nll":
            return self.function(student[part], x.tokens[part], **options)
        if capability == "gated_reverse_kl":
            options |= {"tokens": x.tokens[part], "signs": x.signs[part], "lambdas": LAMBDAS}
            reference = self.columns(x.reference, 2)[part]
            return self.function(student[part], teacher[part], reference, **options)
        if capability == "jsd":
            options["beta"] = self.case.beta
        return self.function(student[part], teacher[part], **options)


@dataclass(frozen=True)
class Got:
    """Describes what a function returned, all parts together, in float64 but for `bits`."""

    values: Tensor  # [T], or [1]: the sum where there is no value per token
    gradient: Tensor  # [T, V] of the student's columns
    weights: Tensor  # [T] that the gradient was taken with
    bits: tuple[Tensor, Tensor]  # values and gradient as they came


def evaluate(
    setting: Setting,
    student: Tensor,
    teacher: Tensor,
    parts: Sequence[slice] = (slice(None),),
    leaf: Tensor | None = None,
    factor: float = 1.0,
) -> Got:
    """Forward and backward of all parts, gradients accumulated in `leaf` (the student itself).

    `factor`, a power of two, multiplies the loss before backward; the gradient is divided by it.
    """
    leaf = student if leaf is None else leaf
    weights = setting.inputs.weights
    values, sums = [], []
    for part in parts:
        out = setting.call(student, teacher, part)
        total, each = out if isinstance(out, tuple) else (out, None)
        if total.dim() == 1:  # the function's own [T]: every token gets a weight of its own
            each, total = total, (total * weights[part].to(total.dtype)).sum()
        elif total.dim() == 0:
            weights = torch.ones_like(weights)
        else:
            raise TypeError(f"returned a tensor of shape {list(total.shape)}; wanted [T] or []")
        if each is not None and each.shape != setting.inputs.mask[part].shape:
            raise TypeError(f"returned values of shape {list(each.shape)} for {len(each)} tokens")
        (total if factor == 1.0 else total * factor).backward()
        values.append(total.detach()[None] if each is None else each.detach())
        sums.append(each is None)
    grad = leaf.grad
    if grad is None:
        raise TypeError("left no gradient on the student's logits")
    got = torch.cat(values)
    whole = got.double().sum()[None] if any(sums) else got.double()
    return Got(whole, grad.double() / factor, weights, (got.clone(), grad.clone()))


def exact_of(case: Case, x: Inputs) -> Exact:
    """Returns what the case's function has to return, over the whole vocabulary."""
    student, teacher = bounds.softmax(x.student), bounds.softmax(x.teacher)
    if case.capability == "reverse_kl":
        return bounds.reverse_kl(student, teacher)
    if case.capability == "forward_kl":
        return bounds.forward_kl(student, teacher)
    if case.capability == "jsd":
        return bounds.jsd(student, teacher, case.beta)
    if case.capability == "nll":
        return bounds.nll(student, x.tokens)
    gate = x.signs * log_ratio(x) > 0
    lam = torch.where(gate, LAMBDAS[1], LAMBDAS[0]).double()[:, None]
    return bounds.reverse_kl(student, bounds.extrapolated(x.teacher, x.reference, lam))


def log_ratio(x: Inputs) -> Tensor:
    """T - S of the sampled tokens, [T]."""
    rows = x.teacher.log_softmax(-1) - x.student.log_softmax(-1)
    return rows.gather(-1, x.tokens[:, None])[:, 0]


def compare(setting: Setting, got: Got) -> list[Reading]:
    """Value and gradient against float64."""
    case, x = setting.case, setting.inputs
    dtype = getattr(torch, case.rows.dtype)
    exact = bounds.rounded_to(dtype, exact_of(case, x), got.weights, x.mask)
    values, values_bound = exact.values, exact.values_bound
    if got.values.shape != values.shape:  # a sum: every token's error, and the additions' own
        added = bounds.U32 * (1 + math.log2(case.rows.tokens)) * values.abs().sum()
        values, values_bound = values.sum()[None], values_bound.sum()[None] + added

    def own(whole: Tensor) -> Tensor:
        return expected_columns(whole, case.rows, setting.rank, setting.world)

    return [
        worst("value", got.values - values, values_bound),
        worst("gradient", got.gradient - own(exact.gradient), own(exact.gradient_bound)),
    ]


def worst(quantity: str, error: Tensor, bound: Tensor) -> Reading:
    """The element with the largest share of its bound; NaN is the largest of all."""
    if error.numel() == 0:
        return Reading(quantity, 0.0, 0.0)
    size = error.abs().flatten()
    share = torch.where(size == 0, 0.0, size / bound.flatten())
    share = torch.where(share.isnan(), math.inf, share)
    at = int(share.argmax())
    return Reading(quantity, float(size[at]), float(bound.flatten()[at]))


def different(quantity: str, one: Tensor, other: Tensor) -> Reading:
    """Counts elements that are not the same number; none may be."""
    return Reading(quantity, float((one != other).sum()), 0.0)


# -- the checks ------------------------------------------------------------------------------------


def check_exact(setting: Setting) -> list[Reading]:
    student, teacher = setting.shards()
    return compare(setting, evaluate(setting, student.requires_grad_(), teacher))


def check_splits(setting: Setting) -> list[Reading]:
    """The batch in parts of 7 tokens: losses add up, and so do gradients."""
    student, teacher = setting.shards()
    starts = range(0, setting.case.rows.tokens, CHUNKS)
    parts = [slice(i, i + CHUNKS) for i in starts]
    return compare(setting, evaluate(setting, student.requires_grad_(), teacher, parts))


def check_scaled(setting: Setting) -> list[Reading]:
    student, teacher = setting.shards()
    return compare(setting, evaluate(setting, student.requires_grad_(), teacher, factor=4.0))


def check_strided(setting: Setting) -> list[Reading]:
    """The student's rows lie column by column, the teacher's with a gap after every column."""
    student, teacher = setting.shards()
    leaf = student.T.contiguous().requires_grad_()
    apart = torch.stack([teacher, torch.full_like(teacher, 5e3)], -1)[..., 0]
    got = evaluate(setting, leaf.T, apart, leaf=leaf)
    return compare(setting, Got(got.values, got.gradient.T, got.weights, got.bits))


def check_repeat(setting: Setting) -> list[Reading]:
    runs = []
    for _ in range(2):
        student, teacher = setting.shards()
        runs.append(evaluate(setting, student.requires_grad_(), teacher).bits)
    return [
        different("values that differ", runs[0][0], runs[1][0]),
        different("gradients that differ", runs[0][1], runs[1][1]),
    ]


def check_ranks(setting: Setting) -> list[Reading]:
    """The ranks' values, bit for bit: what reads them on each rank must do the same on all."""
    student, teacher = setting.shards()
    values = evaluate(setting, student.requires_grad_(), teacher).bits[0]
    everywhere = [torch.empty_like(values) for _ in range(setting.world)]
    dist.all_gather(everywhere, values)
    return [different("values that differ from rank 0's", values, everywhere[0])]


def check_unchanged(setting: Setting) -> list[Reading]:
    student, teacher = setting.shards()
    before = student.clone(), teacher.clone()
    evaluate(setting, student.requires_grad_(), teacher)
    return [
        different("student's logits changed", student.detach(), before[0]),
        different("teacher's logits changed", teacher, before[1]),
    ]


def check_infinite(setting: Setting) -> list[Reading]:
    """An infinite divergence: a ValueError, or infinity itself in every such token's value."""
    student, teacher = setting.shards()
    try:
        values = evaluate(setting, student.requires_grad_(), teacher).values
    except ValueError:
        return [Reading("tokens not infinite", 0.0, 0.0)]
    wanted = setting.inputs.mask if len(values) > 1 else torch.ones(1, dtype=torch.bool)
    return [Reading("tokens not infinite", float((values[wanted] != math.inf).sum()), 0.0)]


def check_signs(setting: Setting) -> list[Reading]:
    """Near-certain tokens whose T - S gets the wrong sign, or whose gate the wrong side.

    Compared with the share that max + log sum in one fp32 number gets wrong on the same rows.
    """
    x = setting.inputs
    student, teacher = setting.shards()
    exact, merged = log_ratio(x), merged_log_ratio(x)
    if setting.case.capability == "nll":
        s, t = (values_per_token(setting, m.requires_grad_(), m) for m in (student, teacher))
        wrong = torch.sign(s - t) != torch.sign(exact)
        wrong_merged = torch.sign(merged) != torch.sign(exact)
    else:
        values = values_per_token(setting, student.requires_grad_(), teacher)
        wrong = gate_of(values, x) != (x.signs * exact > 0)
        wrong_merged = (x.signs * merged > 0) != (x.signs * exact > 0)
    allowed = SHARE_OF_MERGED * float(wrong_merged.double().mean())
    return [Reading("share of wrong signs", float(wrong.double().mean()), allowed)]


def values_per_token(setting: Setting, student: Tensor, teacher: Tensor) -> Tensor:
    values = evaluate(setting, student, teacher).values
    if len(values) != len(setting.inputs.mask):
        raise TypeError("returned a sum alone; the signs want a value per token")
    return values


def gate_of(values: Tensor, x: Inputs) -> Tensor:
    """Tells which lambda gave these values [T]: True where the nearer is the second."""
    student = bounds.softmax(x.student)
    low, high = (
        bounds.reverse_kl(student, bounds.extrapolated(x.teacher, x.reference, lam)).values
        for lam in LAMBDAS
    )
    return (values - high).abs() < (values - low).abs()


def merged_log_ratio(x: Inputs) -> Tensor:
    """T - S in fp32 from logits less one number, max + log sum."""
    at = x.tokens[:, None]
    s, t = (
        m.gather(-1, at)[:, 0] - m.logsumexp(-1) for m in (x.student.float(), x.teacher.float())
    )
    return t - s


CHECKS: dict[str, Callable[[Setting], list[Reading]]] = {
    "exact": check_exact,
    "splits": check_splits,
    "scaled": check_scaled,
    "strided": check_strided,
    "repeat": check_repeat,
    "ranks": check_ranks,
    "unchanged": check_unchanged,
    "infinite": check_infinite,
    "signs": check_signs,
}
