"""Device code of STAR, phases B and C: everything that is computed for each number; `star.py` launches it.

Phases B and C both compute the new moments from the same numbers: storing them in between would cost as much memory
traffic. Only `update` writes parameters and state, so a skipped step leaves all as it was.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: RET505, SIM109 -- branches of a kernel are taken when it is compiled

from __future__ import annotations

import triton
import triton.language as tl

from lightning_lopt.kernels.cuda import arithmetic as tm
from lightning_lopt.kernels.cuda import star_factored as ts

# How a tile is read: as rows of a matrix; as rows that have several moments over y each, side by side (inner > 1); or
# without rows. MATRIX and SIDE_BY_SIDE read four numbers at a time, UNALIGNED reads either kind one by one.
MATRIX, SIDE_BY_SIDE, UNALIGNED, FLAT = (tl.constexpr(n) for n in range(4))
LANES, PER_LANE = tl.constexpr(256), tl.constexpr(4)  # of a strip


@triton.jit
def _strip(sizes, tensor, place, down, across, strip, WAY: tl.constexpr):
    """Offsets and mask of a strip, those of its entries in the vector of x, and those in the vector of y."""
    if WAY == FLAT:
        offsets, mask = ts.flat_strip(sizes, tensor, place, strip)
        return offsets, mask, offsets, mask, offsets, mask
    else:
        MULTIPLE: tl.constexpr = 1 if WAY == UNALIGNED else 4
        offsets, mask, at_x, in_x, c, at_y, in_y = ts.factored_strip(
            sizes, tensor, place, down, across, strip, MULTIPLE
        )
        at_y += ts.size(sizes, tensor, ts.ENTRY_Y)
        at_x += ts.size(sizes, tensor, ts.ENTRY_X)
        if WAY == MATRIX:
            return offsets, mask, at_x, in_x, at_y, in_y
        else:
            return offsets, mask, at_x + c, mask, at_y, in_y


@triton.jit
def _read(
    tensor, offsets, mask, addresses, sizes, sign, theta, PARAMS: tl.constexpr, GRADS: tl.constexpr,
    WAY: tl.constexpr,
):  # fmt: skip
    """Gradient, parameter, new momenta, new second moment and its inverse root."""
    ALIGN: tl.constexpr = 16 if (WAY == MATRIX or WAY == SIDE_BY_SIDE) else 2
    row, numel = addresses + tensor * ts.ADDRESSES, ts.size(sizes, tensor, ts.NUMEL)
    if WAY == MATRIX or WAY == SIDE_BY_SIDE:
        numel = numel // 4 * 4
    g = tm.load(tl.load(row + ts.GRAD), offsets, mask, ts.size(sizes, tensor, ts.GRAD_DTYPE), GRADS, ALIGN) * sign
    p = tm.load(tl.load(row + ts.PARAM), offsets, mask, ts.size(sizes, tensor, ts.PARAM_DTYPE), PARAMS, ALIGN)
    first, second = tl.load(row + ts.EXP_AVG), tl.load(row + ts.EXP_AVG_SQ)
    m0, m1, m2, v = tm.new_moments(first, second, numel, offsets, mask, g, theta + ts.DECAYS, ALIGN)
    return g, p, m0, m1, m2, v, tl.rsqrt(v + tl.load(theta + ts.SETTINGS + 7))


@triton.jit
def _flat_moment(k, tensor, offsets, mask, addresses, sizes, theta, g):
    """A flat tensor's moment at a factored decay, and where it is kept."""
    where = tl.load(addresses + tensor * ts.ADDRESSES + ts.AT_X).to(tl.pointer_type(tl.float32))
    at = where + k * ts.size(sizes, tensor, ts.NUMEL) + offsets
    return tm.average(tl.load(at, mask=mask, other=0.0), g * g + 1e-30, tl.load(theta + ts.DECAYS + 4 + k)), at


