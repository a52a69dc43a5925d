"""What the Triton kernels share on the host: which tensors they take, and tables that follow them from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
import triton
from torch import Tensor

from lightning_lopt.kernels import WorkItem
from lightning_lopt.kernels.cuda.tiling import DTYPES, View, dense_strides, same, view

PLANS_KEPT = 4  # lists of tensors: those of the last few steps, where not all have gradients
PlanType = TypeVar("PlanType")


def outdated() -> str | None:
    """Why this Triton cannot be used, None if it can."""
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    return f"triton {triton.__version__} is older than 3.6" if version < (3, 6) else None


def refuses(param: Tensor) -> str | None:
    """Why no Triton kernel takes this parameter, None if they do."""
    if type(param) not in (Tensor, torch.nn.Parameter):
        return f"{type(param).__name__} parameters have no Triton kernel"
    if param.dtype not in DTYPES:
        return f"the Triton kernel takes {', '.join(str(dtype) for dtype in DTYPES)}, not {param.dtype}"
    if view(param) is None:
        return f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} has gaps in memory"
    return None


def check_state_dtype(dtype: torch.dtype) -> None:
    """Refuse what state cannot be kept in."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype={dtype} is not allowed: it must be torch.float32 or torch.bfloat16.")


def known_view(param: Tensor) -> View:
    """The view of a parameter that `refuses` has nothing against."""
    lies = view(param)
    assert lies is not None
    return lies


def like(tensor: Tensor, param: Tensor) -> Tensor:
    """The tensor, or a copy of it, laid out as `param`."""
    if same(tensor.stride(), param.stride(), param.shape):
        return tensor
    return torch.empty_strided(param.shape, param.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def bring(state: dict[str, Tensor], orders: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
    """Lay state out: name -> its dims, outermost first. What is right already stays the tensor that it is."""
    for name, order in orders.items():
        old = state[name]
        strides = dense_strides(old.shape, order)
        if old.dtype != dtype or not same(strides, old.stride(), old.shape):
            state[name] = torch.empty_strided(old.shape, strides, dtype=dtype, device=old.device).copy_(old)


class Plans(Generic[PlanType]):
    """What was made for the last few lists of tensors."""

    def __init__(self) -> None:
        self.known: dict[object, PlanType] = {}

    def get(self, params: Sequence[Tensor], grads: Sequence[Tensor], make: Callable[[], PlanType]) -> PlanType:
        """The plan for tensors of these shapes, strides and dtypes."""
        key = tuple((p.shape, p.stride(), p.dtype, g.dtype, p.device) for p, g in zip(params, grads, strict=True))
        if key not in self.known:
            while len(self.known) >= PLANS_KEPT:
                del self.known[next(iter(self.known))]
            self.known[key] = make()
        return self.known[key]


class Table:
    """Numbers of a table that may change from step to step: sent to the device when they did, without waiting."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.rows: Sequence[tuple[float, ...]] | None = None
        self.tensor = torch.zeros(0, dtype=dtype, device=device)
        self._captured: list[Tensor] = []  # a CUDA graph reads them again at each replay

    def update(self, rows: Sequence[tuple[float, ...]]) -> Tensor:
        """The table on the device; the same tensor as long as its shape stays."""
        if rows == self.rows:
            return self.tensor
        on_gpu = self.device.type == "cuda"
        sent = torch.tensor(rows, dtype=self.dtype, pin_memory=on_gpu)
        if sent.shape != self.tensor.shape:
            self.tensor = torch.empty_like(sent, device=self.device)
        self.tensor.copy_(sent, non_blocking=True)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            self._captured.append(sent)
        self.rows = rows
        return self.tensor


class Addresses:
    """A row of addresses for each tensor: parameter, gradient, then its state's; at the end whether all are aligned."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.table = Table(torch.int64, device)
        self.held: list[tuple[Tensor, ...]] = [()] * number  # so that their addresses stay theirs
        self.known: list[tuple[int, ...]] = [()] * number

    def update(
        self,
        parts: Sequence[WorkItem],
        grads: Sequence[Tensor],
        names: Sequence[Sequence[str]],
        lay_out: Callable[[int], None],
        *,
        width: int,
    ) -> Tensor:
        """(tensors, width), with zeros for what a tensor does not have.

        Args:
            parts: the tensors.
            grads: their gradients.
            names: of each tensor's state, in the order of the table.
            lay_out: called with the number of a tensor whose state is new here, before its addresses are taken.
            width: of a row.
        """
        rows = []
        for number, (part, grad) in enumerate(zip(parts, grads, strict=True)):
            own, held = names[number], self.held[number]
            if len(held) != len(own) or any(part.state[n] is not t for n, t in zip(own, held, strict=True)):
                lay_out(number)
                self.held[number] = held = tuple(part.state[name] for name in own)
                self.known[number] = tuple(tensor.data_ptr() for tensor in held)
            row = (part.param.data_ptr(), grad.data_ptr(), *self.known[number])
            aligned = int(all(address % 16 == 0 for address in row[:4]))
            rows.append((*row, *[0] * (width - 1 - len(row)), aligned))
        return self.table.update(rows)


def numbers(table: Table, parts: Sequence[WorkItem]) -> Tensor:
    """(tensors, 3): sign of the gradient, scale, decay."""
    columns: list[list[float | Tensor]] = [
        [-1.0 if part.maximize else 1.0 for part in parts],
        [part.scale for part in parts],
        [part.decay for part in parts],
    ]
    known = [[0.0 if isinstance(x, Tensor) else x for x in column] for column in columns]
    result = table.update(list(zip(*known, strict=True)))
    if not any(isinstance(x, Tensor) for column in columns for x in column):
        return result
    result = result.clone()
    for number, column in enumerate(columns):
        if any(isinstance(x, Tensor) for x in column):
            result[:, number] = torch.stack([torch.as_tensor(x).to(result).reshape(()) for x in column])
    return result
