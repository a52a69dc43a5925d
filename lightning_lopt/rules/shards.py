"""Means over sharded tensors (FSDP2), with one message for the sums of all tensors.

A rule's math is written once. For a mean over more than one coordinate it calls `means`, which for a whole tensor is
`Tensor.mean`. For a shard, the sums of the other processes are needed: `means` interrupts the rule by raising
`Unknown`, the sums that all tensors have asked for are exchanged at once, and the rule is run again from the start with
the answers. As a pure function it asks the same questions again. So no intermediate result of a rule is kept while it
waits, and a step takes as many messages as there are questions that depend on each other, for any number of tensors:
two in STAR; one in `scheduled`, and another for gradients that are split along their fan-in.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

Question = tuple[Tensor, tuple[int, ...]]  # (c..., *shape), and the dims to average over, counted from the end


def dtensor() -> ModuleType:
    """The module of torch's DTensor, named otherwise in torch 2.4. Imported late, because that is slow."""
    public = importlib.import_module("torch.distributed.tensor")
    return public if hasattr(public, "DTensor") else importlib.import_module("torch.distributed._tensor")


class Unknown(Exception):
    """Interrupts a rule that asks for a mean that is not known yet; carries this process's part of the sums."""

    def __init__(self, sums: list[Tensor]) -> None:
        super().__init__("sums over all shards of a tensor were asked for outside of `sharding.together`")
        self.sums = sums


class TensorShard:
    """The shard of a tensor that this process holds, a box, and the means over the whole tensor that are known.

    Args:
        shape: of the whole tensor.
        start: where the shard begins, per dim.
        local: the shape of the shard; a dim may be 0.
        split: the dims along which other processes hold other shards; by default all.
    """

    def __init__(
        self, shape: Sequence[int], start: Sequence[int], local: Sequence[int], split: Iterable[int] | None = None
    ) -> None:
        self.shape, self.start, self.local_shape = torch.Size(shape), tuple(start), torch.Size(local)
        self.split = frozenset(range(len(self.shape)) if split is None else split)
        self.known: list[list[Tensor]] = []  # the answers, by the number of the question
        self.asked = 0

    def local(self, tensor: Tensor) -> Tensor:
        """Cut a tensor (c..., *shape), whose sizes along some dims may be 1, to the shard."""
        extra = tensor.dim() - len(self.shape)
        for dim, (size, start, length) in enumerate(zip(self.shape, self.start, self.local_shape, strict=True)):
            if tensor.shape[dim + extra] == size != length:
                tensor = tensor.narrow(dim + extra, start, length)
        return tensor

    def has_whole(self, dims: Sequence[int]) -> bool:
        """Whether every process holds all of the tensor along these dims, counted from the end."""
        return self.split.isdisjoint(dim % len(self.shape) for dim in dims)

    def answers(self, questions: Sequence[Question]) -> list[Tensor]:
        """The means over the whole tensor, or `Unknown`."""
        number, self.asked = self.asked, self.asked + 1
        if number == len(self.known):
            raise Unknown([self._contribution(*question) for question in questions])
        return self.known[number]

    def _contribution(self, tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
        """What this shard adds to a mean; 0 for the means that belong to other shards."""
        if dims:
            tensor = tensor.sum(dims, keepdim=True) / math.prod(self.shape[dim] for dim in dims)
        for dim in range(-len(self.shape), 0):
            if dim not in dims and self.local_shape[dim] != self.shape[dim]:
                sizes = list(tensor.shape)
                sizes[dim] = self.shape[dim]
                wide = tensor.new_zeros(sizes)
                wide.narrow(dim, self.start[dim], self.local_shape[dim]).copy_(tensor)
                tensor = wide
        return tensor.squeeze(dims) if dims else tensor


def means(shard: TensorShard | None, *questions: Question) -> list[Tensor]:
    """Means over dims of tensors (c..., *shape): (c..., *the other dims), of the whole tensor's size.

    Args:
        shard: the shard that the tensors cover; None for whole tensors.
        questions: (tensor, dims): dims to average over, counted from the end; () for none.

    Example:
        >>> import torch
        >>> mean, row = means(None, (torch.eye(2), (-2, -1)), (torch.ones(3, 2, 4), (-1,)))
        >>> mean, row.shape
        (tensor(0.5000), torch.Size([3, 2]))
    """
    if shard is not None:
        return shard.answers(questions)
    return [tensor.mean(dims) if dims else tensor for tensor, dims in questions]


def whole_shape(shard: TensorShard | None, tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    return tensor.shape if shard is None else shard.shape


def whole(tensor: Tensor) -> Tensor:
    """The full value of a sharded tensor (DTensor), the same on all ranks; a plain tensor as it is.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def local(shard: TensorShard | None, tensor: Tensor) -> Tensor:
    """Cut a tensor of the whole shape to the shard that this process holds."""
    return tensor if shard is None else shard.local(tensor)
