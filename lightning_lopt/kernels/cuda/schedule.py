"""Device code of the `scheduled` kernel: the schedule of each tensor, and whether its step can be proven finite.

The math and the names are those of `rules.scheduler`, and of `multipliers` and `decay` in `rules.scheduled`.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math

import triton
import triton.language as tl

from lightning_lopt.kernels.cuda import arithmetic as tm
from lightning_lopt.kernels.cuda import columns as c
from lightning_lopt.rules import scheduled, scheduler

LOG10 = tl.constexpr(2.302585092994046)
KNOWN_DOUBT, LARGEST_POWER = tl.constexpr(scheduled.DOUBT), tl.constexpr(scheduler.LARGEST_POWER)
LOG_USUAL = tl.constexpr(math.log(scheduled.USUAL))
FLOOR_FROM_ZERO, FLOOR = (tl.constexpr(floor) for floor in scheduled.FLOORS)
SHORTEST, LONGEST = (tl.constexpr(bound) for bound in scheduler.LOG_LENGTHS)
NUM_FRACTIONS, NUM_LOG_STEPS = (tl.constexpr(len(knots)) for knots in (scheduler.FRACTIONS, scheduler.LOG_STEPS))


@triton.jit
def _at_least(x, low):
    """The larger of the two; NaN stays NaN."""
    return tl.maximum(x, low, propagate_nan=tm.ALL)


@triton.jit
def _interpolate(x, knots, values, NUMBER: tl.constexpr):
    """As `rules.scheduler.interpolate`: the first value, and what each segment up to x adds to it."""
    i = tl.arange(0, c.KNOTS)
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
        fractions, log_steps = theta + c.FRACTIONS, theta + c.LOG_STEPS
        result = _interpolate(fraction, fractions, theta + c.SCHEDULE_FRACTION, NUM_FRACTIONS)
        result += log_length * _interpolate(fraction, fractions, theta + c.SCHEDULE_LENGTH, NUM_FRACTIONS)
        result += _interpolate(log_step, log_steps, theta + c.SCHEDULE_EARLY, NUM_LOG_STEPS)
    else:
        result = _interpolate(log_step, theta + c.LOG_STEPS, theta + c.SCHEDULE_STEP, NUM_LOG_STEPS)
    return result


@triton.jit
def _annealed(theta, num_steps, fraction):
    """As `rules.scheduled.annealed`."""
    i = tl.arange(0, c.KNOTS)
    curve = theta + c.SCHEDULE_FRACTION
    highest = tl.max(tl.load(curve + i, mask=i < NUM_FRACTIONS, other=-float("inf")), 0)
    level = tl.exp(_interpolate(fraction, theta + c.FRACTIONS, curve, NUM_FRACTIONS) - highest)
    return tl.where(num_steps > 0, level, 1.0)


@triton.jit
def _own_decay(theta, step, num_steps, annealed):
    """As `rules.scheduled.decay`."""
    length = tl.where(num_steps > 0, tl.maximum(num_steps, 10), tl.maximum(step + 1, 1000))
    return tl.load(theta + c.LOST) * annealed / length


@triton.jit
def _noise_strength(theta, step):
    """As `rules.scheduled.noise_strength`. In float64, since there is no expm1 here: early on, decays^n is near 1."""
    number, decays = step.to(tl.float64) + 1, theta + c.DECAYS
    momentum, second = tl.load(decays + 2).to(tl.float64), tl.load(decays + 3).to(tl.float64)
    of_momentum = tl.log((1 - momentum) / (1 + momentum)) + tl.log(1 - tl.exp(2 * number * tl.log(tl.abs(momentum))))
    return (of_momentum - tl.log(1 - tl.exp(number * tl.log(second)))).to(tl.float32)


@triton.jit
def _log_scale(square, shape):
    """The log of a matrix's root mean square times sqrt(fan-in)."""
    return (tl.log(_at_least(square, 1e-30)) + LOG10 * (tl.load(shape + c.LOG_FAN_IN) + 1.5)) / 2


@triton.jit
def _growth(theta, square, slowest, shape, step, fraction):
    """What growth adds to a matrix's log factor, as in `rules.scheduled.multipliers`."""
    grown = _at_least(_log_scale(square, shape), 0)
    signal = tl.log(_at_least(slowest, 1e-12)) - _noise_strength(theta, step)
    noisy = tm.clamp(2 - tl.abs(signal) / KNOWN_DOUBT, 0.0, 1.0)
    return c.lerp(theta + c.GROWTH, 1, fraction) * (grown * noisy)


