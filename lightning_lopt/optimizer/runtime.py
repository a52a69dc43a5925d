"""What a RuleOptimizer keeps beside torch's own attributes."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_lopt import kernels
from lightning_lopt.optimizer.metrics import StepMetrics
from lightning_lopt.rules import UpdateRule, compute_dtype


class LossSource(Protocol):
    """Gives the loss of the current step, None where it has seen none."""

    def __call__(self) -> Tensor | None: ...  # noqa: D102

    def reset(self) -> None: ...  # noqa: D102


class StateLayout(NamedTuple):
    """What a rule's state looks like for a tensor of one shape."""

    state_class: Any  # the NamedTuple
    shapes: dict[str, torch.Size]


class Runtime:
    """What a RuleOptimizer keeps beside torch's own attributes, in one object.

    Lightning and Fabric wrap optimizers in an object through which reads fall through to ours but writes do not:
    mutable state must sit in a container. None of it belongs in a checkpoint.
    """

    def __init__(self) -> None:
        self.num_steps: int | None = None
        self.steps = 0
        self.measure_next = False
        self.metrics: StepMetrics | None = None
        self.loss_source: LossSource | None = None
        self.names = WeakTensorKeyDictionary()  # of parameters, for rules with needs_names
        self.roles = WeakTensorKeyDictionary()  # of parameters in the net, told from modules
        self.roles_by_name = WeakTensorKeyDictionary()  # the same from names, for what is not in `roles`
        self.constants: dict[Any, Any] = {}  # see `rules.constants`
        self._meta_params: dict[Any, dict[str, Tensor]] = {}  # (device, dtype) -> copies
        self._read: dict[str, Tensor] = {}  # the meta-parameters that these are copies of, as they were
        self._layouts: dict[Any, StateLayout] = {}
        self._kernels: dict[Any, kernels.Kernel | str] = {}  # (type of device, dtype) -> kernel, or why there is none
        self._eager_kernels: dict[str, kernels.Kernel | None] = {}

    def name(self, param: Tensor, groups: Iterable[dict[str, Any]]) -> str:
        """A parameter's name: what was told, or that of a group that was made with names."""
        if param not in self.names:
            for group in (group for group in groups if "param_names" in group):
                for own, name in zip(group["params"], group["param_names"], strict=True):
                    self.names[own] = name
        if param not in self.names:
            raise RuntimeError(
                f"The rule looks at names, and that of a parameter of shape {tuple(param.shape)} is unknown. "
                "Make the optimizer from model.named_parameters(), or call set_names(model.named_parameters())."
            )
        return cast(str, self.names[param])

    def role(self, param: Tensor) -> str | None:
        """A parameter's role in the net, None if it is unknown."""
        known = self.roles if param in self.roles else self.roles_by_name
        return cast(str, known[param]) if param in known else None

    def kernel(self, rule: UpdateRule, param: Tensor) -> kernels.Kernel | str:
        """The kernel for a parameter's type of device and dtype, or why there is none."""
        key = (param.device.type, compute_dtype(param.dtype))
        if key not in self._kernels:
            self._kernels[key] = kernels.find(rule, *key)
        return self._kernels[key]

    def eager_kernel(self, rule: UpdateRule, param: Tensor) -> kernels.Kernel | None:
        """Faster eager code than the rule's own, if there is any for a parameter."""
        device_type = param.device.type
        if device_type not in self._eager_kernels:
            self._eager_kernels[device_type] = kernels.find_fallback(rule, device_type)
        found = self._eager_kernels[device_type]
        return None if found is None or found.refuses(param) else found

    def layout(self, rule: UpdateRule, param: Tensor) -> StateLayout:
        """What the rule's state of a parameter looks like."""
        key = (param.shape, param.dtype)
        found = self._layouts.get(key)
        if found is None:
            state = rule.init_state(torch.empty(param.shape, dtype=compute_dtype(param.dtype), device="meta"))
            found = StateLayout(type(state), {name: t.shape for name, t in state._asdict().items()})
            self._layouts[key] = found
        return found

    def read_meta_params(self, rule: UpdateRule) -> None:
        """Look, once a step, whether the meta-parameters have changed, and forget what was made of the old ones.

        Rules lie on the CPU as a rule, where their few numbers are compared: versions do not tell of a change through
        `.data`, and tensors that were made in inference mode have none. Elsewhere a comparison would wait for the
        device, so that they are taken anew at each step.
        """
        now = rule.meta_params()
        if now.keys() != self._read.keys() or not all(map(_is_same, now.values(), self._read.values())):
            self._meta_params.clear()
            self.constants.clear()
            self._read = {name: p.detach().clone() for name, p in now.items()}

    def meta_params(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The meta-parameters on a device in a dtype; the same object until they change."""
        key = (device, dtype)
        if key not in self._meta_params:
            with torch.inference_mode(False):
                self._meta_params[key] = {name: p.to(device, dtype, copy=True) for name, p in self._read.items()}
        return self._meta_params[key]


def checked_num_steps(num_steps: Any) -> int | None:
    """A run's length as an int, or None for unknown; a ValueError for anything else."""
    if num_steps is None:
        return None
    is_whole = isinstance(num_steps, float) and num_steps.is_integer()
    try:
        number = int(num_steps) if is_whole else operator.index(num_steps)
    except TypeError:
        number = 0
    if number < 1 or isinstance(num_steps, bool):
        raise ValueError(
            f"num_steps={num_steps!r} is not allowed: it must be the number of optimizer steps of the run, an integer "
            ">= 1, or None if it is unknown."
        )
    return number


def _is_same(param: Tensor, before: Tensor) -> bool:
    return param.is_cpu and param.dtype is before.dtype and torch.equal(param, before)
