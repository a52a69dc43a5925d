"""STAR on the CPU: star.cpp, called once a step for all tensors.

The decays come from the rule's own function; the scheduler is written again in star_schedule.h. Parameters of lower
precision or another memory layout than the kernel's are copied to float32 and back. Results do not depend on the number
of threads.
"""

from __future__ import annotations

import ctypes
import math
import operator
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.kernels import Kernel, Squares, WorkItem
from lightning_lopt.kernels.cpu import build
from lightning_lopt.rules import STAR, UpdateRule, scheduler
from lightning_lopt.rules.features import factored_dims

SOURCE = Path(__file__).with_name("star.cpp")
LARGEST_HIDDEN = 64
# Values from here on are rounded to inf.
LIMITS = {torch.float32: math.inf, torch.bfloat16: (2 - 2**-8) * 2.0**127, torch.float16: 65520.0}
FIELDS = ("exp_avg", "exp_avg_sq", "row", "col", "diag", "step")
# estimator -> weights of gradient and momenta in the nominal direction, and whether it is divided by the root of the
# second moment; rules.nominal.ESTIMATORS as numbers
DIRECTIONS = {
    "SGD": ((1.0, 0.0, 0.0, 0.0), False),
    "SGDM": ((0.0, 0.0, 0.0, 1.0), False),
    "AggMo": ((0.0, 1 / 3, 1 / 3, 1 / 3), False),
    "Adam": ((0.0, 0.0, 0.0, 1.0), True),
    "AdamAggMo": ((0.0, 1 / 3, 1 / 3, 1 / 3), True),
}
# The scheduler's meta-parameters, in the order of star_schedule.h
SCHEDULE = (
    *("schedule_fraction", "schedule_length", "schedule_early", "schedule_step"),
    *("tensor_powers", "momentum_mix", "growth", "centering", "caution"),
)
# Options that the kernel has, or that the rule puts into a tensor's multipliers or the decays. Any other must be off.
OPTIONS = {
    "nominal_stepsize",
    "step_mult",
    "exp_mult",
    "nominal_grad_estimator",
    "nominal_controller",
    "normalize_blackbox",
    "weight_decay",
    "regularization_controller",
    "aggregate_magnitude",
    "aggregate_nom_magnitude",
    "aggregate_reg_magnitude",
    "selfnormalize_blackbox",
    "scheduler",
    "eps",
    "hidden_size",
    "hidden_layers",
    "num_heads",
    "initial_momentum_decays",
    "initial_rms_decays",
    "initial_adafactor_decays",
}


def supports(rule: UpdateRule) -> str | None:
    """Why there is no kernel for this rule on this machine, None if there is one. The first call compiles it."""
    if type(rule) is not STAR:
        return f"{type(rule).__name__} is not the class that the kernel was written for"
    if others := [name for name, value in rule.config.to_dict().items() if value and name not in OPTIONS]:
        return f"the kernel does not have the option {others[0]!r}"
    if rule.config.hidden_size > LARGEST_HIDDEN:
        return f"the kernel takes networks of up to {LARGEST_HIDDEN} units, this one has {rule.config.hidden_size}"
    if rule.config.scheduler and set(SCHEDULE) != set(scheduler.STAR_SHAPES):
        return f"the kernel's scheduler has other meta-parameters: {', '.join(SCHEDULE)}"
    library = _library(rule)
    return library if isinstance(library, str) else None


def make(rule: UpdateRule) -> Kernel:
    """The kernel of a rule that `supports` has let pass."""
    assert isinstance(rule, STAR)
    library = _library(rule)
    assert not isinstance(library, str)
    return StarKernel(rule, library.star_step)


def _library(rule: STAR) -> ctypes.CDLL | str:
    c = rule.config
    shape = (f"HIDDEN={c.hidden_size}", f"LAYERS={c.hidden_layers}", f"HEADS={c.num_heads}", f"EPS={c.eps!r}f")
    knots = (f"FRACTIONS={len(scheduler.FRACTIONS)}", f"LOG_STEPS={len(scheduler.LOG_STEPS)}")
    return build.library(SOURCE, *shape, *knots)


