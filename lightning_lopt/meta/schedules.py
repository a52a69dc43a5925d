"""How long inner runs are: horizons of episodes, fixed, drawn, or growing with meta-training."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Horizon:
    """Lengths of episodes, log-uniform between two bounds.

    Args:
        low: shortest, in inner steps.
        high: longest; default: `low`, that is, one fixed length.

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
            raise ValueError(f"Horizon({self.low}, {self.high}) is not allowed: it must be 1 <= low <= high.")

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """(number,) int64 lengths, on the CPU."""
        high = self.low if self.high is None else self.high
        uniform = torch.rand(number, generator=generator, device=generator.device, dtype=torch.float64).cpu()
        return torch.exp(math.log(self.low) + uniform * math.log(high / self.low)).round().long()
