"""The host side that the Triton kernels share: which tensors they take, and tables that follow them from step to step.

A kernel reaches tensors by their addresses, so nothing on the device would notice a tensor of another size. At every
step `TritonKernel` therefore compares shapes, strides, dtypes and devices with those that its tables were made for. It
keeps no parameter, gradient or state alive.
"""

from __future__ import annotations

import abc
import math
from array import array
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from lightning_lopt.kernels import Squares, WorkItem
from lightning_lopt.kernels.cuda.layout import DTYPES, common, dense_strides, memory_order, same
from lightning_lopt.kernels.cuda.seen import Pointers, Seen, name_of
from lightning_lopt.kernels.mismatch import check_shapes
from lightning_lopt.rules import UpdateRule

# Sets of tensors whose tables are kept, least recently used last: not all tensors have gradients in every step.
PLANS_KEPT = 32
LONGEST_ROW = 2**30  # places in a row are 32-bit numbers
COUNTERS = ("skipped", "skipped_in_row")  # of the safeguard


def outdated() -> str | None:
    """Why the installed version of Triton cannot be used, None if it can."""
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    if version >= (3, 6):
        return None
    return f"triton {triton.__version__} is too old, and torch {torch.__version__} with it: install torch >= 2.10"


def refuses(param: Tensor) -> str | None:
    """Why the Triton kernels do not take this parameter, None if they do."""
    if type(param) is not torch.nn.Parameter and type(param) is not Tensor:
        return f"{type(param).__name__} parameters have no Triton kernel"
    if param.dtype not in DTYPES:
        return f"the Triton kernel takes {', '.join(str(dtype) for dtype in DTYPES)}, not {param.dtype}"
    if param.is_neg():
        return "the parameter is a lazy negation (torch.Tensor.is_neg)"
    if param.is_contiguous() and param.numel() < LONGEST_ROW:
        return None
    found = _order(param.shape, param.stride())
    return found if isinstance(found, str) else None


@lru_cache(maxsize=4096)
def _order(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...] | str:
    """The order of such a tensor's dims in memory, or why the kernels do not take it."""
    found = memory_order(shape, strides)
    if found is None:
        return f"a parameter of shape {tuple(shape)} and strides {strides} has gaps in memory"
    if shape[1:].numel() >= LONGEST_ROW:
        return f"a parameter of shape {tuple(shape)} has rows of 2^30 numbers or more"
    return found


def order_of(param: Tensor) -> tuple[int, ...]:
    """The dims of a parameter that `refuses` accepts, outermost in memory first."""
    found = _order(param.shape, param.stride())
    assert not isinstance(found, str)
    return found


def launch(kernel: Any, programs: int, arguments: Mapping[str, object], **options: object) -> None:
    """Run a kernel with those of the arguments that it has parameters for; nothing if there is nothing to do."""
    if programs:
        own = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        # Triton's default for fusing multiply and add changes with its versions.
        kernel[(programs,)](**own, **options, num_warps=8, enable_fp_fusion=True)


class StateTensor(NamedTuple):
    """What the state must hold under a name."""

    shape: tuple[int, ...]
    order: tuple[int, ...] = ()  # its dims, outermost first in memory
    dtype: torch.dtype = torch.float32


def moments(param: Tensor) -> dict[str, StateTensor]:
    """Momenta and second moment of a parameter, in the order of its memory."""
    shape, order = tuple(param.shape), order_of(param)
    momenta = (0, *(dim + 1 for dim in order))
    return {"exp_avg": StateTensor((3, *shape), momenta), "exp_avg_sq": StateTensor(shape, order)}


