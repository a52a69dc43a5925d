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
from lightning_lopt.evaluation.results import DEFAULT_ADAM, MEASURES, REFERENCES, TUNED, Entry, Ratio, Results
from lightning_lopt.evaluation.suites import Case

if TYPE_CHECKING:
    from rich.table import Table

LOSSES = {"final": "final training loss", "mean": "mean training loss", "test": "test loss"}


def write(results: Results, directory: str | Path) -> list[Path]:
    """Write `table.csv` (a row per optimizer and task), `summary.csv`, `curves.png` and `ratios.png`.

    Args:
        results: the results of `evaluate`.
        directory: created if it does not exist; existing files of these names are replaced.

    Returns:
        The paths of the files.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("table.csv", "summary.csv", "curves.png", "ratios.png")]
    write_csv(files[0], [_row(results, entry) for entry in results.entries])
    write_csv(files[1], _summary_rows(results))
    plots.curves(results).savefig(files[2], dpi=150)
    plots.ratios(results).savefig(files[3], dpi=150)
    return files


def tables(results: Results) -> list[Table]:
    """Tables of ratios by task, for the final and the mean loss, and a summary, for rich to print."""
    return [*(_ratio_table(results, measure) for measure in TUNED), _summary_table(results)]


def _row(results: Results, entry: Entry) -> dict[str, Any]:
    """A row of `table.csv`; losses are means over seeds, with their standard deviation."""
    runs = entry.best["final"].runs
    row: dict[str, Any] = {
        "task": entry.case.task,
        "steps": entry.case.steps,
        "optimizer": entry.optimizer,
        "seeds": results.seeds,
        "initial_loss": runs.scale,
    }
    for measure in TUNED:
        losses = getattr(entry.best[measure].runs, measure)
        row[f"{measure}_loss"] = statistics.fmean(losses)
        row[f"{measure}_loss_std"] = statistics.stdev(losses) if len(losses) > 1 else math.nan
    row |= {"test_loss": runs.average("test_loss"), "test_accuracy": runs.average("accuracy")}
    row |= {"diverged_runs": sum(runs.diverged), "settings_tried": entry.num_settings}
    row |= {f"setting_for_{m}": json.dumps(entry.best[m].hyperparameters) for m in TUNED}
    row["step_time_vs_adam"] = results.step_time(entry.case, entry.optimizer)
    for measure in MEASURES:
        for reference in results.references:
            ratio = results.ratio(entry.case, entry.optimizer, reference, measure)
            row[f"{measure}_vs_{reference}"] = ratio.value
    return row


def _summary_rows(results: Results) -> list[dict[str, Any]]:
    rows = []
    for summary in results.summary():
        row: dict[str, Any] = {"optimizer": summary.optimizer, "tasks": summary.num_cases, "runs": summary.num_runs}
        for (measure, reference), (value, spread) in summary.ratios.items():
            row |= {f"{measure}_vs_{reference}": value, f"{measure}_vs_{reference}_spread": spread}
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
    table = Table(title=f"{measure.capitalize()} training loss / that of {REFERENCES[reference]} (lower is better)")
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
    for measure in MEASURES:
        for reference in results.references:
            cells = [_with_spread(row.ratios[measure, reference]) for row in rows]
            table.add_row(f"{LOSSES[measure]} / {REFERENCES[reference]}", *cells)
    table.add_section()
    for measure in MEASURES:
        cells = [f"{row.not_worse[measure]} of {row.num_cases}" for row in rows]
        table.add_row(f"{LOSSES[measure]} at most 2 % above Adam 1e-3", *cells)
    table.add_row("runs that diverged", *(f"{row.diverged} of {row.num_runs}" for row in rows))
    table.add_row("time of a step / Adam", *(f"{row.step_time:.2f}" for row in rows))
    return table


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number > 1 else "")


def _with_spread(ratio: Ratio) -> str:
    """The ratio and its standard error over seeds."""
    return f"{ratio.value:.3f}" + ("" if math.isnan(ratio.spread) else f" ± {ratio.value * ratio.spread:.3f}")
