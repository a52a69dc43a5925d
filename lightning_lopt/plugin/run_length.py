"""How many optimizer steps a fit will take, as far as anybody can know before it runs.

Rules with a learned schedule anneal over this number. A wrong length costs more than an unknown one, so wherever the
Trainer's own estimate may be wrong, the length is unknown unless the user gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from lightning_lopt.optimizer import RuleOptimizer
from lightning_lopt.plugin.arguments import NumSteps
from lightning_lopt.rules import UpdateRule

_LIGHTNINGS_MAX_EPOCHS = 1000  # what Trainer() takes where neither epochs nor steps are given


class RunLength(NamedTuple):
    """The length of a run in steps of one optimizer (None: unknown), and a phrase that says where it comes from."""

    steps: int | None
    reason: str


class ToldLength:
    """A run's length as optimizers have been told it, which is corrected while it runs; see `find_run_length`."""

    def __init__(self) -> None:
        self.optimizers: Iterable[RuleOptimizer] = ()
        self.steps: int | None = None
        self.seen = 0  # steps when it was corrected last
        self.announced = False

    def tell(self, steps: int | None, optimizers: Iterable[RuleOptimizer]) -> None:
        """Give the length to optimizers."""
        self.optimizers = optimizers
        self.steps = steps
        for optimizer in optimizers:
            optimizer.num_steps = steps

    def correct(self, trainer: Any, *, stepping: bool = False) -> None:
        """Under manual optimization, give the length anew, except to those that somebody has told another.

        It stays as long as it predicts the steps so far to within one, but at the end of an epoch it is exact.

        Args:
            trainer: a Trainer at the end of a batch,
            stepping: or before the first step of all.
        """
        taken, ends = trainer.global_step, trainer.is_last_batch
        if trainer.lightning_module.automatic_optimization or 0 < taken == self.seen and not ends:
            return
        self.seen = taken
        steps = find_run_length(trainer, "auto", stepping=stepping).steps
        if steps and self.steps and taken and not ends and abs(taken - taken * self.steps / steps) < 1:
            return
        if steps is not None and steps != self.steps and not self.announced:
            self.announced = True
            rank_zero_info(f"LearnedOptimizer: the module does not step once a batch, so the run has {steps:,} steps.")
        self.tell(steps, [optimizer for optimizer in self.optimizers if optimizer.num_steps == self.steps])


def find_run_length(trainer: Any, num_steps: NumSteps, *, stepping: bool = False) -> RunLength:
    """Return the length of the Trainer's fit.

    Under manual optimization of one optimizer this is one step a batch at first. As soon as batches take more or fewer,
    the length changes with the steps that they have taken on average.

    Args:
        trainer: a Trainer in a fit.
        num_steps: what the user said: a number, None (unknown), or "auto", to work it out from the Trainer.
        stepping: whether a batch is about to take its first step, which counts as taken then.
    """
    if num_steps != "auto":
        return RunLength(num_steps, "as given by num_steps")
    if why := _why_unknown(trainer):
        return RunLength(None, why)
    if trainer.lightning_module.automatic_optimization:
        steps, source = _planned_steps(trainer), "from the Trainer"
    else:
        steps, source = _extrapolated_steps(trainer, stepping=stepping)
    if not 0 < steps < math.inf:
        return RunLength(None, "neither the data nor the Trainer limits it" if steps else source)
    may_stop = "; EarlyStopping may end it sooner" if _has_callback(trainer, "EarlyStopping") else ""
    return RunLength(int(steps), f"{source}{may_stop}")


def check_known(rule: UpdateRule, length: RunLength) -> None:
    """Raise a MisconfigurationException if a rule needs to know the length of the run, and nobody does."""
    if rule.needs_num_steps and length.steps is None:
        raise MisconfigurationException(
            f"Rule {rule.kind!r} must know the length of the run, which is unknown: {length.reason}. Pass "
            "LearnedOptimizer(num_steps=...), the number of optimizer steps."
        )


def _why_unknown(trainer: Any) -> str | None:
    """Why nobody can know the length of this fit; None if the Trainer's estimate holds."""
    if not trainer.lightning_module.automatic_optimization and len(trainer.optimizers) > 1:
        # Lightning counts their steps together. The module alone decides how often each one steps.
        return "manual optimization of several optimizers"
    if _has_callback(trainer, "Timer"):  # the Trainer adds one for max_time
        return "a Timer or max_time may end it"
    if _has_callback(trainer, "EarlyStopping") and trainer.max_epochs == _LIGHTNINGS_MAX_EPOCHS:
        return "EarlyStopping ends it, and max_epochs=1000 is Lightning's default"
    if trainer.reload_dataloaders_every_n_epochs and trainer.max_epochs != -1:
        return "reloaded dataloaders may change their length"
    return None


def _planned_steps(trainer: Any) -> float:
    """The Trainer's estimate, with accumulation that changes between epochs counted epoch by epoch."""
    steps: float = trainer.estimated_stepping_batches
    schedule = next((c for c in trainer.callbacks if _is_a(c, "GradientAccumulationScheduler")), None)
    batches = trainer.num_training_batches
    if schedule is None or trainer.max_epochs == -1 or batches == math.inf:
        return steps
    steps = sum(
        math.ceil(batches / schedule.get_accumulate_grad_batches(epoch)) for epoch in range(max(trainer.max_epochs, 1))
    )
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def _extrapolated_steps(trainer: Any, *, stepping: bool) -> tuple[float, str]:
    """The steps of a module that steps its one optimizer itself: the run's batches times the steps a batch so far.

    Before the first batch that is one. With this length, the fraction of the run that is done is that of its batches,
    whether the module steps once in several batches, several times a batch, or as it likes.
    """
    planned: float = trainer.estimated_stepping_batches  # manual optimization has no accumulation by the Trainer
    if trainer.max_epochs == -1 or trainer.num_training_batches == math.inf:
        return planned, "from the Trainer"
    done = trainer.fit_loop.epoch_loop.batch_progress.total.processed + stepping
    rate = (trainer.global_step + stepping) / done if done else 1.0
    found = round(trainer.num_training_batches * max(trainer.max_epochs, 1) * rate)
    steps = found if trainer.max_steps == -1 else min(found, trainer.max_steps)
    return steps, f"from the Trainer, with {rate:.3g} per batch"


def _has_callback(trainer: Any, name: str) -> bool:
    return any(_is_a(callback, name) for callback in trainer.callbacks)


def _is_a(callback: object, name: str) -> bool:
    """Whether a callback is of a class of Lightning's; by name, because `pytorch_lightning` has classes of its own."""
    return any(base.__name__ == name for base in type(callback).__mro__)
