"""Shahid's thesis on rules that are not bundled: figures 3.7, 3.9a, 4.7 and 4.12.

Each claim meta-trains its rules from fresh weights, for a much shorter time than the thesis, and compares rules that
were trained alike.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lightning_lopt.claims import multiscale
from lightning_lopt.claims.claim import CONTROL, Check, Claim, Measurement, at_least, below
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.history import EPOCH, RATE, THESIS
from lightning_lopt.claims.learning_rate import WithLearningRate, at_rate
from lightning_lopt.claims.loss_curves import Candidate, best_of, curves, draw, means, plot_data, with_options
from lightning_lopt.claims.training import train_rule
from lightning_lopt.meta.estimators import OneStep, TruncatedBackprop
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.rules import UpdateRule, make
from lightning_lopt.tasks import make as make_task

# --- Figures 3.7 and 3.9a: histories of several lengths ---

_ONE_STEP = OneStep(num_runs=4, horizon=Horizon(200, 2000), early=Horizon(50, 200), num_early=300)
TIMESTEPS = (5, 10, 100)
ETAS = (1e-4, 1e-3, 1e-2, 5e-2)
RANGES = ((6, 0.2), (10, 0.2), (6, 0.5), (10, 0.5))  # number of timescales and the shortest; the longest is .99


def _history(experiment: Experiment, rule: UpdateRule, steps: int) -> UpdateRule:
    task = make_task("mnist-mlp", image_size=8)
    options: dict[str, Any] = {"lr_factors": {}, "second_order": False, "lr": 1e-3}
    label = f"meta-train {rule.kind} k={rule.config.to_dict()['k']}"
    return train_rule(experiment, label, rule, [task], _ONE_STEP, experiment.pick(steps, 5), **options)


def _sizes(experiment: Experiment) -> Measurement:
    rules: dict[str, Candidate] = {}
    for k in TIMESTEPS:
        rule = _history(experiment, make("k_timesteps", k=k, eta_min=1e-3), 1000)
        for eta in ETAS:
            rules[f"k={k}, eta_min {eta:g}"] = with_options(rule, eta_min=eta)
    found = curves(experiment, rules, "mnist-mlp", experiment.pick(EPOCH, 20))
    numbers = means(found, "last loss", last=50)
    best = []
    for k in TIMESTEPS:
        name = best_of(numbers, f"of k={k},")
        numbers[f"best last loss of k={k}"] = numbers[name]
        best.append(name.removeprefix("last loss of "))
    shown = {name: found[name] for name in found if name.endswith(" 0.0001") or name in best}
    return Measurement(numbers, plot_data(shown))


def _ranges(experiment: Experiment) -> Measurement:
    rules: dict[str, Candidate] = {}
    for k, low in RANGES:
        timescales = tuple(torch.linspace(low, 0.99, k, dtype=torch.float64).tolist())
        rule = _history(experiment, make("k_momentums", k=k, timescales=timescales, eta_min=1e-3), 2000)
        scaled = WithLearningRate(with_options(rule, eta_min=1e-2), "constant")
        rules[f"k={k} from {low:g}"] = scaled, at_rate(scaled, RATE)
    found = curves(experiment, rules, "mnist-mlp", experiment.pick(2 * EPOCH, 20))
    return Measurement(means(found, "last loss", last=50), plot_data(found))


# --- Figures 4.7 and 4.12: Multiscale Adam with one and with two hidden layers ---


def _unrolled(runs: int, truncation: int) -> TruncatedBackprop:
    return TruncatedBackprop(num_runs=runs, truncation=truncation, horizon=Horizon(100, 2000))


def _heat(experiment: Experiment) -> Measurement:
    ranges = ((3.0, 10.0), (0.4, 2.0), (5e-3, 0.1))
    tasks = [make_task("mnist-mlp-rescaled", hidden=(8,), scale_range=scales) for scales in ranges]
    rule = make("multiscale_adam", mixer="rnn1")
    options: dict[str, Any] = {"lr_factors": {}, "lr": 1e-2, "normalize": True}
    estimator = _unrolled(runs=2, truncation=20)
    rule = train_rule(experiment, "meta-train rnn1", rule, tasks, estimator, experiment.pick(60, 1), **options)
    return multiscale.heat_map(experiment, {"RNN-1": with_options(rule, eta=1.0)})


def _cifar(experiment: Experiment) -> Measurement:
    task = make_task("cifar-convnet-1", channels=(8, 8), hidden=(24, 12))
    num_steps = experiment.pick(60, 1)
    rules = {}
    for layers in (1, 2):
        rule = make("multiscale_adam", mixer=f"rnn{layers}", eta=5e-4)
        torch.manual_seed(0)
        rules[f"untrained RNN-{layers}"] = make("multiscale_adam", mixer=f"rnn{layers}", eta=1.0)
        options: dict[str, Any] = {"lr_factors": {}, "lr": 1e-2}
        estimator = _unrolled(runs=1, truncation=10)
        rule = train_rule(experiment, f"meta-train rnn{layers}", rule, [task], estimator, num_steps, **options)
        rules[f"RNN-{layers}"] = with_options(rule, eta=1.0)
    return multiscale.transfer(experiment, rules, "cifar-convnet-1", "0.0005")


def _trained(layers: int) -> Check:
    """The positive control: meta-training improved the rule."""
    return below(f"last loss of RNN-{layers}", f"last loss of untrained RNN-{layers}", kind=CONTROL)


CLAIMS = (
    Claim(
        id="history-sizes",
        source=f"{THESIS}, figure 3.7",
        title=f"figure 3.7's form with {EPOCH} steps (1 epoch of the thesis's 50), briefly meta-trained",
        in_paper="Each k meta-trained for 200,000 steps on 28 x 28, 50 epochs.",
        statement="The longest history of k Timesteps is the worst at eta_min 1e-4, and the best with eta_min tuned.",
        setup=f"k = 5, 10 and 100, each meta-trained for 1,000 one-step estimates of four runs on images of 8 x 8 "
        f"pixels (thesis: 200,000 of one on 28 x 28); MlpMnist, {EPOCH} steps (1 epoch; thesis: 50), eta_min of "
        f"{', '.join(f'{eta:g}' for eta in ETAS)}; training loss of the last 50 steps.",
        measure=_sizes,
        checks=(
            *(below(f"last loss of k={k}, eta_min 0.0001", "last loss of k=100, eta_min 0.0001") for k in (5, 10)),
            below("best last loss of k=10", "best last loss of k=5"),
            below("best last loss of k=100", "best last loss of k=10"),
        ),
        minutes=9.0,
        quick_minutes=0.5,
        needs=("mnist",),
        plot=partial(draw, "MlpMnist: at eta_min 1e-4, and each at its best"),
    ),
    Claim(
        id="history-ranges",
        source=f"{THESIS}, figure 3.9a",
        title=f"figure 3.9a's form with {2 * EPOCH} steps (2 epochs of the thesis's 50), briefly meta-trained",
        in_paper="Meta-trained on 28 x 28, 50 epochs.",
        statement="k Momentums loses without the timescales below .5, and gains little from ten instead of six.",
        setup="Timescales from .2 or .5 to .99, each rule meta-trained for 2,000 one-step estimates of four runs on "
        f"images of 8 x 8 pixels (thesis: 28 x 28) with eta_min 1e-3; MlpMnist with eta_min 1e-2, learning rate "
        f"{RATE:g}, {2 * EPOCH} steps (2 epochs; thesis: 50); training loss of the last 50 steps.",
        measure=_ranges,
        checks=(
            *(below(f"last loss of k={k} from 0.2", f"last loss of k={k} from 0.5") for k in (6, 10)),
            below("last loss of k=6 from 0.2", "last loss of k=10 from 0.2", factor=1.1, published="no great impact"),
            below("last loss of k=10 from 0.2", "last loss of k=6 from 0.2", factor=1.1, published="no great impact"),
        ),
        minutes=5.0,
        quick_minutes=0.3,
        needs=("mnist",),
        plot=partial(draw, "k Momentums on MlpMnist"),
    ),
    Claim(
        id="multiscale-heat-rnn1",
        source=f"{THESIS}, figure 4.7",
        title="figure 4.7's form with one briefly trained set of weights, 3 epochs of the thesis's 50",
        in_paper="One RNN of 20 units meta-trained for 50,000 steps for each schedule, 50 epochs.",
        statement="Over the ten schedules the RNN with one hidden layer is best in six, among the best in the others.",
        setup="Meta-trained for 60 steps of two runs in each of three ranges of learning rates, through 20 unrolled "
        "steps, on MlpMnist with 8 hidden units (thesis: 50,000 steps with 20 units for each schedule); otherwise as "
        "multiscale-heat.",
        measure=_heat,
        checks=(
            at_least("schedules where RNN-1 is best", 6, exact=True, published="6"),
            at_least(
                "schedules where RNN-1 is best or second", 8, exact=True, published="among the top ones for the rest"
            ),
        ),
        minutes=10.0,
        quick_minutes=1.0,
        needs=("mnist",),
        plot=multiscale.draw_heat_map,
    ),
    Claim(
        id="multiscale-cifar",
        source=f"{THESIS}, figure 4.12",
        title="figure 4.12's form: meta-trained on a quarter of ConvCifar 1, run on ConvCifar 1 for 60 steps",
        in_paper="Meta-trained on ConvCifar 1, run on ConvCifar 0 for 500 epochs.",
        statement="Meta-trained on a small ConvCifar, two layers beat one on a larger; neither beats the best Adam.",
        setup="Meta-trained for 60 steps of one run through 10 unrolled steps at learning rate 5e-4 on a net a quarter "
        "as wide as ConvCifar 1 (thesis: ConvCifar 1); run on ConvCifar 1 (thesis: 0), 60 steps of 128; mean loss of "
        "the last ten.",
        measure=_cifar,
        checks=(
            below("last loss of RNN-2", "last loss of RNN-1"),
            *(
                below(
                    "best last loss of one Adam",
                    f"last loss of RNN-{layers}",
                    published="fails to achieve the level of the top Adam",
                    controls=(_trained(layers),),
                )
                for layers in (1, 2)
            ),
        ),
        minutes=9.0,
        quick_minutes=0.5,
        needs=("cifar10",),
        plot=partial(draw, "ConvCifar 1, learning rate 0.0005"),
    ),
)
