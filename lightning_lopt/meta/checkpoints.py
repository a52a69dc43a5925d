"""The inner runs in a checkpoint: of all processes, as lists of tensors, which load with `weights_only=True`.

Their structure (dicts and NamedTuples, which such a load refuses) is not saved: the freshly started runs have it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map_only


def pack(states: list[Any], labels: list[str]) -> dict[str, Any]:
    """What to put into the checkpoint; a collective call, in every process.

    Args:
        states: an estimator's state for each task.
        labels: the tasks' names.
    """
    mine = [[leaf.cpu() for leaf in _tensors(state)] for state in states]
    ranks = [mine]
    if dist.is_available() and dist.is_initialized():
        ranks = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(ranks, mine)
    return {"tasks": list(labels), "particles": ranks}


def restore(saved: dict[str, Any], fresh: list[Any], labels: list[str], rank: int, world_size: int) -> list[Any]:
    """This process's states as they were saved.

    Args:
        saved: what `pack` returned.
        fresh: states of the same structure, on the devices where they are to be.
        labels: the tasks' names.
        rank: this process's number.
        world_size: number of processes.

    Raises:
        ValueError: if the runs are of other tasks, of another estimator, or of another number of processes.
    """
    ranks, remedy = saved["particles"], "or start a new run from the rule's weights"
    if len(ranks) != world_size:
        raise ValueError(
            f"The checkpoint has the inner runs of {len(ranks)} processes, each its own, and this run has {world_size} "
            f"processes: it cannot go on. Use {len(ranks)} processes, {remedy}."
        )
    if saved["tasks"] != labels:
        raise ValueError(f"The checkpoint has inner runs on {saved['tasks']}, not on {labels}. Pass those, {remedy}.")
    return [_rebuild(leaves, state, label) for leaves, state, label in zip(ranks[rank], fresh, labels, strict=True)]


def _rebuild(leaves: list[torch.Tensor], fresh: Any, label: str) -> Any:
    expected = _tensors(fresh)
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in expected]:
        raise ValueError(
            f"The checkpoint's inner runs on {label!r} have other shapes than those of this estimator and task. Pass "
            "what was passed then, or start a new run from the rule's weights."
        )
    moved = iter([leaf.to(template.device) for leaf, template in zip(leaves, expected, strict=True)])
    return tree_map_only(torch.Tensor, lambda _: next(moved), fresh)


def _tensors(state: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]  # without None, of full unrolls
