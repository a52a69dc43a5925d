"""Networks for signals, sequences and texts."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lopt.tasks.base import Params
from lightning_lopt.tasks.layers import (
    Spec,
    WithoutDropout,
    linear,
    linear_specs,
    norm_specs,
)
from lightning_lopt.tasks.unseen.parts import Masks, part


@dataclasses.dataclass(frozen=True, kw_only=True)
class DilatedConv(WithoutDropout):
    """Signals (b, length) -> logits (b, outputs): residual convolutions in time with growing gaps, group-normalized.

    Parameters: `enter.*`, `layers.<i>.{weight, bias}`, `norms.<i>.*`, `head.*`.
    """

    outputs: int = 6
    channels: int = 16
    dilations: tuple[int, ...] = (1, 2, 4, 8)
    groups: int = 4

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs = {
            "enter.weight": Spec((self.channels, 1, 5), "weight", 5),
            "enter.bias": Spec((self.channels,), "bias", 5),
        }
        fan_in = 3 * self.channels
        for i in range(len(self.dilations)):
            specs |= norm_specs(f"norms.{i}", self.channels)
            specs[f"layers.{i}.weight"] = Spec((self.channels, self.channels, 3), "weight", fan_in)
            specs[f"layers.{i}.bias"] = Spec((self.channels,), "bias", fan_in)
        return specs | linear_specs("head", self.channels, self.outputs)

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, length) to (b, outputs)."""
        h = F.conv1d(x.unsqueeze(1), params["enter.weight"], params["enter.bias"], padding=2)
        for i, gap in enumerate(self.dilations):
            normed = F.group_norm(h, self.groups, params[f"norms.{i}.weight"], params[f"norms.{i}.bias"])
            layer = (params[f"layers.{i}.weight"], params[f"layers.{i}.bias"])
            h = h + F.conv1d(F.gelu(normed), *layer, padding=gap, dilation=gap)
        return linear(params, "head", h.mean(-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRU(WithoutDropout):
    """Sequences (b, t, d) -> (b, 1): a gated recurrent unit (Cho et al. 2014), and a linear map of its last state.

    Parameters: `gates.*` (reset and update), `candidate.*`, `head.*`.
    """

    inputs: int = 2
    hidden: int = 32

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        both = self.inputs + self.hidden
        gates, candidate = linear_specs("gates", both, 2 * self.hidden), linear_specs("candidate", both, self.hidden)
        return gates | candidate | linear_specs("head", self.hidden, 1)

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, t, d) to (b, 1)."""
        h = x.new_zeros(x.shape[0], self.hidden)
        for step in x.unbind(1):
            reset, keep = torch.sigmoid(linear(params, "gates", torch.cat([step, h], -1))).chunk(2, -1)
            new = torch.tanh(linear(params, "candidate", torch.cat([step, reset * h], -1)))
            h = keep * h + (1 - keep) * new
        return linear(params, "head", h)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedEncoder(WithoutDropout):
    """Tokens (b, t) -> (b, 1): a transformer encoder with RMSNorm, gated MLPs and one key and value for all heads.

    Parameters: `embedding.weight`, `positions`, those of block i, `blocks.<i>.{norm1, query, shared, out, norm2, gate,
    up, down}`, and `head.*`.
    """

    vocab: int = 5
    length: int = 20
    width: int = 32
    depth: int = 2
    heads: int = 4

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        width, head = self.width, self.width // self.heads
        specs = {
            "embedding.weight": Spec((self.vocab, width), "embedding"),
            "positions": Spec((self.length, width), "embedding", gain=0.5),
        }
        sizes = {"query": (width, width), "shared": (width, 2 * head), "out": (width, width)}
        sizes |= {"gate": (width, 2 * width), "up": (width, 2 * width), "down": (2 * width, width)}
        for i in range(self.depth):
            specs |= {f"blocks.{i}.{norm}": Spec((width,), "ones") for norm in ("norm1", "norm2")}
            for name, (fan_in, fan_out) in sizes.items():
                specs[f"blocks.{i}.{name}"] = Spec((fan_out, fan_in), "weight", fan_in)
        return specs | linear_specs("head", width, 1)

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, t) to (b, 1)."""
        h = F.embedding(x, params["embedding.weight"]) + params["positions"][: x.shape[1]]
        for i in range(self.depth):
            own = part(params, f"blocks.{i}")
            h = h + self._attention(own, _rms_norm(h, own["norm1"]))
            normed = _rms_norm(h, own["norm2"])
            h = h + F.linear(F.silu(F.linear(normed, own["gate"])) * F.linear(normed, own["up"]), own["down"])
        return linear(params, "head", h.mean(1))

    def _attention(self, own: Params, x: Tensor) -> Tensor:
        head = self.width // self.heads
        query = F.linear(x, own["query"]).reshape(*x.shape[:2], self.heads, head).transpose(1, 2)
        key, value = F.linear(x, own["shared"]).unsqueeze(1).chunk(2, -1)  # (b, 1, t, head)
        mixed = (query @ key.transpose(-1, -2) / math.sqrt(head)).softmax(-1) @ value
        return F.linear(mixed.transpose(1, 2).flatten(2), own["out"])


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPairs(WithoutDropout):
    """Pairs of tokens (b, 2) -> logits (b, outputs): their embeddings side by side, and an MLP with a skip.

    Parameters: `embedding.weight`, `up.*`, `middle.*`, `head.*`.
    """

    vocab: int
    outputs: int
    width: int = 32
    hidden: int = 96

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs = {"embedding.weight": Spec((self.vocab, self.width), "embedding")}
        specs |= linear_specs("up", 2 * self.width, self.hidden) | linear_specs("middle", self.hidden, self.hidden)
        return specs | linear_specs("head", self.hidden, self.outputs)

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, 2) to (b, outputs)."""
        h = linear(params, "up", F.embedding(x, params["embedding.weight"]).flatten(1)).relu()
        return linear(params, "head", h + linear(params, "middle", h).relu())


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedConvLM(WithoutDropout):
    """Tokens (b, t) -> logits (b, t, vocab): causal convolutions with gates and skips (Dauphin et al. 2017).

    Parameters: `embedding.weight`, `layers.<i>.{weight, bias}`, `head.*`.
    """

    vocab: int
    width: int = 32
    depth: int = 4
    reach: int = 4

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs = {"embedding.weight": Spec((self.vocab, self.width), "embedding")}
        fan_in = self.reach * self.width
        for i in range(self.depth):
            specs[f"layers.{i}.weight"] = Spec((2 * self.width, self.width, self.reach), "weight", fan_in)
            specs[f"layers.{i}.bias"] = Spec((2 * self.width,), "bias", fan_in)
        return specs | linear_specs("head", self.width, self.vocab)

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, t) to (b, t, vocab)."""
        h = F.embedding(x, params["embedding.weight"]).transpose(1, 2)
        for i in range(self.depth):
            padded = F.pad(h, (self.reach - 1, 0))
            value, gate = F.conv1d(padded, params[f"layers.{i}.weight"], params[f"layers.{i}.bias"]).chunk(2, 1)
            h = h + value * torch.sigmoid(gate)
        return linear(params, "head", h.transpose(1, 2))
