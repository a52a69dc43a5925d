"""A learned scheduler: one factor for all steps over the run, and one for each tensor from its own statistics.

It is not in the STAR paper. A rule that does not know how long a run is cannot anneal at the right time. The hardest
baseline, AdamW with a cosine schedule, does know; so does Lightning, for nearly every run. And no single step size fits
both a LayerNorm's gain and a matrix. VeLO (Metz et al. 2022, arXiv 2211.09760) and Celo put a learned scheduler beside
a per-parameter rule, too. Theirs are LSTMs; this one is a curve of a few points and a power law, which can be drawn and
read:

    log factor(tensor, t) = curve(t / run) + early(log t) + sum_i a_i(t / run) x_i,        x = `tensor_features`

The exponents a_i go linearly from a start to an end over the run, one set for matrices and one for vectors and scalars.
Steps relative to a tensor's scale are Adafactor's (Shazeer and Stern 2018, arXiv 1804.04235, section 8). The momenta of
the nominal term are mixed by learned weights, again from start to end, instead of averaged. With all meta-parameters at
0 the factor is 1 and the weights are equal: STAR's nominal term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.rules.constants import constant

FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
LOG_STEPS = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)
NUM_TENSOR_FEATURES = 8
SHAPES = {
    "schedule_fraction": (len(FRACTIONS),),  # log factor at these fractions of a run of 1,000 steps
    "schedule_length": (len(FRACTIONS),),  # added to it by a run ten times as long
    "schedule_early": (len(LOG_STEPS),),  # added to it at step 10^x, as a bias correction is
    "schedule_step": (len(LOG_STEPS),),  # replaces all three at step 10^x of runs of unknown length
    "tensor_powers": (2, 2, NUM_TENSOR_FEATURES),  # (vectors, matrices) x (start, end) x feature
    "momentum_mix": (2, 3),  # (start, end) x momentum: logits of the weights
}
LOG_LENGTHS = (-1.0, 0.5)  # bounds of log10(length / 1000): no extrapolation to runs of a million steps
LARGEST_POWER = 4.0  # a tensor's log factor stays within +-4


class Multipliers(NamedTuple):
    """Factors of the step of each of T tensors."""

    factor: Tensor  # (T,) multiplies every term of the step
    momenta: Tensor  # (T, 3) weights of the nominal term's momenta; they sum to 1


def multipliers(
    meta_params: Mapping[str, Tensor],
    mean_squares: Tensor,
    shapes: Tensor,
    step: Tensor,
    num_steps: Tensor | int | None,
    extra: Tensor | None = None,
) -> Multipliers:
    """The learned scheduler, for T tensors at once.

    Args:
        meta_params: with the names and shapes of `SHAPES`.
        mean_squares: (T, 4) mean squares of the parameter and of the three momenta / sqrt(second moment).
        shapes: (T, 4) as `shape_features` gives them.
        step: () or (T,) updates made so far.
        num_steps: the run's length; None where it is unknown.
        extra: (T,) added to each tensor's log factor.

    Example:
        >>> zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        >>> shapes = torch.tensor([shape_features((8, 4)), shape_features((8,))])
        >>> multipliers(zeros, torch.ones(2, 4), shapes, torch.tensor(0.0), 100).factor
        tensor([1., 1.])
    """
    fraction = progress(step.to(mean_squares.dtype), num_steps).reshape(-1, 1)
    powers = meta_params["tensor_powers"]
    vector = shapes[:, :1]
    start, end = (powers[1, i] + vector * (powers[0, i] - powers[1, i]) for i in (0, 1))
    exponents = torch.lerp(start, end, fraction)
    own = (exponents * tensor_features(mean_squares, shapes)).sum(1)
    if extra is not None:
        own = own + extra
    own = own.clamp(-LARGEST_POWER, LARGEST_POWER)
    factor = torch.exp(log_factor(meta_params, step, num_steps) + own)
    mix = meta_params["momentum_mix"]
    return Multipliers(factor, torch.softmax(torch.lerp(mix[:1], mix[1:], fraction), 1))


def of_tensor(
    meta_params: Mapping[str, Tensor],
    mean_squares: Sequence[Tensor],
    shape: tuple[int, ...],
    step: Tensor,
    num_steps: Tensor | int | None,
    num_tensors: int | None,
) -> Multipliers:
    """`multipliers` for one tensor: the factor () and the weights (3,).

    Args:
        meta_params: with the names and shapes of `SHAPES`.
        mean_squares: () x 4, the means of what `scales` returns.
        shape: of the whole tensor.
        step: () updates made so far.
        num_steps: the run's length, or None where it is unknown.
        num_tensors: how many tensors the optimizer trains, or None where it is unknown.

    Example:
        >>> zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        >>> of_tensor(zeros, [torch.tensor(1.0)] * 4, (8, 4), torch.tensor(0.0), 100, 2).factor
        tensor(1.)
    """
    means = torch.stack(list(mean_squares))[None]
    shapes = constant((shape_features(shape, num_tensors),), means.dtype, means.device)
    factor, momenta = multipliers(meta_params, means, shapes, step, num_steps)
    return Multipliers(factor.squeeze(0), momenta.squeeze(0))


def scales(param: Tensor, exp_avg: Tensor, inv_root: Tensor) -> list[Tensor]:
    """The squares (*shape) x 4 whose means the scheduler reads: of the value, and of each momentum's strength.

    Args:
        param: (*shape).
        exp_avg: (3, *shape) momenta.
        inv_root: (*shape) as `features.inverse_root` gives it.

    Example:
        >>> scales(torch.tensor([2.0]), torch.ones(3, 1), torch.tensor([3.0]))
        [tensor([4.]), tensor([9.]), tensor([9.]), tensor([9.])]
    """
    return [x.square() for x in (param, *(exp_avg * inv_root))]


def ramp(meta_params: Mapping[str, Tensor], name: str, step: Tensor, num_steps: Tensor | int | None) -> Tensor:
    """A fraction between 0 and 1 that goes linearly from a start to an end over the run.

    Args:
        meta_params: with `name`, (2,).
        name: `centering` or `caution`.
        step: () or (T,) updates made so far; the result has its shape.
        num_steps: the run's length, or None where it is unknown.

    Example:
        >>> ramp({"caution": torch.tensor([1.0, 0.5])}, "caution", torch.tensor(50.0), 101)
        tensor(0.7500)
    """
    start, end = meta_params[name]
    return torch.lerp(start, end, progress(step.to(start.dtype), num_steps)).clamp(0, 1)


def tensor_features(mean_squares: Tensor, shapes: Tensor) -> Tensor:
    """(T, 8), each of order one: a constant; logs of scale, size, fan-in and depth; and the momenta's strengths.

    The strength of a momentum is its root mean square relative to the gradient's: near 1 where gradients agree from
    step to step, small where they are noise.
    """
    # Half the logs of root mean squares, clamped first so that gradients through a zero are finite.
    scale = torch.log(mean_squares[:, :1].clamp(min=1e-4) / 1e-2) / 4
    strength = torch.log(mean_squares[:, 1:].clamp(min=1e-6)) / 4 + 1
    return torch.cat([torch.ones_like(scale), scale, shapes[:, 1:], strength], 1)


def shape_features(shape: tuple[int, ...], num_tensors: int | None = None) -> tuple[float, float, float, float]:
    """Static features of a tensor, roughly centered: is_vector, log size, log fan-in, log depth.

    Args:
        shape: of the tensor. The fan-in is all dims but the first, as in `nn.Linear` and convolutions. It is not the
            fan-in of an embedding, of a transposed convolution or of a depthwise one.
        num_tensors: how many tensors the net trains, which stands for its depth; clamped to 2 and 48.

    Returns:
        1 for vectors and scalars, else 0; log10(size) - 3; log10(fan-in) - 1.5, 0 for vectors; log(num_tensors / 8), 0
        where it is unknown.

    Example:
        >>> shape_features((1000,), 8)
        (1.0, 0.0, 0.0, 0.0)
    """
    size = math.log10(max(math.prod(shape), 1)) - 3
    depth = 0.0 if num_tensors is None else math.log(min(max(num_tensors, 2), 48) / 8)
    vector = len(shape) < 2
    return float(vector), size, 0.0 if vector else math.log10(max(math.prod(shape[1:]), 1)) - 1.5, depth


def progress(step: Tensor, num_steps: Tensor | int | None) -> Tensor:
    """The fraction of the run that is done: 0.5 for a run of unknown length, 1 for one that goes on past its length."""
    if num_steps is None:
        return torch.full_like(step, 0.5)
    length = length_as_tensor(num_steps, step)
    return (step / (length - 1).clamp(min=1)).clamp(max=1)


def log_factor(meta_params: Mapping[str, Tensor], step: Tensor, num_steps: Tensor | int | None) -> Tensor:
    """The log factor of all tensors, piecewise linear in the fraction of the run and in log10(step).

    Args:
        meta_params: with the names and shapes of `SHAPES`.
        step: () or (T,) updates made so far.
        num_steps: the run's length, or None where it is unknown.
    """
    step = step.to(meta_params["schedule_step"].dtype)
    if num_steps is None:
        return interpolate(torch.log10(step + 1), LOG_STEPS, meta_params["schedule_step"])
    length = length_as_tensor(num_steps, step)
    log_length = (torch.log10(length) - 3).clamp(*LOG_LENGTHS)
    curve = meta_params["schedule_fraction"] + meta_params["schedule_length"] * log_length
    early = interpolate(torch.log10(step + 1), LOG_STEPS, meta_params["schedule_early"])
    return interpolate(progress(step, num_steps), FRACTIONS, curve) + early


def interpolate(x: Tensor, knots: tuple[float, ...], values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), constant beyond the ends; x of any shape -> the same.

    Example:
        >>> interpolate(torch.tensor([0.5, 3.0]), (0.0, 1.0), torch.tensor([1.0, 3.0]))
        tensor([2., 3.])
    """
    at = constant(knots, values.dtype, values.device)
    x = x.clamp(knots[0], knots[-1]).unsqueeze(-1)
    # Each knot's hat falls from 1 at the knot to 0 at its neighbors: no indexing by data, so it runs under vmap.
    slopes = (x - at[:-1]) / (at[1:] - at[:-1])
    edge = torch.ones_like(slopes[..., :1])
    hats = torch.minimum(torch.cat([edge, slopes], -1), torch.cat([1 - slopes, edge], -1)).clamp(0, 1)
    return (hats * values).sum(-1)


def length_as_tensor(num_steps: Tensor | int, like: Tensor) -> Tensor:
    """A run's length () in the dtype and on the device of another tensor."""
    if isinstance(num_steps, Tensor):
        return num_steps.to(like.device, like.dtype)
    return constant(num_steps, like.dtype, like.device)
