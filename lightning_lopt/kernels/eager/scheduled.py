"""The rule `scheduled` in eager PyTorch, for where no C++ kernel can be compiled.

The rule itself takes dozens of small operations per tensor. Here tensors of one shape are stacked, (T, c, *shape), and
moved together by a few large operations, as many as fit into the cache. A larger tensor is taken in chunks along a dim:
once for the means that its schedule reads, once for the step. The math is that of rules/scheduled.py, whose functions
it calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.kernels import Kernel, Squares, WorkItem
from lightning_lopt.kernels.mismatch import check_shapes, plain
from lightning_lopt.rules import Scheduled, UpdateRule, matrix, scheduled, scheduler
from lightning_lopt.rules import features as feats

CHUNK = 1 << 17  # coordinates taken at once: their moments stay in the last-level cache
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE = ("exp_avg", "exp_avg_sq", "first_square")
Chunk = tuple[int, int, int]  # (dim, start, length); dim -1 is all of the tensor


def supports(rule: UpdateRule) -> str | None:
    """Why this rule cannot be moved by this code, None if it can."""
    return None if type(rule) is Scheduled else f"{type(rule).__name__} is not the class that this code was written for"


def make(rule: UpdateRule) -> Kernel:
    """The kernel of a rule that `supports` accepts."""
    assert isinstance(rule, Scheduled)
    return EagerScheduled(rule)


class _Stack:
    """Tensors of one shape that move together, seen as (T, c, *shape) in float32."""

    def __init__(self, items: Sequence[WorkItem]) -> None:
        self.items = items
        self.role = items[0].role
        self.is_table = scheduled.is_table(items[0].param.shape, self.role)
        self.is_matrix = matrix.is_matrix(items[0].param.shape, self.role)
        self.shape = items[0].param.shape or torch.Size((1,))  # a scalar as a vector of one
        self.grad = self._gather([item.grad for item in items]).unsqueeze(1)
        self.grad = -self.grad if items[0].maximize else self.grad
        self.param = self._gather([item.param for item in items]).unsqueeze(1)
        self.exp_avg = self._gather([item.state["exp_avg"] for item in items])
        self.exp_avg_sq = self._gather([item.state["exp_avg_sq"] for item in items]).unsqueeze(1)
        self.step = torch.stack([item.state["step"] for item in items]).to(torch.float32)
        self.first_square = torch.stack([item.state["first_square"] for item in items])
        self.chunks = _chunks_of(self.shape)

    def _gather(self, tensors: list[Tensor]) -> Tensor:
        tensor = tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
        return tensor.float() if self.items[0].param.dim() else tensor.float().unsqueeze(-1)

    def per_tensor(self, values: Tensor) -> Tensor:
        """(T,) as (T, 1, 1, ...), to go with tensors."""
        return values.reshape(len(self.items), -1, *[1] * len(self.shape))

    def fold(self, decays: feats.Decays, chunk: Chunk, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Write a chunk's new moments, (T, 3, *chunk) and (T, 1, *chunk); these may be the old ones."""
        grad, old, old_sq = (_cut(tensor, chunk) for tensor in (self.grad, self.exp_avg, self.exp_avg_sq))
        ones = [1] * len(self.shape)
        rate, rms = decays.momentum.reshape(3, *ones), decays.rms.reshape(1, *ones)
        if self.is_table:  # only what has a gradient moves: at the others, both rates are 1
            rate, rms = (torch.where(grad == 0, 1.0, each) for each in (rate, rms))
        torch.mul(old, rate, out=exp_avg).addcmul_(grad, 1 - rate)
        # Not (1 - rms) * (grad * grad): the square of a gradient of 1e20 leaves the range of float32.
        torch.mul(old_sq, rms, out=exp_avg_sq).addcmul_((1 - rms) * grad, grad)


class _Multipliers(NamedTuple):
    """What the schedule says of a stack."""

    stepsize: Tensor  # (T, 1, ...) signed: what the direction is multiplied by
    weights: Tensor  # (T, 1, 3) of the momenta
    caution: Tensor  # (T, 1, ...)
    orthogonal: Tensor  # (T, 1, ...) share of the orthogonal step
    decay: Tensor  # (T, 1, ...)
    first_square: Tensor  # (T,)
    finite: Tensor  # (T,) finite where the new moments are
    moments: Tensor | None  # (T, 5, *shape) as `_moments` gives them, where there is only one chunk


