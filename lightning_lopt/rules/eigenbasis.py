"""The eigenbasis of a gradient's Kronecker factors, in which a coordinatewise rule can move a matrix.

    L <- b L + (1 - b) G G^T,   R <- b R + (1 - b) G^T G                                          `update_factors`
    Q_L <- QR(L Q_L),           Q_R <- QR(R Q_R)                        every so often            `refresh_bases`
    G' = Q_L^T G Q_R,           u = Q_L u' Q_R^T                                        `rotate`, `rotate_back`

Of a matrix G (rows, columns), L and R are moving averages, and the columns of Q_L and Q_R approach their eigenvectors:
each refresh is one step of orthogonal iteration. A rule then reads G' and gives u'. Momenta that it keeps in the old
basis go to the new one by `carried`, averages of squares by `reordered`.

Source: Vyas et al. 2024 (SOAP, arXiv 2409.11321), algorithms 3 and 4, after Gupta et al. 2018 (Shampoo, arXiv
1802.09568). As in the authors' code, columns are put in the order of their eigenvalues, largest first, before the step,
since orthogonal iteration converges in that order. Derivatives take the bases as constants: those of eigenvectors do
not exist where eigenvalues are equal.

Everything is batched over matrices: tensors (n, rows, columns).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Eigenbasis(NamedTuple):
    """Factors and bases of n matrices; of size (n, 0, 0) for a side that is not rotated."""

    left: Tensor  # (n, rows, rows) L
    right: Tensor  # (n, columns, columns) R
    left_basis: Tensor  # (n, rows, rows) Q_L
    right_basis: Tensor  # (n, columns, columns) Q_R


Orders = tuple[Tensor, Tensor]
"""(n, rows) and (n, columns): which of the old columns each column of a new basis comes from."""


def rotated_sides(rows: int, columns: int, max_side: int, *, one_sided: bool = False) -> tuple[int, int]:
    """The sizes of the factors of a matrix (rows, columns); 0 for a side that is not rotated.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        max_side: longer sides are not rotated.
        one_sided: only the shorter side is (the columns of a square matrix).

    Example:
        >>> rotated_sides(8, 300, max_side=256), rotated_sides(8, 16, 256, one_sided=True)
        ((8, 0), (8, 0))
    """
    left = rows <= max_side and not (one_sided and rows >= columns)
    right = columns <= max_side and not (one_sided and rows < columns)
    return rows * left, columns * right


def init(like: Tensor, number: int, rows: int, columns: int) -> Eigenbasis:
    """Factors of zeros and bases of identities for `number` matrices, of the dtype and device of `like`.

    Args:
        like: any tensor.
        number: n.
        rows: as `rotated_sides` gives them.
        columns: likewise.
    """
    factors = (like.new_zeros((number, side, side)) for side in (rows, columns))
    eyes = (torch.eye(side, dtype=like.dtype, device=like.device) for side in (rows, columns))
    return Eigenbasis(*factors, *(eye.expand(number, -1, -1).clone() for eye in eyes))


def update_factors(basis: Eigenbasis, grads: Tensor, decay: float) -> Eigenbasis:
    """The factors after one more gradient (n, rows, columns), whose squares must be finite (`features.bounded`)."""
    grads, left, right = grads.detach(), basis.left, basis.right
    if left.numel():
        left = torch.lerp(left, grads @ grads.mT, 1 - decay)
    if right.numel():
        right = torch.lerp(right, grads.mT @ grads, 1 - decay)
    return basis._replace(left=left, right=right)


def first_bases(basis: Eigenbasis) -> Eigenbasis:
    """All eigenvectors of the factors, by a decomposition. Waits for an accelerator."""
    return basis._replace(left_basis=_eigenvectors(basis.left), right_basis=_eigenvectors(basis.right))


def refresh_bases(basis: Eigenbasis) -> tuple[Eigenbasis, Orders]:
    """One step of orthogonal iteration for each side, and the columns' new orders."""
    left_basis, rows = _iterated(basis.left, basis.left_basis)
    right_basis, columns = _iterated(basis.right, basis.right_basis)
    return basis._replace(left_basis=left_basis, right_basis=right_basis), (rows, columns)


def rotate(basis: Eigenbasis, matrices: Tensor) -> Tensor:
    """Q_L^T X Q_R of matrices X (n, rows, columns).

    Example:
        >>> basis = init(torch.zeros(()), 1, 2, 0)._replace(left_basis=torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
        >>> rotate(basis, torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]))
        tensor([[[4., 5., 6.],
                 [1., 2., 3.]]])
    """
    left, right = basis.left_basis, basis.right_basis
    matrices = left.mT @ matrices if left.numel() else matrices
    return matrices @ right if right.numel() else matrices


def rotate_back(basis: Eigenbasis, matrices: Tensor) -> Tensor:
    """Q_L X' Q_R^T of matrices X' (n, rows, columns): undoes `rotate`."""
    left, right = basis.left_basis, basis.right_basis
    matrices = left @ matrices if left.numel() else matrices
    return matrices @ right.mT if right.numel() else matrices


def carried(old: Eigenbasis, new: Eigenbasis, matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) of the old basis in the new one."""
    return rotate(new, rotate_back(old, matrices))


def reordered(orders: Orders, matrices: Tensor) -> Tensor:
    """Averages of squares (n, rows, columns), whose rows and columns follow their basis vectors to new places."""
    rows, columns = orders
    if rows.numel():
        matrices = matrices.gather(-2, rows.unsqueeze(-1).expand_as(matrices))
    if columns.numel():
        matrices = matrices.gather(-1, columns.unsqueeze(-2).expand_as(matrices))
    return matrices


def _eigenvectors(factor: Tensor) -> Tensor:
    """(n, side, side) eigenvectors as columns, of the largest eigenvalue first."""
    if not factor.numel():
        return factor
    finite = factor.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)  # eigh raises for others
    vectors: Tensor = torch.linalg.eigh(torch.where(finite, factor, 0.0))[1]
    return vectors.flip(-1)


def _iterated(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """(n, side, side) the orthonormal basis of P Q with the columns of Q in order, and (n, side) this order."""
    if not factor.numel():
        return basis, factor.new_zeros(factor.shape[:-1], dtype=torch.int64)
    product = factor @ basis
    eigenvalues = (basis * product).sum(-2)  # the diagonal of Q^T P Q
    order = torch.argsort(eigenvalues, dim=-1, descending=True, stable=True)
    product = product.gather(-1, order.unsqueeze(-2).expand_as(product))
    orthonormal: Tensor = torch.linalg.qr(product)[0]
    return orthonormal, order
