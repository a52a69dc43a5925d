"""Plots of an evaluation: loss curves by task, and ratios of losses. Matplotlib is imported on first use."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_lopt.evaluation.results import DEFAULT_ADAM, MEASURES, REFERENCES, Results
from lightning_lopt.evaluation.suites import Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class LineStyle(NamedTuple):
    """How an optimizer is drawn. Lines differ in more than color, for color-blind readers."""

    color: str
    line: str
    width: float
    marker: str


# Okabe and Ito's palette, which color-blind readers can tell apart.
BASELINE_STYLES = {
    "adam": LineStyle("#E69F00", (0, (1, 1)), 1.8, "s"),  # type: ignore[arg-type]
    "adamw": LineStyle("#009E73", "--", 1.6, "^"),
    "sgdm": LineStyle("#999999", "-.", 1.2, "v"),
    "nadamw": LineStyle("#CC79A7", "-.", 1.4, "D"),
    "rmsprop": LineStyle("#882255", ":", 1.6, "<"),
    "adamw-recipe": LineStyle("#E69F00", ":", 1.4, "^"),
    "adamw-tuned": LineStyle("#009E73", "--", 1.8, "s"),
    "nadamw-algoperf": LineStyle("#CC79A7", ":", 1.4, "D"),
    "schedule-free": LineStyle("#882255", "-.", 1.2, "v"),
    "muon": LineStyle("#44AA99", "-.", 1.4, "<"),
    "soap": LineStyle("#AA4499", "--", 1.4, ">"),
    "prodigy": LineStyle("#777777", "-.", 1.2, "h"),
    DEFAULT_ADAM: LineStyle("#999999", ":", 1.2, "x"),
    "hyperparam": LineStyle("#56B4E9", "--", 1.4, "P"),
}
RULE_STYLES = (
    LineStyle("#0072B2", "-", 2.2, "o"),
    LineStyle("#D55E00", "-", 2.2, "o"),
    LineStyle("#000000", "-", 1.8, "o"),
    LineStyle("#CC79A7", "-", 1.8, "o"),
)
CURVES = ("adam", "adamw", "nadamw", "adamw-recipe", "adamw-tuned")
"""The baselines whose curves are drawn; more would crowd the panels."""


def line_styles(results: Results) -> dict[str, LineStyle]:
    """Optimizer -> how it is drawn."""
    rules = [name for name in results.optimizers if name not in BASELINE_STYLES]
    return BASELINE_STYLES | {name: RULE_STYLES[i % len(RULE_STYLES)] for i, name in enumerate(rules)}


def curves(results: Results, *, validation: bool = False) -> Figure:
    """Training or validation loss over steps, a panel per task: mean and range over seeds.

    Each at the best setting for the final training loss, or for the validation loss.
    """
    from matplotlib.figure import Figure

    rules = [name for name in results.optimizers if name not in BASELINE_STYLES]
    wanted = [*rules, "hyperparam", *CURVES]
    if not set(CURVES) & set(results.optimizers):
        wanted.append(DEFAULT_ADAM)
    # Baselines first, so that the rules are drawn on top.
    drawn = [name for name in reversed(wanted) if name in results.optimizers]
    columns = min(4, math.ceil(math.sqrt(len(results.cases))))
    rows = math.ceil(len(results.cases) / columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 2.7 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, case in zip(panels, results.cases, strict=False):
        _curve_panel(panel, results, case, drawn, validation=validation)
    for panel in panels[len(results.cases) :]:
        panel.set_axis_off()
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], texts[::-1], loc="outside upper center", ncols=min(len(texts), 4), frameon=False)
    figure.supxlabel("optimizer steps", fontsize=11)
    figure.supylabel("validation loss" if validation else "training loss", fontsize=11)
    return figure


def _curve_panel(panel: Axes, results: Results, case: Case, drawn: list[str], *, validation: bool) -> None:
    styles = line_styles(results)
    for name in drawn:
        runs = results.entry(case, name).best["valid" if validation else "final"].runs
        look = styles[name]
        steps, losses = (runs.valid_steps, runs.valid_curve) if validation else (runs.curve_steps, runs.curve)
        points = list(zip(*(losses if validation else map(_smooth, losses)), strict=True))
        # The nominal term is thin and on top: at first a rule's curve hardly differs from it.
        order = 4 if name == "hyperparam" else 3
        style: dict[str, Any] = {"color": look.color, "linestyle": look.line, "linewidth": look.width, "zorder": order}
        panel.plot(steps, [statistics.fmean(point) for point in points], label=results.labels[name], **style)
        panel.fill_between(
            steps, list(map(min, points)), list(map(max, points)), color=look.color, alpha=0.12, linewidth=0
        )
    panel.set_yscale("log")
    top = results.entry(case, drawn[0]).best["final"].runs.scale
    bottom, _ = panel.get_ylim()
    panel.set_ylim(bottom, top * max(top / bottom, 1.1) ** 0.08)
    _number_axis(panel.yaxis, panel.get_ylim())
    panel.set_xlim(0, case.steps)
    panel.xaxis.set_major_locator(_ticker().MaxNLocator(4, steps=(1, 2, 2.5, 5, 10)))
    panel.xaxis.set_major_formatter(_ticker().StrMethodFormatter("{x:,.0f}"))
    panel.set_title(f"{case.task}, {case.steps:,} steps", fontsize=9)
    tidy(panel)


def _smooth(curve: list[float], reach: int = 2) -> list[float]:
    """A moving mean over `reach` neighbors on both sides, fewer at the start, where losses fall steeply."""
    return [statistics.fmean(curve[i - min(i, reach) : i + min(i, reach) + 1]) for i in range(len(curve))]


def _ticker() -> Any:
    import matplotlib.ticker

    return matplotlib.ticker


def _number_axis(axis: Any, limits: tuple[float, float], least: int = 3) -> None:
    """Label a logarithmic axis with plain, round numbers: as few as possible, but at least `least`."""
    digits: list[tuple[float, ...]] = [(1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)]  # ever finer
    digits += [(1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.3, 2.6, 3, 4, 5, 6, 7, 8, 9), tuple(i / 10 for i in range(10, 100))]
    for some in digits:
        values = [digit * 10.0**power for power in range(-12, 12) for digit in some]
        shown = [value for value in values if limits[0] <= value <= limits[1]]
        if len(shown) >= least:
            break
    ticker = _ticker()
    axis.set_major_locator(ticker.FixedLocator(shown))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:.6g}"))
    axis.set_minor_locator(ticker.NullLocator())


def ratios(results: Results) -> Figure:
    """Ratios of losses to the reference's, a row per task, with the geometric means below."""
    from matplotlib.figure import Figure

    reference = results.main_reference
    drawn = [name for name in results.optimizers if name not in (reference, DEFAULT_ADAM)]
    height = 0.34 * (len(results.cases) + 2) + 1.5
    shown = [measure for measure in ("final", "mean", "valid") if measure in results.measures]
    figure = Figure(figsize=(3.5 + 4 * len(shown), max(height, 3.2)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True)
    for panel, measure in zip(panels, shown, strict=True):
        _ratio_panel(panel, results, measure, reference, drawn)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=min(len(texts), 5), frameon=False)
    return figure


