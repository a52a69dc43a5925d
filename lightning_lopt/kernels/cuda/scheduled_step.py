"""Device code of the `scheduled` kernel; `scheduled.py` launches it and `rules.scheduled` defines what it computes.

Every tensor is seen flat, in the order of its memory, and cut into tiles of TILE numbers; a program loops over the
strips of one tile. `sums` and `update` both compute the new moments from the same numbers: storing them in between
would cost as much memory traffic. Only `update` writes parameters and state, so a skipped step leaves all as it was.

Sums are taken in a fixed order and nothing is added atomically, so two runs are equal to the bit.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import triton
import triton.language as tl

from lightning_lopt.kernels.cuda import arithmetic as tm
from lightning_lopt.rules import scheduler
from lightning_lopt.rules.scheduled import DOUBT


class Sizes(NamedTuple):
    """What the kernels know about a tensor's shape: a row of a table of int64."""

    numel: int
    tile: int  # its first tile
    tiles: int
    param_dtype: int  # codes as in `layout.DTYPES`
    grad_dtype: int
    rows: int  # length of the first dim, or 0 for vectors and scalars, which are not centered
    fan_in: int  # numbers of a row
    stride: int  # numbers of a row that are adjacent in memory
    magic: int  # n // stride is n * magic >> shift
    shift: int
    row: int  # its first row, counted through all tensors


# The packed meta-parameters, one after the other; `scheduled.pack` fills them. Curves are padded to KNOTS numbers.
KNOTS = tl.constexpr(16)
PACKED = {
    "decays": 4,  # of the momenta, and of the second moment
    "eps": 1,
    "nominal_stepsize": 1,
    "centering": 2,
    "caution": 2,
    "growth": 2,
    "momentum_mix": 6,
    "tensor_powers": 32,
    "fractions": KNOTS.value,
    "log_steps": KNOTS.value,
    "schedule_fraction": KNOTS.value,
    "schedule_length": KNOTS.value,
    "schedule_early": KNOTS.value,
    "schedule_step": KNOTS.value,
}
_PLACE = {name: tl.constexpr(place) for name, place in zip(PACKED, accumulate([0, *PACKED.values()]), strict=False)}
DECAYS, EPS, NOMINAL_STEPSIZE = (_PLACE[name] for name in ("decays", "eps", "nominal_stepsize"))
CENTERING, CAUTION, GROWTH = (_PLACE[name] for name in ("centering", "caution", "growth"))
MOMENTUM_MIX, TENSOR_POWERS = _PLACE["momentum_mix"], _PLACE["tensor_powers"]
FRACTIONS, LOG_STEPS = _PLACE["fractions"], _PLACE["log_steps"]
SCHEDULE_FRACTION, SCHEDULE_LENGTH = _PLACE["schedule_fraction"], _PLACE["schedule_length"]
SCHEDULE_EARLY, SCHEDULE_STEP = _PLACE["schedule_early"], _PLACE["schedule_step"]

# Columns of the other tables, a row per tensor; the last name of each line is the number of columns.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, STEP, SKIPPED, IN_ROW, ADDRESSES = (tl.constexpr(n) for n in range(8))
SIGN, SCALE, DECAY, NUMBERS = (tl.constexpr(n) for n in range(4))
IS_VECTOR, LOG_SIZE, LOG_FAN_IN, SHAPES = (tl.constexpr(n) for n in range(4))
STEPSIZE, WEIGHTS, CAUTIOUS, MULTIPLIERS = (tl.constexpr(n) for n in (0, 1, 4, 5))
_SIZE = {name: tl.constexpr(number) for number, name in enumerate(Sizes._fields)}
NUMEL, FIRST_TILE, TILES, ROWS, FAN_IN = (_SIZE[name] for name in ("numel", "tile", "tiles", "rows", "fan_in"))
PARAM_DTYPE, GRAD_DTYPE, STRIDE = (_SIZE[name] for name in ("param_dtype", "grad_dtype", "stride"))
MAGIC, SHIFT, FIRST_ROW, SIZES = _SIZE["magic"], _SIZE["shift"], _SIZE["row"], tl.constexpr(len(Sizes._fields))
NUM_STEPS, LOG_DEPTH = (tl.constexpr(n) for n in range(2))  # the run's two numbers
SUMS = tl.constexpr(4)  # of a tile: squares of the parameter, and of three momenta / sqrt(second moment)
MEASURED = tl.constexpr(2)  # of a tile: squares of the parameter's change, and of the nominal term

