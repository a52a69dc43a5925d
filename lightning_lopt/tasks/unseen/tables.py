"""Networks for sets, graphs, points and tables."""

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
)
from lightning_lopt.tasks.networks import MLP
from lightning_lopt.tasks.unseen.parts import Masks, named, part


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSets(WithoutDropout):
    """Sets (b, n, d) -> (b, 1): an MLP on every element, mean and maximum over the set, and another MLP.

    Source: Zaheer et al. 2017 (arXiv 1703.06114). Parameters: `each.*` and `whole.*`.
    """

    inputs: int = 2
    width: int = 48

    def _parts(self) -> tuple[MLP, MLP]:
        each = MLP(inputs=self.inputs, hidden=(self.width,), outputs=self.width, activation="silu")
        return each, MLP(inputs=2 * self.width, hidden=(self.width,), outputs=1, activation="silu")

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        each, whole = self._parts()
        return {**named("each", each.specs()), **named("whole", whole.specs())}

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, n, d) to (b, 1)."""
        each, whole = self._parts()
        h = each.apply(part(params, "each"), x.flatten(0, 1)).reshape(*x.shape[:2], self.width)
        return whole.apply(part(params, "whole"), torch.cat([h.mean(1), h.amax(1)], -1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphNet(WithoutDropout):
    """Graphs as adjacency matrices (b, n, n) -> (b, 1): rounds of messages with skips, then a mean over the nodes.

    Nodes start with their degree. A round is h + W2 silu(W1 [h, A h / sqrt(n)]) (Gilmer et al. 2017, arXiv 1704.01212).

    Parameters: `enter.*`, `rounds.<i>.{mix, out}.*`, `head.*`.
    """

    width: int = 32
    rounds: int = 3

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs = linear_specs("enter", 1, self.width)
        for i in range(self.rounds):
            specs |= linear_specs(f"rounds.{i}.mix", 2 * self.width, self.width)
            specs |= linear_specs(f"rounds.{i}.out", self.width, self.width)
        return specs | linear_specs("head", self.width, 1)

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, n, n) to (b, 1)."""
        h = linear(params, "enter", x.mean(-1, keepdim=True))
        for i in range(self.rounds):
            both = torch.cat([h, x @ h / math.sqrt(x.shape[-1])], -1)
            h = h + linear(params, f"rounds.{i}.out", F.silu(linear(params, f"rounds.{i}.mix", both)))
        return linear(params, "head", h.mean(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierNet(WithoutDropout):
    """Coordinates (b, 2) -> (b, 1): learned sines and cosines of them, and a GELU MLP (Tancik et al. 2020).

    Parameters: `frequencies (features, 2)`, of standard deviation `scale`, and `mlp.*`.
    """

    features: int = 32
    scale: float = 6.0
    hidden: tuple[int, ...] = (48, 48)

    def _mlp(self) -> MLP:
        return MLP(inputs=2 * self.features, hidden=self.hidden, outputs=1, activation="gelu")

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        first = {"frequencies": Spec((self.features, 2), "embedding", gain=self.scale)}
        return first | named("mlp", self._mlp().specs())

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, 2) to (b, 1)."""
        angles = F.linear(x, params["frequencies"])
        return self._mlp().apply(part(params, "mlp"), torch.cat([angles.sin(), angles.cos()], -1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RadialBasis(WithoutDropout):
    """Points (b, d) -> logits (b, outputs): Gaussian bumps with learned centers and widths, and a linear map.

    Parameters: `centers (bumps, d)`, `log_widths (bumps,)`, `head.*`.
    """

    inputs: int = 2
    bumps: int = 64
    outputs: int = 3

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs = {"centers": Spec((self.bumps, self.inputs), "embedding"), "log_widths": Spec((self.bumps,), "zeros")}
        return specs | linear_specs("head", self.bumps, self.outputs)

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, d) to (b, outputs)."""
        squares = (x.unsqueeze(1) - params["centers"]).square().sum(-1)
        return linear(params, "head", torch.exp(-squares * torch.exp(-params["log_widths"])))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorizationMachine(WithoutDropout):
    """Categories (b, fields) -> (b, 1): a weight for each, and products of their vectors (Rendle 2010).

    Parameters: `bias (1,)`, `weights (categories, 1)`, `vectors (categories, dim)`, for the categories of all fields.
    """

    categories: int = 60
    dim: int = 8

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        tables = {"weights": Spec((self.categories, 1), "embedding", gain=0.1)}
        tables["vectors"] = Spec((self.categories, self.dim), "embedding", gain=0.3)
        return {"bias": Spec((1,), "zeros"), **tables}

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, fields) to (b, 1)."""
        single = F.embedding(x, params["weights"]).sum(1)
        vectors = F.embedding(x, params["vectors"])
        pairs = 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(-1, keepdim=True)
        return params["bias"] + single + pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts(WithoutDropout):
    """Features (b, d) -> (b, 1): experts with one hidden layer each, mixed by a learned gate (Jacobs et al. 1991).

    Parameters: `gate.*`, `up.*` of all experts, `down (experts, width)`, `bias (experts,)`.
    """

    inputs: int = 10
    experts: int = 6
    width: int = 32

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs = linear_specs("gate", self.inputs, self.experts)
        specs |= linear_specs("up", self.inputs, self.experts * self.width)
        specs["down"] = Spec((self.experts, self.width), "weight", self.width)
        return specs | {"bias": Spec((self.experts,), "zeros")}

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, d) to (b, 1)."""
        shares = linear(params, "gate", x).softmax(-1)
        hidden = linear(params, "up", x).tanh().reshape(-1, self.experts, self.width)
        values = (hidden * params["down"]).sum(-1) + params["bias"]
        mixed: Tensor = (shares * values).sum(-1, keepdim=True)
        return mixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maxout(WithoutDropout):
    """Features (b, d) -> logits (b, outputs): layers of maxima over pieces (Goodfellow et al. 2013, arXiv 1302.4389).

    Parameters: `layers.<i>.weight, .bias`, `head.*`.
    """

    inputs: int = 20
    width: int = 32
    depth: int = 2
    pieces: int = 3
    outputs: int = 8

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs: dict[str, Spec] = {}
        inputs = self.inputs
        for i in range(self.depth):
            specs |= linear_specs(f"layers.{i}", inputs, self.width * self.pieces)
            inputs = self.width
        return specs | linear_specs("head", inputs, self.outputs)

    def apply(self, params: Params, x: Tensor, masks: Masks = ()) -> Tensor:
        """Map (b, d) to (b, outputs)."""
        for i in range(self.depth):
            x = linear(params, f"layers.{i}", x).reshape(-1, self.width, self.pieces).amax(-1)
        return linear(params, "head", x)
