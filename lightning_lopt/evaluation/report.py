"""Report an evaluation: CSV files, tables for the terminal, and plots."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lopt.evaluation import plots
from lightning_lopt.evaluation.results import (
    DEFAULT_ADAM,
    MEASURES,
    REFERENCES,
    TUNED,
    Entry,
    Ratio,
    Results,
    Summary,
    deviation,
)
from lightning_lopt.evaluation.suites import JUDGING_ONLY, Case

if TYPE_CHECKING:
    from rich.table import Table


def write(results: Results, directory: str | Path) -> list[Path]:
    """Write tables and plots.

    `table.csv` has a row per optimizer and task, `summary.csv` one per optimizer, `curves.csv` the training and
    validation losses over the steps of each seed. `curves.png`, `validation.png` and `ratios.png` show them.

    Args:
        results: the results of `evaluate`.
        directory: created if it does not exist; existing files of these names are replaced.

    Returns:
        The paths of the files.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("table.csv", "summary.csv", "curves.csv", "curves.png", "ratios.png", "validation.png")
    files = [folder / name for name in (names if results.validated else names[:-1])]
    write_csv(files[0], [_row(results, entry) for entry in results.entries])
    write_csv(files[1], _summary_rows(results))
    write_csv(files[2], [row for entry in results.entries for row in _curve_rows(entry)])
    plots.curves(results).savefig(files[3], dpi=150)
    plots.ratios(results).savefig(files[4], dpi=150)
    if results.validated:
        plots.curves(results, validation=True).savefig(files[5], dpi=150)
    return files


def tables(results: Results) -> list[Table]:
    """Tables of ratios by task, for the measures that settings are tuned for, and a summary, for rich to print."""
    shown = [measure for measure in TUNED if measure in results.measures]
    return [*(_ratio_table(results, measure) for measure in shown), _summary_table(results)]


def _row(results: Results, entry: Entry) -> dict[str, Any]:
    """A row of `table.csv`; losses are means over seeds, with their standard deviation."""
    runs = entry.best["final"].runs
    row: dict[str, Any] = {
        "task": entry.case.task,
        "steps": entry.case.steps,
        "judging_only": entry.case.task in JUDGING_ONLY,
        "optimizer": entry.optimizer,
        "seeds": results.seeds,
        "initial_loss": runs.scale,
    }
    for measure, (_, field, _) in MEASURES.items():
        losses = getattr(entry.runs(measure), field)
        row[f"{measure}_loss"] = entry.loss(measure)
        row[f"{measure}_loss_std"] = deviation(losses)
    row |= {"test_accuracy": runs.average("accuracy")}
    row["test_metrics"] = json.dumps({name: statistics.fmean(values) for name, values in runs.metrics.items()})
    row |= {"diverged_runs": sum(runs.diverged), "settings_tried": entry.num_settings}
    row |= {f"setting_for_{m}": json.dumps(entry.best[m].hyperparameters) for m in TUNED}
    row["step_time_vs_adam"] = results.step_time(entry.case, entry.optimizer)
    for measure in MEASURES:
        for reference in results.references:
            ratio = results.ratio(entry.case, entry.optimizer, reference, measure)
            row[f"{measure}_vs_{reference}"] = ratio.value
    return row


def _curve_rows(entry: Entry) -> list[dict[str, Any]]:
    """Rows of `curves.csv`: training losses of the setting for the final loss, validation losses of that for them."""
    rows: list[dict[str, Any]] = []
    for split, measure in (("training", "final"), ("validation", "valid")):
        runs = entry.runs(measure)
        steps, curves = (runs.curve_steps, runs.curve) if split == "training" else (runs.valid_steps, runs.valid_curve)
        for seed, curve in enumerate(curves):
            at = {"task": entry.case.task, "steps": entry.case.steps, "optimizer": entry.optimizer, "seed": seed}
            rows += [{**at, "split": split, "step": k, "loss": loss} for k, loss in zip(steps, curve, strict=True)]
    return rows


