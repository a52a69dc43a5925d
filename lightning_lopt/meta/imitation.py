"""Imitation learning: a rule first learns to reproduce a teacher's steps, as a starting point for meta-training.

Sources: Chen et al. 2020 (arXiv 2010.09089, "Training stronger baselines") minimize half the squared difference of the
steps along the teacher's runs. Schroeter's thesis, eq. 5.11, first trains the network to answer g with -lr g, with a
distance that weighs the sign more than the size. That is `Imitation(SGD, "sign")` on the task `random-slopes`, whose
gradients are noise, with the teacher

    SGD = {"kind": "lstm", "hidden_size": 1, "out_scale": 0.0}
    SGD |= {"nominal_stepsize": 0.01, "nominal_grad_estimator": "SGD"}

Meta-training then starts from the weights that the imitation run exports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.meta.backprop import as_leaves, backpropagate
from lightning_lopt.meta.estimators import Estimate, Estimator
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.meta.unroll import Inner, MetaParams, Unroll, detach
from lightning_lopt.rules import StepContext, UpdateRule, make
from lightning_lopt.tasks.base import check_choice

OMEGA = 2.0  # of eq. 5.11, as in the thesis: a wrong sign costs e^4 times as much as a right one


def sign_distance(step: Tensor, target: Tensor) -> Tensor:
    """Compute |y - y*| exp(-omega sgn(y y*)) per coordinate (eq. 5.11).

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
    """The gradient of the mean distance between the steps of the rule, as a student, and those of a teacher.

    Only the teacher's steps are taken. The student sees the gradients and parameters of the teacher's runs and keeps a
    state of its own, through which `truncation` steps are backpropagated. `meta_loss` is the distance; meta-validation
    still measures the student's own runs.

    Args:
        teacher: a rule, or `{"kind": ..., **config}` as for `rules.make`. It must not need a shared context.
        distance: "squared", half the squared difference, or "sign", see `sign_distance`.
        num_runs: number of inner runs.
        truncation: steps per estimate.
        horizon: lengths of the episodes.

    Raises:
        ValueError: for an unknown distance, or a teacher that needs a shared context.
    """

    teacher: dict[str, Any] | UpdateRule
    distance: str = "squared"
    num_runs: int = 8
    truncation: int = 20
    horizon: Horizon = Horizon(100)

    def __post_init__(self) -> None:
        check_choice("distance", self.distance, DISTANCES)
        teacher = self._imitating(UpdateRule()).teacher
        if teacher.needs_shared_context or teacher.needs_run_state:
            raise ValueError(
                f"teacher={self.teacher!r} is not allowed: its steps need a context that all tensors share. "
                "Use a teacher without one, such as kind 'star' or 'lstm'."
            )

    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> Inner:
        """Start fresh runs of the teacher."""
        return self._teacher_unroll(unroll).start(generator, self.horizon.draw(self.num_runs, generator))

    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Advance the teacher's runs by a truncation, and compare each of its steps with the student's."""
        teacher_unroll = self._teacher_unroll(unroll)
        inner = state
        distances = []
        size = self.truncation * self.num_runs * sum(param[0].numel() for param in inner.params.values())
        with torch.enable_grad():
            leaves = as_leaves(meta_params)
            for _ in range(self.truncation):
                inner, _, _ = teacher_unroll.slot(leaves, inner, generator, lambda n: self.horizon.draw(n, generator))
                distances.append(torch.stack([state.distance.sum() for state in inner.states.values()]).sum())
            loss = torch.stack(distances).sum() / size
            gradient, finite = backpropagate(loss, leaves)
        return Estimate(loss.detach(), gradient, detach(inner), finite & loss.isfinite())

    def _teacher_unroll(self, unroll: Unroll) -> Unroll:
        return dataclasses.replace(unroll, rule=self._imitating(unroll.rule))

    def _imitating(self, student: UpdateRule) -> _ImitatingRule:
        if isinstance(self.teacher, UpdateRule):
            return _ImitatingRule(self.teacher, student, self.distance)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _ImitatingRule(make(**self.teacher), student, self.distance)


class _ImitationState(NamedTuple):
    """The state of one tensor."""

    teacher: Any
    student: Any
    distance: Tensor  # () between the last steps, summed over the tensor


class _ImitatingRule(UpdateRule):
    """Takes the teacher's steps, and stores their distance from the student's in its state."""

    def __init__(self, teacher: UpdateRule, student: UpdateRule, distance: str) -> None:
        super().__init__(kind="imitation")
        self.teacher = teacher
        self.student = student
        self.distance = DISTANCES[distance]
        self.needs_shared_context = student.needs_shared_context
        self.needs_loss = student.needs_loss
        self.needs_run_state = student.needs_run_state
        self.needs_num_steps = student.needs_num_steps

    def init_state(self, param: Tensor) -> _ImitationState:
        return _ImitationState(self.teacher.init_state(param), self.student.init_state(param), param.new_zeros(()))

    def init_run_state(self, like: Tensor) -> Any:
        return self.student.init_run_state(like)

    def update_run_state(
        self, meta_params: Mapping[str, Tensor], run: Any, params: Mapping[str, Tensor], context: StepContext
    ) -> Any:
        return self.student.update_run_state(meta_params, run, params, context)

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
        own = {name: state.student for name, state in states.items()}
        shared, own = self.student.shared_context(meta_params, grads, own, params, context, in_place=in_place)
        return shared, {name: state._replace(student=own[name]) for name, state in states.items()}

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Any]:
        fixed = {name: value.detach() for name, value in self.teacher.named_parameters()}
        target, teacher = self.teacher.update(
            fixed, grad, state.teacher, param, context._replace(shared=None, run=None)
        )
        step, student = self.student.update(meta_params, grad, state.student, param, context)
        distance = self.distance(step, target.detach()).sum()
        return target.detach(), _ImitationState(teacher, student, distance)
