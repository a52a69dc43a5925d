"""The run's state of rules with `needs_run_state`: kept once, saved with every tensor.

Checkpoints of all kinds save what lies under a parameter. So the state of each tensor has the fields of the run's
state, too, under names that begin with `PREFIX`: the same tensors under all parameters of a device. The run's state
thus lasts as long as any tensor does, and a tensor that is frozen holds the current one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.rules import UpdateRule

PREFIX = "run_"


def read(rule: UpdateRule, states: Iterable[Mapping[str, Tensor]], like: Tensor) -> Any:
    """The run's state; a fresh one if no tensor has any.

    Args:
        rule: a rule with `needs_run_state`.
        states: of the optimizer's tensors.
        like: a tensor of the wanted device and dtype.
    """
    fresh = rule.init_run_state(like)
    names = [PREFIX + name for name in fresh._fields]
    for state in states:
        if names[0] in state:
            kept = (state[name] for name in names)
            return type(fresh)(*(old.to(new.device, new.dtype) for old, new in zip(kept, fresh, strict=True)))
    return fresh


def write(run: Any, states: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> None:
    """Put the run's state under each parameter that has a state.

    Args:
        run: the run's state.
        states: parameter and its state.
    """
    copies: dict[torch.device, dict[str, Tensor]] = {}
    for param, state in states:
        if not state:
            continue
        if param.device not in copies:
            copies[param.device] = {PREFIX + name: field.to(param.device) for name, field in run._asdict().items()}
        state.update(copies[param.device])
