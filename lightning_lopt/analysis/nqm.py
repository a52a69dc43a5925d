"""The noisy quadratic model: stability of a learned optimizer with a nominal term, and its meta-gradients.

    l(phi) = 1/2 (phi - xi)^T H (phi - xi),   xi ~ N(0, Sigma)           phi' = phi - (alpha I + P) grad
           => phi' = A phi + (I - A) xi,      A = I - (alpha I + P) H    (preconditioned: I - H^-1/2 (alpha I + P) H)

Source: Harrison et al. 2022 (STAR, arXiv 2209.11208), section 4, App. A and B.1. H is symmetric positive definite,
alpha I is the nominal term and P the learned one. Differences from the paper:

* **Theorem 1 and Lemma 2 need a symmetric P.** The paper only requires a diagonalizable P with real eigenvalues. Its
  proof concludes positive semi-definiteness from eigenvalues alpha + lambda(P) >= 0, which is valid only for symmetric
  matrices. A counterexample, in which both margins are positive and the dynamics diverge:

    >>> import torch
    >>> H = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    >>> P = torch.tensor([[0.1, 4.0], [0.0, 0.2]], dtype=torch.float64)  # eigenvalues 0.1 and 0.2
    >>> margins = theorem1_margins(H, P, 0.1)
    >>> [round(m.item(), 3) for m in margins], round(spectral_radius(dynamics_matrix(H, P, 0.1)), 3)
    ([0.2, 0.753], 3.097)
    >>> is_stable(H, P, 0.1)
    False

  `is_stable` therefore uses the margins for symmetric P and the spectrum for any other.
* The proof of Lemma 2 applies the theorem to H^-1/2 P H^1/2, which is not symmetric even if P is. The lemma still holds
  for symmetric P: H^1/2 A H^-1/2 = I - (alpha I + P) H^1/2 is Theorem 1 with H^1/2 in place of H.
* Lemma 3 requires that P~ is symmetric and commutes with the disturbance Delta.
* Eqs. 4 and 8 differ by a factor of 2. The loss here is that of eq. 4, with the 1/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

H_PAPER = ((1.11, 0.596), (0.596, 0.486))
"""The Hessian of the paper's experiments (A.30)."""
HORIZONS = (1, 2, 3, 4, 5, 10, 25, 50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 800, 900, 1000)
"""The horizons of its figure 2a (A.31)."""
ROUNDING = 1e3
"""Tolerance, in multiples of the dtype's epsilon, for symmetric matrices and for spectral radii of 1."""


class Margins(NamedTuple):
    """The margins by which the two conditions of a theorem hold; stable if neither is negative. Batched if P is."""

    lower: Tensor  # of (9) or (16)
    upper: Tensor  # of (10), (13) or (17)

    @property
    def hold(self) -> Tensor:
        """Whether both conditions hold."""
        return (self.lower >= 0) & (self.upper >= 0)


def dynamics_matrix(hessian: Tensor, P: Tensor, alpha: float | Tensor, *, preconditioned: bool = False) -> Tensor:
    """Compute A = I - (alpha I + P) H (eq. 6), or A = I - H^-1/2 (alpha I + P) H (eq. 12).

    Args:
        hessian: (..., n, n) symmetric positive definite.
        P: (..., n, n) the learned term.
        alpha: the nominal term's step size, a number or (...).
        preconditioned: precondition the update with H^-1/2.

    Returns:
        A (..., n, n).

    Example:
        >>> dynamics_matrix(torch.eye(2), torch.zeros(2, 2), 0.25)
        tensor([[0.7500, 0.0000],
                [0.0000, 0.7500]])
    """
    _check_square(hessian, P)
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    step = _column(alpha, hessian) * identity + P
    if preconditioned:
        step = _power(hessian, -0.5) @ step
    return identity - step @ hessian


def spectral_radius(A: Tensor) -> float:
    """Compute the largest |eigenvalue| of a matrix (n, n)."""
    return float(torch.linalg.eigvals(A).abs().max())


