"""Steps in eager PyTorch on the CPU, for where no C++ kernel can be compiled: far faster than the rule itself."""

from __future__ import annotations

from lightning_lopt.kernels.eager.scheduled import ScheduledStacks
from lightning_lopt.kernels.eager.stacks import StackKernel
from lightning_lopt.kernels.eager.star import StarStacks, has_option_of_whole_tensors
from lightning_lopt.rules import STAR, Scheduled, UpdateRule


def find(rule: UpdateRule) -> StackKernel | None:
    """A step in eager PyTorch for this rule's tensors on the CPU, None if there is none."""
    if type(rule) is Scheduled:
        return ScheduledStacks(rule)
    if type(rule) is STAR and not has_option_of_whole_tensors(rule.config):
        return StarStacks(rule)
    return None
