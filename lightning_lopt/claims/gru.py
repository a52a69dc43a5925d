"""The evidence of Maheswaranathan et al. 2021 (arXiv 2011.02159): figure 17 and App. B.

Learned GRUs against tuned optimizers, and a linearized one alone. The weights are those that this package ships.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt import hub
from lightning_lopt import tasks as lopt_tasks
from lightning_lopt.analysis import Recording, autonomous, find_fixed_points, linearize, record
from lightning_lopt.analysis.findings import Findings, analyze, linear_error
from lightning_lopt.claims.base import Check, Claim, Measured, at_most, below, near
from lightning_lopt.claims.lab import Lab
from lightning_lopt.claims.plots import LOOKS
from lightning_lopt.claims.training import Trained, meta_train
from lightning_lopt.evaluation.baselines import SGDM, Adam, HandDesigned, RMSProp
from lightning_lopt.evaluation.compare import fingerprint
from lightning_lopt.evaluation.plots import tidy
from lightning_lopt.meta.estimators import FullUnroll
from lightning_lopt.meta.unroll import MetaParams, Unroll
from lightning_lopt.rules import UpdateRule, make
from lightning_lopt.tasks import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, PROBLEMS = 200, 64
MEMBERS = 1 << 14  # runs side by side
BEST_MOMENTUM = {"lr": 3.7585, "momentum": 0.88114}
"""Polyak's for eigenvalues from 1e-3 to 1."""
TASKS = {
    "gru-quadratic": "linear-regression",
    "gru-rosenbrock": "rosenbrock",
    "gru-two-moons": "two-moons",
    "gru-mnist": "mnist-conv",
}
STAGE = {
    "away": "difference from momentum's loss curve",
    "objective": "objective",
    "error": "difference of the linearized loss curve",
    "momentum": "momentum of the dominant mode",
    "rate": "learning rate of the dominant mode",
}
"""What is looked at in the course of a meta-training: name -> in words."""
LIMIT = "learning rate from which on momentum like it diverges"
RATES = [10 ** (-5 + i / 10) for i in range(71)]
DECAYS = [1 - 10 ** (-3 + 3 * i / 49) for i in range(50)]


class Searched(NamedTuple):
    """A hand-designed optimizer, and the grid that its settings are drawn from."""

    rule: type[HandDesigned]
    grid: dict[str, list[float]]


class Round(NamedTuple):
    """Of a search: how many settings are in it, and what each is tried on."""

    settings: int
    problems: int
    steps: int = STEPS


class Found(NamedTuple):
    """What a search found."""

    best: HandDesigned
    inside: bool  # none of its values is at the grid's edge


class Budget(NamedTuple):
    """What a task allows."""

    rounds: tuple[Round, ...] = (Round(2500, 128),)
    quick: tuple[Round, ...] = (Round(200, 128),)
    members: int = MEMBERS
    fresh: int = PROBLEMS  # problems side by side when optimizers are compared; quick: no more than these
    seeds: int = 3
    minutes: float = 0.9
    quick_minutes: float = 0.2
    needs: tuple[str, ...] = ()


