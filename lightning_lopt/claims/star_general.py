"""Generalization of rules meta-trained on one small MLP: the STAR paper's figures 4, App.5 and App.6."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_lopt.claims.claim import CONTROL, Check, Claim, Measurement, at_least, at_most, below, each_at_most, wins
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.learning_rate import at_rate
from lightning_lopt.claims.plots import Curve, draw_curves
from lightning_lopt.claims.star import (
    END,
    MAIN,
    MLP,
    PAPER,
    QUICK,
    RUNS,
    SETTINGS,
    STARS,
    START,
    inner_runs,
    mean_curve,
    train,
)
from lightning_lopt.evaluation.runs import Runs, run
from lightning_lopt.evaluation.tuning import BASELINES
from lightning_lopt.tasks import Task
from lightning_lopt.tasks import make as make_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ADAM = "tuned Adam"
BETTER = "better STAR"
RATIO = "log10 of better STAR / tuned Adam, a number per task"
STEPS = 500
QUICK_STEPS = 40


class Target(NamedTuple):
    """An unseen task."""

    label: str
    task: str
    options: Mapping[str, Any] = {}


FIGURE_4 = (
    Target("(a) MLP with LayerNorm", "digits-layernorm-mlp", {"hidden": (32, 32, 32)}),
    Target("(b) residual net", "digits-resnet"),
    Target("(c) LSTM language model", "shakespeare-small-lstm"),
    Target("(d) transformer language model", "shakespeare-small-transformer"),
)
APP_5_6 = (
    Target("logistic regression", "digits-logreg"),
    Target("wider MLP", "digits-mlp", {"hidden": (128,)}),
    Target("deep MLP", "digits-deep-mlp"),
    Target("tanh MLP", "digits-tanh-mlp"),
    Target("MLP with BatchNorm", "digits-batchnorm-mlp"),
    Target("MLP with dropout", "digits-dropout-mlp"),
    Target("squared error", "digits-mse-mlp"),
    Target("autoencoder", "digits-autoencoder"),
    Target("ES gradients", "digits-es"),
    Target("conv net", "digits-conv"),
)


def measure(experiment: Experiment, targets: Sequence[Target]) -> Measurement:
    """Measure final losses of all variants, a number per meta-seed, and of tuned Adam, a number per run."""
    steps = experiment.pick(STEPS, QUICK_STEPS)
    home = SETTINGS["mlp"]
    trained = train(experiment, MAIN, home)
    numbers: dict[str, list[float]] = {}
    curves: dict[str, Any] = {}
    for target in targets:
        task = make_task(target.task, **target.options)
        panel: dict[str, Any] = {}
        for name, (rule, rows) in trained.items():
            label = f"{target.label}, {name}"
            found = inner_runs(experiment, label, rule, [row.meta_params[-1] for row in rows], task, steps, 1)
            numbers[quantity(name, target)] = [runs.clamped("final")[0] / runs.scale for runs in found]
            panel[name] = {"steps": found[0].curve_steps, "seeds": [mean_curve(runs) for runs in found]}
        adam = _tuned_adam(experiment, target, task, steps)
        numbers[quantity(ADAM, target)] = [statistics.fmean(adam.clamped("final")) / adam.scale]
        panel[ADAM] = {"steps": adam.curve_steps, "seeds": [mean_curve(adam)]}
        better = min(STARS, key=lambda star, target=target: statistics.fmean(numbers[quantity(star, target)]))  # type: ignore[misc]
        numbers[quantity(BETTER, target)] = numbers[quantity(better, target)]
        curves[target.label] = panel
    ratios = [
        math.log10(statistics.fmean(numbers[quantity(BETTER, target)]) / numbers[quantity(ADAM, target)][0])
        for target in targets
    ]
    numbers[RATIO] = ratios
    rule, rows = trained["Blackbox"]
    scale = experiment.pick(home.scale, QUICK)
    ends = [meta_params for row in rows for meta_params in (row.meta_params[0], row.meta_params[-1])]
    found = inner_runs(experiment, "Blackbox at home", rule, ends, make_task(home.task), scale.horizon, RUNS)
    losses = [statistics.fmean(runs.clamped("mean")) for runs in found]
    numbers[f"{START}, Blackbox"], numbers[f"{END}, Blackbox"] = losses[::2], losses[1::2]
    return Measurement(numbers, {"curves": curves})


def quantity(name: str, target: Target) -> str:
    """Name of a variant's quantity on a task."""
    return f"{target.label}: final / initial loss, {name}"


def _tuned_adam(experiment: Experiment, target: Target, task: Task, steps: int) -> Runs:
    """Adam at the learning rate with the best final loss, from a half-decade grid."""
    rule = BASELINES["adam"].make()

    def compute() -> dict[str, Any]:
        report = experiment.reporter(f"{target.label}, tune Adam", steps)

        def run_settings(settings: list[dict[str, float]]) -> list[Runs]:
            population = [at_rate(rule, setting["lr"]) for setting in settings]
            return run(rule, population, task, steps=steps, seeds=1, on_step=report)

        return vars(BASELINES["adam"].search.search(run_settings).best["final"].runs)

    key = {"task": task.name, "options": repr(target.options), "size": task.num_params, "steps": steps}
    return Runs(**experiment.cached("tuned-adam", key, compute))


