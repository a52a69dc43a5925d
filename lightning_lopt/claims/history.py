"""Chapter 3 of Shahid's thesis: MNG, k Timesteps and k Momentums (figures 3.3 to 3.6, 3.8, 3.9b and 3.10, table 3.1).

The thesis mostly shows curves without numbers, so most checks come from its text. Rules have the bundled weights. Runs
on MNIST last a few epochs, as each claim's setup says, where the thesis has 50.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lightning_lopt.claims.claim import (
    CONTROL,
    Assessment,
    Check,
    Claim,
    Measurement,
    at_least,
    at_most,
    below,
    each_at_most,
)
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.learning_rate import WithLearningRate, at_rate
from lightning_lopt.claims.loss_curves import (
    Candidate,
    Setting,
    adams,
    best_of,
    curves,
    draw,
    means,
    plot_data,
    with_options,
)
from lightning_lopt.evaluation.compare import fingerprint
from lightning_lopt.evaluation.runs import Runs, run
from lightning_lopt.evaluation.tuning import BASELINES, Grid, Trial
from lightning_lopt.hub import load_rule
from lightning_lopt.rules import NormalizedHistory, UpdateRule, make
from lightning_lopt.tasks import make as make_task

THESIS = "Shahid 2017, Learning to Optimize Deep Neural Networks (master thesis, Freiburg)"
EPOCH = 429  # steps of 55,000 examples in batches of 128
RATES = (1e-3, 1e-2, 1e-1)

# --- Figures 3.3 and 3.4: sum of squares ---

ETAS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-7)


def _squares(experiment: Experiment) -> Measurement:
    rules = adams({f"Adam {rate:g}": {"lr": rate} for rate in RATES})
    for eta in ETAS:
        rules[f"MNG {eta:g}"] = make("mng", eta_min=eta)
    found = curves(experiment, rules, "sum-of-squares", experiment.pick(1000, 201))
    numbers: dict[str, list[float]] = {}
    for rate in RATES:
        pairs = zip(found["MNG 0.001"], found[f"Adam {rate:g}"], strict=True)
        above = [float((mng >= adam)[50:201].sum()) for mng, adam in pairs]
        numbers[f"steps from 50 to 200 where MNG is not below Adam {rate:g}"] = above
    numbers |= {f"summed loss of {name}": [float(row.sum()) for row in rows] for name, rows in found.items()}
    for eta in (1e-7, 1e-3):
        numbers[f"MNG {eta:g}, last / first loss"] = [float(row[-1] / row[0]) for row in found[f"MNG {eta:g}"]]
    numbers |= {f"last loss of {name}": [float(row[-1]) for row in found[name]] for name in ("MNG 0.001", "Adam 0.1")}
    return Measurement(numbers, plot_data(found))


def _signs(experiment: Experiment) -> Measurement:
    rules: dict[str, Candidate] = {}
    for eta in ETAS[:3]:
        rules[f"MNG {eta:g}"] = make("mng", eta_min=eta)
        rules[f"signs {eta:g}"] = make("mng", eta_min=eta, sign_only=True)
    found = curves(experiment, rules, "sum-of-squares", experiment.pick(1000, 200))
    return Measurement(means(found) | means(found, "last loss", last=1), plot_data(found))


# --- Figure 3.5: Rosenbrock; figure 3.6: MNIST ---


def _rosenbrock(experiment: Experiment) -> Measurement:
    rules = adams({f"Adam {rate:g}": {"lr": rate} for rate in RATES})
    for eta in (1e-3, 1e-4, 1e-5):
        rules[f"MNG {eta:g}"] = make("mng", eta_min=eta)
    found = curves(experiment, rules, "rosenbrock-thesis", experiment.pick(3000, 300), starts=16)
    numbers = means(found, "last loss", last=100)
    numbers |= {f"best last loss of {kind}": _lowest_by_seed(numbers, kind) for kind in ("Adam", "MNG")}
    numbers["first loss"] = [float(row[0]) for row in found["MNG 0.001"]]
    return Measurement(numbers, plot_data(found))


def _mnist(experiment: Experiment) -> Measurement:
    rules = adams({f"Adam {rate:g}": {"lr": rate} for rate in RATES})
    for eta in (1e-4, 1e-3, 1e-2):
        rules[f"MNG {eta:g}"] = make("mng", k=10, eta_min=eta)
    found = curves(experiment, rules, "mnist-mlp", experiment.pick(2 * EPOCH, 40))
    numbers = means(found)
    numbers |= {f"best mean loss of {kind}": _lowest_by_seed(numbers, kind) for kind in ("Adam", "MNG")}
    numbers["first loss"] = [float(row[0]) for row in found["MNG 0.01"]]
    return Measurement(numbers, plot_data(found))


def _lowest_by_seed(numbers: Mapping[str, Sequence[float]], kind: str) -> list[float]:
    """Per seed, the lowest number of the settings whose names contain `kind`."""
    return [min(row) for row in zip(*(row for name, row in numbers.items() if kind in name), strict=True)]


# --- Table 3.1 ---

TABLE = (  # gradients, oldest first, and the step that the thesis's rule takes
    ((1.0, 1.0, 1.0, 1.0, 1.0), 0.99999666),
    ((1.0, 1.0, 1.0, 1.0, -1.0), 0.99984455),
    ((1.0, 1.0, 1.0, -1.0, -1.0), 0.99128538),
    ((1.0, 1.0, -1.0, -1.0, -1.0), -0.9901197),
    ((1.0, -1.0, -1.0, -1.0, -1.0), -0.99978876),
    ((-1.0, -1.0, -1.0, -1.0, -1.0), -0.99999416),
    ((-0.1, -0.1, -0.1, -0.1, 1.0), 0.96777165),
    ((-0.1, -0.1, -0.1, -0.5, 1.0), 0.74221277),
    ((-0.1, -0.1, -0.25, -0.25, 1.0), 0.84402364),
    ((-0.1, -0.25, 0.0, 0.25, 1.0), 0.41817734),
    ((1.0, 0.25, 0.0, -0.25, -1.0), 0.0942957),
    ((0.0, 0.0, 0.0, 0.0, 0.0), 0.26363501),
)


def _step_map(experiment: Experiment) -> Measurement:
    rule = load_rule("k-timesteps")
    assert isinstance(rule, NormalizedHistory)
    return Measurement(table_numbers(rule.step_map(torch.tensor([row for row, _ in TABLE])).tolist()))


def table_numbers(steps: Sequence[float]) -> dict[str, list[float]]:
    """The quantities that the checks read, from the steps in the rows of table 3.1."""
    numbers = {f"row {i + 1}: {row}": [step] for i, ((row, _), step) in enumerate(zip(TABLE, steps, strict=True))}
    numbers["step of five equal gradients"] = [steps[0]]
    numbers["step of five equal negative gradients"] = [steps[5]]
    numbers["least |step| where three of five agree"] = [min(steps[2], -steps[3])]
    numbers["|step| of no gradient"] = [abs(steps[11])]
    numbers["step of one large new gradient against four small"] = [steps[6]]
    return numbers


# --- Figure 3.8 ---


def _timesteps(experiment: Experiment) -> Measurement:
    bundled = load_rule("k-timesteps")
    rules = adams({f"Adam {rate:g}": {"lr": rate} for rate in RATES})
    for eta in (1e-3, 1e-2, 5e-2):
        rules[f"k Timesteps {eta:g}"] = with_options(bundled, eta_min=eta)
    found = curves(experiment, rules, "mnist-mlp", experiment.pick(2 * EPOCH, 40))
    numbers = means(found, "last loss", last=50)
    for kind in ("Adam", "k Timesteps"):
        numbers[f"best last loss of {kind}"] = numbers[best_of(numbers, kind)]
    numbers["first loss"] = [float(row[0]) for row in found["k Timesteps 0.01"]]
    return Measurement(numbers, plot_data(found))


# --- Figure 3.9b ---

HORIZON = 2 * EPOCH
RATE = 0.7  # the learning rate of the bundled k-momentums on its card, which was chosen on other runs
LOSSES = (("last", "final"), ("mean", "mean"), ("test", "test_loss"))


def tune(experiment: Experiment, name: str, steps: int) -> Trial:
    """Tune Adam ("adam") or RMSProp ("rmsprop") for the lowest last loss on MlpMnist."""
    rule = BASELINES[name].make()

    def run_settings(settings: Sequence[Mapping[str, float]]) -> list[Runs]:
        return _runs(experiment, rule, [at_rate(rule, setting["lr"]) for setting in settings], steps)

    return Grid(lowest=-6, highest=-2).search(run_settings).best["final"]


def _runs(experiment: Experiment, rule: UpdateRule, settings: Sequence[Setting], steps: int) -> list[Runs]:
    rates = [float(setting["lr"].detach()) for setting in settings if "lr" in setting]
    key = {"rule": fingerprint(rule), "rates": rates, "steps": steps, "seeds": len(experiment.seeds)}

    def compute() -> dict[str, Any]:
        report = experiment.reporter(f"{type(rule).__name__} on mnist-mlp", steps)
        task = make_task("mnist-mlp")
        found = run(rule, settings, task, steps=steps, seeds=len(experiment.seeds), on_step=report)
        return {"runs": [vars(item) for item in found]}

    return [Runs(**row) for row in experiment.cached("runs on mnist-mlp", key, compute)["runs"]]


def _momentums(experiment: Experiment) -> Measurement:
    steps = experiment.pick(HORIZON, 40)
    rule = WithLearningRate(load_rule("k-momentums"), "constant")
    trials = {"tuned Adam": tune(experiment, "adam", steps), "tuned RMSProp": tune(experiment, "rmsprop", steps)}
    found = {name: trial.runs for name, trial in trials.items()}
    found["k Momentums"] = _runs(experiment, rule, [at_rate(rule, RATE)], steps)[0]
    numbers = {f"{what} loss of {name}": getattr(runs, field) for name, runs in found.items() for what, field in LOSSES}
    numbers |= {f"lr of {name}": [trial.hyperparameters["lr"]] for name, trial in trials.items()}
    curves_by_name = {name: runs.curve for name, runs in found.items()}
    return Measurement(numbers, {"steps": found["k Momentums"].curve_steps, "curves": curves_by_name})


# --- Figure 3.10 ---


def _cifar(experiment: Experiment) -> Measurement:
    rules: dict[str, Candidate] = {}
    for kind, name in (("Adam", "adam"), ("RMSProp", "rmsprop")):
        rule = BASELINES[name].make()
        for lr in (3e-4, 1e-3, 3e-3):
            rules[f"{kind} {lr:g}"] = rule, at_rate(rule, lr)
    bundled = load_rule("k-momentums")
    for eta in (5e-5, 1e-3, 1e-2):
        scaled = WithLearningRate(with_options(bundled, eta_min=eta), "constant")
        rules[f"k Momentums {eta:g}"] = scaled, at_rate(scaled, RATE)
    steps = experiment.pick(120, 3)
    found = curves(experiment, rules, "cifar-convnet-1", steps)
    numbers = means(found, "last loss", last=max(steps // 6, 1))
    best = {}
    for kind in ("Adam", "RMSProp", "k Momentums"):
        name = best_of(numbers, f"of {kind} ")
        numbers[f"best last loss of {kind}"] = numbers[name]
        best[name.removeprefix("last loss of ")] = found[name.removeprefix("last loss of ")]
    return Measurement(numbers, plot_data(best))


def _saturated(bound: float) -> Check:
    text = f"|step| of five equal gradients of either sign >= {bound:g}"
    names = ("step of five equal gradients", "step of five equal negative gradients")
    published = "0.99999666 and -0.99999416"

    def condition(up: list[float], down: list[float]) -> Assessment:
        least = min(*up, *(-step for step in down))
        return Assessment(least >= bound, least, math.nan, bound, 0.0, len(up))

    return Check(text, names, condition, published)


CLAIMS = (
    Claim(
        id="history-squares",
        source=f"{THESIS}, figure 3.3",
        title="figure 3.3 as in the thesis",
        in_paper="The same function; curves without numbers.",
        statement="On a sum of squares MNG (k = 5) outperforms Adam by a significant margin, except with eta_min 1e-7.",
        setup="1,000 dimensions from U(-10, 10), 1,000 steps. MNG's eta_min is 1e-3 unless stated otherwise. It sets a "
        "floor under the loss, so Adam at 0.1 is lower at the very end: the last losses show it, no check covers it.",
        measure=_squares,
        checks=(
            *(each_at_most(f"steps from 50 to 200 where MNG is not below Adam {rate:g}", 0) for rate in RATES),
            *(below("summed loss of MNG 0.001", f"summed loss of Adam {rate:g}") for rate in RATES),
            *(below(f"summed loss of MNG {eta:g}", "summed loss of Adam 0.1") for eta in ETAS[:4] if eta != 1e-3),
            at_least(
                "MNG 1e-07, last / first loss",
                0.9,
                published="no progress at all",
                controls=(at_most("MNG 0.001, last / first loss", 0.01, kind=CONTROL),),
            ),
        ),
        minutes=0.1,
        quick_minutes=0.05,
        plot=partial(draw, "sum of squares"),
    ),
    Claim(
        id="history-signs",
        source=f"{THESIS}, figure 3.4",
        title="figure 3.4 as in the thesis",
        in_paper="The same function; curves without numbers.",
        statement="MNG always outperforms its variant that uses only the signs of the gradients.",
        setup="As in history-squares; the mean loss over the run, dominated by the first steps, and the last loss.",
        measure=_signs,
        checks=tuple(
            below(f"{what} of MNG {eta:g}", f"{what} of signs {eta:g}")
            for what in ("mean loss", "last loss")
            for eta in ETAS[:3]
        ),
        minutes=0.1,
        quick_minutes=0.05,
        plot=partial(draw, "sum of squares"),
    ),
    Claim(
        id="history-rosenbrock",
        source=f"{THESIS}, figure 3.5",
        title="figure 3.5 with 16 starts a seed",
        in_paper="The same function; one curve each.",
        statement="On Rosenbrock's function Adam tends to perform better than MNG, which circles around the minimum.",
        setup="16 starts from U(-10, 10) per seed; 3,000 steps; geometric mean over starts of the last 100 losses; the "
        "best of three settings each. The function is (1 - x)^2 + 100 (y - x^2)^2; eq. 2.2 has a misprint.",
        measure=_rosenbrock,
        checks=(
            below(
                "best last loss of Adam",
                "best last loss of MNG",
                published="Adam better",
                controls=(below("best last loss of MNG", "first loss", factor=0.01, kind=CONTROL),),
            ),
        ),
        minutes=2.0,
        quick_minutes=0.05,
        plot=partial(draw, "Rosenbrock"),
    ),
    Claim(
        id="history-mnist",
        source=f"{THESIS}, figure 3.6",
        title=f"figure 3.6 with {2 * EPOCH} steps (2 epochs of the thesis's 50)",
        in_paper="The same network, 50 epochs.",
        statement="On MlpMnist Adam outperforms MNG (k = 10), which gains greatly from eta_min 1e-2 instead of 1e-4.",
        setup=f"MlpMnist, 2 epochs ({2 * EPOCH} steps of 128); mean training loss, a number per seed.",
        measure=_mnist,
        checks=(
            below(
                "best mean loss of Adam",
                "best mean loss of MNG",
                published="Adam outperforms MNG by a huge margin",
                controls=(below("best mean loss of MNG", "first loss", factor=0.5, kind=CONTROL),),
            ),
            below("mean loss of MNG 0.01", "mean loss of MNG 0.0001", factor=0.8, published="boosted greatly"),
        ),
        minutes=2.0,
        quick_minutes=0.05,
        needs=("mnist",),
        plot=partial(draw, "MlpMnist"),
    ),
    Claim(
        id="history-step-map",
        source=f"{THESIS}, table 3.1",
        title="table 3.1 of the bundled k-timesteps, one set of weights, without noise",
        in_paper="k = 5, 200,000 meta-steps.",
        statement="k Timesteps (k = 5) learns a saturated vote: full steps if three of five gradients agree.",
        setup="The bundled k-timesteps; its meta-training, on its card, was shorter than the thesis's 200,000 steps.",
        measure=_step_map,
        checks=(
            _saturated(0.95),
            at_least("least |step| where three of five agree", 0.5, exact=True, published="0.99"),
            at_least("step of one large new gradient against four small", 0.5, exact=True, published="0.968"),
            at_most("|step| of no gradient", 0.3, exact=True, published="0.264"),
        ),
        minutes=0.01,
        quick_minutes=0.01,
        seeds=1,
        quick_seeds=1,
    ),
    Claim(
        id="history-timesteps",
        source=f"{THESIS}, figure 3.8",
        title=f"figure 3.8's form with k = 5 and {2 * EPOCH} steps (2 epochs of the thesis's 50)",
        in_paper="k = 100, 50 epochs.",
        statement="On MlpMnist Adam at its best setting ends below k Timesteps.",
        setup=f"The bundled k-timesteps (k = 5; thesis: 100) at three eta_min, {2 * EPOCH} steps of 128 (2 epochs; "
        "thesis: 50); training loss of the last 50 steps.",
        measure=_timesteps,
        checks=(
            below(
                "best last loss of Adam",
                "best last loss of k Timesteps",
                published="Adam clearly better",
                controls=(below("best last loss of k Timesteps", "first loss", factor=0.2, kind=CONTROL),),
            ),
        ),
        minutes=3.0,
        quick_minutes=0.05,
        needs=("mnist",),
        plot=partial(draw, "MlpMnist"),
    ),
    Claim(
        id="history-momentums",
        source=f"{THESIS}, figure 3.9b",
        title=f"figure 3.9b with {HORIZON} steps (2 epochs of the thesis's 50)",
        in_paper="The same network, 50 epochs.",
        statement="Checkpoints k Momentums ends below Adam and RMSProp at their best settings on MlpMnist.",
        setup=f"The bundled k-momentums at learning rate {RATE:g}; {HORIZON} steps of 128 (2 epochs; thesis: 50). "
        "Adam's and RMSProp's learning rates are tuned in half-decades on the same runs that are compared; all are "
        "constant. Mean loss over the last 50 steps.",
        measure=_momentums,
        checks=(
            below("last loss of k Momentums", "last loss of tuned Adam"),
            below("last loss of k Momentums", "last loss of tuned RMSProp"),
        ),
        minutes=2.0,
        quick_minutes=0.1,
        seeds=5,
        needs=("mnist",),
        plot=partial(draw, "MlpMnist"),
    ),
    Claim(
        id="history-cifar",
        source=f"{THESIS}, figure 3.10",
        title="figure 3.10's form on ConvCifar 1 for 120 steps (thesis: ConvCifar 0, 500 epochs)",
        in_paper="ConvCifar 0, 500 epochs, all optimizers at their best settings.",
        statement="On ConvCifar 0 k Momentums, which never saw it, outperforms RMSProp, and Adam takes the lead.",
        setup="cifar-convnet-1 (thesis: ConvCifar 0), 120 steps of 128 (thesis: 500 epochs). Best of three settings: "
        f"of eta_min for the bundled k-momentums, at learning rate {RATE:g}; of the learning rate for the others. "
        "Training loss of the last 20 steps.",
        measure=_cifar,
        checks=(
            below("best last loss of k Momentums", "best last loss of RMSProp"),
            below("best last loss of Adam", "best last loss of k Momentums", published="slightly better at the end"),
        ),
        minutes=18.0,
        quick_minutes=0.5,
        needs=("cifar10",),
        plot=partial(draw, "ConvCifar 1, each at its best"),
    ),
)
