"""What a kernel has seen of the tensors of a step, by which it knows the next one to be like it.

Tables are made from shapes, strides, dtypes and devices. To compare all of these at every step takes as long as the
step of AdamW, so most of it is told from which objects the tensors are and where they lie.
"""

from __future__ import annotations

import operator
import weakref
from array import array
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from lightning_lopt.kernels import WorkItem

PlanType = TypeVar("PlanType")
_dtype, _device = attrgetter("dtype"), attrgetter("device")


class Pointers(NamedTuple):
    """Addresses of tensors, the states' by name."""

    params: array[int]
    grads: array[int]
    states: array[int]


class Seen(Generic[PlanType]):
    """The tensors of a step, by which the next one is known to be like it. None is kept alive.

    A tensor that is the same object at the same address lies on the same device in the same dtype. What may have
    changed in place is its size and its order, and for tensors without gaps strides and their number tell.
    """

    def __init__(
        self, plan: PlanType, items: Sequence[WorkItem], names: Sequence[str], *, num_sized: int, safeguard: bool
    ) -> None:
        """The first `num_sized` tensors of a state are of the parameter's size; the others have one number."""
        self.plan = plan
        self.names = names
        self.num_sized = num_sized
        self.safeguard = safeguard
        self.roles = [item.role for item in items]
        params, states = [item.param for item in items], self._states(items)
        self.has_inference_tensors = any(param.is_inference() for param in params)
        self._refs = list(map(weakref.ref, [*params, *states]))
        self.pointers = Pointers(*(_addresses(each) for each in (params, [item.grad for item in items], states)))
        self._layouts = self._layouts_of(items, params, states)

    def pointers_if_alike(self, items: Sequence[WorkItem], *, safeguard: bool) -> Pointers | None:
        """The addresses of tensors, None if anything but the gradients' addresses is not as it was."""
        params = [item.param for item in items]
        if safeguard != self.safeguard or [item.role for item in items] != self.roles:
            return None
        states = self._states(items)
        if not all(map(operator.is_, [ref() for ref in self._refs], [*params, *states])):
            return None
        found = Pointers(*(_addresses(each) for each in (params, [item.grad for item in items], states)))
        same = found.params == self.pointers.params and found.states == self.pointers.states
        return found if same and self._layouts_of(items, params, states) == self._layouts else None

    def _states(self, items: Sequence[WorkItem]) -> list[Tensor]:
        return [item.state[name] for name in self.names for item in items]

    def _layouts_of(self, items: Sequence[WorkItem], params: list[Tensor], states: list[Tensor]) -> tuple[Any, ...]:
        grads = [item.grad for item in items]
        sized = [*params, *grads, *states[: self.num_sized * len(items)]]
        return (
            *(list(map(get, sized)) for get in (Tensor.numel, Tensor.stride)),
            *(list(map(get, grads)) for get in (_dtype, _device, Tensor.is_neg)),
        )


def name_of(items: Sequence[WorkItem]) -> object:
    """What a set of tensors is likely to be found by again."""
    return len(items), id(items[0].param) if items else None


def _addresses(tensors: Sequence[Tensor]) -> array[int]:
    return array("q", map(Tensor.data_ptr, tensors))
