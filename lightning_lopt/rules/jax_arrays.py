"""Check meta-parameters that come as JAX or NumPy arrays from other packages, for the rules' `from_jax`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def as_tensors(theta: Mapping[str, Any], advice: str) -> dict[str, Tensor]:
    """Copies of the arrays as tensors of the same dtype.

    Args:
        theta: name -> array; of a path such as "theta|nn|~|w0", the last part is taken.
        advice: what to pass, for errors; a sentence without its period.

    Raises:
        ValueError: for a value that is not an array of finite floating-point numbers.

    Example:
        >>> import numpy
        >>> as_tensors({"b0": numpy.zeros(2)}, "Pass arrays")
        {'b0': tensor([0., 0.], dtype=torch.float64)}
    """
    return {name.rpartition("|")[2]: _as_tensor(name, value, advice) for name, value in theta.items()}


def check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], advice: str) -> None:
    """Raise a ValueError that names the first tensor that is missing, unknown or of another shape than expected."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            what = f"theta[{name!r}] has shape {found.get(name)}, expected {expected.get(name)} (None: absent)"
            raise ValueError(f"{what}. {advice}.")


def _as_tensor(name: str, value: Any, advice: str) -> Tensor:
    try:
        tensor = torch.as_tensor(value).clone()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"theta[{name!r}] is {type(value).__name__}, not an array. {advice} to arrays.") from None
    if not (tensor.is_floating_point() and tensor.isfinite().all()):
        raise ValueError(f"theta[{name!r}] is {tensor.dtype} or holds NaN or inf. {advice} to finite floating arrays.")
    return tensor
