"""Fused kernels of update rules: a faster way to take the same steps.

A kernel is not a second definition of its rule: each is tested equal to it over at least 50 steps. It moves all tensors
on a device that it can handle in one call; `RuleOptimizer` moves the others by the rule itself.

`MODULES` names the module with the kernel for a kind of rule and a type of device, and `FALLBACKS` one in eager PyTorch
for where that cannot be had. A module is imported when it is first needed, and must define two functions:

* `supports(rule, dtype) -> str | None`: why this rule has no kernel on this machine for arithmetic in a dtype, float32
  or float64, None if it has one;
* `make(rule, dtype) -> Kernel`: a new kernel for a rule and a dtype that `supports` accepts.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_lopt.rules import UpdateRule

MODULES = {
    ("scheduled", "cpu"): "lightning_lopt.kernels.cpu.scheduled",
    ("scheduled", "cuda"): "lightning_lopt.kernels.cuda.scheduled",
    ("star", "cpu"): "lightning_lopt.kernels.cpu.star",
    ("hyperparam", "cpu"): "lightning_lopt.kernels.cpu.star",
    ("blackbox", "cpu"): "lightning_lopt.kernels.cpu.star",
}
FALLBACKS = {("scheduled", "cpu"): "lightning_lopt.kernels.eager.scheduled"}


class WorkItem(NamedTuple):
    """A kernel's argument for one tensor: param <- param + scale * delta - decay * param, with delta from the rule."""

    param: Tensor  # updated in place
    grad: Tensor  # dense, with the parameter's shape, dtype and device, and any strides
    state: dict[
        str, Tensor
    ]  # updated in place: "step" () int64, the fields of the rule's state, perhaps the skip counters
    scale: float | Tensor
    decay: float | Tensor
    maximize: bool  # negate the gradient
    role: str | None = None  # of the tensor in the net, one of `rules.matrix.ROLES`


class Squares(NamedTuple):
    """Sums of squares over all coordinates of a step's work items, () each."""

    change: Tensor  # of the parameters' change
    terms: dict[str, Tensor]  # of each term of the rule's delta, by its name in `rule.terms`


class Kernel(Protocol):
    """A fused implementation of one rule on one type of device; each optimizer has its own, which may keep tables."""

    def refuses(self, param: Tensor) -> str | None:
        """Why the rule itself must move this parameter (dtype, sharding), None if the kernel can. Cheap."""
        ...

    def step(
        self,
        work_items: Sequence[WorkItem],
        meta_params: Mapping[str, Tensor],
        num_steps: int | None,
        num_tensors: int | None = None,
        *,
        safeguard: bool,
        measure: bool,
    ) -> Squares | None:
        """Update the parameters and states of all work items.

        Args:
            work_items: at least one, each with its state; all for the arithmetic of this kernel.
            meta_params: in the dtype of the arithmetic, on the same device; the same object as long as they have not
                changed.
            num_steps: the length of the run, None if unknown.
            num_tensors: the number of tensors that the net trains, see `RuleOptimizer`; None if unknown.
            safeguard: if a tensor's gradient, new value or new state is not finite, leave the tensor, its state and its
                "step" unchanged and increment its state's "skipped" and "skipped_in_row". A finite step sets the latter
                to 0.
            measure: whether to return `Squares`, in which skipped tensors count as 0. If not, return None.
        """
        ...


def find(rule: UpdateRule, device_type: str, dtype: torch.dtype = torch.float32) -> Kernel | str:
    """A new kernel for a rule's tensors on a type of device ("cpu", "cuda"), or the reason why there is none.

    Args:
        rule: the update rule.
        device_type: of the tensors.
        dtype: of the arithmetic: float64 for float64 parameters, else float32.
    """
    if (rule.kind, device_type) not in MODULES:
        return f"there is no fused kernel for kind {rule.kind!r} on {device_type!r}"
    try:
        module = importlib.import_module(MODULES[rule.kind, device_type])
    except ImportError as error:
        # An installed library that lacks a part of itself, or a symbol, is a different matter: pip would not help.
        missing = isinstance(error, ModuleNotFoundError) and error.name is not None and "." not in error.name
        reason = f"needs {error.name}, which is not installed" if missing else f"cannot be imported: {error}"
        return f"the fused kernel for {device_type!r} {reason}"
    why: str | None = module.supports(rule, dtype)
    return why or module.make(rule, dtype)


def find_fallback(rule: UpdateRule, device_type: str) -> Kernel | None:
    """A new kernel in eager PyTorch, faster than the rule itself, for where `find` has none; None if there is none."""
    if (rule.kind, device_type) not in FALLBACKS:
        return None
    module = importlib.import_module(FALLBACKS[rule.kind, device_type])
    return None if module.supports(rule) else module.make(rule)


def exists(rule: UpdateRule, device_type: str | None = None) -> bool:
    """Whether rules of this kind have a kernel on a type of device, or on any type if that is None.

    This does not check that this machine can run the kernel, and imports nothing.
    """
    return any(kind == rule.kind and device_type in (None, device) for kind, device in MODULES)


_WARNED: set[str] = set()


def warn_once(why: str) -> None:
    """Warn that a rule moves tensors itself although its kind has a kernel; once per process and reason."""
    if why not in _WARNED:
        _WARNED.add(why)
        warnings.warn(
            f"RuleOptimizer falls back to eager PyTorch, which is many times slower: {why}. The steps differ by "
            "rounding only. Pass backend='reference' to choose eager PyTorch and silence this warning.",
            stacklevel=3,
        )