class Table:
    """Numbers that may change from step to step: sent to the device if they did, without waiting for it.

    Args:
        dtype: of the table.
        device: that it lies on.
        columns: how many it has; there is a row per tensor.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, columns: int) -> None:
        self.dtype = dtype
        self.device = device
        self.columns = columns
        self.numbers: array[Any] | None = None
        self.tensor = torch.zeros(0, columns, dtype=dtype, device=device)
        self._captured: list[Tensor] = []  # a CUDA graph reads them again at each replay
        self._spare: Tensor | None = None  # for a capture, during which no memory of the host can be had

    def update(self, numbers: array[Any]) -> Tensor:
        """The table on the device, from its numbers column by column; the same tensor as long as its shape stays."""
        # What a CUDA graph has captured writes the table at each replay: nobody knows then what it holds.
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if numbers == self.numbers and not capturing and not self._captured:
            return self.tensor
        rows = torch.frombuffer(numbers, dtype=self.dtype).view(self.columns, -1).t()
        if rows.shape != self.tensor.shape:
            self.tensor = torch.empty(rows.shape, dtype=self.dtype, device=self.device)
        self.tensor.copy_(self._room(rows.shape, capturing).copy_(rows), non_blocking=True)
        self.numbers = numbers
        return self.tensor

    def _room(self, shape: torch.Size, capturing: bool) -> Tensor:
        """Memory of the host that the device can read while Python goes on."""
        if self.device.type != "cuda":
            return torch.empty(shape, dtype=self.dtype, device="cpu")
        room = self._spare
        if not capturing or room is None or room.shape != shape:
            room = torch.empty(shape, dtype=self.dtype, device="cpu", pin_memory=True)
        if capturing:
            self._spare = None
            self._captured.append(room)
        elif self._spare is None or self._spare.shape != shape:
            self._spare = torch.empty(shape, dtype=self.dtype, device="cpu", pin_memory=True)
        return room


class Plan:
    """Tables and scratch memory for one set of tensors; they depend on shapes, strides and dtypes alone.

    Args:
        rule: the rule.
        items: the tensors.
        num_states: how many tensors a state can have that kernels read.
    """

    def __init__(self, rule: Any, items: Sequence[WorkItem], num_states: int) -> None:
        self.device = items[0].param.device
        self.num_tensors = len(items)
        self.last_used = math.inf  # in which of the kernel's steps
        self.nothing = self.zeros(0, 0)
        self._addresses = Table(torch.int64, self.device, 2 + num_states)
        self._numbers = Table(torch.float32, self.device, 3)
        self.dtypes = {
            "PARAMS": common([DTYPES[item.param.dtype] for item in items]),
            "GRADS": common([DTYPES[item.grad.dtype] for item in items]),
        }

    def integers(self, rows: Sequence[Sequence[int]], columns: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """A table that never changes."""
        return torch.tensor(rows, dtype=dtype, device="cpu").reshape(-1, columns).to(self.device)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Scratch memory."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def empty(self, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for one step."""
        return torch.empty(size, dtype=dtype, device=self.device)

    def addresses(self, pointers: Pointers) -> Tensor:
        """(tensors, 2 + states) int64: addresses of parameter, gradient and state; 0 for what there is not."""
        found = pointers.params + pointers.grads + pointers.states
        missing = self._addresses.columns * self.num_tensors - len(found)
        return self._addresses.update(found + array("q", bytes(8 * missing)))

    def numbers(self, items: Sequence[WorkItem]) -> Tensor:
        """(tensors, 3) float32: sign of the gradient, scale, decay."""
        signs = [-1.0 if item.maximize else 1.0 for item in items]
        values: list[Any] = [*signs, *[item.scale for item in items], *[item.decay for item in items]]
        if set(map(type, values)) == {float}:
            return self._numbers.update(array("f", values))
        table = self._numbers.update(array("f", [0.0 if self._is_here(x) else float(x) for x in values]))
        cells = [x.float() if self._is_here(x) else old for x, old in zip(values, table.t().flatten(), strict=True)]
        return torch.stack([cell.reshape(()) for cell in cells]).view(3, -1).t().contiguous()

    def _is_here(self, x: Any) -> bool:
        """Whether this is a tensor on the device, such as a learning rate: reading it would wait for the device."""
        return isinstance(x, Tensor) and x.device == self.device


PlanType = TypeVar("PlanType", bound=Plan)