class EagerScheduled:
    """See `kernels.Kernel`."""

    def __init__(self, rule: Scheduled) -> None:
        self.rule = rule
        self._decays: tuple[Mapping[str, Tensor], feats.Decays] | None = None
        self._room = torch.empty(0, dtype=torch.float32, device="cpu")

    def refuses(self, param: Tensor) -> str | None:
        """Anything but plain tensors of up to float32."""
        if type(param) is not torch.nn.Parameter and type(param) is not Tensor:
            return f"this code takes plain tensors, not {type(param).__name__}"
        return None if param.dtype in DTYPES else f"this code is in float32, and there are {param.dtype} parameters"

    def step(
        self,
        work_items: Sequence[WorkItem],
        meta_params: Mapping[str, Tensor],
        num_steps: int | None,
        num_tensors: int | None = None,
        *,
        safeguard: bool,
        measure: bool,
    ) -> Squares | None:
        """See `Kernel`."""
        if self._decays is None or self._decays[0] is not meta_params:
            self._decays = meta_params, self.rule.decays(meta_params)
        alike: dict[Any, list[WorkItem]] = {}
        for item in work_items:
            shape = item.param.shape
            shapes = {"exp_avg": (3, *shape), "exp_avg_sq": shape, "first_square": (), "step": ()}
            check_shapes(item.param, item.grad, item.state, shapes)
            item.state.update({name: plain(item.state[name]) for name in STATE})
            key = (shape, item.param.dtype, float(item.scale), float(item.decay), item.maximize, item.role)
            alike.setdefault(key, []).append(item)
        found = []
        for group in alike.values():
            at_once = max(1, CHUNK // group[0].param.numel())
            for first in range(0, len(group), at_once):
                stack = _Stack(group[first : first + at_once])
                multipliers = self._multipliers(stack, meta_params, num_steps, num_tensors)
                found += self._move(stack, multipliers, safeguard, measure)
        if not measure:
            return None
        change, nominal = torch.stack(found).sum(0)
        return Squares(change, {"nominal": nominal})

    def _multipliers(
        self, stack: _Stack, meta_params: Mapping[str, Tensor], num_steps: int | None, num_tensors: int | None
    ) -> _Multipliers:
        """The first pass: center the gradients, and take the means over each tensor that the schedule reads."""
        fraction = scheduler.ramp(meta_params, "centering", stack.step, num_steps)
        stack.grad = torch.func.vmap(scheduled.centered)(stack.grad.squeeze(1), fraction).unsqueeze(1)
        count = len(stack.items)
        sums = torch.zeros(count, 5, dtype=torch.float32, device="cpu")
        finite = torch.zeros(count, dtype=torch.float32, device="cpu")
        for chunk in stack.chunks:
            x = self._moments(stack, chunk)
            rows = torch.cat([_cut(stack.param, chunk), x[:, :3] * x[:, 4:]], 1)
            sums[:, :4] += rows.flatten(2).square().sum(2)
            sums[:, 4] += (x[:, 3] > 0).flatten(1).sum(1)
            finite += x[:, :4].flatten(1).sum(1)
        shape = stack.items[0].param.shape
        means = sums / math.prod(stack.shape)
        square, strengths, seen = means[:, :1], means[:, 1:4], means[:, 4:]
        features = [scheduler.shape_features(shape, num_tensors), scheduled.role_features(shape, stack.role)]
        shapes, roles = (torch.tensor([f], dtype=torch.float32, device="cpu").expand(count, -1) for f in features)
        first_square = torch.where(stack.step == 0, square.squeeze(1), stack.first_square)
        mean_squares = torch.cat([square, strengths / seen.clamp(min=1e-12)], 1)
        assert self._decays is not None
        found = scheduled.multipliers(
            meta_params,
            scheduled.TensorFacts(mean_squares, first_square, shapes, roles),
            stack.step,
            num_steps,
            decays=self._decays[1],
            stepsize=self.rule.config.nominal_stepsize,
        )
        decay = scheduled.decay(meta_params, stack.step, num_steps) * (len(shape) > 1)
        caution, orthogonal = (
            scheduler.ramp(meta_params, name, stack.step, num_steps) for name in ("caution", "orthogonal")
        )
        return _Multipliers(
            stepsize=stack.per_tensor(-self.rule.config.nominal_stepsize * found.factor),
            weights=found.momenta.expand(count, 3).unsqueeze(1),
            caution=stack.per_tensor(caution),
            orthogonal=orthogonal.reshape(-1, 1, 1, 1),
            decay=stack.per_tensor(decay),
            first_square=first_square,
            finite=finite,
            moments=x if len(stack.chunks) == 1 else None,
        )

    def _moments(self, stack: _Stack, chunk: Chunk) -> Tensor:
        """(T, 5, *chunk): new momenta, new second moment, and its inverse root; in memory that the next call reuses."""
        grad = _cut(stack.grad, chunk)
        size = (len(grad), 5, *grad.shape[2:])
        if self._room.numel() < math.prod(size):
            self._room = torch.empty(math.prod(size), dtype=torch.float32, device="cpu")
        x = self._room[: math.prod(size)].view(size)
        assert self._decays is not None
        stack.fold(self._decays[1], chunk, x[:, :3], x[:, 3:4])
        torch.add(x[:, 3:4], self.rule.config.eps, out=x[:, 4:]).rsqrt_()
        return x

    def _move(self, stack: _Stack, multipliers: _Multipliers, safeguard: bool, measure: bool) -> list[Tensor]:
        """The second pass: move a stack. Returns the squares of change and nominal term where they are measured."""
        steps = torch.empty_like(stack.param)
        for chunk in stack.chunks:
            x = self._moments(stack, chunk) if multipliers.moments is None else multipliers.moments
            grad = _cut(stack.grad, chunk)
            direction = (multipliers.weights @ x[:, :3].flatten(2)).reshape(grad.shape) * x[:, 4:]
            nominal = scheduled.cautious(direction, grad, multipliers.caution)
            if stack.is_table:
                nominal = torch.where(grad == 0, 0.0, nominal)
            torch.mul(nominal, multipliers.stepsize, out=_cut(steps, chunk))
        if stack.is_matrix:
            rows, columns = matrix.sides(stack.shape, stack.role)
            matrices = steps.reshape(len(stack.items), -1, rows, columns)
            steps = matrix.orthogonal(matrices, multipliers.orthogonal).reshape(steps.shape)
        lost = multipliers.decay * stack.param
        steps = steps - (torch.where(stack.grad == 0, 0.0, lost) if stack.is_table else lost)
        scale, decay = float(stack.items[0].scale), float(stack.items[0].decay)
        moved = torch.add(stack.param, steps, alpha=scale)
        if decay:
            moved.sub_(stack.param, alpha=decay)
        moved = moved.squeeze(1).to(stack.items[0].param.dtype)
        good = torch.ones(len(stack.items), dtype=torch.bool, device="cpu")
        if safeguard:
            good = (multipliers.finite + moved.flatten(1).sum(1, dtype=torch.float32)).isfinite()
        change = (moved.float() - stack.param.squeeze(1)).flatten(1).square().sum(1) if measure else None
        self._write(stack, multipliers, moved, good.tolist(), safeguard)
        if change is None:
            return []
        nominal_squares = steps.flatten(1).square().sum(1)
        return [torch.stack([torch.where(good, row, 0.0).sum() for row in (change, nominal_squares)])]

    def _write(
        self, stack: _Stack, multipliers: _Multipliers, moved: Tensor, good: list[bool], safeguard: bool
    ) -> None:
        """Write parameters, states and counters of the tensors that are finite."""
        for item, finite in zip(stack.items, good, strict=True) if safeguard else ():
            if finite:
                item.state["skipped_in_row"].zero_()
            else:
                item.state["skipped"] += 1
                item.state["skipped_in_row"] += 1
        taken = [number for number, finite in enumerate(good) if finite]
        if not taken:
            return
        moments = multipliers.moments
        if moments is None:  # several chunks, of one tensor: its own state is folded again, in place
            assert self._decays is not None
            for chunk in stack.chunks:
                stack.fold(self._decays[1], chunk, _cut(stack.exp_avg, chunk), _cut(stack.exp_avg_sq, chunk))
            exp_avg, exp_avg_sq = stack.exp_avg, stack.exp_avg_sq
        else:
            exp_avg, exp_avg_sq = moments[:, :3], moments[:, 3:4]
        states = [stack.items[number].state for number in taken]
        params = [stack.items[number].param for number in taken]
        targets = [params, *([state[name] for state in states] for name in STATE)]
        for new, old in zip((moved, exp_avg, exp_avg_sq, multipliers.first_square), targets, strict=True):
            torch._foreach_copy_(old, [new[n].reshape(o.shape) for n, o in zip(taken, old, strict=True)])
        torch._foreach_add_([state["step"] for state in states], 1)


def _chunks_of(shape: torch.Size) -> list[Chunk]:
    """Chunks of about `CHUNK` coordinates, along the first dim that is long enough, or the longest."""
    number = math.ceil(math.prod(shape) / CHUNK)
    if number <= 1:
        return [(-1, 0, 0)]
    dim = next((d for d, size in enumerate(shape) if size >= number), max(range(len(shape)), key=lambda d: shape[d]))
    rows = max(1, shape[dim] // number)
    return [(dim, first, min(rows, shape[dim] - first)) for first in range(0, shape[dim], rows)]


def _cut(tensor: Tensor, chunk: Chunk) -> Tensor:
    """The part of (T, c, *shape) that lies in a chunk."""
    dim, start, length = chunk
    return tensor if dim < 0 else tensor.narrow(dim + 2, start, length)
