"""What an optimizer's step did, in a few numbers: sums over the tensors that wait for no device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.optimizer.sharding import whole


class StepMetrics(NamedTuple):
    """What one step did, over all tensors; tensors of no dims, on the parameters' device."""

    update_rms: Tensor  # root mean square of the change of the parameters
    nominal_share: Tensor | None  # rms of the nominal term / sum of the terms' rms; None for rules without one
    skipped: Tensor  # updates skipped by the safeguard since the start, over all tensors
    fallback: Tensor | None = None  # 1 while the nominal term runs alone, else 0; None without safeguard="fallback"


class Totals:
    """Sums over the tensors of one step."""

    def __init__(self) -> None:
        self.count = 0
        self.change: Tensor | float = 0.0
        self.terms: dict[str, Tensor | float] = {}

    def add(self, change: Tensor, terms: dict[str, Tensor], counted: Tensor | int) -> None:
        """Add one tensor: its change, and its update's terms where the step `counted`."""
        squares = {name: whole(term.square().sum()) for name, term in terms.items()}
        if isinstance(counted, Tensor):
            squares = {name: torch.where(counted, square, 0.0) for name, square in squares.items()}
        self.add_squares(change.numel(), whole(change.square().sum()), squares)

    def add_squares(self, count: int, change: Tensor, terms: dict[str, Tensor]) -> None:
        """Add sums of squares, () each, over `count` numbers."""
        self.count += count
        self.change = _plus(self.change, change)
        for name, term in terms.items():
            self.terms[name] = _plus(self.terms.get(name, 0.0), term)

    def result(self, skipped: Tensor) -> StepMetrics:
        """The measurements of the step, given each tensor's count of skipped updates."""
        roots = {name: torch.as_tensor(total).sqrt() for name, total in self.terms.items()}
        share = roots["nominal"] / sum(roots.values(), torch.tensor(1e-30)) if "nominal" in roots else None
        rms = torch.as_tensor(self.change / max(self.count, 1)).sqrt()
        return StepMetrics(rms, share, skipped.sum())


def _plus(total: Tensor | float, term: Tensor) -> Tensor:
    """A sum over tensors that may lie on several devices."""
    return total + (term.to(total.device) if isinstance(total, Tensor) else term)
