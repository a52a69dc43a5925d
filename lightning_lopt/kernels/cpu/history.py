"""Normalized histories and Multiscale Adam on the CPU: history.cpp, called once for each tensor.

What is of the size of the rule (rates, corrections, the mixers' weights, eta_min) comes from the rule's own functions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.kernels import Kernel, Squares, WorkItem
from lightning_lopt.kernels.cpu import build
from lightning_lopt.rules import MultiscaleAdam, NormalizedHistory, StepContext, UpdateRule
from lightning_lopt.rules.history import NUM_MAGNITUDES
from lightning_lopt.rules.multiscale_adam import LINEAR

SOURCE = Path(__file__).with_name("history.cpp")
LARGEST = 128  # timescales or units, which the compiler unrolls
READOUTS = ("mean", "softmax", "tanh")
COUNTERS = ("skipped", "skipped_in_row")


def supports(rule: UpdateRule) -> str | None:
    """Why there is no kernel for this rule on this machine, None if there is one. The first call compiles it."""
    if type(rule) not in (MultiscaleAdam, NormalizedHistory):
        return f"{type(rule).__name__} is not a class that the kernel was written for"
    c = rule.config.to_dict()
    if c.get("mixer") == "gru":
        return "the kernel does not have the recurrent mixer"
    if c.get("parameter_inputs") or c.get("normalization", "max") != "max":
        return "the kernel has neither parameter inputs nor Adam-like normalization"
    if max(c["k"], c["hidden_size"]) > LARGEST:
        return f"the kernel takes up to {LARGEST} timescales and units"
    library = _library(rule)
    return library if isinstance(library, str) else None


def make(rule: UpdateRule) -> Kernel:
    """The kernel of a rule that `supports` has let pass."""
    library = _library(rule)
    assert not isinstance(library, str)
    if isinstance(rule, MultiscaleAdam):
        return MultiscaleKernel(rule, library)
    assert isinstance(rule, NormalizedHistory)
    return HistoryKernel(rule, library)


def _library(rule: UpdateRule) -> ctypes.CDLL | str:
    shapes = [
        tuple(param.shape) for name, param in rule.named_parameters() if name.startswith("w") and param.dim() == 2
    ]
    hidden, outputs = (shapes[0][1], shapes[-1][1]) if shapes else (1, 1)
    if isinstance(rule, NormalizedHistory) and rule.config.step == "softmax":
        outputs -= 2  # see _relative
    if isinstance(rule, MultiscaleAdam) and shapes:
        outputs -= 1
    k = rule.config.to_dict()["k"]
    sizes = {"K": k, "INPUTS": k, "HIDDEN": hidden, "LAYERS": max(len(shapes) - 1, 0), "OUTPUTS": outputs}
    return build.library(SOURCE, *(f"{name}={value}" for name, value in sizes.items()))


class _Part(ctypes.Structure):
    """As in history.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("param", "grad", "first", "second")]
    _fields_ += [("size", ctypes.c_int64), ("slot", ctypes.c_int64)]


def _settings(k: int) -> type[ctypes.Structure]:
    floats, counts = ("scale", "decay", "sign", "eta"), ("timesteps", "mid_range", "readout", "signs", "threads")

    class Settings(ctypes.Structure):
        """As in history.cpp."""

        _fields_ = [
            ("weights", ctypes.c_void_p),
            ("rate", ctypes.c_float * (2 * k)),
            ("offset", ctypes.c_float * k),
            ("factor", ctypes.c_float * k),
            *((name, ctypes.c_float) for name in floats),
            *((name, ctypes.c_int32) for name in counts),
        ]

    return Settings


