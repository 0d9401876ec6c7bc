"""The second pass of an objective as a Triton kernel: a row's gradient, over its logits.

The models are read once more, in the order of the columns, and each column is written where it was
read, or narrower into the same memory. Rows whose lambda is 1 do not read the reference.

Shapes: V columns of a row, in tiles of BLOCK.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_sgopd.vocab_parallel.triton_rows import (
    LOWEST,
    REVERSE,
    extrapolated,
    read,
    row_of,
    sampled_column,
    starts_of,
)


@triton.jit
def _gradient_tile(
    out: tl.tensor,
    out_step: tl.tensor,
    starts: tl.tuple,
    steps: tl.tuple,
    centres: tl.tuple,
    columns: tl.tensor,
    width: tl.tensor,
    factors: tl.tuple,
    token: tl.tensor,
    c: tl.tensor,
    SUMS: tl.constexpr,
    READ: tl.constexpr,
    NARROWS: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """The gradient of some columns, from the first READ models."""
    slope, bias, extra, moved, at_token = factors
    dx = read(starts[0], steps[0], columns, width, MASKED) - centres[0]
    e = tl.exp2(c * dx)
    grad = e * bias
    if READ > 1:
        dt = read(starts[1], steps[1], columns, width, MASKED) - centres[1]
        gap = 0.0
        if READ > 2:
            gap = dt - (read(starts[2], steps[2], columns, width, MASKED) - centres[2])
        if SUMS == REVERSE:
            d = dx - dt - extra * gap if READ > 2 else dx - dt
            grad = tl.where(e > 0.0, e * (slope * d + bias), 0.0)
        else:
            h = extrapolated(dt, gap, extra, True) if READ > 2 else dt
            grad += slope * tl.exp2(c * (h - moved))
    grad = tl.where(columns == token, grad - at_token, grad)
    if NARROWS:
        tl.debug_barrier()  # what this writes over must have been read by all threads
    grad = grad.to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + columns * out_step, grad, mask=columns < width)
    else:
        tl.store(out + columns * out_step, grad)


@triton.jit
def _gradient_row(
    out: tl.tensor,
    out_step: tl.tensor,
    starts: tl.tuple,
    steps: tl.tuple,
    centres: tl.tuple,
    width: tl.tensor,
    factors: tl.tuple,
    token: tl.tensor,
    c: tl.tensor,
    SUMS: tl.constexpr,
    READ: tl.constexpr,
    NARROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The gradient of a row, from the first READ of its models."""
    columns = tl.arange(0, BLOCK)
    if WIDE:
        columns = columns.to(tl.int64)
    whole = width // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        _gradient_tile(
            out, out_step, starts, steps, centres, start + columns, width, factors, token, c,
            SUMS, READ, NARROWS, False,
        )  # fmt: skip
    if whole < width:
        _gradient_tile(
            out, out_step, starts, steps, centres, whole + columns, width, factors, token, c,
            SUMS, READ, NARROWS, True,
        )  # fmt: skip


@triton.jit
def _centre(maximum: tl.tensor) -> tl.tensor:
    return tl.maximum(tl.load(maximum), LOWEST)


@triton.jit(do_not_specialize=["first"])
def gradient_kernel(
    out: tl.tensor,
    out_stride: tl.tensor,
    out_step: tl.tensor,
    models: tl.tuple,
    strides: tl.tuple,  # between rows
    steps: tl.tuple,  # between columns
    place: tl.tensor,  # [n] int64
    first: tl.tensor,
    tokens: tl.tensor,  # [n]
    owned: tl.tensor,  # [n]
    maxima: tl.tuple,  # [n] each, of the models
    factors: tl.tuple,  # [n] each: slope, bias, lambda - 1, target's maximum, amount at the token
    width: tl.tensor,
    c: tl.tensor,
    HAS_PLACE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    SUMS: tl.constexpr,
    NARROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """e_x (slope d + bias) with d = x - t - (lambda - 1) (t - r), or e_x bias + e_h slope."""
    i = tl.program_id(0)
    row = row_of(place, first, i, HAS_PLACE)
    starts = starts_of(models, strides, row)
    out += row * out_stride
    centres = (_centre(maxima[0] + i), _centre(maxima[1] + i), _centre(maxima[2] + i))
    token = sampled_column(tokens, owned, i)
    slope, bias, extra = tl.load(factors[0] + i), tl.load(factors[1] + i), tl.load(factors[2] + i)
    values = (slope, bias, extra, tl.load(factors[3] + i), tl.load(factors[4] + i))
    if SUMS == 0 or slope == 0.0:
        _gradient_row(
            out, out_step, starts, steps, centres, width, values, token, c,
            SUMS, 1, NARROWS, WIDE, BLOCK,
        )  # fmt: skip
    elif HAS_REFERENCE and extra != 0.0:
        _gradient_row(
            out, out_step, starts, steps, centres, width, values, token, c,
            SUMS, 3, NARROWS, WIDE, BLOCK,
        )  # fmt: skip
    else:
        _gradient_row(
            out, out_step, starts, steps, centres, width, values, token, c,
            SUMS, 2, NARROWS, WIDE, BLOCK,
        )  # fmt: skip
