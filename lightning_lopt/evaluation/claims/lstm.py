"""The evidence for the LSTM rules: L2O-DMD's Table 1, its eigenvalues taken away, long runs, Andrychowicz's quadratics.

Weights are those that this package ships, unless a claim says that it meta-trains. Losses are training losses before
each update, at most twice the first.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.evaluation.baselines import SGDM, Adam, HandDesigned, RMSProp, SGDState
from lightning_lopt.evaluation.claims.base import Check, Claim, Measured, at_most, below
from lightning_lopt.evaluation.claims.curves import losses
from lightning_lopt.evaluation.claims.lab import Lab
from lightning_lopt.evaluation.claims.training import meta_train
from lightning_lopt.evaluation.compare import Progress, fingerprint
from lightning_lopt.evaluation.runs import Runs, run
from lightning_lopt.hub import load_rule
from lightning_lopt.meta.estimators import TruncatedBackprop
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.optimizer import RuleOptimizer
from lightning_lopt.rules import StepContext, UpdateRule, make
from lightning_lopt.rules.lstm import LSTMRule
from lightning_lopt.tasks import Task
from lightning_lopt.tasks import make as make_task

L2O = "Andrychowicz et al. 2016 (arXiv 1606.04474)"
DMD = "Simanek, Vasata, Kordik 2022 (L2O-DMD, arXiv 2211.16268)"
TASKS = {
    "MNIST-1L": "mnist-l2l",
    "MNIST-2L": "mnist-l2l-2layer",
    "MNIST-Batch": "mnist-l2l-batch16",
    "MNIST-RELU": "mnist-l2l-relu",
    "FashionMNIST-1L": "fashion-l2l",
    "CIFAR10-1L": "cifar-l2l",
}
PUBLISHED = {  # L2O, L2O-DMD and Adam 0.01: means
    "MNIST-1L": (0.55, 0.22, 0.29),
    "MNIST-2L": (1.16, 0.26, 0.26),
    "MNIST-Batch": (1.39, 0.61, 0.28),
    "MNIST-RELU": (1.17, 0.44, 0.25),
    "FashionMNIST-1L": (1.69, 0.44, 0.47),
    "CIFAR10-1L": (2.2, 2.01, 2.02),
}
LEARNED = ("lstm", "lstm-dmd", "lstm-dmd-robust")
DATA = ("mnist", "fashion_mnist", "cifar10")
RATES = [10 ** (-2 + i / 4) for i in range(-5, 4)]  # 5.6e-4 to 5.6e-2, with 1e-2
STEPS, QUICK_STEPS, LAST = 300, 30, 10
ALONE = "its nominal term alone"
WORST = "highest mean loss of a later 1 % / first loss"
Setting = Mapping[str, Tensor]
Optimizers = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def descend(task: Task, steps: int, seed: int, make_optimizer: Optimizers, report: Progress | None = None) -> Tensor:
    """(steps,) float64 training losses before each update, at most twice the first, of an optimizer as users have it.

    Args:
        task: whose start and batches follow from `seed` alone.
        steps: of the run.
        seed: of the run.
        make_optimizer: from a list of parameters.
        report: told now and then of the steps that are done.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    start = task.init(generator)
    params = {name: torch.nn.Parameter(value) for name, value in start.params.items()}
    optimizer = make_optimizer(list(params.values()))
    for step in range(steps):
        batch = task.batch(generator, start.constants)
        grads, loss = task.grad_and_value({name: param.detach() for name, param in params.items()}, batch)
        for name, param in params.items():
            param.grad = grads[name]
        optimizer.step(loss=loss) if isinstance(optimizer, RuleOptimizer) else optimizer.step()
        rows.append(loss.detach().double())
        if report is not None and step % 20 == 0:
            report("", step, steps)
    found = torch.stack(rows)
    return torch.nan_to_num(found, nan=math.inf).clamp(max=2 * float(found[0]))


def last_losses(lab: Lab, label: str, task: str, optimizers: Mapping[str, Optimizers]) -> list[list[float]]:
    """For each optimizer, the mean over the last 10 losses of each seed; run by run kept.

    Args:
        lab: keeps them.
        label: for the progress report.
        task: its name.
        optimizers: by what tells one from all others.
    """
    steps = lab.pick(STEPS, QUICK_STEPS)
    found: list[list[float]] = []
    for name, make_optimizer in optimizers.items():
        found.append([])
        for seed in lab.seeds:

            def compute(make_optimizer: Optimizers = make_optimizer, seed: int = seed) -> dict[str, Any]:
                return {"last": float(descend(make_task(task), steps, seed, make_optimizer)[-LAST:].mean())}

            lab.progress(f"{label} on {task}", seed, len(lab.seeds))
            key = {"optimizer": name, "task": task, "steps": steps, "seed": seed}
            found[-1].append(lab.piece("last losses", key, compute)["last"])
    return found


