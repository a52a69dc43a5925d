"""The rule `scheduled` on the CPU: scheduled.cpp, called once a step for all tensors.

The decays and what the schedule knows of a shape come from the rule's own functions; the schedule itself is written
again in schedule.h. Parameters of lower precision or another memory layout are copied to contiguous float32 and back.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_lopt.kernels import Kernel, Squares
from lightning_lopt.kernels.cpu import build, tensors
from lightning_lopt.rules import Scheduled, UpdateRule, scheduled, scheduler

SOURCE = Path(__file__).with_name("scheduled.cpp")
MOMENTS = ("exp_avg", "exp_avg_sq")
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
GEOMETRY = struct.Struct("2q5f4x")  # size, rows, limit, shape


def supports(rule: UpdateRule) -> str | None:
    """Why there is no kernel for this rule on this machine, None if there is one. The first call compiles it."""
    if type(rule) is not Scheduled:
        return f"{type(rule).__name__} is not the class that the kernel was written for"
    library = _library(rule)
    return library if isinstance(library, str) else None


def make(rule: UpdateRule) -> Kernel:
    """The kernel of a rule that `supports` has let pass."""
    assert isinstance(rule, Scheduled)
    library = _library(rule)
    assert not isinstance(library, str)
    tensors.check_layout(library, "scheduled_layout", ctypes.sizeof(_Rule), GEOMETRY.size)
    return ScheduledKernel(rule, library.scheduled_step)


def _library(rule: Scheduled) -> ctypes.CDLL | str:
    knots = (f"FRACTIONS={len(scheduler.FRACTIONS)}", f"LOG_STEPS={len(scheduler.LOG_STEPS)}")
    return build.library(SOURCE, tensors.columns_of(MOMENTS), build.define("EPS", rule.config.eps), *knots)


class _Rule(tensors.Common):
    """As in schedule.h."""

    _fields_ = [("schedule", ctypes.c_float * NUM_FLOATS)]


class ScheduledKernel(tensors.TensorKernel):
    """The kernel of one rule."""

    moments = MOMENTS
    squares_per_tensor = 2
    rule: Scheduled

    def pack(self, meta_params: Mapping[str, Tensor]) -> _Rule:
        """The rule as C++ reads it."""
        packed, decays = _Rule(), self.rule.decays(meta_params)
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
        return GEOMETRY.pack(param.numel(), rows, tensors.LIMITS[param.dtype], *features)

    def total_squares(self, squares: array[float]) -> Squares:
        """The step's squares from those of its tensors."""
        change, nominal = (torch.tensor(sum(squares[i::2]), dtype=torch.float32, device="cpu") for i in (0, 1))
        return Squares(change, {"nominal": nominal})