STRIP, STRIPS, TILE = (tl.constexpr(n) for n in (1024, 8, 8192))
ROWS_AT_ONCE, FAN_IN_AT_ONCE = tl.constexpr(4), tl.constexpr(1024)  # of a program of `row_means`
AT_ONCE = tl.constexpr(1024)  # tiles whose sums `schedule` adds up at a time

PROVEN, SKIP, UNKNOWN = (tl.constexpr(n) for n in range(3))  # verdicts of the safeguard on a tensor's step

LOG10 = tl.constexpr(2.302585092994046)
KNOWN_DOUBT, LARGEST_POWER = tl.constexpr(DOUBT), tl.constexpr(scheduler.LARGEST_POWER)
SHORTEST, LONGEST = (tl.constexpr(bound) for bound in scheduler.LOG_LENGTHS)
NUM_FRACTIONS, NUM_LOG_STEPS = (tl.constexpr(len(knots)) for knots in (scheduler.FRACTIONS, scheduler.LOG_STEPS))


@triton.jit
def _size(sizes, tensor, NAME: tl.constexpr):
    return tl.load(sizes + tensor * SIZES + NAME)


@triton.jit
def _address(addresses, tensor, NAME: tl.constexpr):
    return tl.load(addresses + tensor * ADDRESSES + NAME)


@triton.jit
def _step(addresses, tensor):
    """Updates of a tensor so far; kept as an integer, because float32 counts up to 2^24 only."""
    return tl.load(_address(addresses, tensor, STEP).to(tl.pointer_type(tl.int64))).to(tl.float32)


@triton.jit
def _come_in_fours(addresses, sizes, tensor):
    """Whether four numbers can be read at a time."""
    return tm.are_aligned(addresses + tensor * ADDRESSES) & (_size(sizes, tensor, NUMEL) % 4 == 0)


@triton.jit
def _progress(step, num_steps):
    """As `rules.scheduler.progress`; `num_steps` is 0 where the length is unknown."""
    return tl.where(num_steps > 0, tl.minimum(step / tl.maximum(num_steps - 1, 1), 1), 0.5)


@triton.jit
def _ramp(start, distance, fraction):
    """Between a number in memory and another one, so many places after it."""
    first = tl.load(start)
    return first + fraction * (tl.load(start + distance) - first)


# --- launch 1, where the rule centers: what centering takes from each row of a gradient


@triton.jit
def row_means(blocks, addresses, sizes, theta, run, row_means, GRADS: tl.constexpr):
    """A block of rows per program: the part of their mean that `rules.scheduled.centered` removes."""
    block = blocks + tl.program_id(0) * 2
    tensor, row = tl.load(block).to(tl.int64), tl.load(block + 1).to(tl.int64) + tl.arange(0, ROWS_AT_ONCE)
    rows, fan_in, stride = _size(sizes, tensor, ROWS), _size(sizes, tensor, FAN_IN), _size(sizes, tensor, STRIDE)
    total = tl.zeros([ROWS_AT_ONCE, FAN_IN_AT_ONCE], tl.float32)
    for start in range(0, fan_in, FAN_IN_AT_ONCE):
        at = start + tl.arange(0, FAN_IN_AT_ONCE)
        # A row lies in memory as pieces of `stride` numbers, with those of the other rows in between.
        piece = (at * _size(sizes, tensor, MAGIC)) >> _size(sizes, tensor, SHIFT)
        offsets = (row * stride)[:, None] + (piece * (stride * rows) + (at - piece * stride))[None, :]
        mask = (row < rows)[:, None] & (at < fan_in)[None, :]
        total += tm.load(
            _address(addresses, tensor, GRAD), offsets, mask, _size(sizes, tensor, GRAD_DTYPE), GRADS, 2
        )  # fmt: skip
    fraction = _progress(_step(addresses, tensor), tl.load(run + NUM_STEPS))
    centering = tm.clamp(_ramp(theta + CENTERING, 1, fraction), 0.0, 1.0)
    mean = centering * tl.sum(total, 1) / fan_in.to(tl.float32)
    tl.store(row_means + _size(sizes, tensor, FIRST_ROW) + row, mean, mask=row < rows)


