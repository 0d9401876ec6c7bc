"""The first pass of an objective as a Triton kernel: a row's softmaxes and sums.

One program takes one row. Each of its lanes (a thread) goes through a share of the columns with a
maximum of its own, and sums about that; where the maximum rises, what was summed is moved along.
Lanes meet once, at the end of the row: no thread waits for another while memory is read, and every
model is read once.

Whatever is multiplied with an exponential of 0 counts 0: a column that all models exclude leaves
the softmax, and one that the target alone excludes makes the divergence infinite. Asking for it at
every product would cost a fifth of the instructions, of which there are nearly as many as memory
leaves time for; so only a row whose sums come out infinite or NaN is read again with care.

Shapes: V columns of a row; tiles [U, L, K], of which lane l of L reads K neighbouring columns U
times; C columns of statistics.
"""

# What a constexpr leaves out is never read.
# mypy: disable-error-code="possibly-undefined"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_sgopd.vocab_parallel.triton_rows import (
    FORWARD,
    INF,
    LOWEST,
    REVERSE,
    extrapolated,
    read,
    row_of,
    sampled_column,
    starts_of,
)

# -- statistics of lanes ---------------------------------------------------------------------------


@triton.jit
def _of_lanes(values: tl.tensor) -> tl.tensor:
    """[U, L, K] -> sums [L]."""
    return tl.sum(tl.sum(values, 2), 0)


@triton.jit
def _weighted(values: tl.tensor, e: tl.tensor, CAREFUL: tl.constexpr) -> tl.tensor:
    """Sums [L] of e * values."""
    if CAREFUL:
        values = tl.where(e > 0.0, values, 0.0)
    return _of_lanes(e * values)


@triton.jit
def _keep(sums: tl.tensor, kept: tl.tensor, CAREFUL: tl.constexpr) -> tl.tensor:
    """sums * kept; with care 0 where nothing is kept, even of an infinite sum."""
    if CAREFUL:
        sums = tl.where(kept == 0.0, 0.0, sums)
    return sums * kept


@triton.jit
def _advance(x: tl.tensor, maximum: tl.tensor, total: tl.tensor, c: tl.tensor) -> tl.tuple:
    """A softmax [L] with a tile more.

    Gives the new maximum, the factor of all that was summed about the old one, the tile about the
    new one, its exponentials, and the new total.
    """
    higher = tl.maximum(maximum, tl.max(tl.max(x, 2), 0))
    kept = tl.exp2(c * (maximum - higher))
    centred = x - higher[None, :, None]
    e = tl.exp2(c * centred)
    return higher, kept, centred, e, total * kept + _of_lanes(e)


@triton.jit
def _advance_target(
    target: tl.tuple,
    dt: tl.tensor,
    gap: tl.tensor,
    t_rise: tl.tensor,
    gap_rise: tl.tensor,
    dx: tl.tensor,
    x_rise: tl.tensor,
    extra: tl.tensor,
    c: tl.tensor,
    SUMS: tl.constexpr,
    CAREFUL: tl.constexpr,
) -> tl.tuple:
    """An extrapolated target [L] with a tile more; the zero of its logits rose with the centres."""
    maximum, total, cross = target
    h = extrapolated(dt, gap, extra, CAREFUL)
    maximum = tl.where(total > 0.0, maximum - (t_rise + extra * gap_rise), LOWEST)
    higher, kept, centred, e, summed = _advance(h, maximum, total, c)
    if SUMS == FORWARD:
        moved = cross + (x_rise - (higher - maximum)) * total
        cross = _keep(moved, kept, CAREFUL) + _weighted(centred - dx, e, CAREFUL)
    return higher, summed, cross


@triton.jit
def _advance_row(
    state: tl.tuple,
    starts: tl.tuple,
    steps: tl.tuple,
    columns: tl.tensor,
    width: tl.tensor,
    extra: tl.tuple,
    c: tl.tensor,
    HAS_TEACHER: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    TARGETS: tl.constexpr,
    SUMS: tl.constexpr,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
    U: tl.constexpr,
) -> tl.tuple:
    """The lanes' statistics with a tile more: (maximum, total, a sum) of each softmax."""
    student, teacher, reference, first, second = state
    x = _tile(starts[0], steps[0], columns, width, MASKED, U)
    if HAS_TEACHER:
        t = _tile(starts[1], steps[1], columns, width, MASKED, U)
    if HAS_REFERENCE:
        r = _tile(starts[2], steps[2], columns, width, MASKED, U)

    x_max, x_total, entropy = student
    higher, kept, dx, e, total = _advance(x, x_max, x_total, c)
    x_rise = higher - x_max
    entropy = _keep(entropy - x_rise * x_total, kept, CAREFUL) + _weighted(dx, e, CAREFUL)
    student = (higher, total, entropy)
    if HAS_TEACHER:
        t_max, t_total, t_sum = teacher
        higher, t_kept, dt, e_t, total = _advance(t, t_max, t_total, c)
        t_rise = higher - t_max
        if SUMS == REVERSE:
            moved = t_sum + (t_rise - x_rise) * x_total
            t_sum = _keep(moved, kept, CAREFUL) + _weighted(dx - dt, e, CAREFUL)
        if SUMS == FORWARD:
            moved = t_sum + (x_rise - t_rise) * t_total
            t_sum = _keep(moved, t_kept, CAREFUL) + _weighted(dt - dx, e_t, CAREFUL)
        teacher = (higher, total, t_sum)
    if HAS_REFERENCE:
        r_max, r_total, r_sum = reference
        higher, _, dr, _, total = _advance(r, r_max, r_total, c)
        if TARGETS > 0:
            gap, gap_rise = dt - dr, t_rise - (higher - r_max)
            if SUMS == REVERSE:
                moved = r_sum - gap_rise * x_total
                r_sum = _keep(moved, kept, CAREFUL) + _weighted(gap, e, CAREFUL)
            first = _advance_target(
                first, dt, gap, t_rise, gap_rise, dx, x_rise, extra[0], c, SUMS, CAREFUL
            )
            if TARGETS > 1:
                second = _advance_target(
                    second, dt, gap, t_rise, gap_rise, dx, x_rise, extra[1], c, SUMS, CAREFUL
                )
        reference = (higher, total, r_sum)
    return student, teacher, reference, first, second


