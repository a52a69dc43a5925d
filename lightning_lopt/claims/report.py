"""The files of `lopt reproduce`: a JSON file and a plot per claim, and tables and a page over all of them."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_lopt import __version__
from lightning_lopt.claims.claim import Check, Claim, Measurement, verdict
from lightning_lopt.evaluation.cache import decode, encode
from lightning_lopt.evaluation.report import write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
NOT_RUN = "not run"
PAGE = "report.md"


def command(claim: Claim, *, quick: bool = False) -> str:
    """The command that measures the claim."""
    data = "LIGHTNING_LOPT_DATA=<folder> " if claim.needs else ""
    target = shlex.quote(claim.path or claim.id)
    return f"{data}lopt reproduce {target}{' --quick' if quick else ''} --out reproduction"


def record(claim: Claim, measured: Measurement, *, quick: bool, seeds: int, seconds: float) -> Record:
    """The claim, its measurement and its verdict, as plain data."""
    held = [check(measured.numbers) for check in claim.checks]
    return {
        **_about(claim, quick=quick),
        "verdict": verdict(held),
        "seeds": seeds,
        "cpu_minutes": seconds / 60,
        "checks": [_check(check, holds, measured) for check, holds in zip(claim.checks, held, strict=True)],
        "numbers": measured.numbers,
        "data": measured.data,
        "versions": {"lightning_lopt": __version__, "torch": torch.__version__},
    }


def not_run(claim: Claim, reason: str, *, quick: bool) -> Record:
    """The record of a claim that could not be measured on this machine."""
    return {**_about(claim, quick=quick), "verdict": NOT_RUN, "reason": reason, "checks": [], "numbers": {}}


def _about(claim: Claim, *, quick: bool) -> Record:
    about = {name: getattr(claim, name) for name in ("id", "source", "statement", "setup")}
    return {**about, "command": command(claim, quick=quick), "scale": "quick" if quick else "full"}


def _check(check: Check, holds: bool, measured: Measurement) -> Record:
    values = {name: spread(measured.numbers[name]) for name in check.quantities}
    return {"text": check.text, "published": check.published, "measured": values, "holds": holds}


def spread(values: Sequence[float]) -> str:
    """Median, range and number of values.

    Example:
        >>> spread([0.5, 2.0, 1.0]), spread([0.25]), spread([1.0, math.nan])
        ('1 [0.5, 2], n=3', '0.25, n=1', 'no number in 1 of 2')
    """
    if missing := sum(math.isnan(value) for value in values):
        return f"no number in {missing} of {len(values)}"
    text = f"{statistics.median(values):.3g}"
    span = f" [{min(values):.3g}, {max(values):.3g}]" if len(values) > 1 else ""
    return f"{text}{span}, n={len(values)}"


def write(row: Record, figure: Figure | None, directory: Path) -> None:
    """Write `<id>.json` and `<id>.png`, then rewrite the tables and the page from all records in the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{row['id']}.json"
    if row["verdict"] == NOT_RUN and path.exists():  # keep an earlier measurement
        return
    path.write_text(json.dumps(encode(row), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if figure is not None:
        figure.savefig(directory / f"{row['id']}.png", dpi=130)
    _write_tables(directory, records(directory))


def records(directory: Path) -> list[Record]:
    """All records of a directory, ordered by claim id."""
    paths = sorted(directory.glob("*.json"), key=lambda path: path.stem)
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [decode(content) for content in contents if "verdict" in content]


def _write_tables(directory: Path, found: list[Record]) -> None:
    columns = ["id", "source", "scale", "verdict", "checks_that_hold", "checks", "seeds", "cpu_minutes", "command"]
    claims = [
        {**row, "checks_that_hold": sum(check["holds"] for check in row["checks"]), "checks": len(row["checks"])}
        for row in found
    ]
    write_csv(directory / "claims.csv", claims, columns)
    numbers = [
        {"id": row["id"], "scale": row["scale"], "quantity": name, "number": i, "value": f"{value:.6g}"}
        for row in found
        for name, values in row["numbers"].items()
        for i, value in enumerate(values)
    ]
    write_csv(directory / "numbers.csv", numbers, ["id", "scale", "quantity", "number", "value"])
    (directory / PAGE).write_text(page(found, directory), encoding="utf-8")


def page(found: list[Record], directory: Path) -> str:
    """A Markdown page: a table of verdicts, then each claim with its checks, numbers and plot."""
    lines = ["# Reproduced claims", "", "| claim | source | verdict | seeds | minutes on one core |", "|" + "---|" * 5]
    for row in found:
        cost = f"{row['cpu_minutes']:.1f}" if "cpu_minutes" in row else ""
        link = f"[{row['id']}](#{row['id']})"
        lines.append(_row([link, row["source"], f"**{shown_verdict(row)}**", str(row.get("seeds", "")), cost]))
    lines += ["", "Verdicts are computed: reproduced if all checks of a claim hold, partly if some of them do."]
    lines += ["Numbers are medians, with the range over n seeds, tasks or repetitions."]
    for row in found:
        lines += _section(row, directory)
    return "\n".join([*lines, ""])


def _section(row: Record, directory: Path) -> list[str]:
    lines = ["", f"## {row['id']}", "", f"{row['source']}: {row['statement']}", "", f"**{shown_verdict(row)}**", ""]
    lines += [f"Setup: {row['setup']}", "", f"    {row['command']}"]
    if row["verdict"] == NOT_RUN:
        return [*lines, "", row["reason"]]
    lines += ["", "| what must hold | published | measured | holds |", "|---|---|---|---|"]
    for check in row["checks"]:
        values = "<br>".join(f"{name}: {value}" for name, value in check["measured"].items())
        lines.append(_row([check["text"], check["published"], values, "yes" if check["holds"] else "**no**"]))
    if (directory / f"{row['id']}.png").exists():
        lines += ["", f"![{row['id']}]({row['id']}.png)"]
    return lines


def shown_verdict(row: Record) -> str:
    """The verdict, with a note if it is from the quick scale."""
    text: str = row["verdict"]
    return text + (", at the quick scale" if row["scale"] == "quick" and row["verdict"] != NOT_RUN else "")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
