"""The noisy quadratic model: when a learned optimizer with a nominal term is stable, and what its gradients then are.

    l(phi) = 1/2 (phi - xi)^T H (phi - xi),   xi ~ N(0, Sigma)           phi' = phi - (alpha I + P) grad
           => phi' = A phi + (I - A) xi,      A = I - (alpha I + P) H    (preconditioned: I - H^-1/2 (alpha I + P) H)

Harrison et al. 2022 (STAR, arXiv 2209.11208), section 4, App. A and B.1; H symmetric positive definite, alpha I the
nominal term, P the learned one. Where this differs from the paper:

* **Theorem 1 and Lemma 2 hold for symmetric P.** The paper asks only for a diagonalizable P of real eigenvalues. Its
  proof takes eigenvalues alpha + lambda(P) >= 0 for positive semi-definiteness, which is so for symmetric matrices
  alone. A counter-example, whose margins are both positive and whose dynamics diverge:

    >>> import torch
    >>> H = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    >>> P = torch.tensor([[0.1, 4.0], [0.0, 0.2]], dtype=torch.float64)  # eigenvalues 0.1 and 0.2
    >>> margins = theorem1_margins(H, P, 0.1)
    >>> [round(m.item(), 3) for m in margins], round(spectral_radius(dynamics_matrix(H, P, 0.1)), 3)
    ([0.2, 0.753], 3.097)
    >>> is_stable(H, P, 0.1)
    False

  `is_stable` therefore takes the margins for symmetric P and the spectrum for any other;
* the proof of Lemma 2 applies the theorem to H^-1/2 P H^1/2, which is not symmetric even where P is. The lemma holds
  for symmetric P all the same: H^1/2 A H^-1/2 = I - (alpha I + P) H^1/2, Theorem 1 with H^1/2 in place of H;
* Lemma 3 wants P~ and the disturbance Delta to commute, P~ symmetric;
* eqs. 4 and 8 differ by a factor of 2: here the loss is that of eq. 4, with the 1/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

H_PAPER = ((1.11, 0.596), (0.596, 0.486))
"""The Hessian of the paper's experiments (A.30)."""
HORIZONS = (1, 2, 3, 4, 5, 10, 25, 50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 800, 900, 1000)
"""The lengths of its figure 2a (A.31)."""
ROUNDING = 1e3
"""Matrices are taken for symmetric, and radii for 1, up to so many times the dtype's epsilon."""


class Margins(NamedTuple):
    """By how much the two conditions of a theorem hold; stable if neither is negative. Leading axes are kept."""

    lower: Tensor  # of (9) or (16)
    upper: Tensor  # of (10), (13) or (17)

    @property
    def hold(self) -> Tensor:
        """Bool: both conditions hold."""
        return (self.lower >= 0) & (self.upper >= 0)