class _Rule(ctypes.Structure):
    """As in star.cpp."""

    _fields_ = [
        ("weights", ctypes.c_void_p),
        ("schedule", ctypes.c_void_p),
        ("momentum", ctypes.c_float * 3),
        ("rms", ctypes.c_float),
        ("adafactor", ctypes.c_float * 3),
        ("step_mult", ctypes.c_float),
        ("nominal", ctypes.c_float),
        ("weight_decay", ctypes.c_float),
        ("exp_mult", ctypes.c_float * 3),
        ("direction", ctypes.c_float * 4),
        ("num_steps", ctypes.c_float),
        ("nominal_root", ctypes.c_int32),
        ("blackbox_root", ctypes.c_int32),
        ("selfnormalize", ctypes.c_int32),
        ("aggregate", ctypes.c_int32 * 3),
        ("heads", ctypes.c_int32 * 4),
        ("needs_heads", ctypes.c_int32),
        ("scheduled", ctypes.c_int32),
        ("mixed", ctypes.c_int32),
        ("safeguard", ctypes.c_int32),
        ("measure", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class _Entry(NamedTuple):
    """What does not change from step to step about a tensor, as long as its state lies where it lay."""

    param: Tensor
    moments: tuple[int, ...]  # of star.cpp's WorkItem: exp_avg to step
    counters: tuple[int, int]
    geometry: tuple[int, ...]  # of star.cpp's WorkItem: size to rows
    kept: tuple[Tensor, ...]  # the state's tensors
    num_tensors: int | None
    shape: tuple[float, ...]  # what the scheduler knows of the tensor


class StarKernel:
    """The kernel of one rule, with tables of the tensors that it has met."""

    def __init__(self, rule: STAR, function: Any) -> None:
        self.rule = rule
        self.function = function
        self.entries: dict[int, _Entry] = {}  # by the parameter's id
        self.packed: tuple[Mapping[str, Tensor], tuple[Tensor, Tensor], _Rule] | None = None

    def refuses(self, param: Tensor) -> str | None:
        """Anything but strided float32, bfloat16 and float16."""
        if type(param) is not torch.nn.Parameter and type(param) is not Tensor:
            return f"the kernel takes plain tensors, not {type(param).__name__}"
        if param.dtype not in LIMITS:
            return f"the kernel computes in float32, and there are {param.dtype} parameters"
        return None

    def step(
        self,
        parts: Sequence[WorkItem],
        meta_params: Mapping[str, Tensor],
        num_steps: int | None,
        num_tensors: int | None = None,
        *,
        safeguard: bool,
        measure: bool,
    ) -> Squares | None:
        """See `Kernel`."""
        settings = self._settings(meta_params)
        settings.safeguard, settings.measure, settings.threads = safeguard, measure, torch.get_num_threads()
        settings.num_steps = 0 if num_steps is None else num_steps
        addresses, scalars = array("q"), array("f")
        values, grads = [], []  # held until the kernel is done
        for part in parts:
            param = part.param
            value = param if param.dtype is torch.float32 and param.is_contiguous() else _plain(param)
            grad = part.grad if part.grad.dtype is torch.float32 and part.grad.is_contiguous() else _plain(part.grad)
            values.append(value)
            grads.append(grad)
            entry = self._entry(part, safeguard, num_tensors)
            addresses.extend((value.data_ptr(), grad.data_ptr(), *entry.moments, *entry.counters, *entry.geometry))
            sign = -1.0 if part.maximize else 1.0
            scalars.extend((float(part.scale), float(part.decay), sign, LIMITS[param.dtype], *entry.shape))
        squares = torch.zeros(len(parts) if measure else 1, 4, dtype=torch.float64)
        self.function(
            ctypes.byref(settings),
            ctypes.c_void_p(addresses.buffer_info()[0]),
            ctypes.c_void_p(scalars.buffer_info()[0]),
            ctypes.c_void_p(squares.data_ptr()),
            ctypes.c_int64(len(parts)),
        )
        for part, value in zip(parts, values, strict=True):
            if value is not part.param:
                part.param.copy_(value)
            elif not value.is_inference():
                torch.autograd.graph.increment_version(value)  # so that autograd notices, as after any step
        return self._squares(squares.sum(0).float()) if measure else None

    def _squares(self, sums: Tensor) -> Squares:
        c = self.rule.config
        there = {"blackbox": c.step_mult, "nominal": c.nominal_stepsize, "decay": c.weight_decay}
        return Squares(sums[0], {name: sums[i] for i, name in enumerate(there, 1) if there[name]})

    def _entry(self, part: WorkItem, safeguard: bool, num_tensors: int | None) -> _Entry:
        state, entry = part.state, self.entries.get(id(part.param))
        if (
            entry is None
            or entry.param is not part.param
            or entry.num_tensors != num_tensors
            or len(entry.kept) != len(state)
            or not all(map(operator.is_, entry.kept, state.values()))
            # `tensor.data = other` leaves the tensor what it was
            or entry.moments[0] != state["exp_avg"].data_ptr()
            or entry.moments[1] != state["exp_avg_sq"].data_ptr()
        ):
            entry = self.entries[id(part.param)] = _make_entry(part, safeguard, num_tensors)
        return entry

    def _settings(self, meta_params: Mapping[str, Tensor]) -> _Rule:
        if self.packed is None or self.packed[0] is not meta_params:
            self.packed = meta_params, *_pack(self.rule, meta_params)
        return self.packed[2]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def _make_entry(part: WorkItem, safeguard: bool, num_tensors: int | None) -> _Entry:
    state, shape = part.state, part.param.shape
    for name in FIELDS:
        state[name] = _plain(state[name])  # as it is, unless it came from elsewhere
    dims = factored_dims(shape)
    geometry, sides = (0, 0, 0, 0, 0, 0, 0), ("diag", "diag")
    if dims is not None:
        (first, second), last = sorted(dims), dims[1]
        left_is_row = last == second
        products = (math.prod(shape[:first]), shape[first], math.prod(shape[first + 1 : second]), shape[second])
        geometry = (*products, math.prod(shape[second + 1 :]), int(left_is_row), shape[0])
        sides = ("row", "col") if left_is_row else ("col", "row")
    names = ("exp_avg", "exp_avg_sq", *sides, "step")
    return _Entry(
        part.param,
        tuple(state[name].data_ptr() for name in names),
        (state["skipped"].data_ptr(), state["skipped_in_row"].data_ptr()) if safeguard else (0, 0),
        (part.param.numel(), *geometry),
        tuple(state.values()),
        num_tensors,
        scheduler.shape_features(shape, num_tensors),
    )


def _pack(rule: STAR, meta_params: Mapping[str, Tensor]) -> tuple[tuple[Tensor, Tensor], _Rule]:
    """The rule's meta-parameters and configuration as star.cpp reads them; the tensors hold weights and schedule."""
    c, packed = rule.config, _Rule()
    layers = [meta_params[f"{name}{layer}"].flatten() for layer in range(c.hidden_layers + 1) for name in "wb"]
    weights, schedule = torch.cat(layers), _schedule(meta_params) if c.scheduler else torch.empty(0)
    packed.weights, packed.schedule = weights.data_ptr(), schedule.data_ptr()
    decays = rule.decays(meta_params)
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
    packed.needs_heads, packed.scheduled = any(controlled), c.scheduler
    packed.mixed = c.nominal_grad_estimator in ("AggMo", "AdamAggMo")
    return (weights, schedule), packed


def _schedule(meta_params: Mapping[str, Tensor]) -> Tensor:
    """As in star_schedule.h."""
    bounds = (*scheduler.LOG_LENGTHS, scheduler.LARGEST_POWER, scheduler.DOUBT)
    knots = (*scheduler.FRACTIONS, *scheduler.LOG_STEPS, *bounds)
    return torch.cat([torch.tensor(knots), *(meta_params[name].flatten() for name in SCHEDULE)])
