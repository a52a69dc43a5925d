"""A parameter's value and gradient, as its rule gets them; errors for those that rules cannot take."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lopt.rules import compute_dtype


def descent(param: Tensor, grad: Tensor, *, maximize: bool) -> tuple[Tensor, Tensor]:
    """A parameter's value and the gradient to descend, in the dtype of the arithmetic."""
    dtype = compute_dtype(param.dtype)
    grad = grad.to(dtype)
    return param.to(dtype), -grad if maximize else grad


def check_real(param: Tensor) -> None:
    """Raise a ValueError for a complex parameter."""
    if param.is_complex():
        raise ValueError(
            f"A parameter of shape {tuple(param.shape)} is {param.dtype}; update rules take real parameters. "
            "Hold it as torch.view_as_real(parameter)."
        )


def dense(grad: Tensor) -> Tensor:
    """A gradient as rules and kernels take it; a RuntimeError if it is sparse."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"The gradient of a parameter of shape {tuple(grad.shape)} is {grad.layout}; update rules take dense "
            "gradients. Use nn.Embedding(sparse=False), or give these parameters torch.optim.SparseAdam and manual "
            "optimization."
        )
    return grad.resolve_neg() if grad.is_neg() else grad  # kernels read memory, where a lazy sign is missing