def learned(rule: UpdateRule, **key: Any) -> dict[str, Optimizers]:
    """A rule, for `last_losses`; `key` is what tells it apart beside its first steps."""
    return {f"{fingerprint(rule)} {key}": lambda params: RuleOptimizer(params, rule)}


def adams() -> dict[str, Optimizers]:
    """Adam of torch at all rates, for `last_losses`."""
    return {f"Adam {rate:.3g}": partial(torch.optim.Adam, lr=rate) for rate in RATES}


def rates_of(rule: HandDesigned, rates: Sequence[float]) -> list[Setting]:
    """The rule's hyper-parameters at several learning rates."""
    return [{**rule.meta_params(), "lr": torch.tensor(rate, dtype=torch.float64)} for rate in rates]


def best(rows: Sequence[Sequence[float]]) -> int:
    """The row with the lowest mean."""
    return min(range(len(rows)), key=lambda i: statistics.fmean(rows[i]))


# --- Table 1 ---


def _table(lab: Lab) -> Measured:
    numbers: dict[str, list[float]] = {}
    for label, task in TASKS.items():
        for name in LEARNED:
            (numbers[f"{label}: {name}"],) = last_losses(lab, name, task, learned(load_rule(name)))
        (numbers[f"{label}: {ALONE}"],) = last_losses(lab, ALONE, task, learned(nominal_alone()))
        rows = last_losses(lab, "Adam", task, adams())
        numbers[f"{label}: Adam 0.01"] = rows[RATES.index(1e-2)]
        numbers[f"{label}: tuned Adam"] = rows[best(rows)]
        numbers[f"{label}: lr of tuned Adam"] = [RATES[best(rows)]]
    return Measured(numbers, {"table": {name: summary(row) for name, row in numbers.items()}})


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation, median and interquartile range."""
    if len(values) < 2:
        return {"mean": values[0], "std": 0.0, "median": values[0], "iqr": 0.0}
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    spread = {"std": statistics.stdev(values), "iqr": quarters[2] - quarters[0]}
    return {"mean": statistics.fmean(values), "median": quarters[1], **spread}


def _wins(low: str, high: str, least: int) -> Check:
    names = [f"{label}: {name}" for label in TASKS for name in (low, high)]

    def holds(*rows: list[float]) -> bool:
        medians = [statistics.median(row) for row in rows]
        return sum(a < b for a, b in zip(medians[::2], medians[1::2], strict=True)) >= least

    return Check(f"{low} below {high} on at least {least} of {len(TASKS)} tasks", tuple(names), holds)


def nominal_alone() -> UpdateRule:
    """What lstm-dmd-robust begins as: its nominal term, without its network."""
    stepsize = load_rule("lstm-dmd-robust").config.to_dict()["nominal_stepsize"]
    return make("lstm", hidden_size=1, num_layers=1, out_scale=0.0, nominal_stepsize=stepsize)


# --- Long runs ---


def _long(lab: Lab) -> Measured:
    steps, numbers, curves = lab.pick(10_000, 100), {}, {}
    rule = load_rule("lstm-dmd-robust")
    for label, name in TASKS.items():

        def report(_: str, done: int, total: int, label: str = label) -> None:
            lab.progress(label, done, total)

        def compute(name: str = name, report: Progress = report) -> dict[str, Any]:
            found = descend(make_task(name), steps, 0, lambda params: RuleOptimizer(params, rule), report)
            return {"first": float(found[0]), "stretches": [float(row.mean()) for row in found.tensor_split(100)]}

        found = lab.piece("long run", {"rule": fingerprint(rule), "task": name, "steps": steps}, compute)
        numbers[f"{label}: {WORST}"] = [max(found["stretches"][1:]) / found["first"]]
        numbers[f"{label}: last loss"] = found["stretches"][-1:]
        curves[label] = found["stretches"]
    return Measured(numbers, {"stretches": curves})


# --- What the eigenvalue is worth ---

FEATURES: dict[str, Callable[[Tensor, StepContext], Tensor]] = {
    "eigenvalue": lambda shared, context: shared,
    "zero": lambda shared, context: torch.zeros_like(shared),
    "one": lambda shared, context: torch.ones_like(shared),
    "step counter": lambda shared, context: torch.zeros_like(shared) + context.step / 100,
}
SMALL = {"image_size": 8, "hidden": (8,)}


class Altered(LSTMRule):
    """An LSTM that is shown something else in place of its eigenvalues.

    Args:
        rule: whose configuration and weights it has.
        feature: one of `FEATURES`.
    """

    def __init__(self, rule: LSTMRule, feature: str) -> None:
        super().__init__(rule.config, kind=rule.kind)
        self.load_state_dict(rule.state_dict())
        self.feature = feature

    def share(
        self,
        meta_params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        states: Mapping[str, Any],
        params: Mapping[str, Tensor],
        context: StepContext,
        *,
        in_place: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The feature, and the windows as ever."""
        shared, pushed = super().share(meta_params, grads, states, params, context, in_place=in_place)
        return FEATURES[self.feature](shared, context), pushed


