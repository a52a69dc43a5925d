"""`lopt analyze`: what a rule has learned, or the theory of the noisy quadratic model, as figures and a page."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_lopt import hub, tasks
from lightning_lopt.analysis import nqm
from lightning_lopt.analysis.dynamics import Linearization, find_fixed_points, linearize
from lightning_lopt.analysis.findings import analyze, words
from lightning_lopt.analysis.trajectories import autonomous
from lightning_lopt.rules import UpdateRule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS = {"gru-rosenbrock": "rosenbrock", "gru-two-moons": "two-moons", "gru-mnist": "mnist-conv"}
DEFAULT_TASK = "linear-regression"
BEST_MOMENTUM = {"linear-regression": (3.7585, 0.88114)}
"""Task -> (learning rate, momentum): optimal for the range of its eigenvalues, 1e-3 to 1 (Polyak)."""
THEORY = "noisy-quadratic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    add = parser.add_argument
    add(
        "name",
        metavar="NAME",
        help=f"a bundled name, a directory, a Hub repo owner/name, or {THEORY}: figures 1 and 2 of STAR",
    )
    add("--out", type=Path, default=Path("analysis"), metavar="DIR", help="where files go (default: %(default)s)")
    add("--task", metavar="TASK", help=f"what to run the rule on (default: what it was trained on, or {DEFAULT_TASK})")
    add("--steps", type=int, default=200, help="length of the runs (default: %(default)s)")
    add("--runs", type=int, default=16, help="number of runs (default: %(default)s)")
    add("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    add("--history", type=Path, metavar="DIR", help="weights saved in meta-training (*.ckpt): how its modes came about")


def run(arguments: argparse.Namespace) -> None:
    """Analyze, print the words, write the files.

    Raises:
        ValueError: unknown names or numbers that are not allowed.
        OSError: data, or a rule on the Hub, are out of reach.
        ModuleNotFoundError: a library that is needed is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401

        from lightning_lopt.analysis import report
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed. Install the extra: pip install 'lightning_lopt[plot]'."
        ) from None
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out {str(arguments.out)!r} is a file; name a directory, which is made if need be.")
    for name in ("steps", "runs"):
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"--{name} {getattr(arguments, name)} is not allowed: it must be an integer of at least 1."
            )
    if arguments.name == THEORY:
        text, drawn = _theory(arguments.seed)
        for path in report.write_page("The noisy quadratic model", text, drawn, arguments.out):
            print(path)
        return
    rule, task = hub.load_rule(arguments.name), arguments.task or TASKS.get(arguments.name, DEFAULT_TASK)
    star = BEST_MOMENTUM.get(task)
    more = _history(rule, arguments.history, star) if arguments.history else {}
    found = analyze(
        rule,
        tasks.make(task),
        name=Path(arguments.name).name,
        steps=arguments.steps,
        runs=arguments.runs,
        seed=arguments.seed,
    )
    for sentence in words(found):
        print(f"- {sentence}")
    for path in report.write(found, arguments.out, star=star, more=more):
        print(path)


def _history(rule: UpdateRule, directory: Path, star: tuple[float, float] | None) -> dict[str, tuple[str, Figure]]:
    """The modes at each checkpoint of a meta-training (App. B.2)."""
    from lightning_lopt.analysis import plots

    paths = {int(found[1]): path for path in directory.glob("*.ckpt") if (found := re.search(r"step=(\d+)", path.name))}
    if not paths:
        raise ValueError(
            f"--history {str(directory)!r} has no checkpoints named *step=N*.ckpt; name MetaTrainer's folder."
        )
    steps, modes = sorted(paths), []
    for step in steps:
        weights = torch.load(paths[step], map_location="cpu", weights_only=True)["state_dict"]
        rule_then = type(rule)(rule.config, kind=rule.kind)
        rule_then.load_state_dict({name.removeprefix("rule."): value for name, value in weights.items()})
        modes.append(_modes(rule_then))
    return {"history": ("The modes in the course of meta-training (fig. 15).", plots.history(steps, modes, star))}


def _modes(rule: UpdateRule) -> Linearization:
    """At the fixed point that a run without gradients comes to; without one, where that run ends."""
    end = autonomous(rule).states[-1]
    fixed = find_fixed_points(rule, initial_states=end.unsqueeze(0))
    return linearize(rule, fixed.states[0] if len(fixed.states) else end)


def _theory(seed: int, steps: int = 1000, alphas: int = 50) -> tuple[list[str], dict[str, tuple[str, Figure]]]:
    """Figures 1 and 2 of STAR: two to three minutes."""
    from lightning_lopt.analysis import plots

    hessian = torch.tensor(nqm.H_PAPER, dtype=torch.float64)
    sharpest = float(torch.linalg.eigvalsh(hessian)[-1])
    uphill = torch.tensor([[-0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)
    shares = torch.linspace(0, 1, alphas, dtype=torch.float64)
    variances = torch.stack(
        [nqm.gradient_variance(hessian, float(share) * 2 / sharpest, nqm.HORIZONS, seed=seed) for share in shares]
    )
    seeds = range(seed, seed + 5)
    trained = {
        share: [nqm.meta_train(hessian, share * 2 / sharpest, steps=steps, seed=number) for number in seeds]
        for share in (0.0, 0.1, 0.2, 0.3, 0.4)
    }
    text = [
        "<p>A quadratic with noisy minima, and a learned preconditioner P beside a nominal term alpha (Harrison et al. "
        "2022, arXiv 2209.11208, section 4 and App. B.1).</p>",
        "<p>Theorem 1 holds for symmetric P. For P that is merely diagonalizable with real eigenvalues, as the paper "
        "states it, it does not: see the counter-example in <code>lightning_lopt.analysis.nqm</code>.</p>",
    ]
    return text, {
        "stability": (
            "A P that goes uphill in one direction, and nominal terms (fig. 1).",
            plots.stability(hessian, uphill),
        ),
        "gradient_variance": (
            "Variance of the meta-gradient at P = 0 over 500 runs, T from 1 to 1000 (fig. 2a).",
            plots.gradient_variance(shares, nqm.HORIZONS, variances),
        ),
        "meta_training": ("Meta-training of P by ES, mean of 5 seeds (fig. 2b, c).", plots.meta_training(trained)),
    }