def dynamics_matrix(hessian: Tensor, P: Tensor, alpha: float | Tensor, *, preconditioned: bool = False) -> Tensor:
    """A = I - (alpha I + P) H of eq. 6, or I - H^-1/2 (alpha I + P) H of eq. 12.

    Args:
        hessian: (..., n, n) symmetric positive definite.
        P: (..., n, n) the learned term.
        alpha: the nominal term's step size, a number or (...).
        preconditioned: divide the update by the root of the Hessian.

    Returns:
        (..., n, n).

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
    """The largest magnitude of an eigenvalue of a matrix (n, n)."""
    return float(torch.linalg.eigvals(A).abs().max())


def theorem1_margins(hessian: Tensor, P: Tensor, alpha: float | Tensor) -> Margins:
    """Theorem 1: lambda_min(P) + alpha >= 0 (9) and 2 / lambda_max(H) - alpha - lambda_max(P) >= 0 (10).

    For symmetric P both together give a spectral radius of at most 1. They are sufficient, not necessary.

    Args:
        hessian: (..., n, n) symmetric positive definite.
        P: (..., n, n) of real eigenvalues.
        alpha: a number >= 0 or (...).
    """
    low, high = _real_range(P)
    alpha = torch.as_tensor(alpha, dtype=hessian.dtype, device=hessian.device)
    return Margins(low + alpha, 2 / _sharpest(hessian) - alpha - high)


def lemma2_margins(hessian: Tensor, P: Tensor, alpha: float | Tensor) -> Margins:
    """Lemma 2, with the preconditioner H^-1/2: (9), and 2 / sqrt(lambda_max(H)) - alpha - lambda_max(P) >= 0 (13)."""
    low, high = _real_range(P)
    alpha = torch.as_tensor(alpha, dtype=hessian.dtype, device=hessian.device)
    return Margins(low + alpha, 2 / _sharpest(hessian).sqrt() - alpha - high)


def lemma3_margins(hessian: Tensor, P: Tensor, alpha: float | Tensor, largest: float | Tensor) -> Margins:
    """Lemma 3: stable for every Delta P with Delta = diag(d), 0 < d <= `largest`, that commutes with P.

    lambda_min(P) + alpha / largest >= 0 (16) and (2 / lambda_max(H) - alpha) / largest - lambda_max(P) >= 0 (17).

    Args:
        hessian: (..., n, n) symmetric positive definite.
        P: (..., n, n) symmetric.
        alpha: a number or (...), 0 < alpha < 2 / lambda_max(H): beyond, the upper margin is negative.
        largest: max_i of the bounds of d_i.
    """
    low, high = _real_range(P)
    alpha = torch.as_tensor(alpha, dtype=hessian.dtype, device=hessian.device)
    room = 2 / _sharpest(hessian) - alpha
    # Where P has no positive eigenvalue, (17) alone would let a step size through that diverges as d goes to 0.
    return Margins(low + alpha / largest, torch.minimum(room / largest - high, room))


def is_stable(hessian: Tensor, P: Tensor, alpha: float, *, preconditioned: bool = False) -> bool:
    """Whether the dynamics do not diverge: a spectral radius of at most 1, up to rounding.

    For symmetric P by the margins of Theorem 1 (Lemma 2 if `preconditioned`), and where they say nothing, by the
    spectrum; for any other P by the spectrum alone, since the theorem fails for it: see the module's docstring.

    Args:
        hessian: (n, n) symmetric positive definite.
        P: (n, n).
        alpha: the nominal term's step size.
        preconditioned: with the preconditioner H^-1/2 of eq. 12.

    Raises:
        ValueError: if the Hessian is not symmetric positive definite, or the shapes do not fit.
    """
    _check_square(hessian, P)
    if not _symmetric(hessian) or float(torch.linalg.eigvalsh(hessian).min()) <= 0:
        raise ValueError("hessian is not symmetric positive definite: the noisy quadratic model needs one that is.")
    margins = lemma2_margins if preconditioned else theorem1_margins
    if _symmetric(P) and bool(margins(hessian, P, alpha).hold):
        return True
    radius = spectral_radius(dynamics_matrix(hessian, P, alpha, preconditioned=preconditioned))
    return radius <= 1 + ROUNDING * torch.finfo(hessian.dtype).eps


def covariance(A: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Sigma_0, ..., Sigma_steps of eq. 7, by its recursion Sigma' = A Sigma A^T + (I - A) noise (I - A)^T.

    Args:
        A: (n, n) dynamics matrix.
        noise: (n, n) covariance of xi.
        steps: how many.

    Returns:
        (steps + 1, n, n).
    """
    rest = torch.eye(len(A), dtype=A.dtype, device=A.device) - A
    added, sigmas = rest @ noise @ rest.mT, [torch.zeros_like(A)]
    for _ in range(steps):
        sigmas.append(A @ sigmas[-1] @ A.mT + added)
    return torch.stack(sigmas)


def expected_losses(hessian: Tensor, A: Tensor, start: Tensor, noise: Tensor, steps: int) -> Tensor:
    """E l(phi_t) for t = 1, ..., steps: 1/2 phi_0^T A^t^T H A^t phi_0 + 1/2 tr(H (Sigma_t + Sigma)); differentiable.

    Args:
        hessian: (n, n).
        A: (n, n) dynamics matrix.
        start: (n,) phi_0; or (n, n) E phi_0 phi_0^T of a random start.
        noise: (n, n) covariance of xi.
        steps: T.

    Returns:
        (steps,); eq. 8 is their mean (and has no 1/2).
    """
    second = torch.outer(start, start) if start.dim() == 1 else start
    losses = []
    for sigma in covariance(A, noise, steps)[1:]:
        second = A @ second @ A.mT
        losses.append(0.5 * torch.trace(hessian @ (second + sigma + noise)))
    return torch.stack(losses)


