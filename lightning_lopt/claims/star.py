"""The evidence of the STAR paper (Harrison, Metz, Sohl-Dickstein 2022, arXiv 2209.11208), figures 3, 4 and App.1 to 6.

The paper gives its results as curves without numbers, so that the checks are what its text says of them. Its setting
takes a GPU for days; here everything is smaller, in the same proportions where that is possible: an 8 x 8 image task in
place of 28 x 28, inner runs of 200 steps in place of 2,000, and a meta-learning rate thirty times as large, for
meta-training is some hundred steps long. Architecture, betas, initial weights, truncation, perturbation, clipping, mean
training loss as the objective and the weight decays are the paper's own.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from lightning_lopt.claims.base import Check, Claim, Measured, at_most, below
from lightning_lopt.claims.lab import Lab
from lightning_lopt.claims.plots import Curve, draw_curves
from lightning_lopt.claims.training import Trained, forget_compiled, meta_train
from lightning_lopt.evaluation.compare import fingerprint
from lightning_lopt.evaluation.runs import Runs, run
from lightning_lopt.meta.estimators import PES
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.rules import UpdateRule, make
from lightning_lopt.tasks import Task
from lightning_lopt.tasks import make as make_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "Harrison et al. 2022 (arXiv 2209.11208)"
LONGER = 10
RUNS = 4


class Variant(NamedTuple):
    """A rule and the weight decay that it is meta-trained with."""

    config: tuple[tuple[str, Any], ...]
    weight_decay: float = 0.0


_STAR = (("kind", "star"),)
VARIANTS = {
    "STAR wd 0.1": Variant(_STAR, 0.1),
    "STAR wd 0.5": Variant(_STAR, 0.5),
    "Blackbox": Variant((("kind", "blackbox"),)),
    "Hyperparam": Variant((("kind", "hyperparam"),)),
    "STAR wd 0": Variant(_STAR, 0.0),
    "STAR wd 1": Variant(_STAR, 1.0),
    "No Pre.": Variant((*_STAR, ("normalize_blackbox", False)), 0.1),
    "No Nom.": Variant((*_STAR, ("nominal_stepsize", 0.0), ("nominal_controller", False)), 0.1),
}
MAIN = ("STAR wd 0.1", "STAR wd 0.5", "Blackbox", "Hyperparam")
TASKS = {"mlp": "digits-mlp", "conv": "digits-conv"}
END, MEAN = "final meta-loss", "meta-loss averaged over meta-training"
GROWTH, DIVERGED = "loss at 10x / at 1x horizon", "share of runs diverged at 10x"


class Scale(NamedTuple):
    """How much is done."""

    horizon: int = 200
    num_steps: int = 300
    every: int = 50
    pairs: int = 8
    truncation: int = 50


FULL, QUICK = Scale(), Scale(horizon=60, num_steps=40, every=20, pairs=4, truncation=20)
SETUP = (
    f"{{task}} in place of {{paper_task}}; inner runs of {FULL.horizon} steps (paper: 2,000) and of {LONGER} times "
    f"that; {FULL.num_steps} meta-steps of PES with {FULL.pairs} pairs, truncation {FULL.truncation}, std 0.01, AdamW "
    "with lr 3e-3 (paper: 1e-4, far more steps), clipping at norm 1, raw mean training loss. A meta-loss is the mean "
    f"training loss over an inner run of the rule as it is, mean of {RUNS} runs, each at most twice the initial loss."
)


def train(lab: Lab, names: Sequence[str], task: Task) -> dict[str, tuple[UpdateRule, list[Trained]]]:
    """Variant -> its rule (of any meta-parameters), and a meta-training per seed."""
    scale, trained = lab.pick(FULL, QUICK), {}
    made: dict[Any, UpdateRule] = {}
    estimator = PES(
        num_pairs=scale.pairs, truncation=scale.truncation, std=0.01, horizon=Horizon(scale.horizon), stagger=True
    )
    for name in sorted(names, key=lambda name: str(VARIANTS[name].config)):  # what shares a rule, together
        config, weight_decay = VARIANTS[name]
        if config not in made:
            forget_compiled()
            made[config] = make(**dict(config))
        rows = [
            meta_train(
                lab,
                f"meta-train {name} seed {seed}",
                made[config],
                [task],
                estimator,
                num_steps=scale.num_steps,
                every=scale.every,
                seed=seed,
                objective="raw",
                tell_horizon=False,
                lr=3e-3,
                lr_factors={},
                weight_decay=weight_decay,
                schedule="constant",
            )
            for seed in lab.seeds
        ]
        trained[name] = made[config], rows
    return {name: trained[name] for name in names}


def inner_runs(
    lab: Lab, label: str, rule: UpdateRule, settings: Sequence[dict[str, Tensor]], task: Task, steps: int, runs: int
) -> list[Runs]:
    """Runs of the rule with several sets of meta-parameters, side by side."""
    marks = []
    for meta_params in settings:
        rule.load_state_dict(meta_params)
        marks.append(fingerprint(rule))
    key = {"rules": marks, "task": task.name, "size": task.num_params, "steps": steps, "runs": runs}

    def compute() -> dict[str, Any]:
        report = lambda done: lab.progress(label, done, steps)  # noqa: E731
        found = run(rule, settings, task, steps=steps, seeds=runs, tell_length=False, on_step=report)
        return {"runs": [vars(item) for item in found]}

    return [Runs(**row) for row in lab.piece("inner-runs", key, compute)["runs"]]


def measure(lab: Lab, names: Sequence[str], task_name: str) -> Measured:
    """Meta-training curves, and inner runs of ten times the horizon by the final rules."""
    task, scale = make_task(task_name), lab.pick(FULL, QUICK)
    numbers: dict[str, list[float]] = {}
    curves, inner = {}, {}
    for name, (rule, trained) in train(lab, names, task).items():
        stages = [meta_params for row in trained for meta_params in row.meta_params]
        scored = inner_runs(lab, f"score {name}", rule, stages, task, scale.horizon, RUNS)
        losses = [statistics.fmean(item.bounded("mean")) for item in scored]
        count = len(trained[0].steps)
        rows = [losses[i : i + count] for i in range(0, len(losses), count)]
        last = [row.meta_params[-1] for row in trained]
        long = inner_runs(lab, f"10x {name}", rule, last, task, LONGER * scale.horizon, RUNS)
        numbers[f"{END}, {name}"] = [row[-1] for row in rows]
        numbers[f"{MEAN}, {name}"] = [statistics.fmean(row) for row in rows]
        numbers[f"{GROWTH}, {name}"] = [_growth(item) for item in long]
        numbers[f"{DIVERGED}, {name}"] = [statistics.fmean(item.diverged) for item in long]
        curves[name] = {"steps": trained[0].steps, "seeds": rows}
        inner[name] = {"steps": middles(long[0]), "seeds": [curve_of(item) for item in long]}
    return Measured(numbers, {"meta": curves, "inner": inner, "horizon": scale.horizon})


def _bounds(runs: Runs, loss: float) -> float:
    """A loss within the bounds of `Runs.bounded`, with the upper one for NaN."""
    (found,) = Runs(**{**vars(runs), "final": [loss]}).bounded("final")
    return found


def _growth(runs: Runs) -> float:
    """Final loss divided by that around the end of the first tenth, both as means over runs."""
    at_horizon = [curve[len(curve) // LONGER - 1] for curve in runs.curve]
    return statistics.fmean(runs.bounded("final")) / statistics.fmean(_bounds(runs, loss) for loss in at_horizon)


def curve_of(runs: Runs) -> list[float]:
    """The mean over runs of the loss, within bounds."""
    return [statistics.fmean(_bounds(runs, loss) for loss in point) for point in zip(*runs.curve, strict=True)]


def middles(runs: Runs) -> list[float]:
    """The steps in the middle of the stretches that a curve has means of."""
    count = len(runs.curve[0])
    return [(i + 0.5) * runs.steps / count for i in range(count)]


def plot(measured: Measured, *, each: bool = False) -> Figure:
    """Meta-training curves above, inner runs below, as in the paper's figures."""
    from matplotlib.figure import Figure

    data = measured.data
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    for panel, part in ((upper, "meta"), (lower, "inner")):
        draw_curves(panel, [Curve(name, row["steps"], row["seeds"]) for name, row in data[part].items()], each=each)
    upper.set(xlabel="meta-training step", ylabel="mean loss of an inner run")
    lower.set(xlabel="inner step", ylabel="training loss")
    lower.axvline(data["horizon"], color="black", linestyle="--", linewidth=1)
    lower.annotate("meta-training horizon", (data["horizon"], 0.97), xycoords=("data", "axes fraction"), va="top",
                   xytext=(4, 0), textcoords="offset points", fontsize=8)  # fmt: skip
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def plot_each(measured: Measured) -> Figure:
    """The same with a line per seed."""
    return plot(measured, each=True)


