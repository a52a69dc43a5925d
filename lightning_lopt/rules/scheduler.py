"""A learned schedule: one factor for the steps of the whole net, from how far the run has come.

Not in the STAR paper. Why: a rule that does not know how long a run is cannot anneal at the right time, and AdamW with
a cosine schedule, which does know, is the hardest baseline; Lightning knows the length of nearly every run. Learned
schedulers beside a per-parameter rule are VeLO's (Metz et al. 2022, arXiv 2211.09760) and Celo's; theirs are LSTMs,
this is a curve of a few points, which can be drawn and read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
LOG_STEPS = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)
SHAPES = {
    "schedule_fraction": (len(FRACTIONS),),  # log factor at these fractions of a run of 1,000 steps
    "schedule_length": (len(FRACTIONS),),  # what ten times the length adds to it
    "schedule_step": (len(LOG_STEPS),),  # log factor at 10^x steps, for runs of unknown length
}


def log_factor(meta_params: Mapping[str, Tensor], step: Tensor, num_steps: Tensor | int | None) -> Tensor:
    """The logarithm of the factor, piecewise linear: () for one step.

    Args:
        meta_params: with the names and shapes of `SHAPES`.
        step: () updates made so far.
        num_steps: the run's length; a run that goes on beyond it stays at its end. None where it is not known.
    """
    dtype = meta_params["schedule_step"].dtype
    step = step.to(dtype)
    if num_steps is None:
        return interpolate(torch.log10(step + 1), LOG_STEPS, meta_params["schedule_step"])
    length = torch.as_tensor(num_steps, dtype=dtype, device=step.device)
    fraction = (step / (length - 1).clamp(min=1)).clamp(max=1)
    curve = meta_params["schedule_fraction"] + meta_params["schedule_length"] * (torch.log10(length) - 3)
    return interpolate(fraction, FRACTIONS, curve)


def interpolate(x: Tensor, knots: tuple[float, ...], values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), constant beyond the ends; x () -> ().

    Example:
        >>> interpolate(torch.tensor(0.5), (0.0, 1.0), torch.tensor([1.0, 3.0]))
        tensor(2.)
    """
    at = torch.tensor(knots, dtype=values.dtype, device=values.device)
    x = x.clamp(knots[0], knots[-1])
    # Each knot's hat falls from 1 at the knot to 0 at its neighbors: no indexing by data, so it runs under vmap.
    widths = at[1:] - at[:-1]
    rising = torch.cat([torch.ones_like(at[:1]), (x - at[:-1]) / widths])
    falling = torch.cat([(at[1:] - x) / widths, torch.ones_like(at[:1])])
    return (torch.minimum(rising, falling).clamp(0, 1) * values).sum()
