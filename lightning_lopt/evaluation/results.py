"""Results of an evaluation: ratios of losses, their means over tasks, counts."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from lightning_lopt.evaluation.runs import Runs
from lightning_lopt.evaluation.suites import Case
from lightning_lopt.evaluation.tuning import SELECTED_BY, Trial

DEFAULT_ADAM = "adam-1e-3"
BEST_OF = ("adam", "adamw", "sgdm")
"""The reference "best" is the best of these tuned baselines, task by task."""
REFERENCES = {
    "adam": "tuned Adam",
    "best": "best tuned",
    "adamw-tuned": "tuned AdamW",
    "adamw-recipe": "AdamW recipe",
    DEFAULT_ADAM: "Adam 1e-3",
}
"""The references that losses are divided by: name -> name in tables."""


class Measure(NamedTuple):
    """A loss that is compared."""

    label: str
    field: str
    """Of `Runs`."""
    tuned_for: str
    """The measure in `tuning.SELECTED_BY` by which the setting was chosen."""


MEASURES = {
    "final": Measure("final training loss", "final", "final"),
    "mean": Measure("mean training loss", "mean", "mean"),
    "test": Measure("test loss", "test_loss", "final"),
    "valid": Measure("best validation loss", "best_valid", "valid"),
    "valid_end": Measure("final validation loss", "valid_loss", "valid_end"),
    "test_valid": Measure("test loss, chosen by validation", "best_test", "valid"),
}
"""What is compared.

"test" is the test loss at the end of the setting with the best final training loss; "test_valid" that of the setting
and the step with the lowest validation loss. Measures of validation are NaN for tasks without such data.
"""
TUNED = tuple(SELECTED_BY)
"""The measures that settings are tuned for."""
SLACK = 1.02
"""A loss counts as no worse than default Adam's up to this multiple of it."""


class Ratio(NamedTuple):
    """An optimizer's loss divided by a reference's."""

    value: float
    spread: float
    """Standard error of the logarithm over seeds, paired by seed; NaN with one seed."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Results of one optimizer on one case."""

    case: Case
    optimizer: str
    label: str
    best: dict[str, Trial]
    """Measure of `TUNED` -> the setting chosen for it, with its runs; all are the same if nothing is tuned."""
    num_settings: int
    """Number of settings that were tried."""
    step_seconds: float
    """CPU seconds of one training step, as `compare` measures it; NaN for rivals where it cannot be compared."""

    def loss(self, measure: str) -> float:
        """A loss of `MEASURES`: the mean over seeds, unclamped."""
        return self.runs(measure).average(MEASURES[measure].field)

    def clamped(self, measure: str) -> list[float]:
        """The same loss per seed, within the bounds of `Runs.clamped`."""
        return self.runs(measure).clamped(MEASURES[measure].field)

    def runs(self, measure: str) -> Runs:
        """The runs that a measure is taken from."""
        return self.best[MEASURES[measure].tuned_for].runs


class Summary(NamedTuple):
    """Results of one optimizer over all cases."""

    optimizer: str
    ratios: dict[tuple[str, str], Ratio]
    """(measure, reference) -> geometric mean over the cases that have both, for the references that were run."""
    as_good: dict[tuple[str, str], int]
    """(measure, reference) -> number of cases where the loss is at most the reference's."""
    not_worse: dict[str, int]
    """Measure -> number of cases where the loss is at most 2 % above that of Adam at 1e-3."""
    diverged: int
    """Number of runs that diverged."""
    num_cases: int
    num_runs: int
    step_time: float
    """CPU time of a training step (gradient and update) divided by Adam's: geometric mean over the cases."""


