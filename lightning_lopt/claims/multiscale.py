"""The evidence of chapter 4 of Shahid's thesis: Multiscale Adam (tables 4.2 and 4.3, figures 4.2 to 4.15).

The weights are those that this package ships, but for the linear mixers of tables 4.2 and 4.3, which are meta-trained
here. Runs are of few epochs, where the thesis has 50 on MNIST and 500 on CIFAR-10.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_lopt.claims.annealed import Annealed
from lightning_lopt.claims.base import Check, Claim, Measured, at_least, below
from lightning_lopt.claims.curves import (
    adams,
    best_of,
    curves,
    data,
    draw,
    learned,
    losses,
    means,
    with_options,
)
from lightning_lopt.claims.history import EPOCH, THESIS
from lightning_lopt.claims.lab import Lab
from lightning_lopt.claims.training import trained
from lightning_lopt.evaluation.baselines import Adam, BaselineConfig
from lightning_lopt.evaluation.compare import fingerprint
from lightning_lopt.hub import load_rule
from lightning_lopt.meta.estimators import OneStep
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.rules import UpdateRule, make
from lightning_lopt.rules.multiscale_adam import BETAS, linear_weights
from lightning_lopt.tasks import make as make_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONSTANT = (1e-1, 5e-2, 1e-2, 5e-3, 1e-3, 5e-4, 1e-4, 5e-5)
COSINE = (5e-2, 1e-2)
SCHEDULES = {f"{eta:g}": (eta, "constant") for eta in CONSTANT} | {f"{eta:g} to 0": (eta, "cosine") for eta in COSINE}


def _singles(rate: float, k: int = 6) -> dict[str, Any]:
    """The Adams alone."""
    settings = {f"Adam {beta1:g}": {"lr": rate, "beta1": beta1, "beta2": beta2} for beta1, beta2 in BETAS[k]}
    return adams(settings)


def single(number: int) -> UpdateRule:
    """One of the six Adams, with eta 1: LA_b of one weight."""
    rule = make("multiscale_adam", mixer="la_b", eta=1.0)
    rule.load_state_dict({"weights": torch.eye(len(BETAS[6]))[number]})
    return rule


# --- Tables 4.2 and 4.3, figures 4.2 to 4.4 ---

_ONE_STEP = OneStep(num_runs=8, horizon=Horizon(1000, 20000))


def linear(lab: Lab, mixer: str, k: int, seed: int) -> UpdateRule:
    """A linear mixer, meta-trained as the bundled multiscale-adam-linear."""
    rule, task = make("multiscale_adam", mixer=mixer, k=k), make_task("mnist-mlp", image_size=8, grayscale=True)
    options: dict[str, Any] = {"lr_factors": {}, "seed": seed, "second_order": False, "lr": 2e-3}
    return trained(lab, f"meta-train {mixer} k={k} seed {seed}", rule, [task], _ONE_STEP, lab.pick(3000, 60), **options)


def _weights(lab: Lab) -> Measured:
    numbers: dict[str, list[float]] = {}
    for k in (6, 5, 11):
        rows = [linear_weights("la_b", linear(lab, "la_b", k, seed).meta_params()["weights"]) for seed in lab.seeds]
        for (beta, _), column in zip(BETAS[k], torch.stack(rows).mT.tolist(), strict=True):
            numbers[f"k={k}: weight of Adam {beta:g}"] = column
        numbers[f"k={k}: weight of the two extremes"] = [float(row[0] + row[-1]) for row in rows]
        numbers[f"k={k}: largest weight between"] = [float(row[1:-1].max()) for row in rows]
    return Measured(numbers)


def _linear(lab: Lab) -> Measured:
    steps = lab.pick(2 * EPOCH, 40)
    found = curves(lab, _singles(1e-2), "mnist-mlp", steps)
    for name, (mixer, k) in {"LA_a": ("la_a", 6), "LA_b": ("la_b", 6), "LA_c": ("la_c", 6)}.items():
        found |= curves(lab, learned(name, linear(lab, mixer, k, 0)), "mnist-mlp", steps)
    return Measured(_with_best_adam(found), data(found))


def _sizes(lab: Lab) -> Measured:
    steps = lab.pick(2 * EPOCH, 40)
    found = curves(lab, _singles(1e-2, 11), "mnist-mlp", steps)
    for k in (5, 6, 11):
        found |= curves(lab, learned(f"LA k={k}", linear(lab, "la_b", k, 0)), "mnist-mlp", steps)
    return Measured(_with_best_adam(found), data(found))


def _with_best_adam(found: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and last losses, and the best of both among the single Adams."""
    numbers = means(found) | means(found, "last loss", last=50)
    for what in ("mean loss", "last loss"):
        single = {name: row for name, row in numbers.items() if name.startswith(f"{what} of Adam")}
        numbers[f"best {what} of one Adam"] = single[best_of(single)]
    return numbers


