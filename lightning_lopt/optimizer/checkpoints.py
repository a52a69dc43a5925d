"""RuleOptimizer's checkpoints: checks before loading, and restoring state in its own precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.optimizer import run_state
from lightning_lopt.rules import UpdateRule, compute_dtype


def check_marker(state_dict: dict[str, Any], kind: str) -> None:
    """Raise a ValueError unless this is the state dict of an optimizer with a rule of this kind."""
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError(
            f"This is not an optimizer's state dict: its keys are {sorted(state_dict)}. Pass what state_dict() gave."
        )
    kinds = {group.get("lopt_kind") for group in state_dict["param_groups"]}
    if None in kinds:
        raise ValueError(
            "This is the state of another optimizer (its groups have no 'lopt_kind'), whose moments mean nothing to a "
            "learned optimizer. Load the model's weights alone, or continue with the optimizer that was saved."
        )
    if kinds != {kind} and kinds:
        raise ValueError(
            f"This is the state of a rule of kind {sorted(kinds)}, but this optimizer's rule is of kind {kind!r}. Load "
            "the rule that was saved."
        )


def check_shapes(
    loaded: dict[str, Any], rule: UpdateRule, params: Iterable[Tensor], name: Callable[[Tensor], str]
) -> None:
    """Raise a ValueError if a saved state tensor is missing, or its shape is not the one that the rule gives it."""
    of_run = rule.init_run_state(torch.empty(()))._asdict() if rule.needs_run_state else {}
    for param, raw in _saved(loaded, params):
        expected = {"step": torch.empty(()), **rule.init_state(torch.empty_like(param, device="meta"))._asdict()}
        expected |= {run_state.PREFIX + name: tensor for name, tensor in of_run.items()}
        for field, tensor in expected.items():
            if getattr(raw.get(field), "shape", None) != tensor.shape:
                came = f"of shape {tuple(raw[field].shape)}" if isinstance(raw.get(field), Tensor) else "missing"
                raise ValueError(
                    f"State {field!r} of {name(param)} is {came} in the checkpoint, but must have shape "
                    f"{tuple(tensor.shape)}. The checkpoint belongs to another model or rule; load the saved one."
                )


def restored(loaded: dict[str, Any], params: Iterable[Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Copies of each parameter's saved state, in the dtype of the arithmetic and on the parameter's device.

    The run's state keeps its dtype, which is the same for all parameters.
    """
    for param, raw in _saved(loaded, params):
        dtype = compute_dtype(param.dtype)
        own = {name: tensor for name, tensor in raw.items() if not name.startswith(("step", run_state.PREFIX))}
        dtypes = {name: dtype for name, tensor in own.items() if tensor.is_floating_point()}
        yield param, {name: t.to(param.device, dtypes.get(name, t.dtype), copy=True) for name, t in raw.items()}


def without_gaps(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same state, in contiguous tensors.

    torch before 2.13 gathers uneven shards into a view of a padded tensor. The padding would be saved, too, and gloo,
    by which rank 0 sends a checkpoint to the others, ignores strides (pytorch/pytorch#192920).

    Example:
        >>> gathered = torch.zeros(3, 2, 8)[:, :1]
        >>> without_gaps({"state": {0: {"exp_avg": gathered}}})["state"][0]["exp_avg"].stride()
        (8, 8, 1)
    """
    states = state_dict.get("state", {})  # empty on ranks that have gathered nothing
    # A clone closes gaps, and keeps the order of a dense tensor's strides.
    closed = {k: {n: t if t.is_contiguous() else t.clone() for n, t in state.items()} for k, state in states.items()}
    return {**state_dict, "state": closed} if states else state_dict


def _saved(loaded: dict[str, Any], params: Iterable[Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    saved_ids = (index for group in loaded["param_groups"] for index in group["params"])
    for index, param in zip(saved_ids, params, strict=False):  # torch itself checks the number of parameters
        if raw := loaded["state"].get(index):
            yield param, raw
