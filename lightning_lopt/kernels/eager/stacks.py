"""Steps in eager PyTorch for many tensors at once: a few large operations on memory that fits into the cache.

Tensors of one shape are stacked, (T, *shape), and moved together, as many as fit. A larger tensor is taken in chunks
along a dim: once for what the rule must know of the whole tensor, once for the step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lopt.kernels import Squares, WorkItem
from lightning_lopt.kernels.mismatch import check_shapes, plain
from lightning_lopt.rules import features as feats

CHUNK = 1 << 17  # coordinates that are taken at once: sixteen features of these stay in the last cache
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Chunk = tuple[int, int, int]  # (dim, start, length); dim -1 is all of the tensor


class Stack:
    """Tensors of one shape that move together, seen as (T, c, *shape) in float32."""

    def __init__(self, parts: Sequence[WorkItem], fields: Sequence[str]) -> None:
        self.parts = parts
        self.shape = parts[0].param.shape or torch.Size((1,))  # a scalar as a vector of one
        self.grad = self._gather([part.grad for part in parts]).unsqueeze(1)
        self.grad = -self.grad if parts[0].maximize else self.grad
        self.param = self._gather([part.param for part in parts]).unsqueeze(1)
        self.state = {name: self._gather([part.state[name] for part in parts]) for name in fields}
        self.state["exp_avg_sq"] = self.state["exp_avg_sq"].unsqueeze(1)
        self.step = torch.stack([part.state["step"] for part in parts]).to(torch.float32)
        self.chunks = chunks_of(self.shape)

    def _gather(self, tensors: list[Tensor]) -> Tensor:
        tensor = tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
        return tensor.float() if self.parts[0].param.dim() else tensor.float().unsqueeze(-1)

    def per_tensor(self, values: Tensor) -> Tensor:
        """(T,) or (T, c) as (T, c, 1, ...), to go with tensors."""
        return values.reshape(len(self.parts), -1, *[1] * len(self.shape))

    def fold(self, decays: feats.Decays, chunk: Chunk, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Write a chunk's new moments: (T, 3, *chunk) and (T, 1, *chunk); the old ones may be overwritten."""
        grad, old, old_sq = cut_all((self.grad, self.state["exp_avg"], self.state["exp_avg_sq"]), chunk)
        ones = [1] * len(self.shape)
        rate, rms = decays.momentum.reshape(3, *ones), decays.rms.reshape(1, *ones)
        torch.mul(old, rate, out=exp_avg).addcmul_(grad, 1 - rate)
        torch.mul(old_sq, rms, out=exp_avg_sq).addcmul_((1 - rms) * grad, grad)


class Look:
    """What a rule knows of a stack before it moves. Subclasses have their rule's statistics and terms."""

    kept: tuple[Tensor, Tensor] | None = None  # new moments, where there is only one chunk
    state: Mapping[str, Tensor]  # other new state, (T, ...)
    finite: Tensor  # (T,) finite where the new state is

    def terms(self, chunk: Chunk) -> dict[str, Tensor]:
        """The additive parts of a chunk's delta, (T, 1, *chunk) each."""
        raise NotImplementedError


