"""Figures of an analysis, modeled on figures 3 to 15 of Maheswaranathan et al. 2021 (arXiv 2011.02159).

Each function returns a matplotlib Figure, or None if the figure does not apply. Matplotlib is imported on use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lopt.analysis import nqm
from lightning_lopt.analysis.dynamics import Linearization
from lightning_lopt.analysis.findings import Findings, states_along, strong_modes, tensor_learning_rates
from lightning_lopt.analysis.response import effective_learning_rate, update_function

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The color-blind safe palette of Okabe and Ito, and a gray.
BLUE, ORANGE, GREEN, RED, PINK, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#777777"
CYCLE = (BLUE, ORANGE, GREEN, RED, PINK, "#56B4E9", "#000000", "#F0E442")


def trajectories(f: Findings) -> Figure:
    """Fig. 3a, 8 top: states of real runs in their two principal components, and their variance over time."""
    figure, (left, right) = _panels(2)
    paths = f.projection(f.recording.states)
    for index in range(0, paths.shape[1], max(paths.shape[1] // 40, 1)):
        left.plot(paths[:, index, 0], _second(paths[:, index]), color=BLUE, alpha=0.35, linewidth=0.8)
    start = f.projection(f.modes.start)
    left.plot(start[0], _second(start), "o", color="black", label="initial state", zorder=5)
    for index, point in enumerate(f.projection(f.fixed.states)):
        label = "fixed point" if not index else None
        left.plot(point[0], _second(point), "s", color=RED, markersize=6, label=label, zorder=5)
    explained = [f"{100 * float(fraction):.0f} %" for fraction in f.projection.explained[:2]]
    _label(left, f"first component ({explained[0]})", f"second ({explained[-1]})", "states of the runs")
    left.legend(frameon=False, fontsize=8)
    right.semilogy(f.recording.states.var(1).sum(-1).clamp(min=1e-30), color=BLUE)
    _label(right, "step", "variance over coordinates", "convergence of the states")
    return figure


def momentum(f: Findings) -> Figure:
    """Fig. 3b, 8 middle: momentum shifts the update function along the dominant mode up and down."""
    figure, (left, right) = _panels(2)
    _plot_updates_along(left, f, f.modes.dominant)
    left.legend(frameon=False, fontsize=7, title="distance", title_fontsize=7)
    _label(left, "gradient", "update", "update functions along the dominant mode")
    response = f.modes.response(60)
    right.plot(response, color=BLUE, marker=".", markersize=3)
    right.axhline(0, color="0.7", linewidth=0.8)
    _label(right, "steps after a unit gradient", "update", "linearized response to one gradient")
    return figure


def eigenvalues(f: Findings, best_momentum: tuple[float, float] | None = None) -> Figure:
    """Fig. 3c, 8 bottom, 9a, 14c, d: the spectrum at the fixed point, and its modes as momenta with learning rates."""
    figure, (left, right) = _panels(2)
    circle = torch.linspace(0, 2 * torch.pi, 200)
    left.plot(circle.cos(), circle.sin(), color="0.7", linewidth=0.8)
    values, rates = f.modes.eigenvalues, f.modes.amplitudes.abs()
    order = rates.argsort()
    shown = left.scatter(
        values.real[order], values.imag[order], c=rates[order], cmap="viridis_r", s=22, edgecolors="0.4", linewidths=0.4
    )
    figure.colorbar(shown, ax=left, label="|learning rate|", shrink=0.8)
    left.set_aspect("equal")
    _label(left, "real part", "imaginary part", "eigenvalues of the state's Jacobian")
    _plot_modes(right, f.modes, best_momentum)
    return figure


def directions(f: Findings) -> Figure | None:
    """Fig. 9b: update functions along each of the strong modes; None if there is only one, see `momentum`."""
    chosen = strong_modes(f.modes)[:4]
    if len(chosen) < 2:
        return None
    figure, panels = _panels(len(chosen))
    for panel, mode in zip(panels, chosen, strict=True):
        _plot_updates_along(panel, f, mode)
        value = float(f.modes.timescales[mode])
        rate = float(f.modes.learning_rates[mode])
        _label(panel, "gradient", "update", f"momentum {value:.3g}, learning rate {rate:.2g}")
    return figure


def manifold(f: Findings) -> Figure | None:
    """Fig. 13: the fixed points without gradients, and the update functions at them; None if there is at most one."""
    if len(f.fixed.states) < 2:
        return None
    figure, (left, right) = _panels(2)
    rates = effective_learning_rate(f.rule, f.fixed.states)
    points = f.projection(f.fixed.states)
    start = f.projection(f.modes.start)
    left.plot(start[0], _second(start), "s", color="black", label="initial state")
    shown = left.scatter(points[:, 0], _second(points), c=rates, cmap="viridis_r", s=24, label="fixed points")
    figure.colorbar(shown, ax=left, label="effective learning rate", shrink=0.8)
    left.legend(frameon=False, fontsize=8)
    _label(left, "first component", "second", "fixed points without gradients")
    grads = torch.linspace(-3, 3, 101, dtype=torch.float64) * f.gradient_scale
    order = rates.argsort()
    for index in order[torch.linspace(0, len(order) - 1, min(len(order), 8)).round().long()].tolist():
        updates = update_function(f.rule, f.fixed.states[index], grads)
        right.plot(grads, updates, color=shown.to_rgba(float(rates[index])), label=f"{float(rates[index]):.2g}")
    right.legend(frameon=False, fontsize=7, title="learning rate", title_fontsize=7)
    _label(right, "gradient", "update", "update functions at the fixed points")
    return figure


def clipping(f: Findings) -> Figure:
    """Fig. 4, 10: the first update as a function of the gradient, and the distribution of gradients in the runs."""
    figure, (left, right) = _panels(2)
    grads = f.recording.grads.flatten()
    largest = float(grads.abs().max().clamp(min=1e-9))
    limit = min(3 * f.clipping.threshold, 3 * largest) if f.clipping.threshold < float("inf") else largest
    at = torch.linspace(-limit, limit, 301, dtype=torch.float64)
    updates = update_function(f.rule, f.modes.start, at, step=0.0)
    height = 1.6 * float(updates.abs().max())
    left.plot(at, updates, color=BLUE)
    left.plot(at, -f.clipping.learning_rate * at, "--", color=GRAY, linewidth=0.8, label="linear")
    left.set_ylim(-height, height)
    left.legend(frameon=False, fontsize=8)
    _label(left, "gradient", "update", "update function at the initial state")
    sizes = grads.abs()
    sizes = sizes[sizes > 0].log10()
    right.hist(sizes, bins=60, density=True, color=BLUE, alpha=0.7)
    if f.clipping.threshold < float("inf"):
        right.axvline(torch.tensor(f.clipping.threshold).log10(), color=RED, label="clipped beyond")
        right.legend(frameon=False, fontsize=8)
    _label(right, "log10 |gradient|", "density", "gradients of the runs")
    return figure


def schedule(f: Findings) -> Figure:
    """Fig. 5, 11: the path of the state without gradients, and the effective learning rate along it."""
    figure, (left, right) = _panels(2)
    path = f.projection(f.schedule.states)
    left.plot(path[:, 0], _second(path), color=BLUE, marker=".", markersize=3)
    left.plot(path[0, 0], _second(path)[0], "o", color="black", label="initial state")
    left.plot(path[-1, 0], _second(path)[-1], "s", color=RED, label=f"after {len(path) - 1} steps")
    left.legend(frameon=False, fontsize=8)
    _label(left, "first component", "second", "without gradients")
    right.plot(f.schedule.learning_rates, color=BLUE)
    _label(right, "step", "effective learning rate", "autonomous learning-rate schedule")
    return figure


def adaptation(f: Findings) -> Figure:
    """Fig. 6, 12: fixed points under constant gradients (the S-curve), their update functions and learning rates."""
    figure, (left, middle, right) = _panels(3)
    points = f.projection(f.curve.states)
    gradients = f.curve.gradients
    for sign, color, label in ((1, GREEN, "positive gradients"), (-1, RED, "negative gradients")):
        arm = gradients * sign > 0
        left.plot(points[arm, 0], _second(points[arm]), "o-", color=color, markersize=4, linewidth=0.8, label=label)
        right.plot(gradients[arm].abs(), f.curve.learning_rates[arm], "o-", color=color, markersize=4, label=label)
    left.legend(frameon=False, fontsize=8)
    _label(left, "first component", "second", "fixed points under constant gradients")
    grads = torch.linspace(-3, 3, 101, dtype=torch.float64) * f.gradient_scale
    chosen = (gradients > 0).nonzero().flatten()[::3]
    for color, index in zip(CYCLE, chosen.tolist(), strict=False):
        updates = update_function(f.rule, f.curve.states[index], grads)
        middle.plot(grads, updates - updates[50], color=color, label=f"{float(gradients[index]):.2g}")
    middle.legend(frameon=False, fontsize=7, title="after g =", title_fontsize=7)
    _label(middle, "gradient", "update minus update at gradient 0", "update functions at the fixed points")
    if bool((gradients.abs() > 0).any()):
        right.set_xscale("log")
    _label(right, "|constant gradient|", "effective learning rate", "adaptation")
    return figure


def tensors(f: Findings) -> Figure | None:
    """Fig. 7: trajectories, effective learning rates and gradients per tensor; None for a task with one tensor."""
    names = list(f.recording.tensors)
    if len(names) < 2:
        return None
    figure, (left, middle, right) = _panels(3)
    rates = tensor_learning_rates(f)
    for index, name in enumerate(names):
        trajectory = f.recording.tensors[name]
        color = CYCLE[(index // 2) % len(CYCLE)]  # a weight and its bias have the same
        line = "--" if name.endswith("bias") else "-"
        path = f.projection(trajectory.states.mean(1))
        left.plot(path[:, 0], _second(path), line, color=color, linewidth=1.2)
        middle.plot(rates[name], line, color=color, linewidth=1.2)
        sizes = trajectory.grads.abs().flatten()
        sizes = sizes[sizes > 0].log10()
        if len(sizes):
            heights, edges = torch.histogram(sizes, 40, density=True)
            right.plot(0.5 * (edges[1:] + edges[:-1]), heights, line, color=color, linewidth=1.2, label=name)
    right.legend(frameon=False, fontsize=6)
    _label(left, "first component", "second", "mean state of each tensor")
    _label(middle, "step", "effective learning rate", "learning rate of each tensor")
    _label(right, "log10 |gradient|", "density", "gradients of each tensor")
    return figure


def losses(f: Findings) -> Figure:
    """App. B: the loss curves of the rule and of its linearization."""
    figure, (panel,) = _panels(1)
    for recording, color, line, label in ((f.recording, BLUE, "-", f.name), (f.linear, ORANGE, "--", "linearized")):
        if recording is not None:
            relative = recording.losses / recording.losses[0]
            panel.semilogy(relative.mean(1), line, color=color, label=label)
    panel.legend(frameon=False, fontsize=8)
    _label(panel, "step", "loss / first loss, mean over runs", f"on {f.task}")
    return figure


def history(steps: list[int], modes: list[Linearization], best_momentum: tuple[float, float] | None = None) -> Figure:
    """Fig. 15 (App. B.2): the modes during meta-training, and momentum and learning rate of the dominant one."""
    figure, (left, middle, right) = _panels(3)
    for step, each in zip(steps, modes, strict=True):
        time = [step / max(steps[-1], 1)] * len(each.timescales)
        left.scatter(each.timescales, each.learning_rates.abs(), c=time, cmap="viridis_r", vmin=0, vmax=1, s=6)
    _label(left, "momentum", "|learning rate|", "modes, later ones darker")
    middle.plot(steps, [float(each.timescales[each.dominant]) for each in modes], color=BLUE)
    right.plot(steps, [float(each.learning_rates[each.dominant]) for each in modes], color=BLUE)
    _label(middle, "meta-training step", "momentum", "dominant mode")
    _label(right, "meta-training step", "learning rate", "dominant mode")
    if best_momentum is not None:
        learning_rate, beta = best_momentum
        left.plot(beta, learning_rate, "*", color=RED, markersize=12)
        middle.axhline(beta, color="black", linewidth=0.8)
        right.axhline(learning_rate, color="black", linewidth=0.8)
    return figure


# --- the noisy quadratic model


def stability(hessian: Tensor, P: Tensor) -> Figure:
    """STAR's Fig. 1: a nominal term moves the eigenvalues of the dynamics into the unit circle and out of it again."""
    figure, (left, right) = _panels(2)
    sharpest = float(torch.linalg.eigvalsh(hessian)[-1])
    fractions = torch.linspace(0, 1.2, 121, dtype=torch.float64)  # alpha as a fraction of 2 / lambda_max(H)
    alphas = fractions * 2 / sharpest
    spectra = torch.stack([torch.linalg.eigvals(nqm.dynamics_matrix(hessian, P, float(a))) for a in alphas])
    circle = torch.linspace(0, 2 * torch.pi, 200)
    left.plot(circle.cos(), circle.sin(), color="0.7", linewidth=0.8)
    for values, fraction in zip(spectra[::10], fractions[::10], strict=True):
        color = [float(fraction)] * len(values)
        left.scatter(values.real, values.imag, c=color, cmap="viridis_r", vmin=0, vmax=1.2, s=24)
    left.set_aspect("equal")
    _label(left, "real part", "imaginary part", "eigenvalues of A, darker for larger alpha")
    right.plot(fractions, spectra.abs().amax(1), color=BLUE)
    right.axhline(1, color="0.7", linewidth=0.8)
    margins = nqm.theorem1_margins(hessian.expand(121, -1, -1), P.expand(121, -1, -1), alphas)
    held = fractions[margins.hold]
    if len(held):
        right.axvspan(float(held[0]), float(held[-1]), color=GREEN, alpha=0.15, label="stable by Theorem 1")
        right.legend(frameon=False, fontsize=8)
    _label(right, "alpha lambda_max(H) / 2", "spectral radius", "nominal term and stability")
    return figure


