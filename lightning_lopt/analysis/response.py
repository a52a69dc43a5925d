"""The update function of an optimizer at a state, and its slope, the effective learning rate.

Source: Maheswaranathan et al. 2021 (arXiv 2011.02159), section 4.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad as derivative
from torch.func import vmap

from lightning_lopt.analysis.coordinate import LATE_STEP, CoordinateDynamics, State
from lightning_lopt.rules import UpdateRule


def update_function(
    rule: UpdateRule, state: State, grads: Tensor, *, param: float = 0.0, step: float = LATE_STEP
) -> Tensor:
    """Compute a rule's update at one state as a function of the gradient.

    Args:
        rule: any rule.
        state: state of one coordinate: `rule.init_state(torch.zeros(()))`, a later state, or a vector (d,) as
            `CoordinateDynamics.pack` returns.
        grads: gradients, of any shape.
        param: value of the parameter, for rules that read it.
        step: updates made so far, for rules that depend on it.

    Returns:
        The update for each gradient, of the shape of `grads`, in float64.

    Example:
        >>> import torch
        >>> from lightning_lopt import rules
        >>> # The untrained network returns 0, which leaves the nominal term.
        >>> rule = rules.make("gru", nominal_stepsize=0.5, nominal_grad_estimator="SGD")
        >>> update_function(rule, rule.init_state(torch.zeros(())), torch.tensor([-1.0, 2.0]))
        tensor([ 0.5000, -1.0000], dtype=torch.float64)
    """
    dynamics = CoordinateDynamics.from_rule(rule, param=param, step=step, state=state)
    vector = dynamics.check(state)
    with torch.no_grad():
        delta = vmap(lambda grad: dynamics.step(vector, grad)[0])(grads.detach().double().reshape(-1))
    return delta.reshape(grads.shape)


def effective_learning_rate(
    rule: UpdateRule, states: Tensor, *, gradient: float = 0.0, param: float = 0.0, step: float = LATE_STEP
) -> Tensor:
    """Compute minus the slope of the update function: how far a parameter moves per unit of gradient.

    Args:
        rule: any rule.
        states: (..., d) states of one coordinate.
        gradient: gradient at which the slope is taken.
        param: value of the parameter.
        step: updates made so far.

    Returns:
        The effective learning rates (...).
    """
    dynamics = CoordinateDynamics.from_rule(rule, param=param, step=step)
    rows = states.detach().double().reshape(-1, states.shape[-1])
    at = torch.tensor(gradient, dtype=torch.float64)
    if not len(rows):  # some operations cannot be vmapped over an empty axis
        return rows.new_zeros(states.shape[:-1])
    slopes = vmap(derivative(lambda grad, state: dynamics.step(state, grad)[0]), in_dims=(None, 0))(at, rows)
    rates: Tensor = -slopes.detach().reshape(states.shape[:-1])
    return rates


class Clipping(NamedTuple):
    """The gradient size beyond which an update function is no longer linear."""

    learning_rate: float  # minus the slope at 0
    threshold: float  # |g| at which the update is half of its linear extrapolation from 0; inf if there is none
    monotonic: bool  # larger gradients never give smaller updates
    fraction: float  # of the given gradients that are beyond the threshold; nan if none are given


def clipping(rule: UpdateRule, state: State, *, largest: float = 1e3, seen: Tensor | None = None) -> Clipping:
    """Measure gradient clipping (section 5.2): the gradient beyond which the update is less than half the linear one.

    Args:
        rule: any rule.
        state: state of one coordinate, usually the initial one.
        largest: the largest gradient to test.
        seen: gradients of real runs, to measure the fraction that is clipped.
    """
    grads = torch.cat([torch.zeros(1), torch.logspace(-6, torch.tensor(largest).log10().item(), 2000)]).double()
    positive = update_function(rule, state, grads, step=0.0)
    negative = update_function(rule, state, -grads, step=0.0)
    odd = -0.5 * (positive - negative)  # the even part is an offset by momentum
    slope = float(odd[1] / grads[1])
    clipped = (odd < 0.5 * slope * grads) & (grads > 0) if slope > 0 else torch.zeros_like(grads, dtype=torch.bool)
    threshold = float(grads[clipped][0]) if bool(clipped.any()) else torch.inf
    fraction = float("nan") if seen is None else float((seen.abs() > threshold).double().mean())
    return Clipping(slope, threshold, bool((odd.diff() >= -1e-12 * odd.abs().max()).all()), fraction)
