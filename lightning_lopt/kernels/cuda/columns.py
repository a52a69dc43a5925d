"""What the device code of the `scheduled` kernel reads: the columns of its tables, and the packed meta-parameters.

Every tensor is seen flat, in the order of its memory, and cut into tiles; a program loops over the strips of one tile.
The tables have a row per tensor, tile or matrix; `scheduled.py` fills them.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import triton
import triton.language as tl

from lightning_lopt.kernels.cuda import arithmetic as tm


class Sizes(NamedTuple):
    """What the kernels know about a tensor's shape and role: a row of a table of int64."""

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
    fours: int  # whether all its tiles begin and end at multiples of four
    is_table: int  # an embedding: only what has a gradient moves
    steps: int  # where the steps of all hidden matrices have its own, or -1 for other tensors


class Tile(NamedTuple):
    """A stretch of a tensor's memory: a row of a table of int64."""

    tensor: int
    start: int  # its first number
    end: int  # what comes after its last one
    row: int  # of the tensor's matrix, in which its first number lies
    place: int  # of its first number among those of the row that are adjacent in memory


class Matrix(NamedTuple):
    """A hidden matrix: a row of a table of int64."""

    tile: int  # its first tile
    tiles: int


# The packed meta-parameters, one after the other; `scheduled.pack` fills them. Curves are padded to KNOTS numbers.
KNOTS = tl.constexpr(16)
PACKED = {
    "decays": 4,  # of the momenta, and of the second moment
    "eps": 1,
    "nominal_stepsize": 1,
    "centering": 2,
    "caution": 2,
    "orthogonal": 2,
    "growth": 2,
    "roles": 6,
    "first_scale": 1,
    "cap": 1,
    "decay": 1,
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
CENTERING, CAUTION, ORTHOGONAL = (_PLACE[name] for name in ("centering", "caution", "orthogonal"))
GROWTH, ROLES, FIRST_SCALE = (_PLACE[name] for name in ("growth", "roles", "first_scale"))
CAP, LOST = _PLACE["cap"], _PLACE["decay"]
MOMENTUM_MIX, TENSOR_POWERS = _PLACE["momentum_mix"], _PLACE["tensor_powers"]
FRACTIONS, LOG_STEPS = _PLACE["fractions"], _PLACE["log_steps"]
SCHEDULE_FRACTION, SCHEDULE_LENGTH = _PLACE["schedule_fraction"], _PLACE["schedule_length"]
SCHEDULE_EARLY, SCHEDULE_STEP = _PLACE["schedule_early"], _PLACE["schedule_step"]

# Columns of the other tables; the last name of each line is the number of columns.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, FIRST_SQUARE, STEP, SKIPPED, IN_ROW, ADDRESSES = (tl.constexpr(n) for n in range(9))
SIGN, SCALE, DECAY, NUMBERS = (tl.constexpr(n) for n in range(4))
IS_VECTOR, LOG_SIZE, LOG_FAN_IN, ROLE, SHAPES = (tl.constexpr(n) for n in (0, 1, 2, 3, 6))
STEPSIZE, WEIGHTS, CAUTIOUS, OWN_DECAY, SHARE, FIRST, BOUND, MULTIPLIERS = (
    tl.constexpr(n) for n in (0, 1, 4, 5, 6, 7, 8, 9)
)
NUM_STEPS, LOG_DEPTH = (tl.constexpr(n) for n in range(2))  # the run's two numbers
# Of a tile: squares of the parameter, and of three momenta / sqrt(second moment); numbers that have had a gradient.
P_SQUARES, STRENGTHS, SEEN, SUMS = (tl.constexpr(n) for n in (0, 1, 4, 5))
# Of a tile of a hidden matrix: squares of its direction, squares of what orthogonalization makes of that, and products
# of the two.
DIRECTION, ORTHOGONALIZED, PRODUCTS, MATRIX_SUMS = (tl.constexpr(n) for n in range(4))
CHANGE, NOMINAL, MEASURED = (tl.constexpr(n) for n in range(3))  # of a tile: squares of the change, and of the term

_SIZE = {name: tl.constexpr(number) for number, name in enumerate(Sizes._fields)}
NUMEL, FIRST_TILE, TILES, ROWS, FAN_IN = (_SIZE[name] for name in ("numel", "tile", "tiles", "rows", "fan_in"))
PARAM_DTYPE, GRAD_DTYPE, STRIDE = (_SIZE[name] for name in ("param_dtype", "grad_dtype", "stride"))
MAGIC, SHIFT, FIRST_ROW, FOURS = (_SIZE[name] for name in ("magic", "shift", "row", "fours"))
IS_TABLE, STEPS, SIZES = _SIZE["is_table"], _SIZE["steps"], tl.constexpr(len(Sizes._fields))
_TILE = {name: tl.constexpr(number) for number, name in enumerate(Tile._fields)}
TENSOR, START, END, ROW, PLACE = (_TILE[name] for name in ("tensor", "start", "end", "row", "place"))
TILE_COLUMNS = tl.constexpr(len(Tile._fields))

STRIP, STRIPS, TILE = (tl.constexpr(n) for n in (1024, 8, 8192))
AT_ONCE = tl.constexpr(1024)  # tiles whose sums are added up at a time

PROVEN, SKIP, UNKNOWN = (tl.constexpr(n) for n in range(3))  # verdicts of the safeguard on a tensor's step


@triton.jit
def size_of(sizes, tensor, NAME: tl.constexpr):
    """A column of a tensor's `Sizes`."""
    return tl.load(sizes + tensor * SIZES + NAME)


@triton.jit
def tile_of(tiles, tile, NAME: tl.constexpr):
    """A column of a `Tile`."""
    return tl.load(tiles + tile * TILE_COLUMNS + NAME)


@triton.jit
def address_of(addresses, tensor, NAME: tl.constexpr):
    """Where a tensor of the state lies, or the parameter or gradient."""
    return tl.load(addresses + tensor * ADDRESSES + NAME)


@triton.jit
def step_of(addresses, tensor):
    """Updates of a tensor so far; kept as an integer, because float32 counts up to 2^24 only."""
    return tl.load(address_of(addresses, tensor, STEP).to(tl.pointer_type(tl.int64))).to(tl.float32)


@triton.jit
def come_in_fours(addresses, sizes, tensor):
    """Whether four numbers can be read at a time."""
    return tm.are_aligned(addresses + tensor * ADDRESSES) & (size_of(sizes, tensor, FOURS) > 0)


@triton.jit
def num_strips(tiles, tile):
    """Strips of a tile that are not empty."""
    return ((tile_of(tiles, tile, END) - tile_of(tiles, tile, START) + STRIP - 1) // STRIP).to(tl.int32)


@triton.jit
def progress(step, num_steps):
    """As `rules.scheduler.progress`; `num_steps` is 0 where the length is unknown."""
    return tl.where(num_steps > 0, tl.minimum(step / tl.maximum(num_steps - 1, 1), 1), 0.5)


@triton.jit
def lerp(start, distance, fraction):
    """Between a number in memory and another one, so many places after it."""
    first = tl.load(start)
    return first + fraction * (tl.load(start + distance) - first)


@triton.jit
def ramp(theta, fraction):
    """As `rules.scheduler.ramp`, of two packed meta-parameters."""
    return tm.clamp(lerp(theta, 1, fraction), 0.0, 1.0)


@triton.jit
def fold(sums, first, number, COLUMNS: tl.constexpr, NUMBER: tl.constexpr):
    """Total and largest of column NUMBER of a table of sums, over some tiles."""
    total, largest = tl.zeros([AT_ONCE], tl.float32), tl.zeros([AT_ONCE], tl.float32)
    for start in range(0, number, AT_ONCE):
        tile = start + tl.arange(0, AT_ONCE)
        x = tl.load(sums + (first + tile) * COLUMNS + NUMBER, mask=tile < number, other=0.0)
        total += x
        largest = tl.maximum(largest, x)
    return tl.sum(total, 0), tl.max(largest, 0)
