"""A proposed step of one tensor, and taking it: check it, count it, measure it, write it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.optimizer import safeguard as guard
from lightning_lopt.optimizer import sharding
from lightning_lopt.optimizer.metrics import Totals


class ProposedStep(NamedTuple):
    """The step that a rule proposes for a tensor, or for this process's shard of it."""

    param: Tensor
    flat: dict[str, Tensor]  # its state, as the optimizer keeps it
    grad: Tensor
    value: Tensor  # in the dtype of the arithmetic
    moved: Tensor  # the new value
    new: Any  # the new state
    old: Any
    terms: dict[str, Tensor]  # of the update, if the step is measured

    def is_finite(self) -> Tensor:
        """() bool: whether the gradient, the new value and the new state are finite."""
        return guard.all_finite(self.grad, self.moved, *guard.new_tensors(self.new, self.old))

    def change(self) -> Tensor:
        """The change of the parameter."""
        return self.moved.to(self.value.dtype) - self.value


def take(step: ProposedStep, totals: Totals | None, *, safeguard: bool) -> None:
    """Write a tensor's new value and state, unless the safeguard is on and they are not finite."""
    counted: Tensor | int = 1
    if safeguard:
        counted = step.is_finite()
        step = _unless_skipped(step, counted, step.param)
    if totals is not None:
        totals.add(step.change(), step.terms, counted)
    step.param.copy_(sharding.placed_as(step.param, step.moved))
    for name, tensor in zip(step.new._fields, step.new, strict=True):
        step.flat[name] = sharding.placed_as(step.flat[name], tensor)
    step.flat["step"] = step.flat["step"] + counted


def take_together(
    steps: Sequence[tuple[sharding.DTensorShard, ProposedStep]], totals: Totals | None, *, safeguard: bool
) -> None:
    """The same for shards; what is finite, and the metrics, go through one message for all tensors."""
    verdicts: list[list[Tensor]] = [[] for _ in steps]
    if safeguard or totals is not None:
        own = [(shard, _message(step, measured=totals is not None, watched=safeguard)) for shard, step in steps]
        verdicts = sharding.sums_over_shards(own)
    for (shard, step), verdict in zip(steps, verdicts, strict=True):
        counted: Tensor | int = verdict[0] == 0 if safeguard else 1
        if totals is not None:
            change, *terms = (torch.where(verdict[0] == 0, square, 0.0) for square in verdict[1:])
            totals.add_squares(math.prod(shard.shape), change, dict(zip(step.terms, terms, strict=True)))
        local = sharding.local_of(step.param)
        if isinstance(counted, Tensor):
            step = _unless_skipped(step, counted, local)
        local.copy_(step.moved)
        for name, tensor in zip(step.new._fields, step.new, strict=True):
            step.flat[name] = sharding.with_local(step.flat[name], tensor)
        step.flat["step"] = step.flat["step"] + counted


def _message(step: ProposedStep, *, measured: bool, watched: bool) -> list[Tensor]:
    """Of a shard: 1 if it is not finite, else 0; the sums of squares of the change, and of each term."""
    not_finite = (~step.is_finite()).to(step.value.dtype) if watched else step.value.new_zeros(())
    tensors = [step.change(), *step.terms.values()] if measured else []
    return [not_finite, *(tensor.square().sum() for tensor in tensors)]


def _unless_skipped(step: ProposedStep, finite: Tensor, param: Tensor) -> ProposedStep:
    """The step if it is finite, else one that changes nothing; counts skipped steps, too."""
    guard.count(step.flat, finite)
    return step._replace(
        moved=torch.where(finite, step.moved, param), new=guard.where_finite(finite, step.new, step.old)
    )
