"""Maheswaranathan et al. 2021 (arXiv 2011.02159), figure 17 and App. B.

Learned GRUs against tuned optimizers, and the linearization of one. Rules have the bundled weights.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt import hub
from lightning_lopt import tasks as lopt_tasks
from lightning_lopt.analysis import Recording, autonomous, find_fixed_points, linearize, record
from lightning_lopt.analysis.findings import Findings, analyze, linear_error
from lightning_lopt.claims.claim import CONTROL, OWN, Claim, Measurement, at_most, below, near
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.plots import STYLES
from lightning_lopt.claims.training import Checkpoints, meta_train
from lightning_lopt.evaluation.baselines import SGDM, Adam, HandDesigned, RMSProp
from lightning_lopt.evaluation.compare import Progress, fingerprint
from lightning_lopt.evaluation.plots import tidy
from lightning_lopt.evaluation.runs import stack
from lightning_lopt.meta.estimators import FullUnroll
from lightning_lopt.meta.unroll import MetaParams, Unroll
from lightning_lopt.rules import UpdateRule, make
from lightning_lopt.tasks import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 200
PROBLEMS = 64
MEMBERS = 1 << 14  # runs side by side
BEST_MOMENTUM = {"lr": 3.7585, "momentum": 0.88114}
"""Polyak's optimum for eigenvalues from 1e-3 to 1."""
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
"""Quantities that are tracked during meta-training: key -> name."""
LIMIT = "learning rate above which momentum like it diverges"
RATES = [10 ** (-5 + i / 10) for i in range(71)]
DECAYS = [1 - 10 ** (-3 + 3 * i / 49) for i in range(50)]


class SearchSpace(NamedTuple):
    """A hand-designed optimizer and the grid of its settings."""

    rule: type[HandDesigned]
    grid: dict[str, list[float]]


class Round(NamedTuple):
    """A round of a search: the number of settings, and the problems and steps that each is tried on."""

    settings: int
    problems: int
    steps: int = STEPS


class SearchResult(NamedTuple):
    """The best setting of a search."""

    best: HandDesigned
    inside: bool  # no value is at the grid's edge


class Budget(NamedTuple):
    """The size of a task's measurement."""

    rounds: tuple[Round, ...] = (Round(2500, 128),)
    quick: tuple[Round, ...] = (Round(200, 128),)
    members: int = MEMBERS
    fresh: int = PROBLEMS  # problems side by side in the comparison; at the quick scale, 8 at most, and no more
    seeds: int = 3
    minutes: float = 0.9
    quick_minutes: float = 0.2
    needs: tuple[str, ...] = ()


