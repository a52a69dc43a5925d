"""`lopt reproduce`: measure claims, and say whether they hold."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lopt.claims import report
from lightning_lopt.claims.base import Claim
from lightning_lopt.claims.lab import Lab
from lightning_lopt.claims.plots import dots
from lightning_lopt.claims.registry import find, find_all
from lightning_lopt.evaluation.cli import progress_bar
from lightning_lopt.evaluation.report import check_installed
from lightning_lopt.tasks import datasets

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_lopt.evaluation.compare import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    add = parser.add_argument
    add("claims", nargs="*", metavar="CLAIM", help="claims to measure; see --list")
    add("--all", action="store_true", help="measure all claims whose data are here")
    add("--list", action="store_true", help="tell what the claims are and what they cost, and measure nothing")
    add("--quick", action="store_true", help="a smaller scale: whether it runs, and a hint at the verdict")
    add("--out", type=Path, default=Path("reproduction"), metavar="DIR", help="where files go (default: %(default)s)")
    add("--cache", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="pieces kept (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Measure the claims one after the other; the files are brought up to date after each.

    A claim that does not hold is a finding, not a failure of the command.

    Raises:
        ValueError: an unknown claim, or none is named.
        OSError: a named claim's data are out of reach.
        ModuleNotFoundError: a library that is needed is not installed.
    """
    check_installed()
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    if sum([bool(arguments.claims), arguments.all, arguments.list]) != 1:
        known = ", ".join(find_all())
        raise ValueError(f"Give claims by name, or --all, or --list: one of the three. There are {known}.")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out {str(arguments.out)!r} is a file; name a directory, which is made if need be.")
    if arguments.list:
        console.print(_list(list(find_all().values())))
        return
    claims = list(find_all().values()) if arguments.all else find(arguments.claims)
    for claim in claims if arguments.claims else ():  # before anything is run, which may take hours
        for name in claim.needs:
            datasets.load(name)
    found = []
    for number, claim in enumerate(claims, 1):
        with progress_bar(console) as progress:
            found.append(_measure(claim, arguments, progress, f"[{number}/{len(claims)}] {claim.id}"))
    console.print(_verdicts(found))
    console.print(str(arguments.out / report.PAGE), style="dim", soft_wrap=True)


def _measure(claim: Claim, arguments: argparse.Namespace, progress: Progress, title: str) -> report.Record:
    """Measure one claim and write its files."""
    quick = arguments.quick
    if missing := [name for name in claim.needs if not datasets.is_available(name)]:
        reason = f"Its data {missing[0]!r} are not here: set ${datasets.FOLDER_VARIABLE} to the folder that has them."
        found = report.not_run(claim, reason, quick=quick)
        report.write(found, None, arguments.out)
        return found
    seeds = claim.quick_seeds if quick else claim.seeds
    told: Progress = lambda text, done, total: progress(f"{title}: {text}", done, total)  # noqa: E731
    lab = Lab(seeds=seeds, quick=quick, cache_dir=arguments.cache, progress=told)
    measured = claim.measure(lab)
    found = report.record(claim, measured, quick=quick, seeds=seeds, seconds=lab.seconds)
    report.write(found, (claim.plot or dots)(measured), arguments.out)
    return found


def _list(claims: list[Claim]) -> Table:
    from rich.table import Table

    table = Table(title="Claims, and minutes on one core")
    for name in ("claim", "source and statement"):
        table.add_column(name, overflow="fold")
    for name in ("full", "quick"):
        table.add_column(name, justify="right")
    table.add_column("data")
    for claim in claims:
        about = f"{claim.source}: {claim.statement}"
        table.add_row(claim.id, about, f"{claim.minutes:g}", f"{claim.quick_minutes:g}", ", ".join(claim.needs))
    return table


def _verdicts(found: list[report.Record]) -> Table:
    from rich.table import Table

    table = Table(title="Claims")
    for name in ("claim", "what must hold", "measured", "holds"):
        table.add_column(name, overflow="fold")
    for row in found:
        table.add_section()
        table.add_row(row["id"], report.shown_verdict(row), row.get("reason", ""), "", style="bold")
        for check in row["checks"]:
            values = "\n".join(f"{name}: {value}" for name, value in check["measured"].items())
            table.add_row("", check["text"], values, "yes" if check["holds"] else "no")
    return table
