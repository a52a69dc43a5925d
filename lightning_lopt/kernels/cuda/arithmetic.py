"""Device functions that the Triton kernels share: reading and writing three dtypes, moments.

The kernels reach tensors through a table of addresses, so that one launch serves all of them. bfloat16 is packed by
hand, because Triton's own rounding differs between its interpreter and the device.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: RET505 -- branches of a kernel are taken when it is compiled

from __future__ import annotations

import triton
import triton.language as tl

# The codes of `tiling.DTYPES`; MIXED where the tensors of a launch have several.
FLOAT32, BFLOAT16, FLOAT16, MIXED = (tl.constexpr(code) for code in range(4))
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32; anything larger in size, and NaN, is not finite
ALL = tl.constexpr(tl.PropagateNan.ALL)  # NaN in either argument gives NaN, as in torch's clamp and relu


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), ALIGN)


@triton.jit
def are_aligned(row):
    """Whether a tensor's first four addresses, of parameter, gradient and moments, are multiples of 16 bytes."""
    return ((tl.load(row) | tl.load(row + 1) | tl.load(row + 2) | tl.load(row + 3)) & 15) == 0


@triton.jit
def load_float32(address, offsets, mask, ALIGN):
    """float32 numbers; 0 where masked. `address` is a multiple of ALIGN bytes."""
    return tl.load(_pointer(address, tl.float32, ALIGN) + offsets, mask=mask, other=0.0)


@triton.jit
def _load_bfloat16(address, offsets, mask, ALIGN):
    bits = tl.load(_pointer(address, tl.int16, ALIGN) + offsets, mask=mask, other=0)
    return _from_bfloat16_bits(bits)


