"""A folder of evidence: its records, `checks.csv` and the page beside it, written together and compared together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_lopt.claims import cards, page, report
from lightning_lopt.claims.claim import Claim


class Contents(NamedTuple):
    """What a folder holds, with verdicts recomputed from the stored numbers."""

    records: dict[str, report.Record]
    rows: dict[str, list[dict[str, Any]]]
    """Claim id -> its check rows, for the claims that are known."""


def page_of(directory: Path) -> Path:
    """The page of a folder: `docs/evidence.md` for `docs/evidence`."""
    return directory.parent / f"{directory.name}.md"


def load(claims: Mapping[str, Claim], directory: Path) -> Contents:
    """Read a folder's records and judge them anew.

    Raises:
        ValueError: a file is not JSON, or a record lacks a quantity that a check reads.
    """
    records = report.read(directory)
    rows = {}
    for name, row in records.items():
        if name in claims:
            try:
                rows[name] = report.check_rows(claims[name], row)
            except ValueError as error:
                raise ValueError(f"{directory / name}.json is of an older version of its claim: {error}") from error
    return Contents(records, rows)


def contents(claims: Mapping[str, Claim], directory: Path) -> dict[Path, str]:
    """The generated files of a folder: path -> text."""
    found = load(claims, directory)
    every_row = [row for rows in found.rows.values() for row in rows]
    return {
        directory / report.CHECKS: report.checks_csv(every_row),
        page_of(directory): page.render(claims, found.records, found.rows, directory),
    }


def write(claims: Mapping[str, Claim], directory: Path) -> None:
    """Write the generated files from the records."""
    directory.mkdir(parents=True, exist_ok=True)
    for path, text in contents(claims, directory).items():
        path.write_text(text, encoding="utf-8")


def differences(claims: Mapping[str, Claim], directory: Path) -> list[str]:
    """What differs between the generated files and what the stored numbers give, a line each.

    Raises:
        ValueError: the folder has no records, or a file cannot be judged; see `load`.
    """
    if not report.read(directory):
        raise ValueError(f"{directory} has no records of claims; make some with lopt reproduce --all --out {directory}")
    found = []
    for path, text in contents(claims, directory).items():
        stored = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        expected = text.splitlines()
        for number, (old, new) in enumerate(zip(stored, expected, strict=False), 1):
            if old != new:
                found.append(f"{path}, line {number}: {old[:120]!r} should be {new[:120]!r}")
                break
        else:
            if len(stored) != len(expected):
                found.append(f"{path} has {len(stored)} lines and should have {len(expected)}")
    return found


def insert(claims: Mapping[str, Claim], directory: Path, path: Path) -> bool:
    """Fill the blocks of evidence in a file; whether that changed it.

    Raises:
        ValueError: a block is faulty.
    """
    text = path.read_text(encoding="utf-8")
    filled = cards.insert(text, claims, *load(claims, directory))
    if filled != text:
        path.write_text(filled, encoding="utf-8")
    return filled != text