@triton.jit
def _first_scale(theta, first_square, shape):
    """What a matrix's first scale adds to its log factor, as in `rules.scheduled.first_scale`."""
    smaller = tl.minimum(_log_scale(first_square, shape) - LOG_USUAL, 0, propagate_nan=tm.ALL)
    return tl.load(theta + c.FIRST_SCALE) * tl.where(first_square > 0, smaller, 0.0)


@triton.jit
def _role(theta, shape):
    """What a matrix's role adds to its log factor."""
    level, log_fan_in = theta + c.ROLES, tl.load(shape + c.LOG_FAN_IN)
    total = tl.load(shape + c.ROLE) * (tl.load(level) + tl.load(level + 1) * log_fan_in)
    total += tl.load(shape + c.ROLE + 1) * (tl.load(level + 2) + tl.load(level + 3) * log_fan_in)
    return total + tl.load(shape + c.ROLE + 2) * (tl.load(level + 4) + tl.load(level + 5) * log_fan_in)


@triton.jit
def _exponent(theta, shape, fraction, FEATURE: tl.constexpr):
    """How strongly the log factor follows a feature of the tensor; vectors have exponents of their own."""
    at = theta + c.TENSOR_POWERS + tl.where(tl.load(shape + c.IS_VECTOR) > 0, 0, 16) + FEATURE
    return c.lerp(at, 8, fraction)


@triton.jit
def _strength(square):
    return tl.log(_at_least(square, 1e-6)) / 4 + 1


@triton.jit
def _log_power(theta, square, strength0, strength1, strength2, first_square, shape, log_depth, step, fraction):
    """The tensor's own log factor: a power law in `rules.scheduler.tensor_features`, and what matrices have beside."""
    scale = tl.log(_at_least(square, 1e-4) / 1e-2) / 4
    power = _exponent(theta, shape, fraction, 0) + _exponent(theta, shape, fraction, 1) * scale
    power += _exponent(theta, shape, fraction, 2) * tl.load(shape + c.LOG_SIZE)
    power += _exponent(theta, shape, fraction, 3) * tl.load(shape + c.LOG_FAN_IN)
    power += _exponent(theta, shape, fraction, 4) * log_depth
    power += _exponent(theta, shape, fraction, 5) * _strength(strength0)
    power += _exponent(theta, shape, fraction, 6) * _strength(strength1)
    power += _exponent(theta, shape, fraction, 7) * _strength(strength2)
    if tl.load(shape + c.IS_VECTOR) == 0:
        power += _growth(theta, square, strength2, shape, step, fraction)
        power += _role(theta, shape) + _first_scale(theta, first_square, shape)
    return tm.clamp(power, -LARGEST_POWER, LARGEST_POWER)


@triton.jit
def _momentum_weights(theta, fraction):
    """The softmax of three logits."""
    mix = theta + c.MOMENTUM_MIX
    x0, x1, x2 = c.lerp(mix, 3, fraction), c.lerp(mix + 1, 3, fraction), c.lerp(mix + 2, 3, fraction)
    largest = tl.maximum(tl.maximum(x0, x1), x2)
    w0, w1, w2 = tl.exp(x0 - largest), tl.exp(x1 - largest), tl.exp(x2 - largest)
    total = w0 + w1 + w2
    return w0 / total, w1 / total, w2 / total


@triton.jit
def _root(square):
    return tl.sqrt(_at_least(square, 1e-30))


@triton.jit
def _capped(theta, factor, direction, square, first_square, annealed):
    """As `rules.scheduled.capped`; the root mean square of the direction is at most `direction`."""
    scale = _at_least(_root(square), tl.where(first_square == 0, FLOOR_FROM_ZERO, FLOOR))
    cap = tl.exp(tl.load(theta + c.CAP)) * scale * annealed
    return tl.minimum(factor, cap / (tl.load(theta + c.NOMINAL_STEPSIZE) * direction), propagate_nan=tm.ALL)


@triton.jit
def _bound(largest):
    """No number is larger in size than this, of a tensor whose tiles have such sums of squares at most."""
    return 1.01 * tl.sqrt(largest) + 1e-22  # squares of what is smaller are lost


