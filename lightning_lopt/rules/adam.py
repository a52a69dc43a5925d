"""Adam's step of one tensor, for rules that move some of their tensors, or a rotated gradient, as Adam does.

    m <- beta_1 m + (1 - beta_1) g,   v <- beta_2 v + (1 - beta_2) g^2
    u  = m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + eps)                                   at update t = 1, 2, ...

Source: Kingma & Ba 2015 (arXiv 1412.6980), algorithm 1. Decoupled decay, which makes it AdamW (Loshchilov & Hutter
2019, arXiv 1711.05101), belongs to the optimizer: `RuleOptimizer(weight_decay=...)`. One deviation: gradients are
clamped so that their squares are finite, as a single huge one would stop a coordinate for good.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lopt.rules import features as feats

Betas = tuple[float, float]


def update_moments(exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, betas: Betas) -> tuple[Tensor, Tensor]:
    """The moments m and v (*shape) after one more gradient (*shape)."""
    grad = feats.bounded(grad)
    return torch.lerp(exp_avg, grad, 1 - betas[0]), torch.lerp(exp_avg_sq, grad * grad, 1 - betas[1])


def direction(exp_avg: Tensor, exp_avg_sq: Tensor, updates: Tensor, betas: Betas, eps: float) -> Tensor:
    """The direction u of a step, which is minus a step size times it.

    Args:
        exp_avg: (*shape) m.
        exp_avg_sq: (*shape) v.
        updates: () t, the gradients that the moments have seen, at least 1; in the dtype of the moments.
        betas: decays of m and v.
        eps: added to the root.

    Example:
        >>> moments = update_moments(torch.zeros(2), torch.zeros(2), torch.tensor([3.0, -1e-3]), (0.9, 0.999))
        >>> direction(*moments, torch.tensor(1.0), (0.9, 0.999), 1e-8)
        tensor([ 1.0000, -1.0000])
    """
    first, second = (_correction(beta, updates) for beta in betas)
    return exp_avg / first / (feats.root(exp_avg_sq / second) + eps)


def _correction(beta: float, updates: Tensor) -> Tensor:
    """1 - beta^t. By the logarithm in double precision: in float32, 1 - .9999 would be off by 2e-4."""
    return -torch.expm1(updates * (math.log(beta) if beta else -math.inf))
