"""LearnedOptimizer: the one line that has a learned optimizer train an ordinary LightningModule.

Lightning has no hook for replacing optimizers. While a fit lasts, the callback therefore wraps methods of the Trainer's
strategy object: `setup_optimizers`, after which the user's optimizers, schedulers and parameter groups are parsed and
validated and each optimizer is replaced by a `RuleOptimizer` over the same groups; `backward`, the one place that sees
every loss unscaled; and for averaged weights two more. The user's module is never touched, and the methods are put back
when the fit ends, also by an exception.
"""

from __future__ import annotations

import copy
import importlib
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor
from torch.optim import Optimizer

from lightning_lopt import kernels
from lightning_lopt.hub import load_rule
from lightning_lopt.optimizer import RuleOptimizer, checkpoints
from lightning_lopt.plugin import announcement, disk_errors, rule_record, run_length
from lightning_lopt.plugin.arguments import NumSteps, Selectors, check_arguments
from lightning_lopt.plugin.fit_checks import FitChecks
from lightning_lopt.plugin.replacement import Replacement, is_mock, replace_optimizers
from lightning_lopt.plugin.strategy_hooks import LossRecorder, StrategyHooks
from lightning_lopt.plugin.weight_averaging import AveragedWeights, fraction_of
from lightning_lopt.rules import UpdateRule

_REFUSED_STRATEGIES = {
    "DeepSpeedStrategy": "DeepSpeed owns the optimizer and flattens the parameters; "
    "use strategy='ddp' or ModelParallelStrategy.",
    "FSDPStrategy": "FSDP1 flattens the parameters, and the rule needs each tensor's shape; "
    "use ModelParallelStrategy (FSDP2).",
}


def _pytorch_lightnings_callback() -> tuple[type, ...]:
    """The Callback of a `pytorch_lightning` of 2.0 to 2.5, whose Trainer takes only callbacks of its own class.

    Its version is not that of `lightning`: packages that build on it pin it on their own.
    """
    try:
        major, minor = metadata.version("pytorch-lightning").split(".")[:2]
    except metadata.PackageNotFoundError:
        return ()
    if not (2, 0) <= (int(major), int(minor)) < (2, 6):
        return ()
    return (importlib.import_module("pytorch_lightning").Callback,)


class _Fit:
    """What the callback keeps of one running fit."""

    def __init__(self) -> None:
        self.hooks: StrategyHooks | None = None
        self.replacement = Replacement([], [])
        self.checks = FitChecks([], scales=False)
        self.length = run_length.ToldLength()
        self.fallen_back: set[int] = set()  # positions of the optimizers whose fallback has been announced

    def rule_optimizers(self) -> list[RuleOptimizer]:
        return [pair.new for pair in self.replacement.replaced]


