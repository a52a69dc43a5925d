"""Parameter groups: what a RuleOptimizer keeps in them, and which of their tensors move in a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_lopt.optimizer.gradients import dense

Group = dict[str, Any]

# Parallel to a group's "params", as torch's "param_names" is: for each tensor, how many tensors the net trained when it
# moved for the first time; None before that.
NUM_TENSORS = "lopt_num_tensors"
_LR_KEYS = ("max_lr", "initial_lr", "lr")  # where a group's reference learning rate is found, in this order
_DROPPED_KEYS = ("params", "fused", "foreach", "capturable", "differentiable", NUM_TENSORS)


class MovingTensor(NamedTuple):
    """A parameter that has a gradient in this step."""

    param: Tensor
    grad: Tensor  # dense
    state: dict[str, Tensor]  # empty before the first step
    group: Group
    num_tensors: int  # see `RuleOptimizer`


def moving_tensors(groups: Iterable[Group], states: Mapping[Tensor, dict[str, Tensor]]) -> list[MovingTensor]:
    """The parameters that have a gradient; those that move for the first time get their number of tensors.

    Args:
        groups: the optimizer's `param_groups`.
        states: its `state`.
    """
    groups = list(groups)
    moving = []
    count = None
    for group in groups:
        params = group["params"]
        numbers = group.get(NUM_TENSORS, ())
        if len(numbers) != len(params):  # a group that is new, or whose list of parameters was changed by hand
            group[NUM_TENSORS] = numbers = [None] * len(params)
        for index, param in enumerate(params):
            grad = param.grad
            if grad is None or not param.numel():
                continue
            if numbers[index] is None:
                count = count_trainable(groups) if count is None else count
                numbers[index] = count
            moving.append(MovingTensor(param, dense(grad), states[param], group, numbers[index]))
    return moving


def waiting_tensors(
    groups: Iterable[Group], states: Mapping[Tensor, dict[str, Tensor]]
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The parameters that have moved before and have no gradient now, each with its state."""
    params = (param for group in groups for param in group["params"] if param.grad is None)
    return [(param, states[param]) for param in params if param in states and states[param]]


def count_trainable(groups: Iterable[Group]) -> int:
    """How many tensors train: those that require a gradient, or were given one by hand, and are not empty."""
    return sum(_is_trainable(param) for group in groups for param in group["params"])


def lr_and_decay(group: Group) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
    """A group's lr, and what multiplies its rule's delta and its weight decay: scale and decay of a step.

    The step is `param <- param + scale * delta - decay * param`.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.squeeze()  # torch's own optimizers take an lr of shape (1,), too
    base = group["lopt_base_lr"]
    scale = 1.0 if base is None else lr / base
    decay = lr * group["weight_decay"] if group["lopt_decay"] and group["weight_decay"] else 0.0
    return lr, scale, decay


def kept_keys(group: Group) -> Group:
    """The keys of another optimizer's group that are kept for those who read them, such as schedulers."""
    return {name: value for name, value in group.items() if name not in _DROPPED_KEYS}


def largest_lr(groups: Iterable[Group]) -> float:
    """The largest max_lr, initial_lr or lr of the groups; 1 if none is above 0."""
    found = (next((float(g[key]) for key in _LR_KEYS if g.get(key) is not None), 1.0) for g in groups)
    return max(found, default=0.0) or 1.0


def _is_trainable(param: Tensor) -> bool:
    return (param.requires_grad or param.grad is not None) and (is_lazy(param) or param.numel() > 0)
