"""Fast paths of update rules. They are no second definition: each is tested equal to its rule over at least 50 steps.

A kernel moves all tensors of one device that it takes in one call; the optimizer moves the others by the rule itself.
`MODULES` says which module has the kernel of a kind on a type of device. It is imported when it is first needed, and
offers two functions:

* `supports(rule) -> str | None`: why there is no kernel for this rule on this machine, None if there is one;
* `make(rule) -> Kernel`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from lightning_lopt.rules import UpdateRule

MODULES = {(kind, "cpu"): "lightning_lopt.kernels.cpu.star" for kind in ("star", "hyperparam", "blackbox")}
MODULES |= {(kind, "cuda"): "lightning_lopt.kernels.cuda.star" for kind in ("star", "hyperparam", "blackbox")}
MODULES |= {("scheduled", "cuda"): "lightning_lopt.kernels.cuda.scheduled"}
MODULES |= {("lstm", "cuda"): "lightning_lopt.kernels.cuda.lstm"}
for _kind in ("mng", "k_timesteps", "k_momentums", "multiscale_adam"):
    MODULES[_kind, "cpu"] = "lightning_lopt.kernels.cpu.history"


class WorkItem(NamedTuple):
    """One tensor's part in a step: value <- value + scale * delta - decay * value, delta from the rule."""

    param: Tensor  # changed in place
    grad: Tensor  # dense, the parameter's shape, dtype and device; any strides
    state: dict[str, Tensor]  # changed in place: "step" (), the fields of the rule's state; maybe the skip counters
    scale: float | Tensor
    decay: float | Tensor
    maximize: bool  # the gradient counts negated


class Squares(NamedTuple):
    """Sums of squares over all coordinates of a step's parts, () each."""

    change: Tensor  # of the parameters' change
    terms: dict[str, Tensor]  # of the terms of the rule's delta, by their names in `rule.terms`


class Kernel(Protocol):
    """A fast path of one rule on one type of device; made once for an optimizer, so that it may keep tables."""

    def refuses(self, param: Tensor) -> str | None:
        """Why this parameter is left to the rule itself (dtype, sharding), None if the kernel takes it. Cheap."""
        ...

    def step(
        self,
        parts: Sequence[WorkItem],
        meta_params: Mapping[str, Tensor],
        num_steps: int | None,
        num_tensors: int | None = None,
        *,
        safeguard: bool,
        measure: bool,
    ) -> Squares | None:
        """Move all parts, and their states with them.

        Args:
            parts: at least one tensor, each with its state.
            meta_params: float32 on the parts' device; the same object as long as they have not changed.
            num_steps: the run's length, where known.
            num_tensors: how many tensors move in this step, those without the kernel too.
            safeguard: leave a tensor, its state and its "step" as they are where gradient, new value or new state is
                not finite, and count that in its state's "skipped" and "skipped_in_row" (which a good step sets to 0).
            measure: whether to return `Squares`; skipped tensors count nothing. None otherwise.
        """
        ...


def find(rule: UpdateRule, device_type: str) -> Kernel | str:
    """The kernel for a rule's tensors on a type of device ("cpu", "cuda"), or why there is none."""
    if (rule.kind, device_type) not in MODULES:
        return f"there is no fused kernel for kind {rule.kind!r} on {device_type!r}"
    try:
        module = importlib.import_module(MODULES[rule.kind, device_type])
    except ImportError as error:
        return f"the fused kernel for {device_type!r} needs {error.name}, which is not installed"
    why: str | None = module.supports(rule)
    return why or module.make(rule)


def exists(rule: UpdateRule, device_type: str | None = None) -> bool:
    """Whether rules of this kind have a kernel on a type of device, or on any; not, whether this machine can run it."""
    return any(kind == rule.kind and device_type in (None, device) for kind, device in MODULES)


_WARNED: set[str] = set()


def warn_once(why: str) -> None:
    """Say, once a process and reason, that tensors are moved by the rule itself though their kind has a kernel."""
    if why not in _WARNED:
        _WARNED.add(why)
        warnings.warn(
            f"RuleOptimizer takes its torch path, which is many times slower: {why}. Steps are the same but for "
            "rounding. backend='reference' asks for this path, and silences this.",
            stacklevel=3,
        )
