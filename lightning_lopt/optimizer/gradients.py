"""A parameter's value and gradient, as its rule gets them; errors for those that rules cannot take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lopt.rules import compute_dtype


def descent(param: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A parameter's value and the gradient to descend, in the dtype of the arithmetic."""
    dtype = compute_dtype(param.dtype)
    grad = dense_gradient(param).to(dtype)
    return param.to(dtype), -grad if group["maximize"] else grad


def check_real(param: Tensor) -> None:
    """Raise a ValueError for a complex parameter."""
    if param.is_complex():
        raise ValueError(
            f"A parameter of shape {tuple(param.shape)} is {param.dtype}; update rules take real parameters. "
            "Hold it as torch.view_as_real(parameter)."
        )


def dense_gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one; a RuntimeError if it is sparse."""
    grad = param.grad
    assert grad is not None  # the caller has checked
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"The gradient of a parameter of shape {tuple(param.shape)} is {grad.layout}; update rules take dense "
            "gradients. Use nn.Embedding(sparse=False), or give these parameters torch.optim.SparseAdam and manual "
            "optimization."
        )
    return grad.resolve_neg()  # kernels read memory, where a lazy sign is missing
