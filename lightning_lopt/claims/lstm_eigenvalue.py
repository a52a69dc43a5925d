"""What the eigenvalues contribute to L2O-DMD: ablations, other ranks and windows, and the paper's own window.

Losses are training losses before each update, clamped to twice the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.claims.claim import CONTROL, OWN, PAPER, Claim, Measurement, at_least, at_most, below
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.lstm import DMD, LEARNED, QUICK_STEPS, STEPS, last_losses, with_rule
from lightning_lopt.claims.multi_seed import initial_weights, meta_train_seeds
from lightning_lopt.evaluation.runs import run
from lightning_lopt.hub import load_rule
from lightning_lopt.meta.estimators import TruncatedBackprop
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.rules import StepContext, make
from lightning_lopt.rules.lstm import LSTMRule
from lightning_lopt.tasks import make as make_task

FEATURES: dict[str, Callable[[Tensor, StepContext], Tensor]] = {
    "eigenvalue": lambda shared, context: shared,
    "zero": lambda shared, context: torch.zeros_like(shared),
    "one": lambda shared, context: torch.ones_like(shared),
    "step counter": lambda shared, context: torch.zeros_like(shared) + context.step / 100,
}
SMALL = {"image_size": 8, "hidden": (8,)}


class ReplacedEigenvalue(LSTMRule):
    """An LSTM with another input in place of the leading eigenvalue.

    Args:
        rule: gives the configuration and weights.
        feature: the input, one of `FEATURES`.
    """

    def __init__(self, rule: LSTMRule, feature: str) -> None:
        super().__init__(rule.config, kind=rule.kind)
        self.load_state_dict(rule.state_dict())
        self.feature = feature

    def shared_context(
        self,
        meta_params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        states: Mapping[str, Any],
        params: Mapping[str, Tensor],
        context: StepContext,
        *,
        in_place: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The replacement, and the rule's snapshot windows."""
        shared, pushed = super().shared_context(meta_params, grads, states, params, context, in_place=in_place)
        return FEATURES[self.feature](shared, context), pushed


def _ablation(experiment: Experiment) -> Measurement:
    """Replace the eigenvalue of the bundled rules, and of LSTMs that are meta-trained with the replacement."""
    numbers: dict[str, list[float]] = {}
    for name in LEARNED[1:]:
        bundled = load_rule(name)
        assert isinstance(bundled, LSTMRule)
        for feature in FEATURES:
            label = f"{name}, shown {feature}"
            rule = ReplacedEigenvalue(bundled, feature)
            optimizers = with_rule(rule, experiment.pick(STEPS, QUICK_STEPS), feature=feature)
            (numbers[label],) = last_losses(experiment, label, "mnist-l2l-batch16", optimizers)
    for feature in FEATURES:
        fresh = make("lstm_dmd", num_snapshots=10, loss_scale=1.0)
        assert isinstance(fresh, LSTMRule)
        found = _retrained(experiment, ReplacedEigenvalue(fresh, feature), feature)
        numbers |= {f"meta-trained on {feature}{where}": row for where, row in found.items()}
    return Measurement(numbers)


def _retrained(experiment: Experiment, rule: LSTMRule, label: str) -> dict[str, list[float]]:
    """Last losses of LSTMs after a short meta-training, for each meta-seed: on their own task and at batch size 16."""
    # Cache keys contain the task's name, so put the label there.
    task = make_task("mnist-l2l", **SMALL)
    task = dataclasses.replace(task, name=f"{task.name}, {label}")
    options: dict[str, Any] = {
        "num_steps": experiment.pick(120, 3),
        "lr": 3e-3,
        "objective": "log",
        "schedule": "cosine",
    }
    estimator = TruncatedBackprop(num_runs=1, truncation=20, horizon=Horizon(100))
    (kept,) = meta_train_seeds(experiment, label, rule, task, estimator, normalize="clip", **options)
    key: dict[str, Any] = {"config": rule.config.to_dict(), "label": label, "options": repr(options)}
    key |= {"seeds": list(experiment.seeds), "runs": experiment.pick(8, 2)}

    def compute() -> dict[str, Any]:
        steps = experiment.pick(STEPS, QUICK_STEPS)
        found = {}
        for where, name in (("", "mnist-l2l"), (", batch 16", "mnist-l2l-batch16")):
            report = experiment.reporter(f"{label}{where}", steps)
            seeds = experiment.pick(8, 2)
            runs = run(rule, kept, make_task(name, **SMALL), steps=steps, seeds=seeds, on_step=report)
            found[where] = [each.average("final") for each in runs]
        return found

    return experiment.cached("retrained", key, compute)


# --- Rank and window ---

WINDOWS = [(1, 5), (1, 20), (3, 5), (3, 20)]


def _windows(experiment: Experiment) -> Measurement:
    """Meta-train LSTMs for each rank R and window m."""
    numbers: dict[str, list[float]] = {}
    for rank, num_snapshots in WINDOWS:
        rule = make("lstm_dmd", rank=rank, num_snapshots=num_snapshots, loss_scale=1.0)
        assert isinstance(rule, LSTMRule)
        label = f"R = {rank}, m = {num_snapshots}"
        numbers |= {f"{label}{where}": row for where, row in _retrained(experiment, rule, label).items()}
    return Measurement(numbers)