def theorem1_margins(hessian: Tensor, P: Tensor, alpha: float | Tensor) -> Margins:
    """Theorem 1: lambda_min(P) + alpha >= 0 (9) and 2 / lambda_max(H) - alpha - lambda_max(P) >= 0 (10).

    For symmetric P both together imply a spectral radius of at most 1. They are sufficient, not necessary.

    Args:
        hessian: (..., n, n) symmetric positive definite.
        P: (..., n, n) with real eigenvalues.
        alpha: a number >= 0 or (...).
    """
    low, high = _real_range(P)
    alpha = torch.as_tensor(alpha, dtype=hessian.dtype, device=hessian.device)
    return Margins(low + alpha, 2 / _sharpest(hessian) - alpha - high)


def lemma2_margins(hessian: Tensor, P: Tensor, alpha: float | Tensor) -> Margins:
    """Lemma 2, for the preconditioner H^-1/2: (9) and 2 / sqrt(lambda_max(H)) - alpha - lambda_max(P) >= 0 (13)."""
    low, high = _real_range(P)
    alpha = torch.as_tensor(alpha, dtype=hessian.dtype, device=hessian.device)
    return Margins(low + alpha, 2 / _sharpest(hessian).sqrt() - alpha - high)


def lemma3_margins(hessian: Tensor, P: Tensor, alpha: float | Tensor, largest: float | Tensor) -> Margins:
    """Lemma 3: stable for every Delta P with Delta = diag(d), 0 < d <= `largest`, that commutes with P.

    lambda_min(P) + alpha / largest >= 0 (16) and (2 / lambda_max(H) - alpha) / largest - lambda_max(P) >= 0 (17).

    Args:
        hessian: (..., n, n) symmetric positive definite.
        P: (..., n, n) symmetric.
        alpha: a number or (...) with 0 < alpha < 2 / lambda_max(H); beyond that the upper margin is negative.
        largest: the largest bound on the d_i.
    """
    low, high = _real_range(P)
    alpha = torch.as_tensor(alpha, dtype=hessian.dtype, device=hessian.device)
    room = 2 / _sharpest(hessian) - alpha
    # If P has no positive eigenvalue, (17) alone would admit step sizes that diverge as d goes to 0.
    return Margins(low + alpha / largest, torch.minimum(room / largest - high, room))


def is_stable(hessian: Tensor, P: Tensor, alpha: float, *, preconditioned: bool = False) -> bool:
    """Whether the dynamics are stable: a spectral radius of at most 1, up to rounding.

    For symmetric P, positive margins of Theorem 1 (Lemma 2 if `preconditioned`) prove it. Otherwise the spectrum
    decides. The theorem does not hold for other P, see the module's docstring.

    Args:
        hessian: (n, n) symmetric positive definite.
        P: (n, n) the learned term.
        alpha: the nominal term's step size.
        preconditioned: use the preconditioner H^-1/2 of eq. 12.

    Raises:
        ValueError: if the Hessian is not symmetric positive definite, or the shapes do not fit.
    """
    _check_square(hessian, P)
    if not _symmetric(hessian) or float(torch.linalg.eigvalsh(hessian).min()) <= 0:
        raise ValueError("hessian is not symmetric positive definite, as the noisy quadratic model requires.")
    margins = lemma2_margins if preconditioned else theorem1_margins
    if _symmetric(P) and bool(margins(hessian, P, alpha).hold):
        return True
    radius = spectral_radius(dynamics_matrix(hessian, P, alpha, preconditioned=preconditioned))
    return radius <= 1 + ROUNDING * torch.finfo(hessian.dtype).eps


