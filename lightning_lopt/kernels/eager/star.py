"""STAR in eager PyTorch, for where no kernel can be compiled.

The math is that of rules/star.py and rules/features.py, whose functions are called where they fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.kernels.eager.stacks import Chunk, Look, Stack, StackKernel, cut_all
from lightning_lopt.rules import features as feats
from lightning_lopt.rules import nominal
from lightning_lopt.rules.star import STARConfig


def has_option_of_whole_tensors(c: STARConfig) -> bool:
    """Whether a configuration needs means over the network's outputs or the gradient, which this code does not take."""
    whole = (c.aggregate_magnitude, c.aggregate_nom_magnitude, c.aggregate_reg_magnitude, c.selfnormalize_blackbox)
    return any(whole)


class _Vectors(NamedTuple):
    """What a tensor's features have that is smaller than it; sizes along the tensor's dims may be 1."""

    row: Tensor  # (T, 3, ...) new second moments; of a tensor that is not factored the diagonal ones, twice
    col: Tensor
    grad_roots: tuple[Tensor, ...]  # whose product preconditions the gradient
    momentum_roots: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]  # (T, h, ...) whose sum the first layer starts from


class StarStacks(StackKernel):
    """See `kernels.Kernel`."""

    fields = ("exp_avg", "exp_avg_sq", "row", "col", "diag")

    def look(self, stack: Stack, meta: Mapping[str, Tensor], num_steps: int | None, num_tensors: int | None) -> Look:
        """New factored moments, and the features' normalizers from their means over the tensors."""
        return _StarLook(self, stack, meta)

    def term_names(self) -> list[str]:
        """The names of `Look.terms`."""
        c = self.rule.config
        there = {"blackbox": c.step_mult, "nominal": c.nominal_stepsize, "decay": c.weight_decay}
        return [name for name, value in there.items() if value]


