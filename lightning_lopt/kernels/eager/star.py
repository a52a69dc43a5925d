"""STAR in plain torch, for where no kernel can be compiled: a few large operations on memory that fits in the cache.

Tensors of one shape are stacked, (T, *shape), and moved together, as many as fit. A larger tensor is taken in chunks
along a dim: once for the mean squares of its features, once for the step. The maths is that of rules/star.py and
rules/features.py, and is tested against it; vectors (rows, columns, weights) come from their functions where they can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.kernels import Squares, WorkItem
from lightning_lopt.rules import STAR, UpdateRule, nominal, scheduler
from lightning_lopt.rules import features as feats

CHUNK = 1 << 17  # coordinates that are taken at once: sixteen features of these stay in the last cache
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Meta = Mapping[str, Tensor]
_Lengths = tuple[int | None, int | None]  # of the run in steps, of the net in tensors
NO_NETWORK = 10  # how many of the dense features are made where no network reads them


def supports(rule: UpdateRule) -> bool:
    """Whether a rule can be moved by this code."""
    if type(rule) is not STAR:
        return False
    c = rule.config
    whole = (c.aggregate_magnitude, c.aggregate_nom_magnitude, c.aggregate_reg_magnitude, c.selfnormalize_blackbox)
    return not any(whole)


class _Vectors(NamedTuple):
    """What a tensor's features have that is smaller than it; sizes along the tensor's dims may be 1."""

    row: Tensor  # (T, 3, ...) new second moments; of a tensor that is not factored the diagonal ones, twice
    col: Tensor
    grad_roots: tuple[Tensor, ...]  # whose product preconditions the gradient
    momentum_roots: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]  # (T, h, ...) whose sum the first layer starts from


class _Stack:
    """Tensors of one shape that move together, seen as (T, c, *shape)."""

    def __init__(self, parts: Sequence[WorkItem]) -> None:
        def gather(tensors: list[Tensor], lead: int = 0) -> Tensor:
            tensor = tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
            tensor = (tensor if lead else tensor.unsqueeze(1)).float()
            return tensor if parts[0].param.dim() else tensor.unsqueeze(-1)  # a scalar as a vector of one

        states = [part.state for part in parts]
        self.parts = parts
        self.shape = parts[0].param.shape or torch.Size((1,))
        self.grad = gather([part.grad for part in parts])
        self.grad = -self.grad if parts[0].maximize else self.grad
        self.param = gather([part.param for part in parts])
        self.exp_avg_sq = gather([state["exp_avg_sq"] for state in states])
        self.exp_avg, self.row, self.col, self.diag = (
            gather([state[name] for state in states], 1) for name in ("exp_avg", "row", "col", "diag")
        )
        self.step = torch.stack([state["step"] for state in states])


class TorchStar:
    """See `kernels.Kernel`; on the CPU."""

    def __init__(self, rule: STAR) -> None:
        self.rule, c = rule, rule.config
        self.network = bool(c.step_mult or c.nominal_controller or (c.weight_decay and c.regularization_controller))
        self.known: tuple[Mapping[str, Tensor], feats.Decays] | None = None
        self.room = torch.empty(0)  # for the features of a chunk, the largest so far

    def refuses(self, param: Tensor) -> str | None:
        """Anything but plain tensors of up to float32."""
        if type(param) is not torch.nn.Parameter and type(param) is not Tensor:
            return f"this code takes plain tensors, not {type(param).__name__}"
        return None if param.dtype in DTYPES else f"this code is in float32, and there are {param.dtype} parameters"

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
            scale, decay = float(part.scale), float(part.decay)
            alike.setdefault((part.param.shape, part.param.dtype, scale, decay, part.maximize), []).append(part)
        found = []
        for group in alike.values():
            at_once = max(1, CHUNK // group[0].param.numel())
            for first in range(0, len(group), at_once):
                stack = _Stack(group[first : first + at_once])
                found += self._move(stack, meta_params, (num_steps, num_tensors), safeguard, measure)
        if not measure:
            return None
        names = {name: None for squares in found for name in squares.terms}
        terms = {name: torch.stack([s.terms[name] for s in found]).sum() for name in names}
        return Squares(torch.stack([s.change for s in found]).sum(), terms)

    def _move(self, s: _Stack, meta: _Meta, lengths: _Lengths, safeguard: bool, measure: bool) -> list[Squares]:
        if self.known is None or self.known[0] is not meta:
            self.known = meta, self.rule.decays(meta)
        decays = self.known[1]
        if self.rule.config.scheduler:
            s.grad = self._centered(s, meta, lengths[0])
        vectors = self._vectors(s, meta, decays)
        chunks, sums = _chunks(s.shape), torch.zeros(())
        for chunk in chunks:
            x = self._features(s, vectors, decays, chunk)
            flat = x.reshape(-1, 1, x[0, 0].numel())
            sums = sums + torch.bmm(flat, flat.mT).reshape(x.shape[:2])
        mean_squares = sums / max(1, math.prod(s.shape))
        multipliers = self._multipliers(s, meta, decays, mean_squares, *lengths)
        weights = self._first_layer(meta, mean_squares)
        moved, squares = torch.empty_like(s.param), []
        for chunk in chunks:
            if len(chunks) > 1:
                x = self._features(s, vectors, decays, chunk)
            terms = self._terms(x, meta, weights, _cut_all(vectors.hidden, chunk), *multipliers)
            self._new_value(s, _cut(s.param, chunk), terms, _cut(moved, chunk))
            if measure:
                squares.append([term.flatten(1).square().sum(1) for term in terms.values()])
        moved = moved.squeeze(1).to(s.parts[0].param.dtype)
        good = torch.ones(len(s.parts), dtype=torch.bool)
        if safeguard:
            vector_sums = vectors.row.flatten(1).sum(1) + vectors.col.flatten(1).sum(1)
            good = (sums[:, 1:9].sum(1) + vector_sums + moved.flatten(1).sum(1, dtype=torch.float32)).isfinite()
        gained = []
        if measure:
            change = (moved.float() - s.param.squeeze(1)).flatten(1).square().sum(1)
            rows = [change, *(torch.stack(column).sum(0) for column in zip(*squares, strict=True))]
            of_change, *of_terms = (torch.where(good, row, 0.0).sum() for row in rows)
            gained = [Squares(of_change, dict(zip(self._names(), of_terms, strict=True)))]
        self._write(s, moved, vectors, x if len(chunks) == 1 else None, decays, good.tolist(), safeguard)
        return gained

    def _centered(self, s: _Stack, meta: _Meta, num_steps: int | None) -> Tensor:
        share = scheduler.ramp(meta, "centering", s.step, num_steps)
        found: Tensor = torch.func.vmap(feats.centered)(s.grad.squeeze(1), share)
        return found.unsqueeze(1)

    def _vectors(self, s: _Stack, meta: _Meta, decays: feats.Decays) -> _Vectors:
        """New second moments per row and column, and what follows from them alone."""
        dims = feats.factored_dims(s.shape)
        grad_roots: tuple[Tensor, ...]
        momentum_roots: tuple[Tensor, ...]

        def average(old: Tensor, new: Tensor) -> Tensor:
            rate = decays.adafactor.reshape(3, *[1] * (old.dim() - 2))
            return rate * old + (1 - rate) * new

        squares = s.grad.square()  # a norm along a dim that is not the last takes ten times as long
        if dims is None:
            row = col = average(s.diag, squares + 1e-30)
            grad_roots, momentum_roots = (_clamped_rsqrt(row + 1e-9),), (torch.rsqrt(row + 1e-6),)
        else:
            d1, d0 = (dim + 2 for dim in dims)
            row = average(s.row.unsqueeze(d0), squares.mean(d0, keepdim=True) + 1e-30)
            col = average(s.col.unsqueeze(d1), squares.mean(d1, keepdim=True) + 1e-30)
            relative = row / (row.mean(d1, keepdim=True) + 1e-9)
            grad_roots = momentum_roots = _clamped_rsqrt(relative), _clamped_rsqrt(col)
        hidden = []
        if self.network:
            time = feats.time_features(s.step.unsqueeze(1), torch.float32)
            bias = meta["b0"] + time @ meta["w0"][feats.NUM_CHANNELS :]
            for rows, moment in ((feats.ROW, row), (feats.COL, col)):
                channels = torch.cat([moment, torch.rsqrt(moment + 1e-8)], 1)
                scale = feats.inverse_root_of_mean(channels.square().flatten(2).mean(2))
                weight = meta["w0"][list(rows)] * scale.unsqueeze(2)
                hidden.append((weight.mT @ channels.flatten(2)).reshape(len(s.parts), -1, *channels.shape[2:]))
            hidden[0] = hidden[0] + bias.reshape(*bias.shape, *[1] * len(s.shape))
            hidden = [hidden[0] + hidden[1]] if dims is None else hidden
        return _Vectors(row, col, grad_roots, momentum_roots, tuple(hidden))

    def _features(self, s: _Stack, vectors: _Vectors, decays: feats.Decays, chunk: tuple[int, int, int]) -> Tensor:
        """(T, 16, *chunk), or the first `NO_NETWORK` of the channels, in the order of `features.DENSE`."""
        grad, param, exp_avg, second = _cut_all((s.grad, s.param, s.exp_avg, s.exp_avg_sq), chunk)
        size = (len(s.parts), 16 if self.network else NO_NETWORK, *grad.shape[2:])
        number = math.prod(size)
        if self.room.numel() < number:
            self.room = torch.empty(number)
        x = self.room[:number].view(size)
        x[:, :1], x[:, 1:2] = grad, param
        ones = [1] * len(s.shape)
        rate, rms = decays.momentum.reshape(3, *ones), decays.rms.reshape(1, *ones)
        torch.mul(exp_avg, rate, out=x[:, 2:5]).addcmul_(grad, 1 - rate)
        torch.mul(second, rms, out=x[:, 5:6]).addcmul_(grad * grad, 1 - rms)
        torch.add(x[:, 5:6], self.rule.config.eps, out=x[:, 9:10]).rsqrt_()
        torch.mul(x[:, 2:5], x[:, 9:10], out=x[:, 6:9])
        if self.network:
            of_grad, of_momenta = (_cut_all(r, chunk) for r in (vectors.grad_roots, vectors.momentum_roots))
            first, second_root = of_grad[0], of_momenta[0]
            if len(of_grad) == 2:
                first = second_root = of_grad[0] * of_grad[1]
            torch.mul(first, grad, out=x[:, 10:13])
            torch.mul(second_root, x[:, 2:5], out=x[:, 13:16])
        return x

    def _first_layer(self, meta: _Meta, mean_squares: Tensor) -> Tensor:
        """(T, h, 16) weights with the normalizers in them."""
        if not self.network:
            return mean_squares
        return (meta["w0"][list(feats.DENSE)] * feats.inverse_root_of_mean(mean_squares).unsqueeze(2)).mT

    def _multipliers(
        self,
        s: _Stack,
        meta: _Meta,
        decays: feats.Decays,
        mean_squares: Tensor,
        num_steps: int | None,
        num_tensors: int | None,
    ) -> tuple[Tensor | float, Tensor | None, Tensor | None]:
        """The factor of both terms (T, 1, ...), the weights of the momenta (T, 3, ...), the caution (T, 1, ...)."""
        if not self.rule.config.scheduler:
            return 1.0, None, None
        read = torch.cat([mean_squares[:, 1:2], mean_squares[:, 6:9]], 1)
        shapes = torch.tensor([scheduler.shape_features(s.shape, num_tensors)]).expand(len(s.parts), -1)
        noise = scheduler.noise_strength(decays.momentum[2], decays.rms[0], s.step)
        factor, momenta = scheduler.multipliers(meta, read, shapes, s.step, num_steps, noise)
        ones = [1] * len(s.shape)
        caution = scheduler.ramp(meta, "caution", s.step, num_steps)
        momenta = momenta.expand(len(s.parts), -1).reshape(-1, 3, *ones)
        return factor.reshape(-1, 1, *ones), momenta, caution.reshape(-1, 1, *ones)

    def _terms(
        self,
        x: Tensor,
        meta: _Meta,
        weights: Tensor,
        hidden: tuple[Tensor, ...],
        factor: Tensor | float,
        momenta: Tensor | None,
        caution: Tensor | None,
    ) -> dict[str, Tensor]:
        """The step's parts, (T, 1, *chunk) each: rules.star.STAR._terms."""
        c, terms = self.rule.config, {}
        grad, param, exp_avg, root = x[:, :1], x[:, 1:2], x[:, 2:5], x[:, 9:10]
        heads = self._heads(x, meta, weights, hidden) if self.network else x
        if c.step_mult:
            step = torch.exp(c.exp_mult[0] * heads[:, 1:2]).mul_(heads[:, :1]).mul_(-c.step_mult * factor)
            terms["blackbox"] = step.mul_(root) if c.normalize_blackbox else step
        if c.nominal_stepsize:
            if c.nominal_grad_estimator in ("AggMo", "AdamAggMo"):
                mix = torch.full((1, 3), 1 / 3) if momenta is None else momenta.reshape(-1, 3)
                mixed = mix.expand(len(x), 3).unsqueeze(1) @ exp_avg.reshape(len(x), 3, -1)
                direction = mixed.reshape(grad.shape)
                direction = direction * root if c.nominal_grad_estimator == "AdamAggMo" else direction
            else:
                planes = exp_avg.transpose(0, 1).unsqueeze(2)  # the rule's function has the momenta first
                direction = nominal.nominal_direction(c.nominal_grad_estimator, grad, planes, root)
            direction = direction if caution is None else nominal.cautious(direction, grad, caution)
            control: Tensor | float = math.exp(c.exp_mult[1])
            if c.nominal_controller:
                control = nominal.magnitude(c.exp_mult[1], heads[:, 2:3])
            terms["nominal"] = direction * (-c.nominal_stepsize * factor * control)
        if c.weight_decay:
            terms["decay"] = -c.weight_decay * param
            if c.regularization_controller:
                terms["decay"] = terms["decay"] * nominal.magnitude(c.exp_mult[2], heads[:, 3:4])
        return terms

    def _heads(self, x: Tensor, meta: _Meta, weights: Tensor, hidden: tuple[Tensor, ...]) -> Tensor:
        flat = x.reshape(*x.shape[:2], -1)
        if len(hidden) == 2:
            layer = torch.add(*hidden).reshape(len(x), -1, flat.shape[2]).baddbmm_(weights, flat)
        else:
            layer = torch.baddbmm(hidden[0].reshape(len(x), -1, flat.shape[2]), weights, flat)
        for number in range(1, self.rule.config.hidden_layers + 1):
            weight, bias = meta[f"w{number}"], meta[f"b{number}"]
            layer = torch.bmm(weight.mT.expand(len(x), -1, -1), layer.relu_()).add_(bias.unsqueeze(1))
        return layer.reshape(len(x), -1, *x.shape[2:])

    def _new_value(self, s: _Stack, param: Tensor, terms: dict[str, Tensor], out: Tensor) -> None:
        total = sum(list(terms.values())[1:], next(iter(terms.values()))) if terms else torch.zeros(())
        torch.add(param, total, alpha=float(s.parts[0].scale), out=out)
        if decay := float(s.parts[0].decay):
            out.sub_(param, alpha=decay)

    def _names(self) -> list[str]:
        c = self.rule.config
        there = {"blackbox": c.step_mult, "nominal": c.nominal_stepsize, "decay": c.weight_decay}
        return [name for name, value in there.items() if value]

    def _write(
        self,
        s: _Stack,
        moved: Tensor,
        vectors: _Vectors,
        x: Tensor | None,
        decays: feats.Decays,
        good: list[bool],
        safeguard: bool,
    ) -> None:
        """Parameters, states and counters, of the tensors that are finite."""
        taken = [number for number, finite in enumerate(good) if finite]
        for number, part in enumerate(s.parts) if safeguard else ():
            if good[number]:
                part.state["skipped_in_row"].zero_()
            else:
                part.state["skipped"] += 1
                part.state["skipped_in_row"] += 1
        if not taken:
            return
        states = [s.parts[number].state for number in taken]
        copies: dict[str, Tensor] = {}
        if (dims := feats.factored_dims(s.shape)) is None:
            copies["diag"] = vectors.row
        else:
            copies["row"], copies["col"] = vectors.row.squeeze(dims[1] + 2), vectors.col.squeeze(dims[0] + 2)
        if x is not None:
            copies |= {"exp_avg": x[:, 2:5], "exp_avg_sq": x[:, 5]}
        else:
            ones, grad = [1] * len(s.shape), s.grad[0]
            rate, rms = decays.momentum.reshape(3, *ones), decays.rms.reshape(ones)
            for chunk in _chunks(s.shape):
                g = _cut(grad, chunk, 1)
                _cut(states[0]["exp_avg"], chunk, 1).mul_(rate).addcmul_(g, 1 - rate)
                _cut(states[0]["exp_avg_sq"], chunk, 0).mul_(rms).addcmul_(g[0] * g[0], 1 - rms)
        for name, tensor in copies.items():
            old = [state[name] for state in states]
            torch._foreach_copy_(old, [tensor[n].reshape(o.shape) for n, o in zip(taken, old, strict=True)])
        params = [s.parts[number].param for number in taken]
        torch._foreach_copy_(params, [moved[n].reshape(p.shape) for n, p in zip(taken, params, strict=True)])
        torch._foreach_add_([state["step"] for state in states], 1.0)


def _chunks(shape: torch.Size) -> list[tuple[int, int, int]]:
    """(dim, start, length) of about `CHUNK` coordinates, along the first dim that is long enough, or the longest."""
    number = math.ceil(math.prod(shape) / CHUNK)
    if number <= 1:
        return [(-1, 0, 0)]
    dim = next((d for d, size in enumerate(shape) if size >= number), max(range(len(shape)), key=lambda d: shape[d]))
    rows = max(1, shape[dim] // number)
    return [(dim, first, min(rows, shape[dim] - first)) for first in range(0, shape[dim], rows)]


def _cut(tensor: Tensor, chunk: tuple[int, int, int], lead: int = 2) -> Tensor:
    """What a chunk has of (T, c, *shape); all of what is 1 along the dim."""
    dim, start, length = chunk
    return tensor if dim < 0 or tensor.shape[dim + lead] == 1 else tensor.narrow(dim + lead, start, length)


def _cut_all(tensors: Sequence[Tensor], chunk: tuple[int, int, int]) -> tuple[Tensor, ...]:
    return tuple(_cut(tensor, chunk) for tensor in tensors)


def _clamped_rsqrt(x: Tensor) -> Tensor:
    return torch.rsqrt(x.clamp(min=1e-9))
