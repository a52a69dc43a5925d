"""Meta-training as a piece of a claim: through MetaTrainer, with the meta-parameters on the way."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from lightning_lopt.claims.lab import Lab, weights
from lightning_lopt.evaluation.compare import fingerprint
from lightning_lopt.meta.estimators import Estimator
from lightning_lopt.meta.trainer import MetaTrainer
from lightning_lopt.rules import UpdateRule, make
from lightning_lopt.tasks import Task

SWITCHED_OFF = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


class Trained(NamedTuple):
    """A meta-training: meta-parameters at its start, every so many steps, and at its end."""

    steps: list[int]
    meta_params: list[dict[str, Tensor]]


def meta_train(
    lab: Lab,
    label: str,
    rule: UpdateRule,
    tasks: Sequence[Task],
    estimator: Estimator,
    *,
    num_steps: int,
    every: int,
    seed: int,
    **options: Any,
) -> Trained:
    """Meta-train a rule from fresh meta-parameters, or find that it was done before.

    Args:
        lab: keeps the result.
        label: for the progress report.
        rule: of which kind and configuration. It is what gets trained, after its meta-parameters have been drawn anew:
            calls that share the rule and the tasks share what torch.compile made of them.
        tasks: as for `MetaTrainer`.
        estimator: of the meta-gradient.
        num_steps: of meta-training.
        every: steps between two looks at the meta-parameters.
        seed: everything random follows from it.
        options: further arguments of `MetaTrainer`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rule.load_state_dict(make(rule.kind, **rule.config.to_dict()).state_dict())
    key = {"start": fingerprint(rule), "num_steps": num_steps, "every": every, "seed": seed, "options": repr(options)}
    key |= {"tasks": [task.name for task in tasks], "sizes": [task.num_params for task in tasks]}
    key |= {"estimator": repr(estimator)}

    def fit() -> dict[str, Any]:
        watch = _Watch(lab, label, num_steps)
        compiled = {"compiled": lab.compiled, **options}
        module = MetaTrainer(rule, list(tasks), estimator, seed=seed, steps_per_epoch=every, **compiled)
        off: dict[str, Any] = dict.fromkeys(SWITCHED_OFF, False)
        with _quiet():
            trainer = L.Trainer(
                accelerator="cpu", devices=1, max_steps=num_steps, gradient_clip_val=1.0, callbacks=[watch], **off
            )
            trainer.fit(module)
        return {"steps": watch.steps, "weights": watch.weights}

    found = lab.piece("meta-train", key, fit)
    params = [{name: torch.tensor(value) for name, value in row.items()} for row in found["weights"]]
    return Trained(found["steps"], params)


def trained(
    lab: Lab, label: str, rule: UpdateRule, tasks: Sequence[Task], estimator: Estimator, steps: int, **options: Any
) -> UpdateRule:
    """The rule, meta-trained from fresh meta-parameters: in place, and as `meta_train` has it."""
    found = meta_train(lab, label, rule, tasks, estimator, num_steps=steps, every=steps, **{"seed": 0, **options})
    rule.load_state_dict(found.meta_params[-1])
    return rule


def forget_compiled() -> None:
    """Drop what torch.compile has made: it compiles a function only a few times in a process, then gives up."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class _Watch(L.Callback):
    """Notes the meta-parameters on the way."""

    def __init__(self, lab: Lab, label: str, num_steps: int) -> None:
        self.lab, self.label, self.num_steps = lab, label, num_steps
        self.steps: list[int] = []
        self.weights: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The fresh ones."""
        self._note(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Report."""
        self.lab.progress(self.label, trainer.global_step, self.num_steps)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Those of now."""
        self._note(trainer, pl_module)

    def _note(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, MetaTrainer)
        self.steps.append(trainer.global_step)
        self.weights.append(weights(module.rule))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks on the machine, which have no place between lines of progress."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
