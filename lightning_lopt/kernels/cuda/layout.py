"""How dense tensors lie in memory: the order of their dims. State lies in the order of its parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # codes as in `arithmetic`
MIXED = 3


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """A tensor's dims, outermost in memory first; None if its numbers do not fill one stretch of memory.

    Example:
        >>> memory_order((2, 3), (1, 2)), memory_order((2, 3), (8, 1))
        ((1, 0), None)
    """
    order = tuple(sorted(range(len(shape)), key=lambda dim: (shape[dim] != 1, -strides[dim])))
    return order if same(dense_strides(shape, order), strides, shape) else None


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor without gaps whose dims lie in `order`, outermost first."""
    strides, stride = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = stride
        stride *= max(shape[dim], 1)
    return tuple(strides)


def same(strides: Sequence[int], others: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether two layouts of a shape are one: strides of dims of size 1 do not matter."""
    return all(a == b for a, b, size in zip(strides, others, shape, strict=True) if size > 1)


def common(codes: list[int]) -> int:
    """The one code of all, or `MIXED`."""
    return codes[0] if len(set(codes)) == 1 else MIXED
