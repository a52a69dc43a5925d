"""Meta-training for claims: through `MetaTrainer`, cached, with checkpoints of the meta-parameters."""

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

from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.evaluation.compare import fingerprint
from lightning_lopt.meta.estimators import Estimator
from lightning_lopt.meta.trainer import MetaTrainer
from lightning_lopt.rules import UpdateRule, make
from lightning_lopt.tasks import Task


class Checkpoints(NamedTuple):
    """Meta-parameters at the start of a meta-training, every so many steps, and at its end."""

    steps: list[int]
    meta_params: list[dict[str, Tensor]]


def meta_train(
    experiment: Experiment,
    label: str,
    rule: UpdateRule,
    tasks: Sequence[Task],
    estimator: Estimator,
    *,
    num_steps: int,
    every: int,
    seed: int,
    **options: Any,
) -> Checkpoints:
    """Meta-train a rule from fresh meta-parameters, or read the result from the cache.

    Args:
        experiment: caches the result.
        label: for the progress report.
        rule: the rule, whose meta-parameters are drawn anew. It is trained in place, so that calls with the same rule
            and tasks reuse what torch.compile made of them.
        tasks: see `MetaTrainer`.
        estimator: the meta-gradient estimator.
        num_steps: meta-training steps.
        every: steps between two checkpoints.
        seed: determines everything random.
        options: further arguments of `MetaTrainer`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rule.load_state_dict(make(rule.kind, **rule.config.to_dict()).state_dict())
    key = {"start": fingerprint(rule), "num_steps": num_steps, "every": every, "seed": seed, "options": repr(options)}
    key |= {"tasks": [task.name for task in tasks], "sizes": [task.num_params for task in tasks]}
    key |= {"estimator": repr(estimator)}

    def fit() -> dict[str, Any]:
        recorder = _Recorder(experiment, label, num_steps)
        compiled = {"compiled": experiment.compiled, **options}
        module = MetaTrainer(rule, list(tasks), estimator, seed=seed, steps_per_epoch=every, **compiled)
        with _quiet_lightning():
            trainer = L.Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=num_steps,
                gradient_clip_val=1.0,
                callbacks=[recorder],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module)
        return {"steps": recorder.steps, "weights": recorder.weights}

    found = experiment.cached("meta-train", key, fit)
    params = [{name: torch.tensor(value) for name, value in row.items()} for row in found["weights"]]
    return Checkpoints(found["steps"], params)


def train_rule(
    experiment: Experiment,
    label: str,
    rule: UpdateRule,
    tasks: Sequence[Task],
    estimator: Estimator,
    num_steps: int,
    **options: Any,
) -> UpdateRule:
    """Meta-train a rule in place from fresh meta-parameters, as `meta_train` does, and return it."""
    options = {"seed": 0, **options}
    found = meta_train(experiment, label, rule, tasks, estimator, num_steps=num_steps, every=num_steps, **options)
    rule.load_state_dict(found.meta_params[-1])
    return rule


def reset_compiler() -> None:
    """Drop all code that torch.compile has made: it stops compiling a function after a few versions per process."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class _Recorder(L.Callback):
    """Records the meta-parameters during meta-training."""

    def __init__(self, experiment: Experiment, label: str, num_steps: int) -> None:
        self.experiment = experiment
        self.label = label
        self.num_steps = num_steps
        self.steps: list[int] = []
        self.weights: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the fresh meta-parameters."""
        self._record(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Report progress."""
        self.experiment.progress(self.label, trainer.global_step, self.num_steps)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the current meta-parameters."""
        self._record(trainer, pl_module)

    def _record(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, MetaTrainer)
        self.steps.append(trainer.global_step)
        self.weights.append({name: param.detach().tolist() for name, param in module.rule.named_parameters()})


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence Lightning's advice on the machine, which would interrupt the progress report."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
