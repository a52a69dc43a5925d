"""Response-surface fitting: tune a few interpretable numbers of a rule on many tasks together.

An evolution strategy follows a noisy gradient and forgets past evaluations. When a rule depends on a dozen numbers, it
is cheaper to evaluate points all over a box, each on every task at full horizon; to repeat that in a smaller box around
the mean of the best points (the cross-entropy method, Rubinstein 1999); and to fit one quadratic to all points (Box and
Wilson 1951, "On the experimental attainment of optimum conditions"). All points see the same starts and batches, so
that differences between them are not due to noise in these.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.quasirandom import SobolEngine
from torch.utils._pytree import tree_map

from lightning_lopt.meta.unroll import Inner, MetaParams, Unroll
from lightning_lopt.rules import UpdateRule
from lightning_lopt.tasks import Task

FLOOR = 1e-3  # times a task's initial loss: lower losses count as equal
NUM_VALID = 512  # examples of the validation split that are looked at
AT_ONCE = 16  # points that are validated at a time
LAST = 20  # the final loss is the mean over the last 1 / LAST of a run, at least ten steps


class Knob(NamedTuple):
    """The range of a number that is tuned."""

    low: float
    high: float


class Scores(NamedTuple):
    """The scores of n points on one task; lower is better."""

    final: Tensor  # (n,) logarithm of the training loss at the end
    mean: Tensor  # (n,) logarithm of the training loss averaged over the run
    valid: Tensor  # (n,) logarithm of the validation loss at the end


def sample(
    knobs: Mapping[str, Knob], num: int, *, seed: int, center: Mapping[str, float] | None = None, width: float = 1.0
) -> Tensor:
    """Sample (num, knobs) points that fill the box evenly (a Sobol sequence).

    Args:
        knobs: name -> range.
        num: number of points.
        seed: seed of the sequence.
        center: sample only a part of the box around this point (default: the whole box).
        width: width of that part as a fraction of the box.

    Example:
        >>> sample({"rate": Knob(0.0, 1.0)}, 4, seed=0).shape
        torch.Size([4, 1])
    """
    low, high = (torch.tensor([knob[side] for knob in knobs.values()]) for side in (0, 1))
    if center is not None:
        middle, half = torch.tensor([center[name] for name in knobs]), width * (high - low) / 2
        low, high = torch.maximum(low, middle - half), torch.minimum(high, middle + half)
    drawn: Tensor = SobolEngine(len(knobs), scramble=True, seed=seed).draw(num)  # type: ignore[no-untyped-call]
    return low + (high - low) * drawn


def score(
    rule: UpdateRule, meta_params: Sequence[MetaParams], task: Task, steps: int, *, seed: int, tell: bool = True
) -> Scores:
    """Evaluate n sets of meta-parameters on a task at once, from the same start on the same batches.

    Args:
        rule: the update rule.
        meta_params: n complete sets of its meta-parameters.
        task: the task.
        steps: length of the runs.
        seed: seed of starts and batches.
        tell: tell the rule the length of the runs.

    Example:
        >>> from lightning_lopt import rules, tasks
        >>> rule = rules.make("hyperparam")
        >>> score(rule, [rule.meta_params()] * 2, tasks.make("synthetic-mlp"), 20, seed=0).final.shape
        torch.Size([2])
    """
    n, generator = len(meta_params), torch.Generator().manual_seed(seed)
    stacked = {name: torch.stack([each[name].detach() for each in meta_params]) for name in meta_params[0]}
    unroll, horizon = Unroll(rule, task, "raw", tell_horizon=tell), torch.tensor([steps])
    with torch.no_grad():
        inner = unroll.start(generator, horizon, sides=n)
        inner, record = unroll.run(stacked, inner, steps, generator, lambda k: horizon.expand(k), sides=n, batched=True)
        valid = _validation_losses(task, inner)
    losses, valid = (torch.nan_to_num(each, nan=torch.inf).clamp(max=1e9) for each in (record.losses, valid))
    floor = FLOOR * losses[0].mean()
    final, mean = losses[-max(steps // LAST, 10) :].mean(0), losses.mean(0)
    return Scores(*(each.clamp(min=floor).log() for each in (final, mean, valid)))


def _validation_losses(task: Task, inner: Inner) -> Tensor:
    """(n,) losses of n runs on the same examples of the split "valid", a few runs at a time."""
    found = []
    for first in range(0, len(inner.step), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        params, constants = tree_map(operator.itemgetter(some), (inner.params, inner.constants))
        count = len(next(iter(params.values())))
        found.append(vmap(task.loss)(params, task.eval_batch("valid", constants, count, size=NUM_VALID)))
    return torch.cat(found)


class Surface(NamedTuple):
    """A quadratic function of the knobs, which are scaled to [-1, 1]."""

    knobs: dict[str, Knob]
    coefficients: Tensor  # (1 + d + d (d + 1) / 2,) of the monomials up to degree 2
    start: Tensor  # (d,) mean of the best evaluated points; `center` has it in the knobs' own units

    def center(self) -> dict[str, float]:
        """Return the mean of the best evaluated points."""
        return self._named(self.start)

    def minimum(self, *, pull: float = 0.1, steps: int = 2000) -> dict[str, float]:
        """Minimize the quadratic within the box.

        Args:
            pull: penalty on the squared distance from `center`, in units of [-1, 1].
            steps: steps of Adam.
        """
        point = self.start.clone().requires_grad_()
        optimizer = torch.optim.Adam([point], lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            value = _monomials(point[None]) @ self.coefficients + pull * (point - self.start).square().sum()
            torch.autograd.backward(value)
            optimizer.step()
            point.data.clamp_(-1, 1)
        return self._named(point.detach())

    def _named(self, unit: Tensor) -> dict[str, float]:
        low, high = _sides(self.knobs)
        return dict(zip(self.knobs, ((low + high) / 2 + (high - low) / 2 * unit).tolist(), strict=True))


def fit(knobs: Mapping[str, Knob], points: Tensor, values: Tensor, *, best: int = 12, ridge: float = 3.0) -> Surface:
    """Fit a quadratic by ridge regression, in which better points have larger weights.

    Args:
        knobs: name -> range.
        points: (n, d) evaluated points.
        values: (n,) their values; lower is better.
        best: number of the best points whose mean is the surface's center.
        ridge: penalty on the quadratic coefficients; that on the linear ones is a tenth of it.

    Example:
        >>> knobs = {"x": Knob(-1.0, 1.0), "y": Knob(-1.0, 1.0)}
        >>> points = sample(knobs, 64, seed=0)
        >>> surface = fit(knobs, points, (points - torch.tensor([0.5, -0.25])).square().sum(1), ridge=1e-6)
        >>> {name: round(value, 2) for name, value in surface.minimum(pull=0.0).items()}
        {'x': 0.5, 'y': -0.25}
    """
    unit, values = _to_unit(knobs, points), values.double()
    terms, size = _monomials(unit), unit.shape[1]
    weights = torch.exp(-(values - values.min()) / (0.5 * values.std() + 1e-9)) + 0.05
    penalty = torch.full((terms.shape[1],), ridge, dtype=torch.float64)
    penalty[0], penalty[1 : 1 + size] = 0.0, 0.1 * ridge
    weighted = terms * weights.unsqueeze(1)
    coefficients = torch.linalg.solve(weighted.T @ terms + torch.diag(penalty), weighted.T @ values)
    return Surface(dict(knobs), coefficients, unit[values.argsort()[:best]].mean(0))


def _sides(knobs: Mapping[str, Knob]) -> tuple[Tensor, Tensor]:
    sides = torch.tensor(list(knobs.values()), dtype=torch.float64)
    return sides[:, 0], sides[:, 1]


def _to_unit(knobs: Mapping[str, Knob], points: Tensor) -> Tensor:
    low, high = _sides(knobs)
    return (points.double() - (low + high) / 2) / ((high - low) / 2)


def _monomials(unit: Tensor) -> Tensor:
    first, second = torch.triu_indices(unit.shape[1], unit.shape[1])
    return torch.cat([torch.ones_like(unit[:, :1]), unit, unit[:, first] * unit[:, second]], 1)