@dataclasses.dataclass(frozen=True)
class Results:
    """All entries of an evaluation, and the statistics of them.

    The ratio of an optimizer to a reference divides their mean losses over seeds. Each loss is first clamped to between
    a thousandth of the task's initial loss, below which differences do not count, and twice the initial loss.
    """

    seeds: int
    entries: list[Entry]

    @property
    def cases(self) -> list[Case]:
        """Without repetition, in order."""
        return list(dict.fromkeys(entry.case for entry in self.entries))

    @property
    def optimizers(self) -> list[str]:
        """Without repetition, in order."""
        return list(dict.fromkeys(entry.optimizer for entry in self.entries))

    @property
    def validated(self) -> bool:
        """Whether some case has validation data."""
        return any(entry.best["valid"].runs.best_valid for entry in self.entries)

    @property
    def measures(self) -> list[str]:
        """The measures that some case has."""
        return [name for name in MEASURES if self.validated or name in ("final", "mean", "test")]

    @property
    def references(self) -> list[str]:
        """The references that were run."""
        ran = set(self.optimizers)
        return [name for name in REFERENCES if name in ran or (name == "best" and ran & set(BEST_OF))]

    @property
    def main_reference(self) -> str:
        """The reference of tables and plots: tuned Adam if it was run, else tuned AdamW, else Adam 1e-3."""
        return next(name for name in ("adam", "adamw-tuned", DEFAULT_ADAM) if name in self.references)

    @property
    def labels(self) -> dict[str, str]:
        """Optimizer -> its name in tables and plots; of a path, the last part where that is unambiguous."""
        full = {entry.optimizer: entry.label for entry in self.entries}
        short = {name: label.rsplit("/", 1)[-1] for name, label in full.items()}
        taken = list(short.values())
        return {name: short[name] if taken.count(short[name]) == 1 else label for name, label in full.items()}

    def entry(self, case: Case, optimizer: str) -> Entry:
        """The entry of an optimizer on a case."""
        return next(entry for entry in self.entries if (entry.case, entry.optimizer) == (case, optimizer))

    def reference(self, case: Case, name: str, measure: str) -> Entry:
        """The entry of a reference on a case; for "best", that of `BEST_OF` with the lowest loss."""
        if name != "best":
            return self.entry(case, name)
        rivals = [self.entry(case, rival) for rival in BEST_OF if rival in self.optimizers]
        return min(rivals, key=lambda entry: statistics.fmean(entry.clamped(measure)))

    def ratio(self, case: Case, optimizer: str, reference: str, measure: str) -> Ratio:
        """The optimizer's loss divided by the reference's."""
        ours = self.entry(case, optimizer).clamped(measure)
        theirs = self.reference(case, reference, measure).clamped(measure)
        logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
        return Ratio(statistics.fmean(ours) / statistics.fmean(theirs), deviation(logs) / math.sqrt(len(logs)))

    def step_time(self, case: Case, optimizer: str) -> float:
        """CPU time of a training step (gradient and update) divided by Adam's."""
        return self.entry(case, optimizer).step_seconds / self.entry(case, DEFAULT_ADAM).step_seconds

    def summary(self) -> list[Summary]:
        """A summary per optimizer."""
        return [self._summarize(optimizer) for optimizer in self.optimizers]

    def _summarize(self, optimizer: str) -> Summary:
        rows = {(m, r): self._ratios(optimizer, r, m) for m in MEASURES for r in self.references}
        entries = [self.entry(case, optimizer) for case in self.cases]
        diverged = [flag for entry in entries for flag in entry.best["final"].runs.diverged]
        return Summary(
            optimizer=optimizer,
            ratios={key: _geometric_mean(ratios) for key, ratios in rows.items()},
            as_good={key: sum(ratio.value <= 1.0 for ratio in ratios) for key, ratios in rows.items()},
            not_worse={m: sum(ratio.value <= SLACK for ratio in rows[m, DEFAULT_ADAM]) for m in MEASURES},
            diverged=sum(diverged),
            num_cases=len(entries),
            num_runs=len(diverged),
            step_time=statistics.geometric_mean(self.step_time(case, optimizer) for case in self.cases),
        )

    def _ratios(self, optimizer: str, reference: str, measure: str) -> list[Ratio]:
        return [self.ratio(case, optimizer, reference, measure) for case in self.cases]


def deviation(values: Sequence[float]) -> float:
    """The standard deviation; NaN of less than two numbers, and if one is not finite.

    Example:
        >>> deviation([1.0, 3.0]), deviation([1.0]), deviation([1.0, math.nan])
        (1.4142135623730951, nan, nan)
    """
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def _geometric_mean(ratios: list[Ratio]) -> Ratio:
    ratios = [ratio for ratio in ratios if not math.isnan(ratio.value)]
    if not ratios:
        return Ratio(math.nan, math.nan)
    spread = math.sqrt(sum(ratio.spread**2 for ratio in ratios)) / len(ratios)
    return Ratio(statistics.geometric_mean(ratio.value for ratio in ratios), spread)
