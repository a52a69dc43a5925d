"""What an evaluation found, and the arithmetic on it: ratios of losses, their means over tasks, counts."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import NamedTuple

from lightning_lopt.evaluation.runs import Runs
from lightning_lopt.evaluation.suites import Case
from lightning_lopt.evaluation.tuning import Trial

DEFAULT_ADAM = "adam-1e-3"
BEST_OF = ("adam", "adamw", "sgdm")
"""The tuned baselines of which the best, task by task, is one of the references."""
REFERENCES = {"adam": "tuned Adam", "best": "best tuned", DEFAULT_ADAM: "Adam 1e-3"}
"""What ratios are taken to: name -> in words."""
MEASURES = {"final": "final", "mean": "mean", "test": "test_loss"}
"""What is compared: name -> field of `Runs`. The test loss is that of the setting chosen for the final one."""
TUNED = ("final", "mean")
"""The measures that settings are chosen for."""
SLACK = 1.02


class Ratio(NamedTuple):
    """A loss divided by a reference's."""

    value: float
    spread: float
    """Standard error of its logarithm over seeds, from the differences seed by seed; NaN with one seed."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimizer on a case."""

    case: Case
    optimizer: str
    label: str
    best: dict[str, Trial]
    """"final" and "mean" -> the setting that was chosen for it and its runs; the same for both where none is tuned."""
    num_settings: int
    """How many settings were tried."""
    step_seconds: float
    """CPU seconds of a training step, `runs.step_seconds`."""

    def loss(self, measure: str) -> float:
        """The final or mean training loss, or the test loss, mean over seeds, as it was."""
        return self.runs(measure).average(MEASURES[measure])

    def bounded(self, measure: str) -> list[float]:
        """The same per seed and within bounds, `Runs.bounded`."""
        return self.runs(measure).bounded(MEASURES[measure])

    def runs(self, measure: str) -> Runs:
        """The runs that a measure is of."""
        return self.best["mean" if measure == "mean" else "final"].runs


class Summary(NamedTuple):
    """An optimizer over all cases."""

    optimizer: str
    label: str
    ratios: dict[tuple[str, str], Ratio]
    """(measure, reference) -> geometric mean over the cases; without the references that were not run."""
    not_worse: dict[str, int]
    """Measure -> cases where the loss is at most 2 % above that of Adam at 1e-3."""
    diverged: int
    """Runs that diverged."""
    num_cases: int
    num_runs: int
    step_time: float
    """CPU time of a training step, gradient and update, divided by Adam's: geometric mean over the cases."""


@dataclasses.dataclass(frozen=True)
class Results:
    """All entries of an evaluation.

    The ratio of an optimizer to a reference is that of their losses' means over seeds, each loss within `Runs.bounded`:
    from a thousandth of the task's initial loss, below which differences do not count, to twice it.
    """

    seeds: int
    entries: list[Entry]

    @property
    def cases(self) -> list[Case]:
        """In order."""
        return list(dict.fromkeys(entry.case for entry in self.entries))

    @property
    def optimizers(self) -> list[str]:
        """In order."""
        return list(dict.fromkeys(entry.optimizer for entry in self.entries))

    @property
    def references(self) -> list[str]:
        """The references that ratios can be taken to."""
        ran = set(self.optimizers)
        return [name for name in REFERENCES if name in ran or (name == "best" and ran & set(BEST_OF))]

    @property
    def main_reference(self) -> str:
        """The reference of tables and plots: tuned Adam where it was run."""
        return "adam" if "adam" in self.references else DEFAULT_ADAM

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
        """The entry that a reference means; "best" is the one of `BEST_OF` with the lowest loss there."""
        if name != "best":
            return self.entry(case, name)
        rivals = [self.entry(case, rival) for rival in BEST_OF if rival in self.optimizers]
        return min(rivals, key=lambda entry: statistics.fmean(entry.bounded(measure)))

    def ratio(self, case: Case, optimizer: str, reference: str, measure: str) -> Ratio:
        """The optimizer's loss divided by the reference's."""
        ours = self.entry(case, optimizer).bounded(measure)
        theirs = self.reference(case, reference, measure).bounded(measure)
        logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
        spread = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
        return Ratio(statistics.fmean(ours) / statistics.fmean(theirs), spread)

    def step_time(self, case: Case, optimizer: str) -> float:
        """CPU time of a training step, gradient and update, divided by Adam's."""
        return self.entry(case, optimizer).step_seconds / self.entry(case, DEFAULT_ADAM).step_seconds

    def summary(self) -> list[Summary]:
        """One row per optimizer."""
        return [self._summarize(optimizer) for optimizer in self.optimizers]

    def _summarize(self, optimizer: str) -> Summary:
        rows = {(m, r): self._ratios(optimizer, r, m) for m in MEASURES for r in self.references}
        entries = [self.entry(case, optimizer) for case in self.cases]
        diverged = [flag for entry in entries for flag in entry.best["final"].runs.diverged]
        return Summary(
            optimizer=optimizer,
            label=entries[0].label,
            ratios={key: _geometric_mean(ratios) for key, ratios in rows.items()},
            not_worse={m: sum(ratio.value <= SLACK for ratio in rows[m, DEFAULT_ADAM]) for m in MEASURES},
            diverged=sum(diverged),
            num_cases=len(entries),
            num_runs=len(diverged),
            step_time=statistics.geometric_mean(self.step_time(case, optimizer) for case in self.cases),
        )

    def _ratios(self, optimizer: str, reference: str, measure: str) -> list[Ratio]:
        return [self.ratio(case, optimizer, reference, measure) for case in self.cases]


def _geometric_mean(ratios: list[Ratio]) -> Ratio:
    spread = math.sqrt(sum(ratio.spread**2 for ratio in ratios)) / len(ratios)
    return Ratio(statistics.geometric_mean(ratio.value for ratio in ratios), spread)
