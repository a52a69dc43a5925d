"""The rule `scheduled` on the CPU: scheduled.cpp, called once a step for all tensors.

The decays and what the schedule knows of a shape come from the rule's own functions; the schedule itself is written
again in schedule.h. It is compiled for float32, and for float64 where there are such parameters. Those of lower
precision or another memory layout are copied to contiguous float32 and back.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.kernels import Squares
from lightning_lopt.kernels.cpu import tensors
from lightning_lopt.rules import Scheduled, scheduled, scheduler

# The constants and meta-parameters of schedule.h's Schedule, in its order
CONSTANTS = (
    *scheduler.FRACTIONS,
    *scheduler.LOG_STEPS,
    *scheduler.LOG_LENGTHS,
    scheduler.LARGEST_POWER,
    scheduled.DOUBT,
)
META_PARAMS = (
    *("schedule_fraction", "schedule_length", "schedule_early", "schedule_step"),
    *("tensor_powers", "momentum_mix", "growth", "centering", "caution"),
)
NUM_FLOATS = len(CONSTANTS) + sum(torch.Size(scheduled.SHAPES[name]).numel() for name in META_PARAMS)


class ScheduledKernel(tensors.TensorKernel):
    """The kernel of one rule."""

    rule_type = Scheduled
    rule: Scheduled
    source = Path(__file__).with_name("scheduled.cpp")
    dtypes = (torch.float32, torch.float64)
    moments = ("exp_avg", "exp_avg_sq")
    geometry_format = "2q5{number}"  # size, rows, limit, shape
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

    def geometry(self, param: Tensor, num_tensors: int | None) -> bytes:
        """What C++ knows of a parameter beside its addresses."""
        rows = param.shape[0] if param.dim() > 1 else 0
        features = scheduler.shape_features(param.shape, num_tensors)
        return self.geometry_struct.pack(param.numel(), rows, self.limits[param.dtype], *features)

    def total_squares(self, squares: array[float]) -> Squares:
        """The step's squares from those of its tensors."""
        change, nominal = (torch.tensor(sum(squares[i::2]), dtype=torch.float32, device="cpu") for i in (0, 1))
        return Squares(change, {"nominal": nominal})


supports = ScheduledKernel.supports
make = ScheduledKernel
