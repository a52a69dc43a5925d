"""Networks for images."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lopt.tasks.base import Params
from lightning_lopt.tasks.layers import (
    Spec,
    WithoutDropout,
    conv,
    conv_specs,
    layer_norm,
    linear,
    linear_specs,
    norm_specs,
)
from lightning_lopt.tasks.networks import MLP
from lightning_lopt.tasks.unseen.parts import Masks, named, part


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencodingMLPs(WithoutDropout):
    """A variational autoencoder for `transforms.Code` and the objective "evidence".

    Inputs (b, pixels + latent) are pixels and noise; outputs (b, pixels + 2 latent) logits, means and log variances.
    Parameters: `encoder.*`, `decoder.*`.
    """

    pixels: int
    latent: int = 8
    hidden: int = 96

    def _parts(self) -> tuple[MLP, MLP]:
        encoder = MLP(inputs=self.pixels, hidden=(self.hidden,), outputs=2 * self.latent, activation="elu")
        return encoder, MLP(inputs=self.latent, hidden=(self.hidden,), outputs=self.pixels, activation="elu")

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        encoder, decoder = self._parts()
        return {**named("encoder", encoder.specs()), **named("decoder", decoder.specs())}

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, pixels + latent) to (b, pixels + 2 latent)."""
        encoder, decoder = self._parts()
        pixels, noise = x[:, : self.pixels], x[:, self.pixels :]
        code = encoder.apply(part(params, "encoder"), pixels)
        means, logs = code.chunk(2, -1)
        drawn = means + (0.5 * logs).exp() * noise
        return torch.cat([decoder.apply(part(params, "decoder"), drawn), code], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeparableConv(WithoutDropout):
    """Images (b, c, h, w) -> (b, outputs): depthwise and pointwise convolutions with group norm and skips.

    Parameters: `stem.*`, `blocks.<i>.{depth, point, norm}.*`, `head.*`.
    """

    in_channels: int = 1
    channels: int = 24
    depth: int = 3
    outputs: int = 10
    groups: int = 4

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs = conv_specs("stem", self.in_channels, self.channels, 3)
        for i in range(self.depth):
            specs[f"blocks.{i}.depth.weight"] = Spec((self.channels, 1, 3, 3), "weight", 9)
            specs |= norm_specs(f"blocks.{i}.norm", self.channels)
            specs |= conv_specs(f"blocks.{i}.point", self.channels, self.channels, 1)
        return specs | linear_specs("head", self.channels, self.outputs)

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, c, h, w) to (b, outputs)."""
        h = conv(params, "stem", x, stride=2)
        for i in range(self.depth):
            mixed = F.conv2d(h, params[f"blocks.{i}.depth.weight"], padding=1, groups=self.channels)
            scale, shift = (params[f"blocks.{i}.norm.{name}"] for name in ("weight", "bias"))
            h = h + conv(params, f"blocks.{i}.point", F.silu(F.group_norm(mixed, self.groups, scale, shift)))
        return linear(params, "head", h.mean((2, 3)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewEncoder(WithoutDropout):
    """Two views of images (b, 2, c, h, w) -> embeddings (b, 2, outputs), each by the same `SeparableConv`."""

    net: SeparableConv

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        return self.net.specs()

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, 2, c, h, w) to (b, 2, outputs)."""
        return self.net.apply(params, x.flatten(0, 1)).reshape(*x.shape[:2], self.net.outputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixer(WithoutDropout):
    """Images (b, c, h, w) -> (b, outputs): MLPs over patches and over channels in turn (Tolstikhin et al. 2021).

    Parameters: `patch.*`, `blocks.<i>.{norm1, tokens1, tokens2, norm2, up, down}.*`, `norm.*`, `head.*`.
    """

    in_shape: tuple[int, int, int]
    outputs: int = 10
    patch: int = 2
    width: int = 32
    depth: int = 2

    @property
    def patches(self) -> int:
        """Number of patches."""
        return (self.in_shape[1] // self.patch) * (self.in_shape[2] // self.patch)

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs = linear_specs("patch", self.in_shape[0] * self.patch**2, self.width)
        for i in range(self.depth):
            name = f"blocks.{i}"
            specs |= norm_specs(f"{name}.norm1", self.width) | linear_specs(f"{name}.tokens1", self.patches, 32)
            specs |= linear_specs(f"{name}.tokens2", 32, self.patches) | norm_specs(f"{name}.norm2", self.width)
            specs |= linear_specs(f"{name}.up", self.width, 2 * self.width)
            specs |= linear_specs(f"{name}.down", 2 * self.width, self.width)
        return specs | norm_specs("norm", self.width) | linear_specs("head", self.width, self.outputs)

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, c, h, w) to (b, outputs)."""
        h = linear(params, "patch", F.unfold(x, self.patch, stride=self.patch).transpose(1, 2))
        for i in range(self.depth):
            name = f"blocks.{i}"
            turned = layer_norm(params, f"{name}.norm1", h).transpose(1, 2)
            h = h + linear(params, f"{name}.tokens2", F.gelu(linear(params, f"{name}.tokens1", turned))).transpose(1, 2)
            normed = layer_norm(params, f"{name}.norm2", h)
            h = h + linear(params, f"{name}.down", F.gelu(linear(params, f"{name}.up", normed)))
        return linear(params, "head", layer_norm(params, "norm", h).mean(1))
