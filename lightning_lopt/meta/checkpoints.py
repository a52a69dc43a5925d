"""Save and restore the inner runs of all processes in a checkpoint.

They are stored as lists of tensors, which `torch.load(weights_only=True)` accepts. It refuses their NamedTuples, so the
structure is not stored; freshly started runs provide it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map_only


def pack(states: list[Any], labels: list[str], *, gather: bool) -> dict[str, Any]:
    """Pack the inner runs for the checkpoint.

    Args:
        states: an estimator's state for each task.
        labels: the tasks' names.
        gather: collect the runs of all processes, which must then all call this function. After an exception some of
            them may not, and the collective would wait forever; without it the checkpoint has this process's runs only.
    """
    own = [[leaf.cpu() for leaf in _tensors(state)] for state in states]
    ranks: list[Any] = [own]
    if dist.is_available() and dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        if gather:
            dist.all_gather_object(ranks, own)
        else:
            ranks[dist.get_rank()] = own
    return {"tasks": list(labels), "inner_runs": ranks}


def restore(saved: dict[str, Any], fresh: list[Any], labels: list[str], rank: int, world_size: int) -> list[Any]:
    """Return the saved states of this process; the fresh ones, with a warning, if the checkpoint does not have them.

    Args:
        saved: the result of `pack`.
        fresh: states of the same structure, on their devices.
        labels: the tasks' names.
        rank: the number of this process.
        world_size: the number of processes.

    Raises:
        ValueError: if the runs belong to other tasks, another estimator, or another number of processes.
    """
    ranks = saved["inner_runs"]
    remedy = "or start a new run from the rule's weights"
    if len(ranks) != world_size:
        raise ValueError(
            f"The checkpoint has the inner runs of {len(ranks)} processes, and this run has {world_size}. Use "
            f"{len(ranks)} processes, {remedy}."
        )
    if saved["tasks"] != labels:
        raise ValueError(
            f"The checkpoint has inner runs on {saved['tasks']}, not on {labels}. Pass its tasks, {remedy}."
        )
    if ranks[rank] is None:
        warnings.warn(
            f"The checkpoint was saved after an exception and does not have the inner runs of process {rank}. This "
            "process starts fresh ones.",
            stacklevel=2,
        )
        return fresh
    return [_rebuild(leaves, state, label) for leaves, state, label in zip(ranks[rank], fresh, labels, strict=True)]


def _rebuild(leaves: list[torch.Tensor], fresh: Any, label: str) -> Any:
    expected = _tensors(fresh)
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in expected]:
        raise ValueError(
            f"The checkpoint's inner runs on {label!r} have other shapes than those of this estimator and task. Pass "
            "the same arguments as then, or start a new run from the rule's weights."
        )
    moved = iter([leaf.to(template.device) for leaf, template in zip(leaves, expected, strict=True)])
    return tree_map_only(torch.Tensor, lambda _: next(moved), fresh)


def _tensors(state: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]  # FullUnroll's state is None
