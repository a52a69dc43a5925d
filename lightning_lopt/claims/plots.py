"""Plots of claims. Matplotlib is imported on first use."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_lopt.evaluation.plots import LineStyle, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_lopt.claims.claim import Measurement

# Okabe and Ito's palette; the line style differs within any four in a row, for color-blind readers.
STYLES = (
    LineStyle("#0072B2", "-", 2.2, "o"),
    LineStyle("#D55E00", "--", 2.0, "s"),
    LineStyle("#000000", "-.", 1.8, "^"),
    LineStyle("#CC79A7", ":", 2.2, "D"),
    LineStyle("#009E73", "-", 1.8, "v"),
    LineStyle("#E69F00", "--", 1.8, "P"),
    LineStyle("#56B4E9", "-.", 1.8, "x"),
    LineStyle("#999999", ":", 1.8, "+"),
)


class Curve(NamedTuple):
    """A quantity over steps: a row of values per seed, NaN if it has none."""

    label: str
    steps: Sequence[float]
    seeds: Sequence[Sequence[float]]


def draw_values(measured: Measurement) -> Figure:
    """The default plot of a claim: a row per quantity, with its values as dots and their median as a bar."""
    from matplotlib.figure import Figure

    rows = measured.numbers
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.3), layout="constrained")
    panel = figure.subplots()
    for number, values in enumerate(rows.values()):
        finite = [value for value in values if math.isfinite(value)]
        panel.plot(finite, [number] * len(finite), "o", color=STYLES[0].color, alpha=0.6)
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
    """Draw medians with the range over seeds, or with `each` a thin line per seed."""
    for number, curve in enumerate(curves):
        look = STYLES[number % len(STYLES)]
        points = [[v for v in point if math.isfinite(v)] or [math.nan] for point in zip(*curve.seeds, strict=True)]
        middle = [statistics.median(point) for point in points]
        style: dict[str, Any] = {"color": look.color, "linestyle": look.line}
        if each:
            for index, seed in enumerate(curve.seeds):
                panel.plot(curve.steps, seed, label=curve.label if not index else None, linewidth=1.2, **style)
            continue
        panel.plot(curve.steps, middle, label=curve.label, linewidth=look.width, **style)
        panel.fill_between(
            curve.steps, list(map(min, points)), list(map(max, points)), color=look.color, alpha=0.12, linewidth=0
        )
    panel.set_yscale("log")
    tidy(panel)
