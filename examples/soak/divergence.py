"""Run a rule on every small task of the catalog, and count the runs that diverge or end with a higher loss.

    python examples/soak/divergence.py                                  # the bundled star, seven minutes of a core
    python examples/soak/divergence.py --rule runs/star/rule --tasks digits --steps 600

The catalog has tasks that no rule was meta-trained on, some of them hostile: gradients by evolution strategies, which
are almost pure noise, rescaled parameters, nets of many shapes. As in `lopt evaluate`, a run has diverged if a loss is
not finite or the final loss is more than twice the initial one. Runs that end above their initial loss are counted too.
Needs the image data and tiny Shakespeare in $LIGHTNING_LOPT_DATA. Exits with 1 if a run diverged.
"""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import lightning_lopt as lopt
from lightning_lopt import tasks
from lightning_lopt.evaluation.runs import run
from lightning_lopt.evaluation.suites import JUDGING_ONLY, UNSEEN2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="star", help="name of a bundled rule, or a directory")
    parser.add_argument("--tasks", default="", help="only tasks whose names contain this")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=30_000, help="skip nets of more parameters than this")
    arguments = parser.parse_args()
    rule = lopt.load_rule(arguments.rule)
    table, skipped = Table("task", "parameters", "initial loss", "final loss", ""), []
    counts = {"diverged": 0, "above their initial loss": 0, "runs": 0}
    judging = JUDGING_ONLY | {case.task for case in UNSEEN2}  # looked at once, by `lopt evaluate`
    names = [name for name in tasks.list_tasks() if arguments.tasks in name and name not in judging]
    for name in track(names, description=str(rule.kind)):
        task = tasks.make(name)
        if task.num_params > arguments.largest or name == "random-slopes":  # whose loss falls without end
            skipped.append(name)
            continue
        (runs,) = run(rule, [rule.meta_params()], task, steps=arguments.steps, seeds=arguments.seeds)
        diverged, above = sum(runs.diverged), sum(final > runs.scale for final in runs.final)
        counts["diverged"] += diverged
        counts["above their initial loss"] += above
        counts["runs"] += arguments.seeds
        note = f"{diverged} diverged" if diverged else f"{above} above" if above else ""
        table.add_row(name, f"{task.num_params:,}", f"{runs.scale:.4g}", f"{runs.average('final'):.4g}", note)
    if not counts["runs"]:
        parser.error(
            f"no task of at most {arguments.largest:,} parameters has {arguments.tasks!r} in its name; "
            "tasks.list_tasks() has the names, --largest allows larger nets."
        )
    Console(width=120).print(table)
    print("not run:", ", ".join(skipped) or "none")
    print(*(f"{number} {what}" for what, number in counts.items()), f"of {arguments.steps} steps", sep=", ")
    sys.exit(counts["diverged"] > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
