"""Small constant tensors, such as decay rates: copied to a device once, not at every step.

`torch.tensor([...], device="cuda")` copies from the host, and torch waits for the device to do it. Inside `keeping` a
constant is made once. Elsewhere it is made at each call, because a transform of `torch.func` may be at work: a tensor
that is made under `vmap` or `grad` belongs to it, and must not outlive it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Current(threading.local):
    cache: dict[Any, Any] | None = None  # of the `keeping` that this thread is in


_CURRENT = _Current()


@contextmanager
def keeping(cache: dict[Any, Any]) -> Iterator[None]:
    """Let `constant` and `remembered` keep what they make, in a cache that the caller owns. Not for `torch.func`.

    Example:
        >>> cache = {}
        >>> with keeping(cache):
        ...     first = constant((0.9, 0.99), torch.float32, torch.device("cpu"))
        ...     again = constant((0.9, 0.99), torch.float32, torch.device("cpu"))
        >>> first is again
        True
    """
    before = _CURRENT.cache
    _CURRENT.cache = cache
    try:
        yield
    finally:
        _CURRENT.cache = before


def constant(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.tensor(values, dtype=dtype, device=device)`, which the caller must not write to.

    Args:
        values: a number, or a tuple of numbers or of such tuples.
        dtype: of the tensor.
        device: of the tensor.
    """
    # torch.compile makes constants of its own, and cannot trace the cache.
    cache = None if torch.compiler.is_compiling() else _CURRENT.cache
    if cache is None:
        return torch.tensor(values, dtype=dtype, device=device)
    key = (values, dtype, device)
    if key in cache:
        kept: Tensor = cache[key]
        return kept
    with torch.inference_mode(False):
        made = torch.tensor(values, dtype=dtype, device=device)
    if type(made) is Tensor:  # a fake tensor, as in torch's estimates of memory, would spoil later steps
        cache[key] = made
    return made


def remembered(function: Callable[..., Tensor], values: Any, tensor: Tensor) -> Tensor:
    """`function(values, tensor)`, computed once as long as the tensor stays the same.

    Args:
        function: a pure function.
        values: hashable.
        tensor: usually a meta-parameter.
    """
    cache = None if torch.compiler.is_compiling() else _CURRENT.cache
    if cache is None or tensor.is_inference():  # which has no version
        return function(values, tensor)
    key = (function, values, id(tensor))
    # The tensor is kept, so that no other can have its id.
    if key not in cache or cache[key][1] != tensor._version:
        cache[key] = tensor, tensor._version, function(values, tensor)
    result: Tensor = cache[key][2]
    return result
