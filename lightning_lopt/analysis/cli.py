"""`lopt analyze`: analyze a rule, or the theory of the noisy quadratic model, and write figures and an HTML page."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_lopt import hub, tasks
from lightning_lopt.analysis import nqm
from lightning_lopt.analysis.dynamics import Linearization, find_fixed_points, linearize
from lightning_lopt.analysis.findings import analyze, describe
from lightning_lopt.analysis.trajectories import autonomous
from lightning_lopt.rules import UpdateRule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS = {"gru-rosenbrock": "rosenbrock", "gru-two-moons": "two-moons", "gru-mnist": "mnist-conv"}
DEFAULT_TASK = "linear-regression"
BEST_MOMENTUM = {"linear-regression": (3.7585, 0.88114)}
"""Task -> (learning rate, momentum), optimal for its range of eigenvalues, 1e-3 to 1 (Polyak)."""
THEORY = "noisy-quadratic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    add = parser.add_argument
    name_help = f"a bundled name, a directory (./mine), a Hub repo owner/name, or {THEORY} for figures 1 and 2 of STAR"
    add("name", metavar="NAME", help=name_help)
    add("--out", type=Path, default=Path("analysis"), metavar="DIR", help="output directory (default: %(default)s)")
    add("--task", metavar="TASK", help=f"task to run the rule on (default: its training task, or {DEFAULT_TASK})")
    add("--steps", type=int, default=200, help="length of the runs (default: %(default)s)")
    add("--runs", type=int, default=16, help="number of runs (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    add("--history", type=Path, metavar="DIR", help="plot the modes at each checkpoint (*.ckpt) of its meta-training")


def run(arguments: argparse.Namespace) -> None:
    """Analyze a rule, print the summary, and write the files.

    Raises:
        ValueError: for unknown names and invalid numbers.
        OSError: if data, or a rule on the Hub, cannot be reached.
        ModuleNotFoundError: if a required library is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401

        from lightning_lopt.analysis import report
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed. Install the extra: pip install 'lightning_lopt[plot]'."
        ) from None
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out {str(arguments.out)!r} is a file; pass a directory, which is created if necessary.")
    for name in ("steps", "runs"):
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"--{name} {getattr(arguments, name)} is not allowed: it must be an integer of at least 1."
            )
    if arguments.name == THEORY:
        body, drawn = _theory(arguments.seed)
        for path in report.write_page("The noisy quadratic model", body, drawn, arguments.out):
            print(path)
        return
    rule = hub.load_rule(arguments.name)
    task = arguments.task or TASKS.get(arguments.name, DEFAULT_TASK)
    best_momentum = BEST_MOMENTUM.get(task)
    more = _history(rule, arguments.history, best_momentum) if arguments.history else {}
    found = analyze(
        rule,
        tasks.make(task),
        name=Path(arguments.name).name,
        steps=arguments.steps,
        runs=arguments.runs,
        seed=arguments.seed,
    )
    for sentence in describe(found):
        print(f"- {sentence}")
    for path in report.write(found, arguments.out, best_momentum=best_momentum, more=more):
        print(path)


def _history(
    rule: UpdateRule, directory: Path, best_momentum: tuple[float, float] | None
) -> dict[str, tuple[str, Figure]]:
    """A figure of the modes at each checkpoint of a meta-training (App. B.2), with its caption."""
    from lightning_lopt.analysis import plots

    paths = {int(found[1]): path for path in directory.glob("*.ckpt") if (found := re.search(r"step=(\d+)", path.name))}
    if not paths:
        raise ValueError(
            f"--history {str(directory)!r} has no checkpoints named *step=N*.ckpt; pass the folder of ModelCheckpoint."
        )
    steps = sorted(paths)
    modes = []
    for step in steps:
        weights = torch.load(paths[step], map_location="cpu", weights_only=True)["state_dict"]
        earlier = type(rule)(rule.config, kind=rule.kind)
        earlier.load_state_dict({name.removeprefix("rule."): value for name, value in weights.items()})
        modes.append(_modes(earlier))
    return {"history": ("The modes during meta-training (fig. 15).", plots.history(steps, modes, best_momentum))}


def _modes(rule: UpdateRule) -> Linearization:
    """The modes at the fixed point that a run without gradients converges to, or at the end of that run."""
    end = autonomous(rule).states[-1]
    fixed = find_fixed_points(rule, initial_states=end.unsqueeze(0))
    return linearize(rule, fixed.states[0] if len(fixed.states) else end)


def _theory(seed: int, steps: int = 1000, alphas: int = 50) -> tuple[list[str], dict[str, tuple[str, Figure]]]:
    """Text and figures 1 and 2 of STAR; takes two to three minutes."""
    from lightning_lopt.analysis import plots

    hessian = torch.tensor(nqm.H_PAPER, dtype=torch.float64)
    largest_stable = 2 / float(torch.linalg.eigvalsh(hessian)[-1])  # alpha, at P = 0
    uphill = torch.tensor([[-0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)
    fractions = torch.linspace(0, 1, alphas, dtype=torch.float64)
    variances = torch.stack(
        [nqm.gradient_variance(hessian, float(f) * largest_stable, nqm.HORIZONS, seed=seed) for f in fractions]
    )
    seeds = range(seed, seed + 5)
    trained = {
        fraction: [nqm.meta_train(hessian, fraction * largest_stable, steps=steps, seed=number) for number in seeds]
        for fraction in (0.0, 0.1, 0.2, 0.3, 0.4)
    }
    body = [
        "<p>A quadratic with noisy minima, and a learned preconditioner P beside a nominal term alpha (Harrison et al. "
        "2022, arXiv 2209.11208, section 4 and App. B.1).</p>",
        "<p>Theorem 1 holds for symmetric P. It does not hold for all diagonalizable P with real eigenvalues, as the "
        "paper states; <code>lightning_lopt.analysis.nqm</code> has a counterexample.</p>",
    ]
    return body, {
        "stability": (
            "A P that goes uphill in one direction, stabilized by a nominal term (fig. 1).",
            plots.stability(hessian, uphill),
        ),
        "gradient_variance": (
            "Variance of the meta-gradient at P = 0 over 500 runs, for T from 1 to 1000 (fig. 2a).",
            plots.gradient_variance(fractions, nqm.HORIZONS, variances),
        ),
        "meta_training": ("Meta-training of P by ES, mean of 5 seeds (fig. 2b, c).", plots.meta_training(trained)),
    }