# --- The paper's own window ---


def _literal(experiment: Experiment) -> Measurement:
    """How much meta-training on runs of 100 steps changes the network's input weights for the eigenvalue."""
    numbers: dict[str, list[float]] = {}
    task = make_task("mnist-dmd", **SMALL)
    estimator = TruncatedBackprop(num_runs=1, truncation=20, horizon=Horizon(100), stagger=False)
    for num_snapshots in (100, 20):
        label = f", m = {num_snapshots}"
        rule = make("lstm_dmd", num_snapshots=num_snapshots, loss_scale=1.0)
        assert isinstance(rule, LSTMRule)
        options: dict[str, Any] = {"num_steps": experiment.pick(25, 5), "lr": 3e-3, "normalize": "clip"}
        (kept,) = meta_train_seeds(experiment, label[2:], rule, task, estimator, **options)
        starts = initial_weights(rule, experiment.seeds)["w_input0"]
        moved = [row["w_input0"] - start for row, start in zip(kept, starts, strict=True)]
        numbers[f"{BY_GRADIENT}{label}"] = [float(change[:2].norm()) for change in moved]
        numbers[f"{BY_EIGENVALUE}{label}"] = [float(change[2:].norm()) for change in moved]
        numbers[f"{FIRST}{label}"] = [_first_shown(rule)]
    return Measurement(numbers)


def _first_shown(rule: LSTMRule) -> float:
    """The first step, counted from 1, at which the rule sees a nonzero eigenvalue; 1000 if there is none."""
    states: dict[str, Any] = {"x": rule.init_state(torch.zeros(3))}
    for step in range(1, 1000):
        param = {"x": 0.9**step * torch.tensor([1.0, 2.0, 3.0])}
        context = StepContext(torch.tensor(float(step)), torch.tensor(1.0))
        shared, states = rule.shared_context(rule.meta_params(), {}, states, param, context)
        if float(shared) != 0:
            return step
    return 1000


BY_GRADIENT = "change of the gradient's input weights"
BY_EIGENVALUE = "change of the eigenvalue's input weights"
FIRST = "first step with an eigenvalue"

CLAIMS = (
    Claim(
        id="dmd-literal",
        source=f"{DMD}, section 5.1 and Table 1: (R, m) = (1, 100) and 100 inner steps",
        title="the paper's window m = 100 on an MLP with 8 hidden units and 8 x 8 MNIST",
        in_paper="An MLP with 8 hidden units on MNIST, 1,000 runs of 100 steps, truncated to 20, (R, m) = (1, 100).",
        statement="Meta-training teaches the network what to do with the eigenvalue.",
        setup="The paper's recipe except for its size: 5 runs of 100 steps, truncated to 20, on 8 x 8 MNIST, a number "
        "per meta-seed; eigenvalues are 0 until there are m + 1 snapshots. For comparison, m = 20.",
        measure=_literal,
        checks=(
            at_least(f"{BY_EIGENVALUE}, m = 100", 1e-4),
            at_most(f"{FIRST}, m = 100", 100, exact=True),
            # The same checks where the window is short show that they could hold.
            at_least(f"{BY_EIGENVALUE}, m = 20", 1e-4, kind=CONTROL),
            at_most(f"{FIRST}, m = 20", 100, exact=True, kind=CONTROL),
            at_least(f"{BY_GRADIENT}, m = 100", 1e-4, kind=CONTROL),
        ),
        minutes=1,
        quick_minutes=0.1,
        seeds=5,
        needs=("mnist",),
    ),
    Claim(
        id="dmd-eigenvalue",
        source=f"{DMD}, section 5: the eigenvalues are what helps",
        title="the eigenvalue replaced: bundled rules on MNIST-Batch, and LSTMs meta-trained on 8 x 8 MNIST",
        in_paper="No ablation; the paper compares L2O-DMD with L2O as a whole (Table 1) and says so in words.",
        statement="An LSTM that sees the leading eigenvalue does better than one that sees a constant or a clock.",
        setup="Bundled weights on MNIST-Batch with the eigenvalue replaced; and LSTMs meta-trained with each "
        "replacement for 120 steps of 20 on 8 x 8 MNIST, 8 hidden units, a number per meta-seed: R = 1, m = 10, raw "
        "snapshots with the loss. The step counter is t / 100.",
        measure=_ablation,
        checks=tuple(
            below(f"{shown}eigenvalue", f"{shown}{feature}", kind=kind)
            for shown, kind in (
                ("meta-trained on ", PAPER),
                ("lstm-dmd, shown ", PAPER),
                ("lstm-dmd-robust, shown ", OWN),
            )
            for feature in list(FEATURES)[1:]
        ),
        minutes=7,
        quick_minutes=0.2,
        seeds=5,
        needs=("mnist",),
    ),
    Claim(
        id="dmd-window",
        source=f"{DMD}, Figure 4",
        title="Figure 4's form: m of 5 and 20, R of 1 and 3, on an MLP with 8 hidden units and 8 x 8 MNIST",
        in_paper="MNIST-Batch at full size with several (R, m), meta-trained as for Table 1; curves, no numbers.",
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
        quick_minutes=0.2,
        seeds=5,
        needs=("mnist",),
    ),
)
