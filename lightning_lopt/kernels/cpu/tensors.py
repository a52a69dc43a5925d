"""Kernels in C++ that move all tensors of a step in one call: what they are given, and the checks before it.

C++ gets addresses. So each step compares shape, dtype, strides and device of parameters, gradients and states with what
the addresses will be taken for. Comparing everything at once with what the last step saw makes this cheap: tensors are
looked at one by one only where something has changed. No tensor is kept from one step to the next.
"""

from __future__ import annotations

import ctypes
import operator
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.kernels import Squares, WorkItem
from lightning_lopt.kernels.cpu import build
from lightning_lopt.kernels.mismatch import TensorMismatch, check_shapes, is_plain, plain
from lightning_lopt.rules import UpdateRule

# Dtype of the arithmetic -> those of the parameters that it is for, with where values are rounded to inf.
LIMITS = {
    torch.float32: {torch.float32: float("inf"), torch.bfloat16: (2 - 2**-8) * 2.0**127, torch.float16: 65520.0},
    torch.float64: {torch.float64: float("inf")},
}
NUMBERS: dict[torch.dtype, Any] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
COUNTERS = ("skipped", "skipped_in_row")  # of the safeguard
OUT_OF_MEMORY = 1  # step.h's Outcome

_shape, _dtype, _on_cpu = attrgetter("shape"), attrgetter("dtype"), attrgetter("is_cpu")


def _common(number: Any) -> list[tuple[str, Any]]:
    """The fields of step.h's Common, whose numbers are of a type."""
    counts = [(name, ctypes.c_int32) for name in ("safeguard", "measure", "threads")]
    return [("momentum", number * 3), *((name, number) for name in ("rms", "nominal", "num_steps")), *counts]


class _Table(NamedTuple):
    """What was found out about the tensors of a step. It holds for later steps with the same `seen` and `counters`."""

    seen: Any
    counters: list[Tensor]  # the states' scalars, all with the dtypes that C++ takes them for
    copied: tuple[int, ...]  # which of parameters and gradients are not `plain`: C++ gets copies of them
    geometries: bytes


