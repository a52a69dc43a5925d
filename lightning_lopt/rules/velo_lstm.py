"""VeLO's network of whole tensors: what the run's loss and each tensor tell it, and the LSTM that reads them.

Source: Metz et al. 2022 (VeLO, arXiv 2211.09760), in every detail as in the authors' code. Slips of theirs, which
the published weights were trained with, are kept, and said where they stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.rules.constants import constant
from lightning_lopt.rules.shards import whole

NUM_AVERAGES = 10  # of the loss
STAGES = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)  # of a run, as fractions of its steps
MAX_RANK = 5  # length of the one-hot code of a tensor's rank
NUM_INPUTS = len(STAGES) + (NUM_AVERAGES - 1) + 1 + MAX_RANK + 3 + 3
NO_LOW = 999999999999.0  # above every loss


class LossBuffer(NamedTuple):
    """Averages of a run's losses at ten half-lives, and the lowest value of each."""

    seen: Tensor  # () int64 losses so far
    means: Tensor  # (10,) averages, not bias-corrected
    lows: Tensor  # (10,) lowest bias-corrected averages


def new_loss_buffer(like: Tensor) -> LossBuffer:
    """The buffer before the first loss, in the dtype and on the device of `like`."""
    seen = like.new_zeros((), dtype=torch.int64)
    return LossBuffer(seen, like.new_zeros(NUM_AVERAGES), like.new_full((NUM_AVERAGES,), NO_LOW))


def loss_decays(num_steps: Tensor) -> Tensor:
    """Decay rates exp(-1 / h) for half-lives h from 10 to the run's length, evenly in the logarithm: () -> (10,).

    After h steps an average keeps 1 / e, not a half; the name is the authors'.
    """
    place = torch.arange(NUM_AVERAGES, dtype=num_steps.dtype, device=num_steps.device) / (NUM_AVERAGES - 1)
    return torch.exp(-(10 ** -(1 + place * (torch.log10(num_steps) - 1))))


def add_loss(buffer: LossBuffer, loss: Tensor, decays: Tensor) -> LossBuffer:
    """The buffer with a step's loss.

    A loss beyond twice the largest average counts as that bound. One that is not finite is left out; the authors' code
    would never recover from it.

    Args:
        buffer: before this loss.
        loss: () the loss.
        decays: (10,) as `loss_decays` gives them.
    """
    correction = 1 - decays ** (buffer.seen + 1)  # of one loss more than the old averages have, as the authors do
    top = torch.where(buffer.seen == 0, loss, (buffer.means / correction).amax())
    means = decays * buffer.means + (1 - decays) * torch.minimum(2 * top.abs(), loss)
    added = LossBuffer(buffer.seen + 1, means, torch.minimum(buffer.lows, means / correction))
    finite = loss.isfinite()
    return LossBuffer(*(torch.where(finite, new, old) for new, old in zip(added, buffer, strict=True)))


def loss_features(buffer: LossBuffer, decays: Tensor) -> Tensor:
    """Where each average stands between its lowest value and the next slower average: (9,) in [-1, 1].

    All 0 up to the second loss.

    Args:
        buffer: with this step's loss.
        decays: (10,) as `loss_decays` gives them.
    """
    seen = buffer.seen.clamp(min=1)  # an empty buffer must not divide by 0
    averages = buffer.means / (1 - decays**seen)
    above = averages[:-1] - buffer.lows[:-1]
    room = (averages[1:] - buffer.lows[:-1]).clamp(min=1e-8)
    return torch.where(buffer.seen <= 2, 0.0, (above / room - 1).clamp(-1, 1))


def stage_features(fraction: Tensor) -> Tensor:
    """The stage of the run: () fraction of the steps that lie behind -> (9,) in [-1, 1]."""
    return torch.tanh(10 * (fraction - constant(STAGES, fraction.dtype, fraction.device)))


