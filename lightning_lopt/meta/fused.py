"""Updates of a whole population by the rule's kernel, in place: for runs through which nobody backpropagates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lopt import kernels
from lightning_lopt.rules import UpdateRule


class Fused:
    """Moves P inner runs by the kernel, which writes where they lie; made anew for each truncation.

    Args:
        each: run by run, its kernel and meta-parameters in float32; a kernel of its own where these differ, for it
            keeps tables of them.
        params: name -> (P, *shape), copied.
        states: name -> the rule's state, of (P, ...) each; copied.
        step: (P,) updates made so far.
    """

    def __init__(
        self,
        each: list[tuple[kernels.Kernel, Mapping[str, Tensor]]],
        params: Mapping[str, Tensor],
        states: Mapping[str, Any],
        step: Tensor,
    ) -> None:
        self.each = each
        self._take(params, states, step)

    def _take(self, params: Mapping[str, Tensor], states: Mapping[str, Any], step: Tensor) -> None:
        self.params = {name: _own(param) for name, param in params.items()}
        self.states = {name: type(state)(*map(_own, state)) for name, state in states.items()}
        steps = step.to(torch.float32).repeat(len(params), 1)  # the kernel counts for each tensor
        self.parts: list[list[kernels.WorkItem]] = [[] for _ in self.each]  # without their gradients
        for number, (name, param) in enumerate(self.params.items()):
            fields = {key: value.unbind() for key, value in self.states[name]._asdict().items()}
            for run, (own, count) in enumerate(zip(param.unbind(), steps[number].unbind(), strict=True)):
                state = {"step": count, **{key: values[run] for key, values in fields.items()}}
                self.parts[run].append(kernels.WorkItem(own, own, state, 1.0, 0.0, False))

    def __call__(
        self,
        params: dict[str, Tensor],
        states: dict[str, Any],
        step: Tensor,
        grads: Mapping[str, Tensor],
        num_steps: Tensor | None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One update of all runs; params and states that are not those of the last call are taken over first."""
        if params is not self.params or states is not self.states:
            self._take(params, states, step)
        lengths = [None] * len(self.each) if num_steps is None else num_steps.long().tolist()
        of_runs = zip(*(grads[name].contiguous().unbind() for name in self.params), strict=True)
        for (kernel, meta_params), parts, own, length in zip(self.each, self.parts, of_runs, lengths, strict=True):
            moved = [part._replace(grad=grad) for part, grad in zip(parts, own, strict=True)]
            kernel.step(moved, meta_params, length, len(parts), safeguard=False, measure=False)
        return self.params, self.states


def fused(
    rule: UpdateRule,
    meta_params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    batched: bool,
    params: Mapping[str, Tensor],
    states: Mapping[str, Any],
    step: Tensor,
) -> Fused | None:
    """What moves these runs; None where they are not on the CPU in float32, or it has no kernel for the rule.

    Args:
        rule: whose kernel is wanted.
        meta_params: of the rule, with a leading axis P if `batched`.
        frozen: the rule's other meta-parameters, one set for all runs.
        batched: one set of meta-parameters per run.
        params: name -> (P, *shape).
        states: name -> the rule's state.
        step: (P,) updates made so far.
    """
    tensors = [*params.values(), *meta_params.values(), *frozen.values()]
    if any(tensor.device.type != "cpu" or tensor.dtype is not torch.float32 for tensor in tensors):
        return None
    each: list[tuple[kernels.Kernel, Mapping[str, Tensor]]] = []
    for run in range(len(step) if batched else 1):
        kernel = kernels.find(rule, "cpu")
        if isinstance(kernel, str) or any(kernel.refuses(param[0]) for param in params.values()):
            return None
        own = {name: value[run] for name, value in meta_params.items()} if batched else meta_params
        each.append((kernel, {**frozen, **own}))
    return Fused(each if batched else each * len(step), params, states, step)


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
