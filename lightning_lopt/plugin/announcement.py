"""What LearnedOptimizer says at the start of a fit: what it trains, with what, for how long, and what it ignores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_lopt.optimizer import RuleOptimizer
from lightning_lopt.plugin.replacement import Replacement
from lightning_lopt.plugin.run_length import RunLength
from lightning_lopt.rules import UpdateRule, compute_dtype

_SMALL_PART = 0.1  # of the module's trainable parameters


def describe(
    rule: UpdateRule,
    replacement: Replacement,
    length: RunLength,
    *,
    lr: str,
    weight_decay: str,
    average_fraction: float | None = None,
) -> str:
    """One line about a fit.

    Args:
        rule: the rule that trains.
        replacement: the optimizers that it replaced, at least one.
        length: the run's length.
        lr: the callback's choice.
        weight_decay: the callback's choice.
        average_fraction: of the run whose weights are averaged; None: none.
    """
    optimizers = [pair.new for pair in replacement.replaced]
    params = list(_parameters(optimizers))
    ready = [param for param in params if not is_lazy(param)]
    count = sum(param.numel() for param in ready)
    state_bytes = sum(_state_bytes(rule, param) for param in ready)
    lazy = f" and {len(params) - len(ready)} lazy tensors" if len(ready) < len(params) else ""
    backend = "" if lazy else f" {optimizers[0].backend} backend,"  # depends on their shapes
    olds = " and ".join(dict.fromkeys(type(pair.old).__name__ for pair in replacement.replaced))
    left = "".join(f" {type(optimizer).__name__} is left alone." for optimizer in replacement.left_alone)
    steps = "unknown" if length.steps is None else f"{length.steps:,} steps"
    return (
        f"LearnedOptimizer: {_name(rule)} trains {count:,} parameters{lazy} in place of {olds},"
        f"{backend} {state_bytes / max(count, 1):.1f} bytes of state per parameter.{left} "
        f"Run length: {steps} ({length.reason}). {_settings(optimizers, lr, weight_decay)}"
        f"{_averages(ready, average_fraction)}"
    )


def warn_about_groups(optimizers: Iterable[RuleOptimizer]) -> None:
    """Warn of groups with lr 0, which somebody may have meant to hold fixed; for fits that ignore the lr."""
    for optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            # A schedule that warms up from 0 has its target in one of the other two. None is an lr that the optimizer
            # would have worked out itself (Adafactor).
            lrs = [group.get(key, 0.0) for key in ("lr", "initial_lr", "max_lr")]
            if lrs == [0.0, 0.0, 0.0] and any(param.requires_grad for param in group["params"]):
                rank_zero_warn(
                    f"Parameter group {number} has lr=0, and LearnedOptimizer(lr='ignore') trains it like the others. "
                    "To hold its parameters fixed, call requires_grad_(False) on them, leave them out of the "
                    "optimizer, or use lr='scale'."
                )


def warn_about_coverage(module: torch.nn.Module, optimizers: Iterable[Any]) -> None:
    """Warn if the module's optimizers hold few of its trainable parameters: something else may train the rest."""
    held = {id(param) for param in _parameters(optimizers)}
    trainable = [p for p in module.parameters() if p.requires_grad and not is_lazy(p)]
    total = sum(param.numel() for param in trainable)
    covered = sum(param.numel() for param in trainable if id(param) in held)
    if covered < _SMALL_PART * total:
        rank_zero_warn(
            f"The optimizers that configure_optimizers returned hold {covered:,} of {total:,} trainable parameters. "
            "LearnedOptimizer trains no others; if something else does (as in Pyro), it goes on as before."
        )


def _name(rule: UpdateRule) -> str:
    source = getattr(rule, "source", None)
    name = f"{source.name!r} " if source else ""
    revision = f" at {source.revision[:12]}" if source and source.revision else ""
    return f"{name}({rule.kind}, {rule.num_meta_params()} meta-parameters{revision})"


def _settings(optimizers: Iterable[RuleOptimizer], lr: str, weight_decay: str) -> str:
    """What becomes of the module's own settings."""
    use = "multiplies its update" if lr == "scale" else "is logged, not used"
    decays = {float(group.get("weight_decay") or 0.0) for optimizer in optimizers for group in optimizer.param_groups}
    values = ", ".join(f"{decay:g}" for decay in sorted(decays - {0.0}))
    decayed = "acts as in AdamW" if weight_decay == "decoupled" else "is not used"
    return f"The module's own lr {use}" + (f"; its weight decay ({values}) {decayed}." if values else ".")


def _averages(params: list[Tensor], fraction: float | None) -> str:
    """Which weights are averaged, and what that takes."""
    if fraction is None:
        return ""
    size = sum(param.numel() * compute_dtype(param.dtype).itemsize for param in params)
    count = max(sum(param.numel() for param in params), 1)
    return (
        f" Validation and checkpoints use the weights averaged over the last {fraction:.3g} of the run "
        f"({size / count:.1f} more bytes per parameter from there on, and a copy of the weights in validation)."
    )


def _parameters(optimizers: Iterable[Any]) -> Iterable[Tensor]:
    return (param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"])


def _state_bytes(rule: UpdateRule, param: Tensor) -> int:
    state = rule.init_state(torch.empty(param.shape, dtype=compute_dtype(param.dtype), device="meta"))
    return sum(tensor.numel() * tensor.element_size() for tensor in state)