def _summary_rows(results: Results) -> list[dict[str, Any]]:
    rows = []
    for summary in results.summary():
        row: dict[str, Any] = {"optimizer": summary.optimizer, "tasks": summary.num_cases, "runs": summary.num_runs}
        for (measure, reference), (value, spread) in summary.ratios.items():
            row |= {f"{measure}_vs_{reference}": value, f"{measure}_vs_{reference}_spread": spread}
        row |= {f"{measure}_as_good_as_{reference}": n for (measure, reference), n in summary.as_good.items()}
        row |= {f"{m}_at_most_2_percent_above_{DEFAULT_ADAM}": summary.not_worse[m] for m in MEASURES}
        rows.append({**row, "diverged_runs": summary.diverged, "step_time_vs_adam": summary.step_time})
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write some columns of the rows (default: all); floats have five digits, NaN is an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns or list(rows[0]), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _number(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.5g}"


def _ratio_table(results: Results, measure: str) -> Table:
    from rich.table import Table

    reference = results.main_reference
    names = results.labels
    others = [optimizer for optimizer in results.optimizers if optimizer != reference]
    table = Table(title=f"{MEASURES[measure].label.capitalize()} / that of {REFERENCES[reference]} (lower is better)")
    table.add_column("task", no_wrap=True)
    for column in ("steps", names[reference], *(names[name] for name in others)):
        table.add_column(column, justify="right")
    for case in results.cases:
        cells = [f"{results.entry(case, reference).loss(measure):.4g}"]
        cells += [_cell(results, case, optimizer, reference, measure) for optimizer in others]
        table.add_row(case.task, f"{case.steps:,}", *cells)
    means = {summary.optimizer: summary.ratios[measure, reference].value for summary in results.summary()}
    table.add_section()
    table.add_row("geometric mean", "", "", *(f"{means[name]:.3f}" for name in others))
    return table


def _cell(results: Results, case: Case, optimizer: str, reference: str, measure: str) -> str:
    text = f"{results.ratio(case, optimizer, reference, measure).value:.3f}"
    diverged = sum(results.entry(case, optimizer).best[measure].runs.diverged)
    return f"{text} ({diverged} diverged)" if diverged else text


def _summary_table(results: Results) -> Table:
    from rich.table import Table

    tasks = _count(len(results.cases), "task")
    table = Table(title=f"Geometric means over {tasks}, {_count(results.seeds, 'seed')} each")
    table.add_column("", no_wrap=True)
    rows = results.summary()
    for row in rows:
        table.add_column(results.labels[row.optimizer], justify="right")
    for measure in results.measures:
        for reference in results.references:
            cells = [_with_spread(row.ratios[measure, reference]) for row in rows]
            table.add_row(f"{MEASURES[measure].label} / {REFERENCES[reference]}", *cells)
    table.add_section()
    for measure in results.measures:
        cells = [f"{row.not_worse[measure]} of {row.num_cases}" for row in rows]
        table.add_row(f"{MEASURES[measure].label} at most 2 % above Adam 1e-3", *cells)
    if results.validated:
        _add_counts(table, rows, [name for name in ("adamw-recipe", "adamw-tuned") if name in results.references])
    table.add_row("runs that diverged", *(f"{row.diverged} of {row.num_runs}" for row in rows))
    table.add_row("time of a step / Adam", *(f"{row.step_time:.2f}" for row in rows))
    return table


def _add_counts(table: Table, rows: list[Summary], references: list[str]) -> None:
    """On how many tasks the validation losses are at least as good as those of AdamW, untuned and tuned."""
    for measure in ("valid", "valid_end"):
        for reference in references:
            cells = [f"{row.as_good[measure, reference]} of {row.num_cases}" for row in rows]
            table.add_row(f"{MEASURES[measure].label} at most that of {REFERENCES[reference]}", *cells)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number > 1 else "")


def _with_spread(ratio: Ratio) -> str:
    """The ratio and its standard error over seeds."""
    return f"{ratio.value:.3f}" + ("" if math.isnan(ratio.spread) else f" ± {ratio.value * ratio.spread:.3f}")
