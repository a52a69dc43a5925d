"""Parameter groups: what a RuleOptimizer keeps in them, and which of their tensors move in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_lopt.optimizer.gradients import dense
from lightning_lopt.rules import matrix

Group = dict[str, Any]

# Parallel to a group's "params", as torch's "param_names" is: for each tensor, how many tensors the net trained when it
# moved for the first time; None before that.
NUM_TENSORS = "lopt_num_tensors"
# Likewise: the role of each tensor in the net, as it was known when the tensor moved for the first time.
ROLES = "lopt_roles"
UNKNOWN = "unknown"
# Steps that a group was given so far, which the host knows without asking a device.
STEPS = "lopt_steps"
_LR_KEYS = ("max_lr", "initial_lr", "lr")  # where a group's reference learning rate is found, in this order
_DROPPED_KEYS = ("params", "fused", "foreach", "capturable", "differentiable", NUM_TENSORS, ROLES, STEPS)


class MovingTensor(NamedTuple):
    """A parameter that has a gradient in this step."""

    param: Tensor
    grad: Tensor  # dense
    state: dict[str, Tensor]  # empty before the first step
    group: Group
    num_tensors: int  # see `RuleOptimizer`
    role: str | None  # one of `rules.matrix.ROLES`
    known_step: int  # 0 at the tensor's first step, and then the steps of its group so far


def moving_tensors(
    groups: Iterable[Group], states: Mapping[Tensor, dict[str, Tensor]], role_of: Callable[[Tensor], str | None]
) -> list[MovingTensor]:
    """The parameters that have a gradient; those that move for the first time get their number of tensors and role.

    Args:
        groups: the optimizer's `param_groups`.
        states: its `state`.
        role_of: tensor -> its role, None if it is unknown; a group's own "role" comes first.
    """
    groups = list(groups)
    moving = []
    count = None
    for group in groups:
        params = group["params"]
        numbers = group.get(NUM_TENSORS, ())
        if len(numbers) != len(params):  # a group that is new, or whose list of parameters was changed by hand
            group[NUM_TENSORS] = numbers = [None] * len(params)
        if len(group.get(ROLES, ())) != len(params):
            group[ROLES] = [None] * len(params)
        own_roles = group[ROLES]
        steps, group[STEPS] = group.get(STEPS, 0), group.get(STEPS, 0) + 1
        for index, param in enumerate(params):
            grad = param.grad
            if grad is None or not param.numel():
                continue
            is_first = numbers[index] is None
            if is_first:
                count = count_trainable(groups) if count is None else count
                numbers[index] = count
            role = own_roles[index]
            if role is None:
                role = own_roles[index] = group.get("role") or role_of(param) or UNKNOWN
            known = None if role == UNKNOWN else role
            known_step = 0 if is_first else steps
            moving.append(MovingTensor(param, dense(grad), states[param], group, numbers[index], known, known_step))
    return moving


def check_role(group: Group) -> None:
    """Raise a ValueError if a group's "role" is not one that there is."""
    if (role := group.get("role")) is not None and role not in matrix.ROLES:
        raise ValueError(f"role={role!r} of a parameter group is not allowed: use one of {list(matrix.ROLES)}.")


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
    scale = group["lopt_strength"] * group.get("strength", 1.0) * (1.0 if base is None else lr / base)
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
