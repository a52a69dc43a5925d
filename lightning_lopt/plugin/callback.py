"""LearnedOptimizer: the one line that has a learned optimizer train an ordinary LightningModule.

Lightning has no hook for it. While a fit lasts, the callback therefore wraps two methods of the Trainer's strategy
object: `setup_optimizers`, after which the user's optimizers, schedulers and parameter groups are parsed and validated
and each optimizer is replaced by a `RuleOptimizer` over the same groups, and `backward`, the one place that sees every
loss unscaled. The user's module is never touched, and both methods are put back when the fit ends, also by an
exception.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import json
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor

from lightning_lopt import kernels
from lightning_lopt.hub import load_rule
from lightning_lopt.optimizer import RuleOptimizer, checkpoints
from lightning_lopt.plugin import disk_errors
from lightning_lopt.plugin.strategy_hooks import LossRecorder, StrategyHooks, rebind
from lightning_lopt.rules import UpdateRule, compute_dtype

_REFUSED_STRATEGIES = {
    "DeepSpeedStrategy": "DeepSpeed owns the optimizer and flattens the parameters; "
    "use strategy='ddp' or ModelParallelStrategy.",
    "FSDPStrategy": "FSDP1 flattens the parameters, and the rule needs each tensor's shape; "
    "use ModelParallelStrategy (FSDP2).",
}


def _also_of() -> tuple[type, ...]:
    """The Callback of pytorch_lightning before 2.6, whose Trainer takes no callbacks of another class than its own."""
    major, minor = metadata.version("lightning").split(".")[:2]
    if (int(major), int(minor)) >= (2, 6) or importlib.util.find_spec("pytorch_lightning") is None:
        return ()
    return (importlib.import_module("pytorch_lightning").Callback,)


class LearnedOptimizer(Callback, *_also_of()):  # type: ignore[misc]
    """Trains the module by a learned update rule in place of the optimizers that its `configure_optimizers` returns.

    Everything else stays the user's: parameter groups, schedulers (they go on ticking and being logged), checkpoints
    and resume, accumulation, clipping, precision, manual optimization. A module must define `configure_optimizers`, as
    Lightning demands. Logs `lopt/update_rms` (root mean square change of the parameters), `lopt/nominal_share` (the
    nominal term's part of the update, 0 to 1) and `lopt/skipped` (updates skipped by the safeguard) every
    `log_every_n_steps`.

    Args:
        rule: the update rule; the callback keeps a copy of its own. `lightning_lopt.load_rule` and `rules.make` give
            one.
        lr: "ignore", the module's learning rate is logged and changes nothing; "scale", the update is multiplied by
            lr / its reference (the largest initial lr of the groups; max_lr under OneCycleLR and CyclicLR), so that
            schedules act.
        weight_decay: "ignore", or "decoupled": the groups' own weight decay, as AdamW applies it.
        safeguard: never let a non-finite gradient or update reach a parameter or its state; skip, count, log, and stop
            with a RuntimeError after 20 steps in a row. "fallback": besides, take the rule's nominal term alone while
            the loss is outside its trust band (see `optimizer.trust_band`), and log that as `lopt/fallback`.
        backend: "auto", "reference" or "fused", see `RuleOptimizer`.

    Raises:
        TypeError: if `rule` is no `UpdateRule`.
        ValueError: for values of the other arguments that are not allowed.
        MisconfigurationException: in `Trainer.fit`, with strategies that own or flatten the parameters, or a checkpoint
            of another rule.

    Example:
        >>> import lightning_lopt as lopt
        >>> callback = lopt.LearnedOptimizer(lopt.rules.make("hyperparam"))
        >>> callback.rule.kind
        'hyperparam'
    """

    def __init__(
        self,
        rule: UpdateRule,
        *,
        lr: str = "ignore",
        weight_decay: str = "ignore",
        safeguard: bool | Literal["fallback"] = True,
        backend: str = "auto",
    ) -> None:
        if not isinstance(rule, UpdateRule):
            raise TypeError(
                f"rule must be an UpdateRule, got {type(rule).__name__}. For a name use "
                "LearnedOptimizer.from_pretrained(name), for a fresh rule lightning_lopt.rules.make(kind)."
            )
        _check_choice("lr", lr, ("ignore", "scale"))
        _check_choice("weight_decay", weight_decay, ("ignore", "decoupled"))
        # What does not go together fails here, not in the middle of a fit.
        # Whether there is a kernel for the parameters' device is seen when that is known, at the start of a fit.
        at_once = "auto" if backend == "fused" and kernels.exists(rule) else backend
        RuleOptimizer([torch.zeros(1)], rule, backend=at_once, safeguard=safeguard)
        self.rule = copy.deepcopy(rule).requires_grad_(False)
        self.lr = lr
        self.weight_decay = weight_decay
        self.safeguard = safeguard
        self.backend = backend
        self._fallen_back: set[int] = set()  # optimizers of which it was said
        self._hooks: StrategyHooks | None = None

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
        weight_decay: str = "ignore",
        safeguard: bool | Literal["fallback"] = True,
        backend: str = "auto",
    ) -> LearnedOptimizer:
        """A callback with a trained rule.

        Args:
            name_or_path: a directory, a bundled name (`lightning_lopt.list_pretrained()`), or a Hub id "owner/name".
            revision: branch, tag or commit of a Hub id. Pin a tag or commit in work that has to be repeated.
            token: for a private repository; default: what `hf auth login` stored.
            cache_dir: where downloads go.
            local_files_only: never ask the network.
            endpoint: another Hub.
            lr: see `LearnedOptimizer`.
            weight_decay: see `LearnedOptimizer`.
            safeguard: see `LearnedOptimizer`.
            backend: see `LearnedOptimizer`.

        Raises:
            ValueError: for an unknown name, and for files that are not a rule's.

        Example:
            >>> import lightning_lopt as lopt
            >>> lopt.LearnedOptimizer.from_pretrained("star").rule.kind
            'star'
        """
        rule = load_rule(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            endpoint=endpoint,
        )
        return cls(rule, lr=lr, weight_decay=weight_decay, safeguard=safeguard, backend=backend)

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
                "The learning-rate finder has nothing to find: LearnedOptimizer ignores lr. Drop it, or use "
                "LearnedOptimizer(lr='scale')."
            )
        self._detach()
        self._hooks = StrategyHooks(trainer, self._replace)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the swap took place, and say what runs."""
        real = [optimizer for optimizer in trainer.strategy.optimizers if not _is_mock(optimizer)]
        if not real:
            rank_zero_warn("configure_optimizers returned None: there is no optimizer for LearnedOptimizer to replace.")
        for optimizer in real:
            if not isinstance(optimizer, RuleOptimizer):
                raise MisconfigurationException(
                    f"LearnedOptimizer could not replace {type(optimizer).__name__} under "
                    f"{type(trainer.strategy).__name__}: the strategy sets up optimizers in its own way. Use "
                    "single-device, 'ddp' or ModelParallelStrategy."
                )
        if real:
            rank_zero_info(self._describe(real))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the optimizers how long the run is, now that the data is set up; look where checkpoints will go."""
        disk_errors.check_writable(trainer)
        self._share_num_steps(trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Have the steps that will be logged measured."""
        if _is_logged_step(trainer) and isinstance(optimizer, RuleOptimizer):
            optimizer.measure_next_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what the measured steps did."""
        for number, optimizer in enumerate(trainer.strategy.optimizers):
            measured = optimizer.take_metrics() if isinstance(optimizer, RuleOptimizer) else None
            if measured is not None:
                suffix = f"-{number}" if number else ""
                values = {f"lopt/{k}{suffix}": v.float() for k, v in measured._asdict().items() if v is not None}
                pl_module.log_dict(values, on_step=True, on_epoch=False)
                self._tell_handover(number, measured.fallback)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say how often the safeguard stepped in."""
        optimizers = [o for o in trainer.strategy.optimizers if isinstance(o, RuleOptimizer)]
        if self.safeguard and (skipped := sum(o.num_skipped() for o in optimizers)):
            rank_zero_warn(
                f"The safeguard skipped {skipped} tensor updates that were not finite. Look for NaN in data or loss."
            )

        if handovers := sum(o.num_handovers() for o in optimizers):
            rank_zero_warn(
                f"The loss left its trust band {handovers} times, and the nominal term ran alone until it was back."
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put the strategy's own methods back."""
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the strategy's own methods back; Lightning calls no teardown on exceptions."""
        self._detach()
        disk_errors.explain(trainer, exception)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Close the gaps in state that was gathered from shards."""
        checkpoint["optimizer_states"] = [checkpoints.without_gaps(state) for state in checkpoint["optimizer_states"]]

    def state_dict(self) -> dict[str, Any]:
        """Which rule this is, where it came from, and its weights (kilobytes), as tensors and plain types."""
        source = getattr(self.rule, "source", None)
        return {
            "kind": self.rule.kind,
            "config": self.rule.config.to_dict(),
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "source": source and source.name,
            "revision": source and source.revision,
            "sha256": _fingerprint(self.rule),
            "weights": {name: tensor.detach().cpu().clone() for name, tensor in self.rule.state_dict().items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the weights that the checkpoint was made with.

        Raises:
            MisconfigurationException: if the checkpoint's rule is of another kind or configuration.
        """
        mine = {"kind": self.rule.kind, "config": self.rule.config.to_dict()}
        origin = state_dict["source"] or "made in code"
        for key, value in mine.items():
            if state_dict[key] != value:
                raise MisconfigurationException(
                    f"The checkpoint was made with a rule of {key} {state_dict[key]}, and LearnedOptimizer has {key} "
                    f"{value}. Pass the rule that was saved ({origin}), or load the model's weights alone."
                )
        for key, value in {"lr": self.lr, "weight_decay": self.weight_decay}.items():
            if state_dict[key] != value:  # it is in the optimizer's groups, which are restored
                rank_zero_warn(
                    f"The checkpoint was made with {key}={state_dict[key]!r}, and the run goes on so, not with "
                    f"{key}={value!r}."
                )
        if state_dict["sha256"] != _fingerprint(self.rule):
            rank_zero_warn(
                f"The weights of the rule differ from those of the checkpoint ({origin}, sha256 "
                f"{state_dict['sha256'][:12]}); the run goes on with the checkpoint's."
            )
        self.rule.load_state_dict(
            state_dict["weights"]
        )  # in place: the optimizers, if they exist already, share the rule

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": None}  # copies and pickles do not carry the Trainer along

    def _tell_handover(self, number: int, fallback: Tensor | None) -> None:
        """Say when the nominal term takes over, and when the rule returns; seen at the steps that are logged."""
        if fallback is not None and bool(fallback) != (number in self._fallen_back):
            self._fallen_back ^= {number}
            rank_zero_info(
                "LearnedOptimizer: the loss has left its trust band; the rule's nominal term goes on alone."
                if bool(fallback)
                else "LearnedOptimizer: the loss is back in its trust band; the whole rule goes on."
            )

    def _replace(self, trainer: Any, tap: LossRecorder) -> None:
        strategy, new = trainer.strategy, {}
        for optimizer in strategy.optimizers:
            if not _is_mock(optimizer) and not isinstance(optimizer, RuleOptimizer):
                new[optimizer] = self._make(optimizer, tap)
                if self.rule.needs_names:
                    new[optimizer].set_names(trainer.lightning_module.named_parameters())
        strategy.optimizers = [new.get(optimizer, optimizer) for optimizer in strategy.optimizers]
        for config in strategy.lr_scheduler_configs:
            rebind(config.scheduler, new)
        if trainer.training and trainer.fit_loop.epoch_loop.batch_progress.total.ready:  # in mid-training, by the user
            self._share_num_steps(trainer)

    def _make(self, optimizer: torch.optim.Optimizer, tap: LossRecorder) -> RuleOptimizer:
        if self.lr == "scale" and any("max_lr" in group for group in optimizer.param_groups):
            rank_zero_warn("lr='scale' under OneCycleLR or CyclicLR: the update is multiplied by lr / max_lr.")
        new = RuleOptimizer.replacing(
            optimizer,
            self.rule,
            lr=self.lr,
            weight_decay=self.weight_decay,
            safeguard=self.safeguard,
            backend=self.backend,
        )
        new.set_loss_source(tap if self.rule.needs_loss or self.safeguard == "fallback" else None)
        return new

    def _share_num_steps(self, trainer: Any) -> None:
        steps = trainer.estimated_stepping_batches
        for optimizer in trainer.strategy.optimizers:
            if isinstance(optimizer, RuleOptimizer):
                optimizer.num_steps = int(steps) if 0 < steps < float("inf") else None

    def _detach(self) -> None:
        if self._hooks is not None:
            self._hooks.undo()
            self._hooks = None

    def _describe(self, optimizers: list[RuleOptimizer]) -> str:
        params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        count = sum(p.numel() for p in params)
        state_bytes = sum(_state_bytes(self.rule, p) for p in params)
        source = getattr(self.rule, "source", None)
        name = f"{source.name!r} " if source else ""
        revision = f" at {source.revision[:12]}" if source and source.revision else ""
        use = "multiplies its update" if self.lr == "scale" else "is logged, not used"
        return (
            f"LearnedOptimizer: {name}({self.rule.kind}, {self.rule.num_meta_params()} meta-parameters{revision}) "
            f"trains {count:,} parameters, {optimizers[0].backend} backend; {state_bytes / max(count, 1):.1f} bytes of "
            "state per parameter. "
            f"The module's own lr {use}."
        )


def _is_mock(optimizer: Any) -> bool:
    """Lightning's stand-in for no optimizer; by name, for `pytorch_lightning` has a class of its own."""
    return type(optimizer).__name__ == "_MockOptimizer"


def _is_logged_step(trainer: Any) -> bool:
    if trainer.barebones or not trainer.log_every_n_steps:
        return False
    return bool((trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % trainer.log_every_n_steps == 0)


def _state_bytes(rule: UpdateRule, param: Tensor) -> int:
    state = rule.init_state(torch.empty(param.shape, dtype=compute_dtype(param.dtype), device="meta"))
    return sum(t.numel() * t.element_size() for t in state)


def _fingerprint(rule: UpdateRule) -> str:
    """sha256 over kind, configuration and weights."""
    digest = hashlib.sha256(json.dumps([rule.kind, rule.config.to_dict()], sort_keys=True).encode())
    for name, tensor in sorted(rule.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed: use one of {list(allowed)}.")
