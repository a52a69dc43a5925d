"""The error of a step whose tensors do not fit together, and the check that raises it.

Kernels read and write raw memory, so they look first; the optimizer looks for the rules that it calls itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class TensorMismatch(RuntimeError):
    """A parameter's gradient or state does not fit it; nothing has been written.

    Args:
        param: the parameter.
        what: the gradient or the state, as the first words of the message.
        came: what is wrong with it.
        expected: what it should be.
    """

    def __init__(self, param: Tensor, what: str, came: str, expected: str) -> None:
        self.param = param
        self._message = (
            f"{what} of {{}} {came}, expected {expected}. A parameter that is resized, moved or replaced needs a "
            "gradient and a state that fit: call zero_grad() before the next backward(), and resize or move the state, "
            "too, or delete optimizer.state[parameter] to start anew."
        )
        super().__init__(self.about(f"a parameter of shape {tuple(param.shape)}"))

    def about(self, name: str) -> str:
        """The message with the parameter's name, which kernels do not know."""
        return self._message.format(name)


def check_shapes(
    param: Tensor, grad: Tensor, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise a TensorMismatch unless gradient and state have the shapes that belong to the parameter, and its device.

    Args:
        param: the parameter.
        grad: its gradient.
        state: its state.
        shapes: name -> shape of a tensor of the state; others are not looked at.
    """
    _check(param, "The gradient", grad, param.shape)
    for name, shape in shapes.items():
        _check(param, f"State {name!r}", state.get(name), shape)


def _check(param: Tensor, what: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None or tensor.shape != shape or tensor.device != param.device:
        came = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)} on {tensor.device}"
        raise TensorMismatch(param, what, came, f"shape {tuple(shape)} on {param.device}")


def is_plain(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a tensor's memory, from its address on, is its numbers in a dtype."""
    return tensor.dtype is dtype and tensor.is_contiguous() and not tensor.is_neg()


def plain(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor itself where `is_plain`, else a copy that is.

    Example:
        >>> plain(torch.ones(2, 3, dtype=torch.bfloat16).t()).stride()
        (2, 1)
    """
    if is_plain(tensor, dtype):
        return tensor
    return tensor.detach().resolve_neg().to(dtype, memory_format=torch.contiguous_format).contiguous()
