"""The state of each tensor: made at its first step, checked at every step, given to the rule as a NamedTuple."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.kernels.mismatch import check_shapes
from lightning_lopt.optimizer import safeguard as guard
from lightning_lopt.optimizer.gradients import descent
from lightning_lopt.optimizer.groups import MovingTensor
from lightning_lopt.optimizer.runtime import Runtime
from lightning_lopt.optimizer.sharding import placed_like, tensor_scope, whole
from lightning_lopt.rules import UpdateRule

# float32 counts up to 2^24 = 16,777,216 and then stands still.
STEP_DTYPE = torch.int64


class TensorStates:
    """The states of an optimizer's tensors, for one step."""

    def __init__(self, rule: UpdateRule, runtime: Runtime, *, safeguard: bool) -> None:
        self.rule = rule
        self.runtime = runtime
        self.safeguard = safeguard

    def prepare(self, moving: Iterable[MovingTensor]) -> list[MovingTensor]:
        """Make the states that are missing. Returns the tensors that take a step."""
        return [tensor for tensor in moving if tensor.state or self._make(tensor)]

    def typed(self, param: Tensor, state: dict[str, Tensor]) -> Any:
        """A tensor's state as its rule gave it."""
        state_class = self.runtime.layout(self.rule, param).state_class
        return state_class(*(state[name] for name in state_class._fields))

    def _make(self, tensor: MovingTensor) -> bool:
        """Make a state, and tell whether the tensor moves, too."""
        param, grad, flat, group, *_ = tensor
        with tensor_scope(param):
            value, grad = descent(param, grad, maximize=group["maximize"])
            flat["step"] = torch.zeros((), dtype=STEP_DTYPE, device=param.device)
            for name, field in self.rule.init_state(value)._asdict().items():
                flat[name] = placed_like(param, field, everywhere=name in self.rule.whole_state)
            if self.safeguard:
                flat.update(guard.new_counters(param.device))
            # torch.distributed.checkpoint creates states by a step with lr 0 and gradient 0, which must move nothing.
            return not (group["lr"] == 0 and whole(grad.abs().sum()) == 0)

    def check(self, param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        """Raise a TensorMismatch for a gradient or a state that does not fit its parameter."""
        check_shapes(param, grad, state, self.runtime.layout(self.rule, param).shapes)


def with_step(tensor: MovingTensor) -> dict[str, Tensor]:
    """A tensor's state, its step counter on the parameter's device and in 64 bits."""
    step = tensor.state["step"]
    if step.dtype is not STEP_DTYPE or step.device != tensor.param.device:  # Lightning and torch leave it on the CPU
        tensor.state["step"] = step.to(tensor.param.device, STEP_DTYPE)
    return tensor.state
