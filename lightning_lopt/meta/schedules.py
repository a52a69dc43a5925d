"""The lengths of inner runs, and the weights of their losses."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Horizon:
    """A log-uniform distribution of episode lengths.

    Args:
        low: the shortest, in inner steps.
        high: the longest (default: `low`, one fixed length).

    Raises:
        ValueError: unless 1 <= low <= high.

    Example:
        >>> import torch
        >>> Horizon(100).draw(3, torch.Generator())
        tensor([100, 100, 100])
    """

    low: int = 1000
    high: int | None = None

    def __post_init__(self) -> None:
        if self.low < 1 or (self.high is not None and self.high < self.low):
            raise ValueError(f"Horizon({self.low}, {self.high}) is not allowed: it needs 1 <= low <= high.")

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """Draw (number,) int64 lengths, on the CPU."""
        high = self.low if self.high is None else self.high
        uniform = torch.rand(number, generator=generator, device=generator.device, dtype=torch.float64).cpu()
        return torch.exp(math.log(self.low) + uniform * math.log(high / self.low)).round().long()


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights w_t = (1 + slope t) base^t of the losses after updates t = 1, 2, ... of an unroll; equal by default.

    Source: Schroeter's thesis, eqs. 5.12 (base 1) and 5.13 (slope 0), which found little benefit in either.

    Args:
        slope: slope of linear weights.
        base: base of exponential weights.

    Raises:
        ValueError: unless slope >= 0 and 0 < base <= 10.

    Example:
        >>> Weights(slope=1.0)(3)
        tensor([2., 3., 4.], dtype=torch.float64)
    """

    slope: float = 0.0
    base: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.slope < math.inf and 0 < self.base <= 10):
            raise ValueError(
                f"Weights({self.slope}, {self.base}) is not allowed: it needs slope >= 0 and 0 < base <= 10."
            )

    def __call__(self, length: int) -> Tensor:
        """Return (length,) weights in float64."""
        step = torch.arange(1, length + 1, dtype=torch.float64)
        return (1 + self.slope * step) * self.base**step
