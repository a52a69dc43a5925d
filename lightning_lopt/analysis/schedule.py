"""What `lopt show` says of a scheduled rule: its readable numbers in words, and its schedule as a chart."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_lopt.rules import Scheduled, scheduled, scheduler

LENGTHS = (100, 1_000, 10_000, None)  # of the runs whose schedule is drawn; None: unknown
BLOCKS = "▁▂▃▄▅▆▇█"
LAST_STEP = 10_000  # up to which the schedule of unknown length is drawn, over log(step)
WIDTH = 50


def describe(rule: Scheduled) -> str:
    """The readable numbers as a table in words, then the schedule: one line of bars per run length.

    Example:
        >>> from lightning_lopt.rules import make
        >>> print(describe(make("scheduled", peak=0.5, anneal=1.0)).splitlines()[2])
                    peak   0.5      log of the largest factor, on a run of 1,000 steps
    """
    meanings = rule.config.meanings()
    rows = [f"{name:>16}   {getattr(rule.config, name):<8.4g} {meaning}" for name, meaning in meanings.items()]
    started = scheduled.curves(rule.config)
    if any(not torch.equal(value.float(), started[name]) for name, value in rule.meta_params().items()):
        rows.append("The meta-parameters were trained on from there; the schedule below is drawn from them.")
    charts = [_chart(rule, length) for length in LENGTHS]
    head = "The readable numbers (factors multiply the nominal step size "
    head += f"{rule.config.nominal_stepsize:.4g}; 'log' is the natural logarithm):"
    return "\n".join([head, "", *rows, "", "Step size over the run, before each tensor's own factor:", "", *charts])


def step_sizes(rule: Scheduled, num_steps: int | None, points: int) -> tuple[list[float], list[float]]:
    """Steps, evenly spaced (over log(step) for an unknown length), and the step size at each.

    Args:
        rule: the rule.
        num_steps: the run's length; None where it is unknown.
        points: how many steps.
    """
    if num_steps is None:
        steps = torch.logspace(0, torch.log10(torch.tensor(float(LAST_STEP))).item(), points) - 1
    else:
        steps = torch.linspace(0, num_steps - 1, points)
    meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
    factors = scheduler.log_factor(meta_params, steps, num_steps).exp()
    return steps.tolist(), (rule.config.nominal_stepsize * factors).tolist()


def plot(rule: Scheduled, path: Path) -> None:
    """Draw the schedule into a PNG file; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    known, unknown = figure.subplots(1, 2, sharey=True)
    for length in LENGTHS:
        steps, sizes = step_sizes(rule, length, 400)
        if length is None:
            unknown.plot([step + 1 for step in steps], sizes, color="C3")
        else:
            known.plot([step / (length - 1) for step in steps], sizes, label=f"{length:,} steps")
    known.set(xlabel="fraction of the run", ylabel="step size before each tensor's own factor", yscale="log")
    unknown.set(xlabel="step", xscale="log", title="run of unknown length")
    known.set_title("run of known length")
    known.legend()
    figure.savefig(path, dpi=120)


def _chart(rule: Scheduled, num_steps: int | None) -> str:
    sizes = step_sizes(rule, num_steps, WIDTH)[1]
    top = max(sizes)
    bars = "".join(BLOCKS[min(int(len(BLOCKS) * size / top), len(BLOCKS) - 1)] for size in sizes)
    name = f"unknown, to {LAST_STEP:,}" if num_steps is None else f"{num_steps:,} steps"
    return f"{name:>18} {bars} first {sizes[0]:.2g}, largest {top:.2g}, last {sizes[-1]:.2g}"