def simulate(hessian: Tensor, P: Tensor, alpha: float | Tensor, start: Tensor, noise: Tensor) -> Tensor:
    """Losses l(phi_t), t = 1, ..., T, of runs with the given noise; differentiable in P.

    Args:
        hessian: (n, n).
        P: (n, n), or (runs, n, n) for one each.
        alpha: the nominal term's step size.
        start: (runs, n).
        noise: (T + 1, runs, n) the xi_0, ..., xi_T.

    Returns:
        (T, runs).
    """
    phi, losses = start, []
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
    """Fig. 2a: the trace of the variance, over runs, of d/dP of the mean loss, at P = 0.

    Args:
        hessian: (n, n).
        alpha: the nominal term's step size.
        horizons: lengths T.
        runs: how many; the paper has 500. They differ in start and noise.
        init_std: standard deviation of the start.
        seed: of both.

    Returns:
        (len(horizons),).
    """
    generator, size, longest = torch.Generator().manual_seed(seed), len(hessian), max(horizons)
    start = init_std * torch.randn(runs, size, generator=generator, dtype=hessian.dtype)
    noise = torch.randn(longest + 1, runs, size, generator=generator, dtype=hessian.dtype)
    # Forward derivatives, one direction of P for each of its entries: no graph of a thousand steps is kept.
    identity = torch.eye(size, dtype=hessian.dtype)
    phi, moved = start, torch.zeros(runs, size * size, size, dtype=hessian.dtype)  # phi, d phi / d P_ij
    total, found = torch.zeros(runs, size * size, dtype=hessian.dtype), {}
    for index, xi in enumerate(noise):
        gradient = (phi - xi) @ hessian
        if index:
            total = total + (moved * gradient.unsqueeze(1)).sum(-1)
            found[index] = total / index
        direct = torch.einsum("ik,rj->rijk", identity, gradient).reshape(runs, size * size, size)
        moved = moved - alpha * (moved @ hessian) - direct
        phi = phi - alpha * gradient
    return torch.stack([found[horizon].var(0, unbiased=False).sum() for horizon in horizons])


class MetaTraining(NamedTuple):
    """The course of `meta_train`."""

    losses: Tensor  # (steps,) expected mean loss
    eigenvalues: Tensor  # (steps, n) magnitudes of the eigenvalues of A, the largest first


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
    """Fig. 2b, c: learn P by antithetic ES over whole runs of the noisy quadratic model, Adam, gradients clipped to 1.

    What the paper does not give: Adam's learning rate, the number of pairs, and P's start, here N(0, init^2). Its PES
    over T = 50 is ES.

    Args:
        hessian: (n, n).
        alpha: the nominal term's step size.
        steps: of the meta-training.
        horizon: T.
        pairs: antithetic pairs per step.
        std: of the perturbations.
        lr: Adam's.
        init: standard deviation of the entries of P at first.
        seed: of everything.
    """
    generator, size = torch.Generator().manual_seed(seed), len(hessian)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=hessian.dtype)

    learned = torch.nn.Parameter(init * normal(size, size))
    adam, losses, eigenvalues = torch.optim.Adam([learned], lr=lr), [], []
    second = 10 * torch.eye(size, dtype=hessian.dtype)
    for _ in range(steps):
        with torch.no_grad():
            A = dynamics_matrix(hessian, learned, alpha)
            eigenvalues.append(torch.linalg.eigvals(A).abs().sort(descending=True).values)
            losses.append(expected_losses(hessian, A, second, torch.eye(size, dtype=hessian.dtype), horizon).mean())
            moved = std * normal(pairs, size, size)
            start, noise = 10**0.5 * normal(pairs, size), normal(horizon + 1, pairs, size)
            sides = [simulate(hessian, learned + sign * moved, alpha, start, noise).mean(0) for sign in (1, -1)]
            weight = torch.nan_to_num(sides[0] - sides[1], 0.0, 0.0, 0.0) / (2 * std**2)
            learned.grad = (weight.reshape(-1, 1, 1) * moved).mean(0)
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
    """Smallest and largest eigenvalue of matrices whose eigenvalues are real."""
    values = torch.linalg.eigvals(P)
    scale = values.abs().amax().clamp(min=1e-30)
    if bool((values.imag.abs() > 1e-6 * scale).any()):
        raise ValueError("P has complex eigenvalues, of which the theorem says nothing: use is_stable, or P + P^T.")
    return values.real.amin(-1), values.real.amax(-1)


def _symmetric(matrix: Tensor) -> bool:
    return float((matrix - matrix.mT).abs().max()) <= ROUNDING * torch.finfo(matrix.dtype).eps * float(
        matrix.abs().max()
    )


def _check_square(hessian: Tensor, P: Tensor) -> None:
    if hessian.shape[-2:] != P.shape[-2:] or hessian.dim() < 2 or hessian.shape[-1] != hessian.shape[-2]:
        raise ValueError(
            f"hessian of shape {tuple(hessian.shape)} and P of shape {tuple(P.shape)} are not allowed: both must be "
            "square matrices of one size."
        )
