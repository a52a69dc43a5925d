"""The evidence of Maheswaranathan et al. 2021 (arXiv 2011.02159): figure 17 and App. B.

Learned GRUs against tuned optimizers, and a linearized one alone. The weights are those that this package ships.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt import hub
from lightning_lopt import tasks as lopt_tasks
from lightning_lopt.analysis.findings import Findings, analyze, linear_error
from lightning_lopt.evaluation.baselines import SGDM, Adam, HandDesigned, RMSProp
from lightning_lopt.evaluation.claims.base import Check, Claim, Measured, at_most, below
from lightning_lopt.evaluation.claims.lab import Lab
from lightning_lopt.evaluation.compare import fingerprint
from lightning_lopt.meta.unroll import MetaParams, Unroll
from lightning_lopt.rules import UpdateRule
from lightning_lopt.tasks import Task

STEPS, PROBLEMS, TUNING_PROBLEMS = 200, 64, 32
MEMBERS = 1 << 14  # runs side by side
BEST_MOMENTUM = {"lr": 3.7585, "momentum": 0.88114}
"""Polyak's for eigenvalues from 1e-3 to 1."""
TASKS = {"gru-quadratic": "linear-regression", "gru-rosenbrock": "rosenbrock", "gru-two-moons": "two-moons"}
RATES = [10 ** (-5 + i / 10) for i in range(71)]
DECAYS = [1 - 10 ** (-3 + 3 * i / 49) for i in range(50)]


class Searched(NamedTuple):
    """A hand-designed optimizer, and the grid that its settings are drawn from."""

    rule: type[HandDesigned]
    grid: dict[str, list[float]]


BASELINES = {
    "momentum": Searched(SGDM, {"lr": RATES, "momentum": DECAYS}),
    "RMSProp": Searched(RMSProp, {"lr": RATES, "alpha": DECAYS}),
    "Adam": Searched(Adam, {"lr": RATES, "beta1": DECAYS, "beta2": DECAYS}),
}


def mean_ratios(
    rule: UpdateRule, settings: Sequence[MetaParams], task: Task, *, problems: int, seed: int, steps: int = STEPS
) -> Tensor:
    """The paper's objective, mean of f / f_0 over the start and `steps` updates: (settings, problems), the same ones.

    A ratio counts as 2 at most, so that a run that diverges has a mean.
    """
    generator, unroll = torch.Generator().manual_seed(seed), Unroll(rule, task, "ratio", tell_horizon=False)
    lengths, sides = torch.full((problems,), steps + 2), len(settings)
    names = settings[0]
    population = {n: torch.stack([s[n].detach() for s in settings]).repeat_interleave(problems, 0) for n in names}
    if sides == 1:
        population = {n: value.detach() for n, value in settings[0].items()}
    total = torch.zeros(sides * problems)
    with torch.no_grad():
        inner = unroll.start(generator, lengths, sides=sides)
        for _ in range(steps + 1):
            inner, record, _ = unroll.slot(
                population, inner, generator, lambda n: lengths[:n], sides=sides, batched=sides > 1
            )
            total += record.losses[0] if record.losses.dim() > 1 else record.losses
    return (total / (steps + 1)).reshape(sides, problems)


