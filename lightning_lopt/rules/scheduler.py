"""A learned scheduler: a factor of all steps over the run, and one of each tensor's from the tensor's own numbers.

Not in the STAR paper. Why: a rule that does not know how long a run is cannot anneal at the right time, and AdamW with
a cosine schedule, which does know, is the hardest baseline; Lightning knows the length of nearly every run. And one
step size does not fit a LayerNorm's gain and a matrix alike. Learned schedulers beside a per-parameter rule are VeLO's
(Metz et al. 2022, arXiv 2211.09760) and Celo's; theirs are LSTMs, this is a curve of a few points and a power law that
can be drawn and read:

    log factor(tensor, t) = curve(t / run) + early(log t) + sum_i a_i(t / run) x_i,        x = `tensor_features`

with the exponents a_i going linearly from their start to their end over the run, of one kind for matrices and another
for vectors and scalars. Steps relative to a tensor's scale are Adafactor's (Shazeer and Stern 2018, arXiv 1804.04235,
section 8). Where gradients are nothing but noise such steps feed on themselves: weights grow as a random walk does, and
steps with them. So `growth` has an exponent, meant to be negative, of how far such a matrix has grown. The momenta of
the nominal term are mixed by learned weights instead of averaged, again from start to end. `centering` says how much
of its mean over the fan-in is taken out of a matrix's gradient before the rule sees it, `caution` how much of the
nominal step is held back where it goes against that gradient. All meta-parameters at 0 leave the paper's form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
LOG_STEPS = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)
NUM_TENSOR_FEATURES = 8
SHAPES = {
    "schedule_fraction": (len(FRACTIONS),),  # log factor at these fractions of a run of 1,000 steps
    "schedule_length": (len(FRACTIONS),),  # what ten times the length adds to it
    "schedule_early": (len(LOG_STEPS),),  # what is added to it at 10^x steps, as a bias correction is
    "schedule_step": (len(LOG_STEPS),),  # instead of all three at 10^x steps, for runs of unknown length
    "tensor_powers": (2, 2, NUM_TENSOR_FEATURES),  # (vectors, matrices) x (start, end) x feature
    "momentum_mix": (2, 3),  # (start, end) x momentum: logits of the weights
}
STAR_SHAPES = {  # what STAR alone has so far
    **SHAPES,
    "growth": (2,),  # (start, end) exponent
    "centering": (2,),  # (start, end) share, see `features.centered`
    "caution": (2,),  # (start, end) share, see `nominal.cautious`
}
LOG_LENGTHS = (-1.0, 0.5)  # log10(length / 1000) is held within these: no extrapolation to runs of a million steps
LARGEST_POWER = 4.0  # a tensor's log factor stays within +-4
DOUBT = 0.2  # gradients are taken for noise while the logarithm of the squared strength is this near to noise's


class Multipliers(NamedTuple):
    """What multiplies the terms of STAR's step, for each of T tensors."""

    factor: Tensor  # (T,) of both terms
    momenta: Tensor  # (T, 3) weights of the nominal term's momenta, 1 in sum


