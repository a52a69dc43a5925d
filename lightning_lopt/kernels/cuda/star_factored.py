"""Device code of STAR, phase A: everything that depends on the factored moments alone; `star.py` launches it.

Sums are taken in a fixed order and nothing is added atomically, so two runs are equal to the bit.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from lightning_lopt.kernels.cuda import arithmetic as tm
from lightning_lopt.kernels.cuda.tiling import (
    LINE,
    PATCH,
    STRIP_ROWS,
    STRIP_WIDTH,
    STRIPS,
    TILE_ROWS,
    Sizes,
    Vector,
)

# Where the weights lie in the packed meta-parameters, see `star.pack`.
FIRST, ROW, COL, TIME, TIMESCALES, B0, W1, B1, W2, B2, DECAYS, SETTINGS = (
    tl.constexpr(n) for n in (0, 128, 152, 176, 240, 256, 260, 276, 280, 296, 300, 307)
)
# Addresses of a tensor, and numbers of it that may change at every step.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, AT_X, AT_Y, STEP, SKIPPED, IN_ROW, ADDRESSES = (tl.constexpr(n) for n in range(10))
SIGN, SCALE, DECAY, NUMBERS = (tl.constexpr(n) for n in range(4))
# Per tile: 16 dense channels, 6 of a flat tensor's moments, and a sum that NaN and infinity make NaN.
POISON, TILE_SUMS = (tl.constexpr(n) for n in (22, 32))
# Per block: sums of three moments at each place of inner, then of the squares of six channels.
SQUARES, BLOCK_SUMS = (tl.constexpr(n) for n in (48, 64))
# Per tensor: the first layer with its normalizers, and its bias.
BIAS, EFFECTIVE = (tl.constexpr(n) for n in (88, 92))
MEASURED = tl.constexpr(4)  # sums of squares per tile: change, blackbox, nominal, decay

_SIZE = {name: tl.constexpr(number) for number, name in enumerate(Sizes._fields)}
NUMEL, FIRST_TILE, TILES, IS_FLAT = (_SIZE[name] for name in ("numel", "tile", "tiles", "flat"))
PARAM_DTYPE, GRAD_DTYPE, SIZES = _SIZE["param_dtype"], _SIZE["grad_dtype"], tl.constexpr(len(Sizes._fields))
X, BETWEEN, WIDTH, INNER = (_SIZE[name] for name in ("x", "between", "width", "inner"))
LENGTH_X, LENGTH_Y, SUMS_X, SUMS_Y = (_SIZE[name] for name in ("length_x", "length_y", "sums_x", "sums_y"))
ENTRY_X, ENTRY_Y = _SIZE["entry_x"], _SIZE["entry_y"]
TENSOR, AXIS, IS_ROW, LENGTH, BESIDE, ENTRIES, ENTRY, SUMS, PARTS, AVERAGED, BLOCK, BLOCKS, VECTORS = (
    tl.constexpr(n) for n in range(len(Vector._fields) + 1)
)
BX, BJ, NUM_STRIPS, ROWS = (tl.constexpr(n) for n in (STRIP_ROWS, STRIP_WIDTH, STRIPS, TILE_ROWS))
LINE_DOWN, LINE_ACROSS, PATCH_DOWN, PATCH_ACROSS = (tl.constexpr(n) for n in (*LINE, *PATCH))


@triton.jit
def size(sizes, tensor, NAME: tl.constexpr):
    """A number of a tensor's row in the table of sizes."""
    return tl.load(sizes + tensor * SIZES + NAME)


@triton.jit
def unpack_tile(tiles, tile):
    """A tile's tensor, its place in [outer, between], and its strips of rows and columns."""
    tensor, place = tl.load(tiles + tile * 4).to(tl.int64), tl.load(tiles + tile * 4 + 1).to(tl.int64)
    return tensor, place, tl.load(tiles + tile * 4 + 2).to(tl.int64), tl.load(tiles + tile * 4 + 3).to(tl.int64)