def search(searched: Searched, task: Task, *, samples: int, seed: int, tick: Any = None) -> tuple[HandDesigned, bool]:
    """The best of `samples` settings drawn from the grid, and whether none of its values is at the grid's edge."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randint(len(values), (samples,), generator=generator).tolist()
        for name, values in searched.grid.items()
    }
    rules = [
        searched.rule(**{name: searched.grid[name][numbers[i]] for name, numbers in drawn.items()})
        for i in range(samples)
    ]
    chunk, scores = max(MEMBERS // TUNING_PROBLEMS, 1), []
    for start in range(0, samples, chunk):
        settings = [rule.meta_params() for rule in rules[start : start + chunk]]
        scores.append(mean_ratios(rules[0], settings, task, problems=TUNING_PROBLEMS, seed=seed).mean(1))
        if tick:
            tick(min(start + chunk, samples))
    best = int(torch.cat(scores).argmin())
    inside = all(0 < numbers[best] < len(searched.grid[name]) - 1 for name, numbers in drawn.items())
    return rules[best], inside


def _figure17(name: str, lab: Lab) -> Measured:
    """Tune each optimizer on problems of its own, then measure all on fresh ones."""
    rule, task = hub.load_rule(name), lopt_tasks.make(TASKS[name])
    samples = lab.pick(2500, 200)
    tuned: dict[str, tuple[HandDesigned, bool]] = {}
    for label, searched in BASELINES.items():

        def compute(label: str = label, searched: Searched = searched) -> dict[str, Any]:
            tick = lambda done: lab.progress(f"{label} on {task.name}", done, samples)  # noqa: E731
            best, inside = search(searched, task, samples=samples, seed=1_000, tick=tick)
            return {"setting": {n: float(p.detach()) for n, p in best.named_parameters()}, "inside": float(inside)}

        found = lab.piece(
            f"{label} searched on {task.name}",
            {"samples": samples, "seed": 1_000, "steps": STEPS, "grid": searched.grid},
            compute,
        )
        tuned[label] = searched.rule(**found["setting"]), bool(found["inside"])
    rules: dict[str, UpdateRule] = {name: rule, **{label: best for label, (best, _) in tuned.items()}}
    if TASKS[name] == "linear-regression":
        rules["momentum in closed form"] = SGDM(None, **BEST_MOMENTUM)
    numbers: dict[str, list[float]] = {f"objective of {label}": [] for label in rules}
    for seed in lab.seeds:
        key = {"rules": {label: fingerprint(each) for label, each in rules.items()}, "seed": seed, "steps": STEPS}

        def fresh(seed: int = seed) -> dict[str, Any]:
            run = {"problems": PROBLEMS, "seed": 2_000 + seed}
            return {n: float(mean_ratios(r, [r.meta_params()], task, **run).mean()) for n, r in rules.items()}

        found = lab.piece(f"fresh problems of {task.name}", key, fresh)
        for label in rules:
            numbers[f"objective of {label}"].append(found[label])
    numbers["settings at a grid's edge"] = [float(sum(not inside for _, inside in tuned.values()))]
    settings = {n: {k: float(v.detach()) for k, v in best.named_parameters()} for n, (best, _) in tuned.items()}
    return Measured(numbers, {"settings": settings})


def _claim(name: str) -> Claim:
    ours = f"objective of {name}"
    return Claim(
        id=f"{name}-figure-17",
        source="Maheswaranathan et al. 2021 (arXiv 2011.02159), figure 17",
        statement="The learned optimizer has a lower mean objective than tuned momentum, RMSProp and Adam on its task.",
        setup="Mean of f / f_0 over 201 steps, 64 fresh problems a seed. Baselines: the best of 2,500 settings (quick: "
        f"200) from grids of 71 rates, 1e-5 to 100, and 50 decays, 0 to 0.999, on {TUNING_PROBLEMS} other problems. "
        "The shipped rule had fewer meta-training steps than the paper's 5,000, and began as momentum: see its card.",
        measure=lambda lab: _figure17(name, lab),
        checks=(
            *(below(ours, f"objective of {label}", published="below") for label in BASELINES),
            *(below(ours, "objective of momentum in closed form") for _ in range(TASKS[name] == "linear-regression")),
            at_most("settings at a grid's edge", 0, published="none"),
        ),
        minutes=3.0,
        quick_minutes=0.5,
    )


def _linearized(lab: Lab) -> Measured:
    rule, task = hub.load_rule("gru-quadratic"), lopt_tasks.make("linear-regression")
    numbers: dict[str, list[float]] = {"difference of the loss curves": [], "momentum of the dominant mode": []}
    numbers["learning rate of the dominant mode"] = []
    for seed in lab.seeds:
        key = {"rule": fingerprint(rule), "seed": seed, "runs": PROBLEMS, "steps": STEPS}

        def compute(seed: int = seed) -> dict[str, Any]:
            found: Findings = analyze(rule, task, name="gru-quadratic", steps=STEPS, runs=PROBLEMS, seed=seed)
            top, error = found.modes.dominant, linear_error(found)
            momentum, rate = float(found.modes.timescales[top]), float(found.modes.learning_rates[top])
            return {"error": error, "momentum": momentum, "rate": rate}

        piece = lab.piece("gru-quadratic linearized", key, compute)
        error = 1e3 if math.isnan(piece["error"]) else piece["error"]  # a linearization that diverges
        for quantity, value in zip(numbers, (error, piece["momentum"], piece["rate"]), strict=True):
            numbers[quantity].append(value)
    return Measured(numbers)


def _bundled() -> list[str]:
    return [name for name in TASKS if name in hub.list_pretrained()]


CLAIMS = (
    *(_claim(name) for name in _bundled()),
    *(
        Claim(
            id="gru-linearized",
            source="Maheswaranathan et al. 2021 (arXiv 2011.02159), App. B.1",
            statement="Linearized at its fixed point and run alone, the quadratic rule behaves as the full one; its "
            "dominant mode is the task's best momentum.",
            setup="64 runs of 200 steps per seed. The shipped rule began as momentum: such a mode says little.",
            measure=_linearized,
            checks=(
                at_most("difference of the loss curves", 0.05, published="almost exactly"),
                Check(
                    "momentum of the dominant mode within 2 % of 0.88114",
                    ("momentum of the dominant mode",),
                    lambda values: all(abs(value / BEST_MOMENTUM["momentum"] - 1) <= 0.02 for value in values),
                    "matches",
                ),
            ),
            minutes=1.0,
            quick_minutes=0.7,
        )
        for _ in range("gru-quadratic" in _bundled())
    ),
)
