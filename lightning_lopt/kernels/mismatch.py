"""The error of a step whose tensors do not fit together: kernels read and write raw memory, so they look first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_lopt.kernels import WorkItem


class TensorMismatch(RuntimeError):
    """A parameter's gradient or state is not of the parameter's size; nothing has been written.

    Attributes:
        param: the parameter, whose name the optimizer knows.
    """

    def __init__(self, param: Tensor, came: str, expected: str) -> None:
        super().__init__(
            f"{came}, expected {expected} for a parameter of shape {tuple(param.shape)} on {param.device}. A parameter "
            "that is resized or replaced needs a gradient and a state of its own: delete optimizer.state[parameter], "
            "or resize its tensors too."
        )
        self.param = param


def check_shapes(item: WorkItem, state_shapes: Mapping[str, torch.Size]) -> None:
    """Raise a TensorMismatch unless gradient and state have the shapes that belong to the parameter, and its device.

    Args:
        item: a tensor's part of a step.
        state_shapes: name -> shape of a tensor of the state; others are not looked at.
    """
    param = item.param
    expected = [("gradient", item.grad, param.shape)]
    expected += [(f"state {name!r}", item.state[name], shape) for name, shape in state_shapes.items()]
    for name, tensor, shape in expected:
        if tensor.shape != shape or tensor.device != param.device:
            came = f"The {name} has shape {tuple(tensor.shape)} on {tensor.device}"
            raise TensorMismatch(param, came, f"shape {tuple(shape)}")


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's memory, from its address on, is its numbers in float32."""
    return tensor.dtype is torch.float32 and tensor.is_contiguous() and not tensor.is_neg()


def plain(tensor: Tensor) -> Tensor:
    """The tensor itself where `is_plain`, else a copy that is.

    Example:
        >>> plain(torch.ones(2, 3, dtype=torch.bfloat16).t()).stride()
        (2, 1)
    """
    if is_plain(tensor):
        return tensor
    return tensor.detach().resolve_neg().to(torch.float32, memory_format=torch.contiguous_format).contiguous()
