"""The host side that the Triton kernels share: which tensors they take, and tables that follow them from step to step.

A kernel reaches tensors by their addresses, so nothing on the device would notice a tensor of another size. At every
step `TritonKernel` therefore compares shapes, strides, dtypes and devices with those that its tables were made for. It
keeps no parameter, gradient or state alive.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from lightning_lopt.kernels import Squares, WorkItem
from lightning_lopt.kernels.cuda.layout import DTYPES, common, dense_strides, memory_order, same
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
    """Numbers that may change from step to step: sent to the device if they did, without waiting for it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.rows: Sequence[tuple[float, ...]] | None = None
        self.tensor = torch.zeros(0, dtype=dtype, device=device)
        self._captured: list[Tensor] = []  # a CUDA graph reads them again at each replay

    def update(self, rows: Sequence[tuple[float, ...]]) -> Tensor:
        """The table on the device; the same tensor as long as its shape stays."""
        if rows == self.rows:
            return self.tensor
        on_gpu = self.device.type == "cuda"
        sent = torch.tensor(rows, dtype=self.dtype, device="cpu", pin_memory=on_gpu)
        if sent.shape != self.tensor.shape:
            self.tensor = torch.empty(sent.shape, dtype=self.dtype, device=self.device)
        self.tensor.copy_(sent, non_blocking=True)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            self._captured.append(sent)
        self.rows = rows
        return self.tensor


class Plan:
    """Tables and scratch memory for one set of tensors; they depend on shapes, strides and dtypes alone.

    Args:
        rule: the rule.
        items: the tensors.
        names: of each tensor's state, in the order of its addresses.
    """

    def __init__(self, rule: Any, items: Sequence[WorkItem], names: Sequence[tuple[str, ...]]) -> None:
        self.device = items[0].param.device
        self.num_tensors = len(items)
        self.names = names
        self.nothing = self.zeros(0, 0)
        self._addresses = Table(torch.int64, self.device)
        self._numbers = Table(torch.float32, self.device)
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

    def addresses(self, items: Sequence[WorkItem], width: int) -> Tensor:
        """(tensors, width) int64: addresses of parameter, gradient and state; 0 for what a tensor does not have."""
        rows = []
        for item, names in zip(items, self.names, strict=True):
            own = [item.state[name].data_ptr() for name in names]
            rows.append((item.param.data_ptr(), item.grad.data_ptr(), *own, *[0] * (width - 2 - len(own))))
        return self._addresses.update(rows)

    def numbers(self, items: Sequence[WorkItem]) -> Tensor:
        """(tensors, 3) float32: sign of the gradient, scale, decay."""
        rows: list[tuple[Any, ...]] = [(-1.0 if item.maximize else 1.0, item.scale, item.decay) for item in items]
        if all(type(scale) is float and type(decay) is float for _, scale, decay in rows):
            return self._numbers.update(rows)
        table = self._numbers.update([tuple(0.0 if self._is_here(x) else float(x) for x in row) for row in rows])
        cells = [
            x.float() if self._is_here(x) else table[i, j] for i, row in enumerate(rows) for j, x in enumerate(row)
        ]
        return torch.stack([cell.reshape(()) for cell in cells]).reshape(table.shape)

    def _is_here(self, x: Any) -> bool:
        """Whether this is a tensor on the device, such as a learning rate: reading it would wait for the device."""
        return isinstance(x, Tensor) and x.device == self.device


PlanType = TypeVar("PlanType", bound=Plan)


class TritonKernel(abc.ABC, Generic[PlanType]):
    """A fused step on the host; see `kernels.Kernel`. Subclasses say what the state holds, and launch the kernels."""

    plan_type: type[PlanType]

    def __init__(self, rule: UpdateRule, terms: Sequence[str]) -> None:
        self.rule = rule
        self.terms = terms  # of the step, those that `launch` measures
        self._plans: dict[object, PlanType] = {}
        self._last: tuple[object, PlanType] | None = None
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
        items: Sequence[WorkItem],
        packed: Any,
        run: tuple[int | None, int | None],
        *,
        safeguard: bool,
        measure: bool,
    ) -> Tensor:
        """Take the step. `run` is num_steps and num_tensors.

        Returns:
            (tiles, 1 + terms) sums of squares of the change and of the terms, if they are measured.
        """

    def refuses(self, param: Tensor) -> str | None:
        """Why this parameter is left to the rule itself."""
        return refuses(param)

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
        items = [_with_grad_like_param(item) for item in work_items if item.param.numel()]
        if not items:
            nothing = torch.zeros(1 + len(self.terms), dtype=torch.float32, device="cpu")
            return self._squares(nothing) if measure else None
        device = items[0].param.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            plan = self._plan(items, safeguard)
            if self._packed is None or self._packed[0] is not meta_params:
                self._packed = meta_params, self.pack(meta_params)
            run = (num_steps, num_tensors)
            sums = self.launch(plan, items, self._packed[1], run, safeguard=safeguard, measure=measure)
            # Autograd must notice that parameters changed, as after any step.
            torch.autograd.graph.increment_version([i.param for i in items if not i.param.is_inference()])
            return self._squares(sums.sum(0)) if measure else None

    def _squares(self, sums: Tensor) -> Squares:
        return Squares(sums[0], dict(zip(self.terms, sums[1:], strict=True)))

    def _plan(self, items: Sequence[WorkItem], safeguard: bool) -> PlanType:
        """The tables for these tensors; whatever is new about a tensor is checked here."""
        key = self._key(items, safeguard)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        if key not in self._plans:
            expected = [self._expected(item.param, safeguard) for item in items]
            for item, tensors in zip(items, expected, strict=True):
                check_shapes(item.param, item.grad, item.state, {n: tensor.shape for n, tensor in tensors.items()})
                _lay_out(item.state, tensors)
            key = self._key(items, safeguard)
        plan = self._plans.pop(key, None) or self.plan_type(self.rule, items, list(map(tuple, expected)))
        self._plans[key] = plan
        while len(self._plans) > PLANS_KEPT:
            del self._plans[next(iter(self._plans))]
        self._last = key, plan
        return plan

    def _expected(self, param: Tensor, safeguard: bool) -> dict[str, StateTensor]:
        scalars = ("step", *COUNTERS) if safeguard else ("step",)
        return self.state_tensors(param) | {name: StateTensor((), (), torch.int64) for name in scalars}

    def _key(self, items: Sequence[WorkItem], safeguard: bool) -> object:
        """All that a plan depends on. Taken at every step, hence without a call per tensor."""
        key: list[object] = [safeguard]
        for item in items:
            param, grad = item.param, item.grad
            key += (param.shape, param.stride(), param.dtype, param.device, grad.shape, grad.dtype, grad.device)
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
