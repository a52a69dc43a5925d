"""STAR's stabilisers as components: nominal term, magnitude controller, preconditioner; for any blackbox.

Source: Harrison et al. 2022 (STAR, arXiv 2209.11208), section 5, eqs. 21 and 22.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# name -> direction from (gradient, momenta (3, *shape), inverse root of the second moment)
ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "SGD": lambda grad, exp_avg, inv_root: grad,
    "SGDM": lambda grad, exp_avg, inv_root: exp_avg[-1],
    "AggMo": lambda grad, exp_avg, inv_root: exp_avg.mean(0),
    "Adam": lambda grad, exp_avg, inv_root: exp_avg[-1] * inv_root,
    "AdamAggMo": lambda grad, exp_avg, inv_root: exp_avg.mean(0) * inv_root,
}


def nominal_direction(estimator: str, grad: Tensor, exp_avg: Tensor, inv_root: Tensor) -> Tensor:
    """The descent direction g of eq. 21, of the shape of `grad`.

    Args:
        estimator: "SGD" the gradient; "SGDM" the slowest momentum; "AggMo" the mean of the three momenta; "Adam" and
            "AdamAggMo" the same two, divided by the root of the second moment.
        grad: (*shape).
        exp_avg: (3, *shape) momenta, slowest last.
        inv_root: (*shape) as `features.inverse_root` gives it.
    """
    return ESTIMATORS[estimator](grad, exp_avg, inv_root)


def magnitude(exp_mult: float, head: Tensor, *, aggregate: bool = False) -> Tensor:
    """The magnitude controller exp(exp_mult * head): beta_2 or beta_4 of eqs. 21 and 22.

    Args:
        exp_mult: how far the head can reach; at the paper's 1e-3 it hardly moves.
        head: (*shape) network output.
        aggregate: one magnitude for the whole tensor, from the head's mean.
    """
    return torch.exp(exp_mult * (head.mean() if aggregate else head))


def nominal_term(stepsize: float, direction: Tensor, factor: Tensor | float) -> Tensor:
    """Eq. 21: beta_1 exp(beta_2 m_g) g, with `stepsize` beta_1 and `factor` the controller's exp(beta_2 m_g)."""
    return stepsize * factor * direction


def precondition(step: Tensor, inv_root: Tensor) -> Tensor:
    """The division by v in eq. 22; v = sqrt(second moment + 1e-6), without bias correction, as in the authors' code."""
    return step * inv_root


def tensor_scale(param: Tensor) -> Tensor:
    """The tensor's root mean square relative to 0.1, a usual weight's; at least 0.5, so that zeros move. Returns ().

    Not in the STAR paper. Steps in proportion to a tensor's scale are Adafactor's (Shazeer and Stern 2018, arXiv
    1804.04235, section 8) and Celo's.
    """
    return param.square().mean().sqrt().clamp(min=0.05) / 0.1
