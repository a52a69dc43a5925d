"""STAR's stabilizers as components for any rule: nominal term, magnitude controller, preconditioner.

Source: Harrison et al. 2022 (STAR, arXiv 2209.11208), section 5, eqs. 21 and 22.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from lightning_lopt.rules import features as feats
from lightning_lopt.rules.constants import constant
from lightning_lopt.rules.shards import TensorShard, means

MOMENTUM_DECAYS, RMS_DECAY = (0.9, 0.99, 0.999), 0.999  # STAR's initial decays, for rules that do not learn them


class Stabilizers(Protocol):
    """The options of a rule that has stabilizers around its network, see `stabilized_terms`."""

    @property
    def out_scale(self) -> float:
        """Multiplier of the network's step."""
        ...

    @property
    def nominal_stepsize(self) -> float:
        """beta_1; 0 for no nominal term."""
        ...

    @property
    def nominal_grad_estimator(self) -> str:
        """One of `ESTIMATORS`."""
        ...

    @property
    def nominal_controller(self) -> bool:
        """Whether the network scales the nominal term."""
        ...

    @property
    def exp_mult(self) -> float:
        """beta_2."""
        ...

    @property
    def normalize_blackbox(self) -> bool:
        """Whether the network's step is preconditioned."""
        ...


# name -> direction from (gradient, momenta (3, *shape), inverse root of the second moment, weights (3,) or None)
ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "SGD": lambda grad, exp_avg, inv_root, weights: grad,
    "SGDM": lambda grad, exp_avg, inv_root, weights: exp_avg[-1],
    "AggMo": lambda grad, exp_avg, inv_root, weights: _average(exp_avg, weights),
    "Adam": lambda grad, exp_avg, inv_root, weights: exp_avg[-1] * inv_root,
    "AdamAggMo": lambda grad, exp_avg, inv_root, weights: _average(exp_avg, weights) * inv_root,
}


def nominal_direction(
    estimator: str, grad: Tensor, exp_avg: Tensor, inv_root: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The descent direction g of eq. 21, of the shape of `grad`.

    Args:
        estimator: "SGD" the gradient; "SGDM" the slowest momentum; "AggMo" the mean of the three momenta; "Adam" and
            "AdamAggMo" the same two, divided by the root of the second moment.
        grad: (*shape).
        exp_avg: (3, *shape) momenta, slowest last.
        inv_root: (*shape) as `features.inverse_root` gives it.
        weights: (3,) of the momenta that "AggMo" and "AdamAggMo" average; equal ones, as in the paper, where None.
    """
    return ESTIMATORS[estimator](grad, exp_avg, inv_root, weights)


def magnitude(exp_mult: float, head: Tensor, *, aggregate: bool = False, shard: TensorShard | None = None) -> Tensor:
    """The magnitude controller exp(exp_mult * head): beta_2 or beta_4 of eqs. 21 and 22.

    Args:
        exp_mult: scale of the head; the paper's 1e-3 leaves the magnitude near 1.
        head: (*shape) network output.
        aggregate: one magnitude for the whole tensor, from the head's mean.
        shard: the shard of the tensor that the head covers; None for all of it.
    """
    if aggregate:
        (head,) = means(shard, (head, tuple(range(-head.dim(), 0))))
    return torch.exp(exp_mult * head)


def nominal_term(stepsize: float, direction: Tensor, factor: Tensor | float) -> Tensor:
    """Eq. 21: beta_1 exp(beta_2 m_g) g, with `stepsize` beta_1 and `factor` the controller's exp(beta_2 m_g)."""
    return stepsize * factor * direction


def precondition(step: Tensor, inv_root: Tensor) -> Tensor:
    """The division by v in eq. 22; v = sqrt(second moment + 1e-6), without bias correction, as in the authors' code."""
    return step * inv_root


def stabilized(config: Stabilizers) -> bool:
    """Whether any stabilizer is on, so that moments are needed."""
    return config.nominal_stepsize > 0 or config.normalize_blackbox


def init_moments(config: Stabilizers, param: Tensor) -> tuple[Tensor, Tensor]:
    """Momenta (3, *shape) and second moment (*shape), zeros; (0, *shape) and (0,) without a stabilizer."""
    if not stabilized(config):
        return param.new_zeros((0, *param.shape)), param.new_zeros(0)
    return param.new_zeros((3, *param.shape)), torch.zeros_like(param)


def update_moments(
    config: Stabilizers,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    offsets: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Update the moments of `init_moments` with one gradient.

    Args:
        config: the options.
        exp_avg: (3, *shape) momenta.
        exp_avg_sq: (*shape) second moment.
        grad: (*shape).
        offsets: `momentum_decays (3,)` and `rms_decays (1,)` for `features.effective_decay`; None if not learned.
    """
    if not stabilized(config):
        return exp_avg, exp_avg_sq
    if offsets is None:
        momentum = constant(MOMENTUM_DECAYS, grad.dtype, grad.device)
        decays = feats.Decays(momentum, torch.full_like(momentum[:1], RMS_DECAY), momentum[:0])
    else:
        decays = learned_decays(offsets)
    return feats.update_moments(exp_avg, exp_avg_sq, grad, decays)


def learned_decays(offsets: Mapping[str, Tensor]) -> feats.Decays:
    """Effective decays of the three momenta and of the second moment.

    Args:
        offsets: `momentum_decays (3,)` and `rms_decays (1,)`, see `features.effective_decay`.
    """
    momentum = feats.effective_decay(MOMENTUM_DECAYS, offsets["momentum_decays"])
    rms = feats.effective_decay((RMS_DECAY,), offsets["rms_decays"]).clamp(0, 1)
    return feats.Decays(momentum, rms, momentum[:0])


def stabilized_terms(
    config: Stabilizers,
    readouts: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    eps: float = feats.EPS,
    factor: Tensor | float = 1.0,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of a network with stabilizers: `blackbox`, and `nominal` if there is such a term.

    Args:
        config: the options.
        readouts: (1 or 2, *shape): the network's step, and the input of the controller if there is one.
        grad: (*shape).
        exp_avg: (3, *shape) momenta that already include `grad`.
        exp_avg_sq: (*shape) second moment, likewise.
        eps: added to the second moment before its root.
        factor: () of both terms.
        weights: (3,) of the momenta, as for `nominal_direction`.
    """
    step = factor * config.out_scale * readouts[0]
    if not stabilized(config):
        return {"blackbox": step}
    inv_root = feats.inverse_root(exp_avg_sq, eps)
    terms = {"blackbox": precondition(step, inv_root) if config.normalize_blackbox else step}
    if config.nominal_stepsize:
        direction = nominal_direction(config.nominal_grad_estimator, grad, exp_avg, inv_root, weights)
        control = magnitude(config.exp_mult, readouts[1]) if config.nominal_controller else 1.0
        terms["nominal"] = -nominal_term(config.nominal_stepsize, direction, factor * control)
    return terms


def _average(exp_avg: Tensor, weights: Tensor | None) -> Tensor:
    return exp_avg.mean(0) if weights is None else (weights.reshape(-1, *[1] * (exp_avg.dim() - 1)) * exp_avg).sum(0)
