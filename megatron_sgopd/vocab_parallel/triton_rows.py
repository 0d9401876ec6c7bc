"""Rows of logits as the Triton kernels read them.

Models are tuples (student, teacher, reference); one that is absent repeats the student. Arithmetic
is fp32. A logit of -inf has the exponential 0.

Shapes: n tokens, V columns of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e38)  # a maximum of no column; finite, so that differences are no NaN
BEYOND = tl.constexpr(-3.0e38)  # a logit beyond the row's width; its exponential is always 0
INF = tl.constexpr(float("inf"))

# What the sums beside the softmaxes are, with e = exp((z - maximum of z) / temperature):
REVERSE = tl.constexpr(1)  # of e_x (x - t), and with extrapolated targets of e_x (t - r)
FORWARD = tl.constexpr(2)  # of e_h (h - x), for the teacher or extrapolated targets h


@triton.jit
def row_of(place: tl.tensor, first: tl.tensor, i: tl.tensor, HAS_PLACE: tl.constexpr) -> tl.tensor:
    """The i-th token's row, as int64: a matrix may have more than 2^31 elements."""
    if HAS_PLACE:
        row = tl.load(place + i)
    else:
        row = first + i
    return row.to(tl.int64)


@triton.jit
def starts_of(models: tl.tuple, strides: tl.tuple, row: tl.tensor) -> tl.tuple:
    """Tells where the models' rows start."""
    return (
        models[0] + row * strides[0],
        models[1] + row * strides[1],
        models[2] + row * strides[2],
    )


@triton.jit
def read(
    start: tl.tensor, step: tl.tensor, columns: tl.tensor, width: tl.tensor, MASKED: tl.constexpr
) -> tl.tensor:
    """Columns of a row in fp32."""
    if MASKED:
        values = tl.load(start + columns * step, mask=columns < width, other=BEYOND)
    else:
        values = tl.load(start + columns * step)
    return values.to(tl.float32)


@triton.jit
def sampled_column(tokens: tl.tensor, owned: tl.tensor, i: tl.tensor) -> tl.tensor:
    """The sampled token's column; -1 where another rank has it."""
    return tl.where(tl.load(owned + i), tl.load(tokens + i), -1).to(tl.int32)


@triton.jit
def extrapolated(
    dt: tl.tensor, gap: tl.tensor, extra: tl.tensor, CAREFUL: tl.constexpr
) -> tl.tensor:
    """t + (lambda - 1) (t - r); with care -inf where the teacher is, whatever the reference."""
    h = dt + extra * gap
    if CAREFUL:
        h = tl.where(dt == -INF, dt, h)
    return h