class StackKernel:
    """See `kernels.Kernel`; on the CPU."""

    fields: ClassVar[tuple[str, ...]]  # of the state

    def __init__(self, rule: Any) -> None:
        self.rule: Any = rule
        self._known: tuple[Mapping[str, Tensor], feats.Decays] | None = None
        self._shapes: dict[torch.Size, dict[str, torch.Size]] = {}
        self._room = torch.empty(0, dtype=torch.float32, device="cpu")

    def refuses(self, param: Tensor) -> str | None:
        """Anything but plain tensors of up to float32."""
        if type(param) is not torch.nn.Parameter and type(param) is not Tensor:
            return f"this code takes plain tensors, not {type(param).__name__}"
        return None if param.dtype in DTYPES else f"this code is in float32, and there are {param.dtype} parameters"

    def look(self, stack: Stack, meta: Mapping[str, Tensor], num_steps: int | None, num_tensors: int | None) -> Look:
        """The first pass over a stack."""
        raise NotImplementedError

    def term_names(self) -> list[str]:
        """The names of `Look.terms`."""
        raise NotImplementedError

    def step(
        self,
        parts: Sequence[WorkItem],
        meta_params: Mapping[str, Tensor],
        num_steps: int | None,
        num_tensors: int | None = None,
        *,
        safeguard: bool,
        measure: bool,
    ) -> Squares | None:
        """See `Kernel`."""
        alike: dict[Any, list[WorkItem]] = {}
        for part in parts:
            self._check(part)
            scale, decay = float(part.scale), float(part.decay)
            alike.setdefault((part.param.shape, part.param.dtype, scale, decay, part.maximize), []).append(part)
        found = []
        for group in alike.values():
            at_once = max(1, CHUNK // group[0].param.numel())
            for first in range(0, len(group), at_once):
                stack = Stack(group[first : first + at_once], self.fields)
                look = self.look(stack, meta_params, num_steps, num_tensors)
                found += self._move(stack, look, self.decays(meta_params), safeguard, measure)
        if not measure:
            return None
        change, *terms = torch.stack(found).sum(0)
        return Squares(change, dict(zip(self.term_names(), terms, strict=True)))

    def decays(self, meta: Mapping[str, Tensor]) -> feats.Decays:
        """The rule's decays, computed once as long as the meta-parameters are the same."""
        if self._known is None or self._known[0] is not meta:
            self._known = meta, self.rule.decays(meta)
        return self._known[1]

    def room(self, size: Sequence[int]) -> Tensor:
        """Memory for a chunk, kept from one to the next."""
        number = math.prod(size)
        if self._room.numel() < number:
            self._room = torch.empty(number, dtype=torch.float32, device="cpu")
        return self._room[:number].view(*size)

    def _check(self, part: WorkItem) -> None:
        shape = part.param.shape
        if shape not in self._shapes:
            made = self.rule.init_state(torch.empty(shape, dtype=torch.float32, device="meta"))
            self._shapes[shape] = {name: getattr(made, name).shape for name in self.fields} | {"step": torch.Size()}
        check_shapes(part, self._shapes[shape])
        for name in self.fields:
            part.state[name] = plain(part.state[name])

    def _move(self, s: Stack, look: Look, decays: feats.Decays, safeguard: bool, measure: bool) -> list[Tensor]:
        """Move a stack; the squares of change and terms where they are measured."""
        moved, squares = torch.empty_like(s.param), []
        for chunk in s.chunks:
            terms = look.terms(chunk)
            _new_value(s, cut(s.param, chunk), terms, cut(moved, chunk))
            if measure:
                squares.append([term.flatten(1).square().sum(1) for term in terms.values()])
        moved = moved.squeeze(1).to(s.parts[0].param.dtype)
        good = torch.ones(len(s.parts), dtype=torch.bool, device="cpu")
        if safeguard:
            good = (look.finite + moved.flatten(1).sum(1, dtype=torch.float32)).isfinite()
        change = (moved.float() - s.param.squeeze(1)).flatten(1).square().sum(1) if measure else None
        _write(s, look, moved, decays, good.tolist(), safeguard)
        if change is None:
            return []
        rows = [change, *(torch.stack(column).sum(0) for column in zip(*squares, strict=True))]
        return [torch.stack([torch.where(good, row, 0.0).sum() for row in rows])]


def _new_value(s: Stack, param: Tensor, terms: dict[str, Tensor], out: Tensor) -> None:
    total = functools.reduce(torch.add, terms.values()) if terms else torch.zeros_like(param)
    torch.add(param, total, alpha=float(s.parts[0].scale), out=out)
    if decay := float(s.parts[0].decay):
        out.sub_(param, alpha=decay)


def _write(s: Stack, look: Look, moved: Tensor, decays: feats.Decays, good: list[bool], safeguard: bool) -> None:
    """Parameters, states and counters, of the tensors that are finite."""
    taken = [number for number, finite in enumerate(good) if finite]
    for part, finite in zip(s.parts, good, strict=True) if safeguard else ():
        if finite:
            part.state["skipped_in_row"].zero_()
        else:
            part.state["skipped"] += 1
            part.state["skipped_in_row"] += 1
    if not taken:
        return
    states = [s.parts[number].state for number in taken]
    copies = dict(look.state)
    if look.kept is not None:
        copies["exp_avg"], copies["exp_avg_sq"] = look.kept
    else:  # several chunks, of one tensor: its own state is folded again, in place
        for chunk in s.chunks:
            s.fold(decays, chunk, *cut_all((s.state["exp_avg"], s.state["exp_avg_sq"]), chunk))
    for name, tensor in copies.items():
        old = [state[name] for state in states]
        torch._foreach_copy_(old, [tensor[n].reshape(o.shape) for n, o in zip(taken, old, strict=True)])
    params = [s.parts[number].param for number in taken]
    torch._foreach_copy_(params, [moved[n].reshape(p.shape) for n, p in zip(taken, params, strict=True)])
    torch._foreach_add_([state["step"] for state in states], 1)


def chunks_of(shape: torch.Size) -> list[Chunk]:
    """Chunks of about `CHUNK` coordinates, along the first dim that is long enough, or the longest."""
    number = math.ceil(math.prod(shape) / CHUNK)
    if number <= 1:
        return [(-1, 0, 0)]
    dim = next((d for d, size in enumerate(shape) if size >= number), max(range(len(shape)), key=lambda d: shape[d]))
    rows = max(1, shape[dim] // number)
    return [(dim, first, min(rows, shape[dim] - first)) for first in range(0, shape[dim], rows)]


def cut(tensor: Tensor, chunk: Chunk) -> Tensor:
    """What a chunk has of (T, c, *shape); all of what is 1 along the dim."""
    dim, start, length = chunk
    return tensor if dim < 0 or tensor.shape[dim + 2] == 1 else tensor.narrow(dim + 2, start, length)


def cut_all(tensors: Sequence[Tensor], chunk: Chunk) -> tuple[Tensor, ...]:
    """`cut` of each."""
    return tuple(cut(tensor, chunk) for tensor in tensors)
