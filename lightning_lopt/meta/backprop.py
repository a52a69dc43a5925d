"""Backpropagation through whole runs, in segments that are run a second time for their gradient.

Activation checkpointing: forward, only the runs' parameters and states between segments are kept; backward, each
segment is run again from there, with its batches drawn again, and the gradient is carried from its end to its start.
The memory is that of one segment, the gradient the same, and the time one more forward pass. (torch.utils.checkpoint
keeps tensors by hooks, which `torch.func.grad`, the tasks' gradient, does not allow.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_lopt.meta.unroll import Inner, MetaParams, Unroll


class Backprop(NamedTuple):
    """What came of it."""

    loss: Tensor  # () mean loss
    gradient: dict[str, Tensor]  # like the meta-parameters, always finite
    finite: Tensor  # () bool: neither a loss nor a gradient had to be taken for zero


def in_segments(
    unroll: Unroll,
    meta_params: MetaParams,
    inner: Inner,
    weights: Tensor,
    segment: int,
    generator: torch.Generator,
    carry: float | None = None,
) -> Backprop:
    """Gradient of the weighted mean loss after each update of whole runs.

    Args:
        unroll: the rule on its task.
        meta_params: those that learn.
        inner: P fresh runs, of episodes longer than the weights.
        weights: (steps,) of the losses after the updates.
        segment: steps between states that are kept.
        generator: draws the batches.
        carry: the largest norm of the gradient of a run's own loss with respect to its parameters and states that goes
            into the segment before; longer ones are shortened.
    """
    starts, lengths = [], [min(segment, len(weights) - done) for done in range(0, len(weights), segment)]
    with torch.no_grad():
        for length in lengths:
            starts.append((generator.get_state(), inner))
            inner, _ = unroll.run(meta_params, inner, length, generator, _no_reset)
        unroll.task.batch(generator, inner.constants, len(inner.done))  # of the loss after the last update
    after = generator.get_state()
    leaves, adjoints = leaves_of(meta_params), [torch.zeros_like(leaf) for leaf in _carried(inner)]
    loss, gradient = torch.zeros(()), [torch.zeros_like(leaf) for leaf in leaves.values()]
    shares = torch.split(weights / (weights.sum() * len(inner.done)), lengths)
    finite = []
    for (state, start), share in zip(reversed(starts), reversed(shares), strict=True):
        generator.set_state(state)
        with torch.enable_grad():
            begin = [leaf.detach().requires_grad_() for leaf in _carried(start)]
            inner, record = unroll.run(leaves, _with_carried(start, begin), len(share), generator, _no_reset)
            # The batch of the next segment's first step: each loss goes to the update that it comes after.
            last = unroll.loss(inner, unroll.task.batch(generator, inner.constants, len(inner.done)))
            losses = torch.cat([record.losses[1:], last.unsqueeze(0)])
            part = torch.where(losses.isfinite(), share.to(losses).unsqueeze(1) * losses, 0.0).sum()
            outputs = [(part, torch.ones_like(part)), *zip(_carried(inner), adjoints, strict=True)]
            heads, cotangents = zip(*(pair for pair in outputs if pair[0].requires_grad), strict=True)
            grads = torch.autograd.grad(
                heads, [*leaves.values(), *begin], cotangents, allow_unused=True, materialize_grads=True
            )
        finite.append(losses.detach().isfinite().all())
        loss = part.detach() + loss.to(part)
        gradient = [one + other for one, other in zip(gradient, grads[: len(leaves)], strict=True)]
        adjoints = list(grads[len(leaves) :])
        if carry is not None:
            adjoints = _shortened(adjoints, carry / len(inner.done))
    generator.set_state(after)
    cleaned, fine = finite_gradient(leaves, gradient)
    return Backprop(loss, cleaned, fine & torch.stack(finite).all())


def leaves_of(meta_params: MetaParams) -> dict[str, Tensor]:
    """The meta-parameters as leaves of a new graph."""
    return {name: p.detach().requires_grad_() for name, p in meta_params.items()}


def backpropagated(loss: Tensor, leaves: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient, zero where it is missing or not finite, and () bool: whether it was finite."""
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return finite_gradient(leaves, grads)


def finite_gradient(leaves: dict[str, Tensor], grads: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients by name, zero where they are not finite, and () bool: whether they were."""
    finite = torch.stack([grad.isfinite().all() for grad in grads]).all()
    return {name: torch.nan_to_num(g, 0.0, 0.0, 0.0) for name, g in zip(leaves, grads, strict=True)}, finite


def _carried(inner: Inner) -> list[Tensor]:
    """What gradients flow through from step to step: floating parameters and states."""
    return [leaf for leaf in tree_flatten((inner.params, inner.states))[0] if leaf.is_floating_point()]


def _with_carried(inner: Inner, leaves: list[Tensor]) -> Inner:
    held, structure = tree_flatten((inner.params, inner.states))
    new = iter(leaves)
    params, states = tree_unflatten([next(new) if leaf.is_floating_point() else leaf for leaf in held], structure)
    return inner._replace(params=params, states=states)


def _shortened(adjoints: list[Tensor], most: float) -> list[Tensor]:
    """Run by run, of norm `most` at most; what is not finite is zero."""
    rows = [torch.nan_to_num(adjoint, 0.0, 0.0, 0.0).flatten(1) for adjoint in adjoints]
    norms = torch.stack([row.double().square().sum(1) for row in rows]).sum(0).sqrt()
    scale = (most / norms.clamp(min=most)).unsqueeze(1)
    return [(row * scale.to(row)).reshape(adjoint.shape) for row, adjoint in zip(rows, adjoints, strict=True)]


def _no_reset(number: int) -> Tensor:
    raise AssertionError("An episode ended within the unroll.")