def _ratio_panel(panel: Axes, results: Results, measure: str, reference: str, drawn: list[str]) -> None:
    styles = line_styles(results)
    cases = results.cases
    means = {summary.optimizer: summary.ratios[measure, reference].value for summary in results.summary()}
    for number, name in enumerate(drawn):
        look = styles[name]
        # Shifted, so that equal values do not hide each other.
        shift = 0.5 * (number / max(len(drawn) - 1, 1) - 0.5)
        rows = [i + shift for i in range(len(cases))] + [len(cases) + 0.5 + shift]
        found = [results.ratio(case, name, reference, measure) for case in cases]
        values = [ratio.value for ratio in found] + [means[name]]
        errors = [0.0 if math.isnan(ratio.spread) else ratio.spread for ratio in found] + [0.0]
        below = [value * (1 - math.exp(-error)) for value, error in zip(values, errors, strict=True)]
        above = [value * (math.exp(error) - 1) for value, error in zip(values, errors, strict=True)]
        panel.errorbar(
            values,
            rows,
            xerr=(below, above),
            fmt=look.marker,
            color=look.color,
            markersize=5,
            elinewidth=1,
            label=results.labels[name],
        )
    panel.axvline(1.0, color="black", linewidth=1)
    panel.axhline(len(cases) - 0.25, color="0.6", linewidth=0.8)
    panel.set_yticks([*range(len(cases)), len(cases) + 0.5], [*(str(case) for case in cases), "geometric mean"])
    panel.set_ylim(len(cases) + 1, -0.6)
    panel.set_xscale("log")
    _number_axis(panel.xaxis, panel.get_xlim(), least=4)
    panel.set_xlabel(f"{MEASURES[measure].label} / {REFERENCES[reference]}'s   (left of 1 is better)")
    tidy(panel)


def tidy(panel: Axes) -> None:
    """Remove the box and draw a light grid."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(True, which="major", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)
