"""Chapter 4 of Shahid's thesis: Multiscale Adam (tables 4.2 and 4.3, figures 4.2 to 4.15).

Rules have the bundled weights, except for the linear mixers of tables 4.2 and 4.3, which are meta-trained here. Runs
last a few epochs, where the thesis has 50 on MNIST and 500 on CIFAR-10.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_lopt.claims.claim import Check, Claim, Measurement, at_least, at_most, below, noise_margin
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.history import EPOCH, THESIS
from lightning_lopt.claims.learning_rate import WithLearningRate, at_rate
from lightning_lopt.claims.loss_curves import (
    Candidate,
    adams,
    best_of,
    curves,
    draw,
    losses,
    means,
    plot_data,
    with_options,
)
from lightning_lopt.claims.training import train_rule
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


class Schedule(NamedTuple):
    """A learning-rate schedule; `kind` and `floor` as in `WithLearningRate`."""

    lr: float
    kind: str = "constant"
    floor: float = 0.0


SCHEDULES = {f"{lr:g}": Schedule(lr) for lr in (1e-1, 5e-2, 1e-2, 5e-3, 1e-3, 5e-4, 1e-4, 5e-5)}
SCHEDULES |= {f"{lr:g} to 0": Schedule(lr, "cosine") for lr in (5e-2, 1e-2)}


def _single_adams(rate: float, k: int = 6) -> dict[str, Candidate]:
    """The Adams that the rule mixes, each alone."""
    settings = {f"Adam {beta1:g}": {"lr": rate, "beta1": beta1, "beta2": beta2} for beta1, beta2 in BETAS[k]}
    return adams(settings)


def single_adam(number: int) -> UpdateRule:
    """One of the six Adams with eta 1, as the mixer LA_b with a single weight."""
    rule = make("multiscale_adam", mixer="la_b", eta=1.0)
    rule.load_state_dict({"weights": torch.eye(len(BETAS[6]))[number]})
    return rule


# --- Tables 4.2 and 4.3, figures 4.2 to 4.4 ---

_ONE_STEP = OneStep(num_runs=8, horizon=Horizon(1000, 20000))


def linear(experiment: Experiment, mixer: str, k: int, seed: int) -> UpdateRule:
    """A linear mixer, meta-trained like the bundled multiscale-adam-linear."""
    rule = make("multiscale_adam", mixer=mixer, k=k)
    task = make_task("mnist-mlp", image_size=8, grayscale=True)
    label = f"meta-train {mixer} k={k} seed {seed}"
    num_steps = experiment.pick(3000, 60)
    options: dict[str, Any] = {"lr_factors": {}, "seed": seed, "second_order": False, "lr": 2e-3}
    return train_rule(experiment, label, rule, [task], _ONE_STEP, num_steps, **options)


def _weights(experiment: Experiment) -> Measurement:
    numbers: dict[str, list[float]] = {}
    for k in (6, 5, 11):
        rows = [
            linear_weights("la_b", linear(experiment, "la_b", k, seed).meta_params()["weights"])
            for seed in experiment.seeds
        ]
        for (beta, _), column in zip(BETAS[k], torch.stack(rows).mT.tolist(), strict=True):
            numbers[f"k={k}: weight of Adam {beta:g}"] = column
        numbers[f"k={k}: weight of the two extremes"] = [float(row[0] + row[-1]) for row in rows]
        numbers[f"k={k}: largest weight between"] = [float(row[1:-1].max()) for row in rows]
    return Measurement(numbers)


def _other_mixers(experiment: Experiment) -> Measurement:
    """The columns LA_a and LA_c of table 4.2, whose weights may be negative."""
    numbers: dict[str, list[float]] = {}
    for name in ("LA_a", "LA_c"):
        mixer = name.lower()
        rows = [
            linear_weights(mixer, linear(experiment, mixer, 6, seed).meta_params()["weights"])
            for seed in experiment.seeds
        ]
        for (beta, _), column in zip(BETAS[6], torch.stack(rows).mT.tolist(), strict=True):
            numbers[f"{name}: weight of Adam {beta:g}"] = column
        numbers[f"{name}: lowest weight"] = [float(row.min()) for row in rows]
        numbers[f"{name}: largest weight between the extremes"] = [float(row[1:-1].max()) for row in rows]
    return Measurement(numbers)


def _linear(experiment: Experiment) -> Measurement:
    steps = experiment.pick(2 * EPOCH, 40)
    found = curves(experiment, _single_adams(1e-2), "mnist-mlp", steps)
    for name in ("LA_a", "LA_b", "LA_c"):
        found |= curves(experiment, {name: linear(experiment, name.lower(), 6, 0)}, "mnist-mlp", steps)
    return Measurement(_with_best_adam(found), plot_data(found))


def _sizes(experiment: Experiment) -> Measurement:
    steps = experiment.pick(2 * EPOCH, 40)
    found = curves(experiment, _single_adams(1e-2, 11), "mnist-mlp", steps)
    for k in (5, 6, 11):
        found |= curves(experiment, {f"LA k={k}": linear(experiment, "la_b", k, 0)}, "mnist-mlp", steps)
    return Measurement(_with_best_adam(found), plot_data(found))


def _with_best_adam(found: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and last losses, and the lowest of each among the single Adams."""
    numbers = means(found) | means(found, "last loss", last=50)
    for what in ("mean loss", "last loss"):
        numbers[f"best {what} of one Adam"] = numbers[best_of(numbers, f"{what} of Adam")]
    return numbers


