"""The matrix products of the `scheduled` kernel: what `rules.matrix.newton_schulz` computes, and nothing but products.

PyTorch's products take a sum along, alpha A B + beta C (on a GPU it copies C first), so that polynomials need no
operations of their own but one. The identity is never added to a matrix, whose numbers it would hide in bfloat16.
Matrices of the same sides, of any number of tensors, go together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.kernels import WorkItem
from lightning_lopt.kernels.cuda.tables import order_of
from lightning_lopt.rules import matrix

ITERATIONS = 2  # the rule's
ALIGNMENT = 16  # numbers; products are faster where matrices begin at multiples of 16 bytes


class Stack(NamedTuple):
    """Matrices of the same sides, one after the other in memory."""

    start: int  # the first number's place
    shape: tuple[int, int, int]  # (matrices, rows, columns) as they lie in memory


def sides_in_memory(param: Tensor, role: str | None) -> tuple[int, int] | None:
    """Rows and columns of a tensor's matrices as they lie in memory, each in one stretch; None if they do not.

    Rows and columns may have changed places, and columns may have another order: the orthogonal matrix has, too.

    Example:
        >>> sides_in_memory(torch.zeros(8, 3, 5, 5).to(memory_format=torch.channels_last), "hidden")
        (8, 75)
        >>> sides_in_memory(torch.zeros(4, 8).t(), "hidden")
        (4, 8)
    """
    shape, rows, columns = tuple(param.shape), *matrix.sides(tuple(param.shape), role)
    order = [dim for dim in order_of(param) if shape[dim] > 1]
    if role == "experts":
        last, first = len(shape) - 1, len(shape) - 2
        found = {(first, last): (rows, columns), (last, first): (columns, rows)}
        return found.get((order[-2], order[-1]))
    if order[0] == 0:
        return rows, columns
    return (columns, rows) if order[-1] == 0 else None


def stacked(items: Sequence[WorkItem]) -> tuple[dict[int, int], list[Stack]]:
    """Where the steps of hidden matrices lie in memory: number of an item -> its first number; and all stacks."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, item in enumerate(items):
        if matrix.is_matrix(tuple(item.param.shape), item.role):
            sides = sides_in_memory(item.param, item.role)
            assert sides is not None  # see `scheduled.ScheduledKernel.arranged`
            alike.setdefault(sides, []).append(number)
    places: dict[int, int] = {}
    stacks: list[Stack] = []
    place = 0
    for (rows, columns), members in alike.items():
        place = -(-place // ALIGNMENT) * ALIGNMENT
        start = place
        for number in members:
            places[number] = place
            place += items[number].param.numel()
        stacks.append(Stack(start, ((place - start) // (rows * columns), rows, columns)))
    return places, stacks


def size_of(stacks: Sequence[Stack]) -> int:
    """How many numbers the stacks take."""
    return max((stack.start + math.prod(stack.shape) for stack in stacks), default=0)


def orthogonalize(stacks: Sequence[Stack], steps: Tensor, found: Tensor) -> None:
    """Iterate on all matrices.

    Args:
        stacks: as `stacked` gives them.
        steps: (numbers) matrices of norm 1, in float32 or bfloat16. Products add up in float32 in either case.
        found: (numbers) like `steps`, which the result is written to.
    """
    with torch.autocast(steps.device.type, enabled=False):  # a step may be taken inside a training_step
        for start, shape in stacks:
            x, y = (memory[start : start + math.prod(shape)].view(shape) for memory in (steps, found))
            _iterate(x, y) if shape[1] <= shape[2] else _iterate(x.mT, y.mT)


def _iterate(x: Tensor, out: Tensor) -> None:
    """As `matrix.newton_schulz`, of matrices (n, rows, columns) of norm 1 with no more rows than columns."""
    a, b, c = matrix.QUINTIC
    if x.shape[2] >= 2 * x.shape[1]:
        product = _polynomial(torch.bmm(x, x.mT))
        torch.baddbmm(x, product, x, beta=a**ITERATIONS, out=out)
        return
    for number in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        last = number + 1 == ITERATIONS
        x = torch.baddbmm(x, factor, x, beta=a, out=out) if last else torch.baddbmm(x, factor, x, beta=a)


def _polynomial(gram: Tensor) -> Tensor:
    """P without a^2 on its diagonal, with P X = what the two iterations make of X, from X X^T (n, rows, rows)."""
    a, b, c = matrix.QUINTIC
    first = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # the factor of an iteration is a I + this
    half = torch.baddbmm(gram, gram, first, beta=a)
    gram = torch.baddbmm(half, half, first, beta=a)
    second = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(second, second, first, beta=a).add_(first, alpha=a)
