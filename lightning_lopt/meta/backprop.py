"""Backpropagation through whole runs with activation checkpointing.

A run is divided into segments. The forward pass stores parameters and states only between segments. The backward pass
runs each segment again from its stored start, with the same batches, and carries the gradient from its end to its
start. This takes the memory of one segment and the time of one more forward pass, and gives the same gradient.

torch.utils.checkpoint does not work here: it saves tensors by hooks, which `torch.func.grad`, the tasks' gradient,
does not allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_lopt.meta.unroll import Inner, MetaParams, Unroll


class SegmentedGradient(NamedTuple):
    """The result of `gradient_in_segments`."""

    loss: Tensor  # () mean loss
    gradient: dict[str, Tensor]  # like the meta-parameters, always finite
    finite: Tensor  # () bool: no loss or gradient was replaced by zero


def gradient_in_segments(
    unroll: Unroll,
    meta_params: MetaParams,
    inner: Inner,
    weights: Tensor,
    segment: int,
    generator: torch.Generator,
    carry: float | None = None,
) -> SegmentedGradient:
    """Gradient of the weighted mean of the losses after each update of whole runs.

    Args:
        unroll: the rule on its task.
        meta_params: those that learn.
        inner: P fresh runs, with horizons longer than the weights.
        weights: (steps,) of the losses after the updates.
        segment: steps in a segment.
        generator: draws the batches.
        carry: largest norm of a run's gradient with respect to its parameters and states at which it enters the
            preceding segment; larger gradients are clipped to it (default: no clipping).
    """
    lengths = [min(segment, len(weights) - done) for done in range(0, len(weights), segment)]
    starts = []
    with torch.no_grad():
        for length in lengths:
            starts.append((generator.get_state(), inner))
            inner, _ = unroll.run(meta_params, inner, length, generator, _no_reset)
        unroll.task.batch(generator, inner.constants, len(inner.done))  # of the loss after the last update
    generator_at_end = generator.get_state()
    leaves = as_leaves(meta_params)
    loss = torch.zeros(())
    gradient = [torch.zeros_like(leaf) for leaf in leaves.values()]
    adjoints = [torch.zeros_like(leaf) for leaf in _carried_tensors(inner)]  # of the end of the current segment
    finite = []
    segment_weights = torch.split(weights / (weights.sum() * len(inner.done)), lengths)
    for (generator_state, start), own_weights in zip(reversed(starts), reversed(segment_weights), strict=True):
        generator.set_state(generator_state)
        with torch.enable_grad():
            begin = [leaf.detach().requires_grad_() for leaf in _carried_tensors(start)]
            inner, record = unroll.run(leaves, _with_carried(start, begin), len(own_weights), generator, _no_reset)
            # A loss belongs to the update before it. So the segment's last loss is computed on the batch that the next
            # segment's first step will draw.
            last = unroll.loss(inner, unroll.task.batch(generator, inner.constants, len(inner.done)))
            losses = torch.cat([record.losses[1:], last.unsqueeze(0)])
            segment_loss = torch.where(losses.isfinite(), own_weights.to(losses).unsqueeze(1) * losses, 0.0).sum()
            outputs = [(segment_loss, torch.ones_like(segment_loss))]
            outputs += zip(_carried_tensors(inner), adjoints, strict=True)
            heads, cotangents = zip(*(pair for pair in outputs if pair[0].requires_grad), strict=True)
            grads = torch.autograd.grad(
                heads, [*leaves.values(), *begin], cotangents, allow_unused=True, materialize_grads=True
            )
        finite.append(losses.detach().isfinite().all())
        loss = segment_loss.detach() + loss.to(segment_loss)
        gradient = [total + own for total, own in zip(gradient, grads[: len(leaves)], strict=True)]
        adjoints = list(grads[len(leaves) :])
        if carry is not None:
            adjoints = _clip_each_run(adjoints, carry / len(inner.done))
    generator.set_state(generator_at_end)
    cleaned, gradient_finite = _clean(leaves, gradient)
    return SegmentedGradient(loss, cleaned, gradient_finite & torch.stack(finite).all())


def as_leaves(meta_params: MetaParams) -> dict[str, Tensor]:
    """Return the meta-parameters as leaves of a new graph."""
    return {name: p.detach().requires_grad_() for name, p in meta_params.items()}


def backpropagate(loss: Tensor, leaves: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradient, with zeros where it is missing or not finite, and () bool: whether it was finite."""
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return _clean(leaves, grads)


def _clean(leaves: dict[str, Tensor], grads: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients by name, with zeros where they are not finite, and () bool: whether all were finite."""
    finite = torch.stack([grad.isfinite().all() for grad in grads]).all()
    return {name: torch.nan_to_num(g, 0.0, 0.0, 0.0) for name, g in zip(leaves, grads, strict=True)}, finite


def _carried_tensors(inner: Inner) -> list[Tensor]:
    """The tensors that carry gradients from step to step: floating-point parameters and states."""
    return [leaf for leaf in tree_flatten((inner.params, inner.states))[0] if leaf.is_floating_point()]


def _with_carried(inner: Inner, leaves: list[Tensor]) -> Inner:
    held, structure = tree_flatten((inner.params, inner.states))
    new = iter(leaves)
    params, states = tree_unflatten([next(new) if leaf.is_floating_point() else leaf for leaf in held], structure)
    return inner._replace(params=params, states=states)


def _clip_each_run(adjoints: list[Tensor], max_norm: float) -> list[Tensor]:
    """Clip the gradient of each run, over all tensors, to a norm; non-finite entries become zero."""
    rows = [torch.nan_to_num(adjoint, 0.0, 0.0, 0.0).flatten(1) for adjoint in adjoints]
    norms = torch.stack([row.double().square().sum(1) for row in rows]).sum(0).sqrt()
    scale = (max_norm / norms.clamp(min=max_norm)).unsqueeze(1)
    return [(row * scale.to(row)).reshape(adjoint.shape) for row, adjoint in zip(rows, adjoints, strict=True)]


def _no_reset(number: int) -> Tensor:
    raise AssertionError("An episode ended within the unroll.")
