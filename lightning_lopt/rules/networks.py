"""Small networks that act on every coordinate alone, on channels `(c, n)`: multilayer perceptron and GRU cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lightning_lopt.rules import features as feats

CHUNK = 1 << 13  # coordinates at a time: so 50 hidden units stay in the cache, and of an embedding are no gigabytes


def coordinatewise(network: Callable[..., Tensor], *channels: Tensor) -> Tensor:
    """Apply a network to every coordinate: tensors (c, *shape) -> (d, *shape).

    Args:
        network: of as many matrices (c, n) as there are tensors -> (d, n), each column alone. It is given at most
            `CHUNK` columns at a time.
        channels: plain or sharded tensors, equal but for their first dim.

    Example:
        >>> import torch
        >>> coordinatewise(lambda x, y: x.sum(0, keepdim=True) * y, torch.ones(3, 2, 2), torch.ones(1, 2, 2)).shape
        torch.Size([1, 2, 2])
    """
    return feats.on_shards(partial(_in_chunks, network), *channels)


def column(values: Tensor, ndim: int) -> Tensor:
    """One number per channel, to be broadcast over tensors of `ndim` dims: (c,) -> (c, 1, ..., 1)."""
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
        channels = _affine(meta_params[f"w{layer}"], meta_params[f"b{layer}"], torch.relu(channels))
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


def _in_chunks(network: Callable[..., Tensor], *channels: Tensor) -> Tensor:
    size = channels[0][0].numel()
    matrices = [each.reshape(each.shape[0], size) for each in channels]
    chunks = zip(*(torch.split(matrix, CHUNK, dim=1) for matrix in matrices), strict=True)
    outputs = torch.cat([network(*chunk) for chunk in chunks], dim=1)
    return outputs.reshape(outputs.shape[0], *channels[0].shape[1:])
