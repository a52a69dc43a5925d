"""Where the callback meets Lightning: wrapped methods of the Trainer's strategy, and the loss that passes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_lopt.plugin.weight_averaging import AveragedWeights


class StrategyHooks:
    """Wraps methods of a strategy object while a fit lasts.

    The wraps stay for the whole fit: user code that calls `strategy.setup_optimizers` in mid-training must not silently
    get AdamW back.

    Args:
        trainer: the Trainer whose strategy is wrapped.
        replace: called with the Trainer and the `LossRecorder` each time the strategy has set up its optimizers.
        averaged: swapped into state dicts of the module, and out of the module when everybody is done with a
            validation; its start is a hook of callbacks.
    """

    def __init__(
        self, trainer: Any, replace: Callable[[Any, LossRecorder], None], averaged: AveragedWeights | None = None
    ) -> None:
        self.strategy = trainer.strategy
        self.active = True
        recorder = LossRecorder(self.strategy)
        setup_optimizers = self.strategy.setup_optimizers
        backward = self.strategy.backward

        def setup_then_replace(trainer: Any) -> None:
            setup_optimizers(trainer)
            if self.active:
                replace(trainer, recorder)

        def record_then_backward(closure_loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.active:
                recorder.add(closure_loss)
            return backward(closure_loss, *args, **kwargs)

        self.wraps: dict[str, Callable[..., Any]] = {
            "setup_optimizers": setup_then_replace,
            "backward": record_then_backward,
        }
        if averaged is not None:
            self.wraps |= self._averaging(averaged)
        # What the object itself held before: somebody else's wrap, or nothing, and then the class has the method.
        self.before = {name: vars(self.strategy).get(name) for name in self.wraps}
        for name, wrap in self.wraps.items():
            setattr(self.strategy, name, wrap)

    def _averaging(self, averaged: AveragedWeights) -> dict[str, Callable[..., Any]]:
        """Wraps for averaged weights."""
        make_state_dict = self.strategy.lightning_module_state_dict
        end_validation = self.strategy.on_validation_end

        def averaged_state_dict() -> Any:
            return averaged.state_dict(make_state_dict) if self.active else make_state_dict()

        def end_validation_then_swap() -> None:
            end_validation()
            if self.active:
                averaged.swap_out()

        return {"lightning_module_state_dict": averaged_state_dict, "on_validation_end": end_validation_then_swap}

    def undo(self) -> None:
        """Put the strategy's own methods back.

        Where somebody has wrapped ours since, theirs must stay. It goes on calling ours, which then only passes the
        call through.
        """
        self.active = False
        for name, wrap in self.wraps.items():
            if vars(self.strategy).get(name) is not wrap:
                continue
            delattr(self.strategy, name)
            if (method := self.before[name]) is not None:
                setattr(self.strategy, name, method)


class LossRecorder:
    """Records the training loss of the current optimizer step, for rules that read it.

    The closure's value would be wrong: under accumulation it is the last micro-batch's loss alone, and under a
    GradScaler there is no closure. What reaches `backward` is the unscaled loss divided by the number of micro-batches,
    so the sum since the last step (or since `zero_grad`, where a GradScaler skipped the step) is the mean. The value
    stays until the next `backward`, because several optimizers may read it.

    Args:
        strategy: the strategy that averages the loss over processes.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.total: Tensor | None = None
        self.complete = False

    def add(self, loss: Tensor) -> None:
        """Add a loss that reaches `backward`."""
        loss = loss.detach()
        self.total = loss if self.total is None or self.complete else self.total + loss
        self.complete = False

    def reset(self) -> None:
        """Let the next loss begin a new step."""
        self.complete = True

    def __call__(self) -> Tensor | None:
        """Return the step's loss, averaged over processes; None if there was none."""
        self.complete = True
        # Without the mean over processes the ranks' parameters would silently drift apart. `reduce` works in place.
        return None if self.total is None else self.strategy.reduce(self.total.clone(), reduce_op="mean")
