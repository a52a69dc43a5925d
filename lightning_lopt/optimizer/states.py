"""The state of each tensor: made at its first step, checked at every step, given to the rule as a NamedTuple."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.optimizer import safeguard as guard
from lightning_lopt.optimizer.gradients import dense_gradient, descent
from lightning_lopt.optimizer.groups import MovingTensor
from lightning_lopt.optimizer.runtime import Runtime
from lightning_lopt.optimizer.sharding import placed_like, tensor_scope, whole
from lightning_lopt.rules import UpdateRule, compute_dtype

States = dict[Tensor, dict[str, Tensor]]  # torch's `Optimizer.state`

# float32 counts up to 2^24 = 16,777,216 and then stands still.
STEP_DTYPE = torch.int64


class TensorStates:
    """The states of an optimizer's tensors, for one step."""

    def __init__(self, states: States, rule: UpdateRule, runtime: Runtime, *, safeguard: bool) -> None:
        self.states = states
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
            if self.states.get(tensor.param):
                self._check(tensor.param, name)
            elif not self._make(tensor):
                continue
            ready.append(tensor)
        return ready

    def flat(self, param: Tensor, step_dtype: torch.dtype = STEP_DTYPE) -> dict[str, Tensor]:
        """A parameter's state as the optimizer keeps it, with the step counter where and as it is needed."""
        flat = self.states[param]
        step = flat["step"]
        if step.device != param.device or step.dtype is not step_dtype:  # Lightning and torch leave it on the CPU
            flat["step"] = step.to(param.device, step_dtype)
        return flat

    def typed(self, param: Tensor) -> Any:
        """A parameter's state as its rule gave it."""
        flat = self.states[param]
        state_class = self.runtime.layout(self.rule, param, compute_dtype(param.dtype)).state_class
        return state_class(*(flat[name] for name in state_class._fields))

    def _make(self, tensor: MovingTensor) -> bool:
        """Make a state, and tell whether the tensor moves, too."""
        param, group, _ = tensor
        with tensor_scope(param):
            value, grad = descent(param, group)
            flat = self.states[param]
            flat["step"] = torch.zeros((), dtype=STEP_DTYPE, device=param.device)
            for name, field in self.rule.init_state(value)._asdict().items():
                flat[name] = placed_like(param, field, everywhere=name in self.rule.whole_state)
            if self.safeguard:
                flat.update(guard.new_counters(param.device))
            # torch.distributed.checkpoint creates states by a step with lr 0 and gradient 0, which must move nothing.
            return not (group["lr"] == 0 and whole(grad.abs().sum()) == 0)

    def _check(self, param: Tensor, name: Callable[[Tensor], str]) -> None:
        """Hot loop: keep it short."""
        grad = dense_gradient(param)
        flat = self.states[param]
        if grad.shape != param.shape:
            raise RuntimeError(
                f"The gradient of {name(param)} has shape {tuple(grad.shape)}. Call zero_grad() after a parameter was "
                "resized, and before the next backward()."
            )
        for field, shape in self.runtime.layout(self.rule, param, compute_dtype(param.dtype)).shapes.items():
            kept = flat.get(field)
            if kept is None or kept.shape != shape or kept.device != param.device:
                came = "missing" if kept is None else f"of shape {tuple(kept.shape)} on {kept.device}"
                raise RuntimeError(
                    f"State {field!r} of {name(param)} on {param.device} is {came}, but must have shape "
                    f"{tuple(shape)}. A parameter that was resized, moved or replaced needs a state that fits: resize "
                    "or move it, too, or delete optimizer.state[parameter] to start anew."
                )