# --- Figures 4.5, 4.7, 4.8: the heat maps ---

RULES = {"LA": "multiscale-adam-linear", "RNN-2": "multiscale-adam"}
HORIZON = 3 * EPOCH


def _bundled() -> dict[str, UpdateRule]:
    return {name: with_options(load_rule(bundled), eta=1.0) for name, bundled in RULES.items()}


def heat(lab: Lab, rules: Mapping[str, UpdateRule]) -> Measured:
    """Losses of rules with eta 1 and of the six Adams under all schedules, and the rules' ranks among the Adams."""
    steps, seeds = lab.pick(HORIZON, 30), len(lab.seeds)
    table = {name: _row(lab, name, partial(Annealed, rule), {}, steps, seeds) for name, rule in rules.items()}
    for beta1, beta2 in BETAS[6]:
        hyper = {"beta1": beta1, "beta2": beta2}
        make_adam = lambda schedule, hyper=hyper: Adam(BaselineConfig(schedule=schedule), **hyper)  # noqa: E731
        table[f"Adam {beta1:g}"] = _row(lab, f"Adam {beta1:g}", make_adam, hyper, steps, seeds)
    numbers = {f"{name} at {s}": row for name, columns in table.items() for s, row in columns.items()}
    for name in rules:
        numbers |= _ranks(name, {n: columns for n, columns in table.items() if n == name or n not in rules})
    return Measured(numbers, {"optimizers": list(table), "schedules": list(SCHEDULES)})


def _heat(lab: Lab) -> Measured:
    return heat(lab, _bundled())


def _row(
    lab: Lab, name: str, make_rule: Any, hyper: dict[str, float], steps: int, seeds: int
) -> dict[str, list[float]]:
    """Schedule -> mean training loss of each seed: the constant rates as one population, the cosines as another."""
    row: dict[str, list[float]] = {}
    for schedule in ("constant", "cosine"):
        rule = make_rule(schedule)
        wanted = {label: eta for label, (eta, kind) in SCHEDULES.items() if kind == schedule}
        key = {"rule": fingerprint(rule), "hyper": hyper, "rates": list(wanted.values()), "steps": steps}
        key |= {"schedule": schedule, "seeds": seeds}

        def compute(rule: UpdateRule = rule, wanted: dict[str, float] = wanted) -> dict[str, Any]:
            rates = [torch.tensor(eta, dtype=torch.float64) for eta in wanted.values()]
            settings = [{**rule.meta_params(), "lr": rate} for rate in rates]
            return {"mean": losses(rule, settings, "mnist-mlp", steps, seeds, seed=0).mean(2).tolist()}

        lab.progress(f"heat map, {name}, {schedule}", 1, 1)
        row |= dict(zip(wanted, lab.piece("heat map", key, compute)["mean"], strict=True))
    return row


