"""Replacing a module's optimizers: which are replaced, which are left alone, and which are refused.

`LearnedOptimizer` never replaces an optimizer silently. One whose step is the method itself (differential privacy,
sampling, sharpness-aware minimization) would go on training as something else, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import nn
from torch.optim import Optimizer

from lightning_lopt.optimizer import RuleOptimizer
from lightning_lopt.plugin.arguments import Selectors

# Class names (their subclasses count too) -> what the user would lose. By name, so that no package has to be there.
_METHODS = {
    "DPOptimizer": "it clips per-sample gradients and adds noise to them, and without it training is not private",
    "SGLD": "its noise makes the posterior samples",
    "SGHMC": "its noise makes the posterior samples",
    "SAM": "it takes two steps per batch to find flat minima",
}


class Replaced(NamedTuple):
    """One optimizer of the module, and the RuleOptimizer in its place."""

    number: int  # its position in what configure_optimizers returned
    old: Optimizer
    new: RuleOptimizer
    old_lrs: list[Any]  # of the old one's groups, when it was replaced
    old_had_state: bool


class Replacement(NamedTuple):
    """What became of the module's optimizers."""

    replaced: list[Replaced]
    left_alone: list[Optimizer]


def replace_optimizers(
    strategy: Any,
    make: Callable[[Optimizer], RuleOptimizer],
    *,
    only: Selectors | None = None,
    skip: Selectors | None = None,
) -> Replacement:
    """Replace the optimizers of a strategy, and point its schedulers at the new ones.

    Args:
        strategy: a strategy whose optimizers are set up.
        make: optimizer -> the RuleOptimizer to put in its place.
        only: replace these alone: positions, or classes, which must match exactly.
        skip: leave these alone.

    Raises:
        MisconfigurationException: if `only` or `skip` matches nothing, or an optimizer cannot be replaced without loss.
    """
    optimizers = [optimizer for optimizer in strategy.optimizers if not is_mock(optimizer)]
    wanted = _matched(optimizers, "only", only) if only is not None else set(range(len(optimizers)))
    wanted -= _matched(optimizers, "skip", skip or ())
    replaced: list[Replaced] = []
    left_alone: list[Optimizer] = []
    for number, old in enumerate(optimizers):
        if isinstance(old, RuleOptimizer):
            continue
        # Rules take dense gradients. SparseAdam is there for sparse ones, beside another optimizer.
        if number not in wanted or type(old).__name__ == "SparseAdam":
            left_alone.append(old)
            continue
        _check_replaceable(number, old)
        lrs = [group["lr"] for group in old.param_groups]
        replaced.append(Replaced(number, old, make(old), lrs, bool(old.state)))
    new: dict[Any, Optimizer] = {pair.old: pair.new for pair in replaced}
    strategy.optimizers = [new.get(optimizer, optimizer) for optimizer in strategy.optimizers]
    for config in strategy.lr_scheduler_configs:
        repoint(config.scheduler, new)
    return Replacement(replaced, left_alone)


def is_mock(optimizer: Any) -> bool:
    """Whether this is Lightning's stand-in for no optimizer; by name, for `pytorch_lightning` has its own class."""
    return type(optimizer).__name__ == "_MockOptimizer"


def repoint(scheduler: Any, new: dict[Any, Optimizer]) -> None:
    """Point a scheduler, and all schedulers that it holds under any name, at the optimizers that replaced its own.

    Args:
        scheduler: any object with a `step` method.
        new: old optimizer -> new optimizer.
    """
    _repoint(scheduler, new, set())


def _repoint(holder: Any, new: dict[Any, Optimizer], seen: set[int]) -> None:
    if id(holder) in seen:
        return
    seen.add(id(holder))
    for name, value in list(vars(holder).items()):
        if (changed := _with_new(value, new, seen)) is not value:
            setattr(holder, name, changed)


def _with_new(value: Any, new: dict[Any, Optimizer], seen: set[int]) -> Any:
    """The value with new optimizers for old ones; the same object where it holds none."""
    if isinstance(value, Optimizer):
        return new.get(value, value)
    if type(value) in (list, tuple):
        items = [_with_new(item, new, seen) for item in value]
        same = all(a is b for a, b in zip(items, value, strict=True))
        return value if same else type(value)(items)
    if type(value) is dict:
        entries = {key: _with_new(item, new, seen) for key, item in value.items()}
        return value if all(entries[key] is value[key] for key in value) else entries
    if callable(getattr(value, "step", None)) and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        _repoint(value, new, seen)
    return value


def _matched(optimizers: Sequence[Optimizer], name: str, selectors: Iterable[int | type]) -> set[int]:
    """Positions of the optimizers that the selectors match."""
    matched = set()
    for selector in selectors:
        found = {n for n, optimizer in enumerate(optimizers) if selector in (n, type(optimizer))}
        if not found:
            shown = selector.__name__ if isinstance(selector, type) else selector
            present = ", ".join(f"{n}: {type(optimizer).__name__}" for n, optimizer in enumerate(optimizers))
            raise MisconfigurationException(
                f"{name}={shown} matches none of the optimizers that configure_optimizers returned ({present}). Name "
                "one of their positions, or its exact class."
            )
        matched |= found
    return matched


def _check_replaceable(number: int, optimizer: Optimizer) -> None:
    """Raise if something would be lost with the optimizer, and warn if that may be so."""
    kind = type(optimizer)
    if kind.__module__.partition(".")[0] == "torch" and not any(_inner_optimizers(optimizer)):
        return
    way_out = f"Leave it alone with LearnedOptimizer(skip=[{number}]), or return another optimizer for these parameters"
    bases = [base.__name__ for base in kind.__mro__]
    why = next((loss for name, loss in _METHODS.items() if name in bases), None)
    if why is None and (inner := next(_inner_optimizers(optimizer), None)) is not None:
        why = f"it wraps another optimizer ({inner}), and what it adds to that one would be lost"
    if why is not None:
        raise MisconfigurationException(f"LearnedOptimizer does not replace {kind.__name__}: {why}. {way_out}.")
    methods = [
        m for m in dir(kind) if not m.startswith("_") and not hasattr(Optimizer, m) and callable(getattr(kind, m))
    ]
    without = f" Its methods {', '.join(methods)} are gone." if methods else ""
    rank_zero_warn(
        f"LearnedOptimizer replaces {kind.__module__}.{kind.__qualname__}, which does not come with torch, and keeps "
        f"only its parameter groups.{without} If its step is part of your method, that is lost. {way_out}."
    )


def _inner_optimizers(optimizer: Optimizer) -> Iterator[str]:
    return (f"{name}: {type(v).__name__}" for name, v in vars(optimizer).items() if isinstance(v, Optimizer))
