"""Where a rule's state goes: recorded in real runs, without gradients, and under constant ones.

Maheswaranathan et al. 2021 (arXiv 2011.02159), sections 5.1 to 5.5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from lightning_lopt.analysis.cells import LATE, Cell
from lightning_lopt.analysis.dynamics import FixedPoints, find_fixed_points
from lightning_lopt.analysis.response import effective_learning_rate
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import UpdateRule
from lightning_lopt.tasks import Task


class Trajectory(NamedTuple):
    """What some coordinates of one tensor saw and made of it in a run; n = runs times coordinates."""

    grads: Tensor  # (steps, n)
    params: Tensor  # (steps, n)
    states: Tensor  # (steps + 1, n, d)


class Recording(NamedTuple):
    """Runs of a rule on a task."""

    losses: Tensor  # (steps, runs)
    tensors: dict[str, Trajectory]  # name of the parameter -> what was recorded

    @property
    def states(self) -> Tensor:
        """(steps + 1, n, d) of all tensors."""
        return torch.cat([trajectory.states for trajectory in self.tensors.values()], 1)

    @property
    def grads(self) -> Tensor:
        """(steps, n) of all tensors."""
        return torch.cat([trajectory.grads for trajectory in self.tensors.values()], 1)


def record(
    rule: UpdateRule, task: Task, *, steps: int = 200, runs: int = 16, coordinates: int = 16, seed: int = 0
) -> Recording:
    """Run a rule on a task, and keep gradients, values and states of some coordinates of every tensor.

    The states are those of `Cell`: of a component-wise rule the run's own, of any other what it would make of the
    coordinate's gradients alone.

    Args:
        rule: any rule without `needs_shared_context`.
        task: what to run it on.
        steps: length of the runs.
        runs: how many.
        coordinates: at most so many of each tensor, drawn at random.
        seed: of everything.
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
    losses, seen = [], []
    with torch.no_grad():
        for _ in range(steps):
            state, before = generator.get_state(), inner
            batch = task.batch(generator, inner.constants, runs)
            grads, _ = vmap(task.grad_and_value)(inner.params, batch)
            generator.set_state(state)  # the step draws the same batch
            inner, rows, _ = unroll.slot(meta_params, inner, generator, lambda number: lengths[:number])
            losses.append(rows.losses)
            seen.append((_pick(grads, chosen), _pick(before.params, chosen)))
    cell, tensors = Cell.of(rule), {}
    for name in chosen:
        columns = (torch.stack([step[which][name] for step in seen]).double() for which in (0, 1))
        grads_of, params_of = columns
        _, states = cell.run(grads_of, params=params_of, first=0.0)
        tensors[name] = Trajectory(grads_of, params_of, states)
    return Recording(torch.stack(losses), tensors)


def _pick(values: dict[str, Tensor], chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.flatten(1)[:, chosen[name]].flatten() for name, value in values.items()}


class Projection(NamedTuple):
    """Principal components of states."""

    mean: Tensor  # (d,)
    axes: Tensor  # (k, d) orthonormal rows
    explained: Tensor  # (k,) shares of the variance

    def __call__(self, states: Tensor) -> Tensor:
        """(..., d) -> (..., k)."""
        projected: Tensor = (states - self.mean) @ self.axes.mT
        return projected


def principal_components(states: Tensor, number: int = 3) -> Projection:
    """Principal components of states (..., d).

    Args:
        states: visited states.
        number: of components, at most d.
    """
    rows = states.reshape(-1, states.shape[-1])
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).mT @ (rows - mean) / len(rows))
    order = values.argsort(descending=True)[:number]
    return Projection(
        mean, vectors[:, order].mT, values[order].clamp(min=0) / values.clamp(min=0).sum().clamp(min=1e-300)
    )


class Schedule(NamedTuple):
    """What a rule does without gradients."""

    states: Tensor  # (steps + 1, d)
    learning_rates: Tensor  # (steps + 1,) effective ones on the way
    drift: Tensor  # (steps,) updates made although there was no gradient


def autonomous(rule: UpdateRule, *, steps: int = 200) -> Schedule:
    """The learning-rate schedule that runs by itself (section 5.3): from the initial state on, without gradients.

    Args:
        rule: any rule.
        steps: how many.
    """
    deltas, states = Cell.of(rule).run(torch.zeros(steps, 1), first=0.0)
    rates = [effective_learning_rate(rule, state, step=float(index)) for index, state in enumerate(states[:, 0])]
    return Schedule(states[:, 0], torch.stack(rates), deltas[:, 0])


class SCurve(NamedTuple):
    """Fixed points that constant gradients hold the state at (section 5.4); rows without one are left out."""

    gradients: Tensor  # (n,)
    states: Tensor  # (n, d)
    learning_rates: Tensor  # (n,) effective ones there, slopes at gradient 0


def s_curve(rule: UpdateRule, gradients: Tensor, *, settle: int = 1000, step: float = LATE) -> SCurve:
    """Where large gradients, seen for long, take the state, and which learning rate it then has.

    Args:
        rule: any rule.
        gradients: (n,) values to be held.
        settle: steps to let the state come near its fixed point first.
        step: updates made before.
    """
    _, states = Cell.of(rule, step=step).run(gradients.double().expand(settle, -1))
    found: list[tuple[float, Tensor]] = []
    for gradient, near in zip(gradients.tolist(), states[-1], strict=True):
        points: FixedPoints = find_fixed_points(rule, gradient=gradient, initial_states=near.unsqueeze(0), step=step)
        found += [(gradient, state) for state in points.states[:1]]
    kept = torch.stack([state for _, state in found]) if found else states.new_zeros((0, states.shape[-1]))
    return SCurve(torch.tensor([g for g, _ in found]).double(), kept, effective_learning_rate(rule, kept, step=step))