def multipliers(
    meta_params: Mapping[str, Tensor],
    mean_squares: Tensor,
    shapes: Tensor,
    step: Tensor,
    num_steps: Tensor | int | None,
    noise: Tensor | None = None,
) -> Multipliers:
    """The learned scheduler, for T tensors at once.

    Args:
        meta_params: with the names and shapes of `SHAPES`, and `growth` where the rule has it.
        mean_squares: (T, 4) over each tensor, of the parameter and of the three momenta / sqrt(second moment).
        shapes: (T, 4) as `shape_features` gives them.
        step: () updates made so far, or (T,).
        num_steps: the run's length; None where it is not known.
        noise: as `noise_strength` gives it; for rules with `growth`.

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
    if noise is not None:
        first, last = meta_params["growth"]
        own = own + torch.lerp(first, last, fraction.squeeze(1)) * growth(mean_squares, shapes, noise)
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
    noise: Tensor | None = None,
) -> Multipliers:
    """`multipliers` for one tensor: the factor () and the weights (3,).

    Args:
        meta_params: with the names and shapes of `SHAPES`.
        mean_squares: () x 4, of what `scales` gives.
        shape: of the whole tensor.
        step: () updates made so far.
        num_steps: the run's length, or None.
        num_tensors: how many tensors move, or None.
        noise: as for `multipliers`.

    Example:
        >>> zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        >>> of_tensor(zeros, [torch.tensor(1.0)] * 4, (8, 4), torch.tensor(0.0), 100, 2).factor
        tensor(1.)
    """
    means = torch.stack(list(mean_squares))[None]
    shapes = torch.tensor([shape_features(shape, num_tensors)], dtype=means.dtype, device=means.device)
    factor, momenta = multipliers(meta_params, means, shapes, step, num_steps, noise)
    return Multipliers(factor.squeeze(0), momenta.squeeze(0))


def scales(param: Tensor, exp_avg: Tensor, inv_root: Tensor) -> list[Tensor]:
    """The squares (*shape) x 4 whose means are a tensor's own numbers: of its value, of each momentum's strength.

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
    """A share within 0 and 1 that goes from its start to its end, linear in the fraction of the run.

    Args:
        meta_params: with `name`, (2,).
        name: `centering` or `caution`.
        step: () updates made so far, or (T,); the result has its shape.
        num_steps: the run's length, or None.

    Example:
        >>> ramp({"caution": torch.tensor([1.0, 0.5])}, "caution", torch.tensor(50.0), 101)
        tensor(0.7500)
    """
    start, end = meta_params[name]
    return torch.lerp(start, end, progress(step.to(start.dtype), num_steps)).clamp(0, 1)


def tensor_features(mean_squares: Tensor, shapes: Tensor) -> Tensor:
    """(T, 8), each of order one: a constant, logarithms of scale, size, fan-in and depth, and the momenta's strengths.

    The strength of a momentum is its root mean square in units of the gradient's: near 1 where gradients agree from
    step to step, small where they are noise.
    """
    # Halves of the logarithms of root mean squares; clamped before, so that gradients through a zero are finite.
    scale = torch.log(mean_squares[:, :1].clamp(min=1e-4) / 1e-2) / 4
    strength = torch.log(mean_squares[:, 1:].clamp(min=1e-6)) / 4 + 1
    return torch.cat([torch.ones_like(scale), scale, shapes[:, 1:], strength], 1)


def growth(mean_squares: Tensor, shapes: Tensor, noise: Tensor) -> Tensor:
    """(T,) logarithms of how far the root mean square is above 1 / sqrt(fan-in), for matrices moved by noise, else 0.

    Layers begin about there (torch's at 0.58 of it, He's at 1.4), so it tells of growth without keeping the beginning.
    Matrices also grow as they learn, behind sigmoids by factors of twenty. But white noise makes the slowest momentum
    just as strong as `noise_strength` says: what is learned makes it stronger, and falling gradients weaker. Growth
    counts in full within e^+-DOUBT of that, and not at all beyond twice as far.

    Args:
        mean_squares: (T, 4) as `multipliers` has them.
        shapes: (T, 4) as `shape_features` gives them.
        noise: () or (T,) as `noise_strength` gives it.

    Example:
        >>> shapes = torch.tensor([shape_features((8, 4))] * 3)
        >>> squares, strength = torch.tensor([0.2, 1.0, 1.0]), torch.tensor([5e-4, 5e-4, 1e-3])
        >>> mean_squares = torch.stack([squares, strength, strength, strength], 1)
        >>> growth(mean_squares, shapes, torch.tensor(5e-4).log())
        tensor([0.0000, 0.6931, 0.0000])
    """
    fan_in = math.log(10) * (shapes[:, 2] + 1.5)
    grown = ((torch.log(mean_squares[:, 0].clamp(min=1e-30)) + fan_in) / 2).clamp(min=0)
    signal = torch.log(mean_squares[:, 3].clamp(min=1e-12)) - noise
    return grown * (2 - signal.abs() / DOUBT).clamp(0, 1) * (1 - shapes[:, 0])


def noise_strength(momentum: Tensor, second: Tensor, step: Tensor) -> Tensor:
    """The logarithm of a momentum's squared strength in white noise, after `step` + 1 gradients.

    From zeros, without bias correction, the mean square of a momentum of decay b is (1 - b) / (1 + b) (1 - b^2n) times
    the gradient's after n steps, and a second moment of decay c is 1 - c^n of it.

    Args:
        momentum: () decay of the momentum.
        second: () decay of the second moment.
        step: () or (T,) updates made so far; the result has its shape.

    Example:
        >>> noise_strength(torch.tensor(0.99), torch.tensor(0.99), torch.tensor([0.0, 1e5])).exp()
        tensor([0.0100, 0.0050])
    """
    number = step.to(momentum.dtype) + 1
    of_momentum = torch.log((1 - momentum) / (1 + momentum)) + torch.log(
        -torch.expm1(2 * number * momentum.abs().log())
    )
    return of_momentum - torch.log(-torch.expm1(number * torch.log(second)))


