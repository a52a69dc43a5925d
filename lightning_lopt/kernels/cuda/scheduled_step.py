"""Device code of the `scheduled` kernel; `scheduled.py` launches it and `rules.scheduled` defines what it computes.

`sums` and `update` both compute the new moments from the same numbers: storing them in between would cost as much
memory traffic. Only `update` writes parameters and state, so a skipped step leaves all as it was. Of a hidden matrix it
writes the moments, and the direction of the step; `matrices.py` moves the parameter.

Sums are taken in a fixed order and nothing is added atomically, so two runs are equal to the bit.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from lightning_lopt.kernels.cuda import arithmetic as tm
from lightning_lopt.kernels.cuda import columns as c

ROWS_AT_ONCE, FAN_IN_AT_ONCE = tl.constexpr(4), tl.constexpr(1024)  # of a program of `row_means`
# Directions are multiplied by this before they are squared: float32 loses squares of what is below 1e-19.
MAGNIFIED = tl.constexpr(2.0**20)


# --- launch 1, where the rule centers: what centering takes from each row of a gradient


@triton.jit
def row_means(blocks, addresses, sizes, theta, run, row_means, GRADS: tl.constexpr):
    """A block of rows per program: the part of their mean that `rules.scheduled.centered` removes."""
    block = blocks + tl.program_id(0) * 2
    tensor, row = tl.load(block).to(tl.int64), tl.load(block + 1).to(tl.int64) + tl.arange(0, ROWS_AT_ONCE)
    rows, fan_in = c.size_of(sizes, tensor, c.ROWS), c.size_of(sizes, tensor, c.FAN_IN)
    stride, dtype = c.size_of(sizes, tensor, c.STRIDE), c.size_of(sizes, tensor, c.GRAD_DTYPE)
    total = tl.zeros([ROWS_AT_ONCE, FAN_IN_AT_ONCE], tl.float32)
    for start in range(0, fan_in, FAN_IN_AT_ONCE):
        at = start + tl.arange(0, FAN_IN_AT_ONCE)
        # A row lies in memory as pieces of `stride` numbers, with those of the other rows in between.
        piece = (at * c.size_of(sizes, tensor, c.MAGIC)) >> c.size_of(sizes, tensor, c.SHIFT)
        offsets = (row * stride)[:, None] + (piece * (stride * rows) + (at - piece * stride))[None, :]
        mask = (row < rows)[:, None] & (at < fan_in)[None, :]
        total += tm.load(c.address_of(addresses, tensor, c.GRAD), offsets, mask, dtype, GRADS, 2)
    fraction = c.progress(c.step_of(addresses, tensor), tl.load(run + c.NUM_STEPS))
    mean = c.ramp(theta + c.CENTERING, fraction) * tl.sum(total, 1) / fan_in.to(tl.float32)
    tl.store(row_means + c.size_of(sizes, tensor, c.FIRST_ROW) + row, mean, mask=row < rows)


# --- launch 2: mean squares of each tensor, tile by tile


@triton.jit
def _gradient(
    tile, tensor, lanes, offsets, mask, tables, GRADS: tl.constexpr, CENTER: tl.constexpr, ALIGN: tl.constexpr
):
    tiles, addresses, sizes, numbers, theta, row_means = tables
    code = c.size_of(sizes, tensor, c.GRAD_DTYPE)
    g = tm.load(c.address_of(addresses, tensor, c.GRAD), offsets, mask, code, GRADS, ALIGN)
    if CENTER:
        rows = c.size_of(sizes, tensor, c.ROWS)
        if rows > 0:
            # The table has the row of the tile's first number, and its place in the row. A multiplication and a shift
            # then stand for a division: a GPU takes some 70 instructions for one of 64 bits.
            place = c.tile_of(tiles, tile, c.PLACE).to(tl.int32) + lanes
            piece = (place.to(tl.int64) * c.size_of(sizes, tensor, c.MAGIC)) >> c.size_of(sizes, tensor, c.SHIFT)
            row = c.tile_of(tiles, tile, c.ROW).to(tl.int32) + piece.to(tl.int32)
            # Rows come round again where a row is more than what is adjacent in memory.
            if c.size_of(sizes, tensor, c.FAN_IN) > c.size_of(sizes, tensor, c.STRIDE):
                row = row % rows.to(tl.int32)
            mean = tl.load(row_means + c.size_of(sizes, tensor, c.FIRST_ROW) + row, mask=mask, other=0.0)
            g = tl.where(g == 0, g, g - mean)
    return g * tl.load(numbers + tensor * c.NUMBERS + c.SIGN)


@triton.jit
def _read(
    tile, tensor, strip, tables, PARAMS: tl.constexpr, GRADS: tl.constexpr, CENTER: tl.constexpr,
    SKIPS: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Of a strip: offsets and mask; gradient, parameter, new momenta, new second moment and its inverse root.

    MULTIPLE is 4 where four numbers can be read at a time, else 1. With SKIPS, parameters of hidden
    matrices are not read, and are 0.
    """
    tiles, addresses, sizes, numbers, theta, row_means = tables
    ALIGN: tl.constexpr = 16 if MULTIPLE == 4 else 2
    # These divisions change nothing, but tell the compiler that the mask and all addresses come in fours.
    numel = c.size_of(sizes, tensor, c.NUMEL) // MULTIPLE * MULTIPLE
    start = c.tile_of(tiles, tile, c.START) // MULTIPLE * MULTIPLE
    end = c.tile_of(tiles, tile, c.END) // MULTIPLE * MULTIPLE
    lanes = strip * c.STRIP + tl.arange(0, c.STRIP)
    offsets = start + lanes
    mask = offsets < end
    p_end = end
    if SKIPS:  # hidden matrices move later
        p_end = tl.where(c.size_of(sizes, tensor, c.STEPS) < 0, end, 0)
    g = _gradient(tile, tensor, lanes, offsets, mask, tables, GRADS, CENTER, ALIGN)
    code = c.size_of(sizes, tensor, c.PARAM_DTYPE)
    p = tm.load(c.address_of(addresses, tensor, c.PARAM), offsets, offsets < p_end, code, PARAMS, ALIGN)
    first, second = c.address_of(addresses, tensor, c.EXP_AVG), c.address_of(addresses, tensor, c.EXP_AVG_SQ)
    # What a batch does not read of an embedding stays as it is.
    stays = (c.size_of(sizes, tensor, c.IS_TABLE) > 0) & (g == 0)
    m0, m1, m2, v = tm.new_moments(first, second, numel, offsets, mask, g, stays, theta + c.DECAYS, ALIGN)
    return offsets, mask, g, p, m0, m1, m2, v, tl.rsqrt(v + tl.load(theta + c.EPS)), stays