@triton.jit
def schedule(
    addresses, sizes, shapes, numbers, run, theta, tile_sums, multipliers, verdicts, SAFE: tl.constexpr,
    MATRICES: tl.constexpr,
):  # fmt: skip
    """A tensor per program: what multiplies its step; and the safeguard's verdict.

    The step is finite if the sums are, since they carry NaN and infinity in gradient and state, and if the new value
    stays within its dtype: no number is larger than the root of its tile's sum of squares. The largest number of an
    orthogonal step may be as large as the norm of the direction that it is made of. Where this proves nothing, the
    verdict is UNKNOWN, and the next launch looks at the numbers themselves.
    """
    tensor = tl.program_id(0).to(tl.int64)
    shape, number = shapes + tensor * c.SHAPES, numbers + tensor * c.NUMBERS
    first, tiles = c.size_of(sizes, tensor, c.FIRST_TILE), c.size_of(sizes, tensor, c.TILES)
    p_total, p_largest = c.fold(tile_sums, first, tiles, c.SUMS, c.P_SQUARES)
    total0, largest0 = c.fold(tile_sums, first, tiles, c.SUMS, c.STRENGTHS)
    total1, largest1 = c.fold(tile_sums, first, tiles, c.SUMS, c.STRENGTHS + 1)
    total2, largest2 = c.fold(tile_sums, first, tiles, c.SUMS, c.STRENGTHS + 2)
    seen, _ = c.fold(tile_sums, first, tiles, c.SUMS, c.SEEN)
    numel, step = c.size_of(sizes, tensor, c.NUMEL).to(tl.float32), c.step_of(addresses, tensor)
    num_steps, log_depth = tl.load(run + c.NUM_STEPS), tl.load(run + c.LOG_DEPTH)
    fraction = c.progress(step, num_steps)
    annealed = _annealed(theta, num_steps, fraction)

    square, seen = p_total / numel, tl.maximum(seen, 1e-12 * numel)
    strength0, strength1, strength2 = total0 / seen, total1 / seen, total2 / seen
    stored = tl.load(c.address_of(addresses, tensor, c.FIRST_SQUARE).to(tl.pointer_type(tl.float32)))
    first_square = tl.where(step == 0, square, stored)
    power = _log_power(
        theta, square, strength0, strength1, strength2, first_square, shape, log_depth, step, fraction
    )  # fmt: skip
    w0, w1, w2 = _momentum_weights(theta, fraction)
    factor = tl.exp(_log_factor(theta, step, num_steps, fraction) + power)
    own_decay = 0.0
    if tl.load(shape + c.IS_VECTOR) == 0:
        direction = w0 * _root(strength0) + w1 * _root(strength1) + w2 * _root(strength2)
        factor = _capped(theta, factor, direction, square, first_square, annealed)
        own_decay = _own_decay(theta, step, num_steps, annealed)
    stepsize = factor * tl.load(theta + c.NOMINAL_STEPSIZE)

    to = multipliers + tensor * c.MULTIPLIERS
    tl.store(to + c.STEPSIZE, stepsize)
    tl.store(to + c.WEIGHTS, w0)
    tl.store(to + c.WEIGHTS + 1, w1)
    tl.store(to + c.WEIGHTS + 2, w2)
    tl.store(to + c.CAUTIOUS, c.ramp(theta + c.CAUTION, fraction))
    tl.store(to + c.OWN_DECAY, own_decay)
    tl.store(to + c.SHARE, c.ramp(theta + c.ORTHOGONAL, fraction))
    tl.store(to + c.FIRST, first_square)
    if SAFE:
        scale, p = tl.abs(tl.load(number + c.SCALE)), _bound(p_largest)
        change = scale * stepsize * (w0 * _bound(largest0) + w1 * _bound(largest1) + w2 * _bound(largest2))
        if MATRICES:
            change *= tl.where(c.size_of(sizes, tensor, c.STEPS) >= 0, tl.sqrt(numel), 1.0)
        decay = tl.abs(tl.load(number + c.DECAY)) + scale * tl.abs(own_decay)
        limit = tl.where(c.size_of(sizes, tensor, c.PARAM_DTYPE) == 2, 6e4, 1e38)  # float16, or a range of 3.4e38
        finite = tm.is_bad(p_total + total0 + total1 + total2) == 0  # on a GPU, maxima drop NaN
        tl.store(to + c.BOUND, change)
        tl.store(verdicts + tensor, tl.where(finite & (1.01 * (p + change + decay * p) < limit), c.PROVEN, c.UNKNOWN))
