"""Parameter specifications, initialization, and the functional layers of the networks.

Functions take dicts of tensors and work on one member; vmap adds the population. Weights have torch's layout, (out, in)
and (out, in, kh, kw). The epsilon of the norms is 1e-5, as in Haiku and torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lopt.tasks import draws
from lightning_lopt.tasks.base import Params, check_choice

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
}
NORMS = ("none", "layer", "batch")
SCHEMES = ("haiku", "torch", "normal")


class Spec(NamedTuple):
    """The specification of a parameter: its shape, and how it is initialized."""

    shape: tuple[int, ...]
    kind: str  # "weight", "bias" and "embedding" are drawn as the scheme says; "ones" and "zeros" are constant
    fan_in: int = 1
    gain: float = 1.0  # multiplies the standard deviation of weights and embeddings with the scheme "haiku"


class Network(Protocol):
    """The interface of networks: static configurations with parameter specifications and a pure forward function."""

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        ...

    def mask_shapes(self, batch_size: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the dropout masks of one batch; empty without dropout."""
        ...

    @property
    def dropout(self) -> float:
        """The dropout rate."""
        ...

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Map inputs (b, ...) to outputs (b, ..., outputs), with dropout if masks are given."""
        ...


class WithoutDropout:
    """Base of the networks that have no dropout."""

    @property
    def dropout(self) -> float:
        """The dropout rate, 0."""
        return 0.0

    def mask_shapes(self, batch_size: int) -> tuple[tuple[int, ...], ...]:
        """Return no shapes: there are no dropout masks."""
        return ()


def init_params(
    specs: Mapping[str, Spec],
    generator: torch.Generator,
    population: int | None,
    scheme: str = "haiku",
    std: float = 0.01,
) -> Params:
    """Draw initial parameters.

    Args:
        specs: name -> specification.
        generator: the only source of randomness.
        population: size of the leading axis, or None for none.
        scheme: "haiku" draws weights from a truncated normal with std 1 / sqrt(fan_in) and embeddings with std 1, and
            sets biases to 0; "torch" draws like nn.Linear, nn.Conv2d and nn.Embedding, from U(+-1 / sqrt(fan_in)) and
            N(0, 1); "normal" draws all three from N(0, std^2), as Andrychowicz et al. 2016 do.
        std: standard deviation of the scheme "normal".
    """
    check_choice("scheme", scheme, SCHEMES)
    return {name: _draw(spec, generator, population, scheme, std) for name, spec in specs.items()}


def _draw(spec: Spec, generator: torch.Generator, population: int | None, scheme: str, std: float) -> Tensor:
    shape = spec.shape
    bound = 1.0 / math.sqrt(spec.fan_in)
    if spec.kind == "ones":
        return torch.ones((*draws.lead(population), *shape), device=generator.device)
    if spec.kind == "zeros" or (spec.kind == "bias" and scheme == "haiku"):
        return torch.zeros((*draws.lead(population), *shape), device=generator.device)
    if scheme == "normal":
        return draws.normal(generator, shape, population, std)
    if scheme == "haiku":
        return draws.truncated_normal(
            generator, shape, population, spec.gain * (1.0 if spec.kind == "embedding" else bound)
        )
    if spec.kind == "embedding":
        return draws.normal(generator, shape, population)
    return draws.uniform(generator, shape, population, -bound, bound)


def roles_of(specs: Mapping[str, Spec]) -> dict[str, str]:
    """Name -> role (`rules.matrix.ROLES`) of the parameters with two dims or more.

    What is drawn as a weight, or is named `weight`, is a layer's: the last one is the output, the rest are hidden. A
    table of the kind "embedding" is an embedding if it is named `weight`. Position embeddings and tokens are "other".

    Example:
        >>> roles_of({**linear_specs("first", 2, 3), **linear_specs("head", 3, 4)})
        {'first.weight': 'hidden', 'head.weight': 'output'}
    """
    weights = [name for name, spec in specs.items() if len(spec.shape) > 1]
    roles = {}
    for name in weights:
        is_named, kind = name.rpartition(".")[2] == "weight", specs[name].kind
        role = "embedding" if kind == "embedding" else "hidden"
        roles[name] = role if is_named or kind == "weight" else "other"
    layers = [name for name, role in roles.items() if role == "hidden"]
    if layers:
        roles[layers[-1]] = "output"
    return roles


def linear_specs(name: str, inputs: int, outputs: int, *, gain: float = 1.0, zero: bool = False) -> dict[str, Spec]:
    """Return the specifications of a linear layer; with `zero`, its weight and bias start at 0."""
    kinds = ("zeros", "zeros") if zero else ("weight", "bias")
    return {
        f"{name}.weight": Spec((outputs, inputs), kinds[0], inputs, gain),
        f"{name}.bias": Spec((outputs,), kinds[1], inputs),
    }


def conv_specs(name: str, inputs: int, outputs: int, kernel_size: int, *, bias: bool = True) -> dict[str, Spec]:
    """Return the specifications of a 2-d convolution with a square kernel."""
    fan_in = inputs * kernel_size**2
    specs = {f"{name}.weight": Spec((outputs, inputs, kernel_size, kernel_size), "weight", fan_in)}
    return {**specs, f"{name}.bias": Spec((outputs,), "bias", fan_in)} if bias else specs


def norm_specs(name: str, size: int) -> dict[str, Spec]:
    """Return the specifications of a norm's scale, which starts at 1, and offset, which starts at 0."""
    return {f"{name}.weight": Spec((size,), "ones"), f"{name}.bias": Spec((size,), "zeros")}


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """Apply a linear layer: (..., in) -> (..., out)."""
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def conv(params: Params, name: str, x: Tensor, stride: int = 1, padding: str = "same") -> Tensor:
    """Apply a convolution: (b, in, h, w) -> (b, out, h', w'), with `pad_same` or ("valid") without padding."""
    weight = params[f"{name}.weight"]
    if padding == "same":
        x = pad_same(x, weight.shape[-1], stride)
    return F.conv2d(x, weight, params.get(f"{name}.bias"), stride)