@triton.jit
def num_strips(sizes, tensor, place, down):
    """How many strips of a tile hold any numbers."""
    left = size(sizes, tensor, X) - down * ROWS
    if size(sizes, tensor, IS_FLAT) == 1:
        left = (size(sizes, tensor, NUMEL) - place * ROWS * BJ + BJ - 1) // BJ
    return tl.minimum(NUM_STRIPS, (left + BX - 1) // BX)


@triton.jit
def factored_strip(sizes, tensor, place, down, across, strip, MULTIPLE: tl.constexpr):
    """A strip's offsets and mask; then those of its rows in the vector of x, and of its columns in that of y.

    Each column's place in `inner` comes third of the five: it is to be added to the rows'.
    """
    between, inner = size(sizes, tensor, BETWEEN), size(sizes, tensor, INNER)
    # Arithmetic that changes nothing tells the compiler that rows begin at a multiple.
    width, count = size(sizes, tensor, WIDTH) // MULTIPLE * MULTIPLE, size(sizes, tensor, X)
    outer = place // between
    x, j = down * ROWS + strip * BX + tl.arange(0, BX), across * BJ + tl.arange(0, BJ)
    rows = (outer * count + x) * between + (place - outer * between)
    in_x, in_j = (x < count)[:, None], (j < width)[None, :]
    offsets = (rows * width)[:, None] + j[None, :]
    return offsets, in_x & in_j, (rows * inner)[:, None], in_x, (j % inner)[None, :], (place * width + j)[None, :], in_j


@triton.jit
def is_aligned(addresses, sizes, tensor):
    """Whether four numbers of a factored tensor can be read at a time."""
    return tm.are_aligned(addresses + tensor * ADDRESSES) & (size(sizes, tensor, WIDTH) % 4 == 0)


@triton.jit
def flat_strip(sizes, tensor, place, strip):
    """A strip's offsets and mask."""
    row = place * ROWS + strip * BX + tl.arange(0, BX)
    offsets = (row * BJ)[:, None] + tl.arange(0, BJ)[None, :]
    return offsets, offsets < size(sizes, tensor, NUMEL)


# --- phase A: sums of squares over rows and columns; then the factored moments, and what follows from them alone


@triton.jit
def _factored_squares(
    tensor, place, down, across, addresses, sizes, sign, sums, GRADS: tl.constexpr, MULTIPLE: tl.constexpr
):  # fmt: skip
    address, inner = tl.load(addresses + tensor * ADDRESSES + GRAD), size(sizes, tensor, INNER)
    ALIGN: tl.constexpr = 16 if MULTIPLE == 4 else 2
    columns = tl.zeros([BJ], tl.float32)
    to_x = sums + size(sizes, tensor, SUMS_X) + across * size(sizes, tensor, LENGTH_X)
    for strip in range(0, num_strips(sizes, tensor, place, down)):
        offsets, mask, at_x, in_x, c, at_y, in_y = factored_strip(sizes, tensor, place, down, across, strip, MULTIPLE)
        grad = tm.load(address, offsets, mask, size(sizes, tensor, GRAD_DTYPE), GRADS, ALIGN) * sign
        square = grad * grad
        columns += tl.sum(square, 0)
        for each in range(0, inner):
            tl.store(to_x + at_x + each, tl.sum(tl.where(c == each, square, 0.0), 1)[:, None], mask=in_x)
    width, j = size(sizes, tensor, WIDTH), across * BJ + tl.arange(0, BJ)
    to_y = sums + size(sizes, tensor, SUMS_Y) + down * size(sizes, tensor, LENGTH_Y)
    tl.store(to_y + place * width + j, columns, mask=j < width)


@triton.jit
def gradient_squares(tiles, addresses, sizes, numbers, sums, bad, GRADS: tl.constexpr):
    """A tile per program: the gradient's sums of squares over y and over x, of tensors that are factored."""
    tile = tl.program_id(0)
    tensor, place, down, across = unpack_tile(tiles, tile)
    if tile == size(sizes, tensor, FIRST_TILE):
        tl.store(bad + tensor, 0)
    sign = tl.load(numbers + tensor * NUMBERS + SIGN)
    if size(sizes, tensor, IS_FLAT) == 0:
        if is_aligned(addresses, sizes, tensor):
            _factored_squares(tensor, place, down, across, addresses, sizes, sign, sums, GRADS, 4)
        else:
            _factored_squares(tensor, place, down, across, addresses, sizes, sign, sums, GRADS, 1)


@triton.jit
def is_line(vectors, blocks, block):
    """1 for a block of a vector whose entries lie one by one (inner 1), else 0."""
    vector = vectors + tl.load(blocks + block * 4).to(tl.int64) * VECTORS
    return (tl.load(vector + BESIDE) == 1).to(tl.int32)


@triton.jit
def unpack_block(vectors, blocks, block, IS_LINE: tl.constexpr):
    """A block's row of `vectors`, its offsets in the vector, their mask, and its number along `length`."""
    DOWN: tl.constexpr = LINE_DOWN if IS_LINE else PATCH_DOWN
    ACROSS: tl.constexpr = LINE_ACROSS if IS_LINE else PATCH_ACROSS
    vector = vectors + tl.load(blocks + block * 4).to(tl.int64) * VECTORS
    length, beside = tl.load(vector + LENGTH), tl.load(vector + BESIDE)
    first = tl.load(blocks + block * 4 + 2)
    i, n = first + tl.arange(0, DOWN), tl.load(blocks + block * 4 + 3) + tl.arange(0, ACROSS)
    outer = tl.load(blocks + block * 4 + 1).to(tl.int64)
    offsets = ((outer * length + i) * beside)[:, None] + n[None, :]
    return vector, offsets, (i < length)[:, None] & (n < beside)[None, :], first // DOWN


@triton.jit
def new_moment(k, vector, offsets, mask, mean, addresses, theta):
    """A vector's factored moments with this step's gradient: rules.features.update_accumulators."""
    where = tl.load(addresses + tl.load(vector + TENSOR) * ADDRESSES + AT_X + tl.load(vector + AXIS))
    old = where.to(tl.pointer_type(tl.float32)) + k * tl.load(vector + ENTRIES) + offsets
    new = tm.average(tl.load(old, mask=mask, other=0.0), mean, tl.load(theta + DECAYS + 4 + k))
    return tl.where(mask, new, 0.0), old


@triton.jit
def _sum_block(block, vectors, blocks, addresses, theta, sums, means, block_sums, IS_LINE: tl.constexpr):
    vector, offsets, mask, _ = unpack_block(vectors, blocks, block, IS_LINE)
    entries, first = tl.load(vector + ENTRIES), sums + tl.load(vector + SUMS) + offsets
    total = tl.zeros(offsets.shape, tl.float32)
    for part in tl.range(0, tl.load(vector + PARTS), loop_unroll_factor=8):
        total += tl.load(first + part * entries, mask=mask, other=0.0)
    mean = total / tl.load(vector + AVERAGED).to(tl.float32) + 1e-30
    tl.store(means + tl.load(vector + ENTRY) + offsets, mean, mask=mask)
    to = block_sums + block * BLOCK_SUMS
    for k in tl.static_range(3):
        moment, _ = new_moment(k, vector, offsets, mask, mean, addresses, theta)
        tl.store(to + k * PATCH_ACROSS + tl.arange(0, moment.shape[1]), tl.sum(moment, 0))
        tl.store(to + SQUARES + k, tl.sum(tl.sum(moment * moment, 1), 0))
        inverse = tl.where(mask, 1 / (moment + 1e-8), 0.0)
        tl.store(to + SQUARES + 3 + k, tl.sum(tl.sum(inverse, 1), 0))


@triton.jit
def vector_sums(vectors, blocks, addresses, theta, sums, means, block_sums):
    """A block per program: mean squares of the gradient, and sums over the factored moments that they lead to."""
    block = tl.program_id(0)
    line = is_line(vectors, blocks, block)
    for IS_LINE in tl.static_range(2):
        if line == IS_LINE:
            _sum_block(block, vectors, blocks, addresses, theta, sums, means, block_sums, IS_LINE)


@triton.jit
def _inverse_rms(block_sums, vector, channel):
    """1 / sqrt(1e-5 + mean square) of a vector's channel."""
    total, first, number = tl.zeros([256], tl.float32), tl.load(vector + BLOCK), tl.load(vector + BLOCKS)
    for start in range(0, number, 256):
        block = start + tl.arange(0, 256)
        at = block_sums + (first + block) * BLOCK_SUMS + SQUARES + channel
        total += tl.load(at, mask=block < number, other=0.0)
    return tl.rsqrt(1e-5 + tl.sum(total, 0) / tl.load(vector + ENTRIES).to(tl.float32))


@triton.jit
def _feature_block(
    block, vectors, blocks, addresses, theta, means, block_sums, num_entries, entries, bad, IS_LINE: tl.constexpr
):
    vector, offsets, mask, number = unpack_block(vectors, blocks, block, IS_LINE)
    DOWN: tl.constexpr = offsets.shape[0]
    ACROSS: tl.constexpr = offsets.shape[1]
    entry, is_row = tl.load(vector + ENTRY) + offsets, tl.load(vector + IS_ROW)
    length = tl.load(vector + LENGTH)
    mean = tl.load(means + entry, mask=mask, other=0.0)
    weights = theta + COL + is_row * (ROW - COL)
    h0, h1, h2, h3 = tl.zeros_like(mean), tl.zeros_like(mean), tl.zeros_like(mean), tl.zeros_like(mean)
    for k in tl.static_range(3):
        moment, _ = new_moment(k, vector, offsets, mask, mean, addresses, theta)
        tl.store(bad + tl.load(vector + TENSOR), 1, mask=tl.max(tl.max(tm.is_bad(moment).to(tl.int32), 1), 0) > 0)
        # The mean over `length` of what is the `row` of rules.features; blocks along it follow each other.
        total = tl.zeros([ACROSS], tl.float32)
        for part in range(0, (length + DOWN - 1) // DOWN):
            at = block_sums + (block - number + part) * BLOCK_SUMS + k * PATCH_ACROSS
            total += tl.load(at + tl.arange(0, ACROSS))
        relative = tl.where(is_row == 1, moment / (total / length.to(tl.float32) + 1e-9)[None, :], moment)
        factor = tl.rsqrt(tl.maximum(relative, 1e-9, propagate_nan=tm.ALL))
        tl.store(entries + k * num_entries + entry, factor, mask=mask)
        for inverse in tl.static_range(2):
            channel = inverse * 3 + k
            x = tl.rsqrt(moment + 1e-8) if inverse else moment
            x *= _inverse_rms(block_sums, vector, channel)
            h0, h1, h2, h3 = mix(weights, channel, x, h0, h1, h2, h3)
    tl.store(entries + 3 * num_entries + entry, h0, mask=mask)
    tl.store(entries + 4 * num_entries + entry, h1, mask=mask)
    tl.store(entries + 5 * num_entries + entry, h2, mask=mask)
    tl.store(entries + 6 * num_entries + entry, h3, mask=mask)


@triton.jit(do_not_specialize=["num_entries"])
def vector_features(vectors, blocks, addresses, theta, means, block_sums, num_entries, entries, bad):
    """A block per program: each row's or column's factors of gradient and momenta, and its part of the first layer."""
    block = tl.program_id(0)
    line = is_line(vectors, blocks, block)
    for IS_LINE in tl.static_range(2):
        if line == IS_LINE:
            _feature_block(
                block, vectors, blocks, addresses, theta, means, block_sums, num_entries, entries, bad, IS_LINE
            )  # fmt: skip


@triton.jit
def mix(weights, channel, x, h0, h1, h2, h3):
    """Add one channel to four units: weights (channels, 4)."""
    at = weights + channel * 4
    return h0 + tl.load(at) * x, h1 + tl.load(at + 1) * x, h2 + tl.load(at + 2) * x, h3 + tl.load(at + 3) * x
