"""Imitation: a rule learns another's steps before it learns to do better; a start that is no lottery.

Sources: Chen et al. 2020 (arXiv 2010.09089, "Training stronger baselines"): half the square of the difference, along a
teacher's runs. Schroeter's thesis, eq. 5.11: the network is first made to answer g with -lr g, of which the sign counts
more than the size. The latter is `Imitation(SGD, "sign")` on the task `random-slopes`, whose gradients are noise:

    teacher = {"kind": "lstm", "hidden_size": 1, "out_scale": 0.0}
    teacher |= {"nominal_stepsize": 0.01, "nominal_grad_estimator": "SGD"}

A meta-training proper then goes on from the weights that this one exports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.meta.backprop import backpropagated, leaves_of
from lightning_lopt.meta.estimators import Estimate, Estimator
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.meta.unroll import Inner, MetaParams, Unroll, detach
from lightning_lopt.rules import StepContext, UpdateRule, make
from lightning_lopt.tasks.base import check_choice

OMEGA = 2.0  # of eq. 5.11, the thesis's choice: a wrong sign counts e^4 times as much as a right one


def sign_distance(step: Tensor, target: Tensor) -> Tensor:
    """|y - y*| exp(-omega sgn(y y*)), coordinate by coordinate: eq. 5.11.

    Example:
        >>> sign_distance(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 2.0]))
        tensor([ 0.1353, 22.1672])
    """
    return (step - target).abs() * torch.exp(-OMEGA * torch.sign(step * target))


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": lambda step, target: 0.5 * (step - target).square(),
    "sign": sign_distance,
}


@dataclasses.dataclass(frozen=True)
class Imitation(Estimator):
    """The gradient of the mean distance between the rule's steps and a teacher's, on runs that the teacher leads.

    The rule sees the teacher's gradients and parameters, and keeps its own state; backpropagation goes through
    `truncation` steps of it. `meta_loss` is the distance; meta-validation is of real runs as ever.

    Args:
        teacher: a rule, or `{"kind": ..., **config}` as for `rules.make`; one that needs no `share`.
        distance: "squared", half of it, or "sign", see `sign_distance`.
        num_runs: inner runs.
        truncation: steps per estimate.
        horizon: lengths of the episodes.

    Raises:
        ValueError: an unknown distance, or a teacher that needs `share`.
    """

    teacher: dict[str, Any] | UpdateRule
    distance: str = "squared"
    num_runs: int = 8
    truncation: int = 20
    horizon: Horizon = Horizon(100)

    def __post_init__(self) -> None:
        check_choice("distance", self.distance, DISTANCES)
        if self._lesson(UpdateRule()).teacher.needs_shared_context:
            raise ValueError(
                f"teacher={self.teacher!r} is not allowed: its steps need what all tensors share. "
                "Take a teacher that needs no share, such as kind 'star' or 'lstm'."
            )

    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> Inner:
        """Fresh runs of the teacher."""
        return self._taught(unroll).start(generator, self.horizon.draw(self.num_runs, generator))

    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Let the teacher go on by a truncation, and compare each of its steps with the rule's."""
        taught, inner, errors = self._taught(unroll), state, []
        size = self.truncation * self.num_runs * sum(param[0].numel() for param in inner.params.values())
        with torch.enable_grad():
            leaves = leaves_of(meta_params)
            for _ in range(self.truncation):
                inner, _, _ = taught.slot(leaves, inner, generator, lambda n: self.horizon.draw(n, generator))
                errors.append(torch.stack([pair.error.sum() for pair in inner.states.values()]).sum())
            loss = torch.stack(errors).sum() / size
            gradient, finite = backpropagated(loss, leaves)
        return Estimate(loss.detach(), gradient, detach(inner), finite & loss.isfinite())

    def _taught(self, unroll: Unroll) -> Unroll:
        return dataclasses.replace(unroll, rule=self._lesson(unroll.rule))

    def _lesson(self, pupil: UpdateRule) -> _Lesson:
        if isinstance(self.teacher, UpdateRule):
            return _Lesson(self.teacher, pupil, self.distance)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _Lesson(make(**self.teacher), pupil, self.distance)


class _Pair(NamedTuple):
    """State of a tensor in a lesson."""

    teacher: Any
    pupil: Any
    error: Tensor  # () distance of the last steps, summed over the tensor


class _Lesson(UpdateRule):
    """Takes the teacher's steps, and notes in its state how far the pupil's are from them."""

    def __init__(self, teacher: UpdateRule, pupil: UpdateRule, distance: str) -> None:
        super().__init__(kind="lesson")
        self.teacher, self.pupil, self.distance = teacher, pupil, DISTANCES[distance]
        self.needs_shared_context, self.needs_loss = pupil.needs_shared_context, pupil.needs_loss

    def init_state(self, param: Tensor) -> _Pair:
        return _Pair(self.teacher.init_state(param), self.pupil.init_state(param), param.new_zeros(()))

    def shared_context(
        self,
        meta_params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        states: Mapping[str, Any],
        params: Mapping[str, Tensor],
        context: StepContext,
        *,
        in_place: bool = False,
    ) -> tuple[Any, dict[str, Any]]:
        own = {name: pair.pupil for name, pair in states.items()}
        shared, own = self.pupil.shared_context(meta_params, grads, own, params, context, in_place=in_place)
        return shared, {name: pair._replace(pupil=own[name]) for name, pair in states.items()}

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Any]:
        known = {name: value.detach() for name, value in self.teacher.named_parameters()}
        target, teacher = self.teacher.update(known, grad, state.teacher, param, context._replace(shared=None))
        step, pupil = self.pupil.update(meta_params, grad, state.pupil, param, context)
        return target.detach(), _Pair(teacher, pupil, self.distance(step, target.detach()).sum())
