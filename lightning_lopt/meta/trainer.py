"""MetaTrainer: the meta-training of an update rule as an ordinary LightningModule.

The estimators' gradient g reaches Lightning through the surrogate loss sum(theta * g), whose gradient is g. So this is
automatic optimization, and everything that a Trainer does with gradients works: clipping, accumulation, averaging over
processes, any optimizer. Every random number comes from a generator of its own, seeded by what it is for (seed,
process, step, task), so that a resumed run needs none of their states; the inner runs are in the checkpoint.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_lopt.hub import load_rule, save_rule
from lightning_lopt.meta import checkpoints
from lightning_lopt.meta.arguments import (
    Steps,
    TaskLike,
    adamw,
    check_number,
    check_patterns,
    cosine,
    make_labels,
    make_tasks,
    matches,
    take_turns,
)
from lightning_lopt.meta.estimators import Estimate, Estimator, Gradients
from lightning_lopt.meta.unroll import Unroll, full_precision
from lightning_lopt.meta.validation import score
from lightning_lopt.plugin import disk_errors
from lightning_lopt.rules import UpdateRule, compute_dtype
from lightning_lopt.rules import make as make_rule
from lightning_lopt.tasks import Task
from lightning_lopt.tasks.base import check_choice

SCHEDULES = ("cosine", "constant")
CHECKPOINT_KEY = "meta_training"


class MetaTrainer(L.LightningModule):
    """Learns a rule's meta-parameters on tasks.

    Logs at the end of each epoch: `meta_loss` and `meta_loss/<task>`, means over its steps; `meta_loss_best`;
    `meta_grad_norm`, before clipping; `nonfinite_tasks`, how many tasks of a step had losses or gradients that were not
    finite and counted as zero; and from meta-validation `val/meta_loss`, `val/best` and `val/final/<task>`.

    `meta_loss` is that of inner runs under way: at first it falls because they get on. Judge by `val/meta_loss`.

    Args:
        rule: the rule, which is trained in place. Or a name, directory or Hub id, as for `load_rule`, to go on from. Or
            `{"kind": ..., **config}`, as for `rules.make`, drawn from `seed`.
        tasks: what to meta-train on: names as for `tasks.make`, pairs (name, options), or tasks.
        estimator: of the meta-gradient; each task has inner runs of its own.
        objective: "log", "ratio", "clipped" or "raw", see `Unroll`.
        second_order: let meta-gradients flow through the tasks' gradients; for estimators that backpropagate.
        tell_horizon: give the rule the length of its run.
        compiled: inner steps by compiled code, as in `Unroll`; for estimators that do not backpropagate.
        tasks_per_step: tasks that a step advances in each process, in rotation over all of them (default: all tasks in
            every process, on runs and perturbations of its own).
        normalize: scale each task's meta-gradient to norm 1 before averaging, so that all tasks count alike; "tensor":
            each meta-parameter's part of it (Schroeter's thesis, section 5.3.2).
        trainable: patterns of the meta-parameters that learn, as "w*"; the others stay, and are not perturbed either.
        zero: patterns of the meta-parameters that start at zero. ("w2",) starts STAR as its nominal term alone.
        lr: of the meta-optimizer, AdamW.
        weight_decay: of the meta-optimizer, decoupled, multiplied by lr.
        schedule: of lr: "cosine", down to zero at the end of the Trainer's run, or "constant".
        lr_factors: pattern -> factor on lr; the first that matches counts. Default: {"*_decays": 0.1}, for the
            logarithmic decay offsets are a hundred times as sensitive as weights.
        validation_tasks: held-out tasks, as `tasks`. Each is run with the rule as it is, from the same seeds each time.
        validation_horizon: length of these runs in steps.
        validation_seeds: runs per task.
        steps_per_epoch: training steps between two validations and between two rows in the logs.
        export: directory into which the rule is saved at the end of a fit, with the current weights; those that a
            ModelCheckpoint with a `monitor` picked go into its subdirectory `best`.
        seed: everything random follows from it.

    Raises:
        ValueError: unknown task, objective, schedule, kind or pattern.

    Example:
        >>> import lightning_lopt as lopt
        >>> from lightning_lopt.meta.estimators import PES
        >>> rule = lopt.rules.make("star", nominal_stepsize=1e-2, step_mult=1e-4)
        >>> meta = lopt.MetaTrainer(rule, ["digits-mlp", ("digits-mlp", {"hidden": (16, 16)})], PES(), zero=["w2"])
        >>> meta.labels
        ['digits-mlp', 'digits-mlp-2']
    """

    def __init__(
        self,
        rule: dict[str, Any] | str | UpdateRule,  # jsonargparse tries in this order: a mapping is never a class's
        tasks: Sequence[TaskLike],
        estimator: Estimator,
        *,
        objective: str = "log",
        second_order: bool = True,
        tell_horizon: bool = True,
        compiled: bool = False,
        tasks_per_step: int | None = None,
        normalize: bool | str = False,
        trainable: Sequence[str] = ("*",),
        zero: Sequence[str] = (),
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: str = "cosine",
        lr_factors: dict[str, float] | None = None,
        validation_tasks: Sequence[TaskLike] = (),
        validation_horizon: int = 1000,
        validation_seeds: int = 4,
        steps_per_epoch: int = 50,
        export: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.seed, self.export = seed, export
        self.rule = _rule(rule, seed)
        self.tasks, self.validation_tasks = make_tasks(tasks), make_tasks(validation_tasks)
        self.labels, self.validation_labels = make_labels(self.tasks), make_labels(self.validation_tasks)
        self.estimator, self.normalize = estimator, normalize
        self.tasks_per_step = len(tasks) if tasks_per_step is None else tasks_per_step
        self.lr, self.weight_decay, self.schedule = lr, weight_decay, schedule
        self.lr_factors = {"*_decays": 0.1} if lr_factors is None else lr_factors
        self.validation_horizon, self.validation_seeds = validation_horizon, validation_seeds
        self.steps_per_epoch = steps_per_epoch
        self.unroll_options: dict[str, Any] = {"objective": objective, "tell_horizon": tell_horizon}
        self.unroll_options |= {"second_order": second_order, "compiled": compiled}
        self._compile_cache: dict[Any, Any] = {}
        # A Trainer's precision is for the meta-optimizer. Inner runs have the rule's own, float32 at least.
        self._dtypes = {name: compute_dtype(p.dtype) for name, p in self.rule.named_parameters()}
        self._check()
        self._prepare_rule(trainable, zero)
        check_patterns("lr_factors", lr_factors or (), dict(self.rule.named_parameters()))
        self.meta_loss, self.val_loss = MeanMetric(nan_strategy="ignore"), MeanMetric(nan_strategy="ignore")
        self.task_losses = torch.nn.ModuleList(MeanMetric(nan_strategy="ignore") for _ in self.tasks)
        self.best = {"meta_loss": math.inf, "val/meta_loss": math.inf}
        if not self.validation_tasks:  # as Lightning sees it, this is then a module without validation
            self.val_dataloader = self.validation_step = None  # type: ignore[assignment,method-assign]
        self._states: list[Any] = []  # of the estimator, one per task
        self._restored: dict[str, Any] | None = None  # from a checkpoint, until `on_fit_start`

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the compiled code, which cannot be pickled; ddp_spawn pickles the module."""
        return {**super().__getstate__(), "_compile_cache": {}}

    # --- Training ---

    def train_dataloader(self) -> Steps:
        """The steps of an epoch."""
        return Steps(self.steps_per_epoch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Advance the tasks whose turn it is; the surrogate loss, whose gradient is the mean of their estimates."""
        # Not the optimizer's step: under gradient accumulation several batches share one.
        number = self.trainer.fit_loop.total_batch_idx
        turns = take_turns(number, self.trainer.world_size, self.tasks_per_step, len(self.tasks))
        with full_precision(self.device):
            estimates = {index: self._estimate(index, number) for index in turns[self.global_rank]}
        learned = {name: p for name, p in self.rule.named_parameters() if p.requires_grad}
        grads = self._average([estimate.meta_grad for estimate in estimates.values()])
        self._log_step(estimates, grads, sorted({index for turn in turns for index in turn}))
        return torch.stack([(p * grads[name].to(p.dtype)).sum() for name, p in learned.items()]).sum()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with the schedule; LightningCLI's `--optimizer` takes its place."""
        learned = {name: p for name, p in self.rule.named_parameters() if p.requires_grad}
        optimizer = adamw(learned, self.lr, self.weight_decay, self.lr_factors)
        if self.schedule == "constant":
            return optimizer
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total) or total < 1:
            raise MisconfigurationException(
                "schedule='cosine' is not allowed in a run of unknown length: give the Trainer max_steps or "
                "max_epochs, or use schedule='constant'."
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine(optimizer, total), "interval": "step"}}

    def on_fit_start(self) -> None:
        """Draw the inner runs, or take those of the checkpoint up again; look where checkpoints will go."""
        disk_errors.check_writable(self.trainer)
        meta_params = self._meta_params(learned=True)
        self._states = [
            self.estimator.init(self._unroll(task), meta_params, self._generator("start", self.global_rank, index))
            for index, task in enumerate(self.tasks)
        ]
        # A module that was loaded without a Trainer, by load_from_checkpoint, begins a new run.
        if self._restored is not None and self.trainer.ckpt_path is not None:
            arguments = self._restored, self._states, self.labels, self.global_rank, self.trainer.world_size
            try:
                self._states = checkpoints.restore(*arguments)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from None
            self.best = dict(self._restored["best"])
        self._restored = None

    def on_train_epoch_end(self) -> None:
        """Log the lowest epoch mean of the meta-loss so far."""
        self._log_best("meta_loss", self.meta_loss, "meta_loss_best")

    def configure_callbacks(self) -> Callback:
        """One that tells how to go on where the disk is full."""
        return disk_errors.ExplainDiskErrors()

    # --- Meta-validation ---

    def val_dataloader(self) -> range:
        """The numbers of the validation tasks: each is a batch."""
        return range(len(self.validation_tasks))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Run the rule on one held-out task."""
        index, length, seeds = int(batch), self.validation_horizon, self.validation_seeds
        # The runs are the same in every process, at every step and for every seed of the training.
        generator = torch.Generator(self.device).manual_seed(index)
        # torch.func's gradients do not work on inference tensors.
        with torch.inference_mode(False), full_precision(self.device):
            unroll = self._unroll(self.validation_tasks[index])
            result = score(unroll, self._meta_params(learned=True), length, seeds, generator)
        self.val_loss.update(_or_nan(result.meta_loss))
        self.log("val/meta_loss", self.val_loss, prog_bar=True, batch_size=1)
        self.log(f"val/final/{self.validation_labels[index]}", result.final, sync_dist=True, batch_size=1)

    def on_validation_epoch_end(self) -> None:
        """Log the lowest validation loss so far."""
        if self.validation_tasks and not self.trainer.sanity_checking:
            self._log_best("val/meta_loss", self.val_loss, "val/best")

    # --- Files ---

    def setup(self, stage: str) -> None:
        """Move the tasks' data to where the rule will be."""
        device = self.trainer.strategy.root_device
        self.tasks = [task.to(device) for task in self.tasks]
        self.validation_tasks = [task.to(device) for task in self.validation_tasks]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the inner runs of all processes; after an exception those of this process only.

        Lightning saves a checkpoint in all processes, but an exception may have stopped only some of them.
        """
        checkpoint[CHECKPOINT_KEY] = {
            "kind": self.rule.kind,
            "config": self.rule.config.to_dict(),
            "best": dict(self.best),
            **checkpoints.pack(self._states, self.labels, gather=not self.trainer.interrupted),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the inner runs for `on_fit_start`.

        Raises:
            MisconfigurationException: if the checkpoint's rule is of another kind or configuration.
        """
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None:
            raise MisconfigurationException("The checkpoint was not made by MetaTrainer. Pass one that was.")
        for key, mine in {"kind": self.rule.kind, "config": self.rule.config.to_dict()}.items():
            if saved[key] != mine:
                raise MisconfigurationException(
                    f"The checkpoint's rule has {key} {saved[key]}, and this one {mine}. Pass the rule that was saved."
                )
        self._restored = saved

    def save(self, directory: str | Path, *, checkpoint: str | Path | None = None, card: str | None = None) -> Path:
        """Save the rule as `save_rule` does, to be used by `LearnedOptimizer`.

        Args:
            directory: where to.
            checkpoint: a checkpoint of this meta-training, whose weights to save in place of the current ones.
            card: text of the model card (default: how the rule was meta-trained).
        """
        rule = copy.deepcopy(self.rule)
        if checkpoint is not None:
            weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
            rule.load_state_dict({name.removeprefix("rule."): tensor for name, tensor in weights.items()})
        return save_rule(rule, directory, card=card or self._card())

    def on_fit_end(self) -> None:
        """Export the rule, where that was asked for."""
        if self.export is None or not self.trainer.is_global_zero:
            return
        self.save(self.export)
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
                self.save(Path(self.export, "best"), checkpoint=callback.best_model_path)

    # --- Parts ---

    def _estimate(self, index: int, number: int) -> Estimate:
        """Advance one task."""
        generator = self._generator("step", self.global_rank, number, index)
        arguments = self._unroll(self.tasks[index]), self._meta_params(learned=True), self._states[index], generator
        estimate = self.estimator.estimate(*arguments)
        self._states[index] = estimate.state
        return estimate

    def _unroll(self, task: Task) -> Unroll:
        frozen = self._meta_params(learned=False)
        return Unroll(self.rule, task, frozen=frozen, compile_cache=self._compile_cache, **self.unroll_options)

    def _meta_params(self, *, learned: bool) -> dict[str, Tensor]:
        """Those that learn, or the others, in the dtype of the inner runs."""
        params = ((name, p.detach()) for name, p in self.rule.named_parameters() if p.requires_grad == learned)
        return {name: p.to(self._dtypes[name]) for name, p in params}

    def _generator(self, *key: str | int) -> torch.Generator:
        """A generator of its own for each key."""
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=8).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest, "little") >> 1)

    def _average(self, grads: list[Gradients]) -> Gradients:
        """The mean of the tasks' estimates, each scaled to norm 1 first where that was asked for."""
        if self.normalize:
            whole = self.normalize is True
            grads = [{k: g / _norm(a if whole else {k: g}).clamp(min=1e-30) for k, g in a.items()} for a in grads]
        return {name: torch.stack([grad[name] for grad in grads]).mean(0) for name in grads[0]}

    def _log_step(self, estimates: dict[int, Estimate], grads: Gradients, everywhere: Sequence[int]) -> None:
        """Log the tasks of this process and, with nothing to add, those of the others: all must log the same names."""
        epoch: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": 1}
        for index in everywhere:
            mine = estimates.get(index)
            metric = cast(MeanMetric, self.task_losses[index])
            loss = torch.tensor(torch.nan, device=self.device) if mine is None else _or_nan(mine.meta_loss)
            self.meta_loss.update(loss)
            metric.update(loss)
            self.log(f"meta_loss/{self.labels[index]}", metric, **epoch)
        self.log("meta_loss", self.meta_loss, prog_bar=True, **epoch)
        self.log("meta_grad_norm", _norm(grads), sync_dist=True, **epoch)
        nonfinite = sum((~estimate.finite).float() for estimate in estimates.values())
        self.log("nonfinite_tasks", nonfinite, sync_dist=True, **epoch)

    def _log_best(self, key: str, metric: MeanMetric, name: str) -> None:
        if not metric.update_called:  # an epoch without steps, as the first after a resume may be
            return
        value = float(metric.compute())
        self.best[key] = value if value < self.best[key] else self.best[key]
        self.log(name, self.best[key], sync_dist=True, batch_size=1)

    def _check(self) -> None:
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("normalize", self.normalize, (False, True, "tensor"))
        if not self.tasks:
            raise ValueError("tasks=[] is not allowed: give at least one.")
        check_number("tasks_per_step", self.tasks_per_step, 1, len(self.tasks))
        for name in ("validation_horizon", "validation_seeds", "steps_per_epoch"):
            check_number(name, getattr(self, name), 1)
        for name in ("lr", "weight_decay"):
            check_number(name, getattr(self, name), 0.0)
        if not isinstance(self.estimator, Estimator):
            raise ValueError(f"estimator={self.estimator!r} is not allowed: pass one of meta.estimators, as PES().")
        self._unroll(self.tasks[0])  # checks its options

    def _prepare_rule(self, trainable: Sequence[str], zero: Sequence[str]) -> None:
        """Choose what learns and what starts at zero."""
        check_patterns("trainable", trainable, names := [name for name, _ in self.rule.named_parameters()])
        check_patterns("zero", zero, names)
        if not trainable:
            raise ValueError("trainable=[] leaves nothing to learn: give patterns of the meta-parameters that do.")
        for name, param in self.rule.named_parameters():
            param.requires_grad_(matches(name, trainable))
            if matches(name, zero):
                torch.nn.init.zeros_(param)

    def _card(self) -> str:
        """How the rule was meta-trained."""
        learned = sum(p.numel() for p in self.rule.parameters() if p.requires_grad)
        best, factors = self.best["val/meta_loss"], self.lr_factors
        rows = {
            "kind": f"{self.rule.kind}, {self.rule.num_meta_params()} meta-parameters, of which {learned} learn",
            "meta-trained on": ", ".join(self.labels),
            "estimator": f"`{self.estimator}`",
            "unroll": f"`{self.unroll_options}`",
            "meta-optimizer": f"lr {self.lr}, {self.schedule}, factors {factors}, weight decay {self.weight_decay}",
            "seed": str(self.seed),
        }
        if self._trainer is not None:
            rows["steps"] = f"{self.trainer.global_step} on {self.trainer.world_size} processes"
        if math.isfinite(best):
            runs = f"{self.validation_seeds} runs of {self.validation_horizon} steps"
            rows["lowest val/meta_loss"] = f"{best:.4f} on {', '.join(self.validation_labels)}, {runs} each"
        lines = [f"# {self.rule.kind}", "", "Meta-trained by lightning_lopt's MetaTrainer.", "", "| | |", "|---|---|"]
        return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows.items()), ""])


def _rule(rule: UpdateRule | str | Mapping[str, Any], seed: int) -> UpdateRule:
    if isinstance(rule, UpdateRule):
        return rule
    if isinstance(rule, str):
        return load_rule(rule)
    if not isinstance(rule, Mapping) or "kind" not in rule:
        raise ValueError(
            f"rule={rule!r} is not allowed: pass a rule, a name for load_rule, or a mapping with a 'kind'."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_rule(**rule)


def _norm(grads: Gradients) -> Tensor:
    return torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()


def _or_nan(loss: Tensor) -> Tensor:
    """NaN, which the metrics leave out, in place of infinity."""
    return torch.where(loss.isfinite(), loss, torch.nan)
