"""Metrics of an optimizer's step, summed over its tensors without device synchronization."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.optimizer.sharding import whole


class StepMetrics(NamedTuple):
    """Metrics of one step, over all tensors; () each, on the parameters' device."""

    update_rms: Tensor  # root mean square of the change of the parameters
    nominal_share: Tensor | None  # rms of the nominal term / sum of the terms' rms; None for rules with one term
    skipped: Tensor  # updates that the safeguard has skipped since the start, over all tensors
    fallback: Tensor | None = None  # 1 while the nominal term runs alone, else 0; None without safeguard="fallback"


class Totals:
    """Sums over the tensors of one step."""

    def __init__(self) -> None:
        self.count = 0
        self.change: Tensor | float = 0.0
        self.terms: dict[str, Tensor] = {}

    def add(self, change: Tensor, terms: dict[str, Tensor], counted: Tensor | int) -> None:
        """Add one tensor: its change, and the terms of its update unless the step was skipped (`counted` False)."""
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

    def result(self, skipped: Tensor, fallback: Tensor | None = None) -> StepMetrics:
        """The metrics of the step, given each tensor's count of skipped updates, and whether the rule falls back."""
        share = None
        if "nominal" in self.terms and len(self.terms) > 1:
            roots = {name: total.sqrt() for name, total in self.terms.items()}
            share = roots["nominal"] / torch.stack(list(roots.values())).sum().clamp(min=1e-30)
        change = self.change if isinstance(self.change, Tensor) else torch.zeros((), dtype=torch.float32, device="cpu")
        return StepMetrics((change / max(self.count, 1)).sqrt(), share, skipped.sum(), fallback)


def _plus(total: Tensor | float, term: Tensor) -> Tensor:
    """A sum over tensors that may be on several devices."""
    return total + (term.to(total.device) if isinstance(total, Tensor) else term)
