"""What the Triton kernels share: numbers read and written in three dtypes, moments, STAR's nominal direction.

Tensors are reached through a table of addresses, so that one launch serves them all. bfloat16 is packed by hand: it is
the same on every backend, and takes random bits in place of rounding to nearest.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: RET505 -- branches of a kernel are taken when it is compiled

from __future__ import annotations

import triton
import triton.language as tl

from lightning_lopt.rules import nominal

FLOAT32, BFLOAT16, FLOAT16, MIXED = (tl.constexpr(code) for code in range(4))
ESTIMATORS = {name: number for number, name in enumerate(nominal.ESTIMATORS, start=1)}  # 0: no nominal term
LARGEST = tl.constexpr(3.4028234663852886e38)  # float32's; what is larger in size, or NaN, is not finite
ALL = tl.constexpr(tl.PropagateNan.ALL)  # as torch's clamp and relu do


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), ALIGN)


@triton.jit
def _load_float32(where, offsets, mask, ALIGN):
    return tl.load(_pointer(where, tl.float32, ALIGN) + offsets, mask=mask, other=0.0)


@triton.jit
def _load_bfloat16(where, offsets, mask, ALIGN):
    bits = tl.load(_pointer(where, tl.int16, ALIGN) + offsets, mask=mask, other=0)
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _load_float16(where, offsets, mask, ALIGN):
    return tl.load(_pointer(where, tl.float16, ALIGN) + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load(where, offsets, mask, code, CODE: tl.constexpr, ALIGN: tl.constexpr):
    """Numbers as float32; 0 where masked.

    CODE is their dtype, or MIXED where `code` says it tensor by tensor. `where` is a multiple of ALIGN bytes.
    """
    if CODE == FLOAT32:
        return _load_float32(where, offsets, mask, ALIGN)
    elif CODE == BFLOAT16:
        return _load_bfloat16(where, offsets, mask, ALIGN)
    elif CODE == FLOAT16:
        return _load_float16(where, offsets, mask, ALIGN)
    else:
        if code == 0:
            x = _load_float32(where, offsets, mask, ALIGN)
        elif code == 1:
            x = _load_bfloat16(where, offsets, mask, ALIGN)
        else:
            x = _load_float16(where, offsets, mask, ALIGN)
        return x


@triton.jit
def bfloat16_bits(x, noise):
    """The upper half of float32 after adding `noise` to its lower half; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, (bits + noise) >> 16, 0x7FC0).to(tl.int16)


@triton.jit
def half_to_even(x):
    """What makes `bfloat16_bits` round to nearest."""
    return 0x7FFF + ((x.to(tl.int32, bitcast=True) >> 16) & 1)


@triton.jit
def from_bfloat16_bits(bits):
    """float32 of the same value."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, code, CODE: tl.constexpr):
    """What `store` keeps of x, as float32."""
    if CODE == FLOAT32:
        y = x
    elif CODE == BFLOAT16:
        y = from_bfloat16_bits(bfloat16_bits(x, half_to_even(x)))
    elif CODE == FLOAT16:
        y = x.to(tl.float16).to(tl.float32)
    else:
        y = x
        if code == 1:
            y = from_bfloat16_bits(bfloat16_bits(x, half_to_even(x)))
        elif code == 2:
            y = x.to(tl.float16).to(tl.float32)
    return y


@triton.jit
def store(where, offsets, x, mask, code, CODE: tl.constexpr, ALIGN: tl.constexpr):
    """Round x to nearest in its dtype, and write it."""
    if CODE == FLOAT32:
        tl.store(_pointer(where, tl.float32, ALIGN) + offsets, x, mask=mask)
    elif CODE == BFLOAT16:
        tl.store(_pointer(where, tl.int16, ALIGN) + offsets, bfloat16_bits(x, half_to_even(x)), mask=mask)
    elif CODE == FLOAT16:
        tl.store(_pointer(where, tl.float16, ALIGN) + offsets, x.to(tl.float16), mask=mask)
    else:
        if code == 0:
            tl.store(_pointer(where, tl.float32, ALIGN) + offsets, x, mask=mask)
        elif code == 1:
            tl.store(_pointer(where, tl.int16, ALIGN) + offsets, bfloat16_bits(x, half_to_even(x)), mask=mask)
        else:
            tl.store(_pointer(where, tl.float16, ALIGN) + offsets, x.to(tl.float16), mask=mask)


@triton.jit
def store_state(where, offsets, x, mask, noise, BF16: tl.constexpr, ALIGN: tl.constexpr):
    """Write float32, or bfloat16 rounded up with the probability that keeps the mean: `noise` is 16 random bits."""
    if BF16:
        tl.store(_pointer(where, tl.int16, ALIGN) + offsets, bfloat16_bits(x, noise), mask=mask)
    else:
        tl.store(_pointer(where, tl.float32, ALIGN) + offsets, x, mask=mask)


@triton.jit
def load_state(where, offsets, mask, BF16: tl.constexpr, ALIGN: tl.constexpr):
    """State as float32."""
    return _load_bfloat16(where, offsets, mask, ALIGN) if BF16 else _load_float32(where, offsets, mask, ALIGN)


@triton.jit
def random_bits(offsets, tensor, step):
    """Two blocks of 32 random bits (Philox): a function of index, tensor and step, the same on every machine."""
    c0 = (offsets & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((offsets >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = c0 * 0 + tensor.to(tl.uint32)
    c3 = c0 * 0 + step.to(tl.int32).to(tl.uint32)
    first, second, _, _ = tl.philox(0, c0, c1, c2, c3, 7)  # 7 rounds pass the tests that 10 pass (Salmon et al. 2011)
    return first.to(tl.int32, bitcast=True), second.to(tl.int32, bitcast=True)


@triton.jit
def average(old, new, decay):
    """A moving average with one number more."""
    return decay * old + (1 - decay) * new


@triton.jit
def direction(ESTIMATOR: tl.constexpr, grad, m0, m1, m2, inv_root, weights):
    """The nominal direction, see `rules.nominal.ESTIMATORS`; three weights of the momenta in memory."""
    if ESTIMATOR == 1:
        return grad
    elif ESTIMATOR == 2:
        return m2
    elif ESTIMATOR == 4:
        return m2 * inv_root
    else:
        average = tl.load(weights) * m0 + tl.load(weights + 1) * m1 + tl.load(weights + 2) * m2
        return average if ESTIMATOR == 3 else average * inv_root


@triton.jit
def is_bad(x):
    """Where x is NaN or infinite."""
    return (tl.abs(x) <= LARGEST) == 0


@triton.jit
def count(row, good, SAFE: tl.constexpr):
    """A tensor's counters, whose addresses follow each other: steps; those that were skipped, and those in a row."""
    step = tl.load(row).to(tl.pointer_type(tl.float32))
    tl.store(step, tl.load(step) + good)
    if SAFE:
        skipped = tl.load(row + 1).to(tl.pointer_type(tl.int64))
        in_row = tl.load(row + 2).to(tl.pointer_type(tl.int64))
        tl.store(skipped, tl.load(skipped) + (1 - good))
        tl.store(in_row, (tl.load(in_row) + 1) * (1 - good))