@triton.jit
def _sum_tile(
    tile, tensor, tables, tile_sums, PARAMS: tl.constexpr, GRADS: tl.constexpr, CENTER: tl.constexpr,
    SAFE: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    s0, s1 = tl.zeros([c.STRIP], tl.float32), tl.zeros([c.STRIP], tl.float32)
    s2, s3, seen = tl.zeros([c.STRIP], tl.float32), tl.zeros([c.STRIP], tl.float32), tl.zeros([c.STRIP], tl.float32)
    for strip in range(0, c.num_strips(tables[0], tile)):
        # Where masked, gradient, parameter and moments are 0, so squares are, too.
        _, _, _, p, m0, m1, m2, v, q, _ = _read(tile, tensor, strip, tables, PARAMS, GRADS, CENTER, False, MULTIPLE)
        s0 += p * p
        s1 += (m0 * q) * (m0 * q)
        s2 += (m1 * q) * (m1 * q)
        s3 += (m2 * q) * (m2 * q)
        seen += tl.where(v > 0, 1.0, 0.0)
        if SAFE:
            s3 += v * 0.0  # NaN where v is infinite, whose inverse root is 0
    to = tile_sums + tile * c.SUMS
    tl.store(to + c.P_SQUARES, tl.sum(s0, 0))
    tl.store(to + c.STRENGTHS, tl.sum(s1, 0))
    tl.store(to + c.STRENGTHS + 1, tl.sum(s2, 0))
    tl.store(to + c.STRENGTHS + 2, tl.sum(s3, 0))
    tl.store(to + c.SEEN, tl.sum(seen, 0))


@triton.jit
def sums(
    tiles, addresses, sizes, numbers, theta, row_means, tile_sums, PARAMS: tl.constexpr, GRADS: tl.constexpr,
    CENTER: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """A tile per program: sums of the squares that the scheduler reads (`rules.scheduler.scales`)."""
    tile, tables = tl.program_id(0).to(tl.int64), (tiles, addresses, sizes, numbers, theta, row_means)
    tensor = c.tile_of(tiles, tile, c.TENSOR)
    fours = c.come_in_fours(addresses, sizes, tensor)
    for FOURS in tl.static_range(2):
        if fours == FOURS:
            _sum_tile(tile, tensor, tables, tile_sums, PARAMS, GRADS, CENTER, SAFE, 1 + 3 * FOURS)


# --- launch 3 is in schedule.py
# --- launch 4, with the safeguard: a look at tensors without a proof; launch 5: parameters, state and counters


@triton.jit
def _update_tile(
    tile, tensor, tables, multipliers, verdicts, measured, directions, matrix_sums, PARAMS: tl.constexpr,
    GRADS: tl.constexpr, CENTER: tl.constexpr, MATRICES: tl.constexpr, CHECK: tl.constexpr, MEASURE: tl.constexpr,
    MULTIPLE: tl.constexpr,
):  # fmt: skip
    tiles, addresses, sizes, numbers, theta, row_means = tables
    ALIGN: tl.constexpr = 16 if MULTIPLE == 4 else 2
    number, multiplier = numbers + tensor * c.NUMBERS, multipliers + tensor * c.MULTIPLIERS
    code, numel = c.size_of(sizes, tensor, c.PARAM_DTYPE), c.size_of(sizes, tensor, c.NUMEL) // MULTIPLE * MULTIPLE
    first, second = c.address_of(addresses, tensor, c.EXP_AVG), c.address_of(addresses, tensor, c.EXP_AVG_SQ)
    is_matrix = (c.size_of(sizes, tensor, c.STEPS) >= 0) if MATRICES else MATRICES
    SKIPS: tl.constexpr = MATRICES and not CHECK
    steps = directions + c.size_of(sizes, tensor, c.STEPS) // MULTIPLE * MULTIPLE
    changes, nominals = tl.zeros([c.STRIP], tl.float32), tl.zeros([c.STRIP], tl.float32)
    for strip in range(0, c.num_strips(tiles, tile)):
        offsets, mask, g, p, m0, m1, m2, v, q, stays = _read(
            tile, tensor, strip, tables, PARAMS, GRADS, CENTER, SKIPS, MULTIPLE
        )
        weights = multiplier + c.WEIGHTS
        u = (tl.load(weights) * m0 + tl.load(weights + 1) * m1 + tl.load(weights + 2) * m2) * q
        u *= tl.where(u * g < 0, 1 - tl.load(multiplier + c.CAUTIOUS), 1.0)
        u = tl.where(
            (stays | is_matrix) if CHECK and MATRICES else stays, 0.0, u
        )  # a matrix's step is not known when it is looked at
        delta = -tl.load(multiplier + c.STEPSIZE) * u - tl.where(stays, 0.0, tl.load(multiplier + c.OWN_DECAY) * p)
        new = p + (delta * tl.load(number + c.SCALE) - tl.load(number + c.DECAY) * p)
        if CHECK:
            if is_matrix:  # but how large it can be
                new += tl.where(new < 0, -1.0, 1.0) * tl.load(multiplier + c.BOUND)
            kept = tm.rounded(new, code, PARAMS)
            wrong = tm.is_bad(kept) | tm.is_bad(m0) | tm.is_bad(m1) | tm.is_bad(m2) | tm.is_bad(v)
            tl.store(verdicts + tensor, c.SKIP, mask=tl.max((wrong & mask).to(tl.int32), 0) > 0)
        else:
            if is_matrix:
                tl.store(steps + offsets, u, mask=mask)
                changes += (MAGNIFIED * u) * (MAGNIFIED * u)
            else:
                tm.store(c.address_of(addresses, tensor, c.PARAM), offsets, new, mask, code, PARAMS, ALIGN)
                if MEASURE:
                    change = tl.where(mask, tm.rounded(new, code, PARAMS) - p, 0.0)
                    changes += change * change
                    nominals += tl.where(mask, delta * delta, 0.0)
            tm.store_moments(first, second, numel, offsets, mask, m0, m1, m2, v, ALIGN)
    if not CHECK:
        if is_matrix:
            tl.store(matrix_sums + tile * c.MATRIX_SUMS + c.DIRECTION, tl.sum(changes, 0))
        elif MEASURE:
            tl.store(measured + tile * c.MEASURED + c.CHANGE, tl.sum(changes, 0))
            tl.store(measured + tile * c.MEASURED + c.NOMINAL, tl.sum(nominals, 0))


@triton.jit
def update(
    tiles, addresses, sizes, numbers, theta, row_means, multipliers, verdicts, measured, directions, matrix_sums,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, CENTER: tl.constexpr, SAFE: tl.constexpr, MATRICES: tl.constexpr,
    CHECK: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """A tile per program: new parameters and state, and what is kept of a tensor with its first tile.

    With CHECK it only looks: it marks those tensors of verdict UNKNOWN whose new value or state is not finite.
    """
    tile, tables = tl.program_id(0).to(tl.int64), (tiles, addresses, sizes, numbers, theta, row_means)
    tensor = c.tile_of(tiles, tile, c.TENSOR)
    verdict = tl.load(verdicts + tensor) if SAFE else c.PROVEN + 0
    goes = (verdict == c.UNKNOWN) if CHECK else (verdict != c.SKIP)
    way = tl.where(goes, c.come_in_fours(addresses, sizes, tensor).to(tl.int32), 2)
    for FOURS in tl.static_range(2):
        if way == FOURS:
            _update_tile(
                tile, tensor, tables, multipliers, verdicts, measured, directions, matrix_sums, PARAMS, GRADS, CENTER,
                MATRICES, CHECK, MEASURE, 1 + 3 * FOURS,
            )  # fmt: skip
    if not CHECK:  # noqa: SIM102 -- decided when it is compiled
        if c.tile_of(tiles, tile, c.START) == 0:
            good = goes.to(tl.int32) if SAFE else 1
            tm.count(addresses + tensor * c.ADDRESSES + c.STEP, good, SAFE)
            first_square = c.address_of(addresses, tensor, c.FIRST_SQUARE).to(tl.pointer_type(tl.float32))
            tl.store(first_square, tl.load(multipliers + tensor * c.MULTIPLIERS + c.FIRST), mask=good > 0)