BASELINES = {
    "momentum": Searched(SGDM, {"lr": RATES, "momentum": DECAYS}),
    "RMSProp": Searched(RMSProp, {"lr": RATES, "alpha": DECAYS}),
    "Adam": Searched(Adam, {"lr": RATES, "beta1": DECAYS, "beta2": DECAYS}),
}
BUDGETS = {
    "linear-regression": Budget(),
    "rosenbrock": Budget(),
    "two-moons": Budget(
        rounds=(Round(1000, 1, 30), Round(64, 1), Round(8, 32)),
        quick=(Round(50, 1, 20), Round(4, 1)),
        members=64,
        minutes=18,
        quick_minutes=5,
    ),
    "mnist-conv": Budget(
        rounds=(Round(150, 1, 15), Round(15, 1, 100), Round(4, 4)),
        quick=(Round(10, 1, 5), Round(2, 1, 20)),
        members=1,
        fresh=1,
        seeds=1,
        minutes=56,
        quick_minutes=1,
        needs=("mnist",),
    ),
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


def search(
    searched: Searched, task: Task, rounds: Sequence[Round], *, seed: int, members: int = MEMBERS, tick: Any = None
) -> Found:
    """The best of settings drawn from the grid; those that are best in a round go into the next, on other problems."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randint(len(values), (rounds[0].settings,), generator=generator).tolist()
        for name, values in searched.grid.items()
    }
    rules = [
        searched.rule(**{name: searched.grid[name][numbers[i]] for name, numbers in drawn.items()})
        for i in range(rounds[0].settings)
    ]
    kept, done, total = list(range(len(rules))), 0, sum(settings for settings, _, _ in rounds)
    for number, (_, problems, steps) in enumerate(rounds):
        size, scores = max(members // problems, 1), []
        for chunk in (kept[start : start + size] for start in range(0, len(kept), size)):
            settings, run = [rules[i].meta_params() for i in chunk], {"seed": seed + number, "steps": steps}
            scores.append(mean_ratios(rules[0], settings, task, problems=problems, **run).mean(1))
            done += len(chunk)
            if tick:
                tick(done, total)
        order = torch.cat(scores).argsort()[: rounds[number + 1].settings if number + 1 < len(rounds) else 1]
        kept = [kept[i] for i in order.tolist()]
    inside = all(0 < numbers[kept[0]] < len(searched.grid[name]) - 1 for name, numbers in drawn.items())
    return Found(rules[kept[0]], inside)


def _figure17(name: str, lab: Lab) -> Measured:
    """Tune each optimizer on problems of its own, then measure all on fresh ones."""
    rule, task, budget = hub.load_rule(name), lopt_tasks.make(TASKS[name]), BUDGETS[TASKS[name]]
    rounds, tuned = lab.pick(budget.rounds, budget.quick), dict[str, Found]()
    for label, searched in BASELINES.items():

        def compute(label: str = label, searched: Searched = searched) -> dict[str, Any]:
            tick = partial(lab.progress, f"{label} on {task.name}")
            best, inside = search(searched, task, rounds, seed=1_000, members=budget.members, tick=tick)
            return {"setting": {n: float(p.detach()) for n, p in best.named_parameters()}, "inside": float(inside)}

        key = {"rounds": rounds, "seed": 1_000, "grid": searched.grid}
        found = lab.piece(f"{label} searched on {task.name}", key, compute)
        tuned[label] = Found(searched.rule(**found["setting"]), bool(found["inside"]))
    rules: dict[str, UpdateRule] = {name: rule, **{label: best for label, (best, _) in tuned.items()}}
    if TASKS[name] == "linear-regression":
        rules["momentum in closed form"] = SGDM(None, **BEST_MOMENTUM)
    numbers: dict[str, list[float]] = {f"objective of {label}": [] for label in rules}
    each: dict[str, list[float]] = {}
    for seed in lab.seeds:
        for label, made in rules.items():
            objectives = []
            for part in range(lab.pick(PROBLEMS // budget.fresh, 1)):
                run = {"problems": budget.fresh, "seed": 2_000 + seed + 1_000 * part, "steps": STEPS}

                def fresh(made: UpdateRule = made, run: dict[str, int] = run) -> dict[str, Any]:
                    return {"objectives": mean_ratios(made, [made.meta_params()], task, **run)[0].tolist()}

                key = {"rule": fingerprint(made), **run}
                objectives += lab.piece(f"{label} on fresh problems of {task.name}", key, fresh)["objectives"]
            numbers[f"objective of {label}"].append(statistics.fmean(objectives))
            each.setdefault(label, []).extend(objectives)
    numbers["settings at a grid's edge"] = [float(sum(not inside for _, inside in tuned.values()))]
    settings = {n: {k: float(v.detach()) for k, v in best.named_parameters()} for n, (best, _) in tuned.items()}
    return Measured(numbers, {"settings": settings, "each": each})


def draw(measured: Measured) -> Figure:
    """Figure 17: how the objective is distributed over problems, with mean and standard error."""
    from matplotlib.figure import Figure

    rows = measured.data["each"]
    figure = Figure(figsize=(1.5 * len(rows) + 1, 4.5), layout="constrained")
    panel, places = figure.subplots(), range(len(rows))
    values = [[math.log10(value) for value in row] for row in rows.values()]
    bodies: Any = panel.violinplot(values, places, showextrema=False)["bodies"]
    for body in bodies:
        body.set_facecolor(LOOKS[0].color)
    means = [statistics.fmean(row) for row in rows.values()]
    errors = [statistics.pstdev(row) / len(row) ** 0.5 for row in rows.values()]
    # The bar of the mean is of the values, though the axis is of their logarithms.
    low, high = ([math.log10(max(m + s * e, 1e-12)) for m, e in zip(means, errors, strict=True)] for s in (-1, 1))
    panel.vlines(places, low, high, color="black", linewidth=5)
    panel.plot(places, [math.log10(mean) for mean in means], "_", color="black", markersize=24)
    panel.set_xticks(places, [f"{label}\n{mean:.4f}" for label, mean in zip(rows, means, strict=True)], fontsize=8)
    panel.set_ylabel("log10 of the mean of f / f_0; below each name the mean over problems", fontsize=8)
    tidy(panel)
    return figure


def _claim(name: str) -> Claim:
    ours, budget = f"objective of {name}", BUDGETS[TASKS[name]]
    rounds = ", then ".join(
        f"{settings:,} settings on {problems} problem{'s' if problems > 1 else ''} for {steps} steps"
        for settings, problems, steps in budget.rounds
    )
    return Claim(
        id=f"{name}-figure-17",
        source="Maheswaranathan et al. 2021 (arXiv 2011.02159), figure 17",
        statement="The learned optimizer has a lower mean objective than tuned momentum, RMSProp and Adam on its task.",
        setup=f"Mean of f / f_0 over 201 steps, {PROBLEMS} fresh problems a seed (quick: {budget.fresh}). Baselines: "
        f"the best of settings from grids of 71 rates, 1e-5 to 100, and 50 decays, 0 to 0.999, on others: {rounds} "
        "(quick: fewer). "
        "The shipped rule had fewer meta-training steps than the paper's, and began as momentum: see its card.",
        measure=lambda lab: _figure17(name, lab),
        checks=(
            *(below(ours, f"objective of {label}", published="below") for label in BASELINES),
            *(below(ours, "objective of momentum in closed form") for _ in range(TASKS[name] == "linear-regression")),
            at_most("settings at a grid's edge", 0, published="none"),
        ),
        minutes=budget.minutes,
        quick_minutes=budget.quick_minutes,
        seeds=budget.seeds,
        quick_seeds=min(budget.seeds, 2),
        plot=draw,
        needs=budget.needs,
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


def _momentum_stage(lab: Lab) -> Measured:
    """Meta-train from nothing; look where the loss curve is closest to that of the best momentum."""
    task, best = lopt_tasks.make("linear-regression"), SGDM(None, **BEST_MOMENTUM)
    runs = {"steps": STEPS, "runs": PROBLEMS, "coordinates": 1}
    numbers: dict[str, list[float]] = {}
    data: dict[str, Any] = {}
    for seed in lab.seeds:
        estimator = FullUnroll(64, STEPS)
        options: dict[str, Any] = {"objective": "ratio", "tell_horizon": False, "normalize": True, "lr": 8e-3}
        size: dict[str, Any] = {"num_steps": lab.pick(400, 40), "every": 20, "seed": seed}
        rule = make("gru", hidden_size=32)
        found = meta_train(lab, f"from nothing, seed {seed}", rule, [task], estimator, **size, **options)

        def compute(rule: UpdateRule = rule, found: Trained = found) -> dict[str, Any]:
            wanted, rows = _mean_curve(record(best, task, seed=0, **runs)), []
            for weights in found.meta_params:
                rule.load_state_dict(weights)
                end = autonomous(rule).states[-1]
                fixed = find_fixed_points(rule, initial_states=end.unsqueeze(0)).states
                modes = linearize(rule, fixed[0] if len(fixed) else end)
                own, linear = (_mean_curve(record(each, task, seed=0, **runs)) for each in (rule, modes.rule()))
                rows.append(
                    {
                        "away": _difference(own, wanted),
                        "objective": float(own.mean()),
                        "error": _difference(linear, own),
                        "momentum": float(modes.timescales[modes.dominant]),
                        "rate": float(modes.learning_rates[modes.dominant]),
                    }
                )
            return {"rows": rows}

        rows = lab.piece("gru linearized on the way", {**size, "options": repr(options), "runs": runs}, compute)["rows"]
        closest = min(range(len(rows)), key=lambda i: math.inf if math.isnan(rows[i]["away"]) else rows[i]["away"])
        numbers.setdefault("meta-training step", []).append(found.steps[closest])
        for name, quantity in STAGE.items():
            value = rows[closest][name]
            numbers.setdefault(quantity, []).append(1e3 if math.isnan(value) else value)  # 1e3: it diverges
        # Of plain momentum like the mode, at curvature 1. A GRU may be above: it saturates. Its linearization may not.
        numbers.setdefault(LIMIT, []).append(2 * (1 + rows[closest]["momentum"]))
        data[f"seed {seed}"] = [{"step": step, **row} for step, row in zip(found.steps, rows, strict=True)]
    return Measured(numbers, data)


def draw_stage(measured: Measured) -> Figure:
    """Figure 15b, c: the dominant mode in the course of meta-training, and how well the linearization tracks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    wanted = {"objective": None, "momentum": BEST_MOMENTUM["momentum"], "rate": BEST_MOMENTUM["lr"], "error": 0.05}
    for panel, (name, line) in zip(figure.subplots(1, 4), wanted.items(), strict=True):
        for look, rows in zip(LOOKS, measured.data.values(), strict=False):
            values = [1e3 if math.isnan(row[name]) else min(row[name], 1e3) for row in rows]  # 1e3: it diverges
            panel.plot([row["step"] for row in rows], values, look.line, color=look.color)
        if line is not None:
            panel.axhline(line, color="black", linewidth=0.8)
        if name in ("objective", "error"):
            panel.set_yscale("log")
        panel.set_title(STAGE[name], fontsize=9)
        panel.set_xlabel("meta-training step", fontsize=9)
        tidy(panel)
    return figure


def _mean_curve(recording: Recording) -> Tensor:
    return (recording.losses / recording.losses[0]).mean(1)


def _difference(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference of two curves, by the mean of the second."""
    return float((one - other).abs().mean() / other.mean())


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
            setup="64 runs of 200 steps per seed. The paper linearizes a rule at the stage of its meta-training at "
            "which it is as good as momentum. The shipped one began there, so that its mode says little, and is better "
            "by now: it has a schedule of learning rates, lowest at the fixed point, and no linearization has one.",
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
            minutes=0.4,
            quick_minutes=0.3,
        )
        for _ in range("gru-quadratic" in _bundled())
    ),
    Claim(
        id="gru-momentum-stage",
        source="Maheswaranathan et al. 2021 (arXiv 2011.02159), App. B",
        statement="On its way from nothing the quadratic rule becomes momentum, the task's best: linearized, it then "
        "behaves as the full one.",
        setup="32 units from fresh weights, 400 steps (quick: 40) of 64 runs at learning rate 8e-3; the paper has "
        "256 units and 5,000 steps; looked at every 20 steps. The stage is where the mean loss curve of 64 runs is "
        "closest to that of momentum 0.88114 at learning rate 3.7585.",
        measure=_momentum_stage,
        checks=(
            at_most(STAGE["error"], 0.05, published="almost exactly"),
            near(STAGE["momentum"], BEST_MOMENTUM["momentum"], rtol=0.02),
        ),
        minutes=4.5,
        quick_minutes=0.6,
        seeds=1,
        quick_seeds=1,
        plot=draw_stage,
    ),
)
