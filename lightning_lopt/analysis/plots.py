"""Figures of an analysis, after those of Maheswaranathan et al. 2021 (arXiv 2011.02159), figures 3 to 15.

Each function returns a matplotlib Figure. Matplotlib is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lopt.analysis import nqm
from lightning_lopt.analysis.dynamics import Linearization
from lightning_lopt.analysis.findings import Findings, along, strong_modes, tensor_learning_rates
from lightning_lopt.analysis.response import effective_learning_rate, update_function

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which stay apart for color-blind eyes.
BLUE, ORANGE, GREEN, RED, PINK, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#777777"
CYCLE = (BLUE, ORANGE, GREEN, RED, PINK, "#56B4E9", "#000000", "#F0E442")


def trajectories(f: Findings) -> Figure:
    """Fig. 3a, 8 top: states of real runs in their two main directions, and how their variance goes."""
    figure, (left, right) = _panels(2)
    paths = f.projection(f.recording.states)
    for index in range(0, paths.shape[1], max(paths.shape[1] // 40, 1)):
        left.plot(paths[:, index, 0], _second(paths[:, index]), color=BLUE, alpha=0.35, linewidth=0.8)
    start = f.projection(f.modes.start)
    left.plot(start[0], _second(start), "o", color="black", label="initial state", zorder=5)
    for index, point in enumerate(f.projection(f.fixed.states)):
        label = "fixed point" if not index else None
        left.plot(point[0], _second(point), "s", color=RED, markersize=6, label=label, zorder=5)
    explained = [f"{100 * float(share):.0f} %" for share in f.projection.explained[:2]]
    _label(left, f"first component ({explained[0]})", f"second ({explained[-1]})", "states of runs")
    left.legend(frameon=False, fontsize=8)
    right.semilogy(f.recording.states.var(1).sum(-1).clamp(min=1e-30), color=BLUE)
    _label(right, "step", "variance over coordinates", "do they come together?")
    return figure


def momentum(f: Findings) -> Figure:
    """Fig. 3b, 8 middle: update functions along the dominant mode, which momentum shifts up and down."""
    figure, (left, right) = _panels(2)
    _moved(left, f, f.modes.dominant)
    left.legend(frameon=False, fontsize=7, title="moved by", title_fontsize=7)
    _label(left, "gradient", "update", "update functions along the dominant mode")
    response = f.modes.response(60)
    right.plot(response, color=BLUE, marker=".", markersize=3)
    right.axhline(0, color="0.7", linewidth=0.8)
    _label(right, "steps after a unit gradient", "update", "what one gradient does, linearized")
    return figure


def eigenvalues(f: Findings, star: tuple[float, float] | None = None) -> Figure:
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
    _modes_panel(right, f.modes, star)
    return figure


def directions(f: Findings) -> Figure | None:
    """Fig. 9b: update functions along each of the modes that matter; None where there is but one, see `momentum`."""
    chosen = strong_modes(f.modes)[:4]
    if len(chosen) < 2:
        return None
    figure, panels = _panels(len(chosen))
    for panel, mode in zip(panels, chosen, strict=True):
        _moved(panel, f, mode)
        value, rate = float(f.modes.timescales[mode]), float(f.modes.learning_rates[mode])
        _label(panel, "gradient", "update", f"momentum {value:.3g}, learning rate {rate:.2g}")
    return figure


def manifold(f: Findings) -> Figure | None:
    """Fig. 13: fixed points without gradients, and the update functions there; None where there are not several."""
    if len(f.fixed.states) < 2:
        return None
    figure, (left, right) = _panels(2)
    rates, points = effective_learning_rate(f.rule, f.fixed.states), f.projection(f.fixed.states)
    start = f.projection(f.modes.start)
    left.plot(start[0], _second(start), "s", color="black", label="initial state")
    shown = left.scatter(points[:, 0], _second(points), c=rates, cmap="viridis_r", s=24, label="fixed points")
    figure.colorbar(shown, ax=left, label="effective learning rate", shrink=0.8)
    left.legend(frameon=False, fontsize=8)
    _label(left, "first component", "second", "where the state rests without gradients")
    grads = torch.linspace(-3, 3, 101, dtype=torch.float64) * f.gradient_scale
    order = rates.argsort()
    for index in order[torch.linspace(0, len(order) - 1, min(len(order), 8)).round().long()].tolist():
        updates = update_function(f.rule, f.fixed.states[index], grads)
        right.plot(grads, updates, color=shown.to_rgba(float(rates[index])), label=f"{float(rates[index]):.2g}")
    right.legend(frameon=False, fontsize=7, title="learning rate", title_fontsize=7)
    _label(right, "gradient", "update", "update functions there")
    return figure


def clipping(f: Findings) -> Figure:
    """Fig. 4, 10: the first update against the gradient, above the gradients that come."""
    figure, (left, right) = _panels(2)
    grads = f.recording.grads.flatten()
    largest = float(grads.abs().max().clamp(min=1e-9))
    ends = min(3 * f.clipping.threshold, 3 * largest) if f.clipping.threshold < float("inf") else largest
    at = torch.linspace(-ends, ends, 301, dtype=torch.float64)
    left.plot(at, update_function(f.rule, f.modes.start, at, step=0.0), color=BLUE)
    left.plot(at, -f.clipping.learning_rate * at, "--", color=GRAY, linewidth=0.8, label="linear")
    left.set_ylim(*(1.6 * float(update_function(f.rule, f.modes.start, at, step=0.0).abs().max()) * s for s in (-1, 1)))
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
    """Fig. 5, 11: where the state goes without gradients, and the effective learning rate on the way."""
    figure, (left, right) = _panels(2)
    path = f.projection(f.schedule.states)
    left.plot(path[:, 0], _second(path), color=BLUE, marker=".", markersize=3)
    left.plot(path[0, 0], _second(path)[0], "o", color="black", label="initial state")
    left.plot(path[-1, 0], _second(path)[-1], "s", color=RED, label=f"after {len(path) - 1} steps")
    left.legend(frameon=False, fontsize=8)
    _label(left, "first component", "second", "without gradients")
    right.plot(f.schedule.learning_rates, color=BLUE)
    _label(right, "step", "effective learning rate", "learning-rate schedule of its own")
    return figure


def adaptation(f: Findings) -> Figure:
    """Fig. 6, 12: fixed points under constant gradients (the S-curve), update functions there, their learning rates."""
    figure, (left, middle, right) = _panels(3)
    points, sizes = f.projection(f.curve.states), f.curve.gradients
    for sign, color, label in ((1, GREEN, "positive gradients"), (-1, RED, "negative gradients")):
        arm = sizes * sign > 0
        left.plot(points[arm, 0], _second(points[arm]), "o-", color=color, markersize=4, linewidth=0.8, label=label)
        right.plot(sizes[arm].abs(), f.curve.learning_rates[arm], "o-", color=color, markersize=4, label=label)
    left.legend(frameon=False, fontsize=8)
    _label(left, "first component", "second", "fixed points under constant gradients")
    grads = torch.linspace(-3, 3, 101, dtype=torch.float64) * f.gradient_scale
    chosen = (sizes > 0).nonzero().flatten()[::3]
    for color, index in zip(CYCLE, chosen.tolist(), strict=False):
        updates = update_function(f.rule, f.curve.states[index], grads)
        middle.plot(grads, updates - updates[50], color=color, label=f"{float(sizes[index]):.2g}")
    middle.legend(frameon=False, fontsize=7, title="after g =", title_fontsize=7)
    _label(middle, "gradient", "update minus that without gradient", "update functions there")
    if bool((sizes.abs() > 0).any()):
        right.set_xscale("log")
    _label(right, "|gradient| held", "effective learning rate", "adaptation")
    return figure


def tensors(f: Findings) -> Figure | None:
    """Fig. 7: trajectories, effective learning rates and gradients by tensor; None for a task with one tensor."""
    names = list(f.recording.tensors)
    if len(names) < 2:
        return None
    figure, (left, middle, right) = _panels(3)
    rates = tensor_learning_rates(f)
    for index, name in enumerate(names):
        trajectory, color = f.recording.tensors[name], CYCLE[(index // 2) % len(CYCLE)]
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
    """App. B: the rule's loss curve, and that of its linearization run alone."""
    figure, (panel,) = _panels(1)
    for recording, color, line, label in ((f.recording, BLUE, "-", f.name), (f.linear, ORANGE, "--", "linearized")):
        if recording is not None:
            relative = recording.losses / recording.losses[0]
            panel.semilogy(relative.mean(1), line, color=color, label=label)
    panel.legend(frameon=False, fontsize=8)
    _label(panel, "step", "loss / first loss, mean over runs", f"on {f.task}")
    return figure


