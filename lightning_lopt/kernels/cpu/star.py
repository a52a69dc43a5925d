"""STAR on the CPU: star.cpp, called once a step for all tensors.

The decays and the shapes of the factored moments come from the rule's own functions. Parameters of lower precision or
another memory layout are copied to contiguous float32 and back.
"""

from __future__ import annotations

import ctypes
import math
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_lopt.kernels import Kernel, Squares
from lightning_lopt.kernels.cpu import build, tensors
from lightning_lopt.rules import STAR, UpdateRule
from lightning_lopt.rules.features import factored_dims

SOURCE = Path(__file__).with_name("star.cpp")
MOMENTS = ("exp_avg", "exp_avg_sq", "row", "col", "diag")
LARGEST_HIDDEN = 64
# estimator -> weights of gradient and momenta in the nominal direction, and whether it is divided by the root of the
# second moment; rules.nominal.ESTIMATORS as numbers
DIRECTIONS = {
    "SGD": ((1.0, 0.0, 0.0, 0.0), False),
    "SGDM": ((0.0, 0.0, 0.0, 1.0), False),
    "AggMo": ((0.0, 1 / 3, 1 / 3, 1 / 3), False),
    "Adam": ((0.0, 0.0, 0.0, 1.0), True),
    "AdamAggMo": ((0.0, 1 / 3, 1 / 3, 1 / 3), True),
}
GEOMETRY = struct.Struct("7qf4x")  # size, A, X, B, Y, C, left_is_row, limit


def supports(rule: UpdateRule) -> str | None:
    """Why there is no kernel for this rule on this machine, None if there is one. The first call compiles it."""
    if type(rule) is not STAR:
        return f"{type(rule).__name__} is not the class that the kernel was written for"
    if rule.config.hidden_size > LARGEST_HIDDEN:
        return f"the kernel takes networks of up to {LARGEST_HIDDEN} units, this one has {rule.config.hidden_size}"
    library = _library(rule)
    return library if isinstance(library, str) else None


def make(rule: UpdateRule) -> Kernel:
    """The kernel of a rule that `supports` has let pass."""
    assert isinstance(rule, STAR)
    library = _library(rule)
    assert not isinstance(library, str)
    tensors.check_layout(library, "star_layout", ctypes.sizeof(_Rule), GEOMETRY.size)
    return StarKernel(rule, library.star_step)


def _library(rule: STAR) -> ctypes.CDLL | str:
    c = rule.config
    network = (f"HIDDEN={c.hidden_size}", f"LAYERS={c.hidden_layers}", f"HEADS={c.num_heads}")
    return build.library(SOURCE, tensors.columns_of(MOMENTS), build.define("EPS", c.eps), *network)


class _Rule(tensors.Common):
    """As in star_vectors.h."""

    _fields_ = [
        ("adafactor", ctypes.c_float * 3),
        ("step_mult", ctypes.c_float),
        ("weight_decay", ctypes.c_float),
        ("exp_mult", ctypes.c_float * 3),
        ("direction", ctypes.c_float * 4),
        ("nominal_root", ctypes.c_int32),
        ("blackbox_root", ctypes.c_int32),
        ("selfnormalize", ctypes.c_int32),
        ("aggregate", ctypes.c_int32 * 3),
        ("heads", ctypes.c_int32 * 4),
        ("weights", ctypes.c_void_p),
    ]


class StarKernel(tensors.TensorKernel):
    """The kernel of one rule."""

    moments = MOMENTS
    squares_per_tensor = 4
    rule: STAR

    def pack(self, meta_params: Mapping[str, Tensor]) -> _Rule:
        """The rule as C++ reads it."""
        c, packed, decays = self.rule.config, _Rule(), self.rule.decays(meta_params)
        layers = [meta_params[f"{name}{layer}"].flatten() for layer in range(c.hidden_layers + 1) for name in "wb"]
        self._weights = torch.cat(layers)  # held: C++ has its address
        packed.weights = self._weights.data_ptr()
        packed.momentum[:], packed.adafactor[:] = decays.momentum.tolist(), decays.adafactor.tolist()
        packed.rms = float(decays.rms)
        packed.direction[:], packed.nominal_root = DIRECTIONS[c.nominal_grad_estimator]
        controlled = (bool(c.step_mult), c.nominal_controller, bool(c.weight_decay) and c.regularization_controller)
        aggregate = (c.aggregate_magnitude, c.aggregate_nom_magnitude, c.aggregate_reg_magnitude)
        packed.exp_mult[:] = [mult if on else 0.0 for mult, on in zip(c.exp_mult, controlled, strict=True)]
        packed.aggregate[:] = [whole and on for whole, on in zip(aggregate, controlled, strict=True)]
        packed.heads[:] = (controlled[0], *controlled)  # direction and magnitude of the blackbox go together
        packed.step_mult, packed.weight_decay = c.step_mult, c.weight_decay
        packed.nominal = c.nominal_stepsize * (1.0 if c.nominal_controller else math.exp(c.exp_mult[1]))
        packed.blackbox_root, packed.selfnormalize = c.normalize_blackbox, c.selfnormalize_blackbox
        return packed

    def geometry(self, param: Tensor, num_tensors: int | None) -> bytes:
        """What C++ knows of a parameter beside its addresses: its shape as [A, X, B, Y, C], see star.cpp."""
        shape, limit = param.shape, tensors.LIMITS[param.dtype]
        if (dims := factored_dims(shape, self.rule.config.layout)) is None:
            return GEOMETRY.pack(param.numel(), 0, 0, 0, 0, 0, 0, limit)
        first, second = sorted(dims)
        before, between, after = shape[:first], shape[first + 1 : second], shape[second + 1 :]
        x, y, left_is_row = shape[first], shape[second], dims[1] == second
        if y == math.prod(between) == math.prod(after) == 1:  # lines of one number; in memory it is (1, x) as well
            x, y, left_is_row = y, x, not left_is_row
        factored = (math.prod(before), x, math.prod(between), y, math.prod(after))
        return GEOMETRY.pack(param.numel(), *factored, left_is_row, limit)

    def total_squares(self, squares: array[float]) -> Squares:
        """The step's squares from those of its tensors."""
        c = self.rule.config
        sums = [torch.tensor(sum(squares[i::4]), dtype=torch.float32, device="cpu") for i in range(4)]
        there = {"blackbox": c.step_mult, "nominal": c.nominal_stepsize, "decay": c.weight_decay}
        return Squares(sums[0], {name: sums[i] for i, name in enumerate(there, 1) if there[name]})
