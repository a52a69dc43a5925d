"""Device code of the `scheduled` kernel: the steps of hidden matrices, before and after `products.orthogonalize`.

What `rules.matrix.orthogonal` makes of a direction u of norm n, by the iterations F of u / n, is

    (1 - share) u / n + share F / |F|,    brought to norm n.

All that it needs of these are n, |F|^2 and the inner product of u / n and F. Sums are taken tile by tile, and each
program adds up those of its matrix.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from lightning_lopt.kernels.cuda import arithmetic as tm
from lightning_lopt.kernels.cuda import columns as c
from lightning_lopt.kernels.cuda.scheduled_step import MAGNIFIED
from lightning_lopt.rules import matrix

SMALLEST = tl.constexpr(matrix.TINY)  # norm that is divided by


@triton.jit
def _strip(tiles, tile, strip, MULTIPLE: tl.constexpr):
    """Offsets in a tensor, and the tile's end. MULTIPLE is 4 where four numbers can be read at a time, else 1."""
    start = c.tile_of(tiles, tile, c.START) // MULTIPLE * MULTIPLE
    offsets = start + strip * c.STRIP + tl.arange(0, c.STRIP)
    return offsets, c.tile_of(tiles, tile, c.END) // MULTIPLE * MULTIPLE


@triton.jit
def _steps(steps, sizes, tensor, MULTIPLE: tl.constexpr):
    """Where a tensor's part of the memory of steps begins."""
    return steps + c.size_of(sizes, tensor, c.STEPS) // MULTIPLE * MULTIPLE


@triton.jit
def _fold(matrix_sums, matrices, matrix, NUMBER: tl.constexpr):
    """One of the sums of a matrix."""
    total, _ = c.fold(
        matrix_sums, tl.load(matrices + matrix * 2), tl.load(matrices + matrix * 2 + 1), c.MATRIX_SUMS, NUMBER
    )
    return total


@triton.jit
def _normalize_tile(tile, tensor, tiles, sizes, directions, steps, size, BITS: tl.constexpr, MULTIPLE: tl.constexpr):
    source, target = _steps(directions, sizes, tensor, MULTIPLE), _steps(steps, sizes, tensor, MULTIPLE)
    for strip in range(0, c.num_strips(tiles, tile)):
        offsets, end = _strip(tiles, tile, strip, MULTIPLE)
        mask = offsets < end
        x = tl.load(source + offsets, mask=mask, other=0.0) / tl.maximum(size, SMALLEST, propagate_nan=tm.ALL)
        tm.store_number(target + offsets, x, mask, BITS)


@triton.jit
def normalize(
    matrix_tiles, matrices, tiles, sizes, matrix_sums, norms, directions, steps, BITS: tl.constexpr
):  # fmt: skip
    """A tile per program: directions divided by the norm of their matrix. `steps` may be the same memory."""
    entry = matrix_tiles + tl.program_id(0) * 2
    tile, matrix = tl.load(entry), tl.load(entry + 1)
    tensor = c.tile_of(tiles, tile, c.TENSOR)
    size = tl.sqrt(_fold(matrix_sums, matrices, matrix, c.DIRECTION)) / MAGNIFIED
    if tl.load(matrices + matrix * 2) == tile:
        tl.store(norms + matrix, size)
    fours = c.size_of(sizes, tensor, c.FOURS)
    for FOURS in tl.static_range(2):
        if fours == FOURS:
            _normalize_tile(tile, tensor, tiles, sizes, directions, steps, size, BITS, 1 + 3 * FOURS)


@triton.jit
def _compare_tile(tile, tensor, tiles, sizes, matrix_sums, steps, found, BITS: tl.constexpr, MULTIPLE: tl.constexpr):
    before, after = _steps(steps, sizes, tensor, MULTIPLE), _steps(found, sizes, tensor, MULTIPLE)
    squares, products = tl.zeros([c.STRIP], tl.float32), tl.zeros([c.STRIP], tl.float32)
    for strip in range(0, c.num_strips(tiles, tile)):
        offsets, end = _strip(tiles, tile, strip, MULTIPLE)
        mask = offsets < end
        x, y = tm.load_number(before + offsets, mask, BITS), tm.load_number(after + offsets, mask, BITS)
        squares += y * y
        products += x * y
    to = matrix_sums + tile * c.MATRIX_SUMS
    tl.store(to + c.ORTHOGONALIZED, tl.sum(squares, 0))
    tl.store(to + c.PRODUCTS, tl.sum(products, 0))


