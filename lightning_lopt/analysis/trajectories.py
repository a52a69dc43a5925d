"""Trajectories of a rule's state: in real runs, without gradients, and under constant gradients.

Source: Maheswaranathan et al. 2021 (arXiv 2011.02159), sections 5.1 to 5.5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from lightning_lopt.analysis.coordinate import LATE_STEP, CoordinateDynamics
from lightning_lopt.analysis.dynamics import find_fixed_points
from lightning_lopt.analysis.response import effective_learning_rate
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import UpdateRule
from lightning_lopt.tasks import Task


class Trajectory(NamedTuple):
    """Recorded coordinates of one tensor; n is the number of runs times that of coordinates."""

    grads: Tensor  # (steps, n)
    params: Tensor  # (steps, n)
    states: Tensor  # (steps + 1, n, d)


class Recording(NamedTuple):
    """Recorded runs of a rule on a task."""

    losses: Tensor  # (steps, runs)
    tensors: dict[str, Trajectory]  # by the name of the parameter

    @property
    def states(self) -> Tensor:
        """(steps + 1, n, d) states of all tensors."""
        return torch.cat([trajectory.states for trajectory in self.tensors.values()], 1)

    @property
    def grads(self) -> Tensor:
        """(steps, n) gradients of all tensors."""
        return torch.cat([trajectory.grads for trajectory in self.tensors.values()], 1)


def record(
    rule: UpdateRule, task: Task, *, steps: int = 200, runs: int = 16, coordinates: int = 16, seed: int = 0
) -> Recording:
    """Run a rule on a task, and record gradients, values and states of some coordinates of every tensor.

    The states are those of `CoordinateDynamics`. For a component-wise rule they equal the states of the run; for others
    they are the states that the coordinate's gradients alone would lead to.

    Args:
        rule: any rule without `needs_shared_context`.
        task: the task to run it on.
        steps: length of the runs.
        runs: number of runs.
        coordinates: maximum number of coordinates per tensor, drawn at random.
        seed: seed of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    unroll = Unroll(rule, task, objective="raw", tell_horizon=False)
    lengths = torch.full((runs,), steps + 1)
    inner = unroll.start(generator, lengths)
    chosen = {
        name: torch.randperm(param[0].numel(), generator=generator)[:coordinates]
        for name, param in inner.params.items()
    }
    meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
    losses = []
    grads_seen: dict[str, list[Tensor]] = {name: [] for name in chosen}
    params_seen: dict[str, list[Tensor]] = {name: [] for name in chosen}
    with torch.no_grad():
        for _ in range(steps):
            before = inner
            inner, slot, batch = unroll.slot(meta_params, inner, generator, lambda number: lengths[:number])
            grads, _ = vmap(task.grad_and_value)(before.params, batch)
            losses.append(slot.losses)
            for name, coordinate in chosen.items():
                grads_seen[name].append(grads[name].flatten(1)[:, coordinate].flatten())
                params_seen[name].append(before.params[name].flatten(1)[:, coordinate].flatten())
    dynamics = CoordinateDynamics.from_rule(rule)
    tensors = {}
    for name in chosen:
        own_grads = torch.stack(grads_seen[name]).double()
        own_params = torch.stack(params_seen[name]).double()
        _, states = dynamics.run(own_grads, params=own_params, first=0.0)
        tensors[name] = Trajectory(own_grads, own_params, states)
    return Recording(torch.stack(losses), tensors)


class Projection(NamedTuple):
    """Principal components of states."""

    mean: Tensor  # (d,)
    axes: Tensor  # (k, d) orthonormal rows
    explained: Tensor  # (k,) fractions of the variance

    def __call__(self, states: Tensor) -> Tensor:
        """Project states (..., d) to (..., k)."""
        projected: Tensor = (states - self.mean) @ self.axes.mT
        return projected


def principal_components(states: Tensor, number: int = 3) -> Projection:
    """Compute the principal components of states.

    Args:
        states: (..., d) states.
        number: number of components, at most d.
    """
    rows = states.reshape(-1, states.shape[-1])
    mean = rows.mean(0)
    variances, vectors = torch.linalg.eigh((rows - mean).mT @ (rows - mean) / len(rows))
    variances = variances.clamp(min=0)
    order = variances.argsort(descending=True)[:number]
    return Projection(mean, vectors[:, order].mT, variances[order] / variances.sum().clamp(min=1e-300))


class Schedule(NamedTuple):
    """A run from the initial state without gradients."""

    states: Tensor  # (steps + 1, d)
    learning_rates: Tensor  # (steps + 1,) effective learning rates at these states
    drift: Tensor  # (steps,) updates in spite of zero gradients


def autonomous(rule: UpdateRule, *, steps: int = 200) -> Schedule:
    """Run a rule without gradients to see its autonomous learning-rate schedule (section 5.3).

    Args:
        rule: any rule.
        steps: number of steps.
    """
    deltas, states = CoordinateDynamics.from_rule(rule).run(torch.zeros(steps, 1), first=0.0)
    rates = [effective_learning_rate(rule, state, step=float(index)) for index, state in enumerate(states[:, 0])]
    return Schedule(states[:, 0], torch.stack(rates), deltas[:, 0])


class SCurve(NamedTuple):
    """Fixed points of the state under constant gradients (section 5.4). Gradients without one are left out."""

    gradients: Tensor  # (n,)
    states: Tensor  # (n, d)
    learning_rates: Tensor  # (n,) effective learning rates at these states, slopes at gradient 0


def s_curve(rule: UpdateRule, gradients: Tensor, *, settle: int = 1000, step: float = LATE_STEP) -> SCurve:
    """Find the state, and its effective learning rate, that each of several constant gradients leads to.

    Args:
        rule: any rule.
        gradients: (n,) constant gradients.
        settle: steps to run before the search for the fixed point.
        step: updates made so far.
    """
    _, states = CoordinateDynamics.from_rule(rule, step=step).run(gradients.double().expand(settle, -1))
    found: list[tuple[float, Tensor]] = []
    for gradient, near in zip(gradients.tolist(), states[-1], strict=True):
        points = find_fixed_points(rule, gradient=gradient, initial_states=near.unsqueeze(0), step=step)
        found += [(gradient, state) for state in points.states[:1]]
    kept = torch.stack([state for _, state in found]) if found else states.new_zeros((0, states.shape[-1]))
    kept_gradients = torch.tensor([gradient for gradient, _ in found]).double()
    return SCurve(kept_gradients, kept, effective_learning_rate(rule, kept, step=step))