@triton.jit
def _tile(
    start: tl.tensor,
    step: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    MASKED: tl.constexpr,
    U: tl.constexpr,
) -> tl.tensor:
    """[U, L, K], read as [U L, K]: so that a lane's columns are one thread's."""
    values = read(start, step, columns, width, MASKED)
    return tl.reshape(values, (U, values.shape[0] // U, values.shape[1]))


@triton.jit
def _advance_all(
    starts: tl.tuple,
    steps: tl.tuple,
    width: tl.tensor,
    extra: tl.tuple,
    c: tl.tensor,
    HAS_TEACHER: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    TARGETS: tl.constexpr,
    SUMS: tl.constexpr,
    CAREFUL: tl.constexpr,
    WIDE: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
) -> tl.tuple:
    """The lanes' statistics of the whole row."""
    zeros = tl.zeros([L], tl.float32)
    nothing = (tl.full([L], LOWEST, tl.float32), zeros, zeros)
    state = (nothing, nothing, nothing, nothing, nothing)
    columns = tl.arange(0, U * L)[:, None] * K + tl.arange(0, K)[None, :]
    if WIDE:
        columns = columns.to(tl.int64)
    # Only the last tile is masked: a mask whose edge is at no multiple of K makes reads narrow.
    whole = width // (U * L * K) * (U * L * K)
    for start in range(0, whole, U * L * K):
        state = _advance_row(
            state, starts, steps, start + columns, width, extra, c,
            HAS_TEACHER, HAS_REFERENCE, TARGETS, SUMS, False, CAREFUL, U,
        )  # fmt: skip
    if whole < width:
        state = _advance_row(
            state, starts, steps, whole + columns, width, extra, c,
            HAS_TEACHER, HAS_REFERENCE, TARGETS, SUMS, True, CAREFUL, U,
        )  # fmt: skip
    return state


# -- statistics of a row ---------------------------------------------------------------------------


@triton.jit
def _join(maximum: tl.tensor, total: tl.tensor, c: tl.tensor) -> tl.tuple:
    """Lanes [L] -> the row's maximum and total, each lane's weight, and how far it is below."""
    top = tl.max(maximum, 0)
    weight = tl.exp2(c * (maximum - top))
    return top, tl.sum(weight * total, 0), weight, maximum - top


@triton.jit
def _store_sum(
    out: tl.tensor, sums: tl.tensor, weight: tl.tensor, below: tl.tensor, total: tl.tensor
) -> None:
    """A row's sum about its own centres, from lanes' sums [L] about theirs."""
    tl.store(out, tl.sum(tl.where(weight == 0.0, 0.0, weight * (sums + below * total)), 0))


@triton.jit
def _store_softmax(out: tl.tensor, n: tl.tensor, maximum: tl.tensor, total: tl.tensor) -> None:
    tl.store(out, tl.where(total == 0.0, -INF, maximum))
    tl.store(out + n, total)


@triton.jit
def _store_model(
    out: tl.tensor,
    n: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    start: tl.tensor,
    step: tl.tensor,
    token: tl.tensor,
) -> None:
    """A softmax of the row with its sampled token's logit; -inf where another rank has that."""
    _store_softmax(out, n, maximum, total)
    logit = tl.load(start + token * step, mask=token >= 0, other=-INF)
    tl.store(out + 2 * n, logit.to(tl.float32))


@triton.jit
def _is_finite(state: tl.tuple, TARGETS: tl.constexpr, ENTROPY: tl.constexpr) -> tl.tensor:
    """False where a sum is infinite or NaN."""
    student, teacher, reference, first, second = state
    every = teacher[2] + reference[2] + first[2] + second[2]
    if TARGETS > 0:
        every += first[1] + second[1]
    if ENTROPY:
        every += student[2]
    return tl.max((every - every != 0.0).to(tl.int32), 0) == 0


@triton.jit(do_not_specialize=["first", "n"])
def statistics_kernel(
    out: tl.tensor,  # [C, n], in the order of softmax.Columns
    models: tl.tuple,
    strides: tl.tuple,  # between rows
    steps: tl.tuple,  # between columns
    place: tl.tensor,  # [n] int64
    first: tl.tensor,
    tokens: tl.tensor,  # [n]
    owned: tl.tensor,  # [n]
    extra: tl.tensor,  # [TARGETS, n], lambda - 1
    n: tl.tensor,
    width: tl.tensor,
    c: tl.tensor,  # log2(e) / temperature
    HAS_PLACE: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    TARGETS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUMS: tl.constexpr,
    SUM_AT: tl.constexpr,  # which of the sums are the teacher's and the targets'; -1: not wanted
    WIDE: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
) -> None:
    i = tl.program_id(0)
    starts = starts_of(models, strides, row_of(place, first, i, HAS_PLACE))
    extras = (0.0, 0.0)
    if TARGETS == 1:
        extras = (tl.load(extra + i), 0.0)
    if TARGETS == 2:
        extras = (tl.load(extra + i), tl.load(extra + n + i))
    state = _advance_all(
        starts, steps, width, extras, c,
        HAS_TEACHER, HAS_REFERENCE, TARGETS, SUMS, False, WIDE, U, L, K,
    )  # fmt: skip
    if not _is_finite(state, TARGETS, ENTROPY):
        state = _advance_all(
            starts, steps, width, extras, c,
            HAS_TEACHER, HAS_REFERENCE, TARGETS, SUMS, True, WIDE, U, L, K,
        )  # fmt: skip
    _store_row(
        out + i, n, state, starts, steps, sampled_column(tokens, owned, i), extras, c,
        HAS_TEACHER, HAS_REFERENCE, TARGETS, ENTROPY, SUMS, SUM_AT,
    )  # fmt: skip


@triton.jit
def _store_row(
    out: tl.tensor,
    n: tl.tensor,
    state: tl.tuple,
    starts: tl.tuple,
    steps: tl.tuple,
    token: tl.tensor,
    extra: tl.tuple,
    c: tl.tensor,
    HAS_TEACHER: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    TARGETS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUMS: tl.constexpr,
    SUM_AT: tl.constexpr,
) -> None:
    """The row's columns from its lanes' statistics."""
    student, teacher, reference, first, second = state
    TARGET: tl.constexpr = 3 * (1 + HAS_TEACHER + HAS_REFERENCE)
    SUM: tl.constexpr = TARGET + 2 * TARGETS + ENTROPY
    top, total, weight, below = _join(student[0], student[1], c)
    _store_model(out, n, top, total, starts[0], steps[0], token)
    if ENTROPY:
        _store_sum(out + (SUM - 1) * n, student[2], weight, below, student[1])
    if HAS_TEACHER:
        top, total, t_weight, t_below = _join(teacher[0], teacher[1], c)
        _store_model(out + 3 * n, n, top, total, starts[1], steps[1], token)
        if SUMS == REVERSE:
            _store_sum(out + SUM * n, teacher[2], weight, below - t_below, student[1])
        if SUMS == FORWARD and SUM_AT[0] >= 0:
            at = out + (SUM + SUM_AT[0]) * n
            _store_sum(at, teacher[2], t_weight, t_below - below, teacher[1])
    if HAS_REFERENCE:
        top, total, _, r_below = _join(reference[0], reference[1], c)
        _store_model(out + (TARGET - 3) * n, n, top, total, starts[2], steps[2], token)
    if TARGETS > 0:
        gap = t_below - r_below
        if SUMS == REVERSE:
            _store_sum(out + (SUM + 1) * n, reference[2], weight, gap, student[1])
        at = out + (SUM + SUM_AT[1]) * n
        zero = t_below + extra[0] * gap
        _store_target(out + TARGET * n, at, n, first, zero, below, c, SUMS)
        if TARGETS > 1:
            at = out + (SUM + SUM_AT[2]) * n
            zero = t_below + extra[1] * gap
            _store_target(out + (TARGET + 2) * n, at, n, second, zero, below, c, SUMS)


@triton.jit
def _store_target(
    out: tl.tensor,
    at: tl.tensor,
    n: tl.tensor,
    target: tl.tuple,
    zero: tl.tensor,
    below: tl.tensor,
    c: tl.tensor,
    SUMS: tl.constexpr,
) -> None:
    """A row's extrapolated target; `zero` [L] is where its lanes' h has its zero."""
    maximum, total, cross = target
    top, summed, weight, h_below = _join(tl.where(total > 0.0, maximum + zero, LOWEST), total, c)
    _store_softmax(out, n, top, summed)
    if SUMS == FORWARD:
        _store_sum(at, cross, weight, h_below - below, total)