@triton.jit
def _factors(
    k, tensor, offsets, mask, at_x, in_x, at_y, in_y, addresses, sizes, theta, entries, num_entries, g,
    WAY: tl.constexpr,
):  # fmt: skip
    """What preconditions the gradient and the momenta, and a flat tensor's moment."""
    if WAY == FLAT:
        moment, _ = _flat_moment(k, tensor, offsets, mask, addresses, sizes, theta, g)
        # 1e-6 for the momenta and 1e-9 for the gradient: see rules.features.
        return tl.rsqrt(tl.maximum(moment + 1e-9, 1e-9, propagate_nan=tm.ALL)), tl.rsqrt(moment + 1e-6), moment
    else:
        x = tl.load(entries + k * num_entries + at_x, mask=in_x, other=0.0)
        y = tl.load(entries + k * num_entries + at_y, mask=in_y, other=0.0)
        return x * y, x * y, g


# --- phase B: mean squares of the channels, and from them the first layer with its normalizers


@triton.jit
def _add(total, x):
    """Add squares to sums, one sum per thread: four numbers of a strip are its own."""
    return total + tl.sum(tl.reshape(x * x, [LANES, PER_LANE]), 1)


@triton.jit
def _channel_sums(
    tile, tensor, place, down, across, addresses, sizes, sign, theta, entries, num_entries, tile_sums,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, SAFE: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    zero = tl.zeros([LANES], tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    s8, s9, s10, s11, s12, s13, s14, s15 = zero, zero, zero, zero, zero, zero, zero, zero
    d0, d1, d2, d3, d4, d5, poison = zero, zero, zero, zero, zero, zero, zero
    for strip in range(0, ts.num_strips(sizes, tensor, place, down)):
        offsets, mask, at_x, in_x, at_y, in_y = _strip(sizes, tensor, place, down, across, strip, WAY)
        g, p, m0, m1, m2, v, q = _read(tensor, offsets, mask, addresses, sizes, sign, theta, PARAMS, GRADS, WAY)
        q = tl.where(mask, q, 0.0)
        s0, s1, s2, s3, s4, s5 = _add(s0, g), _add(s1, p), _add(s2, m0), _add(s3, m1), _add(s4, m2), _add(s5, v)
        s6, s7, s8, s9 = _add(s6, m0 * q), _add(s7, m1 * q), _add(s8, m2 * q), _add(s9, q)
        of_g, of_m, moment0 = _factors(
            0, tensor, offsets, mask, at_x, in_x, at_y, in_y, addresses, sizes, theta, entries, num_entries, g, WAY
        )
        s10, s13 = _add(s10, g * of_g), _add(s13, m0 * of_m)
        of_g, of_m, moment1 = _factors(
            1, tensor, offsets, mask, at_x, in_x, at_y, in_y, addresses, sizes, theta, entries, num_entries, g, WAY
        )
        s11, s14 = _add(s11, g * of_g), _add(s14, m1 * of_m)
        of_g, of_m, moment2 = _factors(
            2, tensor, offsets, mask, at_x, in_x, at_y, in_y, addresses, sizes, theta, entries, num_entries, g, WAY
        )
        s12, s15 = _add(s12, g * of_g), _add(s15, m2 * of_m)
        finite = v + m0 + m1 + m2
        if WAY == FLAT:
            moment0, moment1 = tl.where(mask, moment0, 0.0), tl.where(mask, moment1, 0.0)
            moment2 = tl.where(mask, moment2, 0.0)
            d0, d1, d2 = _add(d0, moment0), _add(d1, moment1), _add(d2, moment2)
            d3 = _add(d3, tl.where(mask, tl.rsqrt(moment0 + 1e-8), 0.0))
            d4 = _add(d4, tl.where(mask, tl.rsqrt(moment1 + 1e-8), 0.0))
            d5 = _add(d5, tl.where(mask, tl.rsqrt(moment2 + 1e-8), 0.0))
            finite += moment0 + moment1 + moment2
        if SAFE:
            poison = _add(poison, finite * 0.0)  # 0, or NaN
    to = tile_sums + tile * ts.TILE_SUMS
    sums = (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, d0, d1, d2, d3, d4, d5, poison)
    for channel in tl.static_range(23):
        tl.store(to + channel, tl.sum(sums[channel], 0))


@triton.jit
def _way(tensor, addresses, sizes):
    way = UNALIGNED + 0
    if ts.size(sizes, tensor, ts.IS_FLAT) == 1:
        way = FLAT + 0
    elif ts.is_aligned(addresses, sizes, tensor):
        way = MATRIX + 0
        if ts.size(sizes, tensor, ts.INNER) > 1:
            way = SIDE_BY_SIDE + 0
    return way


@triton.jit(do_not_specialize=["num_entries"])
def channel_sums(
    tiles, addresses, sizes, numbers, theta, entries, num_entries, tile_sums,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """A tile per program: sums of the squares of the channels that every number has for itself."""
    tile = tl.program_id(0)
    tensor, place, down, across = ts.unpack_tile(tiles, tile)
    sign = tl.load(numbers + tensor * ts.NUMBERS + ts.SIGN)
    way = _way(tensor, addresses, sizes)
    for WAY in tl.static_range(4):
        if way == WAY:
            _channel_sums(
                tile, tensor, place, down, across, addresses, sizes, sign, theta, entries, num_entries,
                tile_sums, PARAMS, GRADS, SAFE, WAY,
            )  # fmt: skip


@triton.jit
def effective_weights(addresses, sizes, theta, tile_sums, effective, bad, SAFE: tl.constexpr):
    """A tensor per program: the first layer with the normalizers in its weights, and the time features in its bias."""
    tensor = tl.program_id(0)
    channel, unit, row = tl.arange(0, ts.TILE_SUMS), tl.arange(0, 4), tl.arange(0, 16)
    total = tl.zeros([ts.TILE_SUMS], tl.float32)
    first, number = ts.size(sizes, tensor, ts.FIRST_TILE), ts.size(sizes, tensor, ts.TILES)
    for start in range(0, number, 32):
        tile = start + tl.arange(0, 32)
        at = tile_sums + ((first + tile) * ts.TILE_SUMS)[:, None] + channel[None, :]
        total += tl.sum(tl.load(at, mask=(tile < number)[:, None], other=0.0), 0)
    if SAFE:
        poison = tl.sum(tl.where(channel == ts.POISON, total, 0.0), 0)
        tl.store(bad + tensor, 1, mask=poison != 0)
    mean = total / ts.size(sizes, tensor, ts.NUMEL).to(tl.float32)
    scale = tl.rsqrt(1e-5 + mean)
    weights = tl.load(theta + ts.FIRST + channel[:, None] * 4 + unit[None, :]) * scale[:, None]
    to = effective + tensor * ts.EFFECTIVE
    tl.store(to + channel[:, None] * 4 + unit[None, :], weights, mask=(channel < ts.POISON)[:, None])
    step = tl.load(tl.load(addresses + tensor * ts.ADDRESSES + ts.STEP).to(tl.pointer_type(tl.float32)))
    x = step / tl.load(theta + ts.TIMESCALES + row) - 1
    time = 1 - 2 / (tl.exp(2 * x) + 1)  # tanh
    of_time = tl.load(theta + ts.TIME + row[:, None] * 4 + unit[None, :]) * time[:, None]
    tl.store(to + ts.BIAS + unit, tl.load(theta + ts.B0 + unit) + tl.sum(of_time, 0))


# --- phase C: network and update


@triton.jit
def _hidden(weights, bias, h0, h1, h2, h3):
    """A layer of four units: relu, weights (4, 4), bias."""
    h0, h1 = tl.maximum(h0, 0.0, propagate_nan=tm.ALL), tl.maximum(h1, 0.0, propagate_nan=tm.ALL)
    h2, h3 = tl.maximum(h2, 0.0, propagate_nan=tm.ALL), tl.maximum(h3, 0.0, propagate_nan=tm.ALL)
    n0, n1, n2, n3 = tl.load(bias), tl.load(bias + 1), tl.load(bias + 2), tl.load(bias + 3)
    n0, n1, n2, n3 = ts.mix(weights, 0, h0, n0, n1, n2, n3)
    n0, n1, n2, n3 = ts.mix(weights, 1, h1, n0, n1, n2, n3)
    n0, n1, n2, n3 = ts.mix(weights, 2, h2, n0, n1, n2, n3)
    return ts.mix(weights, 3, h3, n0, n1, n2, n3)


@triton.jit
def _heads(
    tensor, offsets, mask, at_x, in_x, at_y, in_y, g, p, m0, m1, m2, v, q, addresses, sizes, theta, entries,
    num_entries, effective, WAY: tl.constexpr,
):  # fmt: skip
    """The network's outputs: direction, and the magnitudes of blackbox, nominal term and decay."""
    first = effective + tensor * ts.EFFECTIVE
    bias = first + ts.BIAS
    h0, h1, h2, h3 = tl.load(bias), tl.load(bias + 1), tl.load(bias + 2), tl.load(bias + 3)
    if WAY != FLAT:
        x, y = entries + 3 * num_entries + at_x, entries + 3 * num_entries + at_y
        h0 += tl.load(x, mask=in_x, other=0.0) + tl.load(y, mask=in_y, other=0.0)
        h1 += tl.load(x + num_entries, mask=in_x, other=0.0) + tl.load(y + num_entries, mask=in_y, other=0.0)
        x, y = x + 2 * num_entries, y + 2 * num_entries
        h2 += tl.load(x, mask=in_x, other=0.0) + tl.load(y, mask=in_y, other=0.0)
        h3 += tl.load(x + num_entries, mask=in_x, other=0.0) + tl.load(y + num_entries, mask=in_y, other=0.0)
    h0, h1, h2, h3 = ts.mix(first, 0, g, h0, h1, h2, h3)
    h0, h1, h2, h3 = ts.mix(first, 1, p, h0, h1, h2, h3)
    h0, h1, h2, h3 = ts.mix(first, 5, v, h0, h1, h2, h3)
    h0, h1, h2, h3 = ts.mix(first, 9, q, h0, h1, h2, h3)
    for k in tl.static_range(3):
        m = m0 if k == 0 else (m1 if k == 1 else m2)
        of_g, of_m, moment = _factors(
            k, tensor, offsets, mask, at_x, in_x, at_y, in_y, addresses, sizes, theta, entries, num_entries, g, WAY
        )
        h0, h1, h2, h3 = ts.mix(first, 2 + k, m, h0, h1, h2, h3)
        h0, h1, h2, h3 = ts.mix(first, 6 + k, m * q, h0, h1, h2, h3)
        h0, h1, h2, h3 = ts.mix(first, 10 + k, g * of_g, h0, h1, h2, h3)
        h0, h1, h2, h3 = ts.mix(first, 13 + k, m * of_m, h0, h1, h2, h3)
        if WAY == FLAT:
            h0, h1, h2, h3 = ts.mix(first, 16 + k, moment, h0, h1, h2, h3)
            h0, h1, h2, h3 = ts.mix(first, 19 + k, tl.rsqrt(moment + 1e-8), h0, h1, h2, h3)
    h0, h1, h2, h3 = _hidden(theta + ts.W1, theta + ts.B1, h0, h1, h2, h3)
    return _hidden(theta + ts.W2, theta + ts.B2, h0, h1, h2, h3)


@triton.jit
def _terms(
    heads, g, p, m0, m1, m2, q, theta, BLACKBOX: tl.constexpr, NORMALIZE: tl.constexpr,
    ESTIMATOR: tl.constexpr, CONTROL: tl.constexpr, SHRINK: tl.constexpr,
):  # fmt: skip
    """The three terms of the step: rules.star.STAR._terms."""
    settings = theta + ts.SETTINGS
    blackbox, nominal, decay = g * 0.0, g * 0.0, g * 0.0
    if BLACKBOX:
        step = tl.load(settings) * heads[0] * tl.exp(tl.load(settings + 1) * heads[1])
        blackbox = -(step * q if NORMALIZE else step)
    if ESTIMATOR:
        control = tl.exp(tl.load(settings + 2) * heads[2]) if CONTROL else tl.load(settings + 6)
        nominal = -tl.load(settings + 4) * control * tm.direction(ESTIMATOR, g, m0, m1, m2, q)
    if SHRINK:
        rate = tl.load(settings + 5)
        decay = -(rate * tl.exp(tl.load(settings + 3) * heads[3]) if SHRINK == 2 else rate) * p
    return blackbox, nominal, decay


@triton.jit
def _write_state(tensor, offsets, mask, g, m0, m1, m2, v, addresses, sizes, theta, WAY: tl.constexpr):
    ALIGN: tl.constexpr = 16 if (WAY == MATRIX or WAY == SIDE_BY_SIDE) else 2
    row, numel = addresses + tensor * ts.ADDRESSES, ts.size(sizes, tensor, ts.NUMEL)
    if WAY == MATRIX or WAY == SIDE_BY_SIDE:
        numel = numel // 4 * 4
    first, second = tl.load(row + ts.EXP_AVG), tl.load(row + ts.EXP_AVG_SQ)
    tm.store_moments(first, second, numel, offsets, mask, m0, m1, m2, v, ALIGN)
    if WAY == FLAT:
        for k in tl.static_range(3):
            moment, at = _flat_moment(k, tensor, offsets, mask, addresses, sizes, theta, g)
            tl.store(at, moment, mask=mask)


@triton.jit
def _update_tile(
    tile, tensor, place, down, across, addresses, sizes, numbers, sign, theta, entries, num_entries, effective, bad,
    measured, PARAMS: tl.constexpr, GRADS: tl.constexpr, BLACKBOX: tl.constexpr,
    NORMALIZE: tl.constexpr, ESTIMATOR: tl.constexpr, CONTROL: tl.constexpr, SHRINK: tl.constexpr,
    NETWORK: tl.constexpr, CHECK: tl.constexpr, MEASURE: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    number = numbers + tensor * ts.NUMBERS
    dtype = ts.size(sizes, tensor, ts.PARAM_DTYPE)
    params = tl.load(addresses + tensor * ts.ADDRESSES + ts.PARAM)
    zero = tl.zeros([LANES], tl.float32)
    s0, s1, s2, s3 = zero, zero, zero, zero
    for strip in range(0, ts.num_strips(sizes, tensor, place, down)):
        offsets, mask, at_x, in_x, at_y, in_y = _strip(sizes, tensor, place, down, across, strip, WAY)
        g, p, m0, m1, m2, v, q = _read(tensor, offsets, mask, addresses, sizes, sign, theta, PARAMS, GRADS, WAY)
        heads = (g, g, g, g)
        if NETWORK:
            heads = _heads(
                tensor, offsets, mask, at_x, in_x, at_y, in_y, g, p, m0, m1, m2, v, q, addresses, sizes, theta,
                entries, num_entries, effective, WAY,
            )  # fmt: skip
        blackbox, nominal, decay = _terms(
            heads, g, p, m0, m1, m2, q, theta, BLACKBOX, NORMALIZE, ESTIMATOR, CONTROL, SHRINK
        )
        new = p + ((blackbox + nominal + decay) * tl.load(number + ts.SCALE) - tl.load(number + ts.DECAY) * p)
        if CHECK:
            wrong = tm.is_bad(tm.rounded(new, dtype, PARAMS)) & mask
            tl.store(bad + tensor, 1, mask=tl.max(tl.max(wrong.to(tl.int32), 1), 0) > 0)
        else:
            tm.store(params, offsets, new, mask, dtype, PARAMS, 16 if WAY < UNALIGNED else 2)
            _write_state(tensor, offsets, mask, g, m0, m1, m2, v, addresses, sizes, theta, WAY)
        if MEASURE:
            change = tl.where(mask, tm.rounded(new, dtype, PARAMS) - p, 0.0)
            s0, s1 = _add(s0, change), _add(s1, tl.where(mask, blackbox, 0.0))
            s2, s3 = _add(s2, tl.where(mask, nominal, 0.0)), _add(s3, decay)
    if MEASURE:
        to = measured + tile * ts.MEASURED
        tl.store(to, tl.sum(s0, 0))
        tl.store(to + 1, tl.sum(s1, 0))
        tl.store(to + 2, tl.sum(s2, 0))
        tl.store(to + 3, tl.sum(s3, 0))


@triton.jit
def _write_block(block, vectors, blocks, addresses, theta, means, IS_LINE: tl.constexpr):
    vector, offsets, mask, _ = ts.unpack_block(vectors, blocks, block, IS_LINE)
    mean = tl.load(means + tl.load(vector + ts.ENTRY) + offsets, mask=mask, other=0.0)
    for k in tl.static_range(3):
        moment, at = ts.new_moment(k, vector, offsets, mask, mean, addresses, theta)
        tl.store(at, moment, mask=mask)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "num_entries"])
def update(
    tiles, num_tiles, vectors, blocks, num_blocks, addresses, sizes, numbers, theta, means, entries, num_entries,
    effective, bad, measured, PARAMS: tl.constexpr, GRADS: tl.constexpr, BLACKBOX: tl.constexpr,
    NORMALIZE: tl.constexpr, ESTIMATOR: tl.constexpr, CONTROL: tl.constexpr, SHRINK: tl.constexpr,
    NETWORK: tl.constexpr, SAFE: tl.constexpr, CHECK: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """New parameters and state.

    The first programs take a tile each and write parameters, momenta and second moment; the next take a block of
    factored moments each; the last take a tensor each and write its counters. With CHECK only tensors whose new value
    would not be finite are marked.
    """
    program = tl.program_id(0)
    if program < num_tiles:
        tensor, place, down, across = ts.unpack_tile(tiles, program)
        sign = tl.load(numbers + tensor * ts.NUMBERS + ts.SIGN)
        way = _way(tensor, addresses, sizes)
        if SAFE:
            way = tl.where(tl.load(bad + tensor) == 0, way, FLAT + 1)
        for WAY in tl.static_range(4):
            if way == WAY:
                _update_tile(
                    program, tensor, place, down, across, addresses, sizes, numbers, sign, theta, entries,
                    num_entries, effective, bad, measured, PARAMS, GRADS, BLACKBOX, NORMALIZE, ESTIMATOR, CONTROL,
                    SHRINK, NETWORK, CHECK, MEASURE, WAY,
                )  # fmt: skip
    elif program < num_tiles + num_blocks:
        block = program - num_tiles
        line = ts.is_line(vectors, blocks, block)
        if SAFE:
            vector = vectors + tl.load(blocks + block * 4).to(tl.int64) * ts.VECTORS
            line = tl.where(tl.load(bad + tl.load(vector + ts.TENSOR)) == 0, line, 2)
        for IS_LINE in tl.static_range(2):
            if line == IS_LINE:
                _write_block(block, vectors, blocks, addresses, theta, means, IS_LINE)
    else:
        tensor = program - num_tiles - num_blocks
        good = (tl.load(bad + tensor) == 0).to(tl.int32) if SAFE else 1
        tm.count(addresses + tensor * ts.ADDRESSES + ts.STEP, good, SAFE)
