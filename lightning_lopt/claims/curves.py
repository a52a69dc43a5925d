"""Losses of rules from the same starts on the same batches: curves, their means, and their picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lopt.claims.base import Measured
from lightning_lopt.claims.lab import Lab
from lightning_lopt.claims.plots import Curve, draw_curves
from lightning_lopt.evaluation.baselines import Adam, BaselineConfig
from lightning_lopt.evaluation.compare import fingerprint
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import UpdateRule, make
from lightning_lopt.tasks import make as make_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTING = Mapping[str, Tensor]


def losses(rule: UpdateRule, settings: Sequence[SETTING], task_name: str, steps: int, runs: int, seed: int) -> Tensor:
    """(settings, runs, steps) training losses before each update, at most twice the first, all from the same starts."""
    task, generator = make_task(task_name), torch.Generator().manual_seed(seed)
    unroll, sides, rows = Unroll(rule, task, "raw"), len(settings), []
    stacked = {name: torch.stack([setting[name].detach() for setting in settings]) for name in settings[0]}
    population = {name: values.repeat_interleave(runs, 0) for name, values in stacked.items()}
    with torch.no_grad():
        inner = unroll.start(generator, torch.full((runs,), steps), sides=sides)
        for _ in range(steps):
            inner, record, _ = unroll.slot(population, inner, generator, _no_reset, sides=sides, batched=True)
            rows.append(record.losses)
    found = torch.stack(rows, 1)  # (sides * runs, steps)
    found = torch.nan_to_num(found, nan=torch.inf).minimum(2 * found[:, :1])
    return found.reshape(sides, runs, steps).double()


def curves(
    lab: Lab, rules: Mapping[str, tuple[UpdateRule, SETTING]], task_name: str, steps: int, starts: int = 1
) -> dict[str, list[Tensor]]:
    """Training losses of rules with meta-parameters, each from the same starts on the same batches.

    Args:
        lab: keeps them.
        rules: name -> rule and meta-parameters. What has the very same rule is run side by side.
        task_name: what they are run on.
        steps: length of the runs.
        starts: runs for each seed, of whose losses the geometric mean is taken.

    Returns:
        Name -> for each seed (steps,).
    """
    together: dict[UpdateRule, list[str]] = {}
    for name, (rule, _) in rules.items():
        together.setdefault(rule, []).append(name)
    found: dict[str, list[Tensor]] = {}
    for number, (rule, names) in enumerate(together.items()):
        lab.progress(f"{task_name} {', '.join(names)}", number + 1, len(together))
        settings = [rules[name][1] for name in names]
        plain = [{k: v.detach().tolist() for k, v in setting.items() if not v.dim()} for setting in settings]  # rates
        key = {"rule": fingerprint(rule), "settings": plain if any(plain) else [], "task": task_name, "steps": steps}
        key |= {"seeds": len(lab.seeds), "starts": starts}

        def compute(rule: UpdateRule = rule, settings: Sequence[SETTING] = settings) -> dict[str, Any]:
            rows = losses(rule, settings, task_name, steps, len(lab.seeds) * starts, seed=0)
            logs = rows.clamp(min=1e-30).log().reshape(len(settings), len(lab.seeds), starts, steps).mean(2)
            return {"losses": logs.exp().tolist()}

        rows = lab.piece("losses", key, compute)["losses"]
        found |= {name: list(torch.tensor(row, dtype=torch.float64)) for name, row in zip(names, rows, strict=True)}
    return found


def adams(
    settings: Mapping[str, Mapping[str, float]], schedule: str = "constant"
) -> dict[str, tuple[UpdateRule, SETTING]]:
    """Adam with several settings, by name, for `curves`."""
    rule = Adam(BaselineConfig(schedule=schedule))
    return {name: (rule, Adam(None, **setting).meta_params()) for name, setting in settings.items()}


def learned(name: str, rule: UpdateRule) -> dict[str, tuple[UpdateRule, SETTING]]:
    """A rule as it is, for `curves`."""
    return {name: (rule, rule.meta_params())}


def means(found: Mapping[str, Sequence[Tensor]], what: str = "mean loss", last: int | None = None) -> dict[str, Any]:
    """The mean over the steps, or over the last so many, of each seed; by "<what> of <name>"."""
    start = -last if last else 0
    return {f"{what} of {name}": [float(row[start:].mean()) for row in rows] for name, rows in found.items()}


def draw(title: str, measured: Measured) -> Figure:
    """Losses over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    rows = [Curve(name, measured.data["steps"], seeds) for name, seeds in measured.data["curves"].items()]
    draw_curves(panel, rows)
    panel.set_xlabel("steps")
    panel.set_ylabel("training loss")
    panel.set_title(title, fontsize=10)
    panel.legend(frameon=False, fontsize=8)
    return figure


def data(found: Mapping[str, Sequence[Tensor]], points: int = 100) -> dict[str, Any]:
    """What `draw` draws: means over stretches of steps."""
    total = len(next(iter(found.values()))[0])
    stretches = torch.arange(total).tensor_split(min(points, total))
    rows = {name: [[float(row[s].mean()) for s in stretches] for row in seeds] for name, seeds in found.items()}
    return {"steps": [float(stretch.double().mean()) for stretch in stretches], "curves": rows}


def with_options(rule: UpdateRule, **options: Any) -> UpdateRule:
    """The rule with its meta-parameters and another configuration."""
    fresh = make(rule.kind, **{**rule.config.to_dict(), **options})
    fresh.load_state_dict(rule.state_dict())
    return fresh


def best_of(numbers: Mapping[str, Sequence[float]]) -> str:
    """The quantity with the lowest median."""
    return min(numbers, key=lambda name: statistics.median(numbers[name]))


def _no_reset(number: int) -> Tensor:
    raise AssertionError("A run ended before its last step.")
