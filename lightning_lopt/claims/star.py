"""STAR (Harrison, Metz, Sohl-Dickstein 2022, arXiv 2209.11208), figures 3 and App.1 to App.4.

The paper shows curves without numbers, so the checks come from its text. Its experiments take a GPU for days; here all
is smaller: images of 8 x 8 pixels, inner runs of 200 steps (on Fashion-MNIST of the paper's 2,000), and a larger
meta-learning rate, since meta-training takes only hundreds or thousands of steps. Architecture, betas, initial weights,
truncation, perturbation, clipping, objective (mean training loss) and weight decays are the paper's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from lightning_lopt.claims.claim import CONTROL, Check, Claim, Measurement, at_least, below, each_at_most
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.plots import Curve, draw_curves
from lightning_lopt.claims.training import Checkpoints, meta_train, reset_compiler
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
LONGER = 50
"""The paper applies its rules for almost two orders of magnitude more steps than in meta-training."""
RUNS = 4


class Variant(NamedTuple):
    """A rule, and the weight decay of its meta-training."""

    config: dict[str, Any]
    weight_decay: float = 0.0


VARIANTS = {
    "STAR wd 0.1": Variant({"kind": "star"}, 0.1),
    "STAR wd 0.5": Variant({"kind": "star"}, 0.5),
    "Blackbox": Variant({"kind": "blackbox"}),
    "Hyperparam": Variant({"kind": "hyperparam"}),
    "STAR wd 0": Variant({"kind": "star"}),
    "STAR wd 1": Variant({"kind": "star"}, 1.0),
    "No Pre.": Variant({"kind": "star", "normalize_blackbox": False}, 0.1),
    "No Nom.": Variant({"kind": "star", "nominal_stepsize": 0.0, "nominal_controller": False}, 0.1),
}
MAIN = ("STAR wd 0.1", "STAR wd 0.5", "Blackbox", "Hyperparam")
START = "meta-loss before meta-training"
END = "final meta-loss"
WITHOUT_WORST = "final meta-loss without the worst seed"
WORST = "final meta-loss of the worst seed / of the median one"
MEAN = "meta-loss averaged over meta-training"
GROWTH = f"log10 of the loss at {LONGER}x / at 1x horizon"
DIVERGED = f"share of runs diverged at {LONGER}x"


class Scale(NamedTuple):
    """The size of a measurement."""

    horizon: int = 200
    num_steps: int = 300
    every: int = 50
    pairs: int = 8
    truncation: int = 50
    lr: float = 3e-3


class Setting(NamedTuple):
    """A task in place of one of the paper's, and the scale of its measurement."""

    task: str
    about: str
    paper_task: str
    scale: Scale = Scale()


MLP = "an MLP 784-128-128-10 (118,282 parameters) on Fashion-MNIST"
SETTINGS = {
    "mlp": Setting("digits-mlp", "an MLP 64-32-10 (2,410 parameters) on digits of 8 x 8 pixels", MLP),
    "conv": Setting("digits-conv", "a small conv net (1,418 parameters) on digits", "a conv net 32-64-64 on CIFAR-10"),
    "fashion": Setting(
        "fashion8-mlp",
        "an MLP 64-32-10 (2,410 parameters) on Fashion-MNIST of 8 x 8 pixels",
        MLP,
        Scale(horizon=2000, num_steps=3000, every=250, lr=1e-3),
    ),
}
QUICK = Scale(horizon=10, num_steps=10, every=5, pairs=2, truncation=5)


def setup_text(setting: Setting) -> str:
    """How the figures are measured with this setting."""
    scale = setting.scale
    return (
        f"{setting.task}, {setting.about}; inner runs of {scale.horizon:,} steps, and of {LONGER} times that; "
        f"{scale.num_steps:,} meta-steps of PES with {scale.pairs} pairs, truncation {scale.truncation}, std 0.01, "
        f"AdamW with lr {scale.lr:g}, clipping at norm 1, raw mean training loss; seeds are meta-seeds. A meta-loss is "
        f"the mean training loss over inner runs of the unperturbed rule: {RUNS} runs, each clamped to twice the "
        "initial loss."
    )


def train(
    experiment: Experiment, names: Sequence[str], setting: Setting
) -> dict[str, tuple[UpdateRule, list[Checkpoints]]]:
    """Meta-train variants: name -> the rule, with arbitrary meta-parameters, and the checkpoints of each seed."""
    scale = experiment.pick(setting.scale, QUICK)
    task = make_task(setting.task)
    trained = {}
    rules: dict[str, UpdateRule] = {}
    estimator = PES(
        num_pairs=scale.pairs, truncation=scale.truncation, std=0.01, horizon=Horizon(scale.horizon), stagger=True
    )
    for name in sorted(names, key=lambda name: str(VARIANTS[name].config)):  # a rule's variants in a row
        config, weight_decay = VARIANTS[name]
        if str(config) not in rules:
            reset_compiler()
            rules[str(config)] = make(**config)
        rule = rules[str(config)]
        rows = [
            meta_train(
                experiment,
                f"meta-train {name} seed {seed}",
                rule,
                [task],
                estimator,
                num_steps=scale.num_steps,
                every=scale.every,
                seed=seed,
                objective="raw",
                tell_horizon=False,
                lr=scale.lr,
                lr_factors={},
                weight_decay=weight_decay,
                schedule="constant",
            )
            for seed in experiment.seeds
        ]
        trained[name] = rule, rows
    return {name: trained[name] for name in names}


