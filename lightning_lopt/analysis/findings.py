"""One look at a rule on a task: everything that the report shows, and what it says in plain words."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lightning_lopt.analysis.cells import Cell
from lightning_lopt.analysis.dynamics import FixedPoints, Linearization, find_fixed_points, linearize
from lightning_lopt.analysis.response import Clipping, clipping, effective_learning_rate
from lightning_lopt.analysis.trajectories import (
    Projection,
    Recording,
    Schedule,
    SCurve,
    autonomous,
    principal_components,
    record,
    s_curve,
)
from lightning_lopt.rules import UpdateRule
from lightning_lopt.tasks import Task

WEAK = 0.02
"""Modes whose part of the whole step per unit of gradient is below this are not named."""
ALIKE = 0.02
"""Eigenvalues closer than this are one momentum in words."""
TRACKS = 0.05
"""A linearization whose loss curve differs by less is as good as the rule."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found in one rule."""

    name: str
    task: str
    rule: UpdateRule
    recording: Recording
    fixed: FixedPoints
    modes: Linearization  # at the fixed point where runs end; without one, where the state goes without gradients
    projection: Projection  # of the recorded states
    schedule: Schedule
    curve: SCurve
    clipping: Clipping
    linear: Recording | None  # the linearized rule on the same task; None where there is no fixed point

    @property
    def settles(self) -> bool:
        """Whether the state holds still somewhere without gradients."""
        return len(self.fixed.states) > 0

    @property
    def gradient_scale(self) -> float:
        """The 90th percentile of the size of the recorded gradients that are not 0."""
        sizes = self.recording.grads.abs().flatten()
        sizes = sizes[sizes > 0]
        return float(sizes.sort().values[int(0.9 * len(sizes))]) if len(sizes) else 1.0