def tensor_features(tensors: Sequence[tuple[Tensor, Tensor, Tensor]], like: Tensor) -> Tensor:
    """What tensors tell of themselves, whatever their scale: (T, 12).

    In this order: the second moment's mean; the rank, one-hot, which counts only dims larger than 1 and is all zeros
    from 5 on; the variances of the momenta; the mean squares of second moment minus *mean momentum*, a slip that all
    published weights were trained with. All are of the parameter, momenta and second moment divided by the parameter's
    root mean square; the second moment too, by the authors' choice.

    Args:
        tensors: of each, the parameter (*shape), and momenta (3, *shape) and second moment (*shape) before this step's
            gradient. They may be DTensors; all sums of all tensors then travel in two messages.
        like: a tensor of the result's dtype and device.
    """
    first = _means([(param.square(), *exp_avg.unbind(), exp_avg_sq) for param, exp_avg, exp_avg_sq in tensors], like)
    scale, momenta, second = first[:, :1].clamp(min=1e-9).rsqrt(), first[:, 1:4], first[:, 4:]
    deviations = []
    for (param, exp_avg, exp_avg_sq), momentum, mean in zip(tensors, momenta, second.squeeze(1), strict=True):
        from_mean = exp_avg - momentum.to(param).reshape(-1, *[1] * param.dim())
        deviations.append((*from_mean.square().unbind(), (exp_avg_sq - mean.to(param)).square()))
    variances = _means(deviations, like)
    # The mean of (v - a)^2 is the variance of v plus (mean v - a)^2.
    slips = variances[:, 3:] + (second - momenta).square()
    squares = torch.cat([variances[:, :3], slips], dim=1) * scale.square()
    ranks = (sum(size > 1 for size in param.shape) for param, _, _ in tensors)
    one_hot = tuple(tuple(float(rank == place) for place in range(MAX_RANK)) for rank in ranks)
    codes = constant(one_hot, like.dtype, like.device)
    return torch.cat([_logarithm(scale * second), codes, _logarithm(squares)], dim=1)


def _means(rows: Sequence[Sequence[Tensor]], like: Tensor) -> Tensor:
    """The mean of each tensor, (T, n) for T rows of n; of the whole tensors if they are sharded."""
    return whole(torch.stack([(x.sum() / x.numel()).to(like) for row in rows for x in row])).reshape(len(rows), -1)


def _logarithm(x: Tensor) -> Tensor:
    return torch.log(1e-8 + (10 * x).abs()).clamp(-5, 5) / 2


class LSTMOutput(NamedTuple):
    """What the LSTM gives for T tensors."""

    hidden: Tensor  # (T, h)
    cell: Tensor  # (T, h)


def lstm(meta_params: Mapping[str, Tensor], inputs: Tensor, hidden: Tensor, cell: Tensor, others: Tensor) -> LSTMOutput:
    """One step of the LSTM for all tensors. They see each other by one maximum, unit by unit.

    Args:
        meta_params: `mix_w (30, h), mix_b, input_w (30, h), input_b, gates_w (2 h, 4 h), gates_b`.
        inputs: (T, 30) of the tensors that move.
        hidden: (T, h) before this step.
        cell: (T, h) before this step.
        others: (U, 30) inputs of further tensors, which take part in the maximum only.
    """
    everyone = torch.cat([inputs, others])
    mixed = torch.relu(everyone @ meta_params["mix_w"] + meta_params["mix_b"]).amax(0)
    units = inputs @ meta_params["input_w"] + meta_params["input_b"] + mixed
    gates = torch.cat([units, hidden], dim=1) @ meta_params["gates_w"] + meta_params["gates_b"]
    take, candidate, keep, show = gates.chunk(4, dim=1)
    cell = torch.sigmoid(keep + 1) * cell + torch.sigmoid(take) * torch.tanh(candidate)
    return LSTMOutput(torch.sigmoid(show) * torch.tanh(cell), cell)


def lstm_shapes(hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the LSTM's meta-parameters; inputs come first in each matrix."""
    return {
        "initial_hidden": (hidden_size,),
        "initial_cell": (hidden_size,),
        "mix_w": (NUM_INPUTS, hidden_size),
        "mix_b": (hidden_size,),
        "input_w": (NUM_INPUTS, hidden_size),
        "input_b": (hidden_size,),
        "gates_w": (2 * hidden_size, 4 * hidden_size),
        "gates_b": (4 * hidden_size,),
    }
