"""A claim: a statement of a paper, how it is measured here, and the checks that decide whether it was reproduced.

Verdicts are computed: a claim's `measure` returns numbers, and its checks are conditions on these numbers alone. They
are strict: a difference counts only if it exceeds twice its standard error over seeds.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_lopt.claims.experiment import Experiment

Numbers = Mapping[str, Sequence[float]]
REPRODUCED, PARTLY, NOT, BEYOND = "reproduced", "partly", "not reproduced", "no paper's claim"
PAPER, OWN, CONTROL = "paper", "own", "control"
STANDARD_ERRORS = 2.0


class Measurement(NamedTuple):
    """The result of measuring a claim; its numbers are saved in a JSON file."""

    numbers: dict[str, list[float]]
    """Quantity -> its values, usually one per seed in the seeds' order; NaN if it could not be measured. For checks."""
    data: dict[str, Any] = {}
    """Further data for the plot: dicts, lists, numbers and strings."""


class Assessment(NamedTuple):
    """What a check found."""

    holds: bool
    value: float
    """The mean of the quantity that is judged, or what the check's text names."""
    spread: float
    """The standard deviation of that quantity over seeds; NaN if there is one value."""
    bound: float
    """What it is compared with."""
    margin: float
    """How far beyond the bound it must be: twice the standard error of the difference, 0 for exact numbers; NaN if
    there is one seed, so that no difference can count."""
    n: int
    """The number of values."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A condition on the numbers of a measurement.

    Example:
        >>> check = below("loss of STAR", "loss of Adam", factor=0.9)
        >>> check.text, check({"loss of STAR": [0.4, 0.5, 0.6], "loss of Adam": [1.0, 1.1, 1.0]})
        ('loss of STAR < 0.9 x loss of Adam', True)
        >>> check({"loss of STAR": [0.1, 0.5, 1.6], "loss of Adam": [1.0, 1.1, 1.0]})  # within the noise
        False
        >>> check({"loss of STAR": [math.nan], "loss of Adam": [1.0]})
        False
    """

    text: str
    """The condition in words."""
    quantities: tuple[str, ...]
    """The quantities that it reads. It does not hold if any of their values is NaN."""
    condition: Callable[..., bool | Assessment]
    """The condition as a function of the quantities' values: one list per quantity, in order. A bool is for conditions
    without noise."""
    published: str = ""
    """The paper's result: a number if it gives one, else its words."""
    kind: str = PAPER
    """"paper", a statement of the paper; "own", about a rule or bound of this package's; "control", a condition
    without which a finding says nothing. Only the first kind decides the verdict."""
    controls: tuple[Check, ...] = ()
    """Positive controls: the check counts only if all of them hold too."""

    def __call__(self, numbers: Numbers) -> bool:
        """Whether the condition holds, with its controls.

        Raises:
            ValueError: a quantity was not measured, which is a mistake in the claim.
        """
        return self.assess(numbers).holds and all(control(numbers) for control in self.controls)

    def assess(self, numbers: Numbers) -> Assessment:
        """The condition's outcome, without its controls.

        Raises:
            ValueError: a quantity was not measured, which is a mistake in the claim.
        """
        if missing := [name for name in self.quantities if not numbers.get(name)]:
            raise ValueError(f"The check {self.text!r} needs {missing[0]!r}; its claim measured {sorted(numbers)}.")
        values = [list(numbers[name]) for name in self.quantities]
        if any(math.isnan(value) for row in values for value in row):
            return _without_numbers(False, len(values[0]))
        found = self.condition(*values)
        if isinstance(found, Assessment):
            return found
        return _without_numbers(bool(found), len(values[0]))


def below(
    low: str,
    high: str,
    *,
    factor: float = 1.0,
    paired: bool = True,
    exact: bool = False,
    published: str = "",
    kind: str = PAPER,
    controls: tuple[Check, ...] = (),
) -> Check:
    """`low` is below `factor` times `high`, by more than twice the standard error of the difference of their means.

    Args:
        low: the quantity that should be lower.
        high: the other one. If it has a single value and `low` has several, it is taken as exact.
        factor: the multiple of `high`.
        paired: where both have as many values, these are of the same seeds; the standard error is that of the
            differences. Otherwise it is that of independent means.
        exact: the numbers have no noise: the margin is 0.
        published: see `Check`.
        kind: see `Check`.
        controls: see `Check`.
    """
    times = "" if factor == 1 else f"{factor:g} x "

    def condition(ours: list[float], theirs: list[float]) -> Assessment:
        bounds = [factor * value for value in theirs]
        margin = 0.0 if exact else noise_margin(ours, bounds, paired=paired)
        value, bound = statistics.fmean(ours), statistics.fmean(bounds)
        return Assessment(bound - value > margin, value, _spread(ours), bound, margin, len(ours))

    return Check(f"{low} < {times}{high}", (low, high), condition, published, kind, controls)


def noise_margin(ours: Sequence[float], theirs: Sequence[float], *, paired: bool = True) -> float:
    """Twice the standard error of the difference of two means; NaN if each has a single value.

    Example:
        >>> noise_margin([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]), round(noise_margin([1.0, 2.0, 3.0], [2.5]), 3)
        (0.0, 1.155)
    """
    if paired and len(ours) == len(theirs) > 1:
        differences = [b - a for a, b in zip(ours, theirs, strict=True)]
        return STANDARD_ERRORS * statistics.stdev(differences) / math.sqrt(len(differences))
    variances = [statistics.variance(row) / len(row) for row in (ours, theirs) if len(row) > 1]
    return STANDARD_ERRORS * math.sqrt(sum(variances)) if variances else math.nan