def _ranks(name: str, table: Mapping[str, Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """In how many schedules the optimizer has the lowest mean loss, or one of the two lowest, of medians over seeds."""
    ranks = []
    for schedule in SCHEDULES:
        medians = {other: statistics.median(columns[schedule]) for other, columns in table.items()}
        ranks.append(sorted(medians.values()).index(medians[name]))
    first, second = (float(sum(rank <= most for rank in ranks)) for most in (0, 1))
    return {f"schedules where {name} is best": [first], f"schedules where {name} is best or second": [second]}


def draw_heat(measured: Measured) -> Figure:
    """Mean loss divided by the column's largest; the lowest of a column is black, as in the thesis."""
    from matplotlib.figure import Figure

    rows, columns = measured.data["optimizers"], measured.data["schedules"]
    values = torch.tensor([[statistics.median(measured.numbers[f"{r} at {c}"]) for c in columns] for r in rows])
    figure = Figure(figsize=(0.95 * len(columns) + 2, 0.55 * len(rows) + 1.6), layout="constrained")
    panel = figure.subplots()
    picture = panel.imshow((values / values.amax(0)).numpy(), cmap="gray", aspect="auto", vmax=1.0)
    for i in range(len(rows)):
        for j in range(len(columns)):
            shade = values[i, j] / values[:, j].amax()
            best = values[i, j] == values[:, j].amin()
            light = shade < (values / values.amax(0)).mean()
            style: dict[str, Any] = {"color": "white" if light else "black", "weight": "bold" if best else "normal"}
            panel.text(j, i, f"{values[i, j]:.3g}", ha="center", va="center", fontsize=8, **style)
    panel.set_xticks(range(len(columns)), columns, rotation=30)
    panel.set_yticks(range(len(rows)), rows)
    panel.set_xlabel("learning rate")
    panel.set_title("mean training loss on MlpMnist; shade: divided by the column's largest", fontsize=10)
    figure.colorbar(picture, ax=panel)
    return figure


# --- Figures 4.11 and 4.13 to 4.15: convolutional networks ---

TRANSFERS: dict[str, tuple[Any, ...]] = {**SCHEDULES, "0.0005 to 5e-05": (5e-4, "cosine", 0.1)}


def transfer(lab: Lab, rules: Mapping[str, UpdateRule], task_name: str, schedule: str) -> Measured:
    """Losses of rules with eta 1 and of the six Adams under one schedule, on a task that is none of theirs."""
    steps, (eta, *kind) = lab.pick(60, 3), TRANSFERS[schedule]
    everything = {**rules, **{f"Adam {beta:g}": single(number) for number, (beta, _) in enumerate(BETAS[6])}}
    lr, runs = torch.tensor(eta, dtype=torch.float64), {}
    for name, rule in everything.items():
        annealed = Annealed(rule, *kind)
        runs[name] = annealed, {**annealed.meta_params(), "lr": lr}
    found = curves(lab, runs, task_name, steps)
    numbers = means(found, "last loss", last=max(steps // 6, 1))
    numbers["best last loss of one Adam"] = numbers[best_of({n: r for n, r in numbers.items() if "Adam" in n})]
    return Measured(numbers, data(found))


def _transfer(lab: Lab, task_name: str, schedule: str) -> Measured:
    return transfer(lab, _bundled(), task_name, schedule)


def _extremes(k: int, published: str) -> tuple[Check, ...]:
    first, last = (f"k={k}: weight of Adam {BETAS[k][i][0]:g}" for i in (0, -1))
    return (
        at_least(f"k={k}: weight of the two extremes", 0.95, published=published),
        below(last, first),
        below(f"k={k}: largest weight between", last),
    )


CLAIMS = (
    Claim(
        id="multiscale-weights",
        source=f"{THESIS}, tables 4.2 and 4.3",
        statement="LA_b learns to mix the longest and the shortest timescale, with more weight on the longest.",
        setup="Meta-trained as the bundled multiscale-adam-linear: the one-step objective on MlpMnist with images of "
        "8 x 8 pixels, 3,000 steps of 8 runs at lr 2e-3, cosine (thesis: 28 x 28, 50,000 steps of one run at 2e-4).",
        measure=_weights,
        checks=(*_extremes(6, "0.994"), *_extremes(5, "0.983"), *_extremes(11, "0.955")),
        minutes=10.0,
        quick_minutes=0.5,
        needs=("mnist",),
    ),
    Claim(
        id="multiscale-linear",
        source=f"{THESIS}, figures 4.2 and 4.4",
        statement="LA_b and LA_a beat LA_c by far, and LA_b beats every single Adam, at learning rate 1e-2.",
        setup=f"k = 6, MlpMnist, {2 * EPOCH} steps (2 epochs; thesis: 50); training loss. The mixers are those of "
        "multiscale-weights, seed 0.",
        measure=_linear,
        checks=(
            below("mean loss of LA_a", "mean loss of LA_c", factor=0.9),
            below("mean loss of LA_b", "mean loss of LA_c", factor=0.9),
            below("mean loss of LA_b", "best mean loss of one Adam"),
            below("last loss of LA_b", "best last loss of one Adam"),
        ),
        minutes=5.0,
        quick_minutes=0.5,
        needs=("mnist",),
        plot=partial(draw, "MlpMnist, learning rate 0.01"),
    ),
    Claim(
        id="multiscale-sizes",
        source=f"{THESIS}, figures 4.3 and 4.4",
        statement="Of k = 5, 6 and 11 the last is best and the first worst, and all beat each of the eleven Adams.",
        setup=f"LA_b of multiscale-weights, seed 0; MlpMnist, learning rate 1e-2, {2 * EPOCH} steps (2 epochs; thesis: "
        "50); training loss.",
        measure=_sizes,
        checks=(
            below("mean loss of LA k=11", "mean loss of LA k=6"),
            below("mean loss of LA k=6", "mean loss of LA k=5"),
            *(below(f"last loss of LA k={k}", "best last loss of one Adam") for k in (5, 6, 11)),
        ),
        minutes=6.0,
        quick_minutes=0.5,
        needs=("mnist",),
        plot=partial(draw, "MlpMnist, learning rate 0.01"),
    ),
    Claim(
        id="multiscale-heat",
        source=f"{THESIS}, figures 4.5 and 4.8",
        statement="Over ten learning-rate schedules the two-layer RNN is best in nine and second in one; LA in four.",
        setup="The bundled multiscale-adam (one set of weights for all schedules) and multiscale-adam-linear against "
        f"the six Adams on MlpMnist, {HORIZON} steps (3 epochs; thesis: 50). Mean training loss, medians over seeds.",
        measure=_heat,
        checks=(
            at_least("schedules where RNN-2 is best or second", 8, published="10"),
            at_least("schedules where RNN-2 is best", 8, published="9"),
            at_least("schedules where LA is best", 4, published="4"),
        ),
        minutes=8.0,
        quick_minutes=0.5,
        needs=("mnist",),
        plot=draw_heat,
    ),
    *(
        Claim(
            id=f"multiscale-{short}",
            source=f"{THESIS}, figure {figure}",
            statement=f"On {paper_task} at {schedule} the RNN, which never saw it, beats all its Adams.",
            setup=f"{task_name} ({of}), 60 steps of 128; mean loss of the last ten.",
            measure=partial(_transfer, task_name=task_name, schedule=schedule),
            checks=(below("last loss of RNN-2", "best last loss of one Adam"),),
            minutes=minutes,
            quick_minutes=minutes / 15,
            seeds=2,
            quick_seeds=1,
            needs=(dataset,),
            plot=partial(draw, f"{task_name}, learning rate {schedule}"),
        )
        for short, figure, schedule, paper_task, task_name, of, dataset, minutes in (
            ("convmnist", "4.11", "0.0005", "ConvMnist large", "mnist-convnet-small", "thesis: large", "mnist", 3.0),
            ("convcifar", "4.13", "0.0005", "ConvCifar 0", "cifar-convnet-1", "thesis: ConvCifar 0", "cifar10", 4.0),
            ("annealed", "4.14", "0.01 to 0", "ConvCifar 0", "cifar-convnet-1", "thesis: 0", "cifar10", 4.0),
            ("floor", "4.15", "0.0005 to 5e-05", "ConvCifar 0", "cifar-convnet-1", "thesis: 0", "cifar10", 4.0),
        )
    ),
)
