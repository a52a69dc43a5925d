"""Numbers of claims in cards and in the README, between markers, from the records of `lopt reproduce`.

A block begins with `<!-- evidence: CLAIM [CLAIM ...] -->` and ends with `<!-- /evidence -->`. What stands between is
replaced: the verdict of each claim and its checks, or that it was not run yet. With the word `numbers` after the claims
their numbers stand there instead of their checks. `<!-- evidence: summary -->` is a table of the papers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lopt.claims.claim import PAPER, Claim
from lightning_lopt.claims.coverage import PAPERS
from lightning_lopt.claims.page import Rows, check_table, table_row
from lightning_lopt.claims.report import Record, shown_verdict, spread

BLOCK = re.compile(r"(<!-- evidence: (?P<what>[^>\n]+?) -->\n).*?(<!-- /evidence -->)", re.DOTALL)
SUMMARY = "summary"
NUMBERS = "numbers"
SEPARATORS = (": ", " at ", ", ")
"""Between the row and the column in the names of quantities that make a table."""


def insert(text: str, claims: Mapping[str, Claim], records: Mapping[str, Record], rows: Rows) -> str:
    """The text with all its blocks filled anew.

    Raises:
        ValueError: a block names an unknown claim, or does not end.
    """
    blocks = len(BLOCK.findall(text))
    if text.count("<!-- evidence:") != blocks:
        raise ValueError("A block '<!-- evidence: ... -->' has no '<!-- /evidence -->' after it; add the line.")

    def fill(match: re.Match[str]) -> str:
        names = match["what"].split()
        if names == [SUMMARY]:
            lines = _summary(claims, records, rows)
        else:
            show = [name for name in names if name != NUMBERS]
            lines = [line for name in show for line in _claim(name, claims, records, rows, NUMBERS in names)]
        return "\n".join([match[1].rstrip("\n"), *lines, match[3]])

    return BLOCK.sub(fill, text)


def _claim(
    name: str, claims: Mapping[str, Claim], records: Mapping[str, Record], rows: Rows, numbers: bool
) -> list[str]:
    if name not in claims:
        raise ValueError(f"Unknown claim {name!r} in a block of evidence. Known claims are {', '.join(claims)}.")
    claim = claims[name]
    if name not in records:
        about = f"not run yet with the checks as they are now, {claim.minutes:g} CPU minutes"
        return [f"`lopt reproduce {name}` ({claim.title}): {about}.", ""]
    seeds = records[name]["seeds"]
    about = f"{seeds} seed{'s' if seeds > 1 else ''}"
    line = f"`lopt reproduce {name}` ({claim.title}; {about}): **{shown_verdict(rows[name])}**."
    table = number_table(records[name]["numbers"]) if numbers else check_table(rows[name])
    return [line, "", *table, ""]


def number_table(numbers: Mapping[str, Sequence[float]]) -> list[str]:
    """A Markdown table of means and standard deviations: rows and columns, where the names are made of both.

    Example:
        >>> number_table({"MNIST: lstm": [0.3, 0.5], "MNIST: Adam": [0.2, 0.2]})
        ['| | lstm | Adam |', '|---|---|---|', '| MNIST | 0.4 +- 0.141, n=2 | 0.2 +- 0, n=2 |']
        >>> number_table({"loss": [1.0]})
        ['| quantity | mean +- standard deviation |', '|---|---|', '| loss | 1, n=1 |']
    """
    for separator in SEPARATORS:
        if all(separator in name for name in numbers):
            parts = {name: name.split(separator, 1) for name in numbers}
            rows = list(dict.fromkeys(row for row, _ in parts.values()))
            columns = list(dict.fromkeys(column for _, column in parts.values()))
            cells = {tuple(parts[name]): spread(values) for name, values in numbers.items()}
            lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
            return lines + [table_row([row, *(cells.get((row, column), "") for column in columns)]) for row in rows]
    lines = [table_row(["quantity", "mean +- standard deviation"]), "|---|---|"]
    return lines + [table_row([name, spread(values)]) for name, values in numbers.items()]


def _summary(claims: Mapping[str, Claim], records: Mapping[str, Record], rows: Rows) -> list[str]:
    lines = [table_row(["paper", "claims measured", "checks of the paper that hold"]), "|---|---|---|"]
    for paper in PAPERS:
        names = list(dict.fromkeys(name for item in paper.items for name in item.claims if name in claims))
        found = [name for name in names if name in records]
        held = _held(rows, found)
        cells = [paper.title, f"{len(found)} of {len(names)}", f"{sum(held)} of {len(held)}"]
        lines.append(table_row(cells))
    return lines


def _held(rows: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]) -> list[bool]:
    return [bool(row["holds"]) for name in names for row in rows[name] if row["kind"] == PAPER]
