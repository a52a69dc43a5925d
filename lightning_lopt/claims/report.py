"""The records of `lopt reproduce`: per claim a JSON file with its numbers and a plot, and `checks.csv` over all claims.

Verdicts are not stored: they are recomputed from the numbers, by the checks as they are now.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_lopt import __version__
from lightning_lopt.claims.claim import CONTROL, PAPER, Check, Claim, Measurement, verdict
from lightning_lopt.claims.setup_hash import setup_hash
from lightning_lopt.evaluation.cache import decode, encode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
NOT_RUN = "not run"
CHECKS = "checks.csv"
COLUMNS = (
    *("claim", "kind", "check", "published", "holds", "value", "spread", "bound", "margin"),
    *("n", "scale", "seeds", "commit", "cpu_minutes"),
)


def command(claim: Claim, *, quick: bool = False) -> str:
    """The command that measures the claim."""
    data = "LIGHTNING_LOPT_DATA=<folder> " if claim.needs else ""
    target = shlex.quote(claim.path or claim.id)
    return f"{data}lopt reproduce {target}{' --quick' if quick else ''} --out reproduction"


def record(claim: Claim, measured: Measurement, *, quick: bool, seeds: int, seconds: float) -> Record:
    """What was measured, as plain data.

    Raises:
        ValueError: a check of the claim reads a quantity that was not measured.
    """
    for check in claim.all_checks():
        check.assess(measured.numbers)
    return {
        **about(claim, quick=quick),
        "seeds": seeds,
        "cpu_minutes": seconds / 60,
        "hash": setup_hash(claim, quick=quick),
        "commit": commit(),
        "versions": {"lightning_lopt": __version__, "torch": torch.__version__},
        "numbers": measured.numbers,
        "data": measured.data,
    }


def about(claim: Claim, *, quick: bool) -> Record:
    """The part of a record that describes its claim."""
    names = ("id", "source", "title", "statement", "setup", "in_paper")
    described = {name: getattr(claim, name) for name in names}
    return {**described, "command": command(claim, quick=quick), "scale": "quick" if quick else "full"}


def commit() -> str:
    """The commit of the checkout that the package lies in, with "+" if it was changed since; "" outside of one."""

    def git(*arguments: str) -> str:
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 30}
        return str(subprocess.run(["git", *arguments], cwd=Path(__file__).parent, **options).stdout).strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..")
        return git("rev-parse", "--short=8", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def write(row: Record, figure: Figure | None, directory: Path) -> None:
    """Write `<id>.json`, one line per entry, and `<id>.png`."""
    directory.mkdir(parents=True, exist_ok=True)
    plain = encode(row)
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in plain.items()]
    path = directory / f"{row['id']}.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    if figure is not None:
        figure.savefig(directory / f"{row['id']}.png", dpi=80)


def read(directory: Path) -> dict[str, Record]:
    """All records of a directory by claim id, in their order.

    Raises:
        ValueError: a file is not JSON.
    """
    found = {}
    for path in sorted(directory.glob("*.json"), key=lambda path: path.stem):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}. Delete it, and measure the claim again.") from error
        if isinstance(content, dict) and "numbers" in content and content.get("id") == path.stem:
            found[path.stem] = decode(content)
    return found


def is_current(row: Record | None, claim: Claim, *, quick: bool) -> bool:
    """Whether a record is of the claim's setup as it is now, at this scale."""
    return row is not None and row["hash"] == setup_hash(claim, quick=quick)


def check_rows(claim: Claim, row: Record) -> list[dict[str, Any]]:
    """A row per check, recomputed from the numbers: whether it holds, by which value, spread, bound and margin.

    Raises:
        ValueError: a check reads a quantity that the record lacks, which was made by an older version of the claim.
    """
    about_run = {"claim": claim.id, **{name: row[name] for name in ("scale", "seeds", "commit", "cpu_minutes")}}
    rows = []
    for check in claim.all_checks():
        found = check.assess(row["numbers"])._asdict()
        found |= {"holds": check(row["numbers"]), "check": check.text, "published": check.published}
        rows.append({**about_run, **found, "kind": CONTROL if _is_control(check, claim) else check.kind})
    return rows


def _is_control(check: Check, claim: Claim) -> bool:
    return check not in claim.checks


def judge(rows: Sequence[Mapping[str, Any]]) -> tuple[str, int, int]:
    """The verdict of the paper's own checks among the rows of a claim, how many of them hold, and their number."""
    held = [bool(row["holds"]) for row in rows if row["kind"] == PAPER]
    return verdict(held), sum(held), len(held)


def shown_verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """The verdict in words, with its count."""
    word, held, total = judge(rows)
    if not total:
        own = [bool(row["holds"]) for row in rows if row["kind"] != CONTROL]
        return f"{word}; of this package's, {sum(own)} of {len(own)} checks"
    quick = ", at the quick scale" if rows[0]["scale"] == "quick" else ""
    return f"{word}, {held} of {total} checks{quick}"


def checks_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV; floats have five digits, NaN is an empty cell."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: number(row[name]) if isinstance(row[name], float) else row[name] for name in COLUMNS})
    return stream.getvalue()


def number(value: float) -> str:
    """A number in at most five digits; NaN is empty.

    Example:
        >>> number(0.123456), number(float("nan"))
        ('0.12346', '')
    """
    return "" if math.isnan(value) else f"{value:.5g}"


def spread(values: Sequence[float]) -> str:
    """Mean, standard deviation and number of values.

    Example:
        >>> spread([0.5, 2.0, 1.0]), spread([0.25]), spread([1.0, math.nan])
        ('1.17 +- 0.764, n=3', '0.25, n=1', 'no number in 1 of 2')
    """
    if missing := sum(math.isnan(value) for value in values):
        return f"no number in {missing} of {len(values)}"
    deviation = f" +- {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{deviation}, n={len(values)}"
