"""How many optimizer steps a fit will take, as far as anybody can know before it runs.

Rules with a learned schedule anneal over this number. A wrong length costs more than an unknown one, so wherever the
Trainer's own estimate may be wrong, the length is unknown unless the user gives it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_lopt.plugin.arguments import NumSteps
from lightning_lopt.rules import UpdateRule

_LIGHTNINGS_MAX_EPOCHS = 1000  # what Trainer() takes where neither epochs nor steps are given


class RunLength(NamedTuple):
    """The length of a run in steps of one optimizer (None: unknown), and a phrase that says where it comes from."""

    steps: int | None
    reason: str


def find_run_length(trainer: Any, num_steps: NumSteps) -> RunLength:
    """Return the length of the Trainer's fit.

    Args:
        trainer: a Trainer in a fit.
        num_steps: what the user said: a number, None (unknown), or "auto", to work it out from the Trainer.
    """
    if num_steps != "auto":
        return RunLength(num_steps, "as given by num_steps")
    if why := _why_unknown(trainer):
        return RunLength(None, why)
    steps = _planned_steps(trainer)
    if not 0 < steps < math.inf:
        return RunLength(None, "neither the data nor the Trainer limits it")
    may_stop = "; EarlyStopping may end it sooner" if _has_callback(trainer, "EarlyStopping") else ""
    return RunLength(int(steps), f"from the Trainer{may_stop}")


def check_known(rule: UpdateRule, length: RunLength) -> None:
    """Raise a MisconfigurationException if a rule needs to know the length of the run, and nobody does."""
    if rule.needs_num_steps and length.steps is None:
        raise MisconfigurationException(
            f"Rule {rule.kind!r} must know the length of the run, which is unknown: {length.reason}. Pass "
            "LearnedOptimizer(num_steps=...), the number of optimizer steps."
        )


def _why_unknown(trainer: Any) -> str | None:
    """Why nobody can know the length of this fit; None if the Trainer's estimate holds."""
    if not trainer.lightning_module.automatic_optimization:
        # Lightning counts batches, or steps of all optimizers together. The module alone decides how often each one
        # steps: several times a batch, or once in several batches.
        return "manual optimization"
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


def _has_callback(trainer: Any, name: str) -> bool:
    return any(_is_a(callback, name) for callback in trainer.callbacks)


def _is_a(callback: object, name: str) -> bool:
    """Whether a callback is of a class of Lightning's; by name, because `pytorch_lightning` has classes of its own."""
    return any(base.__name__ == name for base in type(callback).__mro__)