def history(steps: list[int], modes: list[Linearization], star: tuple[float, float] | None = None) -> Figure:
    """Fig. 15 (App. B.2): the modes in the course of meta-training; the dominant one's momentum and learning rate."""
    figure, (left, middle, right) = _panels(3)
    for step, each in zip(steps, modes, strict=True):
        size = [step / max(steps[-1], 1)] * len(each.timescales)
        left.scatter(each.timescales, each.learning_rates.abs(), c=size, cmap="viridis_r", vmin=0, vmax=1, s=6)
    _label(left, "momentum", "|learning rate|", "modes, later ones darker")
    tops = [each.dominant for each in modes]
    middle.plot(steps, [float(each.timescales[top]) for each, top in zip(modes, tops, strict=True)], color=BLUE)
    right.plot(steps, [float(each.learning_rates[top]) for each, top in zip(modes, tops, strict=True)], color=BLUE)
    _label(middle, "meta-training step", "momentum", "dominant mode")
    _label(right, "meta-training step", "learning rate", "dominant mode")
    if star is not None:
        left.plot(star[1], star[0], "*", color=RED, markersize=12)
        middle.axhline(star[1], color="black", linewidth=0.8)
        right.axhline(star[0], color="black", linewidth=0.8)
    return figure


# --- the noisy quadratic model


