"""What an optimizer does at a state: its update function, and the slope of that, the effective learning rate.

Maheswaranathan et al. 2021 (arXiv 2011.02159), section 4.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad as derivative
from torch.func import vmap

from lightning_lopt.analysis.cells import LATE, Cell, State
from lightning_lopt.rules import UpdateRule


def update_function(rule: UpdateRule, state: State, grads: Tensor, *, param: float = 0.0, step: float = LATE) -> Tensor:
    """The update that a rule would make, for each gradient that could come, at one state.

    Args:
        rule: any rule.
        state: of one coordinate: `rule.init_state(torch.zeros(()))`, a later one, or a vector (d,), see `Cell.pack`.
        grads: any shape; numbers.
        param: value of the parameter, for rules that read it.
        step: updates made before, for rules that depend on it.

    Returns:
        delta for each gradient, of the shape of `grads`, in float64.

    Example:
        >>> import torch
        >>> from lightning_lopt import rules
        >>> rule = rules.make("gru", nominal_stepsize=0.5, nominal_grad_estimator="SGD")  # its network is 0 as yet
        >>> update_function(rule, rule.init_state(torch.zeros(())), torch.tensor([-1.0, 2.0]))
        tensor([ 0.5000, -1.0000], dtype=torch.float64)
    """
    cell = Cell.of(rule, param=param, step=step, state=state)
    vector = cell.check(state)
    with torch.no_grad():
        delta = vmap(lambda grad: cell.step(vector, grad)[0])(grads.detach().double().reshape(-1))
    return delta.reshape(grads.shape)


def effective_learning_rate(
    rule: UpdateRule, states: Tensor, *, gradient: float = 0.0, param: float = 0.0, step: float = LATE
) -> Tensor:
    """Minus the slope of the update function: how far a parameter moves per unit of gradient.

    Args:
        rule: any rule.
        states: (d,) or (n, d) or (..., d).
        gradient: where the slope is taken.
        param: value of the parameter.
        step: updates made before.

    Returns:
        (...) of the leading shape of `states`.
    """
    cell = Cell.of(rule, param=param, step=step)
    rows = states.detach().double().reshape(-1, states.shape[-1])
    at = torch.tensor(gradient, dtype=torch.float64)
    if not len(rows):  # not every operation has a vmap over nothing
        return rows.new_zeros(states.shape[:-1])
    slopes = vmap(derivative(lambda grad, state: cell.step(state, grad)[0]), in_dims=(None, 0))(at, rows)
    rates: Tensor = -slopes.detach().reshape(states.shape[:-1])
    return rates


class Clipping(NamedTuple):
    """Where an update function stops being linear."""

    learning_rate: float  # minus the slope at 0
    threshold: float  # |g| at which the update is half of what the slope at 0 would make of it; inf if nowhere
    monotonic: bool  # whether larger gradients never make smaller updates
    share: float  # of the given gradients, beyond the threshold; nan without


def clipping(rule: UpdateRule, state: State, *, largest: float = 1e3, seen: Tensor | None = None) -> Clipping:
    """Gradient clipping (section 5.2): from which gradient on the update lags behind the linear one.

    Args:
        rule: any rule.
        state: of one coordinate, usually the first.
        largest: gradients are looked at up to this size.
        seen: gradients of real runs, to say how many are clipped.
    """
    grads = torch.cat([torch.zeros(1), torch.logspace(-6, torch.tensor(largest).log10().item(), 2000)]).double()
    both = [sign * update_function(rule, state, sign * grads, step=0.0) for sign in (1.0, -1.0)]
    odd = -0.5 * (both[0] + both[1])  # the even part is an offset, which momentum makes
    slope = float(odd[1] / grads[1])
    lagging = (odd < 0.5 * slope * grads) & (grads > 0) if slope > 0 else torch.zeros_like(grads, dtype=torch.bool)
    threshold = float(grads[lagging][0]) if bool(lagging.any()) else torch.inf
    share = float("nan") if seen is None else float((seen.abs() > threshold).double().mean())
    return Clipping(slope, threshold, bool((odd.diff() >= -1e-12 * odd.abs().max()).all()), share)
