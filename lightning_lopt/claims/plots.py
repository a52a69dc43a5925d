"""Plots of claims. Matplotlib is imported when it is used."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_lopt.evaluation.plots import Look, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_lopt.claims.base import Measured

# Okabe and Ito's colors, and never by color alone: of any four in a row no two have the same line.
LOOKS = (
    Look("#0072B2", "-", 2.2, "o"),
    Look("#D55E00", "--", 2.0, "s"),
    Look("#000000", "-.", 1.8, "^"),
    Look("#CC79A7", ":", 2.2, "D"),
    Look("#009E73", "-", 1.8, "v"),
    Look("#E69F00", "--", 1.8, "P"),
    Look("#56B4E9", "-.", 1.8, "x"),
    Look("#999999", ":", 1.8, "+"),
)


class Curve(NamedTuple):
    """A quantity over steps: one row of values per seed; NaN where there is none."""

    label: str
    steps: Sequence[float]
    seeds: Sequence[Sequence[float]]


def dots(measured: Measured) -> Figure:
    """A row per quantity: its values as dots, their median as a line. What a claim without a plot of its own gets."""
    from matplotlib.figure import Figure

    rows = measured.numbers
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.3), layout="constrained")
    panel = figure.subplots()
    for number, values in enumerate(rows.values()):
        finite = [value for value in values if math.isfinite(value)]
        panel.plot(finite, [number] * len(finite), "o", color=LOOKS[0].color, alpha=0.6)
        if finite:
            panel.plot([statistics.median(finite)], [number], "|", color="black", markersize=16)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.set_ylim(len(rows) - 0.5, -0.5)
    if all(value > 0 for values in rows.values() for value in values if math.isfinite(value)):
        panel.set_xscale("log")
    panel.set_xlabel("value; the bar is the median")
    tidy(panel)
    return figure


def draw_curves(panel: Axes, curves: Sequence[Curve], *, each: bool = False) -> None:
    """Medians with the range over seeds; with `each`, a thin line per seed in its place."""
    for number, curve in enumerate(curves):
        look = LOOKS[number % len(LOOKS)]
        points = [[v for v in point if math.isfinite(v)] or [math.nan] for point in zip(*curve.seeds, strict=True)]
        middle = [statistics.median(point) for point in points]
        style: dict[str, Any] = {"color": look.color, "linestyle": look.line}
        if each:
            for index, seed in enumerate(curve.seeds):
                panel.plot(curve.steps, seed, label=curve.label if not index else None, linewidth=1.2, **style)
            continue
        panel.plot(curve.steps, middle, label=curve.label, linewidth=look.width, **style)
        low, high = [min(point) for point in points], [max(point) for point in points]
        panel.fill_between(curve.steps, low, high, color=look.color, alpha=0.12, linewidth=0)
    panel.set_yscale("log")
    tidy(panel)
