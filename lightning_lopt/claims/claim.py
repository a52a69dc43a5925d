"""A claim: a statement of a paper, how it is measured here, and the checks that decide whether it was reproduced.

Verdicts are computed: a claim's `measure` returns numbers, and its checks are predicates on these numbers alone.
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
REPRODUCED, PARTLY, NOT = "reproduced", "partly", "not reproduced"


class Measurement(NamedTuple):
    """The result of measuring a claim; all of it is saved in a JSON file."""

    numbers: dict[str, list[float]]
    """Quantity -> its values, usually one per seed in the seeds' order; NaN if it could not be measured. For checks."""
    data: dict[str, Any] = {}
    """Further data for the plot: dicts, lists, numbers and strings."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A condition on the numbers of a measurement.

    Example:
        >>> check = below("loss of STAR", "loss of Adam", factor=0.9)
        >>> check.text, check({"loss of STAR": [0.4, 0.5, 9.0], "loss of Adam": [1.0, 1.0, 1.0]})
        ('loss of STAR <= 0.9 x loss of Adam', True)
        >>> check({"loss of STAR": [math.nan], "loss of Adam": [1.0]})
        False
    """

    text: str
    """The condition in words."""
    quantities: tuple[str, ...]
    """The quantities that it reads. It does not hold if any of their values is NaN."""
    holds: Callable[..., bool]
    """The condition as a function of the quantities' values: one list per quantity, in order."""
    published: str = ""
    """The paper's result: a number if it gives one, else its words."""

    def __call__(self, numbers: Numbers) -> bool:
        """Whether the condition holds.

        Raises:
            ValueError: a quantity was not measured, which is a mistake in the claim.
        """
        if missing := [name for name in self.quantities if not numbers.get(name)]:
            raise ValueError(f"The check {self.text!r} needs {missing[0]!r}; its claim measured {sorted(numbers)}.")
        values = [list(numbers[name]) for name in self.quantities]
        return not any(math.isnan(value) for row in values for value in row) and bool(self.holds(*values))


def below(low: str, high: str, *, factor: float = 1.0, published: str = "") -> Check:
    """The median of `low` is at most `factor` times that of `high`."""
    times = "" if factor == 1 else f"{factor:g} x "

    def holds(ours: list[float], theirs: list[float]) -> bool:
        return statistics.median(ours) <= factor * statistics.median(theirs)

    return Check(f"{low} <= {times}{high}", (low, high), holds, published)


def at_most(quantity: str, bound: float, *, published: str = "") -> Check:
    """The median is at most `bound`."""
    return Check(f"{quantity} <= {bound:g}", (quantity,), lambda v: statistics.median(v) <= bound, published)


def at_least(quantity: str, bound: float, *, published: str = "") -> Check:
    """The median is at least `bound`."""
    return Check(f"{quantity} >= {bound:g}", (quantity,), lambda v: statistics.median(v) >= bound, published)


def near(quantity: str, value: float, *, rtol: float = 0.0, atol: float = 0.0) -> Check:
    """The median is within `atol + rtol |value|` of the published `value`."""
    tolerance = atol + rtol * abs(value)
    text = f"{quantity} within {tolerance:.3g} of {value:g}"
    return Check(text, (quantity,), lambda v: abs(statistics.median(v) - value) <= tolerance, f"{value:g}")


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
    path: str = ""
    """The path that it was loaded from; empty for a claim of this package. `lopt reproduce` fills it in."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.id):
            raise ValueError(f"The claim id {self.id!r} is not allowed: use words of a-z and 0-9, joined by hyphens.")
        if not self.checks:
            raise ValueError(f"The claim {self.id!r} has no checks; give at least one, which decides the verdict.")


def verdict(held: Sequence[bool]) -> str:
    """The verdict: "reproduced" if all checks hold, "partly" if some do, else "not reproduced".

    Example:
        >>> verdict([True, True]), verdict([True, False]), verdict([False])
        ('reproduced', 'partly', 'not reproduced')
    """
    return REPRODUCED if all(held) else PARTLY if any(held) else NOT
