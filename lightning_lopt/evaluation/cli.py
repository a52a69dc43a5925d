"""`lopt evaluate`: a rule against tuned baselines, as tables and plots."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lopt.evaluation import report
from lightning_lopt.evaluation.compare import Options, Progress, evaluate
from lightning_lopt.evaluation.suites import SUITES, Case
from lightning_lopt.evaluation.tuning import BASELINES
from lightning_lopt.tasks.base import check_choice

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_STEPS = 1000
DEFAULTS = Options()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    add = parser.add_argument
    add("--rule", nargs="+", required=True, metavar="NAME", help="bundled names, directories or Hub repos")
    known, default = ", ".join([*BASELINES, "all"]), ["adam", "adamw", "sgdm"]
    add("--baseline", nargs="+", default=default, metavar="NAME", help=f"of {known} (default: {' '.join(default)})")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--task", nargs="+", metavar="NAME", help="tasks by name, see lightning_lopt.tasks.list_tasks()")
    where.add_argument("--suite", metavar="NAME", help=f"a set of tasks with their steps: {', '.join(SUITES)}")
    add("--steps", type=int, help=f"length of the runs on each --task (default: {DEFAULT_STEPS})")
    add("--seeds", type=int, default=DEFAULTS.seeds, help="runs per setting, side by side (default: %(default)s)")
    add("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="where files go (default: %(default)s)")
    add("--cache", type=Path, default=DEFAULTS.cache_dir, metavar="DIR", help="kept results (default: %(default)s)")
    add("--samples", type=int, default=DEFAULTS.samples, help="settings tried for nadamw (default: %(default)s)")
    add("--hide-length", action="store_true", help="do not tell the rule how long the run is")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the tables, write the files.

    Raises:
        ValueError: unknown names or numbers that are not allowed.
        OSError: data, or a rule on the Hub, are out of reach.
        ModuleNotFoundError: a library that is needed is not installed.
    """
    report.check_installed()
    from rich.console import Console

    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out {str(arguments.out)!r} is a file; name a directory, which is made if need be.")
    options = Options(
        seeds=arguments.seeds,
        tell_length=not arguments.hide_length,
        samples=arguments.samples,
        cache_dir=arguments.cache,
    )
    baselines = list(BASELINES) if "all" in arguments.baseline else list(dict.fromkeys(arguments.baseline))
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file or a pipe has room
    with progress_bar(console) as progress:
        results = evaluate(arguments.rule, _cases(arguments), baselines, options=options, progress=progress)
    for table in report.tables(results):
        console.print(table)
    for path in report.write(results, arguments.out):
        console.print(str(path), style="dim", soft_wrap=True)


def _cases(arguments: argparse.Namespace) -> list[Case]:
    if not arguments.suite:
        steps = DEFAULT_STEPS if arguments.steps is None else arguments.steps
        return [Case(task, steps) for task in dict.fromkeys(arguments.task)]
    check_choice("--suite", arguments.suite, SUITES)
    if arguments.steps is not None:
        raise ValueError(
            "--steps is not allowed with --suite, which has its own; leave it out, or name tasks by --task."
        )
    return list(SUITES[arguments.suite])


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar on a terminal; elsewhere a line for each population that has been run."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        start = time.monotonic()

        def line(text: str, done: int, total: int) -> None:
            if done == total:
                console.print(f"{time.monotonic() - start:8.0f} s  {text}", soft_wrap=True, highlight=False)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} steps"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        bar = bars.add_task("", total=1)
        yield lambda text, done, total: bars.update(bar, description=text, completed=done, total=total)
