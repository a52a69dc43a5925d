"""Update a whole population of inner runs with the rule's kernel, in place; for unrolls that need no gradient."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lopt import kernels
from lightning_lopt.rules import UpdateRule


class Fused:
    """Updates P inner runs in place. One object serves one truncation.

    The first call copies the parameters and states that it is given, because the caller may still need them. Later
    calls get the copies back and update them where they lie. After a reset, which makes new tensors, they are copied
    again.

    Args:
        run_kernels: for each run, its kernel and its meta-parameters in float32.
        roles: name -> role of a parameter in the net, see `Task.roles`.
    """

    def __init__(
        self, run_kernels: list[tuple[kernels.Kernel, Mapping[str, Tensor]]], roles: Mapping[str, str]
    ) -> None:
        self.run_kernels = run_kernels
        self.roles = roles
        self.params: dict[str, Tensor] | None = None  # name -> (P, *shape), our own copy
        self.states: dict[str, Any] = {}  # name -> the rule's state of P runs, our own copy
        self.work_items: list[list[kernels.WorkItem]] = []  # per run and tensor; the gradient is filled in at each call

    def __call__(
        self,
        params: dict[str, Tensor],
        states: dict[str, Any],
        step: Tensor,
        grads: Mapping[str, Tensor],
        num_steps: Tensor | None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Apply one update to all runs.

        Args:
            params: name -> (P, *shape).
            states: name -> the rule's state, with a leading axis P.
            step: (P,) updates made so far.
            grads: name -> (P, *shape).
            num_steps: (P,) lengths of the runs, where they are known.
        """
        if params is not self.params or states is not self.states:
            self._copy(params, states, step)
        assert self.params is not None
        lengths = [None] * len(self.run_kernels) if num_steps is None else num_steps.long().tolist()
        run_grads = zip(*(grads[name].contiguous().unbind() for name in self.params), strict=True)
        for (kernel, meta_params), items, own_grads, length in zip(
            self.run_kernels, self.work_items, run_grads, lengths, strict=True
        ):
            with_grads = [item._replace(grad=grad) for item, grad in zip(items, own_grads, strict=True)]
            kernel.step(with_grads, meta_params, length, len(items), safeguard=False, measure=False)
        return self.params, self.states

    def _copy(self, params: Mapping[str, Tensor], states: Mapping[str, Any], step: Tensor) -> None:
        self.params = {name: _clone(param) for name, param in params.items()}
        self.states = {name: type(state)(*map(_clone, state)) for name, state in states.items()}
        # Kernels count the steps of each tensor, the unroll those of each run.
        counts = step.to(torch.int64).repeat(len(params), 1)
        self.work_items = [[] for _ in self.run_kernels]
        for number, (name, param) in enumerate(self.params.items()):
            fields = {field: values.unbind() for field, values in self.states[name]._asdict().items()}
            for run, (value, count) in enumerate(zip(param.unbind(), counts[number].unbind(), strict=True)):
                state = {"step": count, **{field: values[run] for field, values in fields.items()}}
                self.work_items[run].append(
                    kernels.WorkItem(value, value, state, 1.0, 0.0, maximize=False, role=self.roles.get(name))
                )


def fused(
    rule: UpdateRule,
    meta_params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    *,
    batched: bool,
    roles: Mapping[str, str],
) -> Fused | None:
    """Build the fused update of a population; None unless all is float32 on the CPU and the rule has a kernel there.

    Args:
        rule: the update rule.
        meta_params: of the rule, with a leading axis P if `batched`.
        frozen: the rule's other meta-parameters, the same for all runs.
        params: name -> (P, *shape), the parameters to be updated.
        batched: each run has its own meta-parameters.
        roles: name -> role of a parameter in the net, see `Task.roles`.
    """
    tensors = [*params.values(), *meta_params.values(), *frozen.values()]
    if any(tensor.device.type != "cpu" or tensor.dtype is not torch.float32 for tensor in tensors):
        return None
    kernel = kernels.find(rule, "cpu")
    if isinstance(kernel, str) or any(kernel.refuses(param[0]) for param in params.values()):
        return None
    population = len(next(iter(params.values())))
    if not batched:
        return Fused([(kernel, {**frozen, **meta_params})] * population, roles)
    # A kernel packs its meta-parameters once and reuses them as long as it gets the same ones. So each run has a kernel
    # of its own: a shallow copy, since `find` looks for the compiler every time.
    own = [{**frozen, **{name: value[run] for name, value in meta_params.items()}} for run in range(population)]
    return Fused([(copy.copy(kernel), own_params) for own_params in own], roles)


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
