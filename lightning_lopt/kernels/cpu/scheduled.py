"""The rule `scheduled` on the CPU: scheduled.cpp, called once a step for all tensors.

The decays and what the schedule knows of a shape come from the rule's own functions; the schedule itself is written
again in schedule.h. It is compiled for float32, and for float64 where there are such parameters. Those of lower
precision or another memory layout are copied to contiguous float32 and back. The steps of hidden matrices are written
to memory of their own, where `matrix.orthogonal` takes all of one shape together.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.kernels import Squares, WorkItem
from lightning_lopt.kernels.cpu import tensors
from lightning_lopt.rules import Scheduled, matrix, scheduled, scheduler

AT_ONCE = 1 << 24  # numbers of matrices that are made orthogonal together, which takes four times their memory
# The constants and meta-parameters of schedule.h's Schedule, in its order
CONSTANTS = (
    *scheduler.FRACTIONS,
    *scheduler.LOG_STEPS,
    *scheduler.LOG_LENGTHS,
    scheduler.LARGEST_POWER,
    scheduled.DOUBT,
    scheduled.USUAL,
    *scheduled.FLOORS,
)
META_PARAMS = (
    *("schedule_fraction", "schedule_length", "schedule_early", "schedule_step"),
    *("tensor_powers", "momentum_mix", "growth", "centering", "caution", "roles", "first_scale", "cap", "decay"),
)
NUM_FLOATS = len(CONSTANTS) + sum(torch.Size(scheduled.SHAPES[name]).numel() for name in META_PARAMS)


class ScheduledKernel(tensors.TensorKernel):
    """The kernel of one rule."""

    rule_type = Scheduled
    rule: Scheduled
    source = Path(__file__).with_name("scheduled.cpp")
    dtypes = (torch.float32, torch.float64)
    moments = ("exp_avg", "exp_avg_sq", "first_square")
    geometry_format = "2q8{number}i"  # size, rows, limit, shape, is_table
    squares_per_tensor = 2

    @staticmethod
    def macros(config: Any) -> tuple[str, ...]:
        """The numbers of knots."""
        return f"FRACTIONS={len(scheduler.FRACTIONS)}", f"LOG_STEPS={len(scheduler.LOG_STEPS)}"

    @staticmethod
    def own_fields(number: Any) -> list[tuple[str, Any]]:
        """As in schedule.h."""
        return [("schedule", number * NUM_FLOATS)]

    def pack(self, meta_params: Mapping[str, Tensor]) -> Any:
        """The rule as C++ reads it."""
        packed, decays = self.rule_struct(), self.rule.decays(meta_params)
        packed.momentum[:] = decays.momentum.tolist()
        packed.rms = float(decays.rms)
        packed.nominal = self.rule.config.nominal_stepsize
        learned = [value for name in META_PARAMS for value in meta_params[name].flatten().tolist()]
        packed.schedule[:] = [*CONSTANTS, *learned]
        return packed

    def geometry(self, item: WorkItem, num_tensors: int | None) -> bytes:
        """What C++ knows of a tensor beside its addresses."""
        param = item.param
        rows = param.shape[0] if param.dim() > 1 else 0
        features = scheduler.shape_features(param.shape, num_tensors)
        roles = scheduled.role_features(param.shape, item.role)
        is_table = scheduled.is_table(param.shape, item.role)
        return self.geometry_struct.pack(param.numel(), rows, self.limits[param.dtype], *features, *roles, is_table)

    def run(
        self,
        arguments: tuple[Any, ...],
        work_items: Sequence[WorkItem],
        values: Sequence[Tensor],
        meta_params: Mapping[str, Tensor],
        num_steps: int | None,
        squares: array[float],
    ) -> None:
        """Call C++, then make the steps of hidden matrices orthogonal and add them."""
        found = self._matrices(work_items)
        steps = array("q", bytes(8 * len(work_items)))
        stacks = []
        for shape, members in found.items():
            counts = torch.stack([work_items[index].state["step"] for index in members])
            share = scheduler.ramp(meta_params, "orthogonal", counts, num_steps)
            stack = torch.empty(len(members), *shape, dtype=self.dtype, device="cpu")
            for index, one in zip(members, stack, strict=True):
                steps[index] = one.data_ptr()
            stacks.append((members, share, stack))
        measured = [index for members in found.values() for index in members] if squares else []
        before = {index: values[index].clone() for index in measured}
        tensors.raise_unless_done(self.function(*arguments, steps.buffer_info()[0]))
        for members, share, stack in stacks:
            _add_orthogonal([values[index] for index in members], stack, share)
        for index, old in before.items():
            change, item = values[index] - old, work_items[index]
            squares[2 * index] = float(change.square().sum())
            nominal = (change + item.decay * old) / item.scale if item.scale else change
            squares[2 * index + 1] = float(nominal.square().sum())

    def _matrices(self, work_items: Sequence[WorkItem]) -> dict[tuple[int, ...], list[int]]:
        """(matrices, rows, columns) -> the numbers of the hidden matrices of that shape."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(work_items):
            shape = item.param.shape
            if item.role is not None and matrix.is_matrix(shape, item.role):
                rows, columns = matrix.sides(shape, item.role)
                alike.setdefault((shape.numel() // (rows * columns), rows, columns), []).append(index)
        return alike

    def total_squares(self, squares: array[float]) -> Squares:
        """The step's squares from those of its tensors."""
        change, nominal = (torch.tensor(sum(squares[i::2]), dtype=torch.float32, device="cpu") for i in (0, 1))
        return Squares(change, {"nominal": nominal})


def _add_orthogonal(values: Sequence[Tensor], stack: Tensor, share: Tensor) -> None:
    """Add the orthogonal steps of n parameters to them.

    Args:
        values: n contiguous tensors, of any shape.
        stack: (n, matrices, rows, columns) their steps.
        share: (n,) as for `matrix.orthogonal`.
    """
    number = max(1, AT_ONCE // stack[0].numel())
    for first in range(0, len(values), number):
        part, own_share = stack[first : first + number], share[first : first + number]
        orthogonal = matrix.orthogonal(part, own_share.reshape(-1, 1, 1, 1))
        for value, step in zip(values[first : first + number], orthogonal, strict=True):
            value.view(step.shape).add_(step)


supports = ScheduledKernel.supports
make = ScheduledKernel
