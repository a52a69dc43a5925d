"""Image and tabular networks: MLP (logistic regression without hidden layers), convolutional and residual networks."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from lightning_lopt.tasks.base import Params, check_choice, check_positive
from lightning_lopt.tasks.layers import (
    ACTIVATIONS,
    NORMS,
    Spec,
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
    """Linear layers with, between them, norm, dropout and activation in this order (the STAR reference's).

    Inputs are flattened. Parameters: `layers.<i>.weight, .bias`, and `norms.<i>.weight, .bias` with a norm.

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
        """Name -> specification, in forward order."""
        sizes = (self.inputs, *self.hidden, self.outputs)
        specs: dict[str, Spec] = {}
        for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            specs |= linear_specs(f"layers.{i}", fan_in, fan_out)
            if self.norm != "none" and i < len(self.hidden):
                specs |= norm_specs(f"norms.{i}", fan_out)
        return specs

    def mask_shapes(self, batch_size: int) -> tuple[tuple[int, ...], ...]:
        """One mask per hidden layer: (b, width)."""
        return tuple((batch_size, width) for width in self.hidden) if self.dropout else ()

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """(b, ...) -> (b, outputs)."""
        x = x.flatten(1)
        for i in range(len(self.hidden)):
            x = norm(params, f"norms.{i}", linear(params, f"layers.{i}", x), self.norm)
            x = ACTIVATIONS[self.activation](mask(x, masks, i))
        return linear(params, f"layers.{len(self.hidden)}", x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNet:
    """Convolutions, each followed by activation and norm in this order (the reference's), pooling, and a linear layer.

    Parameters: `convs.<i>.weight, .bias`, `norms.<i>.weight, .bias` with a norm, `head.weight, .bias`.

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

    @property
    def dropout(self) -> float:
        """None here."""
        return 0.0

    def specs(self) -> dict[str, Spec]:
        """Name -> specification, in forward order."""
        specs: dict[str, Spec] = {}
        for i, (fan_in, fan_out) in enumerate(zip((self.in_shape[0], *self.channels), self.channels, strict=False)):
            specs |= conv_specs(f"convs.{i}", fan_in, fan_out, self.kernel_size)
            if self.norm != "none":
                specs |= norm_specs(f"norms.{i}", fan_out)
        return specs | linear_specs("head", self._features(), self.outputs)

    def mask_shapes(self, batch_size: int) -> tuple[tuple[int, ...], ...]:
        """No dropout."""
        return ()

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """(b, c, h, w) -> (b, outputs)."""
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
class PooledConvNet:
    """Convolutions, each followed by relu, local response norm where asked for, and max pooling; then hidden layers.

    TensorFlow's tutorial networks for MNIST and, with `local_norm`, for CIFAR-10, on which the multiscale-Adam thesis
    (section 2.3) experiments. There the first of the two CIFAR layers is pooled before it is normalized; here none is.

    Parameters: `convs.<i>.weight, .bias`, `layers.<i>.weight, .bias`.

    Example:
        >>> net = PooledConvNet(in_shape=(3, 24, 24), channels=(64, 64), hidden=(384, 192), pool_size=3)
        >>> sum(math.prod(spec.shape) for spec in net.specs().values())  # the thesis counts as many
        1068298
    """

    in_shape: tuple[int, int, int]
    channels: tuple[int, ...] = (32, 64)
    hidden: tuple[int, ...] = (1024,)
    outputs: int = 10
    kernel_size: int = 5
    pool_size: int = 2
    """Side of the windows of max pooling, whose stride is 2."""
    local_norm: bool = False
    """Divide by (1 + .001 / 9 sum of squares of the nine nearest channels)^.75, as Krizhevsky et al. 2012 do."""

    def __post_init__(self) -> None:
        for size in (*self.in_shape, *self.channels, *self.hidden, self.outputs, self.kernel_size, self.pool_size):
            check_positive("size", size)

    @property
    def dropout(self) -> float:
        """None here."""
        return 0.0

    def specs(self) -> dict[str, Spec]:
        """Name -> specification, in forward order."""
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

    def mask_shapes(self, batch_size: int) -> tuple[tuple[int, ...], ...]:
        """No dropout."""
        return ()

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """(b, c, h, w) -> (b, outputs)."""
        for i in range(len(self.channels)):
            x = conv(params, f"convs.{i}", x).relu()
            x = max_pool_same(local_response_norm(x) if self.local_norm else x, self.pool_size)
        x = x.flatten(1)
        for i in range(len(self.hidden)):
            x = linear(params, f"layers.{i}", x).relu()
        return linear(params, f"layers.{len(self.hidden)}", x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet:
    """Pre-activation residual network (He et al. 2016, arXiv 1603.05027) with batch statistics.

    As in the STAR reference: a stem convolution, groups of blocks (the first of each group but the first at stride 2,
    with a projection on the shortcut), norm, relu, mean over positions, linear. A block is norm, relu, conv, two or
    (bottleneck: 1x1, 3x3, 1x1) three times. The head starts at zero in the reference.

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

    @property
    def dropout(self) -> float:
        """None here."""
        return 0.0

    def mask_shapes(self, batch_size: int) -> tuple[tuple[int, ...], ...]:
        """No dropout."""
        return ()

    def specs(self) -> dict[str, Spec]:
        """Name -> specification, in forward order."""
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
        """(b, c, h, w) -> (b, outputs)."""
        x = conv(params, "stem", x, self.stem_stride)
        if self.max_pool:
            x = max_pool_same(x)
        for name, _, stride, projects in self._plan():
            x = self._block(params, name, x, stride, projects)
        x = norm(params, "norm", x, "batch").relu()
        return linear(params, "head", x.mean((2, 3)))

    def _plan(self) -> list[tuple[str, int, int, bool]]:
        """(name, channels, stride, has a projection) of each block."""
        return [
            (f"groups.{group}.{block}", channels, 2 if group > 0 and block == 0 else 1, block == 0)
            for group, (channels, count) in enumerate(zip(self.channels, self.blocks, strict=True))
            for block in range(count)
        ]

    def _block(self, params: Params, name: str, x: Tensor, stride: int, projects: bool) -> Tensor:
        shortcut = x
        # The 3x3 convolution of a bottleneck carries the stride, else the first one.
        strides = (1, stride, 1) if self.bottleneck else (stride, 1)
        for i, conv_stride in enumerate(strides):
            x = norm(params, f"{name}.norms.{i}", x, "batch").relu()
            if i == 0 and projects:
                shortcut = conv(params, f"{name}.projection", x, stride)
            x = conv(params, f"{name}.convs.{i}", x, conv_stride)
        return x + shortcut
