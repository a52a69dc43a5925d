"""Networks for images and tables: MLP (logistic regression without hidden layers), convolutional and residual ones."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from lightning_lopt.tasks.base import Params, check_choice, check_positive
from lightning_lopt.tasks.layers import (
    ACTIVATIONS,
    NORMS,
    Spec,
    WithoutDropout,
    conv,
    conv_specs,
    linear,
    linear_specs,
    local_response_norm,
    mask,
    max_pool_same,
    norm,
    norm_specs,
)


def check_dropout(rate: float) -> None:
    """Raise a ValueError unless 0 <= rate < 1."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout={rate!r} is not allowed: it must be a number in [0, 1).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP:
    """A multilayer perceptron: linear layers with norm, dropout and activation between them.

    The order is that of the STAR reference. Inputs are flattened. Parameters: `layers.<i>.weight, .bias`, and with a
    norm `norms.<i>.weight, .bias`.

    Example:
        >>> net = MLP(inputs=64, hidden=(32,), outputs=10)
        >>> sum(math.prod(spec.shape) for spec in net.specs().values())
        2410
    """

    inputs: int
    hidden: tuple[int, ...] = ()
    outputs: int = 10
    activation: str = "relu"
    norm: str = "none"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for size in (self.inputs, *self.hidden, self.outputs):
            check_positive("size of a layer", size)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)
        check_dropout(self.dropout)

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        sizes = (self.inputs, *self.hidden, self.outputs)
        specs: dict[str, Spec] = {}
        for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            specs |= linear_specs(f"layers.{i}", fan_in, fan_out)
            if self.norm != "none" and i < len(self.hidden):
                specs |= norm_specs(f"norms.{i}", fan_out)
        return specs

    def mask_shapes(self, batch_size: int) -> tuple[tuple[int, ...], ...]:
        """Return a shape (b, width) for each hidden layer."""
        return tuple((batch_size, width) for width in self.hidden) if self.dropout else ()

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Map (b, ...) to (b, outputs)."""
        x = x.flatten(1)
        for i in range(len(self.hidden)):
            x = norm(params, f"norms.{i}", linear(params, f"layers.{i}", x), self.norm)
            x = ACTIVATIONS[self.activation](mask(x, masks, i))
        return linear(params, f"layers.{len(self.hidden)}", x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNet(WithoutDropout):
    """Convolutions, each followed by activation and norm in the reference's order, then pooling and a linear layer.

    Parameters: `convs.<i>.weight, .bias`, with a norm `norms.<i>.weight, .bias`, `head.weight, .bias`.

    Example:
        >>> net = ConvNet(in_shape=(3, 32, 32))  # Conv_Cifar10_32x64x64, on which STAR is meta-trained
        >>> sum(math.prod(spec.shape) for spec in net.specs().values())
        56970
    """

    in_shape: tuple[int, int, int]
    channels: tuple[int, ...] = (32, 64, 64)
    strides: tuple[int, ...] = (2, 1, 1)
    outputs: int = 10
    kernel_size: int = 3
    padding: str = "same"
    activation: str = "relu"
    norm: str = "none"
    pool: str = "avg"

    def __post_init__(self) -> None:
        for size in (*self.in_shape, *self.channels, *self.strides, self.outputs, self.kernel_size):
            check_positive("size", size)
        if len(self.channels) != len(self.strides) or not self.channels:
            raise ValueError(
                f"channels={self.channels} and strides={self.strides} must be of equal length, at least 1."
            )
        check_choice("padding", self.padding, ("same", "valid"))
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("pool", self.pool, ("avg", "max", "flatten"))

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs: dict[str, Spec] = {}
        for i, (fan_in, fan_out) in enumerate(zip((self.in_shape[0], *self.channels), self.channels, strict=False)):
            specs |= conv_specs(f"convs.{i}", fan_in, fan_out, self.kernel_size)
            if self.norm != "none":
                specs |= norm_specs(f"norms.{i}", fan_out)
        return specs | linear_specs("head", self._features(), self.outputs)

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Map (b, c, h, w) to (b, outputs)."""
        for i, stride in enumerate(self.strides):
            x = ACTIVATIONS[self.activation](conv(params, f"convs.{i}", x, stride, self.padding))
            x = norm(params, f"norms.{i}", x, self.norm)
        if self.pool == "avg":
            x = x.mean((2, 3))
        elif self.pool == "max":
            x = x.amax((2, 3))
        return linear(params, "head", x.flatten(1))

    def _features(self) -> int:
        if self.pool != "flatten":
            return self.channels[-1]
        height, width = self.in_shape[1:]
        for stride in self.strides:
            lost = 0 if self.padding == "same" else self.kernel_size - 1
            height, width = math.ceil((height - lost) / stride), math.ceil((width - lost) / stride)
        return self.channels[-1] * height * width


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledConvNet(WithoutDropout):
    """Convolutions with relu, optional local response norm and max pooling, then fully connected layers.

    These are the networks of TensorFlow's tutorials for MNIST and, with `local_norm`, for CIFAR-10, which the
    multiscale-Adam thesis (section 2.3) uses. The tutorial pools the first of the two CIFAR layers before it normalizes
    it; here each layer is normalized first.

    Parameters: `convs.<i>.weight, .bias`, `layers.<i>.weight, .bias`.

    Example:
        >>> net = PooledConvNet(in_shape=(3, 24, 24), channels=(64, 64), hidden=(384, 192), pool_size=3)
        >>> sum(math.prod(spec.shape) for spec in net.specs().values())  # as in the thesis
        1068298
    """

    in_shape: tuple[int, int, int]
    channels: tuple[int, ...] = (32, 64)
    hidden: tuple[int, ...] = (1024,)
    outputs: int = 10
    kernel_size: int = 5
    pool_size: int = 2
    """Side of the max-pooling windows; their stride is 2."""
    local_norm: bool = False
    """Apply `layers.local_response_norm` before the pooling."""

    def __post_init__(self) -> None:
        for size in (*self.in_shape, *self.channels, *self.hidden, self.outputs, self.kernel_size, self.pool_size):
            check_positive("size", size)

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs: dict[str, Spec] = {}
        for i, (fan_in, fan_out) in enumerate(zip((self.in_shape[0], *self.channels), self.channels, strict=False)):
            specs |= conv_specs(f"convs.{i}", fan_in, fan_out, self.kernel_size)
        height, width = self.in_shape[1:]
        for _ in self.channels:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        sizes = ((self.channels or self.in_shape)[-1] * height * width, *self.hidden, self.outputs)
        for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            specs |= linear_specs(f"layers.{i}", fan_in, fan_out)
        return specs

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Map (b, c, h, w) to (b, outputs)."""
        for i in range(len(self.channels)):
            x = conv(params, f"convs.{i}", x).relu()
            x = max_pool_same(local_response_norm(x) if self.local_norm else x, self.pool_size)
        x = x.flatten(1)
        for i in range(len(self.hidden)):
            x = linear(params, f"layers.{i}", x).relu()
        return linear(params, f"layers.{len(self.hidden)}", x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet(WithoutDropout):
    """A pre-activation residual network (He et al. 2016, arXiv 1603.05027) with batch statistics.

    As in the STAR reference it has a stem convolution, groups of blocks, norm, relu, a mean over positions and a linear
    head. A block is norm, relu and convolution, twice or, as a bottleneck (1x1, 3x3, 1x1), three times. The first block
    of each group has a projection on the shortcut and, except in the first group, stride 2. The reference initializes
    the head with zeros (`zero_head`).

    Parameters: `stem.weight`, `groups.<g>.<b>.{norms.<i>.weight, .bias; convs.<i>.weight; projection.weight}`, `norm`,
    `head`.
    """

    in_shape: tuple[int, int, int]
    channels: tuple[int, ...] = (16, 32, 64)
    blocks: tuple[int, ...] = (1, 1, 1)
    outputs: int = 10
    bottleneck: bool = False
    stem_channels: int = 16
    stem_kernel_size: int = 3
    stem_stride: int = 1
    max_pool: bool = False
    zero_head: bool = False

    def __post_init__(self) -> None:
        sizes = (
            *self.channels,
            *self.blocks,
            self.outputs,
            self.stem_channels,
            self.stem_kernel_size,
            self.stem_stride,
        )
        for size in (*self.in_shape, *sizes):
            check_positive("size", size)
        if len(self.channels) != len(self.blocks) or not self.channels:
            raise ValueError(f"channels={self.channels} and blocks={self.blocks} must be of equal length, at least 1.")

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs = conv_specs("stem", self.in_shape[0], self.stem_channels, self.stem_kernel_size, bias=False)
        inputs = self.stem_channels
        for name, channels, _, projects in self._plan():
            narrow = max(channels // 4, 1)
            layers = ((narrow, 1), (narrow, 3), (channels, 1)) if self.bottleneck else ((channels, 3), (channels, 3))
            if projects:
                specs |= conv_specs(f"{name}.projection", inputs, channels, 1, bias=False)
            for i, (outputs, kernel_size) in enumerate(layers):
                specs |= norm_specs(f"{name}.norms.{i}", inputs)
                specs |= conv_specs(f"{name}.convs.{i}", inputs, outputs, kernel_size, bias=False)
                inputs = outputs
        return specs | norm_specs("norm", inputs) | linear_specs("head", inputs, self.outputs, zero=self.zero_head)

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Map (b, c, h, w) to (b, outputs)."""
        x = conv(params, "stem", x, self.stem_stride)
        if self.max_pool:
            x = max_pool_same(x)
        for name, _, stride, projects in self._plan():
            x = self._block(params, name, x, stride, projects)
        x = norm(params, "norm", x, "batch").relu()
        return linear(params, "head", x.mean((2, 3)))

    def _plan(self) -> list[tuple[str, int, int, bool]]:
        """(name, channels, stride, whether it has a projection) of each block."""
        return [
            (f"groups.{group}.{block}", channels, 2 if group > 0 and block == 0 else 1, block == 0)
            for group, (channels, count) in enumerate(zip(self.channels, self.blocks, strict=True))
            for block in range(count)
        ]

    def _block(self, params: Params, name: str, x: Tensor, stride: int, projects: bool) -> Tensor:
        shortcut = x
        # The stride belongs to the 3x3 convolution of a bottleneck, else to the first convolution.
        strides = (1, stride, 1) if self.bottleneck else (stride, 1)
        for i, conv_stride in enumerate(strides):
            x = norm(params, f"{name}.norms.{i}", x, "batch").relu()
            if i == 0 and projects:
                shortcut = conv(params, f"{name}.projection", x, stride)
            x = conv(params, f"{name}.convs.{i}", x, conv_stride)
        return x + shortcut