def inner_runs(
    experiment: Experiment,
    label: str,
    rule: UpdateRule,
    settings: Sequence[dict[str, Tensor]],
    task: Task,
    steps: int,
    runs: int,
) -> list[Runs]:
    """Run the rule with several sets of meta-parameters side by side."""
    fingerprints = []
    for meta_params in settings:
        rule.load_state_dict(meta_params)
        fingerprints.append(fingerprint(rule))
    key = {"rules": fingerprints, "task": task.name, "size": task.num_params, "steps": steps, "runs": runs}

    def compute() -> dict[str, Any]:
        report = experiment.reporter(label, steps)
        found = run(rule, settings, task, steps=steps, seeds=runs, tell_length=False, on_step=report)
        return {"runs": [vars(item) for item in found]}

    return [Runs(**row) for row in experiment.cached("inner-runs", key, compute)["runs"]]


def measure(experiment: Experiment, names: Sequence[str], net: str) -> Measurement:
    """Measure meta-training curves, and inner runs of the final rules far beyond the horizon, in one of `SETTINGS`."""
    setting = SETTINGS[net]
    task = make_task(setting.task)
    scale = experiment.pick(setting.scale, QUICK)
    runs = experiment.pick(RUNS, 2)
    numbers: dict[str, list[float]] = {}
    meta_curves = {}
    inner_curves = {}
    for name, (rule, trained) in train(experiment, names, setting).items():
        stages = [meta_params for row in trained for meta_params in row.meta_params]
        short = inner_runs(experiment, f"meta-loss of {name}", rule, stages, task, scale.horizon, runs)
        losses = [statistics.fmean(each.clamped("mean")) for each in short]
        count = len(trained[0].steps)
        rows = [losses[i : i + count] for i in range(0, len(losses), count)]
        last = [row.meta_params[-1] for row in trained]
        long = inner_runs(experiment, f"{LONGER}x {name}", rule, last, task, LONGER * scale.horizon, runs)
        ends = [row[-1] for row in rows]
        numbers[f"{START}, {name}"] = [row[0] for row in rows]
        numbers[f"{END}, {name}"] = ends
        numbers[f"{WITHOUT_WORST}, {name}"] = sorted(ends)[:-1] or ends
        numbers[f"{WORST}, {name}"] = [max(ends) / statistics.median(ends)]
        numbers[f"{MEAN}, {name}"] = [statistics.fmean(row) for row in rows]
        numbers[f"{GROWTH}, {name}"] = [_growth(each) for each in long]
        numbers[f"{DIVERGED}, {name}"] = [statistics.fmean(each.diverged) for each in long]
        meta_curves[name] = {"steps": trained[0].steps, "seeds": rows}
        inner_curves[name] = {"steps": long[0].curve_steps, "seeds": [mean_curve(each) for each in long]}
    return Measurement(numbers, {"meta": meta_curves, "inner": inner_curves, "horizon": scale.horizon})


