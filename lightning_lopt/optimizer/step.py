"""A step that the rule proposes for a tensor, and how it is taken: watched, counted, measured, written."""

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
    """A tensor's step, or that of this process's shard of it."""

    param: Tensor
    flat: dict[str, Tensor]  # its state, as the optimizer keeps it
    grad: Tensor
    value: Tensor  # in the dtype of the arithmetic
    moved: Tensor  # the new value
    new: Any  # the new state
    old: Any
    terms: dict[str, Tensor]  # of the update, where it is measured

    def is_finite(self) -> Tensor:
        """() bool: of what it was made from, and of what it would write."""
        return guard.all_finite(self.grad, self.moved, *guard.changed(self.new, self.old))

    def change(self) -> Tensor:
        """Of the parameter."""
        return self.moved.to(self.value.dtype) - self.value


def take(step: ProposedStep, totals: Totals | None, *, safeguard: bool) -> None:
    """Write a tensor's new value and state, unless the safeguard finds them not finite."""
    counted: Tensor | int = 1
    if safeguard:
        counted = step.is_finite()
        step = _chosen(step, counted, step.param)
    if totals is not None:
        totals.add(step.change(), step.terms, counted)
    step.param.copy_(sharding.placed_as(step.param, step.moved))
    for name, tensor in zip(step.new._fields, step.new, strict=True):
        step.flat[name] = sharding.placed_as(step.flat[name], tensor)
    step.flat["step"] = step.flat["step"] + counted


def take_together(
    steps: Sequence[tuple[sharding.DTensorShard, ProposedStep]], totals: Totals | None, *, safeguard: bool
) -> None:
    """The same for shards: whether tensors are finite, and what is measured of them, is told in one message."""
    verdicts: list[list[Tensor]] = [[] for _ in steps]
    if safeguard or totals is not None:
        own = [(shard, _to_tell(step, measured=totals is not None, watched=safeguard)) for shard, step in steps]
        verdicts = sharding.added_up(own)
    for (shard, step), verdict in zip(steps, verdicts, strict=True):
        counted: Tensor | int = verdict[0] == 0 if safeguard else 1
        if totals is not None:
            change, *terms = (torch.where(verdict[0] == 0, square, 0.0) for square in verdict[1:])
            totals.add_squares(math.prod(shard.shape), change, dict(zip(step.terms, terms, strict=True)))
        local = sharding.local_of(step.param)
        if isinstance(counted, Tensor):
            step = _chosen(step, counted, local)
        local.copy_(step.moved)
        for name, tensor in zip(step.new._fields, step.new, strict=True):
            step.flat[name] = sharding.with_local(step.flat[name], tensor)
        step.flat["step"] = step.flat["step"] + counted


def _to_tell(step: ProposedStep, *, measured: bool, watched: bool) -> list[Tensor]:
    """Of a shard: whether it is spoilt, as a number; sums of squares of the change, and of each term."""
    spoilt = (~step.is_finite()).to(step.value.dtype) if watched else step.value.new_zeros(())
    tensors = [step.change(), *step.terms.values()] if measured else []
    return [spoilt, *(tensor.square().sum() for tensor in tensors)]


def _chosen(step: ProposedStep, finite: Tensor, param: Tensor) -> ProposedStep:
    """The step where it is finite, and where not, one that stays; and count it."""
    guard.count(step.flat, finite)
    return step._replace(moved=torch.where(finite, step.moved, param), new=guard.chosen(finite, step.new, step.old))
