"""Parameter groups: what a RuleOptimizer keeps in them, and which of their tensors move in a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

Group = dict[str, Any]

# Parallel to a group's "params", as torch's "param_names" is: for each tensor how many tensors the net trained when it
# moved for the first time, None before that.
NUM_TENSORS = "lopt_num_tensors"


class MovingTensor(NamedTuple):
    """A parameter that has a gradient in this step."""

    param: Tensor
    group: Group
    num_tensors: int  # see `RuleOptimizer`


def moving_tensors(groups: Iterable[Group]) -> list[MovingTensor]:
    """The parameters that have a gradient; those that move for the first time get their number of tensors."""
    groups = list(groups)
    moving = []
    count = None
    for group in groups:
        params = group["params"]
        numbers = group.get(NUM_TENSORS, ())
        if len(numbers) != len(params):  # a group that is new, or whose list of parameters was changed by hand
            group[NUM_TENSORS] = numbers = [None] * len(params)
        for index, param in enumerate(params):
            if param.grad is None or not param.numel():
                continue
            if numbers[index] is None:
                count = count_trainable(groups) if count is None else count
                numbers[index] = count
            moving.append(MovingTensor(param, group, numbers[index]))
    return moving


def count_trainable(groups: Iterable[Group]) -> int:
    """How many tensors train: those that require a gradient, or were given one by hand, and are not empty."""
    return sum(_is_trainable(param) for group in groups for param in group["params"])


def _is_trainable(param: Tensor) -> bool:
    return (param.requires_grad or param.grad is not None) and (is_lazy(param) or param.numel() > 0)