def plot(measured: Measurement) -> Figure:
    """Plot loss curves, a panel per task."""
    from matplotlib.figure import Figure

    found = measured.data["curves"]
    columns = 2 if len(found) <= 4 else 5
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.7 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (label, curves) in zip(panels, found.items(), strict=False):
        draw_curves(panel, [Curve(name, row["steps"], row["seeds"]) for name, row in curves.items()])
        panel.set_title(label, fontsize=9)
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    figure.supxlabel("optimizer steps", fontsize=11)
    figure.supylabel("training loss", fontsize=11)
    return figure


def _below_on(
    low: str, high: str, targets: Sequence[Target], *, least: float, most: float = 1.0, published: str, **options: Any
) -> Check:
    """`low` is below `high` on a fraction of the tasks from `least` to `most`."""
    pairs = [(quantity(low, target), quantity(high, target)) for target in targets]
    return wins(f"{low} below {high}", pairs, least=least, most=most, published=published, **options)


LEARNED = below(f"{END}, Blackbox", f"{START}, Blackbox", factor=0.9, kind=CONTROL)
"""The positive control: on its own task, meta-training improved the blackbox."""
_SETUP = (
    f"Rules meta-trained on {SETTINGS['mlp'].task} alone, {SETTINGS['mlp'].about}, on runs of "
    f"{SETTINGS['mlp'].scale.horizon} steps, as for star-fig3-mlp; runs of {STEPS} steps on {{tasks}} Losses are final "
    "over initial training loss, clamped to 0.001 to 2, a number per meta-seed; 'better STAR' takes the better of the "
    "two weight decays on each task, as the paper does. Adam's learning rate is tuned on a half-decade grid, for the "
    "final loss of one run."
)
CLAIMS = (
    Claim(
        id="star-fig4",
        source=f"{PAPER}, Figure 4",
        title="Figure 4's form, from an MLP of 2,410 parameters on digits to four small nets on digits and Shakespeare",
        statement="Meta-trained on one small MLP, STAR keeps descending on tasks it has never seen, comparably to "
        "tuned Adam; the blackbox diverges on all of them.",
        setup=_SETUP.format(tasks="four small stand-ins: digits for CIFAR-10 and ImageNet, tiny Shakespeare for LM1B."),
        in_paper=f"Meta-trained on {MLP}, 2,000 inner steps; an MLP with LayerNorm on CIFAR-10, a residual net on "
        "ImageNet of 32 x 32 pixels, an LSTM of 256 units and a transformer of 5 layers and 256 units on LM1B.",
        measure=partial(measure, targets=FIGURE_4),
        checks=(
            *(
                each_at_most(quantity(BETTER, target), 0.9, published="continue to descend on the loss")
                for target in FIGURE_4
            ),
            *(
                at_least(
                    quantity("Blackbox", target),
                    1.0,
                    published="in all cases, the blackbox optimizer diverges",
                    controls=(LEARNED,),
                )
                for target in FIGURE_4
            ),
            _below_on(BETTER, "Blackbox", FIGURE_4, least=1.0, published="nearly uniformly"),
            at_most(RATIO, round(math.log10(1.1), 4), published="comparable to a hyperparameter-tuned Adam"),
        ),
        minutes=20,
        quick_minutes=0.8,
        needs=("tinyshakespeare",),
        plot=plot,
    ),
    Claim(
        id="star-app5",
        source=f"{PAPER}, Figures App.5 and App.6",
        title="Figures App.5 and App.6's form, from an MLP of 2,410 parameters to ten small nets on digits",
        statement="On a wide variety of unseen tasks the blackbox is unstable in almost all cases compared to "
        "Hyperparam or STAR; results between these two are mixed.",
        setup=_SETUP.format(tasks="ten tasks on digits, without NAdamW, about which the text claims nothing."),
        in_paper=f"Meta-trained on {MLP}, 2,000 inner steps; sixteen tasks of learned_optimization; Adam's learning "
        "rate tuned in half-decades, NAdamW by 1,000 random trials a task.",
        measure=partial(measure, targets=APP_5_6),
        checks=(
            _below_on("Hyperparam", "Blackbox", APP_5_6, least=0.8, published="almost all", controls=(LEARNED,)),
            _below_on(BETTER, "Blackbox", APP_5_6, least=0.8, published="almost all", controls=(LEARNED,)),
            _below_on(BETTER, "Hyperparam", APP_5_6, least=0.2, most=0.8, published="mixed"),
        ),
        minutes=20,
        quick_minutes=0.8,
        plot=plot,
    ),
)