@triton.jit
def compare(matrix_tiles, tiles, sizes, matrix_sums, steps, found, BITS: tl.constexpr):
    """A tile per program: what is to be known of `found`, the iterations of `steps`."""
    tile = tl.load(matrix_tiles + tl.program_id(0) * 2)
    tensor = c.tile_of(tiles, tile, c.TENSOR)
    fours = c.size_of(sizes, tensor, c.FOURS)
    for FOURS in tl.static_range(2):
        if fours == FOURS:
            _compare_tile(tile, tensor, tiles, sizes, matrix_sums, steps, found, BITS, 1 + 3 * FOURS)


@triton.jit
def _move_tile(
    tile, tensor, tables, multiplier, given, other, steps, found, measured, PARAMS: tl.constexpr, MEASURE: tl.constexpr,
    BITS: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    tiles, addresses, sizes, numbers = tables
    ALIGN: tl.constexpr = 16 if MULTIPLE == 4 else 2
    number, code = numbers + tensor * c.NUMBERS, c.size_of(sizes, tensor, c.PARAM_DTYPE)
    param = c.address_of(addresses, tensor, c.PARAM)
    before, after = _steps(steps, sizes, tensor, MULTIPLE), _steps(found, sizes, tensor, MULTIPLE)
    changes, nominals = tl.zeros([c.STRIP], tl.float32), tl.zeros([c.STRIP], tl.float32)
    for strip in range(0, c.num_strips(tiles, tile)):
        offsets, end = _strip(tiles, tile, strip, MULTIPLE)
        mask = offsets < end
        p = tm.load(param, offsets, mask, code, PARAMS, ALIGN)
        # At a share of 1, the directions count no more, and are not read.
        x = tm.load_number(before + offsets, offsets < tl.where(given == 0, 0, end), BITS)
        y = tm.load_number(after + offsets, mask, BITS)
        delta = given * x + other * y - tl.load(multiplier + c.OWN_DECAY) * p
        new = p + (delta * tl.load(number + c.SCALE) - tl.load(number + c.DECAY) * p)
        tm.store(param, offsets, new, mask, code, PARAMS, ALIGN)
        if MEASURE:
            change = tl.where(mask, tm.rounded(new, code, PARAMS) - p, 0.0)
            changes += change * change
            nominals += tl.where(mask, delta * delta, 0.0)
    if MEASURE:
        tl.store(measured + tile * c.MEASURED + c.CHANGE, tl.sum(changes, 0))
        tl.store(measured + tile * c.MEASURED + c.NOMINAL, tl.sum(nominals, 0))


@triton.jit
def move(
    matrix_tiles, matrices, tiles, addresses, sizes, numbers, multipliers, verdicts, matrix_sums, norms, steps, found,
    measured, PARAMS: tl.constexpr, SAFE: tl.constexpr, MEASURE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A tile per program: new parameters of hidden matrices."""
    entry = matrix_tiles + tl.program_id(0) * 2
    tile, matrix = tl.load(entry), tl.load(entry + 1)
    tensor = c.tile_of(tiles, tile, c.TENSOR)
    multiplier = multipliers + tensor * c.MULTIPLIERS
    share, size = tl.load(multiplier + c.SHARE), tl.load(norms + matrix)
    found_size = tl.sqrt(_fold(matrix_sums, matrices, matrix, c.ORTHOGONALIZED))
    found_size = tl.maximum(found_size, SMALLEST, propagate_nan=tm.ALL)
    cosine = _fold(matrix_sums, matrices, matrix, c.PRODUCTS) / found_size
    mixed = tl.sqrt((1 - share) * (1 - share) + share * share + 2 * share * (1 - share) * cosine)
    scale = -tl.load(multiplier + c.STEPSIZE) * size / mixed
    given, other = scale * (1 - share), scale * (share / found_size)
    goes = (tl.load(verdicts + tensor) != c.SKIP) if SAFE else tensor >= 0
    way = tl.where(goes, c.come_in_fours(addresses, sizes, tensor).to(tl.int32), 2)
    tables = (tiles, addresses, sizes, numbers)
    for FOURS in tl.static_range(2):
        if way == FOURS:
            _move_tile(
                tile, tensor, tables, multiplier, given, other, steps, found, measured, PARAMS, MEASURE, BITS,
                1 + 3 * FOURS,
            )  # fmt: skip