def _growth(runs: Runs) -> float:
    """The final loss over the loss at the end of the first fiftieth, both as means over runs: the decimal logarithm."""
    at_horizon = [curve[len(curve) // LONGER - 1] for curve in runs.curve]
    return math.log10(statistics.fmean(runs.clamped("final")) / statistics.fmean(map(runs.clamp, at_horizon)))


def mean_curve(runs: Runs) -> list[float]:
    """The mean over runs of the clamped loss curves."""
    return [statistics.fmean(map(runs.clamp, point)) for point in zip(*runs.curve, strict=True)]


def plot(measured: Measurement, *, each: bool = False) -> Figure:
    """Plot meta-training curves above and inner runs below, as in the paper's figures."""
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


def _faster(ours: str, theirs: str) -> Check:
    return below(f"{MEAN}, {ours}", f"{MEAN}, {theirs}", published="trains faster")


def _learned(name: str) -> Check:
    """The positive control of findings that a rule fails: meta-training improved it on its own task and horizon."""
    return below(f"{END}, {name}", f"{START}, {name}", factor=0.9, kind=CONTROL)


STARS = ("STAR wd 0.1", "STAR wd 0.5")
FIGURE_3 = (
    *(below(f"{END}, {star}", f"{END}, Blackbox", published="better fully-trained optimizers") for star in STARS),
    *(below(f"{END}, {star}", f"{END}, Hyperparam", published="better fully-trained optimizers") for star in STARS),
    *(_faster(star, theirs) for star in STARS for theirs in ("Blackbox", "Hyperparam")),
    at_least(
        f"{GROWTH}, Blackbox",
        0.0,
        published="diverges outside of the meta-training horizon",
        controls=(_learned("Blackbox"),),
    ),
    *(each_at_most(f"{GROWTH}, {star}", 0.0, published="remains stable") for star in STARS),
    *(each_at_most(f"{DIVERGED}, {star}", 0.0, published="remains stable") for star in STARS),
)
APP_1 = (
    *(
        below(
            f"{WITHOUT_WORST}, {star}",
            f"{WITHOUT_WORST}, Blackbox",
            paired=False,
            published="holds even if outliers are ignored",
        )
        for star in STARS
    ),
    at_least(
        f"{WORST}, Blackbox",
        2.0,
        exact=True,
        published="seeds which perform poorly often perform very poorly",
        controls=(_learned("Blackbox"),),
    ),
)
APP_2 = (
    *(
        below(f"{GROWTH}, {star}", f"{GROWTH}, STAR wd 0", published="decay stabilizes outside of the horizon")
        for star in STARS
    ),
    below(f"{END}, STAR wd 0.1", f"{END}, STAR wd 1", published="decay 1.0 over-damps"),
    below(f"{END}, STAR wd 0", f"{END}, STAR wd 0.1", factor=1.1, published="low decay does not harm meta-training"),
)
APP_3 = (below(f"{END}, STAR wd 0.1", f"{END}, No Pre.", published="better meta-losses with preconditioning"),)
APP_4 = (
    _faster("STAR wd 0.1", "No Nom."),
    below(f"{END}, STAR wd 0.1", f"{END}, No Nom.", published="without it, converges to worse solutions"),
)


class PaperFigure(NamedTuple):
    """A figure of the paper that compares meta-trained variants."""

    name: str
    statement: str
    variants: tuple[str, ...]
    checks: tuple[Check, ...]
    minutes: float
    quick_minutes: float


FIGURES = {
    "fig3": PaperFigure(
        name="Figure 3",
        statement="STAR meta-trains faster and to better optimizers than a blackbox and a hyperparameter controller, "
        "and stays stable far beyond its meta-training horizon, where the blackbox diverges.",
        variants=MAIN,
        checks=FIGURE_3,
        minutes=9,
        quick_minutes=0.2,
    ),
    "app1": PaperFigure(
        name="Figure App.1",
        statement="Seeds that do poorly often do very poorly; apart from such outliers the results of Figure 3 hold.",
        variants=MAIN,
        checks=APP_1,
        minutes=9,
        quick_minutes=0.2,
    ),
    "app2": PaperFigure(
        name="Figure App.2",
        statement="Weight decays of 0.1 to 0.5 stabilize runs beyond the horizon without the over-damping of 1.0; "
        "meta-training itself is typically not harmed without any.",
        variants=("STAR wd 0", "STAR wd 0.1", "STAR wd 0.5", "STAR wd 1"),
        checks=APP_2,
        minutes=8,
        quick_minutes=0.2,
    ),
    "app3": PaperFigure(
        name="Figure App.3",
        statement="Meta-losses are better with a preconditioned blackbox term than without.",
        variants=("STAR wd 0.1", "No Pre."),
        checks=APP_3,
        minutes=5,
        quick_minutes=0.2,
    ),
    "app4": PaperFigure(
        name="Figure App.4",
        statement="Without the nominal term meta-training is slower and converges to worse solutions.",
        variants=("STAR wd 0.1", "No Nom."),
        checks=APP_4,
        minutes=5,
        quick_minutes=0.2,
    ),
}


SECONDS_OF = {"mlp": 1.0, "conv": 3.0, "fashion": 12.0}
"""How much longer each net takes than the first, by the full scale."""


def _claim(key: str, net: str) -> Claim:
    figure = FIGURES[key]
    setting = SETTINGS[net]
    return Claim(
        id=f"star-{key}-{net}",
        source=f"{PAPER}, {figure.name}",
        title=f"{figure.name}'s form with {setting.about}, {setting.scale.horizon:,} inner steps",
        statement=figure.statement,
        setup=setup_text(setting),
        in_paper=f"{setting.paper_task}; inner runs of 2,000 steps, shown for almost two orders of magnitude more; PES "
        "with truncation 50 and std 0.01, AdamW with lr 1e-4, tens of thousands of meta-steps; the number of seeds is "
        "not stated.",
        measure=partial(measure, names=figure.variants, net=net),
        checks=figure.checks,
        minutes=figure.minutes * SECONDS_OF[net],
        quick_minutes=figure.quick_minutes * (3 if net == "conv" else 1),
        plot=partial(plot, each=True) if key == "app1" else plot,
        needs=("fashion_mnist",) if net == "fashion" else (),
    )


CLAIMS = tuple(_claim(key, net) for net in SETTINGS for key in FIGURES)
