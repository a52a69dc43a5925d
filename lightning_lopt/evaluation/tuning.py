"""Tuning of hand-designed optimizers on one task: the searches, and the optimizers that are tuned.

The best setting must not lie at the edge of what was tried, so a grid grows until all neighbors of the best have been
tried too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from lightning_lopt.evaluation.baselines import (
    SGDM,
    Adam,
    BaselineConfig,
    HandDesigned,
    Hyperparameters,
    NAdamW,
    RMSProp,
)
from lightning_lopt.evaluation.runs import Runs

SELECTED_BY = {"final": "tail", "mean": "mean", "valid": "best_valid", "valid_end": "valid_loss"}
"""Measure in a table -> field of `Runs` by which its setting is selected."""
RunSettings = Callable[[list[Hyperparameters]], Sequence[Runs]]
"""Runs the settings, and returns the runs of each."""
LIMIT = 24
"""A search gives up this many half-decades away from a learning rate of 1."""
Point = tuple[int, int]
"""A place in a grid: the numbers of the learning rate and of the weight decay."""
Key = TypeVar("Key", int, Point, tuple[float, float])


class Trial(NamedTuple):
    """A setting and its runs."""

    hyperparameters: Hyperparameters
    runs: Runs


class SearchResult(NamedTuple):
    """The result of a search."""

    best: dict[str, Trial]  # by measure, see `SELECTED_BY`
    num_trials: int


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid over the learning rate in half-decades and, if asked for, over the weight decay in decades.

    The search first tries all rates without decay, then all decays at the best rates and their neighbors. Rates are
    numbered 0: 1, 1: 3, 2: 10, ... and -1: 0.3, -2: 0.1, ...; decays are numbered 0: 0, 1: 1e-4, 2: 1e-3, ...

    Example:
        >>> [Grid().setting((rate, 0))["lr"] for rate in (-9, -6, -1, 0)], Grid(decays=4).setting((-6, 2))
        ([3e-05, 0.001, 0.3, 1.0], {'lr': 0.001, 'weight_decay': 0.001})
    """

    lowest: int = -9
    highest: int = 0
    decays: int = 0
    """Number of decays; 0 leaves the weight decay at its default."""

    def setting(self, point: Point) -> Hyperparameters:
        """The hyper-parameters at a point of the grid."""
        rate, decay = point
        lr = float(f"{3 if rate % 2 else 1}e{rate // 2}")
        if not self.decays:
            return {"lr": lr}
        return {"lr": lr, "weight_decay": float(f"1e{decay - 5}") if decay else 0.0}

    def search(self, run: RunSettings) -> SearchResult:
        """Try settings until the best by any measure has no untried neighbor.

        Args:
            run: runs settings.

        Raises:
            RuntimeError: losses still improve at `LIMIT`.
        """
        seen: dict[Point, Trial] = {}
        self._extend(seen, [(rate, 0) for rate in range(self.lowest, self.highest + 1)], run, vary_decay=False)
        if self.decays:
            rates = {rate + near for rate, _ in _best(seen) for near in (-1, 0, 1)}
            self._extend(seen, sorted(itertools.product(rates, range(self.decays))), run, vary_decay=True)
        return _result(seen)

    def _extend(self, seen: dict[Point, Trial], points: list[Point], run: RunSettings, *, vary_decay: bool) -> None:
        """Try the points, then the neighbors of the best until none of them is new."""
        while new := [point for point in points if point not in seen]:
            settings = [self.setting(point) for point in new]
            seen.update(zip(new, map(Trial, settings, run(settings)), strict=True))
            points = sorted({near for point in _best(seen) for near in _neighbors(point, vary_decay)})
            if any(abs(rate) > LIMIT or decay > LIMIT for rate, decay in points):
                raise RuntimeError(
                    f"The search reached {settings[-1]} and losses still improve to the edge; check the task."
                )


@dataclasses.dataclass(frozen=True)
class RandomSearch:
    """A random search over a box, log-uniform, with the same settings on every task.

    Example:
        >>> first, second = RandomSearch({"lr": (1e-4, 1e-1)}, num=2).settings()
        >>> 1e-4 <= first["lr"] <= 1e-1, first == second
        (True, False)
    """

    box: dict[str, tuple[float, float]]
    """Hyper-parameter -> (lowest, highest); for "beta1" and "beta2", the bounds of 1 - beta."""
    num: int = 50

    def settings(self) -> list[Hyperparameters]:
        """The settings; a larger `num` only appends to them."""
        generator = torch.Generator().manual_seed(0)
        rows = []
        for _ in range(self.num):
            uniform = torch.rand(len(self.box), generator=generator, dtype=torch.float64).tolist()
            drawn = {n: low * (high / low) ** u for (n, (low, high)), u in zip(self.box.items(), uniform, strict=True)}
            rows.append({n: float(f"{1 - v if n.startswith('beta') else v:.6g}") for n, v in drawn.items()})
        return rows

    def search(self, run: RunSettings) -> SearchResult:
        """Try all settings."""
        settings = self.settings()
        return _result(dict(enumerate(map(Trial, settings, run(settings)))))


def _result(seen: dict[Key, Trial]) -> SearchResult:
    return SearchResult(best_by_measure(seen), len(seen))


def best_by_measure(seen: dict[Key, Trial]) -> dict[str, Trial]:
    """Measure -> the trial with the lowest loss by it."""
    return {name: seen[key] for name, key in zip(SELECTED_BY, _best(seen), strict=True)}


def _best(seen: dict[Key, Trial]) -> list[Key]:
    """The keys of the best trials, one per measure. Ties go to the lowest key, that is, the lowest rate."""
    losses = ({key: trial.runs.tuning_loss(field) for key, trial in seen.items()} for field in SELECTED_BY.values())
    return [min((loss, key) for key, loss in each.items())[1] for each in losses]


def _neighbors(point: Point, vary_decay: bool) -> list[Point]:
    rate, decay = point
    near = [(rate - 1, decay), (rate + 1, decay)]
    if vary_decay:
        near += [(rate, decay + step) for step in (-1, 1) if decay + step >= 0]
    return near


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A hand-designed optimizer with its search space."""

    label: str
    rule: type[HandDesigned]
    search: Grid | RandomSearch
    schedule: str = "constant"

    def make(self, **hyperparameters: float) -> HandDesigned:
        """The rule with these hyper-parameters, and defaults for the others."""
        return self.rule(BaselineConfig(schedule=self.schedule), **hyperparameters)


_NADAMW = {  # at least an order of magnitude around common values
    "lr": (1e-4, 1e-1),
    "weight_decay": (1e-5, 1e-1),
    "warmup": (1e-2, 2e-1),
    "beta1": (1e-2, 3e-1),
    "beta2": (1e-4, 1e-1),
    "eps": (1e-10, 1e-5),
}
BASELINES = {
    "adam": Baseline("tuned Adam", Adam, Grid()),
    "adamw": Baseline("tuned AdamW + cosine", Adam, Grid(decays=4), "cosine"),
    "sgdm": Baseline("tuned SGD momentum", SGDM, Grid(highest=2)),
    "rmsprop": Baseline("tuned RMSProp", RMSProp, Grid()),
    "nadamw": Baseline("searched NAdamW + cosine", NAdamW, RandomSearch(_NADAMW), "cosine"),
}
"""The optimizers that learned rules are compared with, by name."""
