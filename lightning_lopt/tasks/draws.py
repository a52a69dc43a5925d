"""Random draws for tasks: from an explicit generator, on its device, in float32, for a whole population at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Shape = tuple[int, ...]


def lead(population: int | None) -> Shape:
    """Return the leading axes of a draw: (population,), or () without a population."""
    return () if population is None else (population,)


def normal(generator: torch.Generator, shape: Shape, population: int | None = None, std: float = 1.0) -> Tensor:
    """Draw (*lead, *shape) values from N(0, std^2)."""
    return std * torch.randn(
        (*lead(population), *shape), generator=generator, device=generator.device, dtype=torch.float32
    )


def uniform(
    generator: torch.Generator, shape: Shape, population: int | None = None, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Draw (*lead, *shape) values from U(low, high)."""
    unit = torch.rand((*lead(population), *shape), generator=generator, device=generator.device, dtype=torch.float32)
    return low + (high - low) * unit


def log_uniform(generator: torch.Generator, shape: Shape, population: int | None, low: float, high: float) -> Tensor:
    """Draw (*lead, *shape) values exp(u) with u from U(ln low, ln high)."""
    return uniform(generator, shape, population, math.log(low), math.log(high)).exp()


def truncated_normal(
    generator: torch.Generator, shape: Shape, population: int | None = None, std: float = 1.0
) -> Tensor:
    """Draw from N(0, std^2) truncated at 2 std, as Haiku does; the resulting standard deviation is 0.88 std.

    Example:
        >>> draw = truncated_normal(torch.Generator().manual_seed(0), (1000,), std=0.5)
        >>> bool(draw.abs().max() <= 1.0), bool(0.40 < draw.std() < 0.48)
        (True, True)
    """
    bound = math.erf(math.sqrt(2.0))  # P(|z| <= 2)
    unit = uniform(generator, shape, population, -bound, bound)
    # The clamp corrects the rounding of erfinv at the ends.
    return std * (math.sqrt(2.0) * torch.erfinv(unit)).clamp(-2.0, 2.0)


def integers(generator: torch.Generator, high: int, shape: Shape, population: int | None = None) -> Tensor:
    """Draw (*lead, *shape) int64 values, uniform over 0, ..., high - 1."""
    return torch.randint(high, (*lead(population), *shape), generator=generator, device=generator.device)


def dropout_mask(generator: torch.Generator, rate: float, shape: Shape, population: int | None = None) -> Tensor:
    """Draw (*lead, *shape) values that are 0 with probability `rate`, else 1 / (1 - rate)."""
    return (uniform(generator, shape, population) >= rate).float() / (1.0 - rate)