def _ablation(lab: Lab) -> Measured:
    """Shipped weights that are shown something else; and LSTMs that were meta-trained on something else."""
    numbers: dict[str, list[float]] = {}
    for name in LEARNED[1:]:
        shipped = load_rule(name)
        assert isinstance(shipped, LSTMRule)
        for feature in FEATURES:
            rule, label = Altered(shipped, feature), f"{name}, shown {feature}"
            (numbers[label],) = last_losses(lab, label, "mnist-l2l-batch16", learned(rule, feature=feature))
    for feature in FEATURES:
        fresh = make("lstm_dmd", num_snapshots=10, loss_scale=1.0)
        assert isinstance(fresh, LSTMRule)
        numbers[f"meta-trained on {feature}"] = [_retrained(lab, fresh, feature, seed) for seed in lab.seeds]
    return Measured(numbers)


def _retrained(lab: Lab, fresh: LSTMRule, feature: str, seed: int) -> float:
    """Mean last loss of an LSTM that was meta-trained, in short, on a feature."""
    task = make_task("mnist-l2l", **SMALL)
    # The feature is in the name, since pieces are told apart by it.
    named = dataclasses.replace(task, name=f"{task.name}, {feature}")
    rule, num_steps, runs = Altered(fresh, feature), lab.pick(150, 3), lab.pick(16, 2)
    estimator = TruncatedBackprop(4, 20, Horizon(100))
    options = {"objective": "log", "second_order": False, "lr": 3e-3}
    trained = meta_train(
        lab, f"{feature}, {seed}", rule, [named], estimator, num_steps=num_steps, every=num_steps, seed=seed, **options
    )
    theta = trained.meta_params[-1]
    key = {"start": fingerprint(rule), "feature": feature, "seed": seed, "num_steps": num_steps, "runs": runs}

    def compute() -> dict[str, Any]:
        (found,) = run(rule, [theta], task, steps=lab.pick(STEPS, QUICK_STEPS), seeds=runs)
        return vars(found)

    return Runs(**lab.piece("retrained", key, compute)).average("final")


# --- Andrychowicz's quadratics ---


class NAG(SGDM):
    """`torch.optim.SGD(nesterov=True)`: b <- mu b + g, p <- p - lr (g + mu b)."""

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: SGDState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, SGDState]:
        """One step."""
        _, new = super().update(meta_params, grad, state, param, context)
        ahead = grad + meta_params["momentum"].to(grad) * new.momentum_buffer
        return -self.learning_rate(meta_params, context).to(grad) * ahead, new


HAND_DESIGNED: dict[str, HandDesigned] = {"Adam": Adam(), "RMSProp": RMSProp(), "SGD": SGDM(), "NAG": NAG()}
GRID = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
SUMMED = "summed loss of"


def _quadratic(lab: Lab) -> Measured:
    problems, numbers = lab.pick(100, 20), {}

    def summed(rule: UpdateRule, settings: Sequence[Setting]) -> list[float]:
        """Per setting: summed over 100 steps, mean over problems."""
        found: list[float] = losses(rule, settings, "quadratic", 100, problems, seed=1).sum(-1).mean(-1).tolist()
        return found

    rule = make("lstm", preprocessing="none", out_scale=1.0)
    rows = []
    for seed in lab.seeds:
        estimator = TruncatedBackprop(64, 20, Horizon(100), stagger=False)
        options = {"objective": "raw", "second_order": False, "lr": 1e-2}
        num_steps = lab.pick(1200, 10)
        trained = meta_train(
            lab, f"LSTM {seed}", rule, [make_task("quadratic")], estimator,
            num_steps=num_steps, every=num_steps, seed=seed, **options,
        )  # fmt: skip
        rows += summed(rule, [trained.meta_params[-1]])
    numbers[f"{SUMMED} the LSTM"] = rows
    for name, baseline in HAND_DESIGNED.items():
        found = summed(baseline, rates_of(baseline, GRID))
        numbers[f"{SUMMED} {name}"] = [min(found)]
        numbers[f"lr of {name}"] = [GRID[found.index(min(found))]]
    return Measured(numbers)