class _CoordinateKernel:
    """What both rules' kernels have in common."""

    FIELDS: tuple[str, str]  # of the state, (k, *shape) each

    def __init__(self, rule: Any, library: ctypes.CDLL, function: Callable[..., Any]) -> None:
        self.rule, self.library, self.function = rule, library, function
        self.settings = _settings(rule.config.k)()
        self.checked: dict[int, tuple[Tensor, Tensor]] = {}  # by the parameter's id, states that are known to be finite

    def refuses(self, param: Tensor) -> str | None:
        """Anything but plain float32."""
        if type(param) is not torch.nn.Parameter and type(param) is not Tensor:
            return f"the kernel takes plain tensors, not {type(param).__name__}"
        if param.dtype is not torch.float32:
            return f"the kernel computes in float32, and there are {param.dtype} parameters"
        return None if param.is_contiguous() else "the kernel takes contiguous parameters"

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
        change = torch.zeros(())
        for part in parts:
            state, before = part.state, part.param.clone() if measure else None
            for name in self.FIELDS:
                state[name] = state[name].contiguous()
            grad = part.grad.contiguous()
            if safeguard and not self._is_finite(part, grad, meta_params):
                for name in COUNTERS:
                    state[name] += 1
                continue
            self._move(part, grad, meta_params, num_steps)
            state["step"] += 1
            if safeguard:
                state["skipped_in_row"].zero_()
            if before is not None:
                change += (part.param - before).square().sum()
        return Squares(change, {"blackbox": change}) if measure else None

    def _is_finite(self, part: WorkItem, grad: Tensor, meta_params: Mapping[str, Tensor]) -> bool:
        """Whether a step leads to no NaN or inf: none is in what it reads, and gradients can be squared."""
        first, second = (part.state[name] for name in self.FIELDS)
        known = self.checked.get(id(part.param))
        if known is None or known[0] is not first or known[1] is not second:
            if not (first.isfinite().all() and second.isfinite().all()):
                return False
            self.checked[id(part.param)] = first, second
        scalars = torch.as_tensor([float(part.scale), float(part.decay), *(v.sum() for v in meta_params.values())])
        address = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (grad, part.param))
        found = self.library.all_finite(*address, ctypes.c_int64(grad.numel()))
        return bool(found) and bool(scalars.isfinite().all())

    def _call(self, part: WorkItem, grad: Tensor, weights: Tensor, slot: int) -> None:
        settings, state = self.settings, part.state
        settings.weights, settings.threads = weights.data_ptr(), torch.get_num_threads()
        settings.scale, settings.decay = float(part.scale), float(part.decay)
        settings.sign = -1.0 if part.maximize else 1.0
        addresses = (part.param.data_ptr(), grad.data_ptr(), *(state[name].data_ptr() for name in self.FIELDS))
        self.function(ctypes.byref(settings), ctypes.byref(_Part(*addresses, part.param.numel(), slot)))

    def _move(self, part: WorkItem, grad: Tensor, meta_params: Mapping[str, Tensor], num_steps: int | None) -> None:
        raise NotImplementedError


class MultiscaleKernel(_CoordinateKernel):
    """Of `MultiscaleAdam`."""

    FIELDS = ("exp_avg", "exp_avg_sq")

    def __init__(self, rule: MultiscaleAdam, library: ctypes.CDLL) -> None:
        super().__init__(rule, library, library.multiscale_adam_step)
        rates = [1 - beta for betas in zip(*rule.config.betas, strict=True) for beta in betas]
        self.settings.rate[:], self.settings.eta = rates, rule.config.eta

    def _move(self, part: WorkItem, grad: Tensor, meta_params: Mapping[str, Tensor], num_steps: int | None) -> None:
        prepared = self.rule._prepared(meta_params)
        linear = self.rule.config.mixer in LINEAR
        weights = prepared["weights"] if linear else _packed(_relative(prepared, self.rule.config.k))
        offsets, factors = self.rule.scales(self.rule._corrections(part.state["step"], torch.float32))
        self.settings.offset[:], self.settings.factor[:] = offsets.flatten().tolist(), factors.flatten().tolist()
        self._call(part, grad, weights.contiguous(), 0)


class HistoryKernel(_CoordinateKernel):
    """Of `NormalizedHistory`."""

    FIELDS = ("params", "grads")

    def __init__(self, rule: NormalizedHistory, library: ctypes.CDLL) -> None:
        super().__init__(rule, library, library.history_step)
        c = rule.config
        self.settings.timesteps, self.settings.mid_range = not c.timescales, c.reference == "mid-range"
        self.settings.signs, self.settings.readout = c.sign_only, READOUTS.index(c.step)

    def _move(self, part: WorkItem, grad: Tensor, meta_params: Mapping[str, Tensor], num_steps: int | None) -> None:
        rule, seen = self.rule, part.state["seen"]
        first, k = not int(seen), rule.config.k
        if rule.config.timescales:
            self.settings.rate[:k] = rule._written(seen, torch.float32).flatten().tolist()
        context = StepContext(part.state["step"], None, num_steps)
        self.settings.eta = float(rule._eta_min(context, torch.float32))
        weights = self._packed(rule._in_order(meta_params, seen)) if meta_params else torch.zeros(1)
        self._call(part, grad, weights, -1 if first else int(seen) % k)
        part.state["seen"] += 1

    def _packed(self, meta_params: Mapping[str, Tensor]) -> Tensor:
        softmax = self.rule.config.step == "softmax"
        return _packed(_relative(meta_params, NUM_MAGNITUDES, 2) if softmax else meta_params)


def _relative(meta_params: Mapping[str, Tensor], *sizes: int) -> Mapping[str, Tensor]:
    """With last layers whose outputs, of softmaxes of these sizes, are given relative to the first, which is left out.

    A softmax looks at differences alone; that is one output less to compute for each.
    """
    last = max(name for name in meta_params if name.startswith("w"))[1:]
    smaller = {}
    for name in (f"w{last}", f"b{last}"):
        groups = torch.split(meta_params[name], list(sizes), dim=-1)
        smaller[name] = torch.cat([group[..., 1:] - group[..., :1] for group in groups], -1)
    return {**meta_params, **smaller}


def _packed(meta_params: Mapping[str, Tensor]) -> Tensor:
    """The layers one after the other: w0, b0, w1, b1, ..."""
    count = sum(name.startswith("w") for name in meta_params)
    return torch.cat([meta_params[f"{name}{layer}"].flatten() for layer in range(count) for name in "wb"])
