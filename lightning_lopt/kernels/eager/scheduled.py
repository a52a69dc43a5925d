"""The rule `scheduled` in eager PyTorch, for where no kernel can be compiled.

The math is that of rules/scheduled.py, whose functions it calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_lopt.kernels.eager.stacks import Chunk, Look, Stack, StackKernel, cut
from lightning_lopt.rules import scheduled, scheduler


class ScheduledStacks(StackKernel):
    """See `kernels.Kernel`."""

    fields = ("exp_avg", "exp_avg_sq")

    def look(self, stack: Stack, meta: Mapping[str, Tensor], num_steps: int | None, num_tensors: int | None) -> Look:
        """Center the gradients, and find the multipliers from means over the tensors."""
        return _ScheduledLook(self, stack, meta, num_steps, num_tensors)

    def term_names(self) -> list[str]:
        """The names of `Look.terms`."""
        return ["nominal"]


class _ScheduledLook(Look):
    def __init__(
        self,
        kernel: ScheduledStacks,
        stack: Stack,
        meta: Mapping[str, Tensor],
        num_steps: int | None,
        num_tensors: int | None,
    ) -> None:
        self.kernel, self.stack, self.decays = kernel, stack, kernel.decays(meta)
        fraction = scheduler.ramp(meta, "centering", stack.step, num_steps)
        stack.grad = torch.func.vmap(scheduled.centered)(stack.grad.squeeze(1), fraction).unsqueeze(1)

        count = len(stack.parts)
        sums = torch.zeros(count, 4, dtype=torch.float32, device="cpu")
        self.finite = torch.zeros(count, dtype=torch.float32, device="cpu")
        for chunk in stack.chunks:
            x = self._moments(chunk)
            rows = torch.cat([cut(stack.param, chunk), x[:, :3] * x[:, 4:]], 1)
            sums += rows.flatten(2).square().sum(2)
            self.finite += x[:, :4].flatten(1).sum(1)
        self.only = x if len(stack.chunks) == 1 else None
        self.kept = None if self.only is None else (x[:, :3], x[:, 3:4])
        self.state = {}

        shape = torch.tensor([scheduler.shape_features(stack.shape, num_tensors)], dtype=torch.float32, device="cpu")
        found = scheduled.multipliers(
            meta, sums / math.prod(stack.shape), shape.expand(count, -1), stack.step, num_steps, self.decays
        )
        self.stepsize = stack.per_tensor(-kernel.rule.config.nominal_stepsize * found.factor)
        self.weights = found.momenta.expand(count, 3).unsqueeze(1)
        self.caution = stack.per_tensor(scheduler.ramp(meta, "caution", stack.step, num_steps))

    def _moments(self, chunk: Chunk) -> Tensor:
        """(T, 5, *chunk): new momenta, new second moment, and its inverse root."""
        grad = cut(self.stack.grad, chunk)
        x = self.kernel.room((len(grad), 5, *grad.shape[2:]))
        self.stack.fold(self.decays, chunk, x[:, :3], x[:, 3:4])
        torch.add(x[:, 3:4], self.kernel.rule.config.eps, out=x[:, 4:]).rsqrt_()
        return x

    def terms(self, chunk: Chunk) -> dict[str, Tensor]:
        """The whole step: it is the `nominal` term."""
        x = self._moments(chunk) if self.only is None else self.only
        grad = cut(self.stack.grad, chunk)
        mixed = self.weights @ x[:, :3].flatten(2)
        direction = mixed.reshape(grad.shape) * x[:, 4:]
        return {"nominal": scheduled.cautious(direction, grad, self.caution) * self.stepsize}
