"""Any number of tensors as one list of equal tiles, for kernels that move them all in one launch.

A dense tensor of two dims or more is, in the order of its memory, [outer, x, between, y, inner], x and y being the two
dims along which Adafactor's moments are factored: rows x, of `width` = y * inner numbers that lie side by side. The
moment over y belongs to (outer, x, between, inner), that over x to (outer, between, y, inner). Other tensors are flat.
State lies in memory as its parameter does (channels last, transposed, ...), whatever the shapes that it is seen by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.rules import features as feats

# A tile is STRIPS strips of STRIP_ROWS x STRIP_WIDTH numbers, one below the other.
STRIP_ROWS, STRIP_WIDTH, STRIPS = 16, 64, 8
TILE_ROWS = STRIP_ROWS * STRIPS
# Of a vector of factored moments, seen as [outer, length, inner], a block is so many places of `length` and `inner`.
LINE, PATCH = (256, 1), (16, 16)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # codes as in `arithmetic`
MIXED = 3


class Sizes(NamedTuple):
    """What a kernel must know of a tensor beside its addresses; a row of a table of int64."""

    numel: int
    tile: int  # its first tile
    tiles: int
    param_dtype: int
    grad_dtype: int
    flat: int  # 1 if it is not factored; what follows is then 0
    x: int = 0
    between: int = 0
    width: int = 0
    inner: int = 0
    length_x: int = 0  # numbers in its vector of x, the moments over y
    length_y: int = 0
    sums_x: int = 0  # where the partial sums of the vector begin
    sums_y: int = 0
    entry_x: int = 0  # where the vector begins among all vectors
    entry_y: int = 0


class Vector(NamedTuple):
    """Factored moments, seen as [outer, length, inner]; a row of a table of int64."""

    tensor: int
    axis: int  # 0 for x, 1 for y
    is_row: int  # whether it is the `row` of `rules.features`, else it is the `col`
    length: int
    inner: int
    entries: int
    entry: int
    sums: int
    parts: int  # partial sums of each entry
    averaged: int  # numbers of the tensor that belong to an entry
    block: int  # its first block
    blocks: int


class View(NamedTuple):
    """How a dense tensor lies in memory."""

    order: tuple[int, ...]  # its dims, outermost first
    outer: int = 1
    x: int = 1
    between: int = 1
    y: int = 1
    inner: int = 1
    row_is_x: bool = False
    flat: bool = False


def view(shape: torch.Size, strides: tuple[int, ...]) -> View | None:
    """The view of a tensor; None if its numbers do not fill one stretch of memory."""
    order = tuple(sorted(range(len(shape)), key=lambda dim: (shape[dim] != 1, -strides[dim])))
    if not same(dense_strides(shape, order), strides, shape):
        return None
    dims = feats.factored_dims(shape)
    if dims is None:
        return View(order, flat=True)
    x, y = sorted(order.index(dim) for dim in dims)
    size = [shape[dim] for dim in order]
    outer, between, inner = math.prod(size[:x]), math.prod(size[x + 1 : y]), math.prod(size[y + 1 :])
    return View(order, outer, size[x], between, size[y], inner, row_is_x=order[y] == dims[1])


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor without gaps whose dims lie in `order`, outermost first."""
    strides, stride = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim], stride = stride, stride * max(shape[dim], 1)
    return tuple(strides)


class Tiling(NamedTuple):
    """The tables of a list of tensors, on their device; they depend on shapes, strides and dtypes alone."""

    sizes: Tensor  # (tensors, len(Sizes._fields)) int64
    tiles: Tensor  # (tiles, 4) int32: tensor; place in [outer, between], or tile if flat; rows; columns
    vectors: Tensor  # (2 per factored tensor, len(Vector._fields)) int64
    blocks: Tensor  # (blocks, 4) int32: vector; place in outer, length and inner
    num_sums: int
    num_entries: int


def tile(params: Sequence[Tensor], grads: Sequence[Tensor], views: Sequence[View]) -> Tiling:
    """The tables of a list of tensors."""
    sizes: list[Sizes] = []
    vectors: list[Vector] = []
    tiles: list[tuple[int, ...]] = []
    blocks: list[tuple[int, ...]] = []
    sums = entries = 0
    for number, (param, grad, lies) in enumerate(zip(params, grads, views, strict=True)):
        width, places, first = lies.y * lies.inner, lies.outer * lies.between, len(tiles)
        down, across = _ceil(lies.x, TILE_ROWS), _ceil(width, STRIP_WIDTH)
        if lies.flat:
            tiles += [(number, place, 0, 0) for place in range(_ceil(param.numel(), TILE_ROWS * STRIP_WIDTH))]
        else:
            tiles += [(number, place, i, j) for place in range(places) for i in range(down) for j in range(across)]
        row = Sizes(param.numel(), first, len(tiles) - first, DTYPES[param.dtype], DTYPES[grad.dtype], int(lies.flat))
        if not lies.flat:
            seen = ((lies.outer, lies.x, lies.between * lies.inner), (places, lies.y, lies.inner))
            starts: list[tuple[int, int]] = []
            for axis, (outer, length, inner), parts in zip((0, 1), seen, (across, down), strict=True):
                begin, total = len(blocks), outer * length * inner
                blocks += _blocks(len(vectors), outer, length, inner)
                is_row, averaged = int(lies.row_is_x == (axis == 0)), param.numel() // total
                vectors.append(
                    Vector(
                        *(number, axis, is_row, length, inner, total, entries, sums, parts, averaged),
                        *(begin, len(blocks) - begin),
                    )
                )
                starts.append((sums, entries))
                sums, entries = sums + total * parts, entries + total
            row = row._replace(
                x=lies.x,
                between=lies.between,
                width=width,
                inner=lies.inner,
                length_x=vectors[-2].entries,
                length_y=vectors[-1].entries,
                sums_x=starts[0][0],
                sums_y=starts[1][0],
                entry_x=starts[0][1],
                entry_y=starts[1][1],
            )
        sizes.append(row)
    device = params[0].device
    return Tiling(
        torch.tensor(sizes, dtype=torch.int64, device=device),
        torch.tensor(tiles, dtype=torch.int32, device=device),
        torch.tensor(vectors, dtype=torch.int64, device=device).reshape(-1, len(Vector._fields)),
        torch.tensor(blocks, dtype=torch.int32, device=device).reshape(-1, 4),
        sums,
        entries,
    )


def _blocks(vector: int, outer: int, length: int, inner: int) -> Iterator[tuple[int, ...]]:
    """Blocks that differ in their place along `length` alone come one after the other."""
    down, across = LINE if inner == 1 else PATCH
    for place in range(outer):
        for right in range(0, inner, across):
            for below in range(0, length, down):
                yield vector, place, below, right


def same(strides: Sequence[int], others: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether two layouts of a shape are one: strides of dims of size 1 do not matter."""
    return all(a == b for a, b, size in zip(strides, others, shape, strict=True) if size > 1)


def common(codes: list[int]) -> int:
    """The one code of all, or `MIXED`."""
    return codes[0] if len(set(codes)) == 1 else MIXED


def _ceil(number: int, size: int) -> int:
    return -(-number // size)
