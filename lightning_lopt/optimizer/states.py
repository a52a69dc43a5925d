"""The state of each tensor: made at its first step, checked at every step, given to the rule as a NamedTuple."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

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

    def prepare(self, moving: Iterable[MovingTensor], name: Callable[[Tensor], str]) -> list[MovingTensor]:
        """Make states that are missing, and check all others, before anything is written.

        Args:
            moving: the tensors that have a gradient.
            name: what to call a parameter in an error.

        Returns:
            The tensors that take a step.

        Raises:
            RuntimeError: for a sparse gradient, and for a gradient or state that does not fit its parameter.
        """
        ready = []
        for tensor in moving:
            if tensor.state:
                self._check(tensor, name)
            elif not self._make(tensor):
                continue
            ready.append(tensor)
        return ready

    def typed(self, tensor: MovingTensor) -> Any:
        """A tensor's state as its rule gave it."""
        state_class = self.runtime.layout(self.rule, tensor.param).state_class
        return state_class(*(tensor.state[name] for name in state_class._fields))

    def _make(self, tensor: MovingTensor) -> bool:
        """Make a state, and tell whether the tensor moves, too."""
        param, grad, flat, group, _ = tensor
        with tensor_scope(param):
            value, grad = descent(param, grad, maximize=group["maximize"])
            flat["step"] = torch.zeros((), dtype=STEP_DTYPE, device=param.device)
            for name, field in self.rule.init_state(value)._asdict().items():
                flat[name] = placed_like(param, field, everywhere=name in self.rule.whole_state)
            if self.safeguard:
                flat.update(guard.new_counters(param.device))
            # torch.distributed.checkpoint creates states by a step with lr 0 and gradient 0, which must move nothing.
            return not (group["lr"] == 0 and whole(grad.abs().sum()) == 0)

    def _check(self, tensor: MovingTensor, name: Callable[[Tensor], str]) -> None:
        """Hot loop: keep it short."""
        param = tensor.param
        if tensor.grad.shape != param.shape:
            raise RuntimeError(
                f"The gradient of {name(param)} has shape {tuple(tensor.grad.shape)}. Call zero_grad() after a "
                "parameter was resized, and before the next backward()."
            )
        for field, shape in self.runtime.layout(self.rule, param).shapes.items():
            kept = tensor.state.get(field)
            if kept is None or kept.shape != shape:
                came = "missing" if kept is None else f"of shape {tuple(kept.shape)}"
                raise RuntimeError(
                    f"State {field!r} of {name(param)} is {came}, but must have shape {tuple(shape)}. A parameter that "
                    "was resized or replaced needs a state that fits: resize the state, too, or delete "
                    "optimizer.state[parameter] to start anew."
                )


def with_step(tensor: MovingTensor, dtype: torch.dtype = STEP_DTYPE) -> dict[str, Tensor]:
    """A tensor's state, its step counter on the parameter's device and in a dtype."""
    step = tensor.state["step"]
    if step.dtype is not dtype or step.device != tensor.param.device:  # Lightning and torch leave it on the CPU
        tensor.state["step"] = step.to(tensor.param.device, dtype)
    return tensor.state
