"""MetaTrainer: meta-training of an update rule as an ordinary LightningModule.

An estimator's gradient g reaches Lightning through the surrogate loss sum(theta * g), whose gradient is g. So this is
automatic optimization, and everything that a Trainer does with gradients works: clipping, accumulation, averaging over
processes, any optimizer. Each random draw has a generator of its own, seeded by its purpose (seed, process, step,
task). So resuming a run needs no generator states; the inner runs are in the checkpoint.
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
    StepNumbers,
    TaskLike,
    adamw,
    assign_tasks,
    check_number,
    check_patterns,
    cosine,
    make_labels,
    make_tasks,
    matches,
)
from lightning_lopt.meta.estimators import Estimate, Estimator, Gradients
from lightning_lopt.meta.unroll import Unroll, full_precision
from lightning_lopt.meta.validation import meta_validate
from lightning_lopt.plugin import disk_errors
from lightning_lopt.rules import UpdateRule, compute_dtype
from lightning_lopt.rules import make as make_rule
from lightning_lopt.tasks import Task
from lightning_lopt.tasks.base import check_choice

SCHEDULES = ("cosine", "constant")
CHECKPOINT_KEY = "meta_training"


class MetaTrainer(L.LightningModule):
    """Trains the meta-parameters of an update rule on tasks.

    Logs at the end of each epoch: `meta_loss` and `meta_loss/<task>`, means over its steps; `meta_loss_best`;
    `meta_grad_norm`, before clipping; `nonfinite_tasks`, the number of tasks in a step whose losses or gradients were
    not finite and counted as zero; and, with meta-validation, `val/meta_loss`, `val/best` and `val/final/<task>`.

    `meta_loss` is measured on inner runs in progress. At first it falls just because these runs advance, so compare
    rules by `val/meta_loss`.

    Args:
        rule: the rule, which is trained in place; or a name, directory or Hub id, as for `load_rule`, to continue from;
            or `{"kind": ..., **config}`, as for `rules.make`, initialized from `seed`.
        tasks: tasks for meta-training: names as for `tasks.make`, pairs (name, options), or tasks.
        estimator: estimator of the meta-gradient. Each task has inner runs of its own.
        objective: "log", "ratio", "clipped" or "raw", see `Unroll`.
        second_order: let meta-gradients flow through the tasks' gradients; for estimators that backpropagate.
        tell_horizon: give the rule the length of its run.
        compiled: run inner steps as compiled code, see `Unroll`; for estimators that do not backpropagate.
        tasks_per_step: number of tasks that a step advances in each process, in rotation over all of them (default: all
            tasks in every process, each process with its own runs and perturbations).
        normalize: scale each task's meta-gradient to norm 1 before averaging, so that all tasks have the same weight.
            "tensor" does so for each meta-parameter separately (Schroeter's thesis, section 5.3.2).
        trainable: patterns of the meta-parameters that learn, such as "w*". The others are fixed and not perturbed.
        zero: patterns of the meta-parameters that start at zero. ("w2",) starts STAR with its nominal term only.
        lr: learning rate of the meta-optimizer, AdamW.
        weight_decay: decoupled weight decay of the meta-optimizer, multiplied by lr.
        schedule: schedule of lr: "cosine", down to zero at the end of the Trainer's run, or "constant".
        lr_factors: pattern -> factor on lr; the first match counts. Default: {"*_decays": 0.1}, because the logarithmic
            decay offsets are about a hundred times as sensitive as weights.
        validation_tasks: held-out tasks, given like `tasks`. Each is run with the current rule, with the same seeds
            every time.
        validation_horizon: length of these runs in steps.
        validation_seeds: runs per task.
        steps_per_epoch: training steps between two validations, and between two rows of the logs.
        export: directory into which a fit saves the rule at its end, with the current weights. The weights that a
            ModelCheckpoint with a `monitor` has selected are saved in its subdirectory `best`.
        seed: seed of everything random.

    Raises:
        ValueError: for an unknown task, objective, schedule, kind or pattern.

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
        rule: dict[str, Any] | str | UpdateRule,  # jsonargparse tries these in order, so a mapping stays a dict
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
        self.seed = seed
        self.export = export
        self.rule = _make_rule(rule, seed)
        self.tasks = make_tasks(tasks)
        self.labels = make_labels(self.tasks)
        self.tasks_per_step = len(tasks) if tasks_per_step is None else tasks_per_step
        self.estimator = estimator
        self.normalize = normalize
        self.lr = lr
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.lr_factors = {"*_decays": 0.1} if lr_factors is None else lr_factors
        self.validation_tasks = make_tasks(validation_tasks)
        self.validation_labels = make_labels(self.validation_tasks)
        self.validation_horizon = validation_horizon
        self.validation_seeds = validation_seeds
        self.steps_per_epoch = steps_per_epoch
        self.unroll_options: dict[str, Any] = {
            "objective": objective,
            "tell_horizon": tell_horizon,
            "second_order": second_order,
            "compiled": compiled,
        }
        self._compile_cache: dict[Any, Any] = {}
        # A Trainer's precision is for the meta-optimizer. Inner runs have the rule's own, float32 at least.
        self._dtypes = {name: compute_dtype(p.dtype) for name, p in self.rule.named_parameters()}
        self._check()
        self._prepare_rule(trainable, zero)
        check_patterns("lr_factors", lr_factors or (), dict(self.rule.named_parameters()))
        self.meta_loss = MeanMetric(nan_strategy="ignore")
        self.val_loss = MeanMetric(nan_strategy="ignore")
        self.task_losses = torch.nn.ModuleList(MeanMetric(nan_strategy="ignore") for _ in self.tasks)
        self.best = {"meta_loss": math.inf, "val/meta_loss": math.inf}
        if not self.validation_tasks:  # Lightning then sees a module without validation
            self.val_dataloader = self.validation_step = None  # type: ignore[assignment,method-assign]
        self._states: list[Any] = []  # of the estimator, one per task
        self._restored: dict[str, Any] | None = None  # from a checkpoint, until `on_fit_start`

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the compiled code, which cannot be pickled; ddp_spawn pickles the module."""
        return {**super().__getstate__(), "_compile_cache": {}}

    # --- Training ---

    def train_dataloader(self) -> StepNumbers:
        """Return the step numbers of an epoch."""
        return StepNumbers(self.steps_per_epoch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Advance this step's tasks; return the surrogate loss, whose gradient is the mean of their estimates."""
        # Not the optimizer's step, which several batches have in common under gradient accumulation.
        number = self.trainer.fit_loop.total_batch_idx
        assigned = assign_tasks(
            number,
            num_processes=self.trainer.world_size,
            tasks_per_process=self.tasks_per_step,
            num_tasks=len(self.tasks),
        )
        with full_precision(self.device):
            estimates = {index: self._estimate(index, number) for index in assigned[self.global_rank]}
        grads = self._average([estimate.meta_grad for estimate in estimates.values()])
        self._log_step(estimates, grads, sorted({index for indices in assigned for index in indices}))
        return torch.stack([(p * grads[name].to(p.dtype)).sum() for name, p in self._learned().items()]).sum()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make AdamW with the schedule; LightningCLI's `--optimizer` replaces it."""
        optimizer = adamw(self._learned(), self.lr, self.weight_decay, self.lr_factors)
        if self.schedule == "constant":
            return optimizer
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total) or total < 1:
            raise MisconfigurationException(
                "schedule='cosine' needs a run of known length: give the Trainer max_steps or max_epochs, or use "
                "schedule='constant'."
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine(optimizer, total), "interval": "step"}}

    def on_fit_start(self) -> None:
        """Draw the inner runs or restore them from the checkpoint; check that checkpoints can be written."""
        disk_errors.check_writable(self.trainer)
        meta_params = self._meta_params(learned=True)
        self._states = [
            self.estimator.init(self._unroll(task), meta_params, self._generator("start", self.global_rank, index))
            for index, task in enumerate(self.tasks)
        ]
        # A module that load_from_checkpoint has loaded starts a new run.
        if self._restored is not None and self.trainer.ckpt_path is not None:
            try:
                self._states = checkpoints.restore(
                    self._restored, self._states, self.labels, self.global_rank, self.trainer.world_size
                )
            except ValueError as error:
                raise MisconfigurationException(str(error)) from None
            self.best = dict(self._restored["best"])
        self._restored = None

    def on_train_epoch_end(self) -> None:
        """Log the lowest epoch mean of the meta-loss so far."""
        self._log_best("meta_loss", self.meta_loss, "meta_loss_best")

    def configure_callbacks(self) -> Callback:
        """Return a callback that explains errors about a full disk."""
        return disk_errors.ExplainDiskErrors()

    # --- Meta-validation ---

    def val_dataloader(self) -> range:
        """Return the numbers of the validation tasks; each is a batch."""
        return range(len(self.validation_tasks))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Run the rule on one held-out task."""
        index = int(batch)
        # The runs are the same in every process, at every step, and for every seed of the meta-training.
        generator = torch.Generator(self.device).manual_seed(index)
        # torch.func's gradients do not work on inference tensors.
        with torch.inference_mode(False), full_precision(self.device):
            losses = meta_validate(
                self._unroll(self.validation_tasks[index]),
                self._meta_params(learned=True),
                horizon=self.validation_horizon,
                num_runs=self.validation_seeds,
                generator=generator,
            )
        self.val_loss.update(_or_nan(losses.meta_loss))
        self.log("val/meta_loss", self.val_loss, prog_bar=True, batch_size=1)
        self.log(f"val/final/{self.validation_labels[index]}", losses.final, sync_dist=True, batch_size=1)

    def on_validation_epoch_end(self) -> None:
        """Log the lowest validation loss so far."""
        if self.validation_tasks and not self.trainer.sanity_checking:
            self._log_best("val/meta_loss", self.val_loss, "val/best")

    # --- Files ---

    def setup(self, stage: str) -> None:
        """Move the tasks' data to the device of the rule."""
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
        for key, own in {"kind": self.rule.kind, "config": self.rule.config.to_dict()}.items():
            if saved[key] != own:
                raise MisconfigurationException(
                    f"The checkpoint's rule has {key} {saved[key]}, but this one has {own}. Pass the same rule as then."
                )
        self._restored = saved

    def save(self, directory: str | Path, *, checkpoint: str | Path | None = None, card: str | None = None) -> Path:
        """Save the rule as `save_rule` does, for use by `LearnedOptimizer`.

        Args:
            directory: target directory.
            checkpoint: save the weights of this checkpoint of the meta-training (default: the current weights).
            card: text of the model card (default: how the rule was meta-trained).
        """
        rule = copy.deepcopy(self.rule)
        if checkpoint is not None:
            weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
            rule.load_state_dict({name.removeprefix("rule."): tensor for name, tensor in weights.items()})
        return save_rule(rule, directory, card=card or self._card())

    def on_fit_end(self) -> None:
        """Save the rule to `export`, if that is given."""
        if self.export is None or not self.trainer.is_global_zero:
            return
        self.save(self.export)
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
                self.save(Path(self.export, "best"), checkpoint=callback.best_model_path)

    # --- Helpers ---

    def _estimate(self, index: int, number: int) -> Estimate:
        """Advance one task."""
        estimate = self.estimator.estimate(
            self._unroll(self.tasks[index]),
            self._meta_params(learned=True),
            self._states[index],
            self._generator("step", self.global_rank, number, index),
        )
        self._states[index] = estimate.state
        return estimate

    def _learned(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.rule.named_parameters() if p.requires_grad}

    def _unroll(self, task: Task) -> Unroll:
        frozen = self._meta_params(learned=False)
        return Unroll(self.rule, task, frozen=frozen, compile_cache=self._compile_cache, **self.unroll_options)

    def _meta_params(self, *, learned: bool) -> dict[str, Tensor]:
        """The meta-parameters that learn, or the others, in the dtype of the inner runs."""
        params = ((name, p.detach()) for name, p in self.rule.named_parameters() if p.requires_grad == learned)
        return {name: p.to(self._dtypes[name]) for name, p in params}

    def _generator(self, *key: str | int) -> torch.Generator:
        """A generator whose seed depends on the key."""
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=8).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest, "little") >> 1)

    def _average(self, grads: list[Gradients]) -> Gradients:
        """The mean of the tasks' estimates, normalized first as `normalize` says."""
        if self.normalize is True:
            norms = [_norm(grad).clamp(min=1e-30) for grad in grads]
            grads = [{name: g / norm for name, g in grad.items()} for grad, norm in zip(grads, norms, strict=True)]
        elif self.normalize == "tensor":
            grads = [{name: g / _norm({name: g}).clamp(min=1e-30) for name, g in grad.items()} for grad in grads]
        return {name: torch.stack([grad[name] for grad in grads]).mean(0) for name in grads[0]}

    def _log_step(self, estimates: dict[int, Estimate], grads: Gradients, all_tasks: Sequence[int]) -> None:
        """Log the losses of this step's tasks.

        All processes must log the same names, so each also logs the tasks of the others, with NaN, which the metrics
        ignore.
        """
        epoch: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": 1}
        for index in all_tasks:
            own = estimates.get(index)
            metric = cast(MeanMetric, self.task_losses[index])
            loss = torch.tensor(torch.nan, device=self.device) if own is None else _or_nan(own.meta_loss)
            self.meta_loss.update(loss)
            metric.update(loss)
            self.log(f"meta_loss/{self.labels[index]}", metric, **epoch)
        self.log("meta_loss", self.meta_loss, prog_bar=True, **epoch)
        self.log("meta_grad_norm", _norm(grads), sync_dist=True, **epoch)
        nonfinite = sum((~estimate.finite).float() for estimate in estimates.values())
        self.log("nonfinite_tasks", nonfinite, sync_dist=True, **epoch)

    def _log_best(self, key: str, metric: MeanMetric, name: str) -> None:
        if not metric.update_called:  # an epoch without steps; the first after a resume may be one
            return
        value = float(metric.compute())
        self.best[key] = value if value < self.best[key] else self.best[key]
        self.log(name, self.best[key], sync_dist=True, batch_size=1)

    def _check(self) -> None:
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("normalize", self.normalize, (False, True, "tensor"))
        if not self.tasks:
            raise ValueError("tasks=[] is not allowed: pass at least one task.")
        check_number("tasks_per_step", self.tasks_per_step, 1, len(self.tasks))
        for name in ("validation_horizon", "validation_seeds", "steps_per_epoch"):
            check_number(name, getattr(self, name), 1)
        for name in ("lr", "weight_decay"):
            check_number(name, getattr(self, name), 0.0)
        if not isinstance(self.estimator, Estimator):
            raise ValueError(
                f"estimator={self.estimator!r} is not allowed: pass one of meta.estimators, such as PES()."
            )
        self._unroll(self.tasks[0])  # checks the unroll's options

    def _prepare_rule(self, trainable: Sequence[str], zero: Sequence[str]) -> None:
        """Select the meta-parameters that learn, and zero those that start at zero."""
        names = [name for name, _ in self.rule.named_parameters()]
        check_patterns("trainable", trainable, names)
        check_patterns("zero", zero, names)
        if not trainable:
            raise ValueError("trainable=[] leaves nothing to learn: pass patterns of the meta-parameters that learn.")
        for name, param in self.rule.named_parameters():
            param.requires_grad_(matches(name, trainable))
            if matches(name, zero):
                torch.nn.init.zeros_(param)

    def _card(self) -> str:
        """The default model card, which says how the rule was meta-trained."""
        learned = sum(p.numel() for p in self._learned().values())
        best = self.best["val/meta_loss"]
        rows = {
            "kind": f"{self.rule.kind}, {self.rule.num_meta_params()} meta-parameters, of which {learned} learn",
            "meta-trained on": ", ".join(self.labels),
            "estimator": f"`{self.estimator}`",
            "unroll": f"`{self.unroll_options}`",
            "meta-optimizer": (
                f"lr {self.lr}, {self.schedule}, factors {self.lr_factors}, weight decay {self.weight_decay}"
            ),
            "seed": str(self.seed),
        }
        if self._trainer is not None:
            rows["steps"] = f"{self.trainer.global_step} on {self.trainer.world_size} processes"
        if math.isfinite(best):
            runs = f"{self.validation_seeds} runs of {self.validation_horizon} steps"
            rows["lowest val/meta_loss"] = f"{best:.4f} on {', '.join(self.validation_labels)}, {runs} each"
        lines = [f"# {self.rule.kind}", "", "Meta-trained by lightning_lopt's MetaTrainer.", "", "| | |", "|---|---|"]
        return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows.items()), ""])


def _make_rule(rule: UpdateRule | str | Mapping[str, Any], seed: int) -> UpdateRule:
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
    """The loss, with NaN, which the metrics ignore, in place of infinity."""
    return torch.where(loss.isfinite(), loss, torch.nan)
