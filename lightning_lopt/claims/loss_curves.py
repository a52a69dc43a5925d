"""Loss curves of rules that run from the same starting points on the same batches: measured, averaged and drawn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lopt.claims.claim import Measurement
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.plots import Curve, draw_curves
from lightning_lopt.evaluation.baselines import Adam, BaselineConfig
from lightning_lopt.evaluation.compare import fingerprint
from lightning_lopt.evaluation.runs import run_population
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import UpdateRule, make
from lightning_lopt.tasks import make as make_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Setting = Mapping[str, Tensor]
"""Meta-parameters by name."""
Candidate = UpdateRule | tuple[UpdateRule, Setting]
"""A rule with its own meta-parameters, or with others."""


def losses(
    rule: UpdateRule,
    settings: Sequence[Setting],
    task_name: str,
    steps: int,
    runs: int,
    seed: int,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Training losses before each update, at most twice the first one: (settings, runs, steps) float64.

    All settings run from the same starting points. `on_step` is called after each step with the number of steps done.
    """
    unroll = Unroll(rule, make_task(task_name), "raw")
    generator = torch.Generator().manual_seed(seed)
    found, _ = run_population(unroll, settings, generator, steps=steps, seeds=runs, batched=True, on_step=on_step)
    found = torch.nan_to_num(found, nan=torch.inf).minimum(2 * found[:1])
    return found.T.reshape(len(settings), runs, steps)


def curves(
    experiment: Experiment, candidates: Mapping[str, Candidate], task_name: str, steps: int, starts: int = 1
) -> dict[str, list[Tensor]]:
    """Training losses of several rules, all from the same starting points on the same batches.

    Args:
        experiment: caches the losses.
        candidates: name -> rule, or rule and meta-parameters. Candidates with the same rule object run side by side.
        task_name: the task.
        steps: length of the runs.
        starts: runs per seed, over whose losses the geometric mean is taken.

    Returns:
        Name -> losses (steps,) for each seed.
    """
    settings = {
        name: item if isinstance(item, tuple) else (item, item.meta_params()) for name, item in candidates.items()
    }
    by_rule: dict[UpdateRule, list[str]] = {}
    for name, (rule, _) in settings.items():
        by_rule.setdefault(rule, []).append(name)
    found: dict[str, list[Tensor]] = {}
    for rule, names in by_rule.items():
        rows = _cached_losses(experiment, rule, {name: settings[name][1] for name in names}, task_name, steps, starts)
        found |= {name: list(torch.tensor(row, dtype=torch.float64)) for name, row in zip(names, rows, strict=True)}
    return found


def _cached_losses(
    experiment: Experiment, rule: UpdateRule, settings: Mapping[str, Setting], task_name: str, steps: int, starts: int
) -> list[list[list[float]]]:
    seeds = len(experiment.seeds)
    # The fingerprint covers the rule's own weights; scalars among a setting, such as a learning rate, may differ.
    scalars = [{k: v.detach().tolist() for k, v in each.items() if not v.dim()} for each in settings.values()]
    key = {"rule": fingerprint(rule), "settings": scalars if any(scalars) else [], "task": task_name, "steps": steps}
    key |= {"seeds": seeds, "starts": starts}

    def compute() -> dict[str, Any]:
        report = experiment.reporter(f"{task_name} {', '.join(settings)}", steps)
        rows = losses(rule, list(settings.values()), task_name, steps, seeds * starts, seed=0, on_step=report)
        logs = rows.clamp(min=1e-30).log().reshape(len(settings), seeds, starts, steps).mean(2)
        return {"losses": logs.exp().tolist()}

    found: list[list[list[float]]] = experiment.cached("losses", key, compute)["losses"]
    return found


def adams(settings: Mapping[str, Mapping[str, float]], schedule: str = "constant") -> dict[str, Candidate]:
    """Adam with several settings, by name, for `curves`."""
    rule = Adam(BaselineConfig(schedule=schedule))
    return {name: (rule, Adam(None, **setting).meta_params()) for name, setting in settings.items()}


def means(found: Mapping[str, Sequence[Tensor]], what: str = "mean loss", last: int = 0) -> dict[str, Any]:
    """`"<what> of <name>"` -> each seed's mean over all steps, or over the `last` ones."""
    return {f"{what} of {name}": [float(row[-last:].mean()) for row in rows] for name, rows in found.items()}


def best_of(numbers: Mapping[str, Sequence[float]], part: str = "") -> str:
    """The quantity with the lowest median, among those whose names contain `part`."""
    return min((name for name in numbers if part in name), key=lambda name: statistics.median(numbers[name]))


def plot_data(found: Mapping[str, Sequence[Tensor]], points: int = 100) -> dict[str, Any]:
    """The data that `draw` plots: means over intervals of steps."""
    total = len(next(iter(found.values()))[0])
    intervals = torch.arange(total).tensor_split(min(points, total))
    rows = {name: [[float(row[i].mean()) for i in intervals] for row in seeds] for name, seeds in found.items()}
    return {"steps": [float(interval.double().mean()) for interval in intervals], "curves": rows}


def draw(title: str, measurement: Measurement) -> Figure:
    """Plot losses over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    rows = [Curve(name, measurement.data["steps"], seeds) for name, seeds in measurement.data["curves"].items()]
    draw_curves(panel, rows)
    panel.set_xlabel("steps")
    panel.set_ylabel("training loss")
    panel.set_title(title, fontsize=10)
    panel.legend(frameon=False, fontsize=8)
    return figure


def with_options(rule: UpdateRule, **options: Any) -> UpdateRule:
    """A copy of the rule with the same meta-parameters and changed options."""
    changed = make(rule.kind, **{**rule.config.to_dict(), **options})
    changed.load_state_dict(rule.state_dict())
    return changed
