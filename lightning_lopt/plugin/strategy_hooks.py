"""Where the callback meets Lightning: two wrapped methods of the Trainer's strategy, and the loss that passes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_lopt.optimizer import RuleOptimizer


class StrategyHooks:
    """The two wrapped methods of a strategy object, for as long as a fit lasts.

    The wrap stays: user code that calls `strategy.setup_optimizers` in mid-training must not silently get AdamW back.
    """

    def __init__(self, trainer: Any, replace: Callable[[Any, LossRecorder], None]) -> None:
        self.strategy = trainer.strategy
        self.before = {name: vars(self.strategy).get(name) for name in ("setup_optimizers", "backward")}
        tap = LossRecorder(self.strategy)
        setup_optimizers, backward = self.strategy.setup_optimizers, self.strategy.backward

        def setup_then_replace(trainer: Any) -> None:
            setup_optimizers(trainer)
            replace(trainer, tap)

        def tap_then_backward(closure_loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            tap.add(closure_loss)
            return backward(closure_loss, *args, **kwargs)

        self.strategy.setup_optimizers = setup_then_replace
        self.strategy.backward = tap_then_backward

    def undo(self) -> None:
        """Put the strategy's own methods back."""
        for name, method in self.before.items():
            vars(self.strategy).pop(name, None)
            if method is not None:  # someone else's wrap
                setattr(self.strategy, name, method)


class LossRecorder:
    """The training loss of the current optimizer step, for rules that read it.

    Not the closure's value: under accumulation that is the last micro-batch's alone, under a GradScaler there is no
    closure. What reaches `backward` is the unscaled loss divided by the number of micro-batches, so the sum since the
    last step (or `zero_grad`, where a GradScaler skipped the step) is the mean. It stays until the next `backward`, for
    several optimizers may read it.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.total: Tensor | None = None
        self.complete = False

    def add(self, loss: Tensor) -> None:
        """Take what reaches `backward`."""
        loss = loss.detach()
        self.total = loss if self.total is None or self.complete else self.total + loss
        self.complete = False

    def reset(self) -> None:
        """What comes next begins another step."""
        self.complete = True

    def __call__(self) -> Tensor | None:
        """The step's loss, the mean over processes; None where there was none."""
        self.complete = True
        # Without the mean over processes the ranks' parameters would silently drift apart. `reduce` works in place.
        return None if self.total is None else self.strategy.reduce(self.total.clone(), reduce_op="mean")


def rebind(scheduler: Any, new: dict[Any, RuleOptimizer]) -> None:
    """Point a scheduler, and those inside it, to the optimizer that took its own's place."""
    if getattr(scheduler, "optimizer", None) in new:
        scheduler.optimizer = new[scheduler.optimizer]
    for inner in getattr(scheduler, "_schedulers", ()):
        rebind(inner, new)
