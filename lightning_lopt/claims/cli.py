"""`lopt reproduce`: measure claims and compute their verdicts."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lopt.claims import report
from lightning_lopt.claims.claim import Claim, Measurement
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.plots import draw_values
from lightning_lopt.claims.registry import find, find_all
from lightning_lopt.evaluation.console import open_console, progress_bar
from lightning_lopt.tasks import datasets

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_lopt.evaluation.compare import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    add = parser.add_argument
    about = "claims to measure: names from --list, or Python files or folders with claims of your own (they are run)"
    add("claims", nargs="*", metavar="CLAIM|PATH", help=about)
    add("--all", action="store_true", help="measure all bundled claims whose data are available")
    add("--list", action="store_true", help="describe claims (default: all bundled ones) without measuring them")
    add("--quick", action="store_true", help="measure at a smaller scale, for a first look")
    add("--out", type=Path, default=Path("reproduction"), metavar="DIR", help="output directory (default: %(default)s)")
    default = Path("runs/reproduce")
    add("--cache", type=Path, default=default, metavar="DIR", help="intermediate results (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Measure the claims one after the other, and update the files after each.

    A claim that does not hold is a finding, not a failure of the command.

    Raises:
        ValueError: no claim is named, one is unknown, or a file of claims is faulty.
        OSError: the data of a named claim cannot be read.
        ModuleNotFoundError: matplotlib or rich is not installed.
    """
    console = open_console(arguments.out)
    if arguments.all == bool(arguments.claims or arguments.list):
        known = ", ".join(find_all())
        raise ValueError(f"Give either claims by name or path, or --all, or --list. Known claims are {known}.")
    claims = find(arguments.claims) if arguments.claims else list(find_all().values())
    if arguments.list:
        console.print(_list(claims))
        return
    for claim in claims if arguments.claims else ():  # check the data before the first run, which may take hours
        for name in claim.needs:
            datasets.load(name)
    records = []
    for number, claim in enumerate(claims, 1):
        with progress_bar(console) as progress:
            records.append(_measure(claim, arguments, progress, f"[{number}/{len(claims)}] {claim.id}"))
    console.print(_verdicts(records))
    console.print(str(arguments.out / report.PAGE), style="dim", soft_wrap=True)


def _measure(claim: Claim, arguments: argparse.Namespace, progress: Progress, title: str) -> report.Record:
    """Measure one claim and write its files."""
    quick = arguments.quick
    if missing := [name for name in claim.needs if not datasets.is_available(name)]:
        reason = f"Data set {missing[0]!r} is not available; set ${datasets.FOLDER_VARIABLE} to a folder that has it."
        record = report.not_run(claim, reason, quick=quick)
        report.write(record, None, arguments.out)
        return record

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
    return record


def _list(claims: list[Claim]) -> Table:
    from rich.table import Table

    table = Table(title="Claims, with minutes on one core")
    for name in ("claim", "source and statement"):
        table.add_column(name, overflow="fold")
    for name in ("full", "quick"):
        table.add_column(name, justify="right")
    table.add_column("data")
    for claim in claims:
        about = f"{claim.source}: {claim.statement}"
        table.add_row(claim.id, about, f"{claim.minutes:g}", f"{claim.quick_minutes:g}", ", ".join(claim.needs))
    return table


def _verdicts(records: list[report.Record]) -> Table:
    from rich.table import Table

    table = Table(title="Claims")
    for name in ("claim", "what must hold", "measured", "holds"):
        table.add_column(name, overflow="fold")
    for record in records:
        table.add_section()
        table.add_row(record["id"], report.shown_verdict(record), record.get("reason", ""), "", style="bold")
        for check in record["checks"]:
            values = "\n".join(f"{name}: {value}" for name, value in check["measured"].items())
            table.add_row("", check["text"], values, "yes" if check["holds"] else "no")
    return table