def covariance(A: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Compute Sigma_0, ..., Sigma_steps of eq. 7, by the recursion Sigma' = A Sigma A^T + (I - A) noise (I - A)^T.

    Args:
        A: (n, n) dynamics matrix.
        noise: (n, n) covariance of xi.
        steps: number of steps.

    Returns:
        (steps + 1, n, n).
    """
    rest = torch.eye(len(A), dtype=A.dtype, device=A.device) - A
    added = rest @ noise @ rest.mT
    sigmas = [torch.zeros_like(A)]
    for _ in range(steps):
        sigmas.append(A @ sigmas[-1] @ A.mT + added)
    return torch.stack(sigmas)


def expected_losses(hessian: Tensor, A: Tensor, start: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Compute E l(phi_t) for t = 1, ..., steps: 1/2 phi_0^T A^t^T H A^t phi_0 + 1/2 tr(H (Sigma_t + Sigma)).

    Args:
        hessian: (n, n).
        A: (n, n) dynamics matrix.
        start: (n,) phi_0, or (n, n) E phi_0 phi_0^T of a random start.
        noise: (n, n) covariance of xi.
        steps: number of steps T.

    Returns:
        (steps,) losses, differentiable. Eq. 8 is twice their mean.
    """
    second = torch.outer(start, start) if start.dim() == 1 else start
    losses = []
    for sigma in covariance(A, noise, steps)[1:]:
        second = A @ second @ A.mT
        losses.append(0.5 * torch.trace(hessian @ (second + sigma + noise)))
    return torch.stack(losses)


def simulate(hessian: Tensor, P: Tensor, alpha: float | Tensor, start: Tensor, noise: Tensor) -> Tensor:
    """Simulate runs with given noise; differentiable in P.

    Args:
        hessian: (n, n).
        P: (n, n), or (runs, n, n) with one per run.
        alpha: the nominal term's step size.
        start: (runs, n) phi_0.
        noise: (T + 1, runs, n) xi_0, ..., xi_T.

    Returns:
        (T, runs) losses l(phi_t), t = 1, ..., T.
    """
    phi = start
    losses = []
    step = _column(alpha, hessian) * torch.eye(len(hessian), dtype=hessian.dtype) + P
    for index, xi in enumerate(noise):
        offset = phi - xi
        if index:
            losses.append(0.5 * (offset * (offset @ hessian)).sum(-1))
        phi = phi - ((offset @ hessian).unsqueeze(-2) @ step.mT).squeeze(-2)
    return torch.stack(losses)


def gradient_variance(
    hessian: Tensor, alpha: float, horizons: Sequence[int], *, runs: int = 500, init_std: float = 10**0.5, seed: int = 0
) -> Tensor:
    """Fig. 2a: the trace of the variance, over runs, of the derivative of the mean loss with respect to P, at P = 0.

    Args:
        hessian: (n, n).
        alpha: the nominal term's step size.
        horizons: lengths T of the runs.
        runs: number of runs, which differ in start and noise; 500 in the paper.
        init_std: standard deviation of the start.
        seed: seed of starts and noise.

    Returns:
        (len(horizons),) variances.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(hessian)
    phi = init_std * torch.randn(runs, size, generator=generator, dtype=hessian.dtype)
    noise = torch.randn(max(horizons) + 1, runs, size, generator=generator, dtype=hessian.dtype)
    # Forward-mode derivatives, in the direction of each entry of P. Reverse mode would keep a graph of 1,000 steps.
    identity = torch.eye(size, dtype=hessian.dtype)
    tangent = torch.zeros(runs, size * size, size, dtype=hessian.dtype)  # d phi / d P_ij
    total = torch.zeros(runs, size * size, dtype=hessian.dtype)
    mean_derivative = {}  # T -> (runs, size * size)
    for index, xi in enumerate(noise):
        gradient = (phi - xi) @ hessian
        if index:
            total = total + (tangent * gradient.unsqueeze(1)).sum(-1)
            mean_derivative[index] = total / index
        direct = torch.einsum("ik,rj->rijk", identity, gradient).reshape(runs, size * size, size)
        tangent = tangent - alpha * (tangent @ hessian) - direct
        phi = phi - alpha * gradient
    return torch.stack([mean_derivative[horizon].var(0, unbiased=False).sum() for horizon in horizons])


class MetaTraining(NamedTuple):
    """The history of a `meta_train` run."""

    losses: Tensor  # (steps,) expected mean loss
    eigenvalues: Tensor  # (steps, n) |eigenvalues| of A, the largest first


def meta_train(
    hessian: Tensor,
    alpha: float,
    *,
    steps: int = 1000,
    horizon: int = 50,
    pairs: int = 8,
    std: float = 0.01,
    lr: float = 1e-2,
    init: float = 0.1,
    seed: int = 0,
) -> MetaTraining:
    """Fig. 2b, c: meta-train P by antithetic ES over whole runs, with Adam and gradients clipped to norm 1.

    The paper does not give Adam's learning rate, the number of pairs, or the initial P, here N(0, init^2). Its PES with
    one truncation of T = 50 steps is ES.

    Args:
        hessian: (n, n).
        alpha: the nominal term's step size.
        steps: number of meta-training steps.
        horizon: length T of a run.
        pairs: antithetic pairs per step.
        std: standard deviation of the perturbations.
        lr: Adam's learning rate.
        init: standard deviation of the initial entries of P.
        seed: seed of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(hessian)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=hessian.dtype)

    learned = torch.nn.Parameter(init * normal(size, size))
    adam = torch.optim.Adam([learned], lr=lr)
    losses = []
    eigenvalues = []
    identity = torch.eye(size, dtype=hessian.dtype)
    for _ in range(steps):
        with torch.no_grad():
            A = dynamics_matrix(hessian, learned, alpha)
            eigenvalues.append(torch.linalg.eigvals(A).abs().sort(descending=True).values)
            losses.append(expected_losses(hessian, A, 10 * identity, identity, horizon).mean())
            perturbation = std * normal(pairs, size, size)
            start = 10**0.5 * normal(pairs, size)
            noise = normal(horizon + 1, pairs, size)
            plus = simulate(hessian, learned + perturbation, alpha, start, noise).mean(0)
            minus = simulate(hessian, learned - perturbation, alpha, start, noise).mean(0)
            weight = torch.nan_to_num(plus - minus, 0.0, 0.0, 0.0) / (2 * std**2)
            learned.grad = (weight.reshape(-1, 1, 1) * perturbation).mean(0)
            torch.nn.utils.clip_grad_norm_([learned], 1.0)
        adam.step()
    return MetaTraining(torch.stack(losses), torch.stack(eigenvalues))


