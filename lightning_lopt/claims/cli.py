"""`lopt reproduce`: measure claims, compute their verdicts, and keep the evidence."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lopt.claims import folder, report
from lightning_lopt.claims.claim import Claim, Measurement
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.plots import draw_values
from lightning_lopt.claims.registry import find, find_all
from lightning_lopt.evaluation.console import open_console, progress_bar
from lightning_lopt.tasks import datasets

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lightning_lopt.evaluation.compare import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    add = parser.add_argument
    about = "claims to measure: names from --list, or Python files or folders with claims of your own (they are run)"
    add("claims", nargs="*", metavar="CLAIM|PATH", help=about)
    add("--all", action="store_true", help="measure all bundled claims whose data are available, the cheapest first")
    add("--list", action="store_true", help="describe claims (default: all bundled ones) without measuring them")
    add("--quick", action="store_true", help="measure at a smaller scale, for a first look")
    add("--fresh", action="store_true", help="measure anew what --out already has")
    about = "output folder, with the page DIR.md beside it (default: %(default)s)"
    add("--out", type=Path, default=Path("reproduction"), metavar="DIR", help=about)
    default = Path("runs/reproduce")
    add("--cache", type=Path, default=default, metavar="DIR", help="intermediate results (default: %(default)s)")
    add("--check", type=Path, metavar="DIR", help="recompute all verdicts of a folder from its numbers, compare DIR.md")
    add("--page", action="store_true", help="write the page of --out anew from its numbers, without measuring")
    add("--insert", nargs="+", type=Path, metavar="FILE", help="fill blocks of evidence in cards from --out")


def run(arguments: argparse.Namespace) -> None:
    """Measure the claims one after the other, and update the files after each.

    A claim that does not hold is a finding, not a failure of the command.

    Raises:
        ValueError: no claim is named, one is unknown, a file of claims is faulty, or `--check` finds a difference.
        OSError: the data of a named claim cannot be read.
        ModuleNotFoundError: matplotlib or rich is not installed.
    """
    console = open_console(arguments.out)
    named = find(arguments.claims) if arguments.claims else []
    known = {**find_all(), **{claim.id: claim for claim in named}}
    if arguments.check or arguments.page or arguments.insert:
        _without_measuring(arguments, known, console)
        return
    if arguments.all == bool(arguments.claims or arguments.list):
        text = "Give either claims by name or path, or --all, or --list, --check, --page or --insert"
        raise ValueError(f"{text}. Known claims are {', '.join(find_all())}.")
    claims = named or sorted(find_all().values(), key=lambda claim: claim.minutes)
    if arguments.list:
        console.print(_list(claims))
        return
    for claim in named:  # check the data before the first run, which may take hours
        for name in claim.needs:
            datasets.load(name)
    for number, claim in enumerate(claims):
        left = sum(each.quick_minutes if arguments.quick else each.minutes for each in claims[number:])
        with progress_bar(console) as progress:
            note = _measure(claim, arguments, progress, f"[{number + 1}/{len(claims)}, {left:.0f} min] {claim.id}")
        if note:
            console.print(f"{claim.id}: {note}", style="dim", soft_wrap=True, highlight=False)
        folder.write(known, arguments.out)
    rows = folder.load(known, arguments.out).rows
    console.print(_verdicts({claim.id: rows[claim.id] for claim in claims if claim.id in rows}))
    console.print(str(folder.page_of(arguments.out)), style="dim", soft_wrap=True)


def _without_measuring(arguments: argparse.Namespace, known: dict[str, Claim], console: Console) -> None:
    """Compare, write or insert what the stored numbers give."""
    if arguments.check:
        if found := folder.differences(known, arguments.check):
            fix = f"lopt reproduce --page --out {arguments.check}"
            raise ValueError(f"{len(found)} files differ from the numbers: {'; '.join(found)}. Write them anew: {fix}")
        contents = folder.load(known, arguments.check)
        for name in contents.rows:
            row = contents.records[name]
            if not report.is_current(row, known[name], quick=row["scale"] == "quick"):
                console.print(f"{name}: measured before a change of its code or weights", style="dim", soft_wrap=True)
        console.print(f"{len(contents.rows)} claims: the verdicts and the page are those of the stored numbers.")
    if arguments.page:
        folder.write(known, arguments.out)
        console.print(str(folder.page_of(arguments.out)), soft_wrap=True)
    for path in arguments.insert or ():
        changed = folder.insert(known, arguments.out, path)
        console.print(f"{path}: {'filled' if changed else 'as it was'}", soft_wrap=True)


def _measure(claim: Claim, arguments: argparse.Namespace, progress: Progress, title: str) -> str:
    """Measure one claim and write its files. Returns why it was not measured, or ""."""
    quick = arguments.quick
    found = report.read(arguments.out).get(claim.id)
    if found is not None and not arguments.fresh:
        if report.is_current(found, claim, quick=quick):
            return "kept, its setup has not changed"
        if quick and found["scale"] == "full":
            return "kept, a measurement at the full scale; --fresh replaces it"
    if missing := [name for name in claim.needs if not datasets.is_available(name)]:
        variable = datasets.FOLDER_VARIABLE
        return f"not run. Data set {missing[0]!r} is not available; set ${variable} to a folder that has it."

    def report_progress(text: str, done: int, total: int) -> None:
        progress(f"{title}: {text}", done, total)

    seeds = claim.quick_seeds if quick else claim.seeds
    experiment = Experiment(seeds=seeds, quick=quick, cache_dir=arguments.cache, progress=report_progress)
    start = time.process_time()
    measurement = claim.measure(experiment)
    seconds = time.process_time() - start + experiment.saved_seconds
    if not isinstance(measurement, Measurement):
        got = type(measurement).__name__
        raise ValueError(f"`measure` of the claim {claim.id!r} must return a Measurement, not {got}.")
    record = report.record(claim, measurement, quick=quick, seeds=seeds, seconds=seconds)
    report.write(record, (claim.plot or draw_values)(measurement), arguments.out)
    return ""


def _list(claims: list[Claim]) -> Table:
    from rich.table import Table

    table = Table(title="Claims, with minutes on one core")
    for name in ("claim", "source and statement", "what is run"):
        table.add_column(name, overflow="fold")
    for name in ("full", "quick"):
        table.add_column(name, justify="right")
    table.add_column("data")
    for claim in claims:
        about = f"{claim.source}: {claim.statement}"
        costs = f"{claim.minutes:g}", f"{claim.quick_minutes:g}"
        table.add_row(claim.id, about, claim.title or claim.setup, *costs, ", ".join(claim.needs))
    return table


def _verdicts(rows: dict[str, list[dict[str, object]]]) -> Table:
    from rich.table import Table

    table = Table(title="Claims")
    for name in ("claim", "what must hold", "value", "bound", "margin", "holds"):
        table.add_column(name, overflow="fold")
    for claim, checks in rows.items():
        table.add_section()
        table.add_row(claim, report.shown_verdict(checks), "", "", "", "", style="bold")
        for check in checks:
            kind = "" if check["kind"] == "paper" else f" ({check['kind']})"
            numbers = [report.number(check[name]) for name in ("value", "bound", "margin")]  # type: ignore[arg-type]
            table.add_row("", f"{check['check']}{kind}", *numbers, "yes" if check["holds"] else "no")
    return table
