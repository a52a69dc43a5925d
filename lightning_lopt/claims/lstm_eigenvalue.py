"""What the eigenvalues of L2O-DMD are worth to its LSTM: taken away, replaced, of other ranks and windows, the paper's.

Losses are training losses before each update, at most twice the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.claims.base import Claim, Measured, at_least, at_most, below
from lightning_lopt.claims.lab import Lab
from lightning_lopt.claims.lstm import DMD, LEARNED, QUICK_STEPS, STEPS, last_losses, learned
from lightning_lopt.claims.together import fresh, train_together
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
        """The feature, and the windows as ever."""
        shared, pushed = super().shared_context(meta_params, grads, states, params, context, in_place=in_place)
        return FEATURES[self.feature](shared, context), pushed


def _ablation(lab: Lab) -> Measured:
    """Shipped weights that are shown something else; and LSTMs that were meta-trained on something else."""
    numbers: dict[str, list[float]] = {}
    for name in LEARNED[1:]:
        shipped = load_rule(name)
        assert isinstance(shipped, LSTMRule)
        for feature in FEATURES:
            rule, label = Altered(shipped, feature), f"{name}, shown {feature}"
            optimizers = learned(rule, lab.pick(STEPS, QUICK_STEPS), feature=feature)
            (numbers[label],) = last_losses(lab, label, "mnist-l2l-batch16", optimizers)
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


# --- The paper's window, to the letter ---


def _literal(lab: Lab) -> Measured:
    """What meta-training on runs of 100 steps does to the weights by which the network reads the eigenvalue."""
    numbers: dict[str, list[float]] = {}
    task, estimator = make_task("mnist-dmd", **SMALL), TruncatedBackprop(1, 20, Horizon(100), stagger=False)
    for num_snapshots in (100, 20):
        rule, label = make("lstm_dmd", num_snapshots=num_snapshots, loss_scale=1.0), f", m = {num_snapshots}"
        assert isinstance(rule, LSTMRule)
        options: dict[str, Any] = {"num_steps": lab.pick(25, 5), "lr": 3e-3, "normalize": "clip"}
        (kept,) = train_together(lab, label[2:], rule, task, estimator, **options)
        moved = (row["w_input0"] - start for row, start in zip(kept, fresh(rule, lab.seeds)["w_input0"], strict=True))
        of_gradient, of_eigenvalue = zip(*((float(m[:2].norm()), float(m[2:].norm())) for m in moved), strict=True)
        numbers[f"{BY_GRADIENT}{label}"], numbers[f"{BY_EIGENVALUE}{label}"] = list(of_gradient), list(of_eigenvalue)
        numbers[f"{FIRST}{label}"] = [_first_shown(rule)]
    return Measured(numbers)


def _first_shown(rule: LSTMRule) -> float:
    """The number of the first step, counted from 1, at which the rule sees an eigenvalue that is not 0."""
    states: dict[str, Any] = {"x": rule.init_state(torch.zeros(3))}
    for step in range(1, 1000):
        param, context = {"x": 0.9**step * torch.tensor([1.0, 2.0, 3.0])}, StepContext(torch.tensor(float(step)), ONE)
        shared, states = rule.shared_context(rule.meta_params(), {}, states, param, context)
        if float(shared) != 0:
            return step
    return 1000


ONE = torch.tensor(1.0)
BY_GRADIENT, BY_EIGENVALUE = "change of the gradient's input weights", "change of the eigenvalue's input weights"
FIRST = "first step with an eigenvalue"

CLAIMS = (
    Claim(
        id="dmd-literal",
        source=f"{DMD}, section 5.1 and Table 1: (R, m) = (1, 100) and 100 inner steps",
        statement="Meta-training teaches the network what to do with the eigenvalue.",
        setup="The paper's recipe to the letter but for its size: 5 runs of 100 steps, cut into 20, on 8 x 8 MNIST, a "
        "number per meta-seed; eigenvalues are 0 until there are m + 1 snapshots. Beside it m = 20.",
        measure=_literal,
        checks=(
            at_least(f"{BY_EIGENVALUE}, m = 100", 1e-4),
            at_least(f"{BY_EIGENVALUE}, m = 20", 1e-4),
            at_most(f"{FIRST}, m = 100", 100),
            at_most(f"{FIRST}, m = 20", 100),
        ),
        minutes=1,
        quick_minutes=0.3,
        seeds=5,
        needs=("mnist",),
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