# --- Figures 4.5, 4.7, 4.8: the heat maps ---

RULES = {"LA": "multiscale-adam-linear", "RNN-2": "multiscale-adam"}
HORIZON = 3 * EPOCH


def _bundled() -> dict[str, UpdateRule]:
    return {name: with_options(load_rule(bundled), eta=1.0) for name, bundled in RULES.items()}


def heat_map(experiment: Experiment, rules: Mapping[str, UpdateRule]) -> Measurement:
    """Measure losses of rules with eta 1 and of the six Adams under all schedules, and the rules' ranks among them."""
    steps = experiment.pick(HORIZON, 30)
    seeds = len(experiment.seeds)
    table = {
        name: _row(experiment, name, partial(WithLearningRate, rule), {}, steps, seeds) for name, rule in rules.items()
    }
    for beta1, beta2 in BETAS[6]:
        hyper = {"beta1": beta1, "beta2": beta2}
        make_adam = lambda schedule, hyper=hyper: Adam(BaselineConfig(schedule=schedule), **hyper)  # noqa: E731
        table[f"Adam {beta1:g}"] = _row(experiment, f"Adam {beta1:g}", make_adam, hyper, steps, seeds)
    numbers = {f"{name} at {s}": row for name, columns in table.items() for s, row in columns.items()}
    for name in rules:
        numbers |= _ranks(name, {n: columns for n, columns in table.items() if n == name or n not in rules})
    return Measurement(numbers, {"optimizers": list(table), "schedules": list(SCHEDULES)})


def _heat(experiment: Experiment) -> Measurement:
    return heat_map(experiment, _bundled())


def _row(
    experiment: Experiment, name: str, make_rule: Any, hyper: dict[str, float], steps: int, seeds: int
) -> dict[str, list[float]]:
    """Schedule -> mean training loss of each seed. Constant rates run as one population, cosines as another."""
    row: dict[str, list[float]] = {}
    for schedule in ("constant", "cosine"):
        rule = make_rule(schedule)
        rates = {label: each.lr for label, each in SCHEDULES.items() if each.kind == schedule}
        key = {"rule": fingerprint(rule), "hyper": hyper, "rates": list(rates.values()), "steps": steps}
        key |= {"schedule": schedule, "seeds": seeds}

        def compute(rule: UpdateRule = rule, rates: dict[str, float] = rates, kind: str = schedule) -> dict[str, Any]:
            settings = [at_rate(rule, lr) for lr in rates.values()]
            report = experiment.reporter(f"heat map, {name}, {kind}", steps)
            found = losses(rule, settings, "mnist-mlp", steps, seeds, seed=0, on_step=report)
            return {"mean": found.mean(2).tolist()}

        row |= dict(zip(rates, experiment.cached("heat map", key, compute)["mean"], strict=True))
    return row


