"""The evidence for the LSTM rules: L2O-DMD's Table 1, its eigenvalues taken away, its windows, long runs.

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

from lightning_lopt.evaluation.baselines import HandDesigned
from lightning_lopt.evaluation.claims.base import Check, Claim, Measured, at_most, below
from lightning_lopt.evaluation.claims.lab import Lab
from lightning_lopt.evaluation.claims.together import train_together
from lightning_lopt.evaluation.compare import Progress, fingerprint
from lightning_lopt.evaluation.runs import run
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
    rule = make("lstm", hidden_size=1, num_layers=1, out_scale=0.0, nominal_stepsize=stepsize)
    # Weights that do nothing, but part of the key by which pieces are found again.
    rule.load_state_dict({name: torch.zeros_like(value) for name, value in rule.state_dict().items()})
    return rule


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
        found = _retrained(lab, Altered(fresh, feature), feature)
        numbers |= {f"meta-trained on {feature}{where}": row for where, row in found.items()}
    return Measured(numbers)


def _retrained(lab: Lab, rule: LSTMRule, label: str) -> dict[str, list[float]]:
    """Mean last losses of LSTMs of several meta-seeds, meta-trained in short: on their own task and at batch 16."""
    # The label is in the task's name, since pieces are told apart by it.
    task = make_task("mnist-l2l", **SMALL)
    task = dataclasses.replace(task, name=f"{task.name}, {label}")
    options: dict[str, Any] = {"num_steps": lab.pick(120, 3), "lr": 3e-3, "objective": "log", "schedule": "cosine"}
    estimator = TruncatedBackprop(1, 20, Horizon(100))
    (kept,) = train_together(lab, label, rule, task, estimator, normalize="clip", **options)
    key: dict[str, Any] = {"config": rule.config.to_dict(), "label": label, "options": repr(options)}
    key |= {"seeds": list(lab.seeds), "runs": lab.pick(8, 2)}

    def compute() -> dict[str, Any]:
        steps, found = lab.pick(STEPS, QUICK_STEPS), {}
        for where, name in (("", "mnist-l2l"), (", batch 16", "mnist-l2l-batch16")):
            lab.progress(f"{label}{where}", 0, 1)
            runs = run(rule, kept, make_task(name, **SMALL), steps=steps, seeds=lab.pick(8, 2))
            found[where] = [each.average("final") for each in runs]
        return found

    return lab.piece("retrained", key, compute)


# --- Rank and window ---

WINDOWS = [(1, 5), (1, 20), (3, 5), (3, 20)]


def _windows(lab: Lab) -> Measured:
    """(R, m), each with LSTMs of its own."""
    numbers: dict[str, list[float]] = {}
    for rank, num_snapshots in WINDOWS:
        rule = make("lstm_dmd", rank=rank, num_snapshots=num_snapshots, loss_scale=1.0)
        assert isinstance(rule, LSTMRule)
        label = f"R = {rank}, m = {num_snapshots}"
        numbers |= {f"{label}{where}": row for where, row in _retrained(lab, rule, label).items()}
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
        minutes=12,
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
        "120 steps of 20 on 8 x 8 MNIST, 8 hidden units, each on its own feature, a number per meta-seed: R = 1, "
        "m = 10, raw snapshots with the loss. The step counter is t / 100.",
        measure=_ablation,
        checks=tuple(
            below(f"{kind}eigenvalue", f"{kind}{feature}")
            for kind in ("meta-trained on ", "lstm-dmd, shown ", "lstm-dmd-robust, shown ")
            for feature in list(FEATURES)[1:]
        ),
        minutes=7,
        quick_minutes=1,
        seeds=5,
        needs=("mnist",),
    ),
    Claim(
        id="dmd-window",
        source=f"{DMD}, Figure 4",
        statement="More eigenvalues and a longer window help on MNIST-Batch.",
        setup="LSTMs meta-trained as in dmd-eigenvalue, a number per meta-seed, mean of the last losses of 300 steps "
        "at batch 16.",
        measure=_windows,
        checks=(
            below("R = 1, m = 20, batch 16", "R = 1, m = 5, batch 16"),
            below("R = 3, m = 20, batch 16", "R = 3, m = 5, batch 16"),
            below("R = 3, m = 5, batch 16", "R = 1, m = 5, batch 16"),
            below("R = 3, m = 20, batch 16", "R = 1, m = 20, batch 16"),
        ),
        minutes=4,
        quick_minutes=1,
        seeds=5,
        needs=("mnist",),
    ),
)
