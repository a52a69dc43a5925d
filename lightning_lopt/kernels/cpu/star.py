"""STAR on the CPU: star.cpp, called once a step for all tensors.

The decays and the shapes of the factored moments come from the rule's own functions. Parameters of lower precision or
another memory layout are copied to contiguous float32 and back.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.kernels import Squares, WorkItem
from lightning_lopt.kernels.cpu import tensors
from lightning_lopt.rules import STAR, UpdateRule
from lightning_lopt.rules.features import factored_dims

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


class StarKernel(tensors.TensorKernel):
    """The kernel of one rule."""

    rule_type = STAR
    rule: STAR
    source = Path(__file__).with_name("star.cpp")
    moments = ("exp_avg", "exp_avg_sq", "row", "col", "diag")
    geometry_format = "7q{number}"  # size, A, X, B, Y, C, left_is_row, limit
    squares_per_tensor = 4

    @classmethod
    def supports(cls, rule: UpdateRule, dtype: torch.dtype = torch.float32) -> str | None:
        """Why there is no kernel for this rule on this machine, None if there is one. The first call compiles it."""
        if type(rule) is STAR and rule.config.hidden_size > LARGEST_HIDDEN:
            return f"the kernel takes networks of up to {LARGEST_HIDDEN} units, this one has {rule.config.hidden_size}"
        return super().supports(rule, dtype)

    @staticmethod
    def macros(config: Any) -> tuple[str, ...]:
        """The shape of the network."""
        return f"HIDDEN={config.hidden_size}", f"LAYERS={config.hidden_layers}", f"HEADS={config.num_heads}"

    @staticmethod
    def own_fields(number: Any) -> list[tuple[str, Any]]:
        """As in star_vectors.h."""
        return [
            ("adafactor", number * 3),
            ("step_mult", number),
            ("weight_decay", number),
            ("exp_mult", number * 3),
            ("direction", number * 4),
            ("nominal_root", ctypes.c_int32),
            ("blackbox_root", ctypes.c_int32),
            ("selfnormalize", ctypes.c_int32),
            ("aggregate", ctypes.c_int32 * 3),
            ("heads", ctypes.c_int32 * 4),
            ("weights", ctypes.c_void_p),
        ]

    def pack(self, meta_params: Mapping[str, Tensor]) -> Any:
        """The rule as C++ reads it."""
        c, packed, decays = self.rule.config, self.rule_struct(), self.rule.decays(meta_params)
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

    def geometry(self, item: WorkItem, num_tensors: int | None) -> bytes:
        """What C++ knows of a tensor beside its addresses: its shape as [A, X, B, Y, C], see star.cpp."""
        param = item.param
        shape, limit = param.shape, self.limits[param.dtype]
        if (dims := factored_dims(shape, self.rule.config.layout)) is None:
            return self.geometry_struct.pack(param.numel(), 0, 0, 0, 0, 0, 0, limit)
        first, second = sorted(dims)
        before, between, after = shape[:first], shape[first + 1 : second], shape[second + 1 :]
        x, y, left_is_row = shape[first], shape[second], dims[1] == second
        if y == math.prod(between) == math.prod(after) == 1:  # lines of one number; in memory it is (1, x) as well
            x, y, left_is_row = y, x, not left_is_row
        factored = (math.prod(before), x, math.prod(between), y, math.prod(after))
        return self.geometry_struct.pack(param.numel(), *factored, left_is_row, limit)

    def total_squares(self, squares: array[float]) -> Squares:
        """The step's squares from those of its tensors."""
        c = self.rule.config
        sums = [torch.tensor(sum(squares[i::4]), dtype=torch.float32, device="cpu") for i in range(4)]
        there = {"blackbox": c.step_mult, "nominal": c.nominal_stepsize, "decay": c.weight_decay}
        return Squares(sums[0], {name: sums[i] for i, name in enumerate(there, 1) if there[name]})


supports = StarKernel.supports
make = StarKernel