def _ranks(name: str, table: Mapping[str, Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """In how many schedules the optimizer's mean loss is below those of all others, or of all others but one.

    A loss is below another only by more than the noise: twice the standard error of the difference over seeds.
    """
    losses_to = []
    for schedule in SCHEDULES:
        ours = table[name][schedule]
        others = [columns[schedule] for other, columns in table.items() if other != name]
        losses_to.append(sum(not _is_below(ours, theirs) for theirs in others))
    return {
        f"schedules where {name} is best": [float(sum(lost == 0 for lost in losses_to))],
        f"schedules where {name} is best or second": [float(sum(lost <= 1 for lost in losses_to))],
    }


def _is_below(ours: list[float], theirs: list[float]) -> bool:
    return statistics.fmean(theirs) - statistics.fmean(ours) > noise_margin(ours, theirs)


def draw_heat_map(measured: Measurement) -> Figure:
    """Plot mean losses divided by the column's largest; the lowest of a column is the darkest, as in the thesis."""
    from matplotlib.figure import Figure

    rows = measured.data["optimizers"]
    columns = measured.data["schedules"]
    values = torch.tensor([[statistics.fmean(measured.numbers[f"{r} at {c}"]) for c in columns] for r in rows])
    figure = Figure(figsize=(0.95 * len(columns) + 2, 0.55 * len(rows) + 1.6), layout="constrained")
    panel = figure.subplots()
    shades = values / values.amax(0)
    image = panel.imshow(shades.numpy(), cmap="gray", aspect="auto", vmax=1.0)
    for i in range(len(rows)):
        for j in range(len(columns)):
            color = "white" if shades[i, j] < shades.mean() else "black"
            weight = "bold" if values[i, j] == values[:, j].amin() else "normal"
            text = f"{values[i, j]:.3g}"
            panel.text(j, i, text, ha="center", va="center", fontsize=8, color=color, weight=weight)
    panel.set_xticks(range(len(columns)), columns, rotation=30)
    panel.set_yticks(range(len(rows)), rows)
    panel.set_xlabel("learning rate")
    panel.set_title("mean training loss on MlpMnist; shade: relative to the column's largest", fontsize=10)
    figure.colorbar(image, ax=panel)
    return figure


# --- Figures 4.11 and 4.13 to 4.15: convolutional networks ---

TRANSFERS = {**SCHEDULES, "0.0005 to 5e-05": Schedule(5e-4, "cosine", floor=0.1)}


def transfer(experiment: Experiment, rules: Mapping[str, UpdateRule], task_name: str, schedule: str) -> Measurement:
    """Measure losses of rules with eta 1 and of the six Adams under one schedule, on a task that no rule has seen."""
    steps = experiment.pick(60, 3)
    lr, kind, floor = TRANSFERS[schedule]
    everything = {**rules, **{f"Adam {beta:g}": single_adam(number) for number, (beta, _) in enumerate(BETAS[6])}}
    candidates: dict[str, Candidate] = {}
    for name, rule in everything.items():
        scheduled = WithLearningRate(rule, kind, floor)
        candidates[name] = scheduled, at_rate(scheduled, lr)
    found = curves(experiment, candidates, task_name, steps)
    numbers = means(found, "last loss", last=max(steps // 6, 1))
    numbers["best last loss of one Adam"] = numbers[best_of(numbers, "Adam")]
    return Measurement(numbers, plot_data(found))


def _transfer(experiment: Experiment, task_name: str, schedule: str) -> Measurement:
    return transfer(experiment, _bundled(), task_name, schedule)


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
        source=f"{THESIS}, tables 4.2 (LA_b) and 4.3",
        title="tables 4.2 and 4.3 for LA_b, meta-trained on images of 8 x 8 pixels",
        in_paper="Images of 28 x 28, 50,000 steps of one run at 2e-4.",
        statement="LA_b learns to mix the longest and the shortest timescale, with more weight on the longest.",
        setup="Meta-trained like the bundled multiscale-adam-linear: the one-step objective on MlpMnist with images of "
        "8 x 8 pixels, 3,000 steps of 8 runs at lr 2e-3, cosine (thesis: 28 x 28, 50,000 steps of one run at 2e-4).",
        measure=_weights,
        checks=(*_extremes(6, "0.994"), *_extremes(5, "0.983"), *_extremes(11, "0.955")),
        minutes=10.0,
        quick_minutes=0.5,
        needs=("mnist",),
    ),
    Claim(
        id="multiscale-weights-ac",
        source=f"{THESIS}, table 4.2 (LA_a and LA_c)",
        title="table 4.2's other columns, meta-trained on images of 8 x 8 pixels",
        in_paper="Images of 28 x 28, 50,000 steps of one run at 2e-4.",
        statement="The longest and the shortest timescale have the highest weights in LA_a and LA_c too, and some "
        "weights are negative.",
        setup="Meta-trained as in multiscale-weights, a number per meta-seed.",
        measure=_other_mixers,
        checks=(
            *(
                below(
                    f"{name}: largest weight between the extremes", f"{name}: weight of Adam {beta:g}", published=text
                )
                for name, numbers in (("LA_a", ("0.757", "1.186")), ("LA_c", ("0.249", "0.155")))
                for (beta, _), text in zip((BETAS[6][0], BETAS[6][-1]), numbers, strict=True)
            ),
            at_most("LA_a: lowest weight", 0.0, published="-1.211"),
            at_most("LA_c: lowest weight", 0.0, published="-0.093"),
        ),
        minutes=7.0,
        quick_minutes=0.3,
        needs=("mnist",),
    ),
    Claim(
        id="multiscale-linear",
        source=f"{THESIS}, figures 4.2 and 4.4",
        title=f"figure 4.2 and k = 6 of 4.4 with {2 * EPOCH} steps (2 epochs of the thesis's 50)",
        in_paper="50 epochs.",
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
        title=f"figures 4.3 and 4.4 with {2 * EPOCH} steps (2 epochs of the thesis's 50)",
        in_paper="50 epochs.",
        statement="k = 11 is better than k = 6, k = 6 than k = 5, and all three beat each of the eleven Adams.",
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
        source=f"{THESIS}, figures 4.5, 4.8 and 4.10",
        title=f"figures 4.5, 4.8 and 4.10 with {HORIZON} steps (3 epochs of the thesis's 50), one set of weights",
        in_paper="An RNN of two layers of 20 units meta-trained for each schedule, 50 epochs.",
        statement="Over ten learning-rate schedules the two-layer RNN is best in nine, second in one; LA is best in 4.",
        setup="The bundled multiscale-adam (one set of weights for all schedules) and multiscale-adam-linear against "
        f"the six Adams on MlpMnist, {HORIZON} steps (3 epochs; thesis: 50). Mean training loss; best means below "
        "all others by more than the noise.",
        measure=_heat,
        checks=(
            at_least("schedules where RNN-2 is best or second", 8, exact=True, published="10"),
            at_least("schedules where RNN-2 is best", 8, exact=True, published="9"),
            at_least("schedules where LA is best", 4, exact=True, published="4"),
        ),
        minutes=8.0,
        quick_minutes=0.5,
        needs=("mnist",),
        plot=draw_heat_map,
    ),
    *(
        Claim(
            id=f"multiscale-{short}",
            source=f"{THESIS}, figure {figure}",
            title=f"figure {figure}'s form on {task_name} for 60 steps ({of}; hundreds of epochs)",
            in_paper=f"{paper_task}; 500 epochs on ConvCifar 0.",
            statement=f"On {paper_task} at {schedule} the RNN, which never saw it, beats all its Adams.",
            setup=f"{task_name} ({of}), 60 steps of 128; mean loss of the last ten, a number per seed.",
            measure=partial(_transfer, task_name=task_name, schedule=schedule),
            checks=(below("last loss of RNN-2", "best last loss of one Adam"),),
            minutes=minutes,
            quick_minutes=minutes / 15,
            seeds=3,
            needs=(dataset,),
            plot=partial(draw, f"{task_name}, learning rate {schedule}"),
        )
        for short, figure, schedule, paper_task, task_name, of, dataset, minutes in (
            ("convmnist", "4.11", "0.0005", "ConvMnist large", "mnist-convnet-small", "thesis: large", "mnist", 4.5),
            ("convcifar", "4.13", "0.0005", "ConvCifar 0", "cifar-convnet-1", "thesis: ConvCifar 0", "cifar10", 6.0),
            ("annealed", "4.14", "0.01 to 0", "ConvCifar 0", "cifar-convnet-1", "thesis: 0", "cifar10", 6.0),
            ("floor", "4.15", "0.0005 to 5e-05", "ConvCifar 0", "cifar-convnet-1", "thesis: 0", "cifar10", 6.0),
        )
    ),
)
