"""Small coordinatewise networks on channels `(c, n)`: multilayer perceptron and GRU cell."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lopt.rules import features as feats

CHUNK = 1 << 12  # coordinates at a time: hidden units stay in the cache, and a large embedding needs little memory


def coordinatewise(network: Callable[..., feats.Outputs], *channels: Tensor) -> feats.Outputs:
    """Apply a network to each coordinate: tensors (c, *shape) -> (d, *shape), or a tuple of such.

    Args:
        network: takes as many matrices (c, n) as there are tensors, returns (d, n) or a tuple of such, and treats each
            column on its own. It gets at most `CHUNK` columns at a time.
        channels: plain or sharded tensors, whose shapes differ in the first dim only.

    Example:
        >>> import torch
        >>> coordinatewise(lambda x, y: x.sum(0, keepdim=True) * y, torch.ones(3, 2, 2), torch.ones(1, 2, 2)).shape
        torch.Size([1, 2, 2])
    """
    return feats.on_shards(partial(_in_chunks, network), *channels)


def column(values: Tensor, ndim: int) -> Tensor:
    """Reshape one number per channel for broadcasting over `ndim` dims: (c,) -> (c, 1, ..., 1)."""
    return values.reshape(-1, *[1] * ndim)


def init_mlp(sizes: list[int], std: float) -> dict[str, nn.Parameter]:
    """Meta-parameters `w0 (in, h), b0 (h,), w1, b1, ...`: weights normal with mean 0, biases 0."""
    layers = {}
    for layer, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        layers[f"w{layer}"] = nn.Parameter(std * torch.randn(fan_in, fan_out))
        layers[f"b{layer}"] = nn.Parameter(torch.zeros(fan_out))
    return layers


def mlp(meta_params: Mapping[str, Tensor], channels: Tensor) -> Tensor:
    """The layers `w0, b0, w1, b1, ...` with ReLU between them: (c, n) -> (outputs, n)."""
    channels, layer = _affine(meta_params["w0"], meta_params["b0"], channels), 1
    while f"w{layer}" in meta_params:
        channels = _affine(meta_params[f"w{layer}"], meta_params[f"b{layer}"], channels.relu_())
        layer += 1
    return channels


def init_gru(num_inputs: int, hidden_size: int) -> dict[str, nn.Parameter]:
    """Meta-parameters of `gru`, uniform in +- 1 / sqrt(hidden_size) as in torch's GRUCell."""
    shapes = {
        "w_input": (num_inputs, 3 * hidden_size),
        "b_input": (3 * hidden_size,),
        "w_hidden": (hidden_size, 3 * hidden_size),
        "b_hidden": (3 * hidden_size,),
    }
    bound = hidden_size**-0.5
    return {name: nn.Parameter(torch.empty(shape).uniform_(-bound, bound)) for name, shape in shapes.items()}


def gru(meta_params: Mapping[str, Tensor], channels: Tensor, hidden: Tensor) -> Tensor:
    """A gated recurrent unit (Cho et al. 2014, arXiv 1406.1078) in torch's form: h' = (1 - z) n + z h.

    Args:
        meta_params: `w_input (c, 3 h), b_input, w_hidden (h, 3 h), b_hidden`, columns in the order r, z, n.
        channels: (c, n).
        hidden: (h, n) state.

    Returns:
        (h, n) the new state.
    """
    from_input = _affine(meta_params["w_input"], meta_params["b_input"], channels).chunk(3)
    from_hidden = _affine(meta_params["w_hidden"], meta_params["b_hidden"], hidden).chunk(3)
    reset, keep = (torch.sigmoid(a + b) for a, b in zip(from_input[:2], from_hidden[:2], strict=True))
    candidate = torch.tanh(from_input[2] + reset * from_hidden[2])
    return torch.lerp(candidate, hidden, keep)


def _affine(weight: Tensor, bias: Tensor, channels: Tensor) -> Tensor:
    return torch.addmm(bias.unsqueeze(1), weight.mT, channels)


def _in_chunks(network: Callable[..., feats.Outputs], *channels: Tensor) -> feats.Outputs:
    size, shape = channels[0][0].numel(), channels[0].shape[1:]
    matrices = [each.reshape(each.shape[0], size) for each in channels]
    if size <= CHUNK:
        outputs = network(*matrices)
        if isinstance(outputs, Tensor):
            return outputs.reshape(outputs.shape[0], *shape)
        return tuple(output.reshape(output.shape[0], *shape) for output in outputs)
    chunks = zip(*(torch.split(matrix, CHUNK, dim=1) for matrix in matrices), strict=True)
    pieces = (network(*chunk) for chunk in chunks)
    first = next(pieces)
    if isinstance(first, Tensor):
        (joined,) = _joined((first,), ((piece,) for piece in pieces), size)
        return joined.reshape(joined.shape[0], *shape)
    return tuple(each.reshape(each.shape[0], *shape) for each in _joined(first, pieces, size))


def _joined(first: tuple[Tensor, ...], others: Iterator[Any], size: int) -> tuple[Tensor, ...]:
    """Matrices (d, n_1), (d, n_2), ... side by side, (d, size), for each place of the tuples."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(torch.cat(parts, dim=1) for parts in zip(first, *others, strict=True))
    # Each chunk is copied to its place at once, while it is in the cache.
    joined, start = tuple(part.new_empty(part.shape[0], size) for part in first), 0
    for parts in itertools.chain([first], others):
        end = start + parts[0].shape[1]
        for whole, part in zip(joined, parts, strict=True):
            whole[:, start:end].copy_(part)
        start = end
    return joined
