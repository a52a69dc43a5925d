"""Results of `lopt evaluate` in cards and in the README, between markers, from the CSV files that it wrote.

A block begins with `<!-- evaluation: FOLDER summary -->` or `<!-- evaluation: FOLDER tasks -->` and ends with
`<!-- /evaluation -->`. What stands between is replaced by a table: geometric means of all optimizers, or the ratios of
the first rule task by task.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_lopt.evaluation.compare import NOMINAL
from lightning_lopt.evaluation.results import DEFAULT_ADAM, MEASURES, REFERENCES
from lightning_lopt.evaluation.rivals import RIVALS
from lightning_lopt.evaluation.tuning import BASELINES

BLOCK = re.compile(r"(<!-- evaluation: (?P<folder>\S+) (?P<what>\S+) -->\n).*?(<!-- /evaluation -->)", re.DOTALL)
Row = dict[str, str]
_OTHERS = {*BASELINES, *RIVALS, DEFAULT_ADAM, NOMINAL}  # optimizers that are not the rules that are compared


def insert(text: str, directory: Path) -> str:
    """The text with all its blocks filled anew; a block without a folder says that its evaluation was not run yet.

    Args:
        text: of a card or the README.
        directory: has a folder per block's FOLDER, as `lopt evaluate --out` writes it.

    Raises:
        ValueError: a block does not end, or asks for something else than a summary or tasks.
    """
    if text.count("<!-- evaluation:") != len(BLOCK.findall(text)):
        raise ValueError(
            "A block '<!-- evaluation: FOLDER summary -->' has no '<!-- /evaluation -->' after it; add the line."
        )

    def fill(match: re.Match[str]) -> str:
        what = match["what"]
        if what not in _TABLES:
            raise ValueError(f"A block of {match['folder']!r} asks for {what!r}; allowed are {sorted(_TABLES)}.")
        folder = directory / match["folder"]
        lines = _TABLES[what](folder) if folder.is_dir() else ["*Not run yet with the rule as it is now.*"]
        return "\n".join([match[1].rstrip("\n"), *lines, match[4]])

    return BLOCK.sub(fill, text)


def _summary(folder: Path) -> list[str]:
    rows = sorted(_read(folder / "summary.csv"), key=lambda row: row["optimizer"] in _OTHERS)  # rules come first
    names = [row["optimizer"] if row["optimizer"] in _OTHERS else f"**{row['optimizer']}**" for row in rows]
    lines = [_line(["", *names]), "|" + "---|" * (len(rows) + 1)]
    for measure in MEASURES:
        for reference, shown in REFERENCES.items():
            column = f"{measure}_vs_{reference}"
            if rows[0].get(column):
                cells = [_with_spread(row[column], row.get(f"{column}_spread", "")) for row in rows]
                lines.append(_line([f"{MEASURES[measure].label} / {shown}", *cells]))
    lines.append(_line(["runs that diverged", *(f"{row['diverged_runs']} of {row['runs']}" for row in rows)]))
    about = f"Geometric means over {rows[0]['tasks']} tasks ± their standard error over seeds; lower is better."
    return [*lines, "", about]


def _tasks(folder: Path) -> list[str]:
    rows = _read(folder / "table.csv")
    rules = [row["optimizer"] for row in rows if row["optimizer"] not in _OTHERS]
    first = [row for row in rows if row["optimizer"] == rules[0]]
    shown = [
        (f"{MEASURES[measure].label} / {REFERENCES[reference]}", f"{measure}_vs_{reference}")
        for measure in ("final", "mean", "valid", "test_valid")
        for reference in ("adam", "adamw-tuned")
        if any(row.get(f"{measure}_vs_{reference}") for row in first)
    ]
    head = ["task, steps", "final training loss", *(label for label, _ in shown)]
    lines = [_line(head), "|" + "---|" * len(head)]
    for row in first:
        cells = [_rounded(row[column]) for _, column in shown]
        lines.append(_line([f"{row['task']}, {int(row['steps']):,}", f"{float(row['final_loss']):.3g}", *cells]))
    return lines


_TABLES: dict[str, Callable[[Path], list[str]]] = {"summary": _summary, "tasks": _tasks}


def _read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rounded(value: str) -> str:
    return f"{float(value):.3f}" if value else ""


def _with_spread(value: str, spread: str) -> str:
    """A ratio and its standard error: the file has that of the logarithm."""
    return f"{_rounded(value)} ± {float(value) * float(spread):.3f}" if value and spread else _rounded(value)