class _StarLook(Look):
    def __init__(self, kernel: StarStacks, stack: Stack, meta: Mapping[str, Tensor]) -> None:
        self.kernel, self.stack, self.meta, self.decays = kernel, stack, meta, kernel.decays(meta)
        self.vectors = self._vectors()
        sums = torch.zeros(len(stack.parts), 16, dtype=torch.float32, device="cpu")
        for chunk in stack.chunks:
            x = self._features(chunk)
            flat = x.reshape(-1, 1, x[0, 0].numel())
            sums = sums + torch.bmm(flat, flat.mT).reshape(x.shape[:2])
        self.only = x if len(stack.chunks) == 1 else None
        self.kept = None if self.only is None else (x[:, 2:5], x[:, 5:6])
        scale = feats.inverse_root_of_mean(sums / math.prod(stack.shape))
        self.weights = (meta["w0"][list(feats.DENSE)] * scale.unsqueeze(2)).mT  # (T, h, 16)

        row, col = self.vectors.row, self.vectors.col
        self.finite = sums[:, 1:9].sum(1) + row.flatten(1).sum(1) + col.flatten(1).sum(1)
        if (dims := feats.factored_dims(stack.shape)) is None:
            self.state = {"diag": row}
        else:
            self.state = {"row": row.squeeze(dims[1] + 2), "col": col.squeeze(dims[0] + 2)}

    def _vectors(self) -> _Vectors:
        """New second moments per row and column, and what follows from them alone."""
        s, meta, decays = self.stack, self.meta, self.decays
        dims = feats.factored_dims(s.shape)
        grad_roots: tuple[Tensor, ...]
        momentum_roots: tuple[Tensor, ...]

        def average(old: Tensor, new: Tensor) -> Tensor:
            rate = decays.adafactor.reshape(3, *[1] * (old.dim() - 2))
            return rate * old + (1 - rate) * new

        squares = s.grad.square()  # a norm along a dim that is not the last takes ten times as long
        if dims is None:
            row = col = average(s.state["diag"], squares + 1e-30)
            grad_roots, momentum_roots = (_clamped_rsqrt(row + 1e-9),), (torch.rsqrt(row + 1e-6),)
        else:
            d1, d0 = (dim + 2 for dim in dims)
            row = average(s.state["row"].unsqueeze(d0), squares.mean(d0, keepdim=True) + 1e-30)
            col = average(s.state["col"].unsqueeze(d1), squares.mean(d1, keepdim=True) + 1e-30)
            relative = row / (row.mean(d1, keepdim=True) + 1e-9)
            grad_roots = momentum_roots = _clamped_rsqrt(relative), _clamped_rsqrt(col)
        hidden = []
        time = feats.time_features(s.step.unsqueeze(1), torch.float32)
        bias = meta["b0"] + time @ meta["w0"][feats.NUM_CHANNELS :]
        for rows, moment in ((feats.ROW, row), (feats.COL, col)):
            channels = torch.cat([moment, torch.rsqrt(moment + 1e-8)], 1)
            scale = feats.inverse_root_of_mean(channels.square().flatten(2).mean(2))
            weight = meta["w0"][list(rows)] * scale.unsqueeze(2)
            hidden.append((weight.mT @ channels.flatten(2)).reshape(len(s.parts), -1, *channels.shape[2:]))
        hidden[0] = hidden[0] + s.per_tensor(bias)
        hidden = [hidden[0] + hidden[1]] if dims is None else hidden
        return _Vectors(row, col, grad_roots, momentum_roots, tuple(hidden))

    def _features(self, chunk: Chunk) -> Tensor:
        """(T, 16, *chunk) in the order of `features.DENSE`."""
        s = self.stack
        grad, param = cut_all((s.grad, s.param), chunk)
        x = self.kernel.room((len(s.parts), 16, *grad.shape[2:]))
        x[:, :1], x[:, 1:2] = grad, param
        s.fold(self.decays, chunk, x[:, 2:5], x[:, 5:6])
        torch.add(x[:, 5:6], self.kernel.rule.config.eps, out=x[:, 9:10]).rsqrt_()
        torch.mul(x[:, 2:5], x[:, 9:10], out=x[:, 6:9])
        of_grad, of_momenta = (cut_all(r, chunk) for r in (self.vectors.grad_roots, self.vectors.momentum_roots))
        first, second = of_grad[0], of_momenta[0]
        if len(of_grad) == 2:
            first = second = of_grad[0] * of_grad[1]
        torch.mul(first, grad, out=x[:, 10:13])
        torch.mul(second, x[:, 2:5], out=x[:, 13:16])
        return x

    def terms(self, chunk: Chunk) -> dict[str, Tensor]:
        """The step's parts, as `STAR.terms` has them."""
        x = self._features(chunk) if self.only is None else self.only
        c, terms = self.kernel.rule.config, {}
        grad, param, exp_avg, root = x[:, :1], x[:, 1:2], x[:, 2:5], x[:, 9:10]
        heads = self._heads(x, cut_all(self.vectors.hidden, chunk))
        if c.step_mult:
            step = torch.exp(c.exp_mult[0] * heads[:, 1:2]).mul_(heads[:, :1]).mul_(-c.step_mult)
            terms["blackbox"] = step.mul_(root) if c.normalize_blackbox else step
        if c.nominal_stepsize:
            planes = exp_avg.transpose(0, 1).unsqueeze(2)  # the rule's function has the momenta first
            direction = nominal.nominal_direction(c.nominal_grad_estimator, grad, planes, root)
            control: Tensor | float = math.exp(c.exp_mult[1])
            if c.nominal_controller:
                control = nominal.magnitude(c.exp_mult[1], heads[:, 2:3])
            terms["nominal"] = direction * (-c.nominal_stepsize * control)
        if c.weight_decay:
            terms["decay"] = -c.weight_decay * param
            if c.regularization_controller:
                terms["decay"] = terms["decay"] * nominal.magnitude(c.exp_mult[2], heads[:, 3:4])
        return terms

    def _heads(self, x: Tensor, hidden: tuple[Tensor, ...]) -> Tensor:
        flat = x.reshape(*x.shape[:2], -1)
        if len(hidden) == 2:
            layer = torch.add(*hidden).reshape(len(x), -1, flat.shape[2]).baddbmm_(self.weights, flat)
        else:
            layer = torch.baddbmm(hidden[0].reshape(len(x), -1, flat.shape[2]), self.weights, flat)
        for number in range(1, self.kernel.rule.config.hidden_layers + 1):
            weight, bias = self.meta[f"w{number}"], self.meta[f"b{number}"]
            layer = torch.bmm(weight.mT.expand(len(x), -1, -1), layer.relu_()).add_(bias.unsqueeze(1))
        return layer.reshape(len(x), -1, *x.shape[2:])


def _clamped_rsqrt(x: Tensor) -> Tensor:
    return torch.rsqrt(x.clamp(min=1e-9))