class TritonKernel(abc.ABC, Generic[PlanType]):
    """A fused step on the host; see `kernels.Kernel`. Subclasses say what the state holds, and launch the kernels."""

    plan_type: type[PlanType]
    num_sized: int  # how many of `state_tensors`, the first ones, are of the parameter's size

    def __init__(self, rule: UpdateRule, terms: Sequence[str]) -> None:
        self.rule = rule
        self.terms = terms  # of the step, those that `launch` measures
        self._plans: dict[object, PlanType] = {}
        self._seen: dict[object, Seen[PlanType]] = {}  # by the number of tensors and the first one
        self._steps = 0
        self._packed: tuple[Mapping[str, Tensor], Any] | None = None

    @abc.abstractmethod
    def state_tensors(self, param: Tensor) -> dict[str, StateTensor]:
        """What the state of a parameter must hold, in the order of the table of addresses."""

    @abc.abstractmethod
    def pack(self, meta_params: Mapping[str, Tensor]) -> Any:
        """The meta-parameters as the device code reads them."""

    @abc.abstractmethod
    def launch(
        self,
        plan: PlanType,
        tensors: Mapping[str, Tensor],
        packed: Any,
        run: tuple[int | None, int | None],
        *,
        safeguard: bool,
        measure: bool,
    ) -> Tensor:
        """Take the step. `tensors` are the plan's tables of `addresses` and `numbers`, `run` num_steps and num_tensors.

        Returns:
            (tiles, 1 + terms) sums of squares of the change and of the terms, if they are measured.
        """

    def refuses(self, param: Tensor) -> str | None:
        """Why this parameter is left to the rule itself."""
        return refuses(param)

    def arranged(self, item: WorkItem) -> WorkItem:
        """The same as the kernel takes it. If the parameter is a copy, that is copied back after the step."""
        return _with_grad_like_param(item)

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
        """Move all work items; see `kernels.Kernel.step`."""
        given = items = work_items
        seen = self._seen.get(name_of(given))
        pointers = seen.pointers_if_alike(given, safeguard=safeguard) if seen else None
        if pointers is None:
            given = [item for item in work_items if item.param.numel()]
            items = list(map(self.arranged, given))
        if not items:
            nothing = torch.zeros(1 + len(self.terms), dtype=torch.float32, device="cpu")
            return self._squares(nothing) if measure else None
        device = items[0].param.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if seen is None or pointers is None:
                seen = self._look(items, safeguard)
                pointers = seen.pointers
            plan = seen.plan
            self._steps = plan.last_used = self._steps + 1
            if self._packed is None or self._packed[0] is not meta_params:
                self._packed = meta_params, self.pack(meta_params)
            tensors = {"addresses": plan.addresses(pointers), "numbers": plan.numbers(items)}
            run = (num_steps, num_tensors)
            sums = self.launch(plan, tensors, self._packed[1], run, safeguard=safeguard, measure=measure)
            if items is not given:
                for old, new in zip(given, items, strict=True):
                    if new.param is not old.param:
                        old.param.detach().copy_(new.param)
            # Autograd must notice that parameters changed, as after any step.
            params = [item.param for item in items]
            if seen.has_inference_tensors:
                params = [param for param in params if not param.is_inference()]
            torch.autograd.graph.increment_version(params)
            return self._squares(sums.sum(0)) if measure else None

    def _look(self, items: Sequence[WorkItem], safeguard: bool) -> Seen[PlanType]:
        """Look at tensors that may be others than in the last step."""
        plan, names = self._plan(items, safeguard), tuple(self._expected(items[0].param, safeguard))
        name, seen = name_of(items), Seen(plan, items, names, num_sized=self.num_sized, safeguard=safeguard)
        self._seen.pop(name, None)
        self._seen[name] = seen
        plans = set(self._plans.values())
        self._seen = {name: seen for name, seen in list(self._seen.items())[-PLANS_KEPT:] if seen.plan in plans}
        return seen

    def _squares(self, sums: Tensor) -> Squares:
        return Squares(sums[0], dict(zip(self.terms, sums[1:], strict=True)))

    def _plan(self, items: Sequence[WorkItem], safeguard: bool) -> PlanType:
        """The tables for these tensors; whatever is new about a tensor is checked here."""
        key = self._key(items, safeguard)
        if key not in self._plans:
            expected = [self._expected(item.param, safeguard) for item in items]
            for item, tensors in zip(items, expected, strict=True):
                check_shapes(item.param, item.grad, item.state, {n: tensor.shape for n, tensor in tensors.items()})
                _lay_out(item.state, tensors)
            key = self._key(items, safeguard)
        if key not in self._plans:
            self._plans[key] = self.plan_type(self.rule, items, len(self._expected(items[0].param, safeguard=True)))
        if len(self._plans) > PLANS_KEPT:
            oldest = min(self._plans, key=lambda key: self._plans[key].last_used)
            del self._plans[oldest]
        return self._plans[key]

    def _expected(self, param: Tensor, safeguard: bool) -> dict[str, StateTensor]:
        scalars = ("step", *COUNTERS) if safeguard else ("step",)
        return self.state_tensors(param) | {name: StateTensor((), (), torch.int64) for name in scalars}

    def _key(self, items: Sequence[WorkItem], safeguard: bool) -> object:
        """All that a plan depends on."""
        key: list[object] = [safeguard]
        for item in items:
            param, grad = item.param, item.grad
            key += (item.role, param.shape, param.stride(), param.dtype, param.device)
            key += (grad.shape, grad.dtype, grad.device)
            for tensor in item.state.values():
                key += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        return tuple(key)


def _with_grad_like_param(item: WorkItem) -> WorkItem:
    """The same with its gradient laid out as the parameter, and no lazy negation."""
    param, grad = item.param, item.grad
    if grad.stride() == param.stride() and not grad.is_neg():
        return item
    if grad.shape != param.shape or (same(grad.stride(), param.stride(), param.shape) and not grad.is_neg()):
        return item
    copy = torch.empty_strided(param.shape, param.stride(), dtype=grad.dtype, device=grad.device)
    return item._replace(grad=copy.copy_(grad))


def _lay_out(state: dict[str, Tensor], expected: Mapping[str, StateTensor]) -> None:
    """Bring state into the memory order and dtype that the kernel reads; what is right stays the same tensor."""
    for name, (shape, order, dtype) in expected.items():
        old, strides = state[name], dense_strides(shape, order)
        if old.dtype != dtype or old.is_neg() or not same(strides, old.stride(), shape):
            state[name] = torch.empty_strided(shape, strides, dtype=dtype, device=old.device).copy_(old)