def gradient_variance(fractions: Tensor, horizons: Sequence[int], variances: Tensor) -> Figure:
    """STAR's Fig. 2a: variance of the meta-gradient as a function of the nominal term.

    Args:
        fractions: (n,) alpha as a fraction of 2 / lambda_max(H).
        horizons: lengths of the runs.
        variances: (n, len(horizons)).
    """
    import matplotlib

    figure, (panel,) = _panels(1)
    colors = matplotlib.colormaps["winter"]
    for index, horizon in enumerate(horizons):
        panel.semilogy(fractions, variances[:, index], color=colors(1 - index / len(horizons)), linewidth=1)
        if horizon in (1, 10, 100, 1000):
            panel.annotate(f"T = {horizon}", (float(fractions[-1]), float(variances[-1, index])), fontsize=7)
    _label(panel, "alpha lambda_max(H) / 2", "trace of the variance", "variance of the gradient with respect to P")
    return figure


def meta_training(runs: dict[float, list[nqm.MetaTraining]]) -> Figure:
    """STAR's Fig. 2b, c: eigenvalues and meta-loss during meta-training, means over seeds.

    Args:
        runs: alpha as a fraction of 2 / lambda_max(H) -> one run per seed.
    """
    figure, (left, right) = _panels(2)
    for color, (fraction, seeds) in zip(CYCLE, runs.items(), strict=False):
        spectra = torch.stack([each.eigenvalues for each in seeds]).mean(0)
        left.plot(spectra[:, 0], ":", color=color)
        left.plot(spectra[:, -1], "-", color=color)
        losses = torch.stack([each.losses for each in seeds]).clamp(max=1e6)
        right.semilogy(losses.mean(0), color=color, label=f"{fraction:.1f}")
    right.legend(frameon=False, fontsize=8, title="alpha lambda_max / 2", title_fontsize=8)
    left.axhline(1, color="0.7", linewidth=0.8)
    _label(left, "meta-training step", "|eigenvalue| of A", "larger (dotted) and smaller eigenvalue")
    _label(right, "meta-training step", "expected mean loss, T = 50", "meta-loss")
    return figure


