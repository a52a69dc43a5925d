"""A step by fused kernels: which tensors have one, and one call for all that go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_lopt import kernels
from lightning_lopt.kernels import Kernel, WorkItem
from lightning_lopt.optimizer.groups import MovingTensor, lr_and_decay
from lightning_lopt.optimizer.metrics import Totals
from lightning_lopt.optimizer.runtime import Runtime
from lightning_lopt.optimizer.states import TensorStates, with_step
from lightning_lopt.rules import UpdateRule, compute_dtype

# (kernel, device, number of tensors that the net trains) -> work items
Calls = dict[tuple[Kernel, torch.device, int], list[WorkItem]]


class KernelChoice:
    """Which parameters a kernel moves.

    Args:
        rule: the update rule.
        runtime: has the kernels.
        must_exist: refuse parameters without a kernel: backend="fused".
        name: what to call a parameter in an error.
    """

    def __init__(self, rule: UpdateRule, runtime: Runtime, *, must_exist: bool, name: Callable[[Tensor], str]) -> None:
        self.rule = rule
        self.runtime = runtime
        self.must_exist = must_exist
        self.name = name

    def of(self, param: Tensor) -> Kernel | None:
        """The kernel that moves a parameter; None where the rule itself does, which is warned of or refused."""
        found = self.runtime.kernel(self.rule, param)
        if isinstance(found, str):
            why = found
        else:
            refused = found.refuses(param)
            if refused is None:
                return found
            why = refused
        if self.must_exist:
            raise ValueError(f"backend='fused' is missing for {self.name(param)}: {why}. Use 'auto' or 'reference'.")
        if not kernels.exists(self.rule, param.device.type):
            return None
        kernels.warn_once(why)
        return self.runtime.eager_kernel(self.rule, param) if isinstance(found, str) else None

    def is_fused(self, param: Tensor) -> bool:
        """Whether a compiled kernel moves a parameter; eager code does not count."""
        return self.of(param) is not None and not isinstance(self.runtime.kernel(self.rule, param), str)


def split(tensors: Iterable[MovingTensor], choice: KernelChoice) -> tuple[Calls, list[MovingTensor]]:
    """The calls of kernels that a step needs, and the tensors that the rule itself moves."""
    calls: Calls = {}
    others = []
    last = None
    for tensor in tensors:  # hot loop: keep it short
        param, grad, _, group, num_tensors, role, _ = tensor
        kernel = choice.of(param)
        if kernel is None:
            others.append(tensor)
            continue
        if group is not last:
            _, scale, decay = lr_and_decay(group)
            last = group
        item = WorkItem(param, grad, with_step(tensor), scale, decay, group["maximize"], role)
        calls.setdefault((kernel, param.device, num_tensors), []).append(item)
    return calls, others


def run(calls: Calls, states: TensorStates, totals: Totals | None) -> None:
    """Move the tensors of all calls, and their states with them.

    Args:
        calls: of the kernels.
        states: of the tensors.
        totals: sums of what the tensors do, in a step that is measured.
    """
    runtime = states.runtime
    for (kernel, device, num_tensors), items in calls.items():
        try:
            squares = kernel.step(
                items,
                runtime.meta_params(device, compute_dtype(items[0].param.dtype)),
                runtime.num_steps,
                num_tensors,
                safeguard=states.safeguard,
                measure=totals is not None,
            )
        except KeyError:  # a state that lacks a tensor: say whose
            for item in items:
                states.check(item.param, item.grad, item.state)
            raise
        if totals is not None and squares is not None:
            totals.add_squares(sum(item.param.numel() for item in items), *squares)
