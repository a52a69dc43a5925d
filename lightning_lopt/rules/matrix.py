"""Matrix-aware steps: a tensor's step seen as a matrix, and made orthogonal.

A step that moves every coordinate by itself moves a matrix mostly along its few largest singular directions. The
nearest orthogonal matrix, U V^T of the step's singular vectors, moves all directions equally far. Muon (Jordan et al.
2024, https://kellerjordan.github.io/posts/muon) takes it of a momentum; `orthogonal_step` takes it of any rule's step,
and keeps that step's root mean square.

Which tensors are matrices in this sense, a shape does not tell: an embedding and a hidden layer look alike. `ROLES` has
the roles that a tensor can have in a net; `StepContext.role` is that of the tensor that moves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lopt.rules import features as feats
from lightning_lopt.rules.shards import TensorShard, local, means, whole_shape

ROLES = {
    "hidden": "weight of a hidden layer: (out, in), or (out, in, ...) of a convolution",
    "experts": "weights of several hidden layers in one tensor: (layers, ..., rows, columns)",
    "embedding": "table of which a batch reads some rows: (rows, width)",
    "output": "weight of the last layer: (out, in, ...)",
    "other": "none of these: a position embedding, a class token, a learned temperature",
}
"""Roles of tensors with two dims or more. Vectors and scalars have none that matters."""

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of one Newton-Schulz iteration: Muon's, which spreads singular values between 0.7 and 1.2 fast."""
TINY = 1e-30  # the smallest norm that is divided by; a float32 that is still normal


def is_matrix(shape: tuple[int, ...], role: str | None) -> bool:
    """Whether a tensor's step is seen as a matrix: a hidden layer or experts, with both sides longer than 1.

    Example:
        >>> is_matrix((8, 4), "hidden"), is_matrix((8, 4), "embedding"), is_matrix((8, 4), None)
        (True, False, False)
    """
    return role in ("hidden", "experts") and len(shape) > 1 and min(sides(shape, role)) > 1


def as_matrices(tensor: Tensor, role: str | None) -> Tensor:
    """A view of (*shape) as matrices (n, rows, columns): n = 1 for a hidden layer, the number of layers for experts.

    Example:
        >>> as_matrices(torch.zeros(16, 3, 5, 5), "hidden").shape, as_matrices(torch.zeros(4, 8, 6), "experts").shape
        (torch.Size([1, 16, 75]), torch.Size([4, 8, 6]))
    """
    rows, columns = sides(tuple(tensor.shape), role)
    return tensor.reshape(-1, rows, columns)


def gathered(shard: TensorShard | None, *tensors: Tensor) -> list[Tensor]:
    """Whole tensors (*shape) from the shards (*local shape) of all processes, by one message; see `shards.means`."""
    return [tensor.reshape(whole_shape(shard, tensor)) for tensor in means(shard, *((each, ()) for each in tensors))]


def newton_schulz(matrices: Tensor, iterations: int = 2, coefficients: tuple[float, float, float] = QUINTIC) -> Tensor:
    """Push the singular values of matrices towards 1 and keep their singular vectors.

    Each iteration is X <- a X + b (X X^T) X + c (X X^T)^2 X, from X of Frobenius norm 1, with the shorter side as rows.
    Wide matrices take all iterations on X X^T alone, which is smaller, and multiply X by the result once. After the two
    iterations of the default, singular values above a tenth of the norm are near 1, and smaller ones have grown at most
    twelvefold.

    Muon's own code divides by the norm or 1e-7, whichever is larger, and so shrinks what is smaller. Here the result
    does not depend on the scale, down to 1e-30.

    Args:
        matrices: (..., rows, columns), in the dtype of the arithmetic. bfloat16, Muon's own, keeps two digits.
        iterations: how many; 0 gives X of norm 1.
        coefficients: (a, b, c).

    Example:
        >>> torch.linalg.svdvals(newton_schulz(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 5)).round(decimals=1)
        tensor([1.1000, 0.8000])
    """
    return _iterated(matrices / _divisor(norm(matrices)), iterations, coefficients)


