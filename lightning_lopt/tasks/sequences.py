"""Sequence networks: LSTM and transformer language models, and the vision transformer.

Sources: Vaswani et al. 2017 (arXiv 1706.03762) in pre-norm form, Dosovitskiy et al. 2021 (arXiv 2010.11929), and the
released code of Metz et al. 2022 (arXiv 2203.11860), whose language models the STAR paper evaluates on. Attention is
written out because backpropagation through the unroll needs second derivatives, which fused attention lacks.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lopt.tasks.base import Params, check_positive
from lightning_lopt.tasks.layers import Spec, WithoutDropout, layer_norm, linear, linear_specs, mask, norm_specs
from lightning_lopt.tasks.networks import check_dropout

# Standard deviation of a unit normal truncated at 2. Haiku's VarianceScaling corrects for it, its Linear does not.
_TRUNCATION = 0.87962566103423978


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTMLanguageModel(WithoutDropout):
    """A language model with one LSTM layer and a trained initial state: tokens (b, t) -> logits (b, t, vocab).

    The gates are in torch's order (input, forget, cell, output), from one matrix over [input, hidden]. As in Haiku, the
    forget gate has a bias of 1 added.

    Parameters: `embedding.weight (vocab, embed)`, `initial_h`, `initial_c (hidden,)`, `cell.weight (4 hidden, embed +
    hidden)`, `cell.bias`, `head.weight, .bias`.

    Example:
        >>> net = LSTMLanguageModel(vocab=65, embed=16, hidden=32)
        >>> sum(math.prod(spec.shape) for spec in net.specs().values())
        9521
    """

    vocab: int
    embed: int = 64
    hidden: int = 128

    def __post_init__(self) -> None:
        for name in ("vocab", "embed", "hidden"):
            check_positive(name, getattr(self, name))

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        return {
            "embedding.weight": Spec((self.vocab, self.embed), "embedding"),
            "initial_h": Spec((self.hidden,), "zeros"),
            "initial_c": Spec((self.hidden,), "zeros"),
            **linear_specs("cell", self.embed + self.hidden, 4 * self.hidden),
            **linear_specs("head", self.hidden, self.vocab),
        }

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Map (b, t) to (b, t, vocab)."""
        weight = params["cell.weight"]
        # The product with the inputs is computed for all positions at once; only the recurrent one is sequential.
        gates = F.linear(F.embedding(x, params["embedding.weight"]), weight[:, : self.embed], params["cell.bias"])
        recurrent = weight[:, self.embed :]
        h = params["initial_h"].expand(x.shape[0], -1)
        c = params["initial_c"].expand(x.shape[0], -1)
        outputs = []
        for gate in gates.unbind(1):
            i, f, g, o = (gate + F.linear(h, recurrent)).chunk(4, -1)
            c = torch.sigmoid(f + 1.0) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return linear(params, "head", torch.stack(outputs, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Pre-norm transformer blocks: x + attention(norm(x)), then x + mlp(norm(x)); (b, t, width) -> the same.

    Parameters of block i: `blocks.<i>.{norm1, query, key, value, out, norm2, up, down}.{weight, bias}`.
    """

    width: int
    depth: int
    heads: int
    head_size: int
    widening: int = 4
    causal: bool = True
    dropout: float = 0.0
    gain: float = 1.0
    """Multiplies the initial standard deviation of the blocks' weights."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "head_size", "widening"):
            check_positive(name, getattr(self, name))
        check_dropout(self.dropout)

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        inner = self.heads * self.head_size
        specs: dict[str, Spec] = {}
        for i in range(self.depth):
            name = f"blocks.{i}"
            specs |= norm_specs(f"{name}.norm1", self.width)
            for part in ("query", "key", "value"):
                specs |= linear_specs(f"{name}.{part}", self.width, inner, gain=self.gain)
            specs |= linear_specs(f"{name}.out", inner, self.width, gain=self.gain)
            specs |= norm_specs(f"{name}.norm2", self.width)
            specs |= linear_specs(f"{name}.up", self.width, self.widening * self.width, gain=self.gain)
            specs |= linear_specs(f"{name}.down", self.widening * self.width, self.width, gain=self.gain)
        return specs

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Map (b, t, width) to the same shape, with two masks per block, on the outputs of attention and MLP."""
        for i in range(self.depth):
            name = f"blocks.{i}"
            x = x + mask(self._attention(params, name, layer_norm(params, f"{name}.norm1", x)), masks, 2 * i)
            hidden = linear(params, f"{name}.up", layer_norm(params, f"{name}.norm2", x))
            x = x + mask(linear(params, f"{name}.down", F.gelu(hidden, approximate="tanh")), masks, 2 * i + 1)
        return x

    def _attention(self, params: Params, name: str, x: Tensor) -> Tensor:
        split = (*x.shape[:2], self.heads, self.head_size)
        query, key, value = (
            linear(params, f"{name}.{part}", x).reshape(split).transpose(1, 2) for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_size)  # (b, heads, t, t)
        if self.causal:
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        return linear(params, f"{name}.out", (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerLanguageModel:
    """A decoder-only transformer: tokens (b, t) -> logits (b, t, vocab).

    The reference has no position embedding, so that only causal attention distinguishes positions, and heads of size 32
    whatever the width: `positions=False, head_size=32`.

    Parameters: `embedding.weight`, `positions (context, width)`, those of `Blocks`, `norm`, `head`.
    """

    vocab: int
    context: int
    width: int = 64
    depth: int = 2
    heads: int = 4
    head_size: int | None = None
    """None for width / heads."""
    positions: bool = True
    dropout: float = 0.0
    blocks: Blocks = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("vocab", self.vocab)
        check_positive("context", self.context)
        blocks = Blocks(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            head_size=_head_size(self.width, self.heads, self.head_size),
            dropout=self.dropout,
            gain=math.sqrt(2.0 / self.depth) / _TRUNCATION,
        )
        object.__setattr__(self, "blocks", blocks)

    def mask_shapes(self, batch_size: int) -> tuple[tuple[int, ...], ...]:
        """Return two shapes (b, context, width) per block."""
        return 2 * self.depth * ((batch_size, self.context, self.width),) if self.dropout else ()

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        specs = {"embedding.weight": Spec((self.vocab, self.width), "embedding")}
        if self.positions:
            specs["positions"] = Spec((self.context, self.width), "embedding")
        return (
            specs | self.blocks.specs() | norm_specs("norm", self.width) | linear_specs("head", self.width, self.vocab)
        )

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Map (b, t) to (b, t, vocab), for t up to `context`."""
        h = F.embedding(x, params["embedding.weight"])
        if self.positions:
            h = h + params["positions"][: x.shape[1]]
        h = self.blocks.apply(params, h, masks)
        return linear(params, "head", layer_norm(params, "norm", h))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionTransformer(WithoutDropout):
    """A vision transformer with a class token and learned positions: images (b, c, h, w) -> logits (b, outputs).

    The head starts at zero, as in the authors' code. Weights follow the task's scheme; that code uses Xavier's.

    Parameters: `patch.weight, .bias`, `token (1, width)`, `positions (patches + 1, width)`, those of `Blocks`, `norm`,
    `head`.
    """

    in_shape: tuple[int, int, int]
    outputs: int = 10
    patch: int = 4
    width: int = 64
    depth: int = 4
    heads: int = 4
    blocks: Blocks = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        for size in (*self.in_shape, self.outputs, self.patch):
            check_positive("size", size)
        if self.in_shape[1] % self.patch or self.in_shape[2] % self.patch:
            raise ValueError(f"patch={self.patch} is not allowed: it must divide the image's {self.in_shape[1:]}.")
        size = _head_size(self.width, self.heads, None)
        blocks = Blocks(width=self.width, depth=self.depth, heads=self.heads, head_size=size, causal=False)
        object.__setattr__(self, "blocks", blocks)

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        channels, height, width = self.in_shape
        patches = (height // self.patch) * (width // self.patch)
        return {
            **linear_specs("patch", channels * self.patch**2, self.width),
            "token": Spec((1, self.width), "zeros"),
            "positions": Spec((patches + 1, self.width), "embedding", gain=0.02),
            **self.blocks.specs(),
            **norm_specs("norm", self.width),
            **linear_specs("head", self.width, self.outputs, zero=True),
        }

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Map (b, c, h, w) to (b, outputs)."""
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # (b, patches, c * patch^2)
        token = params["token"].expand(x.shape[0], -1, -1)
        h = torch.cat([token, linear(params, "patch", patches)], 1) + params["positions"]
        h = layer_norm(params, "norm", self.blocks.apply(params, h))
        return linear(params, "head", h[:, 0])


def _head_size(width: int, heads: int, head_size: int | None) -> int:
    check_positive("width", width)
    check_positive("heads", heads)
    if head_size is None and width % heads:
        raise ValueError(f"heads={heads} is not allowed: it must divide width={width} unless head_size is given.")
    return head_size or width // heads