def pad_same(x: Tensor, kernel_size: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad (b, c, h, w) so that a window of `kernel_size` gives ceil(size / stride) outputs.

    An odd pixel of padding goes to the end, as in XLA's and TensorFlow's "SAME". torch's symmetric padding differs for
    stride 2 on an even size.

    Example:
        >>> pad_same(torch.zeros(1, 1, 4, 4), kernel_size=3, stride=2).shape
        torch.Size([1, 1, 5, 5])
    """
    pads: list[int] = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel_size - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value) if any(pads) else x


def max_pool_same(x: Tensor, kernel_size: int = 3, stride: int = 2) -> Tensor:
    """Apply max pooling to (b, c, h, w), with the padding of `pad_same`."""
    return F.max_pool2d(pad_same(x, kernel_size, stride, -math.inf), kernel_size, stride)


def local_response_norm(x: Tensor, size: int = 9, alpha: float = 1e-3, beta: float = 0.75) -> Tensor:
    """Divide (b, c, h, w) by (1 + alpha / size * sum of squares of the `size` nearest channels)^beta.

    Source: Krizhevsky et al. 2012, with the defaults of TensorFlow's CIFAR-10 tutorial. The first and last channels
    have fewer neighbors.
    """
    reach = size // 2
    padded = F.pad(x.square(), (0, 0, 0, 0, reach, reach))
    total = torch.stack([padded[:, i : i + x.shape[1]] for i in range(size)]).sum(0)
    return x * (1 + alpha / size * total).pow(-beta)


def norm(params: Params, name: str, x: Tensor, kind: str) -> Tensor:
    """Normalize (b, c) or (b, c, h, w), then scale and shift each channel; "none" does nothing.

    "layer" normalizes over the channels of each example and position, "batch" each channel over examples and positions.
    Batch norm always uses the statistics of the current batch. A running average would make the loss impure.
    """
    if kind == "none":
        return x
    spatial = tuple(range(2, x.dim()))
    var, mean = torch.var_mean(x, (1,) if kind == "layer" else (0, *spatial), correction=0, keepdim=True)
    per_channel = (-1, *[1] * len(spatial))
    weight = params[f"{name}.weight"].reshape(per_channel)
    bias = params[f"{name}.bias"].reshape(per_channel)
    return (x - mean) * torch.rsqrt(var + 1e-5) * weight + bias


def layer_norm(params: Params, name: str, x: Tensor) -> Tensor:
    """Normalize over the last axis, then scale and shift it."""
    weight = params[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, params[f"{name}.bias"])


def mask(x: Tensor, masks: tuple[Tensor, ...], index: int) -> Tensor:
    """Apply dropout with a mask from the batch; without masks, do nothing."""
    return x * masks[index] if masks else x