def _faster(ours: str, theirs: str) -> Check:
    return below(f"{MEAN}, {ours}", f"{MEAN}, {theirs}", published="trains faster")


def _without_worst(ours: str, theirs: str) -> Check:
    both = f"{END}, {ours}", f"{END}, {theirs}"

    def holds(a: list[float], b: list[float]) -> bool:
        return statistics.fmean(sorted(a)[:-1] or a) <= statistics.fmean(sorted(b)[:-1] or b)

    return Check(f"{both[0]} <= {both[1]}, each without its worst seed", both, holds, "holds if outliers are ignored")


def _over_damped() -> Check:
    return below(f"{END}, STAR wd 0.1", f"{END}, STAR wd 1", published="decay 1.0 over-damps")


STARS = ("STAR wd 0.1", "STAR wd 0.5")
FIGURE_3 = (
    *(below(f"{END}, {star}", f"{END}, Blackbox", published="better fully-trained optimizers") for star in STARS),
    below(f"{END}, STAR wd 0.1", f"{END}, Hyperparam", published="better fully-trained optimizers"),
    *(_faster(star, "Blackbox") for star in STARS),
    Check(
        f"{GROWTH}, Blackbox > 1 with most seeds",
        (f"{GROWTH}, Blackbox",),
        lambda growth: statistics.median(growth) > 1,
        "diverges outside of the meta-training horizon",
    ),
    *(at_most(f"{GROWTH}, {star}", 1.0, published="remains stable") for star in STARS),
    *(at_most(f"{DIVERGED}, {star}", 0.0, published="remains stable") for star in STARS),
)
APP_1 = (
    *(_without_worst(star, "Blackbox") for star in STARS),
    Check(
        f"highest {GROWTH} of a seed: Blackbox > STAR wd 0.5",
        (f"{GROWTH}, Blackbox", f"{GROWTH}, STAR wd 0.5"),
        lambda a, b: max(a) > max(b),
        "seeds which perform poorly often perform very poorly",
    ),
)
APP_2 = (
    below(f"{GROWTH}, STAR wd 0.5", f"{GROWTH}, STAR wd 0", published="decay stabilizes outside of the horizon"),
    _over_damped(),
    below(f"{END}, STAR wd 0", f"{END}, STAR wd 0.1", factor=1.1, published="low decay does not harm meta-training"),
)
APP_3 = (below(f"{END}, STAR wd 0.1", f"{END}, No Pre.", published="better meta-losses with preconditioning"),)
APP_4 = (
    _faster("STAR wd 0.1", "No Nom."),
    below(f"{END}, STAR wd 0.1", f"{END}, No Nom.", published="without it, converges to worse solutions"),
)


