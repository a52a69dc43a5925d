"""A complete analysis of a rule on a task: the results that the report shows, and sentences that summarize them."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lightning_lopt.analysis.coordinate import CoordinateDynamics
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
"""Modes are omitted if they contribute less than this fraction of the whole step per unit of gradient."""
ALIKE = 0.02
"""Eigenvalues closer than this are reported as one momentum."""
TRACKS = 0.05
"""A linearization tracks the rule if the relative difference of their loss curves is smaller."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """The results of an analysis."""

    name: str
    task: str
    rule: UpdateRule
    recording: Recording
    fixed: FixedPoints
    modes: Linearization  # at the fixed point nearest to the end of a run without gradients, or at that end
    projection: Projection  # of the recorded states
    schedule: Schedule
    curve: SCurve
    clipping: Clipping
    linear: Recording | None  # the linearized rule on the same task; None if there is no fixed point

    @property
    def gradient_scale(self) -> float:
        """The 90th percentile of the recorded |gradient|, without zeros."""
        sizes = self.recording.grads.abs().flatten()
        sizes = sizes[sizes > 0]
        return float(sizes.sort().values[int(0.9 * len(sizes))]) if len(sizes) else 1.0


def analyze(
    rule: UpdateRule, task: Task, *, name: str = "rule", steps: int = 200, runs: int = 16, seed: int = 0
) -> Findings:
    """Run a rule on a task and analyze it.

    Args:
        rule: any rule without a shared context.
        task: the task to run it on.
        name: name of the rule in the report.
        steps: length of the runs.
        runs: number of runs.
        seed: seed of everything random.

    Raises:
        ValueError: for a rule with a shared context.
    """
    if rule.needs_shared_context:
        raise ValueError(
            f"{name} (kind {rule.kind}) computes a context from all tensors together, which the analysis of single "
            "coordinates cannot show. Use scope='tensor', or analyze its network as kind 'lstm'."
        )
    recording = record(rule, task, steps=steps, runs=runs, seed=seed)
    schedule = autonomous(rule, steps=steps)
    starts = torch.cat([recording.states[:: max(steps // 4, 1), ::7].flatten(0, 1)[-60:], schedule.states[-1:]])
    fixed = find_fixed_points(rule, initial_states=starts)
    rest = schedule.states[-1]
    if len(fixed.states):  # the nearest fixed point
        rest = fixed.states[(fixed.states - rest).norm(dim=1).argmin()]
    modes = linearize(rule, rest)
    linear = record(modes.rule(), task, steps=steps, runs=runs, seed=seed) if len(fixed.states) else None
    largest = float(recording.grads.abs().max().clamp(min=1e-6))
    sizes = torch.logspace(math.log10(largest) - 4, math.log10(largest), 10, dtype=torch.float64)
    initial = CoordinateDynamics.from_rule(rule).initial
    return Findings(
        name=name,
        task=task.name,
        rule=rule,
        recording=recording,
        fixed=fixed,
        modes=modes,
        projection=principal_components(recording.states),
        schedule=schedule,
        curve=s_curve(rule, torch.cat([-sizes.flip(0), sizes])),
        clipping=clipping(rule, initial, largest=max(10 * largest, 1.0), seen=recording.grads),
        linear=linear,
    )


def strong_modes(modes: Linearization) -> list[int]:
    """Return the modes that are not `WEAK`, strongest first, with one of each conjugate pair."""
    reach = modes.reach
    total = reach.sum() + abs(modes.direct)
    chosen = [index for index in reach.argsort(descending=True).tolist() if reach[index] >= WEAK * total]
    return [index for index in chosen if modes.eigenvalues[index].imag >= -1e-12]


def states_along(modes: Linearization, distances: Tensor, mode: int) -> Tensor:
    """Return (n, d) states at signed distances (n,) from the fixed point in the direction of a mode."""
    vector = modes.vectors[:, mode].real
    direction = vector / vector.norm().clamp(min=1e-12)
    states: Tensor = modes.state + distances.unsqueeze(1) * direction
    return states


def describe(findings: Findings) -> list[str]:
    """Describe what the rule has learned, in sentences."""
    topics = (_momentum, _direct, _fixed_points, _clip, _schedule, _adaptation, _tensors, _linear)
    return [sentence for topic in topics for sentence in topic(findings)]


def momenta(modes: Linearization) -> list[tuple[complex, float]]:
    """Return (eigenvalue, learning rate) of the momenta that are not `WEAK`, strongest first.

    Modes closer than `ALIKE`, and conjugate pairs, act as one momentum: their learning rates are added.
    """
    reach = torch.nan_to_num(modes.reach, 0.0, 0.0)
    values = torch.complex(modes.eigenvalues.real, modes.eigenvalues.imag.abs())
    remaining = reach.argsort(descending=True).tolist()
    found = []
    while remaining:
        first = remaining[0]
        group = [i for i in remaining if i == first or float((values[i] - values[first]).abs()) < ALIKE]
        rate = float(modes.learning_rates[group].sum())
        value = complex(values[first])
        found.append((abs(rate) / max(abs(1 - value), 1e-9), value, rate))
        remaining = [i for i in remaining if i not in group]
    total = sum(strength for strength, _, _ in found) + abs(modes.direct)
    found.sort(key=lambda momentum: -momentum[0])
    return [(value, rate) for strength, value, rate in found if strength >= WEAK * total]


def _momentum(f: Findings) -> list[str]:
    strong = momenta(f.modes)
    if not strong:
        return ["No momentum: no mode of the state moves a parameter."]
    sentences = []
    for value, rate in strong[:4]:
        size = abs(value)
        kind = f"Momentum {size:.3g} with learning rate {rate:.3g}"
        if value.imag > ALIKE:
            period = 2 * math.pi / abs(math.atan2(value.imag, value.real))
            kind = f"Oscillating momentum {size:.3g} with a period of {period:.0f} steps and learning rate {rate:.3g}"
        memory = -1 / math.log(min(max(size, 1e-12), 1 - 1e-12))
        sentences.append(f"{kind}: a gradient has an effect for about {memory:.3g} steps.")
    if len(strong) > 4:
        sentences.append(f"{len(strong) - 4} more momenta contribute less to the step.")
    return sentences


def _direct(f: Findings) -> list[str]:
    if abs(f.modes.direct) <= WEAK * max(f.modes.feedthrough, 1e-12):
        return []
    return [f"In addition, plain gradient descent with learning rate {f.modes.direct:.3g}."]


def _fixed_points(f: Findings) -> list[str]:
    number = len(f.fixed.states)
    if not number:
        return ["Without gradients the state does not converge; the modes are those at its state after the run."]
    points = "one fixed point" if number == 1 else f"{number} fixed points (many of them suggest a line)"
    stable = float(f.modes.timescales.max())
    kind = "attracting" if stable < 1 else "not attracting"
    moved = f.recording.losses.shape[0] * abs(f.modes.offset)
    drift = f"there parameters still move by {f.modes.offset:.2g} per step, {moved:.2g} over the run"
    return [f"Without gradients the state has {points}, {kind} (largest |eigenvalue| {stable:.4g}); {drift}."]


def _clip(f: Findings) -> list[str]:
    c = f.clipping
    if not c.learning_rate > 0:
        return ["The first update is not in the direction of the negative gradient."]
    if math.isinf(c.threshold):
        return [f"No clipping: the first update, {c.learning_rate:.3g} times the gradient, is linear as far as tested."]
    shape = "" if c.monotonic else " Larger gradients can give smaller updates."
    return [
        f"Clips beyond |g| = {c.threshold:.2g}, where the first update is half of {c.learning_rate:.3g} |g|. "
        f"{100 * c.fraction:.2g} % of the gradients of these runs are larger.{shape}"
    ]


def _schedule(f: Findings) -> list[str]:
    rates = f.schedule.learning_rates
    first = float(rates[0])
    last = float(rates[-1])
    peak = float(rates.max())
    peak_step = int(rates.argmax())
    if last == 0 or abs(first - last) <= 0.1 * abs(last) and peak <= 1.1 * last:
        return [f"No autonomous schedule: without gradients the effective learning rate stays about {last:.3g}."]
    near_end = ((rates - last).abs() <= 0.05 * (rates - last).abs().max()).long()
    settled = int(len(rates) - near_end.flip(0).cumprod(0).sum())
    if peak_step == 0:
        return [
            f"Without gradients the effective learning rate decays from {first:.3g} to {last:.3g} in {settled} steps."
        ]
    if peak <= 1.1 * last:
        return [
            f"Without gradients the effective learning rate rises from {first:.3g} to {last:.3g} in {settled} steps."
        ]
    return [
        f"Without gradients the effective learning rate rises from {first:.3g} to {peak:.3g} in {peak_step} steps, and "
        f"decays to {last:.3g} by step {settled}."
    ]


def _adaptation(f: Findings) -> list[str]:
    if len(f.curve.gradients) < 3:
        return ["Under constant gradients the state has no fixed points, so adaptation cannot be measured at them."]
    rates = f.curve.learning_rates
    sizes = f.curve.gradients.abs()
    small = float(rates[sizes.argmin()])
    if small <= 0:
        return []
    change = float(rates[sizes.argmax()]) / small
    if 0.8 < change < 1.25:
        return [f"No adaptation: persistent large gradients change its learning rate by a factor of only {change:.2g}."]
    verb = "lower" if change < 1 else "raise"
    return [f"Persistent gradients of {float(sizes.max()):.2g} {verb} its learning rate, by a factor of {change:.2g}."]


def _tensors(f: Findings) -> list[str]:
    rates = tensor_learning_rates(f)
    if len(rates) < 2:
        return []
    medians = {name: float(rate.median()) for name, rate in rates.items()}
    low = min(medians, key=medians.__getitem__)
    high = max(medians, key=medians.__getitem__)
    return [
        f"The median effective learning rate over a run is lowest for {low} ({medians[low]:.3g}) and highest for "
        f"{high} ({medians[high]:.3g})."
    ]


def _linear(f: Findings) -> list[str]:
    if f.linear is None:
        return []
    error = linear_error(f)
    if not error < 10:
        return ["Linearized at its fixed point it diverges: the nonlinearity of its updates keeps it stable."]
    sentence = f"Linearized at its fixed point, its mean loss curve differs by {100 * error:.2g} %"
    highest = float(f.schedule.learning_rates.max())
    last = float(f.schedule.learning_rates[-1])
    if error > TRACKS and highest > 1.1 * last > 0:  # one reason for the difference: a linearization has no schedule
        sentence += f": its learning rate is {last:.3g} from the first step on, that of the rule up to {highest:.3g}"
    return [sentence + "."]


def tensor_learning_rates(findings: Findings) -> dict[str, Tensor]:
    """Compute (steps,) effective learning rates of each tensor, at the mean state of its coordinates (section 5.5)."""
    states = {name: trajectory.states[:-1].mean(1) for name, trajectory in findings.recording.tensors.items()}
    return {name: effective_learning_rate(findings.rule, rows) for name, rows in states.items()}


def linear_error(findings: Findings) -> float:
    """Compute the mean absolute difference of the rule's and the linearization's loss curves, relative to the rule's.

    The curves are means over the runs of loss / first loss.
    """
    if findings.linear is None:
        return math.nan
    own, linear = ((r.losses / r.losses[0]).mean(1) for r in (findings.recording, findings.linear))
    return float((own - linear).abs().mean() / own.mean())
