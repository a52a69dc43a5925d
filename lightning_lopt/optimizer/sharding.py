"""Sharded parameters (DTensor): each process moves its shards, and all tensors' sums travel in one message.

Rules that cannot take a shard (`UpdateRule.takes_shards`), and layouts other than Shard and Replicate, use DTensor's
own operations: the same numbers, with a message for every mean of every tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_lopt.rules.shards import TensorShard, Unknown, dtensor
from lightning_lopt.rules.shards import whole as whole  # re-exported

Result = TypeVar("Result")


class DTensorShard(TensorShard):
    """This process's shard of a DTensor.

    Args:
        shape: of the whole tensor.
        start: where the shard begins, per dim.
        local: the shard's shape.
        split: the dims that are sharded.
        groups: the process groups that hold the other shards, one per sharding dim of the mesh.
    """

    def __init__(
        self,
        shape: Sequence[int],
        start: Sequence[int],
        local: Sequence[int],
        split: Iterable[int],
        groups: Sequence[Any],
    ) -> None:
        super().__init__(shape, start, local, split)
        self.groups = tuple(groups)


def shard_of(param: Any) -> DTensorShard | None:
    """The shard of a DTensor that this process holds; None for plain tensors and unsupported layouts."""
    if not hasattr(param, "placements"):
        return None
    plain = (dtensor().Shard, dtensor().Replicate)
    mesh, shape = param.device_mesh, param.shape
    start, length, groups, place = [0] * len(shape), list(shape), [], mesh.get_coordinate()
    if place is None or any(type(placement) not in plain for placement in param.placements):
        return None
    for number, placement in enumerate(param.placements):
        if placement.is_shard():  # in chunks, as torch.chunk makes them; the last ones may be empty
            chunk = -(-length[placement.dim] // mesh.size(number))
            begin = min(place[number] * chunk, length[placement.dim])
            start[placement.dim] += begin
            length[placement.dim] = min(chunk, length[placement.dim] - begin)
            groups.append(mesh.get_group(number))
    split = [placement.dim for placement in param.placements if placement.is_shard()]
    return DTensorShard(shape, start, length, split, groups) if list(param.to_local().shape) == length else None


def local_of(tensor: Any, like: Any = None) -> Tensor:
    """This process's shard of a DTensor, redistributed like `like` if given; a plain tensor as it is."""
    if not hasattr(tensor, "placements"):
        return tensor  # type: ignore[no-any-return]
    if like is not None and tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    local: Tensor = tensor.to_local()
    return local


def with_local(tensor: Any, local: Tensor) -> Tensor:
    """A DTensor of these shards with the layout of `tensor`; `local` itself if `tensor` is a plain one."""
    if not hasattr(tensor, "placements"):
        return local
    layout = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
    moved: Tensor = dtensor().DTensor.from_local(local, tensor.device_mesh, tensor.placements, **layout)
    return moved


def together(attempts: Sequence[tuple[DTensorShard, Callable[[], Result]]]) -> list[Result]:
    """Call functions that need sums over all shards, again and again until all have them; see `rules.shards`."""
    results: dict[int, Result] = {}
    while len(results) < len(attempts):
        asked = {}
        for number, (shard, attempt) in enumerate(attempts):
            if number not in results:
                shard.asked = 0
                try:
                    results[number] = attempt()
                except Unknown as unknown:
                    asked[number] = unknown.sums
        for number, sums in zip(asked, sums_over_shards([(attempts[n][0], s) for n, s in asked.items()]), strict=True):
            attempts[number][0].known.append(sums)
    return [results[number] for number in range(len(attempts))]


def sums_over_shards(contributions: Sequence[tuple[DTensorShard, Sequence[Tensor]]]) -> list[list[Tensor]]:
    """Sums over all shards: one message for all tensors of a mesh and device."""
    messages: dict[Any, list[int]] = {}
    for number, (shard, sums) in enumerate(contributions):
        messages.setdefault((tuple(map(id, shard.groups)), sums[0].device), []).append(number)
    results: dict[int, list[Tensor]] = {}
    for members in messages.values():
        flat = torch.cat([tensor.reshape(-1) for number in members for tensor in contributions[number][1]])
        for group in contributions[members[0]][0].groups:
            torch.distributed.all_reduce(flat, group=group)
        pieces = iter(torch.split(flat, [tensor.numel() for number in members for tensor in contributions[number][1]]))
        for number in members:
            results[number] = [next(pieces).view_as(tensor).to(tensor.dtype) for tensor in contributions[number][1]]
    return [results[number] for number in range(len(contributions))]


def tensor_scope(param: Tensor) -> AbstractContextManager[None]:
    """A context in which a DTensor may be combined with plain tensors, which are the same on all ranks."""
    if type(param) in (Tensor, torch.nn.Parameter):
        return nullcontext()
    experimental = importlib.import_module(f"{dtensor().__name__}.experimental")
    scope: AbstractContextManager[None] = experimental.implicit_replication()
    return scope


def placed_like(param: Any, tensor: Any, *, everywhere: bool = False) -> Any:
    """Shard a state tensor like its parameter if its last dims are the parameter's; else replicate it.

    So each state tensor keeps one layout from the start, and a resumed run adds in the same order as one that was not
    interrupted. `everywhere`: replicate it, because its last dims are not the parameter's although they have its sizes.
    """
    if not hasattr(param, "placements") or not hasattr(tensor, "placements"):
        return tensor
    extra = tensor.dim() - param.dim()
    alike = not everywhere and extra >= 0 and tensor.shape[extra:] == param.shape
    shard, replicate = dtensor().Shard, dtensor().Replicate
    placements = [shard(p.dim + extra) if alike and p.is_shard() else replicate() for p in param.placements]
    return tensor.redistribute(param.device_mesh, placements)


def placed_as(other: Any, tensor: Any) -> Any:
    """Redistribute a sharded tensor like another of its shape."""
    if not hasattr(tensor, "placements") or not hasattr(other, "placements"):
        return tensor
    return tensor.redistribute(other.device_mesh, other.placements)
