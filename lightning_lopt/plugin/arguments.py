"""The arguments that `LearnedOptimizer` and the strategies share: their types, and which values are allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch.optim import Optimizer

NumSteps = int | Literal["auto"] | None
Selectors = Sequence[int | type[Optimizer]]  # positions in what configure_optimizers returns, or exact classes


def check_arguments(
    *,
    lr: object,
    reference_lr: float | None,
    weight_decay: object,
    strength: object,
    num_steps: object,
    only: object,
    skip: object,
    average: object,
) -> None:
    """Raise a ValueError that says what is allowed, unless all values are."""
    _check_choice("lr", lr, ("ignore", "scale"))
    _check_choice("weight_decay", weight_decay, ("rule", "ignore", "decoupled"))
    if not _is_positive(strength):
        raise ValueError(f"strength={strength!r} is not allowed: it must be a positive finite number, such as 0.3.")
    _check_reference_lr(lr, reference_lr)
    _check_choice("average", average, (True, False, "rule"))
    _check_num_steps(num_steps)
    _check_selectors("only", only)
    _check_selectors("skip", skip)


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed: use one of {list(allowed)}.")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _check_reference_lr(lr: object, reference_lr: float | None) -> None:
    if reference_lr is None:
        return
    if lr != "scale":
        raise ValueError(f"reference_lr={reference_lr!r} has no effect with lr={lr!r}: use it with lr='scale'.")
    if not _is_positive(reference_lr):
        raise ValueError(f"reference_lr={reference_lr!r} is not allowed: it must be a positive finite number.")


def _check_num_steps(num_steps: object) -> None:
    if num_steps is None or num_steps == "auto":
        return
    if type(num_steps) is not int or num_steps < 1:
        raise ValueError(
            f"num_steps={num_steps!r} is not allowed: use 'auto', a positive whole number, or None for a run of "
            "unknown length."
        )


def _check_selectors(name: str, selectors: object) -> None:
    if selectors is None or isinstance(selectors, list | tuple) and all(map(_is_selector, selectors)):
        return
    raise ValueError(
        f"{name}={selectors!r} is not allowed: use a list of positions and optimizer classes, such as "
        f"{name}=[0, torch.optim.Adam]."
    )


def _is_selector(value: object) -> bool:
    return type(value) is int or isinstance(value, type) and issubclass(value, Optimizer)
