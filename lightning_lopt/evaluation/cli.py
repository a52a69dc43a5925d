"""`lopt evaluate`: compare rules with tuned baselines, and print tables and save plots."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lopt.evaluation import cards, report
from lightning_lopt.evaluation.compare import Options, evaluate
from lightning_lopt.evaluation.console import open_console, progress_bar
from lightning_lopt.evaluation.rivals import RIVALS
from lightning_lopt.evaluation.suites import REAL_SUITES, SUITES, Case
from lightning_lopt.evaluation.tuning import BASELINES
from lightning_lopt.tasks import dataset_of, datasets
from lightning_lopt.tasks.base import check_choice

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_STEPS = 1000
TUNED = ("adam", "adamw", "sgdm")
DEFAULTS = Options()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    add = parser.add_argument
    add("--rule", nargs="+", metavar="NAME", help="bundled names, directories or Hub repos")
    known = ", ".join([*BASELINES, *RIVALS, "all"])
    default = f"default: {' '.join(TUNED)}; with --suite real {' '.join(RIVALS)}"
    add("--baseline", nargs="+", metavar="NAME", help=f"from {known} ({default})")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--task", nargs="+", metavar="NAME", help="task names, see lightning_lopt.tasks.list_tasks()")
    where.add_argument("--suite", metavar="NAME", help=f"a named set of tasks with their steps: {', '.join(SUITES)}")
    add("--steps", type=int, help=f"steps per run on each --task (default: {DEFAULT_STEPS})")
    add("--seeds", type=int, default=DEFAULTS.seeds, help="runs per setting, side by side (default: %(default)s)")
    add("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="output directory (default: %(default)s)")
    add("--cache", type=Path, default=DEFAULTS.cache_dir, metavar="DIR", help="cached results (default: %(default)s)")
    add(
        "--samples", type=int, default=DEFAULTS.samples, help="random settings to try for nadamw (default: %(default)s)"
    )
    add("--hide-length", action="store_true", help="do not tell the rule how long the run is")
    add("--no-nominal", action="store_true", help="leave out the nominal term alone")
    what = "run nothing: fill the blocks of these cards from the folders in --out, see evaluation.cards"
    add("--insert", nargs="+", type=Path, metavar="FILE", help=what)


def run(arguments: argparse.Namespace) -> None:
    """Run the evaluation, print its tables and write its files.

    Raises:
        ValueError: a name is unknown, or a number is not allowed.
        OSError: a data set or a rule on the Hub cannot be read.
        ModuleNotFoundError: matplotlib or rich is not installed.
    """
    console = open_console(arguments.out)
    if arguments.insert:
        for path in arguments.insert:
            path.write_text(cards.insert(path.read_text(encoding="utf-8"), arguments.out), encoding="utf-8")
        return
    if not arguments.rule or not (arguments.task or arguments.suite):
        raise ValueError("Name rules by --rule, and tasks by --task or --suite. Or give --insert and files.")
    options = Options(
        seeds=arguments.seeds,
        tell_length=not arguments.hide_length,
        nominal=not arguments.no_nominal,
        samples=arguments.samples,
        cache_dir=arguments.cache,
    )
    cases = _cases(arguments, console)
    with progress_bar(console) as progress:
        results = evaluate(arguments.rule, cases, _baselines(arguments), options=options, progress=progress)
    paths = report.write(results, arguments.out)  # before printing, which fails if a pager or `head` closes the pipe
    for table in report.tables(results):
        console.print(table)
    for path in paths:
        console.print(str(path), style="dim", soft_wrap=True)


def _baselines(arguments: argparse.Namespace) -> list[str]:
    if arguments.baseline is None:
        return list(RIVALS) if arguments.suite in REAL_SUITES else list(TUNED)
    if "all" in arguments.baseline:
        return [*BASELINES, *RIVALS]
    return list(dict.fromkeys(arguments.baseline))


def _cases(arguments: argparse.Namespace, console: Console) -> list[Case]:
    """The cases; of a suite, those whose data are here."""
    if not arguments.suite:
        steps = DEFAULT_STEPS if arguments.steps is None else arguments.steps
        return [Case(task, steps) for task in dict.fromkeys(arguments.task)]
    check_choice("--suite", arguments.suite, SUITES)
    if arguments.steps is not None:
        raise ValueError("--steps is not allowed with --suite, which sets the steps itself; drop it, or use --task.")
    cases = []
    for case in SUITES[arguments.suite]:
        dataset = dataset_of(case.task)
        try:
            if dataset is not None and not datasets.is_available(dataset):
                datasets.load(dataset)  # downloads it, or raises
        except FileNotFoundError as error:
            console.print(f"skipped {case}: {error}", style="yellow", soft_wrap=True, highlight=False)
            continue
        cases.append(case)
    return cases