BASELINES = {
    "momentum": SearchSpace(SGDM, {"lr": RATES, "momentum": DECAYS}),
    "RMSProp": SearchSpace(RMSProp, {"lr": RATES, "alpha": DECAYS}),
    "Adam": SearchSpace(Adam, {"lr": RATES, "beta1": DECAYS, "beta2": DECAYS}),
}
BUDGETS = {
    "linear-regression": Budget(),
    "rosenbrock": Budget(),
    "two-moons": Budget(
        rounds=(Round(1000, 1, 30), Round(64, 1), Round(8, 32)),
        quick=(Round(20, 1, 20), Round(2, 1)),
        members=64,
        minutes=18,
        quick_minutes=1,
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
    """The paper's objective, the mean of f / f_0 over the start and `steps` updates: (settings, problems).

    All settings get the same problems. Ratios are clamped to 2, so that runs that diverge have a mean too.
    """
    generator = torch.Generator().manual_seed(seed)
    unroll = Unroll(rule, task, "ratio", tell_horizon=False)
    lengths = torch.full((problems,), steps + 2)
    sides = len(settings)
    population = stack(settings, problems, batched=sides > 1)
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
    space: SearchSpace,
    task: Task,
    rounds: Sequence[Round],
    *,
    seed: int,
    members: int = MEMBERS,
    report: Progress | None = None,
) -> SearchResult:
    """Random search over a grid: the best settings of a round go into the next round, on other problems."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randint(len(values), (rounds[0].settings,), generator=generator).tolist()
        for name, values in space.grid.items()
    }
    rules = [
        space.rule(**{name: space.grid[name][numbers[i]] for name, numbers in drawn.items()})
        for i in range(rounds[0].settings)
    ]
    kept = list(range(len(rules)))
    done = 0
    total = sum(settings for settings, _, _ in rounds)
    for number, (_, problems, steps) in enumerate(rounds):
        size = max(members // problems, 1)
        objectives = []
        for chunk in (kept[start : start + size] for start in range(0, len(kept), size)):
            settings = [rules[i].meta_params() for i in chunk]
            ratios = mean_ratios(rules[0], settings, task, problems=problems, seed=seed + number, steps=steps)
            objectives.append(ratios.mean(1))
            done += len(chunk)
            if report:
                report(f"{space.rule.__name__} on {task.name}", done, total)
        order = torch.cat(objectives).argsort()[: rounds[number + 1].settings if number + 1 < len(rounds) else 1]
        kept = [kept[i] for i in order.tolist()]
    inside = all(0 < numbers[kept[0]] < len(space.grid[name]) - 1 for name, numbers in drawn.items())
    return SearchResult(rules[kept[0]], inside)


def _figure17(name: str, experiment: Experiment) -> Measurement:
    """Tune each optimizer, then measure all of them on fresh problems."""
    rule = hub.load_rule(name)
    task = lopt_tasks.make(TASKS[name])
    budget = BUDGETS[TASKS[name]]
    rounds = experiment.pick(budget.rounds, budget.quick)
    tuned: dict[str, SearchResult] = {}
    for label, space in BASELINES.items():

        def compute(space: SearchSpace = space) -> dict[str, Any]:
            best, inside = search(space, task, rounds, seed=1_000, members=budget.members, report=experiment.progress)
            return {"setting": {n: float(p.detach()) for n, p in best.named_parameters()}, "inside": float(inside)}

        key = {"rounds": rounds, "seed": 1_000, "grid": space.grid}
        found = experiment.cached(f"{label} searched on {task.name}", key, compute)
        tuned[label] = SearchResult(space.rule(**found["setting"]), bool(found["inside"]))
    rules: dict[str, UpdateRule] = {name: rule, **{label: best for label, (best, _) in tuned.items()}}
    if TASKS[name] == "linear-regression":
        rules["momentum in closed form"] = SGDM(None, **BEST_MOMENTUM)
    numbers: dict[str, list[float]] = {f"objective of {label}": [] for label in rules}
    for seed in experiment.seeds:
        for label, optimizer in rules.items():
            objectives = []
            parts = experiment.pick(PROBLEMS // budget.fresh, 1)
            problems = experiment.pick(budget.fresh, min(budget.fresh, 8))
            for part in range(parts):
                experiment.progress(f"{label} on fresh problems, seed {seed}", part, parts)
                run = {"problems": problems, "seed": 2_000 + seed + 1_000 * part, "steps": STEPS}

                def measure(optimizer: UpdateRule = optimizer, run: dict[str, int] = run) -> dict[str, Any]:
                    return {"objectives": mean_ratios(optimizer, [optimizer.meta_params()], task, **run)[0].tolist()}

                key = {"rule": fingerprint(optimizer), **run}
                found = experiment.cached(f"{label} on fresh problems of {task.name}", key, measure)
                objectives += found["objectives"]
            numbers[f"objective of {label}"] += objectives  # a number per problem, the same for all optimizers
    numbers["settings at a grid's edge"] = [float(sum(not inside for _, inside in tuned.values()))]
    settings = {n: {k: float(v.detach()) for k, v in best.named_parameters()} for n, (best, _) in tuned.items()}
    return Measurement(numbers, {"settings": settings})


def draw(measured: Measurement) -> Figure:
    """Plot figure 17: the distribution of the objective over problems, with mean and standard error."""
    from matplotlib.figure import Figure

    prefix = "objective of "
    rows = {name.removeprefix(prefix): row for name, row in measured.numbers.items() if name.startswith(prefix)}
    figure = Figure(figsize=(1.5 * len(rows) + 1, 4.5), layout="constrained")
    panel = figure.subplots()
    places = range(len(rows))
    values = [[math.log10(value) for value in row] for row in rows.values()]
    bodies: Any = panel.violinplot(values, places, showextrema=False)["bodies"]
    for body in bodies:
        body.set_facecolor(STYLES[0].color)
    means = [statistics.fmean(row) for row in rows.values()]
    errors = [statistics.pstdev(row) / len(row) ** 0.5 for row in rows.values()]
    # Means and errors are those of the values; only then take logarithms for the axis.
    low, high = ([math.log10(max(m + s * e, 1e-12)) for m, e in zip(means, errors, strict=True)] for s in (-1, 1))
    panel.vlines(places, low, high, color="black", linewidth=5)
    panel.plot(places, [math.log10(mean) for mean in means], "_", color="black", markersize=24)
    panel.set_xticks(places, [f"{label}\n{mean:.4f}" for label, mean in zip(rows, means, strict=True)], fontsize=8)
    panel.set_ylabel("log10 of the mean of f / f_0 (mean over problems below each name)", fontsize=8)
    tidy(panel)
    return figure


_INSIDE = at_most("settings at a grid's edge", 0, exact=True, kind=CONTROL)  # else the grid was too small


def _claim(name: str) -> Claim:
    ours = f"objective of {name}"
    budget = BUDGETS[TASKS[name]]
    rounds = ", then ".join(
        f"{settings:,} settings on {problems} problem{'s' if problems > 1 else ''} for {steps} steps"
        for settings, problems, steps in budget.rounds
    )
    return Claim(
        id=f"{name}-figure-17",
        source="Maheswaranathan et al. 2021 (arXiv 2011.02159), figures 1 and 17",
        title=f"figures 1 and 17 on {TASKS[name]}, a rule whose meta-training began as tuned momentum",
        in_paper="The same task; 256 units from scratch, 5,000 meta-steps; the best of 2,500 settings of each rival; "
        "64 problems.",
        statement="The learned optimizer has a lower mean objective than tuned momentum, RMSProp and Adam on its task.",
        setup=f"Mean of f / f_0 over 201 steps, a number for each of {PROBLEMS} fresh problems a seed (quick: "
        f"{min(budget.fresh, 8)}), the same for all optimizers. Baselines: "
        "the best settings from grids of 71 rates, 1e-5 to 100, and 50 decays, 0 to 0.999, on other problems: "
        f"{rounds} (quick: fewer). The bundled rule had fewer meta-training steps than the paper's, which started from "
        "momentum: see its card.",
        measure=lambda experiment: _figure17(name, experiment),
        checks=(
            *(below(ours, f"objective of {label}", published="below", controls=(_INSIDE,)) for label in BASELINES),
            *(
                below(ours, "objective of momentum in closed form", kind=OWN)
                for _ in range(TASKS[name] == "linear-regression")
            ),
        ),
        minutes=budget.minutes,
        quick_minutes=budget.quick_minutes,
        seeds=budget.seeds,
        quick_seeds=min(budget.seeds, 2),
        plot=draw,
        needs=budget.needs,
    )


def _linearized(experiment: Experiment) -> Measurement:
    rule = hub.load_rule("gru-quadratic")
    task = lopt_tasks.make("linear-regression")
    numbers: dict[str, list[float]] = {"difference of the loss curves": [], "momentum of the dominant mode": []}
    numbers["learning rate of the dominant mode"] = []
    for seed in experiment.seeds:
        experiment.progress("linearization", seed, len(experiment.seeds))
        key = {"rule": fingerprint(rule), "seed": seed, "runs": PROBLEMS, "steps": STEPS}

        def compute(seed: int = seed) -> dict[str, Any]:
            found: Findings = analyze(rule, task, name="gru-quadratic", steps=STEPS, runs=PROBLEMS, seed=seed)
            modes = found.modes
            momentum = float(modes.timescales[modes.dominant])
            rate = float(modes.learning_rates[modes.dominant])
            return {"error": linear_error(found), "momentum": momentum, "rate": rate}

        found = experiment.cached("gru-quadratic linearized", key, compute)
        error = 1e3 if math.isnan(found["error"]) else found["error"]  # NaN: the linearization diverges
        for quantity, value in zip(numbers, (error, found["momentum"], found["rate"]), strict=True):
            numbers[quantity].append(value)
    return Measurement(numbers)


def _momentum_stage(experiment: Experiment) -> Measurement:
    """Meta-train from fresh weights, and examine the checkpoint whose loss curve is closest to the best momentum's."""
    task = lopt_tasks.make("linear-regression")
    best = SGDM(None, **BEST_MOMENTUM)
    runs = {"steps": STEPS, "runs": PROBLEMS, "coordinates": 1}
    numbers: dict[str, list[float]] = {}
    data: dict[str, Any] = {}
    for seed in experiment.seeds:
        estimator = FullUnroll(num_runs=64, horizon=STEPS)
        options: dict[str, Any] = {"objective": "ratio", "tell_horizon": False, "normalize": True, "lr": 8e-3}
        size: dict[str, Any] = {"num_steps": experiment.pick(400, 40), "every": 20, "seed": seed}
        rule = make("gru", hidden_size=32)
        found = meta_train(experiment, f"meta-train, seed {seed}", rule, [task], estimator, **size, **options)

        def compute(rule: UpdateRule = rule, found: Checkpoints = found) -> dict[str, Any]:
            target = _mean_curve(record(best, task, seed=0, **runs))
            rows = []
            for number, weights in enumerate(found.meta_params):
                experiment.progress("linearize checkpoints", number, len(found.meta_params))
                rule.load_state_dict(weights)
                end = autonomous(rule).states[-1]
                fixed = find_fixed_points(rule, initial_states=end.unsqueeze(0)).states
                modes = linearize(rule, fixed[0] if len(fixed) else end)
                own, linear = (_mean_curve(record(each, task, seed=0, **runs)) for each in (rule, modes.rule()))
                rows.append(
                    {
                        "away": _difference(own, target),
                        "objective": float(own.mean()),
                        "error": _difference(linear, own),
                        "momentum": float(modes.timescales[modes.dominant]),
                        "rate": float(modes.learning_rates[modes.dominant]),
                    }
                )
            return {"rows": rows}

        rows = experiment.cached(
            "gru checkpoints linearized", {**size, "options": repr(options), "runs": runs}, compute
        )["rows"]
        closest = min(range(len(rows)), key=lambda i: math.inf if math.isnan(rows[i]["away"]) else rows[i]["away"])
        numbers.setdefault("meta-training step", []).append(found.steps[closest])
        for name, quantity in STAGE.items():
            value = rows[closest][name]
            numbers.setdefault(quantity, []).append(1e3 if math.isnan(value) else value)  # 1e3: it diverges
        # The limit of plain momentum with the mode's timescale, at curvature 1. A GRU may exceed it, since it
        # saturates; its linearization may not.
        numbers.setdefault(LIMIT, []).append(2 * (1 + rows[closest]["momentum"]))
        data[f"seed {seed}"] = [{"step": step, **row} for step, row in zip(found.steps, rows, strict=True)]
    return Measurement(numbers, data)


def draw_stage(measured: Measurement) -> Figure:
    """Plot figure 15b, c: the dominant mode during meta-training, and how well the linearization tracks the rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    targets = {"objective": None, "momentum": BEST_MOMENTUM["momentum"], "rate": BEST_MOMENTUM["lr"], "error": 0.05}
    for panel, (name, line) in zip(figure.subplots(1, 4), targets.items(), strict=True):
        for look, rows in zip(STYLES, measured.data.values(), strict=False):
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
    """Mean absolute difference of two curves, relative to the mean of the second."""
    return float((one - other).abs().mean() / other.mean())


def _bundled() -> list[str]:
    return [name for name in TASKS if name in hub.list_pretrained()]


CLAIMS = (
    *(_claim(name) for name in _bundled()),
    *(
        Claim(
            id="gru-linearized",
            source="Maheswaranathan et al. 2021 (arXiv 2011.02159), App. B.1 and figure 14",
            title="figure 14 with the bundled gru-quadratic, after its momentum stage",
            in_paper="A rule of 256 units from scratch at the stage where it is as good as momentum.",
            statement="Linearized at its fixed point, the quadratic rule behaves like the full one.",
            setup="64 runs of 200 steps per seed. The paper linearizes a rule at the stage of meta-training where it "
            "is as good as momentum. The bundled one started there, so that the momentum of its mode says nothing and "
            "is not checked, and is better by now: it has learned a schedule of learning rates, lowest at the fixed "
            "point, which no linearization can have.",
            measure=_linearized,
            checks=(at_most("difference of the loss curves", 0.05, published="almost exactly"),),
            minutes=0.4,
            quick_minutes=0.3,
        )
        for _ in range("gru-quadratic" in _bundled())
    ),
    Claim(
        id="gru-momentum-stage",
        source="Maheswaranathan et al. 2021 (arXiv 2011.02159), App. B and figure 15",
        title="figure 15 with 32 units from scratch on the quadratic, 400 meta-steps",
        in_paper="256 units from scratch, 5,000 meta-steps of 64 runs.",
        statement="During meta-training from fresh weights the quadratic rule becomes the task's best momentum: its "
        "linearization then behaves like the full rule.",
        setup="32 units from fresh weights, 400 steps (quick: 40) of 64 runs at learning rate 8e-3, a number per "
        "meta-seed; a checkpoint every 20 steps. The stage is the checkpoint whose mean loss curve "
        "over 64 runs is closest to that of momentum 0.88114 at learning rate 3.7585.",
        measure=_momentum_stage,
        checks=(
            at_most(STAGE["error"], 0.05, published="almost exactly"),
            near(STAGE["momentum"], BEST_MOMENTUM["momentum"], rtol=0.02),
        ),
        minutes=14,
        quick_minutes=0.6,
        quick_seeds=1,
        plot=draw_stage,
    ),
)