# --- launch 2: mean squares of each tensor, tile by tile


@triton.jit
def _tile(tiles, tile):
    """The tile's tensor, and its number within the tensor."""
    return tl.load(tiles + tile * 4).to(tl.int64), tl.load(tiles + tile * 4 + 1).to(tl.int64)


@triton.jit
def _num_strips(sizes, tensor, place):
    left = _size(sizes, tensor, NUMEL) - place * TILE
    return tl.minimum((left + STRIP - 1) // STRIP, STRIPS).to(tl.int32)


@triton.jit
def _gradient(
    tile, tensor, lanes, offsets, mask, tables, GRADS: tl.constexpr, CENTER: tl.constexpr, ALIGN: tl.constexpr
):
    tiles, addresses, sizes, numbers, theta, row_means = tables
    g = tm.load(_address(addresses, tensor, GRAD), offsets, mask, _size(sizes, tensor, GRAD_DTYPE), GRADS, ALIGN)
    if CENTER:
        rows = _size(sizes, tensor, ROWS)
        if rows > 0:
            # The table has the row of the tile's first number, and its place in the row. A multiplication and a shift
            # then stand for a division: a GPU takes some 70 instructions for one of 64 bits.
            place = tl.load(tiles + tile * 4 + 3) + lanes
            piece = (place.to(tl.int64) * _size(sizes, tensor, MAGIC)) >> _size(sizes, tensor, SHIFT)
            row = tl.load(tiles + tile * 4 + 2) + piece.to(tl.int32)
            if _size(sizes, tensor, FAN_IN) > _size(sizes, tensor, STRIDE):  # rows come round again
                row = row % rows.to(tl.int32)
            mean = tl.load(row_means + _size(sizes, tensor, FIRST_ROW) + row, mask=mask, other=0.0)
            g = tl.where(g == 0, g, g - mean)
    return g * tl.load(numbers + tensor * NUMBERS + SIGN)


@triton.jit
def _read(
    tile, tensor, place, strip, tables, PARAMS: tl.constexpr, GRADS: tl.constexpr, CENTER: tl.constexpr,
    MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Of a strip: offsets and mask; gradient, parameter, new momenta, new second moment and its inverse root.

    MULTIPLE is 4 where four numbers can be read at a time, else 1.
    """
    tiles, addresses, sizes, numbers, theta, row_means = tables
    ALIGN: tl.constexpr = 16 if MULTIPLE == 4 else 2
    # This division changes nothing, but tells the compiler that the mask and all addresses come in fours.
    numel = _size(sizes, tensor, NUMEL) // MULTIPLE * MULTIPLE
    lanes = strip * STRIP + tl.arange(0, STRIP)
    offsets = place * TILE + lanes
    mask = offsets < numel
    g = _gradient(tile, tensor, lanes, offsets, mask, tables, GRADS, CENTER, ALIGN)
    code = _size(sizes, tensor, PARAM_DTYPE)
    p = tm.load(_address(addresses, tensor, PARAM), offsets, mask, code, PARAMS, ALIGN)
    first, second = _address(addresses, tensor, EXP_AVG), _address(addresses, tensor, EXP_AVG_SQ)
    m0, m1, m2, v = tm.new_moments(first, second, numel, offsets, mask, g, theta + DECAYS, ALIGN)
    return offsets, mask, g, p, m0, m1, m2, v, tl.rsqrt(v + tl.load(theta + EPS))


@triton.jit
def _sum_tile(
    tile, tensor, place, tables, tile_sums, PARAMS: tl.constexpr, GRADS: tl.constexpr, CENTER: tl.constexpr,
    SAFE: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    s0, s1 = tl.zeros([STRIP], tl.float32), tl.zeros([STRIP], tl.float32)
    s2, s3 = tl.zeros([STRIP], tl.float32), tl.zeros([STRIP], tl.float32)
    for strip in range(0, _num_strips(tables[2], tensor, place)):
        # Where masked, gradient, parameter and momenta are 0, so squares are, too.
        offsets, mask, g, p, m0, m1, m2, v, q = _read(
            tile, tensor, place, strip, tables, PARAMS, GRADS, CENTER, MULTIPLE
        )
        s0 += p * p
        s1 += (m0 * q) * (m0 * q)
        s2 += (m1 * q) * (m1 * q)
        s3 += (m2 * q) * (m2 * q)
        if SAFE:
            s3 += v * 0.0  # NaN where v is infinite, whose inverse root is 0
    to = tile_sums + tile * SUMS
    tl.store(to, tl.sum(s0, 0))
    tl.store(to + 1, tl.sum(s1, 0))
    tl.store(to + 2, tl.sum(s2, 0))
    tl.store(to + 3, tl.sum(s3, 0))


@triton.jit
def sums(
    tiles, addresses, sizes, numbers, theta, row_means, tile_sums, PARAMS: tl.constexpr, GRADS: tl.constexpr,
    CENTER: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """A tile per program: sums of the squares that the scheduler reads (`rules.scheduler.scales`)."""
    tile, tables = tl.program_id(0), (tiles, addresses, sizes, numbers, theta, row_means)
    tensor, place = _tile(tiles, tile)
    fours = _come_in_fours(addresses, sizes, tensor)
    for FOURS in tl.static_range(2):
        if fours == FOURS:
            _sum_tile(tile, tensor, place, tables, tile_sums, PARAMS, GRADS, CENTER, SAFE, 1 + 3 * FOURS)


# --- launch 3: the schedule of each tensor, and whether its step can be proven finite


@triton.jit
def _interpolate(x, knots, values, NUMBER: tl.constexpr):
    """As `rules.scheduler.interpolate`: the first value, and what each segment up to x adds to it."""
    i = tl.arange(0, KNOTS)
    mask = i < NUMBER - 1
    left, right = tl.load(knots + i, mask=mask, other=0.0), tl.load(knots + i + 1, mask=mask, other=1.0)
    low, high = tl.load(values + i, mask=mask, other=0.0), tl.load(values + i + 1, mask=mask, other=0.0)
    return tl.load(values) + tl.sum(tm.clamp((x - left) / (right - left), 0.0, 1.0) * (high - low), 0)


@triton.jit
def _log_factor(theta, step, num_steps, fraction):
    """As `rules.scheduler.log_factor`."""
    log_step = tl.log(step + 1) / LOG10
    if num_steps > 0:
        log_length = tm.clamp(tl.log(num_steps) / LOG10 - 3, SHORTEST, LONGEST)
        result = _interpolate(fraction, theta + FRACTIONS, theta + SCHEDULE_FRACTION, NUM_FRACTIONS)
        result += log_length * _interpolate(fraction, theta + FRACTIONS, theta + SCHEDULE_LENGTH, NUM_FRACTIONS)
        result += _interpolate(log_step, theta + LOG_STEPS, theta + SCHEDULE_EARLY, NUM_LOG_STEPS)
    else:
        result = _interpolate(log_step, theta + LOG_STEPS, theta + SCHEDULE_STEP, NUM_LOG_STEPS)
    return result


@triton.jit
def _noise_strength(theta, step):
    """As `rules.scheduled.noise_strength`. In float64, since there is no expm1 here: early on, decays^n is near 1."""
    number = step.to(tl.float64) + 1
    momentum, second = tl.load(theta + DECAYS + 2).to(tl.float64), tl.load(theta + DECAYS + 3).to(tl.float64)
    of_momentum = tl.log((1 - momentum) / (1 + momentum)) + tl.log(1 - tl.exp(2 * number * tl.log(tl.abs(momentum))))
    return (of_momentum - tl.log(1 - tl.exp(number * tl.log(second)))).to(tl.float32)


@triton.jit
def _growth(theta, square, slowest, shape, step, fraction):
    """What growth adds to a matrix's log factor, as in `rules.scheduled.multipliers`."""
    fan_in = LOG10 * (tl.load(shape + LOG_FAN_IN) + 1.5)
    grown = tl.maximum((tl.log(tl.maximum(square, 1e-30, propagate_nan=tm.ALL)) + fan_in) / 2, 0, propagate_nan=tm.ALL)
    signal = tl.log(tl.maximum(slowest, 1e-12, propagate_nan=tm.ALL)) - _noise_strength(theta, step)
    noisy = tm.clamp(2 - tl.abs(signal) / KNOWN_DOUBT, 0.0, 1.0)
    return _ramp(theta + GROWTH, 1, fraction) * (grown * noisy)


@triton.jit
def _exponent(theta, shape, fraction, FEATURE: tl.constexpr):
    """How strongly the log factor follows a feature of the tensor; vectors have exponents of their own."""
    at = theta + TENSOR_POWERS + tl.where(tl.load(shape + IS_VECTOR) > 0, 0, 16) + FEATURE
    return _ramp(at, 8, fraction)


@triton.jit
def _strength(square):
    return tl.log(tl.maximum(square, 1e-6, propagate_nan=tm.ALL)) / 4 + 1


@triton.jit
def _log_power(theta, square, strength0, strength1, strength2, shape, log_depth, step, fraction):
    """The tensor's own log factor: a power law in `rules.scheduler.tensor_features`, and growth."""
    scale = tl.log(tl.maximum(square, 1e-4, propagate_nan=tm.ALL) / 1e-2) / 4
    power = _exponent(theta, shape, fraction, 0) + _exponent(theta, shape, fraction, 1) * scale
    power += _exponent(theta, shape, fraction, 2) * tl.load(shape + LOG_SIZE)
    power += _exponent(theta, shape, fraction, 3) * tl.load(shape + LOG_FAN_IN)
    power += _exponent(theta, shape, fraction, 4) * log_depth
    power += _exponent(theta, shape, fraction, 5) * _strength(strength0)
    power += _exponent(theta, shape, fraction, 6) * _strength(strength1)
    power += _exponent(theta, shape, fraction, 7) * _strength(strength2)
    if tl.load(shape + IS_VECTOR) == 0:
        power += _growth(theta, square, strength2, shape, step, fraction)
    return tm.clamp(power, -LARGEST_POWER, LARGEST_POWER)


@triton.jit
def _momentum_weights(theta, fraction):
    """The softmax of three logits."""
    mix = theta + MOMENTUM_MIX
    x0, x1, x2 = _ramp(mix, 3, fraction), _ramp(mix + 1, 3, fraction), _ramp(mix + 2, 3, fraction)
    largest = tl.maximum(tl.maximum(x0, x1), x2)
    w0, w1, w2 = tl.exp(x0 - largest), tl.exp(x1 - largest), tl.exp(x2 - largest)
    total = w0 + w1 + w2
    return w0 / total, w1 / total, w2 / total


@triton.jit
def _fold(tile_sums, sizes, tensor, NUMBER: tl.constexpr):
    """Total and largest of one of the sums over a tensor's tiles."""
    first, number = _size(sizes, tensor, FIRST_TILE), _size(sizes, tensor, TILES)
    total, largest = tl.zeros([AT_ONCE], tl.float32), tl.zeros([AT_ONCE], tl.float32)
    for start in range(0, number, AT_ONCE):
        tile = start + tl.arange(0, AT_ONCE)
        x = tl.load(tile_sums + (first + tile) * SUMS + NUMBER, mask=tile < number, other=0.0)
        total += x
        largest = tl.maximum(largest, x)
    return tl.sum(total, 0), tl.max(largest, 0)


@triton.jit
def _bound(largest):
    """No number is larger in size than this, of a tensor whose tiles have such sums of squares at most."""
    return 1.01 * tl.sqrt(largest) + 1e-22  # squares of what is smaller are lost


@triton.jit
def schedule(
    addresses, sizes, shapes, numbers, run, theta, tile_sums, multipliers, verdicts, SAFE: tl.constexpr
):  # fmt: skip
    """A tensor per program: its step size, the weights of its momenta, its caution; and the safeguard's verdict.

    The step is finite if the sums are, since they carry NaN and infinity in gradient and state, and if the new value
    stays within its dtype: no number is larger than the root of its tile's sum of squares. Where this proves nothing,
    the verdict is UNKNOWN, and the next launch looks at the numbers themselves.
    """
    tensor = tl.program_id(0).to(tl.int64)
    shape, number = shapes + tensor * SHAPES, numbers + tensor * NUMBERS
    p_total, p_largest = _fold(tile_sums, sizes, tensor, 0)
    total0, largest0 = _fold(tile_sums, sizes, tensor, 1)
    total1, largest1 = _fold(tile_sums, sizes, tensor, 2)
    total2, largest2 = _fold(tile_sums, sizes, tensor, 3)
    numel, step = _size(sizes, tensor, NUMEL).to(tl.float32), _step(addresses, tensor)
    num_steps, log_depth = tl.load(run + NUM_STEPS), tl.load(run + LOG_DEPTH)
    fraction = _progress(step, num_steps)
    power = _log_power(
        theta, p_total / numel, total0 / numel, total1 / numel, total2 / numel, shape, log_depth, step, fraction
    )  # fmt: skip
    stepsize = tl.exp(_log_factor(theta, step, num_steps, fraction) + power) * tl.load(theta + NOMINAL_STEPSIZE)
    w0, w1, w2 = _momentum_weights(theta, fraction)
    to = multipliers + tensor * MULTIPLIERS
    tl.store(to + STEPSIZE, stepsize)
    tl.store(to + WEIGHTS, w0)
    tl.store(to + WEIGHTS + 1, w1)
    tl.store(to + WEIGHTS + 2, w2)
    tl.store(to + CAUTIOUS, tm.clamp(_ramp(theta + CAUTION, 1, fraction), 0.0, 1.0))
    if SAFE:
        p = _bound(p_largest)
        change = stepsize * (w0 * _bound(largest0) + w1 * _bound(largest1) + w2 * _bound(largest2))
        new = p + tl.abs(tl.load(number + SCALE)) * change + tl.abs(tl.load(number + DECAY)) * p
        limit = tl.where(_size(sizes, tensor, PARAM_DTYPE) == 2, 6e4, 1e38)  # float16, or a range of 3.4e38
        finite = tm.is_bad(p_total + total0 + total1 + total2) == 0  # on a GPU, maxima drop NaN
        tl.store(verdicts + tensor, tl.where(finite & (1.01 * new < limit), PROVEN, UNKNOWN))


# --- launch 4, with the safeguard: a look at tensors without a proof; launch 5: parameters, state and counters


@triton.jit
def _update_tile(
    tile, tensor, place, tables, multipliers, verdicts, measured, PARAMS: tl.constexpr, GRADS: tl.constexpr,
    CENTER: tl.constexpr, CHECK: tl.constexpr, MEASURE: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    tiles, addresses, sizes, numbers, theta, row_means = tables
    ALIGN: tl.constexpr = 16 if MULTIPLE == 4 else 2
    number, multiplier = numbers + tensor * NUMBERS, multipliers + tensor * MULTIPLIERS
    code, numel = _size(sizes, tensor, PARAM_DTYPE), _size(sizes, tensor, NUMEL) // MULTIPLE * MULTIPLE
    first, second = _address(addresses, tensor, EXP_AVG), _address(addresses, tensor, EXP_AVG_SQ)
    changes, nominals = tl.zeros([STRIP], tl.float32), tl.zeros([STRIP], tl.float32)
    for strip in range(0, _num_strips(sizes, tensor, place)):
        offsets, mask, g, p, m0, m1, m2, v, q = _read(
            tile, tensor, place, strip, tables, PARAMS, GRADS, CENTER, MULTIPLE
        )
        weights = multiplier + WEIGHTS
        u = (tl.load(weights) * m0 + tl.load(weights + 1) * m1 + tl.load(weights + 2) * m2) * q
        u *= tl.where(u * g < 0, 1 - tl.load(multiplier + CAUTIOUS), 1.0)
        nominal = -tl.load(multiplier + STEPSIZE) * u
        new = p + (nominal * tl.load(number + SCALE) - tl.load(number + DECAY) * p)
        kept = tm.rounded(new, code, PARAMS)
        if CHECK:
            wrong = tm.is_bad(kept) | tm.is_bad(m0) | tm.is_bad(m1) | tm.is_bad(m2) | tm.is_bad(v)
            tl.store(verdicts + tensor, SKIP, mask=tl.max((wrong & mask).to(tl.int32), 0) > 0)
        else:
            tm.store(_address(addresses, tensor, PARAM), offsets, new, mask, code, PARAMS, ALIGN)
            tm.store_moments(first, second, numel, offsets, mask, m0, m1, m2, v, ALIGN)
        if MEASURE:
            change = tl.where(mask, kept - p, 0.0)
            changes += change * change
            nominals += tl.where(mask, nominal * nominal, 0.0)
    if MEASURE:
        tl.store(measured + tile * MEASURED, tl.sum(changes, 0))
        tl.store(measured + tile * MEASURED + 1, tl.sum(nominals, 0))


@triton.jit
def update(
    tiles, addresses, sizes, numbers, theta, row_means, multipliers, verdicts, measured, PARAMS: tl.constexpr,
    GRADS: tl.constexpr, CENTER: tl.constexpr, SAFE: tl.constexpr, CHECK: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """A tile per program: new parameters and state, and the counters with a tensor's first tile.

    With CHECK it only looks: it marks those tensors of verdict UNKNOWN whose new value or state is not finite.
    """
    tile, tables = tl.program_id(0), (tiles, addresses, sizes, numbers, theta, row_means)
    tensor, place = _tile(tiles, tile)
    verdict = tl.load(verdicts + tensor) if SAFE else PROVEN + 0
    goes = (verdict == UNKNOWN) if CHECK else (verdict != SKIP)
    way = tl.where(goes, _come_in_fours(addresses, sizes, tensor).to(tl.int32), 2)
    for FOURS in tl.static_range(2):
        if way == FOURS:
            _update_tile(
                tile, tensor, place, tables, multipliers, verdicts, measured, PARAMS, GRADS, CENTER, CHECK, MEASURE,
                1 + 3 * FOURS,
            )  # fmt: skip
    if not CHECK:  # noqa: SIM102 -- decided when it is compiled
        if place == 0:
            tm.count(addresses + tensor * ADDRESSES + STEP, goes.to(tl.int32) if SAFE else 1, SAFE)
