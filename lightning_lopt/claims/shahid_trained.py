"""What Shahid's thesis says of rules that this package does not ship: figures 3.7, 3.9a, 4.7 and 4.12.

Each claim meta-trains its own, from fresh weights and for much shorter than the thesis: what is compared are several
rules that were trained alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lightning_lopt.claims import multiscale
from lightning_lopt.claims.annealed import Annealed
from lightning_lopt.claims.base import Claim, Measured, at_least, below
from lightning_lopt.claims.curves import SETTING, best_of, curves, data, draw, learned, means, with_options
from lightning_lopt.claims.history import EPOCH, RATE, THESIS
from lightning_lopt.claims.lab import Lab
from lightning_lopt.claims.training import trained
from lightning_lopt.meta.estimators import OneStep, TruncatedBackprop
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.rules import UpdateRule, make
from lightning_lopt.tasks import make as make_task

# --- Figures 3.7 and 3.9a: histories of several lengths ---

_ONE_STEP = OneStep(num_runs=4, horizon=Horizon(200, 2000), early=Horizon(50, 200), num_early=300)
_SMALL = ("mnist-mlp", {"image_size": 8})
TIMESTEPS = (5, 10, 100)
ETAS = (1e-4, 1e-3, 1e-2, 5e-2)
RANGES = ((6, 0.2), (10, 0.2), (6, 0.5), (10, 0.5))  # timescales, and the shortest; the longest is .99


def _history(lab: Lab, rule: UpdateRule, steps: int) -> UpdateRule:
    name, options = _SMALL
    arguments: dict[str, Any] = {"lr_factors": {}, "second_order": False, "lr": 1e-3}
    label = f"meta-train {rule.kind} k={rule.config.to_dict()['k']}"
    return trained(lab, label, rule, [make_task(name, **options)], _ONE_STEP, lab.pick(steps, 5), **arguments)


def _sizes(lab: Lab) -> Measured:
    rules: dict[str, tuple[UpdateRule, SETTING]] = {}
    for k in TIMESTEPS:
        rule = _history(lab, make("k_timesteps", k=k, eta_min=1e-3), 1000)
        for eta in ETAS:
            rules |= learned(f"k={k}, eta_min {eta:g}", with_options(rule, eta_min=eta))
    found = curves(lab, rules, "mnist-mlp", lab.pick(EPOCH, 20))
    numbers = means(found, "last loss", last=50)
    for k in TIMESTEPS:
        numbers[f"best last loss of k={k}"] = numbers[best_of(_only(numbers, f"k={k},"))]
    best = [best_of(_only(numbers, f"of k={k}, ")).removeprefix("last loss of ") for k in TIMESTEPS]
    shown = {name: found[name] for name in found if name.endswith(" 0.0001") or name in best}
    return Measured(numbers, data(shown))


def _ranges(lab: Lab) -> Measured:
    rules: dict[str, tuple[UpdateRule, SETTING]] = {}
    for k, low in RANGES:
        timescales = tuple(torch.linspace(low, 0.99, k, dtype=torch.float64).tolist())
        rule = _history(lab, make("k_momentums", k=k, timescales=timescales, eta_min=1e-3), 2000)
        annealed = Annealed(with_options(rule, eta_min=1e-2), "constant")
        rates = {"lr": torch.tensor(RATE, dtype=torch.float64)}
        rules[f"k={k} from {low:g}"] = annealed, {**annealed.meta_params(), **rates}
    found = curves(lab, rules, "mnist-mlp", lab.pick(2 * EPOCH, 20))
    return Measured(means(found, "last loss", last=50), data(found))


def _only(numbers: Mapping[str, Sequence[float]], part: str) -> dict[str, Sequence[float]]:
    return {name: row for name, row in numbers.items() if part in name}


# --- Figures 4.7 and 4.12: Multiscale Adam with one and with two hidden layers ---


def _unrolled(runs: int, truncation: int) -> TruncatedBackprop:
    return TruncatedBackprop(num_runs=runs, truncation=truncation, horizon=Horizon(100, 2000))


def _heat(lab: Lab) -> Measured:
    ranges = ((3.0, 10.0), (0.4, 2.0), (5e-3, 0.1))
    tasks = [make_task("mnist-mlp-rescaled", hidden=(8,), scale_range=scales) for scales in ranges]
    rule = make("multiscale_adam", mixer="rnn1")
    options: dict[str, Any] = {"lr_factors": {}, "lr": 1e-2, "normalize": True}
    rule = trained(lab, "meta-train rnn1", rule, tasks, _unrolled(2, 20), lab.pick(60, 1), **options)
    return multiscale.heat(lab, {"RNN-1": with_options(rule, eta=1.0)})


def _cifar(lab: Lab) -> Measured:
    task, rules = make_task("cifar-convnet-1", channels=(8, 8), hidden=(24, 12)), {}
    for layers in (1, 2):
        rule = make("multiscale_adam", mixer=f"rnn{layers}", eta=5e-4)
        options: dict[str, Any] = {"lr_factors": {}, "lr": 1e-2}
        rule = trained(lab, f"meta-train rnn{layers}", rule, [task], _unrolled(1, 10), lab.pick(60, 1), **options)
        rules[f"RNN-{layers}"] = with_options(rule, eta=1.0)
    return multiscale.transfer(lab, rules, "cifar-convnet-1", "0.0005")


CLAIMS = (
    Claim(
        id="history-sizes",
        source=f"{THESIS}, figure 3.7",
        statement="Of k Timesteps the longest history is the worst with eta_min 1e-4, and the best once that is tuned.",
        setup=f"k = 5, 10 and 100, each meta-trained for 1,000 one-step estimates of four runs on images of 8 x 8 "
        f"pixels (thesis: 200,000 of one on 28 x 28); MlpMnist, {EPOCH} steps (1 epoch; thesis: 50), eta_min of "
        f"{', '.join(f'{eta:g}' for eta in ETAS)}; training loss of the last 50 steps.",
        measure=_sizes,
        checks=(
            *(below(f"last loss of k={k}, eta_min 0.0001", "last loss of k=100, eta_min 0.0001") for k in (5, 10)),
            below("best last loss of k=10", "best last loss of k=5"),
            below("best last loss of k=100", "best last loss of k=10"),
        ),
        minutes=6.0,
        quick_minutes=0.5,
        seeds=2,
        quick_seeds=1,
        needs=("mnist",),
        plot=partial(draw, "MlpMnist: eta_min 1e-4, and each at its best"),
    ),
    Claim(
        id="history-ranges",
        source=f"{THESIS}, figure 3.9a",
        statement="k Momentums loses without the timescales below .5, and gains little by ten in place of six.",
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
        statement="Over the ten schedules the RNN with one hidden layer is best in six, among the first in the others.",
        setup="Meta-trained for 60 steps of two runs in each of three ranges of learning rates, through 20 unrolled "
        "steps, on MlpMnist with 8 hidden units (thesis: 50,000 steps with 20 units for each schedule); else as "
        "multiscale-heat.",
        measure=_heat,
        checks=(
            at_least("schedules where RNN-1 is best", 6, published="6"),
            at_least("schedules where RNN-1 is best or second", 8, published="among the top ones for the rest"),
        ),
        minutes=10.0,
        quick_minutes=1.0,
        needs=("mnist",),
        plot=multiscale.draw_heat,
    ),
    Claim(
        id="multiscale-cifar",
        source=f"{THESIS}, figure 4.12",
        statement="Meta-trained on a small ConvCifar two layers beat one on a larger, and neither beats the best Adam.",
        setup="Meta-trained for 60 steps of one run through 10 unrolled steps at learning rate 5e-4 on a net a quarter "
        "as wide as ConvCifar 1 (thesis: ConvCifar 1); run on ConvCifar 1 (thesis: 0), 60 steps of 128; mean loss of "
        "the last ten.",
        measure=_cifar,
        checks=(
            below("last loss of RNN-2", "last loss of RNN-1"),
            *(below("best last loss of one Adam", f"last loss of RNN-{layers}") for layers in (1, 2)),
        ),
        minutes=5.0,
        quick_minutes=0.5,
        seeds=2,
        quick_seeds=1,
        needs=("cifar10",),
        plot=partial(draw, "ConvCifar 1, learning rate 0.0005"),
    ),
)