def _column(alpha: float | Tensor, like: Tensor) -> Tensor:
    value = torch.as_tensor(alpha, dtype=like.dtype, device=like.device)
    column: Tensor = value.reshape(*value.shape, 1, 1)
    return column


def _power(hessian: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(hessian)
    power: Tensor = (vectors * values.pow(exponent).unsqueeze(-2)) @ vectors.mT
    return power


def _sharpest(hessian: Tensor) -> Tensor:
    sharpest: Tensor = torch.linalg.eigvalsh(hessian)[..., -1]
    return sharpest


def _real_range(P: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest eigenvalues of matrices whose eigenvalues are real."""
    values = torch.linalg.eigvals(P)
    scale = values.abs().amax().clamp(min=1e-30)
    if bool((values.imag.abs() > 1e-6 * scale).any()):
        raise ValueError("P has complex eigenvalues, which the theorem does not cover: use is_stable, or P + P^T.")
    return values.real.amin(-1), values.real.amax(-1)


def _symmetric(matrix: Tensor) -> bool:
    tolerance = ROUNDING * torch.finfo(matrix.dtype).eps * float(matrix.abs().max())
    return float((matrix - matrix.mT).abs().max()) <= tolerance


def _check_square(hessian: Tensor, P: Tensor) -> None:
    if hessian.shape[-2:] != P.shape[-2:] or hessian.dim() < 2 or hessian.shape[-1] != hessian.shape[-2]:
        raise ValueError(
            f"hessian of shape {tuple(hessian.shape)} and P of shape {tuple(P.shape)} are not allowed: both must be "
            "square matrices of the same size."
        )
