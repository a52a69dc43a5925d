"""The search for a hand-designed optimizer's best settings on one task, and which optimizers are searched.

A search is good when the best setting lies inside what was tried: a grid is extended until every neighbour of the best
has been tried, so that its edge never wins.
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

MEASURES = {"final": "tail", "mean": "mean"}
"""What a table reports -> the field of `Runs` that the setting for it is chosen by."""
Measure = Callable[[list[Hyperparameters]], Sequence[Runs]]
Point = tuple[int, int]
Key = TypeVar("Key", int, Point)


class Trial(NamedTuple):
    """A setting and what came of it."""

    hyperparameters: Hyperparameters
    runs: Runs


class Tuned(NamedTuple):
    """The result of a search."""

    best: dict[str, Trial]  # "final" and "mean", see `MEASURES`
    trials: list[Trial]  # all


@dataclasses.dataclass(frozen=True)
class Grid:
    """Half-decades of the learning rate, and for optimizers with weight decay some decades of that.

    All rates are tried without decay, then all decays at the best rates and their neighbours. Rates are 1 and 3 times
    the powers of ten, numbered so that 0 is 1, 1 is 3, -1 is 0.3; decays are 0, 1e-4, 1e-3 ... from 0 on.

    Example:
        >>> [Grid().setting((rate, 0))["lr"] for rate in (-9, -6, -1, 0)], Grid(decays=4).setting((-6, 2))
        ([3e-05, 0.001, 0.3, 1.0], {'lr': 0.001, 'weight_decay': 0.001})
    """

    lowest: int = -9
    highest: int = 0
    decays: int = 0
    """How many decays; 0: none is tried but 0."""
    limit: int = 24
    """A search that gets this many half-decades away from 1 gives up."""

    def setting(self, point: Point) -> Hyperparameters:
        """The hyper-parameters at (number of the rate, number of the decay)."""
        rate, decay = point
        lr = float(f"{3 if rate % 2 else 1}e{rate // 2}")
        if not self.decays:
            return {"lr": lr}
        return {"lr": lr, "weight_decay": float(f"1e{decay - 5}") if decay else 0.0}

    def search(self, measure: Measure) -> Tuned:
        """Try settings until the best by either measure has no untried neighbour.

        Args:
            measure: runs settings, and gives what came of each.

        Raises:
            RuntimeError: the best is still at the edge at `limit`.
        """
        seen: dict[Point, Trial] = {}
        self._extend(seen, [(rate, 0) for rate in range(self.lowest, self.highest + 1)], measure, across=False)
        if self.decays:
            rates = {rate + near for rate, _ in _best(seen) for near in (-1, 0, 1)}
            self._extend(seen, sorted(itertools.product(rates, range(self.decays))), measure, across=True)
        best = {name: seen[point] for name, point in zip(MEASURES, _best(seen), strict=True)}
        return Tuned(best, list(seen.values()))

    def _extend(self, seen: dict[Point, Trial], points: list[Point], measure: Measure, *, across: bool) -> None:
        """Try the points, then the neighbours of the best until there are no new ones; `across`: of decays too."""
        while new := [point for point in points if point not in seen]:
            settings = [self.setting(point) for point in new]
            seen.update(zip(new, map(Trial, settings, measure(settings)), strict=True))
            points = sorted({near for point in _best(seen) for near in _neighbours(point, across)})
            if any(abs(rate) > self.limit or decay > self.limit for rate, decay in points):
                raise RuntimeError(f"No setting down or up to {settings[-1]} is the best: losses improve to the edge.")


@dataclasses.dataclass(frozen=True)
class RandomSearch:
    """Settings drawn log-uniformly from a box, the same for every task.

    Example:
        >>> first, second = RandomSearch({"lr": (1e-4, 1e-1)}, num=2).settings()
        >>> 1e-4 <= first["lr"] <= 1e-1, first == second
        (True, False)
    """

    box: dict[str, tuple[float, float]]
    """Name -> (lowest, highest); "beta1" and "beta2" are drawn as 1 minus what the box says."""
    num: int = 50

    def settings(self) -> list[Hyperparameters]:
        """The settings; the first ones are the same whatever `num` is."""
        generator = torch.Generator().manual_seed(0)
        rows = []
        for _ in range(self.num):
            shares = torch.rand(len(self.box), generator=generator, dtype=torch.float64).tolist()
            drawn = {n: low * (high / low) ** u for (n, (low, high)), u in zip(self.box.items(), shares, strict=True)}
            rows.append({n: float(f"{1 - v if n.startswith('beta') else v:.6g}") for n, v in drawn.items()})
        return rows

    def search(self, measure: Measure) -> Tuned:
        """Try all settings."""
        settings = self.settings()
        seen = dict(enumerate(map(Trial, settings, measure(settings))))
        best = {name: seen[number] for name, number in zip(MEASURES, _best(seen), strict=True)}
        return Tuned(best, list(seen.values()))


def _best(seen: dict[Key, Trial]) -> list[Key]:
    """The best by each measure; between equals, the lowest key: the lowest rate."""
    return [min((trial.runs.score(field), key) for key, trial in seen.items())[1] for field in MEASURES.values()]


def _neighbours(point: Point, across: bool) -> list[Point]:
    rate, decay = point
    near = [(rate - 1, decay), (rate + 1, decay)]
    if across:  # below no decay there is nothing
        near += [(rate, decay + step) for step in (-1, 1) if decay + step >= 0]
    return near


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A hand-designed optimizer with its search."""

    label: str
    rule: type[HandDesigned]
    search: Grid | RandomSearch
    schedule: str = "constant"

    def make(self, **hyperparameters: float) -> HandDesigned:
        """The rule with some of its hyper-parameters set."""
        return self.rule(BaselineConfig(schedule=self.schedule), **hyperparameters)


_NADAMW = {  # an order of magnitude or more around what is common
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
"""The optimizers that rules are compared with, by name."""