@triton.jit
def _load_float16(address, offsets, mask, ALIGN):
    return tl.load(_pointer(address, tl.float16, ALIGN) + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load(address, offsets, mask, code, CODE: tl.constexpr, ALIGN: tl.constexpr):
    """Numbers of any supported dtype as float32; 0 where masked.

    CODE is their dtype, or MIXED where `code` gives it for each tensor. `address` is a multiple of ALIGN bytes.
    """
    if CODE == FLOAT32:
        return load_float32(address, offsets, mask, ALIGN)
    elif CODE == BFLOAT16:
        return _load_bfloat16(address, offsets, mask, ALIGN)
    elif CODE == FLOAT16:
        return _load_float16(address, offsets, mask, ALIGN)
    else:
        if code == 0:
            x = load_float32(address, offsets, mask, ALIGN)
        elif code == 1:
            x = _load_bfloat16(address, offsets, mask, ALIGN)
        else:
            x = _load_float16(address, offsets, mask, ALIGN)
        return x


@triton.jit
def _bfloat16_bits(x):
    """The upper half of float32, rounded to the nearest, ties to even; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    half = 0x7FFF + ((bits >> 16) & 1)
    return tl.where(x == x, (bits + half) >> 16, 0x7FC0).to(tl.int16)


@triton.jit
def _from_bfloat16_bits(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, code, CODE: tl.constexpr):
    """The float32 value of what `store` writes for x."""
    if CODE == FLOAT32:
        y = x
    elif CODE == BFLOAT16:
        y = _from_bfloat16_bits(_bfloat16_bits(x))
    elif CODE == FLOAT16:
        y = x.to(tl.float16).to(tl.float32)
    else:
        y = x
        if code == 1:
            y = _from_bfloat16_bits(_bfloat16_bits(x))
        elif code == 2:
            y = x.to(tl.float16).to(tl.float32)
    return y


@triton.jit
def store_float32(address, offsets, x, mask, ALIGN: tl.constexpr):
    """Write float32 numbers. `address` is a multiple of ALIGN bytes."""
    tl.store(_pointer(address, tl.float32, ALIGN) + offsets, x, mask=mask)


@triton.jit
def store(address, offsets, x, mask, code, CODE: tl.constexpr, ALIGN: tl.constexpr):
    """Round x to the nearest number of its dtype, and write it."""
    if CODE == FLOAT32:
        store_float32(address, offsets, x, mask, ALIGN)
    elif CODE == BFLOAT16:
        tl.store(_pointer(address, tl.int16, ALIGN) + offsets, _bfloat16_bits(x), mask=mask)
    elif CODE == FLOAT16:
        tl.store(_pointer(address, tl.float16, ALIGN) + offsets, x.to(tl.float16), mask=mask)
    else:
        if code == 0:
            store_float32(address, offsets, x, mask, ALIGN)
        elif code == 1:
            tl.store(_pointer(address, tl.int16, ALIGN) + offsets, _bfloat16_bits(x), mask=mask)
        else:
            tl.store(_pointer(address, tl.float16, ALIGN) + offsets, x.to(tl.float16), mask=mask)


@triton.jit
def load_number(pointers, mask, BITS: tl.constexpr):
    """Numbers of a launch's own memory as float32, 0 where masked; if BITS, that of bfloat16 as int16, else float32."""
    if BITS:
        return _from_bfloat16_bits(tl.load(pointers, mask=mask, other=0))
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_number(pointers, x, mask, BITS: tl.constexpr):
    """Write float32 numbers as `load_number` reads them."""
    if BITS:
        tl.store(pointers, _bfloat16_bits(x), mask=mask)
    else:
        tl.store(pointers, x, mask=mask)


@triton.jit
def average(old, new, decay):
    """One step of an exponential moving average."""
    return decay * old + (1 - decay) * new


@triton.jit
def new_moments(exp_avg, exp_avg_sq, numel, offsets, mask, grad, stays, decays, ALIGN: tl.constexpr):
    """Three momenta and the second moment with one gradient more: rules.features.update_moments.

    `exp_avg` and `exp_avg_sq` are their addresses; `decays` points to three decays of momenta and one of the other.
    Where `stays`, they are the old ones; gradients must be 0 there.
    """
    m0 = load_float32(exp_avg, offsets, mask, ALIGN)
    m1 = load_float32(exp_avg, numel + offsets, mask, ALIGN)
    m2 = load_float32(exp_avg, 2 * numel + offsets, mask, ALIGN)
    v = load_float32(exp_avg_sq, offsets, mask, ALIGN)
    rms = tl.load(decays + 3)
    m0 = tl.where(stays, m0, average(m0, grad, tl.load(decays)))
    m1 = tl.where(stays, m1, average(m1, grad, tl.load(decays + 1)))
    m2 = tl.where(stays, m2, average(m2, grad, tl.load(decays + 2)))
    return m0, m1, m2, tl.where(stays, v, rms * v + (1 - rms) * grad * grad)


@triton.jit
def store_moments(exp_avg, exp_avg_sq, numel, offsets, mask, m0, m1, m2, v, ALIGN: tl.constexpr):
    """Write what `new_moments` gave."""
    store_float32(exp_avg, offsets, m0, mask, ALIGN)
    store_float32(exp_avg, numel + offsets, m1, mask, ALIGN)
    store_float32(exp_avg, 2 * numel + offsets, m2, mask, ALIGN)
    store_float32(exp_avg_sq, offsets, v, mask, ALIGN)


@triton.jit
def clamp(x, low, high):
    """As torch's clamp: NaN stays NaN."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=ALL), high, propagate_nan=ALL)


@triton.jit
def is_bad(x):
    """Where x is NaN or infinite."""
    return (tl.abs(x) <= LARGEST) == 0


@triton.jit
def count(counters, good, SAFE: tl.constexpr):
    """Update a tensor's counters after its step.

    `counters` points to their addresses, one after the other: steps, skipped steps, skipped steps in a row. `good` is 0
    for a skipped step, else 1.
    """
    step = tl.load(counters).to(tl.pointer_type(tl.int64))
    tl.store(step, tl.load(step) + good)
    if SAFE:
        skipped = tl.load(counters + 1).to(tl.pointer_type(tl.int64))
        in_row = tl.load(counters + 2).to(tl.pointer_type(tl.int64))
        tl.store(skipped, tl.load(skipped) + (1 - good))
        tl.store(in_row, (tl.load(in_row) + 1) * (1 - good))