class TensorKernel:
    """See `kernels.Kernel`. A subclass knows its rule's structs and what C++ must know of a shape.

    Args:
        rule: one that `supports` has let pass.
        dtype: of the arithmetic: of float32 parameters and those of lower precision, or of float64 parameters.
    """

    rule_type: ClassVar[type[UpdateRule]]
    source: ClassVar[Path]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)  # of the arithmetic, that there is
    moments: ClassVar[tuple[str, ...]]  # fields of the state that C++ reads and writes
    geometry_format: ClassVar[str]  # of the struct module, "{number}" for the type of the numbers
    squares_per_tensor: ClassVar[int]

    def __init__(self, rule: UpdateRule, dtype: torch.dtype = torch.float32) -> None:
        self.rule = rule
        self.dtype = dtype
        self.number = NUMBERS[dtype]._type_
        self.limits = LIMITS[dtype]
        self.rule_struct = type(
            "Rule", (ctypes.Structure,), {"_fields_": _common(NUMBERS[dtype]) + self.own_fields(NUMBERS[dtype])}
        )
        # The empty end of 8-byte numbers fills the struct up as C++ does.
        self.geometry_struct = struct.Struct(self.geometry_format.format(number=self.number) + "0q")
        library = self._library(rule.config, dtype)
        assert not isinstance(library, str)
        check_layout(library, ctypes.sizeof(self.rule_struct), self.geometry_struct.size)
        self.function: Callable[..., int] = library.move_tensors
        self.function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64, ctypes.c_void_p]
        self.function.restype = ctypes.c_int32
        self._table: _Table | None = None
        self._packed: tuple[Mapping[str, Tensor], Any] | None = None
        self._shapes: dict[torch.Size, dict[str, torch.Size]] = {}  # parameter's shape -> those of its state

    @classmethod
    def supports(cls, rule: UpdateRule, dtype: torch.dtype = torch.float32) -> str | None:
        """Why there is no kernel for this rule on this machine, None if there is one. The first call compiles it."""
        if type(rule) is not cls.rule_type:
            return f"{type(rule).__name__} is not the class that the kernel was written for"
        if dtype not in cls.dtypes:
            return f"the kernel computes in float32, and there are {dtype} parameters"
        library = cls._library(rule.config, dtype)
        return library if isinstance(library, str) else None

    def refuses(self, param: Tensor) -> str | None:
        """Anything but strided tensors of the dtypes in `LIMITS`."""
        if type(param) is not torch.nn.Parameter and type(param) is not Tensor:
            return f"the kernel takes plain tensors, not {type(param).__name__}"
        if param.dtype not in self.limits:
            return f"the kernel computes in {self.dtype}, and there are {param.dtype} parameters"
        return None

    def step(
        self,
        work_items: Sequence[WorkItem],
        meta_params: Mapping[str, Tensor],
        num_steps: int | None,
        num_tensors: int | None = None,
        *,
        safeguard: bool,
        measure: bool,
    ) -> Squares | None:
        """See `Kernel`."""
        params, grads, states, scales, decays, maximize, _ = zip(*work_items, strict=True)
        names = ("step", *COUNTERS) if safeguard else ("step",)
        counters = [state[name] for name in names for state in states]
        counter_addresses = array("q", map(Tensor.data_ptr, counters))
        tensors = self._arrays(params, grads, states)
        roles = [item.role for item in work_items]
        table, seen = self._table, (counter_addresses, num_tensors, roles, _layouts(tensors, len(params)))
        if table is None or table.seen != seen or not all(map(operator.is_, table.counters, counters)):
            table = self._table = self._new_table(work_items, names, counters, seen)
            tensors = self._arrays(params, grads, states)
        for index in table.copied:
            tensors[index] = plain(tensors[index], self.dtype)

        rule = self._settings(meta_params)
        rule.num_steps = 0 if num_steps is None else num_steps
        rule.safeguard, rule.measure = safeguard, measure
        rule.threads = torch.get_num_threads()
        addresses = array("q", map(Tensor.data_ptr, tensors)) + counter_addresses
        scalars = array(self.number, map(float, (*scales, *decays)))
        scalars.extend([-1.0 if ascend else 1.0 for ascend in maximize])
        squares = array("d", bytes(8 * self.squares_per_tensor * len(work_items) if measure else 0))
        arrays = [values.buffer_info()[0] for values in (addresses, scalars, squares)]
        arguments = (ctypes.addressof(rule), *arrays, table.geometries, len(work_items))
        self.run(arguments, work_items, tensors[: len(params)], meta_params, num_steps, squares)

        written_back = {index for index in table.copied if index < len(params)}
        for index in written_back:
            params[index].copy_(tensors[index])
        _tell_autograd([param for index, param in enumerate(params) if index not in written_back])
        return self.total_squares(squares) if measure else None

    @staticmethod
    def macros(config: Any) -> tuple[str, ...]:
        """What the source must know of a rule when it is compiled."""
        raise NotImplementedError

    @staticmethod
    def own_fields(number: Any) -> list[tuple[str, Any]]:
        """The fields of the source's Rule, behind those of Common; its numbers are of a type."""
        raise NotImplementedError

    def pack(self, meta_params: Mapping[str, Tensor]) -> Any:
        """The rule as C++ reads it: a `rule_struct`."""
        raise NotImplementedError

    def geometry(self, item: WorkItem, num_tensors: int | None) -> bytes:
        """What C++ knows of a tensor beside its addresses."""
        raise NotImplementedError

    def run(
        self,
        arguments: tuple[Any, ...],
        work_items: Sequence[WorkItem],
        values: Sequence[Tensor],
        meta_params: Mapping[str, Tensor],
        num_steps: int | None,
        squares: array[float],
    ) -> None:
        """Call C++, and do what is left to be done for the parameters.

        Args:
            arguments: of the C++ function, but for the targets.
            work_items: of the step.
            values: the parameters, or copies of them, as C++ moves them.
            meta_params: of the rule.
            num_steps: the run's length, None if it is unknown.
            squares: as C++ fills it; empty where nothing is measured.
        """
        raise_unless_done(self.function(*arguments, None))

    def total_squares(self, squares: array[float]) -> Squares:
        """The squares of a step from those of its tensors, `squares_per_tensor` each."""
        raise NotImplementedError

    def _arrays(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]
    ) -> list[Tensor]:
        """All that C++ takes for arrays of a tensor's size, in the order of `columns_of`."""
        return [*params, *grads, *[state[name] for name in self.moments for state in states]]

    def _new_table(
        self, work_items: Sequence[WorkItem], names: Sequence[str], counters: list[Tensor], seen: tuple[Any, ...]
    ) -> _Table:
        """Look at every tensor. States that hold the right numbers in another form are converted."""
        for item in work_items:
            self._check(item, names)
        num_tensors = seen[1]
        geometries = b"".join(self.geometry(item, num_tensors) for item in work_items)
        given = [item.param for item in work_items] + [item.grad for item in work_items]
        copied = tuple(index for index, tensor in enumerate(given) if not is_plain(tensor, self.dtype))
        return _Table(seen, counters, copied, geometries)

    def _check(self, item: WorkItem, names: Sequence[str]) -> None:
        param, state = item.param, item.state
        if param.shape not in self._shapes:
            made = self.rule.init_state(torch.empty(param.shape, dtype=self.dtype, device="meta"))
            self._shapes[param.shape] = {name: getattr(made, name).shape for name in self.moments}
        scalars = {name: torch.Size() for name in names}
        check_shapes(param, item.grad, state, {**self._shapes[param.shape], **scalars})
        for name in self.moments:
            state[name] = plain(state[name], self.dtype)  # loaded by other means, maybe
        for name in names:
            if state[name].dtype is not torch.int64:
                raise TensorMismatch(param, f"State {name!r}", f"is {state[name].dtype}", "torch.int64")

    @classmethod
    def _library(cls, config: Any, dtype: torch.dtype) -> ctypes.CDLL | str:
        columns = ("param", "grad", *cls.moments, "step", *COUNTERS)  # the order of addresses
        names = f"COLUMNS={','.join(name.upper() for name in columns)}"
        double = ("DOUBLE",) if dtype is torch.float64 else ()
        return build.library(cls.source, names, f"EPSILON={float(config.eps)!r}", *cls.macros(config), *double)

    def _settings(self, meta_params: Mapping[str, Tensor]) -> Any:
        if self._packed is None or self._packed[0] is not meta_params:
            self._packed = meta_params, self.pack(meta_params)
        return self._packed[1]