def stability(hessian: Tensor, P: Tensor) -> Figure:
    """STAR's Fig. 1: a nominal term moves the eigenvalues of the dynamics into the unit circle, and out of it again."""
    figure, (left, right) = _panels(2)
    sharpest = float(torch.linalg.eigvalsh(hessian)[-1])
    shares = torch.linspace(0, 1.2, 121, dtype=torch.float64)
    spectra = torch.stack(
        [torch.linalg.eigvals(nqm.dynamics_matrix(hessian, P, float(s) * 2 / sharpest)) for s in shares]
    )
    circle = torch.linspace(0, 2 * torch.pi, 200)
    left.plot(circle.cos(), circle.sin(), color="0.7", linewidth=0.8)
    for values, share in zip(spectra[::10], shares[::10], strict=True):
        left.scatter(values.real, values.imag, c=[float(share)] * len(values), cmap="viridis_r", vmin=0, vmax=1.2, s=24)
    left.set_aspect("equal")
    _label(left, "real part", "imaginary part", "eigenvalues of A, darker for larger alpha")
    right.plot(shares, spectra.abs().amax(1), color=BLUE)
    right.axhline(1, color="0.7", linewidth=0.8)
    margins = nqm.theorem1_margins(hessian.expand(121, -1, -1), P.expand(121, -1, -1), shares * 2 / sharpest)
    held = shares[margins.hold]
    if len(held):
        right.axvspan(float(held[0]), float(held[-1]), color=GREEN, alpha=0.15, label="stable by Theorem 1")
        right.legend(frameon=False, fontsize=8)
    _label(right, "alpha lambda_max(H) / 2", "spectral radius", "nominal term and stability")
    return figure


def gradient_variance(shares: Tensor, horizons: Sequence[int], variances: Tensor) -> Figure:
    """STAR's Fig. 2a: variances (len(shares), len(horizons)) of the meta-gradient against the nominal term."""
    figure, (panel,) = _panels(1)
    colors = _colormap("winter")
    for index, horizon in enumerate(horizons):
        panel.semilogy(shares, variances[:, index], color=colors(1 - index / len(horizons)), linewidth=1)
        if horizon in (1, 10, 100, 1000):
            panel.annotate(f"T = {horizon}", (float(shares[-1]), float(variances[-1, index])), fontsize=7)
    _label(panel, "alpha lambda_max(H) / 2", "trace of the variance", "variance of the gradient by P")
    return figure


def meta_training(runs: dict[float, list[nqm.MetaTraining]]) -> Figure:
    """STAR's Fig. 2b, c: eigenvalues and meta-loss in meta-training, by nominal term; means over seeds."""
    figure, (left, right) = _panels(2)
    for color, (share, seeds) in zip(CYCLE, runs.items(), strict=False):
        spectra = torch.stack([each.eigenvalues for each in seeds]).mean(0)
        left.plot(spectra[:, 0], ":", color=color)
        left.plot(spectra[:, -1], "-", color=color)
        losses = torch.stack([each.losses for each in seeds]).clamp(max=1e6)
        right.semilogy(losses.mean(0), color=color, label=f"{share:.1f}")
    right.legend(frameon=False, fontsize=8, title="alpha lambda_max / 2", title_fontsize=8)
    left.axhline(1, color="0.7", linewidth=0.8)
    _label(left, "meta-training step", "|eigenvalue| of A", "larger (dotted) and smaller eigenvalue")
    _label(right, "meta-training step", "expected mean loss, T = 50", "meta-loss")
    return figure


# --- parts


def _moved(panel: Axes, f: Findings, mode: int) -> None:
    """Update functions where the state is moved along a mode, as far as runs take it."""
    away = f.recording.states.flatten(0, 1) - f.modes.state
    reach = torch.linspace(-2, 2, 5, dtype=torch.float64) * away.norm(dim=1).quantile(0.5).clamp(min=1e-6)
    grads = torch.linspace(-3, 3, 101, dtype=torch.float64) * f.gradient_scale
    for color, state, size in zip(CYCLE, along(f.modes, reach, mode), reach, strict=False):
        panel.plot(grads, update_function(f.rule, state, grads), color=color, label=f"{float(size):+.2g}")


def _modes_panel(panel: Axes, modes: Linearization, star: tuple[float, float] | None) -> None:
    panel.scatter(modes.timescales, modes.learning_rates, color=GRAY, s=14, label="modes")
    strong = strong_modes(modes)
    panel.scatter(modes.timescales[strong], modes.learning_rates[strong], color=BLUE, s=30, label="those that matter")
    if star is not None:
        panel.plot(star[1], star[0], "*", color=RED, markersize=13, label="best momentum for this task")
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
    """The second component; of states of one number, 0."""
    return points[..., 1] if points.shape[-1] > 1 else torch.zeros_like(points[..., 0])


def _colormap(name: str) -> Any:
    import matplotlib

    return matplotlib.colormaps[name]
