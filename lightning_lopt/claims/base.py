"""A claim: what a paper says, how it is measured here, and what must hold of the numbers for it to be reproduced.

The verdict is computed. A claim's `measure` returns numbers; its checks are predicates on these numbers alone.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_lopt.claims.lab import Lab

Numbers = Mapping[str, Sequence[float]]
REPRODUCED, PARTLY, NOT = "reproduced", "partly", "not reproduced"


class Measured(NamedTuple):
    """What a measurement found; all of it goes into a JSON file."""

    numbers: dict[str, list[float]]
    """Quantity -> its values, usually one per seed, in the seeds' order. All that checks see. NaN: could not be had."""
    data: dict[str, Any] = {}
    """Whatever else the plot draws: dicts, lists, numbers and strings."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Example:
        >>> check = below("loss of STAR", "loss of Adam", factor=0.9)
        >>> check.text, check({"loss of STAR": [0.4, 0.5, 9.0], "loss of Adam": [1.0, 1.0, 1.0]})
        ('loss of STAR <= 0.9 x loss of Adam', True)
        >>> check({"loss of STAR": [math.nan], "loss of Adam": [1.0]})
        False
    """

    text: str
    """What must hold, in words."""
    quantities: tuple[str, ...]
    """The quantities that it looks at. It does not hold if one of their values is NaN."""
    holds: Callable[..., bool]
    """Called with the list of values of each quantity, in this order."""
    published: str = ""
    """What the paper says of it: a number where it gives one, else in words."""

    def __call__(self, numbers: Numbers) -> bool:
        """Whether it holds of these numbers.

        Raises:
            ValueError: for a quantity that was not measured: a slip in the claim.
        """
        if missing := [name for name in self.quantities if not numbers.get(name)]:
            raise ValueError(f"The check {self.text!r} needs {missing[0]!r}; measured were {sorted(numbers)}.")
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
    """The median is the published `value`, give or take `atol + rtol |value|`."""
    room = atol + rtol * abs(value)
    text = f"{quantity} within {room:.3g} of {value:g}"
    return Check(text, (quantity,), lambda v: abs(statistics.median(v) - value) <= room, f"{value:g}")


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper claims, as data, and how to find out."""

    id: str
    """A short name for the command line: paper, figure or table."""
    source: str
    """The paper with its identifier, and the figure, table or section."""
    statement: str
    """What is claimed, in a sentence."""
    setup: str
    """How it is measured here, and every way in which that is less than what the paper did."""
    measure: Callable[[Lab], Measured]
    checks: tuple[Check, ...]
    minutes: float
    """Measured cost on one core."""
    quick_minutes: float
    """The same at the quick scale."""
    seeds: int = 3
    quick_seeds: int = 2
    needs: tuple[str, ...] = ()
    """Data sets beyond scikit-learn's, as `tasks.datasets.load` names them."""
    plot: Callable[[Measured], Figure] | None = None
    """Draws what was measured; by default, the values of all quantities."""

    def __post_init__(self) -> None:
        if not self.checks:
            raise ValueError(f"The claim {self.id!r} has no checks: without one there can be no verdict.")


def verdict(held: Sequence[bool]) -> str:
    """All checks hold: reproduced; some: partly; none: not reproduced.

    Example:
        >>> verdict([True, True]), verdict([True, False]), verdict([False])
        ('reproduced', 'partly', 'not reproduced')
    """
    return REPRODUCED if all(held) else PARTLY if any(held) else NOT
