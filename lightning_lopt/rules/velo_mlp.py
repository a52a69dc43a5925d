"""VeLO's network of coordinates: its features, and how a tensor's own network is mixed from the bank.

Source: Metz et al. 2022 (VeLO, arXiv 2211.09760), in every detail as in the authors' released code. Channels come
first, `(channels, *shape)`, as in `features`, which has all but two of the thirty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_lopt.rules import features as feats
from lightning_lopt.rules.constants import constant
from lightning_lopt.rules.shards import TensorShard, local, means, whole_shape

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
RMS_DECAYS = (0.999,)
ADAFACTOR_DECAYS = (0.9, 0.99, 0.999)
NUM_FEATURES, HIDDEN, OUTPUTS = 30, 4, 3
SHAPES = {  # of one network of the bank
    "w0": (NUM_FEATURES, HIDDEN),
    "b0": (HIDDEN,),
    "w1": (HIDDEN, HIDDEN),
    "b1": (HIDDEN,),
    "w2": (HIDDEN, OUTPUTS),
    "b2": (OUTPUTS,),
}

# Places of the features in the first layer's rows, which are in the authors' order.
DENSE = (0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 27, 28, 29, 1, 14)
ROW = (15, 16, 17, 21, 22, 23)
COL = (18, 19, 20, 24, 25, 26)


def decays(like: Tensor) -> feats.Decays:
    """The accumulators' decay rates, which are not learned."""
    every = (MOMENTUM_DECAYS, RMS_DECAYS, ADAFACTOR_DECAYS)
    return feats.Decays(*(constant(values, like.dtype, like.device) for values in every))


def input_features(
    state: feats.Accumulators, grad: Tensor, param: Tensor, shard: TensorShard | None = None, layout: str = "torch"
) -> feats.Features:
    """The channels of `features.input_features`, and two more dense ones: the gradient at most .1, and over its rms.

    Below two dims the momenta over the square root of the factored second moments have no epsilon in it; the 1e-30 that
    is added to each squared gradient keeps them finite.
    """
    dense, row, col = feats.input_features(state, grad, param, shard, layout=layout)
    if feats.factored_dims(whole_shape(shard, grad)) is None:
        dense = torch.cat([dense[:13], state.exp_avg * torch.rsqrt(state.diag)])
    more = torch.stack([grad.clamp(-0.1, 0.1), grad * feats.inverse_root(state.exp_avg_sq)])
    return feats.Features(torch.cat([dense, more]), row, col)


def mean_squares_of(features: feats.Features, shard: TensorShard | None) -> list[Tensor]:
    """The mean square of each channel over the whole tensor, (18,), (6,) and (6,)."""
    factored = feats.factored_dims(whole_shape(shard, features.dense[0])) is not None
    split = 1 if factored else 3  # rows and columns are whole in every shard
    answers = means(shard, *map(feats.mean_square_of, features[:split]))
    return answers + (means(None, *map(feats.mean_square_of, features[split:])) if factored else [])


def mixed_network(meta_params: Mapping[str, Tensor], controls: Tensor, ff_mult: float) -> dict[str, Tensor]:
    """A tensor's own network, by the names of `SHAPES`.

    Args:
        meta_params: the bank, with a leading axis n.
        controls: (n,) weights of the bank's networks.
        ff_mult: multiplier of their mean.
    """
    bank = torch.cat([meta_params[name].flatten(1) for name in SHAPES], dim=1)
    mixed = (controls @ bank) * (ff_mult / len(controls))
    sizes = [meta_params[name][0].numel() for name in SHAPES]
    return {
        name: values.reshape(shape)
        for (name, shape), values in zip(SHAPES.items(), torch.split(mixed, sizes), strict=True)
    }


def outputs(
    network: Mapping[str, Tensor],
    features: feats.Features,
    mean_squares: Sequence[Tensor],
    shard: TensorShard | None = None,
) -> Tensor:
    """The network's outputs (3, *shape): direction, magnitude, and one that nothing reads.

    Args:
        network: as `mixed_network` gives it.
        features: as `input_features` gives them.
        mean_squares: of their channels, as `mean_squares_of` gives them.
        shard: the shard of the tensor that the features cover; None for all of it.
    """
    ndim = features.dense.dim() - 1
    hidden = _bias(network["b0"], ndim)
    for rows, channels, mean in zip((DENSE, ROW, COL), features, mean_squares, strict=True):
        weight = network["w0"][list(rows)] * feats.inverse_root_of_mean(mean).unsqueeze(1)
        hidden = hidden + local(shard, feats.contract(weight, channels))
    hidden = feats.contract(network["w1"], torch.relu(hidden)) + _bias(network["b1"], ndim)
    return feats.contract(network["w2"], torch.relu(hidden)) + _bias(network["b2"], ndim)


def _bias(bias: Tensor, ndim: int) -> Tensor:
    return bias.reshape(-1, *[1] * ndim)
