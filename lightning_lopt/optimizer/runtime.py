"""What a RuleOptimizer keeps beside torch's own attributes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lightning_lopt import kernels
from lightning_lopt.kernels.eager import star as eager_star
from lightning_lopt.optimizer.metrics import StepMetrics, Totals
from lightning_lopt.optimizer.trust_band import TrustBand
from lightning_lopt.rules import STAR, UpdateRule


class LossSource(Protocol):
    """Gives the loss of the current step, None where it has seen none."""

    def __call__(self) -> Tensor | None: ...  # noqa: D102

    def reset(self) -> None: ...  # noqa: D102


class Runtime:
    """What a RuleOptimizer keeps beside torch's own attributes, in one object.

    Lightning wraps optimizers in an object through which reads fall through to ours but writes do not: mutable state
    must sit in a container. Nothing in it belongs into a checkpoint.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.measure_next = False
        self.totals: Totals | None = None
        self.measurements: StepMetrics | None = None
        self.loss_source: LossSource | None = None
        self.names: dict[Tensor, str] = {}  # of parameters, for rules with needs_names
        self.trust: TrustBand | None = None  # after this step's loss, with safeguard="fallback"
        self._meta_params: dict[Any, tuple[Any, list[Tensor], dict[str, Tensor]]] = {}
        self._kernels: dict[str, kernels.Kernel | str] = {}
        self._torch_kernel: kernels.Kernel | None = None
        self._state_class: Any = None

    def name(self, param: Tensor, groups: Iterable[dict[str, Any]]) -> str:
        """A parameter's name: what was told, or that of a group that was made with names."""
        if param not in self.names:
            for group in (group for group in groups if "param_names" in group):
                self.names.update(zip(group["params"], group["param_names"], strict=True))
        if param not in self.names:
            raise RuntimeError(
                f"The rule chooses networks by name, and that of a parameter of shape {tuple(param.shape)} is unknown. "
                "Make the optimizer from model.named_parameters(), or call set_names(model.named_parameters())."
            )
        return self.names[param]

    def kernel(self, rule: UpdateRule, device_type: str) -> kernels.Kernel | str:
        """The kernel for the rule's tensors on a type of device, or why there is none."""
        if device_type not in self._kernels:
            self._kernels[device_type] = kernels.find(rule, device_type)
        return self._kernels[device_type]

    def torch_kernel(self, rule: UpdateRule, param: Tensor) -> kernels.Kernel | None:
        """Faster torch code than the rule's own, if there is any for a parameter."""
        if param.device.type != "cpu" or not eager_star.supports(rule):
            return None
        if self._torch_kernel is None:
            self._torch_kernel = eager_star.TorchStar(cast(STAR, rule))
        return None if self._torch_kernel.refuses(param) else self._torch_kernel

    def state_class(self, rule: UpdateRule) -> Any:
        """The NamedTuple type of the rule's state."""
        if self._state_class is None:
            self._state_class = type(rule.init_state(torch.zeros(1)))
        return self._state_class

    def meta_params(self, rule: UpdateRule, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The rule's meta-parameters on a device in a dtype; copied anew only after they have changed."""
        params = rule.meta_params()
        stamp = tuple((p.data_ptr(), p._version) for p in params.values())
        key = (device, dtype)
        if key not in self._meta_params or self._meta_params[key][0] != stamp:
            sources = [p.detach() for p in params.values()]  # held, so that their addresses are not used again
            self._meta_params[key] = stamp, sources, {k: v.detach().to(device, dtype) for k, v in params.items()}
        return self._meta_params[key][2]
