"""`lopt evaluate`: compare rules with tuned baselines, and print tables and save plots."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_lopt.evaluation import report
from lightning_lopt.evaluation.compare import Options, evaluate
from lightning_lopt.evaluation.console import open_console, progress_bar
from lightning_lopt.evaluation.suites import SUITES, Case
from lightning_lopt.evaluation.tuning import BASELINES
from lightning_lopt.tasks.base import check_choice

DEFAULT_STEPS = 1000
DEFAULTS = Options()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    add = parser.add_argument
    add("--rule", nargs="+", required=True, metavar="NAME", help="bundled names, directories or Hub repos")
    known = ", ".join([*BASELINES, "all"])
    default = ["adam", "adamw", "sgdm"]
    add("--baseline", nargs="+", default=default, metavar="NAME", help=f"from {known} (default: {' '.join(default)})")
    where = parser.add_mutually_exclusive_group(required=True)
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


def run(arguments: argparse.Namespace) -> None:
    """Run the evaluation, print its tables and write its files.

    Raises:
        ValueError: a name is unknown, or a number is not allowed.
        OSError: a data set or a rule on the Hub cannot be read.
        ModuleNotFoundError: matplotlib or rich is not installed.
    """
    console = open_console(arguments.out)
    options = Options(
        seeds=arguments.seeds,
        tell_length=not arguments.hide_length,
        samples=arguments.samples,
        cache_dir=arguments.cache,
    )
    baselines = list(BASELINES) if "all" in arguments.baseline else list(dict.fromkeys(arguments.baseline))
    with progress_bar(console) as progress:
        results = evaluate(arguments.rule, _cases(arguments), baselines, options=options, progress=progress)
    paths = report.write(results, arguments.out)  # before printing, which fails if a pager or `head` closes the pipe
    for table in report.tables(results):
        console.print(table)
    for path in paths:
        console.print(str(path), style="dim", soft_wrap=True)


def _cases(arguments: argparse.Namespace) -> list[Case]:
    if not arguments.suite:
        steps = DEFAULT_STEPS if arguments.steps is None else arguments.steps
        return [Case(task, steps) for task in dict.fromkeys(arguments.task)]
    check_choice("--suite", arguments.suite, SUITES)
    if arguments.steps is not None:
        raise ValueError("--steps is not allowed with --suite, which sets the steps itself; drop it, or use --task.")
    return list(SUITES[arguments.suite])