class LearnedOptimizer(Callback, *_pytorch_lightnings_callback()):  # type: ignore[misc]
    """Trains the module by a learned update rule in place of the optimizers that its `configure_optimizers` returns.

    Everything else works as before: parameter groups, schedulers (they keep stepping and being logged), checkpoints and
    resume, accumulation, clipping, precision, manual optimization. The module must define `configure_optimizers`, as
    Lightning requires. Every `log_every_n_steps` steps the callback logs `lopt/update_rms` (root mean square change of
    the parameters), `lopt/nominal_share` (the nominal term's fraction of the update, 0 to 1) and `lopt/skipped`
    (updates skipped by the safeguard).

    Args:
        rule: the update rule (the callback copies it), or a name or path for `lightning_lopt.load_rule`.
        lr: "ignore" (default): the module's learning rate is logged and has no effect. "scale": the update is
            multiplied by lr / reference_lr, so schedules take effect.
        reference_lr: for lr="scale": the learning rate at which the update has its full size. Default: the largest
            initial lr of the groups (max_lr under OneCycleLR and CyclicLR). For a schedule that climbs, pass its peak.
        weight_decay: "rule" (default): the decay that the rule has, if any; the module's own is ignored.
            "decoupled": the groups' own weight decay, as AdamW applies it, in place of the rule's. "ignore": none.
        strength: multiplier of every step. The first thing to try (0.3, 0.1) where a run is too bold, or must forget
            little. A parameter group may have a `strength` of its own, which multiplies this one.
        num_steps: the run's length in steps of each optimizer; rules with a schedule anneal over it. "auto" (default):
            taken from the Trainer, or unknown where it cannot be known (a Timer, EarlyStopping with Lightning's default
            max_epochs, reloaded dataloaders, manual optimization of several optimizers). A module that steps its one
            optimizer by hand is taken to do so once a batch, until its batches show otherwise; then the length is the
            number of batches times the steps that they have taken on average. None: unknown.
        only: replace only these optimizers, given as positions in what `configure_optimizers` returns or as exact
            classes. Default: all.
        skip: do not replace these optimizers, given likewise. SparseAdam is never replaced.
        average: True: validation, checkpoints and the module at the end of the fit have the mean of the weights over
            the last part of the run (a fifth, if the rule does not say), with running statistics of normalization
            layers likewise. Where the length is unknown, or EarlyStopping may end the run, the window grows with the
            run. Resuming goes on with the weights that are trained, which checkpoints hold, too. "rule" (default): as
            the rule says (`UpdateRule.average_fraction`). False: no averages.
        safeguard: True (default): skip, count and log steps with a non-finite gradient or update, and stop with a
            RuntimeError after 20 in a row. "fallback": in addition, apply only the rule's nominal term while the loss
            is outside its trust band (see `optimizer.trust_band`), logged as `lopt/fallback`.
        backend: "auto" (default), "reference" or "fused", see `RuleOptimizer`.

    Raises:
        TypeError: if `rule` is neither an `UpdateRule` nor a name.
        ValueError: for values of the other arguments that are not allowed.
        MisconfigurationException: in `Trainer.fit`, with strategies that own or flatten the parameters, optimizers that
            cannot be replaced without loss, or a checkpoint of another rule.

    Example:
        >>> import lightning_lopt as lopt
        >>> callback = lopt.LearnedOptimizer(lopt.rules.make("hyperparam"))
        >>> callback.rule.kind
        'hyperparam'
    """

    def __init__(
        self,
        rule: UpdateRule | str | Path,
        *,
        lr: str = "ignore",
        reference_lr: float | None = None,
        weight_decay: str = "rule",
        strength: float = 1.0,
        num_steps: NumSteps = "auto",
        only: Selectors | None = None,
        skip: Selectors | None = None,
        average: bool | Literal["rule"] = "rule",
        safeguard: bool | Literal["fallback"] = True,
        backend: str = "auto",
    ) -> None:
        if isinstance(rule, str | Path):
            rule = load_rule(rule)
        if not isinstance(rule, UpdateRule):
            raise TypeError(
                f"rule must be an UpdateRule or the name of one, got {type(rule).__name__}. For a fresh rule use "
                "lightning_lopt.rules.make(kind)."
            )
        check_arguments(
            lr=lr,
            reference_lr=reference_lr,
            weight_decay=weight_decay,
            strength=strength,
            num_steps=num_steps,
            only=only,
            skip=skip,
            average=average,
        )
        # Combinations that cannot work fail here, not in the middle of a fit. Whether there is a kernel for the
        # parameters' device is only known at the start of a fit.
        at_once = "auto" if backend == "fused" and kernels.exists(rule) else backend
        RuleOptimizer([torch.zeros(1)], rule, backend=at_once, safeguard=safeguard)
        self.rule = copy.deepcopy(rule).requires_grad_(False)
        self.lr = lr
        self.reference_lr = reference_lr
        if weight_decay != "rule":
            self.rule = self.rule.without_decay()
        self.weight_decay = weight_decay
        self.strength = strength
        self.num_steps = num_steps
        self.only = only
        self.skip = skip
        self.average = average
        self.safeguard = safeguard
        self.backend = backend
        self._fits: dict[Any, _Fit] = {}  # by Trainer: one callback may serve several at once
        self._averaged: WeakKeyDictionary[Any, AveragedWeights] = WeakKeyDictionary()  # until the next fit
        self._restores = True

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        endpoint: str | None = None,
        lr: str = "ignore",
        reference_lr: float | None = None,
        weight_decay: str = "rule",
        strength: float = 1.0,
        num_steps: NumSteps = "auto",
        only: Selectors | None = None,
        skip: Selectors | None = None,
        average: bool | Literal["rule"] = "rule",
        safeguard: bool | Literal["fallback"] = True,
        backend: str = "auto",
    ) -> LearnedOptimizer:
        """A callback with a trained rule.

        Args:
            name_or_path: a directory, a bundled name (`lightning_lopt.list_pretrained()`), or a Hub id "owner/name".
            revision: branch, tag or commit of a Hub id. Pin a tag or commit in work that has to be repeated.
            token: for a private repository; default: what `hf auth login` stored.
            cache_dir: where downloads go.
            local_files_only: never use the network.
            endpoint: another Hub.
            lr: see `LearnedOptimizer`, as for all that follow.
            reference_lr: see there.
            weight_decay: see there.
            strength: see there.
            num_steps: see there.
            only: see there.
            skip: see there.
            average: see there.
            safeguard: see there.
            backend: see there.

        Raises:
            ValueError: for an unknown name, and for files that do not hold a rule.

        Example:
            >>> import lightning_lopt as lopt
            >>> lopt.LearnedOptimizer.from_pretrained("star").rule.kind
            'scheduled'
        """
        rule = load_rule(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            endpoint=endpoint,
        )
        return cls(  # named one by one, because LightningCLI reads the signature
            rule,
            lr=lr,
            reference_lr=reference_lr,
            weight_decay=weight_decay,
            strength=strength,
            num_steps=num_steps,
            only=only,
            skip=skip,
            average=average,
            safeguard=safeguard,
            backend=backend,
        )

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wrap the strategy for this fit."""
        if stage != "fit":
            return
        if why := _REFUSED_STRATEGIES.get(type(trainer.strategy).__name__):
            raise MisconfigurationException(
                f"LearnedOptimizer does not work with {type(trainer.strategy).__name__}: {why}"
            )
        if self.lr == "ignore" and any(type(c).__name__ == "LearningRateFinder" for c in trainer.callbacks):
            rank_zero_warn(
                "The learning-rate finder has nothing to find: LearnedOptimizer ignores lr. Remove the finder, or use "
                "LearnedOptimizer(lr='scale')."
            )
        # Lightning stops calling on_exception hooks at the first one that raises, and ours has to undo the wraps. So it
        # comes first. The list is a new one, because Lightning is iterating over the old one.
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]
        self._end(trainer)
        fraction = fraction_of(self.average, self.rule)
        averaged = self._averaged[trainer] = AveragedWeights(pl_module, fraction)
        averaged.check(trainer)
        self._fits[trainer] = _Fit()
        self._fits[trainer].hooks = StrategyHooks(trainer, self._replace, averaged if fraction else None)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the strategy let us replace its optimizers."""
        optimizers = [optimizer for optimizer in trainer.strategy.optimizers if not is_mock(optimizer)]
        fit = self._fits[trainer]
        for optimizer in optimizers:
            if not isinstance(optimizer, RuleOptimizer) and optimizer not in fit.replacement.left_alone:
                raise MisconfigurationException(
                    f"LearnedOptimizer could not replace {type(optimizer).__name__} under "
                    f"{type(trainer.strategy).__name__}: the strategy sets up optimizers in its own way. Use "
                    "single-device, 'ddp' or ModelParallelStrategy."
                )
        if not optimizers:
            rank_zero_warn("configure_optimizers returned None: there is no optimizer for LearnedOptimizer to replace.")
        elif not any(isinstance(optimizer, RuleOptimizer) for optimizer in optimizers):
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            rank_zero_warn(f"LearnedOptimizer replaces no optimizer: all of them are left alone ({names}).")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the optimizers how long the run is, now that the data is set up, and say what runs."""
        disk_errors.check_writable(trainer)
        fit = self._fits[trainer]
        length = self._tell_num_steps(trainer)
        run_length.check_known(self.rule, length)
        if not fit.replacement.replaced:
            return
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        options["average_fraction"] = self._averaged[trainer].fraction
        rank_zero_info(announcement.describe(self.rule, fit.replacement, length, **options))
        announcement.warn_about_coverage(pl_module, trainer.strategy.optimizers)
        if self.lr == "ignore":
            announcement.warn_about_groups(fit.rule_optimizers())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Measure the steps that will be logged."""
        if not isinstance(optimizer, RuleOptimizer):
            return
        self._fits[trainer].checks.observe(optimizer)
        if self.num_steps == "auto" and trainer.global_step == 0:
            self._fits[trainer].length.correct(trainer, stepping=True)
        if _is_logged_step(trainer):
            optimizer.measure_next_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what the measured steps did, and correct the length of a run whose steps only the module knows."""
        if self.num_steps == "auto":
            self._fits[trainer].length.correct(trainer)
        self._averaged[trainer].update(trainer, self._fits[trainer].length.steps)
        for number, optimizer in enumerate(trainer.strategy.optimizers):
            measured = optimizer.take_metrics() if isinstance(optimizer, RuleOptimizer) else None
            if measured is not None:
                suffix = f"-{number}" if number else ""
                values = {f"lopt/{k}{suffix}": v.float() for k, v in measured._asdict().items() if v is not None}
                pl_module.log_dict(values, on_step=True, on_epoch=False)
                self._announce_fallback(trainer, number, measured.fallback)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Warn if the first epoch shows that the rule does not train the module."""
        self._averaged[trainer].look_again()
        fit = self._fits[trainer]
        fit.checks.end_epoch(trainer.current_epoch)
        # Replaced optimizers hold parameters, which the module may drop in mid-training.
        fit.replacement = Replacement([], fit.replacement.left_alone)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate the averaged weights; they leave the module again after everybody's `on_validation_end`."""
        if trainer in self._fits:
            self._averaged[trainer].swap_in()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the averaged weights in the module, and report how often the safeguard intervened."""
        self._averaged[trainer].swap_in()
        optimizers = [o for o in trainer.strategy.optimizers if isinstance(o, RuleOptimizer)]
        if self.safeguard and (skipped := sum(o.num_skipped() for o in optimizers)):
            rank_zero_warn(
                f"The safeguard skipped {skipped} tensor updates that were not finite. Look for NaN in data or loss."
            )
        if handovers := sum(o.num_handovers() for o in optimizers):
            rank_zero_warn(
                f"The loss left its trust band {handovers} times; only the nominal term was applied until it returned."
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put the strategy's own methods back."""
        self._end(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the strategy's own methods back: Lightning does not call `teardown` after an exception."""
        self._end(trainer)
        disk_errors.explain(trainer, exception)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Close the gaps in state that was gathered from shards."""
        checkpoint["optimizer_states"] = [checkpoints.without_gaps(state) for state in checkpoint["optimizer_states"]]
        if self._averaged and (averaged := self._averaged.get(trainer)) is not None:
            averaged.save(checkpoint, in_shards=getattr(trainer.strategy, "_save_distributed_checkpoint", False))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Load averaged weights; note whether `load_state_dict`, which comes next, is for a fit or an evaluation."""
        self._restores = trainer.state.fn == "fit"
        if self._restores and trainer in self._averaged:
            self._averaged[trainer].load(checkpoint, trainer.ckpt_path)

    def state_dict(self) -> dict[str, Any]:
        """Which rule this is, where it came from, and its weights, as tensors and plain types."""
        return rule_record.save_record(self.rule, self._group_options())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the weights that the checkpoint was made with; do nothing if the Trainer only evaluates.

        Raises:
            MisconfigurationException: if the checkpoint's rule is of another kind or configuration.
        """
        if self._restores:
            rule_record.load_record(state_dict, self.rule, self._group_options())
        self._restores = True

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles leave the Trainers behind; weak references cannot be pickled.
        return {**self.__dict__, "_fits": {}, "_averaged": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._averaged = WeakKeyDictionary()

    def _replace(self, trainer: Any, recorder: LossRecorder) -> None:
        def make(optimizer: Optimizer) -> RuleOptimizer:
            new = self._make(optimizer)
            new.set_loss_source(recorder if self.rule.needs_loss or self.safeguard == "fallback" else None)
            if self.rule.needs_names:
                new.set_names(trainer.lightning_module.named_parameters())
            new.set_roles(trainer.lightning_module)
            return new

        fit = self._fits[trainer]
        fit.replacement = replace_optimizers(trainer.strategy, make, only=self.only, skip=self.skip)
        fit.checks = FitChecks(fit.replacement.replaced, scales=self.lr == "scale")
        self._averaged[trainer].look_again()
        if trainer.training and trainer.fit_loop.epoch_loop.batch_progress.total.ready:  # in mid-training, by the user
            self._tell_num_steps(trainer)

    def _group_options(self) -> dict[str, Any]:
        """The options that optimizer groups, and so checkpoints, hold."""
        names = ("lr", "reference_lr", "weight_decay", "strength")
        return {name: getattr(self, name) for name in names}

    def _make(self, optimizer: Optimizer) -> RuleOptimizer:
        cyclic = any("max_lr" in group for group in optimizer.param_groups)
        if self.lr == "scale" and self.reference_lr is None and cyclic:
            rank_zero_warn("lr='scale' under OneCycleLR or CyclicLR: the update is multiplied by lr / max_lr.")
        return RuleOptimizer.replacing(
            optimizer,
            self.rule,
            **self._group_options(),
            safeguard=self.safeguard,
            backend=self.backend,
        )

    def _tell_num_steps(self, trainer: Any) -> run_length.RunLength:
        """Give the run's length to our optimizers, and to the module's own RuleOptimizers that know none."""
        fit = self._fits[trainer]
        length = run_length.find_run_length(trainer, self.num_steps)
        ours = fit.rule_optimizers()
        own = [optimizer for optimizer in trainer.strategy.optimizers if isinstance(optimizer, RuleOptimizer)]
        fit.length.tell(length.steps, [optimizer for optimizer in own if optimizer in ours or not optimizer.num_steps])
        return length

    def _announce_fallback(self, trainer: Any, number: int, fallback: Tensor | None) -> None:
        """Say when the nominal term takes over, and when the rule returns; seen at the steps that are logged."""
        fallen_back = self._fits[trainer].fallen_back
        if fallback is not None and bool(fallback) != (number in fallen_back):
            fallen_back ^= {number}
            rank_zero_info(
                "LearnedOptimizer: the loss left its trust band; only the rule's nominal term is applied."
                if bool(fallback)
                else "LearnedOptimizer: the loss is back in its trust band; the whole rule is applied again."
            )

    def _end(self, trainer: Any) -> None:
        if (fit := self._fits.pop(trainer, None)) is not None and fit.hooks is not None:
            self._averaged[trainer].finish()
            fit.hooks.undo()


def _is_logged_step(trainer: Any) -> bool:
    if trainer.barebones or not trainer.log_every_n_steps:
        return False
    return bool((trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % trainer.log_every_n_steps == 0)
