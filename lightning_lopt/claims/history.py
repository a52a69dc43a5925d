"""Chapter 3 of Shahid's thesis: MNG, k Timesteps and k Momentums (figures 3.3 to 3.6, 3.8, 3.9b and 3.10, table 3.1).

The thesis gives curves without numbers, so that most checks are what its text says of them. The weights are those that
this package ships. Runs on MNIST are of few epochs, where the thesis has 50: each claim's setup says how many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lightning_lopt.claims.annealed import Annealed
from lightning_lopt.claims.base import Check, Claim, Measured, at_least, at_most, below
from lightning_lopt.claims.curves import (
    SETTING,
    adams,
    best_of,
    curves,
    data,
    draw,
    learned,
    means,
    with_options,
)
from lightning_lopt.claims.lab import Lab
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


def _squares(lab: Lab) -> Measured:
    rules = adams({f"Adam {rate:g}": {"lr": rate} for rate in RATES})
    for eta in ETAS:
        rules |= learned(f"MNG {eta:g}", make("mng", eta_min=eta))
    found = curves(lab, rules, "sum-of-squares", lab.pick(1000, 201))
    ours, numbers = found["MNG 0.001"], {}
    for rate in RATES:
        theirs = zip(ours, found[f"Adam {rate:g}"], strict=True)
        above = [float((a >= b)[50:201].sum()) for a, b in theirs]
        numbers[f"steps from 50 to 200 where MNG is not below Adam {rate:g}"] = above
    numbers |= {name: [float(row.sum()) for row in rows] for name, rows in found.items()}
    numbers = {(f"summed loss of {key}" if key in found else key): row for key, row in numbers.items()}
    numbers["MNG 1e-07, last / first loss"] = [float(row[-1] / row[0]) for row in found["MNG 1e-07"]]
    numbers |= {f"last loss of {name}": [float(row[-1]) for row in found[name]] for name in ("MNG 0.001", "Adam 0.1")}
    return Measured(numbers, data(found))


def _signs(lab: Lab) -> Measured:
    rules: dict[str, tuple[UpdateRule, SETTING]] = {}
    for eta in ETAS[:3]:
        rules |= learned(f"MNG {eta:g}", make("mng", eta_min=eta))
        rules |= learned(f"signs {eta:g}", make("mng", eta_min=eta, sign_only=True))
    found = curves(lab, rules, "sum-of-squares", lab.pick(1000, 200))
    return Measured(means(found) | means(found, "last loss", last=1), data(found))


# --- Figure 3.5: Rosenbrock; figure 3.6: MNIST ---


def _rosenbrock(lab: Lab) -> Measured:
    rules = adams({f"Adam {rate:g}": {"lr": rate} for rate in RATES})
    for eta in (1e-3, 1e-4, 1e-5):
        rules |= learned(f"MNG {eta:g}", make("mng", eta_min=eta))
    found = curves(lab, rules, "rosenbrock-thesis", lab.pick(3000, 300), starts=16)
    numbers = means(found, "last loss", last=100)
    for kind in ("Adam", "MNG"):
        rows = [row for name, row in numbers.items() if kind in name]
        numbers[f"best last loss of {kind}"] = [min(row) for row in zip(*rows, strict=True)]
    return Measured(numbers, data(found))


def _mnist(lab: Lab) -> Measured:
    rules = adams({f"Adam {rate:g}": {"lr": rate} for rate in RATES})
    for eta in (1e-4, 1e-3, 1e-2):
        rules |= learned(f"MNG {eta:g}", make("mng", k=10, eta_min=eta))
    found = curves(lab, rules, "mnist-mlp", lab.pick(2 * EPOCH, 40))
    numbers = means(found)
    for kind in ("Adam", "MNG"):
        rows = [row for name, row in numbers.items() if kind in name]
        numbers[f"best mean loss of {kind}"] = [min(row) for row in zip(*rows, strict=True)]
    return Measured(numbers, data(found))


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


def _step_map(lab: Lab) -> Measured:
    rule = load_rule("k-timesteps")
    assert isinstance(rule, NormalizedHistory)
    return Measured(table_numbers(rule.step_map(torch.tensor([row for row, _ in TABLE])).tolist()))


def table_numbers(steps: Sequence[float]) -> dict[str, list[float]]:
    """The quantities of table 3.1 from the steps of its rows."""
    numbers = {f"row {i + 1}: {row}": [step] for i, ((row, _), step) in enumerate(zip(TABLE, steps, strict=True))}
    numbers["step of five equal gradients"] = [steps[0]]
    numbers["step of five equal negative gradients"] = [steps[5]]
    numbers["least |step| where three of five agree"] = [min(steps[2], -steps[3])]
    numbers["|step| of no gradient"] = [abs(steps[11])]
    numbers["step of one large new gradient against four small"] = [steps[6]]
    return numbers


# --- Figure 3.8 ---


def _timesteps(lab: Lab) -> Measured:
    rules, bundled = adams({f"Adam {rate:g}": {"lr": rate} for rate in RATES}), load_rule("k-timesteps")
    for eta in (1e-3, 1e-2, 5e-2):
        rules |= learned(f"k Timesteps {eta:g}", with_options(bundled, eta_min=eta))
    found = curves(lab, rules, "mnist-mlp", lab.pick(2 * EPOCH, 40))
    numbers = means(found, "last loss", last=50)
    for kind in ("Adam", "k Timesteps"):
        name = best_of({name: row for name, row in numbers.items() if kind in name})
        numbers[f"best last loss of {kind}"] = numbers[name]
    return Measured(numbers, data(found))


# --- Figure 3.9b ---

HORIZON = 2 * EPOCH
RATE = 0.7  # of the bundled k-momentums, as its card has it; chosen on other runs
LOSSES = (("last", "final"), ("mean", "mean"), ("test", "test_loss"))


def tuned(lab: Lab, name: str, steps: int) -> Trial:
    """Adam ("adam") or RMSProp ("rmsprop") at the learning rate of the lowest last loss on MlpMnist, and its runs."""
    rule = BASELINES[name].make()

    def measure(settings: Sequence[Mapping[str, float]]) -> list[Runs]:
        rates = [torch.tensor(setting["lr"], dtype=torch.float64) for setting in settings]
        return _runs(lab, rule, [{**rule.meta_params(), "lr": rate} for rate in rates], steps)

    return Grid(lowest=-6, highest=-2).search(measure).best["final"]  # extended where the best is at its edge


def _runs(lab: Lab, rule: UpdateRule, settings: Sequence[SETTING], steps: int) -> list[Runs]:
    rates = [float(setting["lr"].detach()) for setting in settings if "lr" in setting]
    key = {"rule": fingerprint(rule), "rates": rates, "steps": steps, "seeds": len(lab.seeds)}

    def compute() -> dict[str, Any]:
        report = lambda done: lab.progress(f"{type(rule).__name__} on mnist-mlp", done, steps)  # noqa: E731
        task = make_task("mnist-mlp")
        found = run(rule, settings, task, steps=steps, seeds=len(lab.seeds), on_step=report)
        return {"runs": [vars(item) for item in found]}

    return [Runs(**row) for row in lab.piece("runs on mnist-mlp", key, compute)["runs"]]


def _momentums(lab: Lab) -> Measured:
    steps, rule = lab.pick(HORIZON, 40), Annealed(load_rule("k-momentums"), "constant")
    trials = {"tuned Adam": tuned(lab, "adam", steps), "tuned RMSProp": tuned(lab, "rmsprop", steps)}
    found = {name: trial.runs for name, trial in trials.items()}
    rate = torch.tensor(RATE, dtype=torch.float64)
    found["k Momentums"] = _runs(lab, rule, [{**rule.meta_params(), "lr": rate}], steps)[0]
    numbers = {f"{what} loss of {name}": getattr(runs, field) for name, runs in found.items() for what, field in LOSSES}
    numbers |= {f"lr of {name}": [trial.hyperparameters["lr"]] for name, trial in trials.items()}
    rows = {name: runs.curve for name, runs in found.items()}
    points = len(rows["k Momentums"][0])
    return Measured(numbers, {"steps": [(i + 0.5) * steps / points for i in range(points)], "curves": rows})


# --- Figure 3.10 ---


def _cifar(lab: Lab) -> Measured:
    rules: dict[str, tuple[UpdateRule, SETTING]] = {}
    for kind, name in (("Adam", "adam"), ("RMSProp", "rmsprop")):
        rule = BASELINES[name].make()
        for lr in (3e-4, 1e-3, 3e-3):
            rate = torch.tensor(lr, dtype=torch.float64)
            rules[f"{kind} {lr:g}"] = rule, {**rule.meta_params(), "lr": rate}
    rate, bundled = torch.tensor(RATE, dtype=torch.float64), load_rule("k-momentums")
    for eta in (5e-5, 1e-3, 1e-2):
        annealed = Annealed(with_options(bundled, eta_min=eta), "constant")
        rules[f"k Momentums {eta:g}"] = annealed, {**annealed.meta_params(), "lr": rate}
    steps = lab.pick(120, 3)
    found = curves(lab, rules, "cifar-convnet-1", steps)
    numbers, best = means(found, "last loss", last=max(steps // 6, 1)), {}
    for kind in ("Adam", "RMSProp", "k Momentums"):
        name = best_of({name: row for name, row in numbers.items() if f"of {kind} " in name})
        numbers[f"best last loss of {kind}"] = numbers[name]
        best[name.removeprefix("last loss of ")] = found[name.removeprefix("last loss of ")]
    return Measured(numbers, data(best))


def _largest(bound: float) -> Check:
    text = f"each of 'step of five equal (negative) gradients' beyond +-{bound:g}"
    names = ("step of five equal gradients", "step of five equal negative gradients")
    return Check(text, names, lambda up, down: min(up) >= bound and max(down) <= -bound, "0.99999666 and -0.99999416")


CLAIMS = (
    Claim(
        id="history-squares",
        source=f"{THESIS}, figure 3.3",
        statement="On a sum of squares MNG (k = 5) outperforms Adam by a significant margin; not with eta_min 1e-7.",
        setup="1,000 dimensions from U(-10, 10), 1,000 steps. MNG's eta_min is 1e-3 where none is named. It is a "
        "floor: in the very end Adam at 0.1 is lower, which the last losses show and no check asks about.",
        measure=_squares,
        checks=(
            *(at_most(f"steps from 50 to 200 where MNG is not below Adam {rate:g}", 0) for rate in RATES),
            *(below("summed loss of MNG 0.001", f"summed loss of Adam {rate:g}") for rate in RATES),
            *(below(f"summed loss of MNG {eta:g}", "summed loss of Adam 0.1") for eta in ETAS[:4] if eta != 1e-3),
            at_least("MNG 1e-07, last / first loss", 0.9, published="no progress at all"),
        ),
        minutes=0.1,
        quick_minutes=0.05,
        plot=partial(draw, "sum of squares"),
    ),
    Claim(
        id="history-signs",
        source=f"{THESIS}, figure 3.4",
        statement="MNG always outperforms its version that sees the gradients' signs alone.",
        setup="As history-squares; the mean loss over the run, in which the first steps weigh most, and the last.",
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
        statement="On Rosenbrock's function Adam tends to perform better than MNG, which circles around the minimum.",
        setup="16 starts from U(-10, 10) per seed; 3,000 steps; geometric mean over starts of the last 100 losses; the "
        "best of three settings each. The function is (1 - x)^2 + 100 (y - x^2)^2, which eq. 2.2 misprints.",
        measure=_rosenbrock,
        checks=(below("best last loss of Adam", "best last loss of MNG", published="Adam better"),),
        minutes=2.0,
        quick_minutes=0.2,
        plot=partial(draw, "Rosenbrock"),
    ),
    Claim(
        id="history-mnist",
        source=f"{THESIS}, figure 3.6",
        statement="On MlpMnist Adam outperforms MNG (k = 10), which gains greatly by eta_min 1e-2 in place of 1e-4.",
        setup=f"2 epochs ({2 * EPOCH} steps of 128; thesis: 50 epochs); mean training loss.",
        measure=_mnist,
        checks=(
            below("best mean loss of Adam", "best mean loss of MNG"),
            below("mean loss of MNG 0.01", "mean loss of MNG 0.0001", factor=0.8, published="boosted greatly"),
        ),
        minutes=2.0,
        quick_minutes=0.2,
        needs=("mnist",),
        plot=partial(draw, "MlpMnist"),
    ),
    Claim(
        id="history-step-map",
        source=f"{THESIS}, table 3.1",
        statement="k Timesteps (k = 5) learns a saturated vote: full steps where three of five gradients agree.",
        setup="The bundled k-timesteps, whose card tells its meta-training: shorter than the thesis's 200,000 steps.",
        measure=_step_map,
        checks=(
            _largest(0.95),
            at_least("least |step| where three of five agree", 0.5, published="0.99"),
            at_least("step of one large new gradient against four small", 0.5, published="0.968"),
            at_most("|step| of no gradient", 0.3, published="0.264"),
        ),
        minutes=0.01,
        quick_minutes=0.01,
        seeds=1,
        quick_seeds=1,
    ),
    Claim(
        id="history-timesteps",
        source=f"{THESIS}, figure 3.8",
        statement="On MlpMnist Adam at its best setting ends below k Timesteps.",
        setup=f"The bundled k-timesteps (k = 5; thesis: 100) with three eta_min, {2 * EPOCH} steps of 128 (2 epochs; "
        "thesis: 50); training loss of the last 50 steps.",
        measure=_timesteps,
        checks=(below("best last loss of Adam", "best last loss of k Timesteps", published="Adam clearly better"),),
        minutes=3.0,
        quick_minutes=0.2,
        needs=("mnist",),
        plot=partial(draw, "MlpMnist"),
    ),
    Claim(
        id="history-momentums",
        source=f"{THESIS}, figure 3.9b",
        statement="Trained k Momentums ends below Adam and RMSProp at their best settings on MlpMnist.",
        setup=f"The bundled k-momentums at learning rate {RATE:g}; {HORIZON} steps of 128 (2 epochs; thesis: 50). "
        "Adam's and RMSProp's learning rates are tuned in half-decades on the very runs that are compared; all are "
        "constant. Mean loss of the last 50 steps.",
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
        statement="On ConvCifar 0 k Momentums, which never saw it, outperforms RMSProp, and Adam takes the lead.",
        setup="cifar-convnet-1 (thesis: ConvCifar 0), 120 steps of 128 (thesis: 500 epochs). Best of three settings: "
        f"for the bundled k-momentums at learning rate {RATE:g} of eta_min, else of learning rates. Training loss of "
        "the last 20 steps.",
        measure=_cifar,
        checks=(
            below("best last loss of k Momentums", "best last loss of RMSProp"),
            below("best last loss of Adam", "best last loss of k Momentums", published="slightly better at the end"),
        ),
        minutes=12.0,
        quick_minutes=0.5,
        seeds=2,
        quick_seeds=1,
        needs=("cifar10",),
        plot=partial(draw, "ConvCifar 1, each at its best"),
    ),
)
