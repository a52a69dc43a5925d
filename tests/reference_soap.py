"""SOAP of one matrix, written from the paper (Vyas et al. 2024, arXiv 2409.11321, algorithms 3 and 4).

The momentum is kept in the parameters' coordinates, as in the paper, and rotated at each step. From the authors' code:
the first gradient only makes the bases, and columns are sorted by their eigenvalues before each QR decomposition. It
shares nothing with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ReferenceSOAP:
    """SOAP of a matrix W (m, n)."""

    def __init__(self, lr=3e-3, betas=(0.95, 0.95), eps=1e-8, shampoo_beta=0.95, frequency=10, sides=(True, True)):
        self.lr, self.betas, self.eps, self.shampoo_beta, self.frequency = lr, betas, eps, shampoo_beta, frequency
        self.sides = sides  # whether Q_L and Q_R are used; else they are the identity
        self.t = 0

    def step(self, w: Tensor, g: Tensor) -> Tensor:
        """W after one more gradient."""
        if not hasattr(self, "factors"):
            self.factors = [torch.zeros(side, side, dtype=g.dtype) for side in g.shape]
            self.m, self.v = torch.zeros_like(g), torch.zeros_like(g)
            self.update_factors(g)
            self.q = [
                torch.linalg.eigh(factor).eigenvectors.flip(1) if used else torch.eye(len(factor), dtype=g.dtype)
                for factor, used in zip(self.factors, self.sides, strict=True)
            ]
            return w
        self.t += 1
        beta_1, beta_2 = self.betas
        q_l, q_r = self.q
        self.m = beta_1 * self.m + (1 - beta_1) * g
        m_rotated = q_l.T @ self.m @ q_r
        self.v = beta_2 * self.v + (1 - beta_2) * (q_l.T @ g @ q_r) ** 2
        m_hat, v_hat = m_rotated / (1 - beta_1**self.t), self.v / (1 - beta_2**self.t)
        w = w - self.lr * q_l @ (m_hat / (v_hat.sqrt() + self.eps)) @ q_r.T
        self.update_factors(g)
        if self.t % self.frequency == 0:
            self.refresh()
        return w

    def update_factors(self, g: Tensor) -> None:
        beta = self.shampoo_beta
        outer = g @ g.T, g.T @ g
        self.factors = [beta * old + (1 - beta) * new for old, new in zip(self.factors, outer, strict=True)]

    def refresh(self) -> None:
        for side in range(2):
            if not self.sides[side]:
                continue
            factor, q = self.factors[side], self.q[side]
            eigenvalues = [float(q[:, i] @ factor @ q[:, i]) for i in range(len(q))]
            order = sorted(range(len(q)), key=lambda i: -eigenvalues[i])
            q = q[:, order]
            self.v = self.v[order] if side == 0 else self.v[:, order]
            self.q[side] = torch.linalg.qr(factor @ q).Q