def orthogonal(matrices: Tensor, share: Tensor | float = 1.0, iterations: int = 2) -> Tensor:
    """Matrices on the way to orthogonal ones, each at its own Frobenius norm.

    Args:
        matrices: (..., rows, columns).
        share: (..., 1, 1) or () between 0, the matrices as they are, and 1, the orthogonal ones.
        iterations: of Newton-Schulz.

    Example:
        >>> given = torch.tensor([[0.3, 0.0], [0.0, 0.1]])
        >>> orthogonal(given, iterations=8).norm(), given.norm()
        (tensor(0.3162), tensor(0.3162))
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    largest = x.abs().amax((-2, -1), keepdim=True)
    x = x / _divisor(largest)  # or squares of very small and very large numbers are lost
    gram = x @ x.mT
    gram = gram / _divisor(_trace(gram))  # of x with norm 1
    polynomial = _polynomial(gram, iterations, QUINTIC)
    # The result is a mix of x and polynomial @ x, of norm 1 each. All norms follow from the Gram matrix, so nothing
    # else is computed from numbers as many as the matrices have.
    product = polynomial @ gram
    found_size = _divisor(feats.root((product * polynomial).sum((-2, -1), keepdim=True)))
    cosine = _trace(product) / found_size
    mixed_size = feats.root((1 - share) ** 2 + share**2 + 2 * share * (1 - share) * cosine)
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    mixed = torch.add(identity * (1 - share), polynomial * (share / found_size)) * (largest / _divisor(mixed_size))
    x = mixed @ x
    return x.mT if tall else x


def orthogonal_step(
    step: Tensor, role: str | None, share: Tensor | float, shard: TensorShard | None = None, iterations: int = 2
) -> Tensor:
    """A tensor's step, with the direction of `orthogonal`, (*shape).

    Args:
        step: (*shape) of a tensor for which `is_matrix` holds.
        role: the tensor's role. Matrices of experts are treated one by one.
        share: () as for `orthogonal`.
        shard: the shard of the tensor that `step` covers; None for all of it. Every process then takes the whole step.
        iterations: of Newton-Schulz.
    """
    (whole,) = gathered(shard, step)
    return local(shard, orthogonal(as_matrices(whole, role), share, iterations).reshape(whole.shape))


def norm(matrices: Tensor) -> Tensor:
    """Frobenius norms (..., 1, 1); also of numbers whose squares are too small or too large."""
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    size: Tensor = largest * torch.linalg.vector_norm(matrices / _divisor(largest), dim=(-2, -1), keepdim=True)
    return size


def _divisor(size: Tensor) -> Tensor:
    """1 in place of what is too small to divide by, so that derivatives at 0 are finite."""
    return torch.where(size < TINY, 1.0, size)


def sides(shape: tuple[int, ...], role: str | None) -> tuple[int, int]:
    """Rows and columns of a tensor's matrices, see `as_matrices`."""
    if role == "experts":
        return shape[-2], shape[-1]
    return shape[0], math.prod(shape[1:])


def _iterated(matrices: Tensor, iterations: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Newton-Schulz from matrices of norm 1."""
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    is_precise = x.element_size() >= 4  # else the polynomial's largest factors hide its smallest
    if iterations and is_precise and x.shape[-1] >= 2 * x.shape[-2]:
        x = _polynomial(x @ x.mT, iterations, coefficients) @ x
    else:
        for _ in range(iterations):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def _trace(matrices: Tensor) -> Tensor:
    return torch.diagonal(matrices, dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _polynomial(gram: Tensor, iterations: int, coefficients: tuple[float, float, float]) -> Tensor:
    """P with P X = what the iterations make of X, from X X^T (..., rows, rows). All its factors commute."""
    a, b, c = coefficients
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product = identity
    for number in range(iterations):
        factor = torch.add(torch.add(b * gram, gram @ gram, alpha=c), identity, alpha=a)
        product = factor @ product if number else factor
        if number + 1 < iterations:
            gram = gram @ (factor @ factor)
    return product