CLAIMS = (
    Claim(
        id="dmd-table1",
        source=f"{DMD}, Table 1",
        statement="L2O-DMD(1, 100), meta-trained on a small MNIST net, ends far below the plain LSTM on all of six "
        "tasks, and at or below Adam 0.01 on four of them.",
        setup="The bundled lstm and lstm-dmd, of 100 runs of meta-training in place of 1,000, lstm-dmd with m = 20: at "
        "the paper's m = 100 all eigenvalues of meta-training are 0. lstm-dmd-robust is this package's own. Mean of "
        "the last 10 of 300 losses; 5 runs in place of 30. Adam's rate is tuned in quarter-decades on the very runs.",
        measure=_table,
        checks=(
            *(
                below(f"{label}: lstm-dmd", f"{label}: lstm", published="{1} against {0}".format(*row))
                for label, row in PUBLISHED.items()
            ),
            *(
                below(f"{label}: lstm-dmd", f"{label}: Adam 0.01", published="{1} against {2}".format(*row))
                for label, row in PUBLISHED.items()
                if row[1] <= row[2]
            ),
            *(below(f"{label}: lstm-dmd-robust", f"{label}: lstm") for label in TASKS),
            _wins("lstm-dmd-robust", "tuned Adam", 3),
        ),
        minutes=30,
        quick_minutes=1,
        seeds=5,
        needs=DATA,
    ),
    Claim(
        id="dmd-long",
        source="this package's own rule, stabilized as in Harrison et al. 2022 (STAR, arXiv 2209.11208)",
        statement="lstm-dmd-robust does not diverge in 10,000 steps on any of L2O-DMD's six tasks.",
        setup="One run each, of a rule meta-trained on runs of a few hundred steps. Losses are means over stretches of "
        "1 % of the run, from the second on.",
        measure=_long,
        checks=tuple(at_most(f"{label}: {WORST}", 1.0) for label in TASKS),
        minutes=20,
        quick_minutes=0.3,
        seeds=1,
        quick_seeds=1,
        needs=DATA,
    ),
    Claim(
        id="dmd-eigenvalue",
        source=f"{DMD}, section 5: that the eigenvalues are what helps",
        statement="An LSTM that sees the leading eigenvalue does better than one that sees a constant or a clock.",
        setup="Shipped weights on MNIST-Batch, shown something else than the eigenvalue; and LSTMs meta-trained for "
        "150 steps on 8 x 8 MNIST, 8 hidden units, each on its own feature: R = 1, m = 10, raw snapshots with the "
        "loss. The step counter is t / 100.",
        measure=_ablation,
        checks=tuple(
            below(f"{kind}eigenvalue", f"{kind}{feature}")
            for kind in ("meta-trained on ", "lstm-dmd, shown ", "lstm-dmd-robust, shown ")
            for feature in list(FEATURES)[1:]
        ),
        minutes=15,
        quick_minutes=1,
        seeds=3,
        needs=("mnist",),
    ),
    Claim(
        id="l2l-quadratic",
        source=f"{L2O}, section 3.1",
        statement="On 10-dimensional quadratics the LSTM ends below tuned Adam, RMSProp, SGD and NAG.",
        setup="Meta-trained for 1,200 steps of 20 on 64 problems at a time, gradients as they are; the loss summed "
        "over 100 steps, mean over 100 other problems; a number per meta-seed. A PyTorch port prints 49.67. Learning "
        "rates of the others are tuned in half-decades on the very problems.",
        measure=_quadratic,
        checks=(
            at_most(f"{SUMMED} the LSTM", 55.0, published="49.67 (the port)"),
            *(below(f"{SUMMED} the LSTM", f"{SUMMED} {name}") for name in HAND_DESIGNED),
        ),
        minutes=3,
        quick_minutes=0.3,
        seeds=2,
        quick_seeds=1,
    ),
)