def shape_features(shape: tuple[int, ...], num_tensors: int | None = None) -> tuple[float, float, float, float]:
    """What is known of a tensor before it moves, centered: is it a vector, and logarithms of size, fan-in and depth.

    Args:
        shape: of the tensor; the fan-in is that of torch's layouts, all dims but the first.
        num_tensors: how many tensors the net has, which stands for its depth; held within 2 and 48.

    Returns:
        1 for vectors and scalars, else 0; log10(size) - 3; log10(fan-in) - 1.5, 0 for vectors; log(num_tensors / 8), 0
        where it is not known.

    Example:
        >>> shape_features((1000,), 8)
        (1.0, 0.0, 0.0, 0.0)
    """
    size = math.log10(max(math.prod(shape), 1)) - 3
    depth = 0.0 if num_tensors is None else math.log(min(max(num_tensors, 2), 48) / 8)
    vector = len(shape) < 2
    return float(vector), size, 0.0 if vector else math.log10(max(math.prod(shape[1:]), 1)) - 1.5, depth


def progress(step: Tensor, num_steps: Tensor | int | None) -> Tensor:
    """The fraction of the run that is done; a run of unknown length is always halfway, one that goes on at its end."""
    if num_steps is None:
        return torch.full_like(step, 0.5)
    length = torch.as_tensor(num_steps, dtype=step.dtype, device=step.device)
    return (step / (length - 1).clamp(min=1)).clamp(max=1)


def log_factor(meta_params: Mapping[str, Tensor], step: Tensor, num_steps: Tensor | int | None) -> Tensor:
    """The whole net's log factor, piecewise linear in the fraction of the run and in log10(step).

    Args:
        meta_params: with the names and shapes of `SHAPES`.
        step: () or (T,) updates made so far.
        num_steps: the run's length, or None.
    """
    step = step.to(meta_params["schedule_step"].dtype)
    if num_steps is None:
        return interpolate(torch.log10(step + 1), LOG_STEPS, meta_params["schedule_step"])
    length = torch.as_tensor(num_steps, dtype=step.dtype, device=step.device)
    log_length = (torch.log10(length) - 3).clamp(*LOG_LENGTHS)
    curve = meta_params["schedule_fraction"] + meta_params["schedule_length"] * log_length
    early = interpolate(torch.log10(step + 1), LOG_STEPS, meta_params["schedule_early"])
    return interpolate(progress(step, num_steps), FRACTIONS, curve) + early


_KEPT: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}


def keep_constants(dtype: torch.dtype, device: torch.device) -> None:
    """Put the knots on a device once and for all: a CUDA graph cannot capture a copy from the host.

    `interpolate` does not do it: a transform of `torch.func` may be at work there, whose tensors must not be kept.
    """
    for knots in (FRACTIONS, LOG_STEPS):
        if (knots, dtype, device) not in _KEPT:
            with torch.inference_mode(False):
                _KEPT[knots, dtype, device] = torch.tensor(knots, dtype=dtype, device=device)


def interpolate(x: Tensor, knots: tuple[float, ...], values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), constant beyond the ends; x of any shape -> the same.

    Example:
        >>> interpolate(torch.tensor([0.5, 3.0]), (0.0, 1.0), torch.tensor([1.0, 3.0]))
        tensor([2., 3.])
    """
    at = _KEPT.get((knots, values.dtype, values.device))
    at = torch.tensor(knots, dtype=values.dtype, device=values.device) if at is None else at
    x = x.clamp(knots[0], knots[-1]).unsqueeze(-1)
    # Each knot's hat falls from 1 at the knot to 0 at its neighbors: no indexing by data, so it runs under vmap.
    slopes = (x - at[:-1]) / (at[1:] - at[:-1])
    edge = torch.ones_like(slopes[..., :1])
    hats = torch.minimum(torch.cat([edge, slopes], -1), torch.cat([1 - slopes, edge], -1)).clamp(0, 1)
    return (hats * values).sum(-1)
