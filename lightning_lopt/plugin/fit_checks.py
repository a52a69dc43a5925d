"""Finds faults that only show while a fit runs: a rule that never steps, and a learning rate off its reference."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

from lightning_lopt.optimizer import RuleOptimizer
from lightning_lopt.plugin.replacement import Replaced

_NEAR = 0.1  # a learning rate below this fraction of its reference never came near it
_ROUNDING = 1e-3


class FitChecks:
    """Watches the replaced optimizers through the first epoch, and their learning rates through the whole fit.

    Args:
        replaced: the replaced optimizers, which are released after the first epoch.
        scales: whether the learning rate multiplies the update (`lr="scale"`).
    """

    def __init__(self, replaced: list[Replaced], *, scales: bool) -> None:
        self.replaced = replaced
        self.watched = {pair.new for pair in replaced}
        self.scales = scales
        self.largest: dict[RuleOptimizer, float] = {}  # optimizers that have stepped -> their largest lr / reference
        self.warned = False

    def observe(self, optimizer: Any) -> None:
        """Note that an optimizer steps, and warn once if its lr is above its reference."""
        if optimizer not in self.watched:  # the module made it, with an lr of its own meaning
            return
        factors = [float(g["lr"]) / g["lopt_base_lr"] for g in optimizer.param_groups if g["lopt_base_lr"] is not None]
        factor = max(factors, default=1.0)  # 1 where the lr is ignored
        self.largest[optimizer] = max(self.largest.get(optimizer, 0.0), factor)
        if factor > 1 + _ROUNDING and not self.warned:
            self.warned = True
            rank_zero_warn(
                f"lr='scale' multiplies the update by {factor:.3g}: the lr is above its reference, the largest lr at "
                "the start of the fit. If the schedule climbs to a peak, pass the peak as reference_lr=."
            )

    def end_epoch(self, epoch: int) -> None:
        """Check what the first epoch did; later epochs are not checked."""
        replaced = self.replaced
        self.replaced = []
        for pair in replaced:
            largest = self.largest.get(pair.new)
            self._check_that_it_is_used(pair, stepped=largest is not None)
            # In a run that was resumed, a schedule may be near its end.
            if epoch == 0 and largest is not None and largest < _NEAR:
                rank_zero_warn(
                    f"lr='scale' multiplied the update by at most {largest:.2g} in the first epoch: the lr never came "
                    "near its reference. Unless a warm-up still runs, pass the schedule's peak as reference_lr=."
                )

    def _check_that_it_is_used(self, pair: Replaced, *, stepped: bool) -> None:
        """Warn if the module goes on using the optimizer that was replaced."""
        name = type(pair.old).__name__
        if pair.old.state and not pair.old_had_state:
            fault = f"The module stepped its own {name}, which LearnedOptimizer has replaced."
        elif not stepped and not pair.new.state:
            fault = f"LearnedOptimizer took no step in the first epoch in place of optimizer {pair.number} ({name})."
        elif self.scales and [group["lr"] for group in pair.old.param_groups] != pair.old_lrs:
            fault = (
                f"The module set the lr of its own {name}, which LearnedOptimizer has replaced, so it has no effect."
            )
        else:
            return
        rank_zero_warn(f"{fault} A module that keeps its optimizer (as self.opt) must use self.optimizers() instead.")