class Part(NamedTuple):
    """What a figure of this kind shows."""

    figure: str
    statement: str
    variants: tuple[str, ...]
    checks: tuple[Check, ...]
    minutes: float
    quick_minutes: float


PARTS = {
    "fig3": Part(
        "Figure 3",
        "STAR meta-trains faster and to better optimizers than a blackbox and a hyperparameter controller, and stays "
        "stable far beyond its meta-training horizon, where the blackbox diverges.",
        MAIN,
        FIGURE_3,
        9,
        2,
    ),
    "app1": Part(
        "Figure App.1",
        "Seeds that do poorly often do very poorly; what Figure 3 shows holds if outliers are ignored.",
        MAIN,
        APP_1,
        9,
        2,
    ),
    "app2": Part(
        "Figure App.2",
        "Decays of 0.1 to 0.5 stabilize outside of the horizon without the over-damping that 1.0 brings; without decay "
        "meta-training itself is typically not harmed.",
        ("STAR wd 0", "STAR wd 0.1", "STAR wd 0.5", "STAR wd 1"),
        APP_2,
        8,
        2,
    ),
    "app3": Part(
        "Figure App.3",
        "Meta-losses are better with the preconditioner on the blackbox term than without.",
        ("STAR wd 0.1", "No Pre."),
        APP_3,
        5,
        1,
    ),
    "app4": Part(
        "Figure App.4",
        "Without the nominal term meta-training is slower and converges to worse solutions.",
        ("STAR wd 0.1", "No Nom."),
        APP_4,
        5,
        1,
    ),
}


def _claim(key: str, net: str) -> Claim:
    part, task = PARTS[key], TASKS[net]
    paper_task = {"mlp": "an MLP on Fashion-MNIST", "conv": "a conv net on CIFAR-10"}[net]
    times = {"mlp": 1, "conv": 3}[net]
    return Claim(
        id=f"star-{key}-{net}",
        source=f"{PAPER}, {part.figure}, {paper_task}",
        statement=part.statement,
        setup=SETUP.format(task=task, paper_task=paper_task),
        measure=lambda lab: measure(lab, part.variants, task),
        checks=part.checks,
        minutes=part.minutes * times,
        quick_minutes=part.quick_minutes * times,
        plot=plot_each if key == "app1" else plot,
    )


CLAIMS = tuple(_claim(key, net) for net in TASKS for key in PARTS)