def analyze(
    rule: UpdateRule, task: Task, *, name: str = "rule", steps: int = 200, runs: int = 16, seed: int = 0
) -> Findings:
    """Run a rule on a task, and look at it from all sides.

    Args:
        rule: any rule that needs nothing shared between tensors.
        task: what to run it on.
        name: what to call it.
        steps: length of the runs.
        runs: how many.
        seed: of everything.

    Raises:
        ValueError: for a rule whose steps are made by all tensors together.
    """
    if rule.needs_shared_context:
        raise ValueError(
            f"{name} computes something from all tensors together (kind {rule.kind}); a coordinate alone does not show "
            "it. Use scope='tensor', or analyze its network as kind 'lstm'."
        )
    recording = record(rule, task, steps=steps, runs=runs, seed=seed)
    schedule = autonomous(rule, steps=steps)
    starts = torch.cat([recording.states[:: max(steps // 4, 1), ::7].flatten(0, 1)[-60:], schedule.states[-1:]])
    fixed = find_fixed_points(rule, initial_states=starts)
    home = schedule.states[-1]
    if len(fixed.states):  # the one that runs without gradients come to
        home = fixed.states[(fixed.states - home).norm(dim=1).argmin()]
    modes = linearize(rule, home)
    linear = record(modes.rule(), task, steps=steps, runs=runs, seed=seed) if len(fixed.states) else None
    largest = float(recording.grads.abs().max().clamp(min=1e-6))
    sizes = torch.logspace(math.log10(largest) - 4, math.log10(largest), 10, dtype=torch.float64)
    return Findings(
        name,
        task.name,
        rule,
        recording,
        fixed,
        modes,
        principal_components(recording.states),
        schedule,
        s_curve(rule, torch.cat([-sizes.flip(0), sizes])),
        clipping(rule, Cell.of(rule).initial, largest=max(10 * largest, 1.0), seen=recording.grads),
        linear,
    )


def strong_modes(modes: Linearization) -> list[int]:
    """The modes that matter, one of each conjugate pair: by their part of the whole step per unit of gradient."""
    parts = (modes.amplitudes / (1 - modes.eigenvalues)).abs()
    total = parts.sum() + abs(modes.direct)
    chosen = [index for index in parts.argsort(descending=True).tolist() if parts[index] >= WEAK * total]
    return [index for index in chosen if modes.eigenvalues[index].imag >= -1e-12]


def along(modes: Linearization, reach: Tensor, mode: int | None = None) -> Tensor:
    """(n, d) states moved from the fixed point along a mode, the dominant one by default: `reach` (n,) unit vectors."""
    vector = modes.vectors[:, modes.dominant if mode is None else mode].real
    direction = vector / vector.norm().clamp(min=1e-12)
    moved: Tensor = modes.state + reach.unsqueeze(1) * direction
    return moved


def words(findings: Findings) -> list[str]:
    """What the rule has learned, in sentences."""
    parts = (_momentum, _direct, _fixed_points, _clip, _schedule, _adaptation, _tensors, _linear)
    return [sentence for part in parts for sentence in part(findings)]


def momenta(modes: Linearization) -> list[tuple[complex, float]]:
    """(eigenvalue, learning rate) of the momenta that matter, largest part of the step first.

    Modes closer than `ALIKE` act as one: their learning rates are added up. So are those of conjugate pairs.
    """
    parts = torch.nan_to_num((modes.amplitudes / (1 - modes.eigenvalues)).abs(), 0.0, 0.0)
    left, found = parts.argsort(descending=True).tolist(), []
    values = torch.complex(modes.eigenvalues.real, modes.eigenvalues.imag.abs())
    while left:
        near = [index for index in left if index == left[0] or float((values[index] - values[left[0]]).abs()) < ALIKE]
        rate, value = float(modes.learning_rates[near].sum()), complex(values[left[0]])
        found.append((abs(rate) / max(abs(1 - value), 1e-9), value, rate))
        left = [index for index in left if index not in near]
    total = sum(part for part, _, _ in found) + abs(modes.direct)
    return [(value, rate) for part, value, rate in sorted(found, key=lambda f: -f[0]) if part >= WEAK * total]


def _momentum(f: Findings) -> list[str]:
    sentences, strong = [], momenta(f.modes)
    for value, rate in strong[:4]:
        size = abs(value)
        kind = f"Momentum {size:.3g} with learning rate {rate:.3g}"
        if value.imag > ALIKE:
            turn = 2 * math.pi / abs(math.atan2(value.imag, value.real))
            kind = f"Momentum of size {size:.3g} that swings once in {turn:.0f} steps, with learning rate {rate:.3g}"
        memory = -1 / math.log(min(max(size, 1e-12), 1 - 1e-12))
        sentences.append(f"{kind}: a gradient acts on for about {memory:.3g} steps.")
    if not strong:
        return ["No momentum: no mode of its state moves a parameter."]
    if len(strong) > 4:
        sentences.append(f"{len(strong) - 4} more modes, each a smaller part of the step.")
    return sentences


def _direct(f: Findings) -> list[str]:
    if abs(f.modes.direct) <= WEAK * max(f.modes.feedthrough, 1e-12):
        return []
    return [f"Plain gradient descent beside it, with learning rate {f.modes.direct:.3g}."]


def _fixed_points(f: Findings) -> list[str]:
    number = len(f.fixed.states)
    if not number:
        return ["Without gradients its state never comes to rest: the modes are those where it is after the run."]
    points = "one fixed point" if number == 1 else f"{number} fixed points (a line of them, if they are many)"
    stable = float(f.modes.timescales.max())
    kind = "attracting" if stable < 1 else "not attracting"
    moved = f.recording.losses.shape[0] * abs(f.modes.offset)
    drift = f"there it still moves parameters by {f.modes.offset:.2g} a step, {moved:.2g} over the run"
    return [f"Without gradients its state comes to {points}, {kind} (largest eigenvalue {stable:.4g}); {drift}."]


def _clip(f: Findings) -> list[str]:
    c = f.clipping
    if not c.learning_rate > 0:
        return ["Its first update does not go against the gradient."]
    if math.isinf(c.threshold):
        return [f"No clipping: its first update, {c.learning_rate:.3g} times the gradient, is linear as far as looked."]
    shape = "" if c.monotonic else " Larger gradients even make smaller updates."
    return [
        f"Clips beyond |g| = {c.threshold:.2g}: there the first update is half of {c.learning_rate:.3g} |g|. Of the "
        f"gradients of these runs {100 * c.share:.2g} % are larger.{shape}"
    ]


def _schedule(f: Findings) -> list[str]:
    rates = f.schedule.learning_rates
    first, last, highest = float(rates[0]), float(rates[-1]), int(rates.argmax())
    if last == 0 or abs(first - last) <= 0.1 * abs(last) and float(rates.max()) <= 1.1 * last:
        return [f"No schedule of its own: without gradients its effective learning rate stays about {last:.3g}."]
    near = ((rates - last).abs() <= 0.05 * (rates - last).abs().max()).long()
    settled = int(len(rates) - near.flip(0).cumprod(0).sum())
    if highest == 0:
        return [f"Decays for {settled} steps by itself: effective learning rate {first:.3g} at first, {last:.3g} then."]
    if float(rates.max()) <= 1.1 * last:
        return [f"Warms up for {settled} steps: effective learning rate {first:.3g} at first, {last:.3g} then."]
    return [
        f"Warms up for {highest} steps, effective learning rate from {first:.3g} to {float(rates.max()):.3g}, and "
        f"decays to {last:.3g} by step {settled}."
    ]


def _adaptation(f: Findings) -> list[str]:
    if len(f.curve.gradients) < 3:
        return ["Constant gradients do not bring its state to rest: no adaptation can be read off fixed points."]
    rates, sizes = f.curve.learning_rates, f.curve.gradients.abs()
    small, large = float(rates[sizes.argmin()]), float(rates[sizes.argmax()])
    if small <= 0:
        return []
    change = large / small
    if 0.8 < change < 1.25:
        return [f"No adaptation: after large gradients for long its learning rate is {change:.2g} of that after small."]
    verb = "Lowers" if change < 1 else "Raises"
    return [f"{verb} its learning rate to {change:.2g} of it after gradients of {float(sizes.max()):.2g} for long."]


def _tensors(f: Findings) -> list[str]:
    rates = tensor_learning_rates(f)
    if len(rates) < 2:
        return []
    middle = {name: float(rate.median()) for name, rate in rates.items()}
    low, high = min(middle, key=middle.__getitem__), max(middle, key=middle.__getitem__)
    return [
        f"Over a run its effective learning rate is lowest for {low} (median {middle[low]:.3g}) and highest for {high} "
        f"({middle[high]:.3g})."
    ]


def _linear(f: Findings) -> list[str]:
    if f.linear is None:
        return []
    error = linear_error(f)
    if not error < 10:
        return ["Linearized at its fixed point and run alone it diverges: what bends its updates keeps it stable."]
    sentence = (
        f"Linearized at its fixed point and run alone, its mean loss curve is within {100 * error:.2g} % of its own"
    )
    highest, last = float(f.schedule.learning_rates.max()), float(f.schedule.learning_rates[-1])
    if error > TRACKS and highest > 1.1 * last > 0:  # why not better: a linearization has no schedule
        sentence += (
            f": it has that point's learning rate, {last:.3g}, from the first step on; the rule has up to {highest:.3g}"
        )
    return [sentence + "."]


def tensor_learning_rates(findings: Findings) -> dict[str, Tensor]:
    """Tensor -> (steps,) effective learning rate at the mean of its coordinates' states (section 5.5)."""
    states = {name: trajectory.states[:-1].mean(1) for name, trajectory in findings.recording.tensors.items()}
    return {name: effective_learning_rate(findings.rule, rows) for name, rows in states.items()}


def linear_error(findings: Findings) -> float:
    """The mean difference of both mean loss curves, relative to their starts, divided by the mean of the rule's own."""
    if findings.linear is None:
        return math.nan
    own, other = ((r.losses / r.losses[0]).mean(1) for r in (findings.recording, findings.linear))
    return float((own - other).abs().mean() / own.mean())