# --- helpers


def _plot_updates_along(panel: Axes, f: Findings, mode: int) -> None:
    """Plot update functions at states along a mode, at up to twice the median distance of the recorded states."""
    away = f.recording.states.flatten(0, 1) - f.modes.state
    distances = torch.linspace(-2, 2, 5, dtype=torch.float64) * away.norm(dim=1).quantile(0.5).clamp(min=1e-6)
    grads = torch.linspace(-3, 3, 101, dtype=torch.float64) * f.gradient_scale
    for color, state, distance in zip(CYCLE, states_along(f.modes, distances, mode), distances, strict=False):
        panel.plot(grads, update_function(f.rule, state, grads), color=color, label=f"{float(distance):+.2g}")


def _plot_modes(panel: Axes, modes: Linearization, best_momentum: tuple[float, float] | None) -> None:
    panel.scatter(modes.timescales, modes.learning_rates, color=GRAY, s=14, label="modes")
    strong = strong_modes(modes)
    panel.scatter(modes.timescales[strong], modes.learning_rates[strong], color=BLUE, s=30, label="strong modes")
    if best_momentum is not None:
        learning_rate, beta = best_momentum
        panel.plot(beta, learning_rate, "*", color=RED, markersize=13, label="best momentum for this task")
    panel.legend(frameon=False, fontsize=8)
    _label(panel, "momentum |eigenvalue|", "learning rate", "modes as momenta")


def _panels(number: int) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * number, 3.6), layout="constrained")
    return figure, figure.subplots(1, number, squeeze=False)[0]


def _label(panel: Axes, x: str, y: str, title: str) -> None:
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.set_title(title, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def _second(points: Tensor) -> Tensor:
    """The second component, or 0 if there is only one."""
    return points[..., 1] if points.shape[-1] > 1 else torch.zeros_like(points[..., 0])