def at_most(quantity: str, bound: float, *, exact: bool = False, published: str = "", **options: Any) -> Check:
    """The mean is at most `bound`, and below it by more than twice its standard error. For options see `Check`."""
    return _bounded(quantity, bound, -1, f"{quantity} <= {bound:g}", exact=exact, published=published, **options)


def at_least(quantity: str, bound: float, *, exact: bool = False, published: str = "", **options: Any) -> Check:
    """The mean is at least `bound`, and above it by more than twice its standard error. For options see `Check`."""
    return _bounded(quantity, bound, 1, f"{quantity} >= {bound:g}", exact=exact, published=published, **options)


def _bounded(quantity: str, bound: float, sign: int, text: str, *, exact: bool, **options: Any) -> Check:
    def condition(values: list[float]) -> Assessment:
        margin = 0.0 if exact else noise_margin(values, [bound])
        value = statistics.fmean(values)
        return Assessment(sign * (value - bound) >= margin, value, _spread(values), bound, margin, len(values))

    return Check(text, (quantity,), condition, **options)


def each_at_most(quantity: str, bound: float, *, published: str = "", **options: Any) -> Check:
    """Every value is at most `bound`: for stability, which one seed can disprove. For options see `Check`."""

    def condition(values: list[float]) -> Assessment:
        return Assessment(max(values) <= bound, max(values), _spread(values), bound, 0.0, len(values))

    return Check(f"{quantity} <= {bound:g} with every seed", (quantity,), condition, published, **options)


def near(quantity: str, value: float, *, rtol: float = 0.0, atol: float = 0.0, exact: bool = False) -> Check:
    """The mean is within `atol + rtol |value|` of the published `value`, by more than twice its standard error."""
    tolerance = atol + rtol * abs(value)

    def condition(values: list[float]) -> Assessment:
        margin = 0.0 if exact else noise_margin(values, [value])
        mean = statistics.fmean(values)
        return Assessment(tolerance - abs(mean - value) >= margin, mean, _spread(values), value, margin, len(values))

    return Check(f"{quantity} within {tolerance:.3g} of {value:g}", (quantity,), condition, f"{value:g}")


def wins(
    text: str, pairs: Sequence[tuple[str, str]], *, least: float, most: float = 1.0, published: str = "", **options: Any
) -> Check:
    """Of several pairs of quantities, a share between `least` and `most` has the first below the second.

    Each is judged as by `below`: a pair within its noise is not won. `text` says what is counted. For options see
    `Check`.
    """
    pairs = list(pairs)

    def condition(*rows: list[float]) -> Assessment:
        names = [name for pair in pairs for name in pair]
        numbers = dict(zip(names, rows, strict=True))
        won = statistics.fmean(below(low, high)(numbers) for low, high in pairs)
        bound = least if won < least else most if won > most else least
        return Assessment(least <= won <= most, won, math.nan, bound, 0.0, len(pairs))

    share = f"{100 * least:g} %" if least == most else f"{100 * least:g} to {100 * most:g} %"
    names = tuple(name for pair in pairs for name in pair)
    return Check(f"{text} in {share} of {len(pairs)} cases", names, condition, published, **options)


def _without_numbers(holds: bool, n: int) -> Assessment:
    return Assessment(holds, math.nan, math.nan, math.nan, math.nan, n)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of a paper: what it says, how to measure it, and when it counts as reproduced."""

    id: str
    """Its name for the command line and for files: lower-case letters, digits and single hyphens."""
    source: str
    """The paper with its identifier, and the figure, table or section."""
    statement: str
    """The claim in one sentence."""
    setup: str
    """How it is measured here, and every way in which that falls short of the paper's experiment."""
    measure: Callable[[Experiment], Measurement]
    checks: tuple[Check, ...]
    minutes: float
    """Minutes on one core, as measured."""
    quick_minutes: float
    """The same at the quick scale."""
    seeds: int = 3
    quick_seeds: int = 2
    needs: tuple[str, ...] = ()
    """Data sets that do not ship with scikit-learn, by their names for `tasks.datasets.load`."""
    plot: Callable[[Measurement], Figure] | None = None
    """Draws a measurement; by default, the values of all quantities."""
    title: str = ""
    """What is run here, in a few words: the figure or table, on which task and of which size."""
    in_paper: str = ""
    """The paper's own setup: task, parameters, steps, seeds, as far as it states them."""
    path: str = ""
    """The path that it was loaded from; empty for a claim of this package. `lopt reproduce` fills it in."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.id):
            raise ValueError(f"The claim id {self.id!r} is not allowed: use words of a-z and 0-9, joined by hyphens.")
        if not self.checks:
            raise ValueError(f"The claim {self.id!r} has no checks; give at least one, which decides the verdict.")

    def all_checks(self) -> tuple[Check, ...]:
        """The checks, each followed by its controls, which are listed once."""
        unique: dict[str, Check] = {}
        for check in self.checks:
            for row in (check, *check.controls):
                unique.setdefault(row.text, row)
        return tuple(unique.values())


def verdict(held: Sequence[bool]) -> str:
    """The verdict of the paper's checks: "reproduced" if all hold, "partly" if some do, else "not reproduced".

    Example:
        >>> verdict([True, True]), verdict([True, False]), verdict([False])
        ('reproduced', 'partly', 'not reproduced')
        >>> verdict([])  # a claim about rules of this package's alone
        "no paper's claim"
    """
    if not held:
        return BEYOND
    return REPRODUCED if all(held) else PARTLY if any(held) else NOT
