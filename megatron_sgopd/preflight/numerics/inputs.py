"""The rows of a case: drawn alike on all ranks, in float64, from the seed alone.

Shapes: T tokens, N vocabulary entries in all, V columns held by one rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_sgopd.preflight.numerics.cases import Rows

STUDENT_SCALE = 3.0  # standard deviation of the student's logits: an entropy near 3.5 nats at 512
PEAK = 200.0  # e^-200 is 0 in fp32: a log-prob made from a probability would be infinite
GARBAGE = (1e4, 2e4, 3e4)  # what student, teacher and reference hold in padding columns
TIE = 1e-3  # log-ratios of gated cases are at least this far from a tie, which rounding decides
BISECTIONS = 40  # of an interval of 100: to 1e-10


@dataclass(frozen=True)
class Inputs:
    """Full rows [T, N] in float64, with values that the case's dtype holds exactly."""

    student: Tensor
    teacher: Tensor
    reference: Tensor
    tokens: Tensor  # [T] ids of the sampled tokens
    mask: Tensor  # [T] bool
    weights: Tensor  # [T] what the suite multiplies the tokens' losses by
    signs: Tensor  # [T] +1 or -1: the verifier's side of the gate


@lru_cache(maxsize=64)
def draw(rows: Rows) -> Inputs:
    """The inputs of a case; those of the same rows are shared, and nobody writes to them."""
    g = torch.Generator().manual_seed(1000 + rows.seed)
    shape = (rows.tokens, rows.vocab)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    student = STUDENT_SCALE * normal(*shape)
    tokens = torch.randint(0, rows.vocab, (rows.tokens,), generator=g)
    teacher = student + _distance(student, normal(*shape), rows.kl)
    reference = teacher + 0.5 * normal(*shape)
    if rows.near_certain:
        student, teacher, reference = _near_certain(shape, tokens, g)
    for model, x in (("student", student), ("teacher", teacher)):
        if rows.peaked == model:
            x.scatter_(-1, tokens[:, None], x.amax(-1, keepdim=True) + PEAK)
        if rows.minus_inf in (model, "all"):
            x[:, 3::7] = -math.inf
            x[1::2, 4::7] = -math.inf
    if rows.minus_inf == "all":
        reference[student == -math.inf] = -math.inf
        tokens = torch.where(tokens % 7 < 3, tokens, 5)  # nobody samples what cannot come
    student[::2] += rows.shift
    teacher[::2] -= rows.shift
    dtype = getattr(torch, rows.dtype)
    student, teacher, reference = (x.to(dtype).double() for x in (student, teacher, reference))
    mask = torch.rand(rows.tokens, generator=g) >= rows.masked
    if rows.masked < 1:
        mask[0] = True
    weights = 0.5 + torch.rand(rows.tokens, generator=g, dtype=torch.float64)
    signs = torch.where(torch.rand(rows.tokens, generator=g) < 0.5, -1.0, 1.0)
    return Inputs(student, teacher, reference, tokens, mask, weights.float().double(), signs)


def _distance(student: Tensor, direction: Tensor, kl: float) -> Tensor:
    """A multiple of `direction` [T, N] for each row, so that KL(student || student + it) is `kl`.

    Along a line through the student the KL is convex with its minimum 0 there: bisection finds it.
    """
    if kl == 0:
        return torch.zeros_like(student)
    log_p = student.log_softmax(-1)
    low = torch.zeros(len(student), 1, dtype=student.dtype)
    high = torch.full_like(low, 100.0)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        log_q = (student + middle * direction).log_softmax(-1)
        reached = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True) > kl
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return (low + high) / 2 * direction


def _near_certain(
    shape: tuple[int, ...], tokens: Tensor, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose sampled token has logit 28 and all but about 1e-4 of the mass in both models.

    T - S is of the order of 1e-6 there. The reference is so far away that the two lambdas of a gate
    give losses that no rounding confuses.
    """
    student = 14.9 + torch.randn(*shape, generator=g, dtype=torch.float64)
    teacher = student + 0.2 * torch.randn(*shape, generator=g, dtype=torch.float64)
    reference = 14.9 + 3.0 * torch.randn(*shape, generator=g, dtype=torch.float64)
    for x in (student, teacher):
        x.scatter_(-1, tokens[:, None], 28.0)
    return student, teacher, reference


def local_columns(x: Tensor, rows: Rows, which: int, rank: int, world: int) -> Tensor:
    """This rank's columns [T, V] in the case's dtype; `which` model's garbage in the padding."""
    width, held = width_of(rows, world), rows.vocab
    padded = x.new_full((x.shape[0], width * world), GARBAGE[which])
    padded[:, :held] = x
    own = padded[:, rank * width : (rank + 1) * width]
    return own.to(getattr(torch, rows.dtype)).contiguous()


def width_of(rows: Rows, world: int) -> int:
    """V: columns of one rank, padding included."""
    if rows.empty_rank:
        return -(-rows.vocab // (world - 1))
    return -(-(rows.vocab + rows.padding) // world)


def expected_columns(x: Tensor, rows: Rows, rank: int, world: int) -> Tensor:
    """This rank's part [T, V] of a gradient over the vocabulary: 0 in the padding."""
    width = width_of(rows, world)
    padded = x.new_zeros(x.shape[0], width * world)
    padded[:, : rows.vocab] = x
    return padded[:, rank * width : (rank + 1) * width]