def check_layout(library: ctypes.CDLL, *sizes: int) -> None:
    """Raise a RuntimeError unless Python and C++ agree about the sizes of the structs that they share."""
    found = tuple((ctypes.c_int64 * len(sizes)).in_dll(library, "layout"))
    if found != sizes:
        raise RuntimeError(f"C++ has structs of {found} bytes, Python of {sizes}; mend the one that is wrong.")


def _layouts(tensors: Sequence[Tensor], count: int) -> tuple[list[Any], ...]:
    """All that must not change unnoticed, but for addresses; the tensors are `count` parameters, gradients, moments."""
    return (
        list(map(_shape, tensors)),
        list(map(_dtype, tensors)),
        list(map(Tensor.is_contiguous, tensors)),
        list(map(Tensor.is_neg, tensors[: 2 * count])),
        list(map(_on_cpu, tensors[count:])),
    )


def raise_unless_done(outcome: int) -> None:
    """Raise what a step's outcome in C++ stands for."""
    if outcome == OUT_OF_MEMORY:
        raise MemoryError("There is not enough memory for the optimizer's step. No parameter and no state has changed.")
    if outcome:
        raise RuntimeError("The optimizer's step failed in C++. backend='reference' takes it without C++.")


def _tell_autograd(params: Sequence[Tensor]) -> None:
    """Say that parameters have changed, as any step in torch does."""
    increment: Callable[[Any], None] = torch.autograd.graph.increment_version
    try:
        increment(params)
    except (TypeError, RuntimeError):  # torch before 2.6 takes one at a time, and no inference tensors
        for param in params:
            if not param.is_inference():
                increment(param)
