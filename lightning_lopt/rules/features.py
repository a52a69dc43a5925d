"""Accumulators and input features of the MLP learned optimizers (small_fc_lopt and STAR).

Source: Metz et al. 2022 (arXiv 2203.11860), table of inputs; Harrison et al. 2022 (STAR, arXiv 2209.11208), section 5;
in every detail as in the authors' released code. Channels come first here, `(channels, *shape)`, so that each of them
is contiguous. Nothing is bias-corrected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from lightning_lopt.rules.constants import constant, remembered
from lightning_lopt.rules.shards import TensorShard, dtensor, local, means, whole_shape

TIMESCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)
NUM_CHANNELS = 28
LAYOUTS = ("torch", "jax")
EPS = 1e-6  # added to the second moment before its root, as in the authors' code
NUM_FEATURES = NUM_CHANNELS + len(TIMESCALES)

# Positions of the channels of `Features` in the reference's order, which is that of the first layer's rows.
DENSE = (*range(13), 25, 26, 27)
ROW = (13, 14, 15, 19, 20, 21)
COL = (16, 17, 18, 22, 23, 24)


class Accumulators(NamedTuple):
    """Moving averages of one tensor's gradients; empty where they do not apply to its shape."""

    exp_avg: Tensor  # (3, *shape) momentum at three decays
    exp_avg_sq: Tensor  # (*shape) second moment
    row: Tensor  # (3, *shape without dim d0) factored second moment, mean over d0
    col: Tensor  # (3, *shape without dim d1) factored second moment, mean over d1
    diag: Tensor  # (3, *shape) second moment at the factored decays, for tensors that are not factored
    factored_dims: Tensor  # (2,) the dims (d1, d0), or (0,); for readers of saved states


class Decays(NamedTuple):
    """Effective decay rates, each in [0, 1) unless offsets are extreme."""

    momentum: Tensor  # (3,)
    rms: Tensor  # (1,)
    adafactor: Tensor  # (3,)


class Features(NamedTuple):
    """The 28 channels of a tensor before normalization, grouped by what they depend on (`DENSE`, `ROW`, `COL`)."""

    dense: Tensor  # (16, *shape)
    row: Tensor  # (6, *shape with dim d0 = 1), or (6, *shape)
    col: Tensor  # (6, *shape with dim d1 = 1), or (6, *shape)


def factored_dims(shape: torch.Size | tuple[int, ...], layout: str = "torch") -> tuple[int, int] | None:
    """The dims (d1, d0) of second-largest and largest size; None below two dims.

    Of two equal dims the later one in the reference's order, (*spatial, in, out), counts as the larger (a stable sort),
    so of a square matrix d0 is the dim of the outputs. A network that was trained on matrices (in, out) must not see
    rows in place of columns on torch's (out, in). The reference uses numpy's unstable sort, which agrees except on some
    rank-4 shapes with small trailing dims, where it depends on the platform.

    Args:
        shape: of the tensor.
        layout: one of `LAYOUTS`, how its dims are read: "torch", as (out, in, *spatial); "jax", as the reference has
            them.

    Example:
        >>> factored_dims((64, 64, 3, 3)), factored_dims((3, 3, 64, 64), "jax"), factored_dims((7,))
        ((1, 0), (2, 3), None)
    """
    if len(shape) < 2:
        return None
    dims = jax_order(len(shape), layout)
    order = sorted(dims, key=lambda dim: shape[dim])
    return order[-2], order[-1]


def jax_order(ndim: int, layout: str = "torch") -> tuple[int, ...]:
    """The dims of torch's (out, in, *spatial) in the order in which JAX stores them: (*spatial, in, out).

    So `tensor.permute(jax_order(tensor.dim()))` is the tensor as JAX has it. Vectors and scalars are the same in both.
    A tensor of layout "jax" has this order already.

    Example:
        >>> jax_order(4), jax_order(2), jax_order(1)
        ((2, 3, 1, 0), (1, 0), (0,))
    """
    return tuple(range(ndim)) if layout == "jax" else (*range(2, ndim), *reversed(range(min(ndim, 2))))


def effective_decay(initial: tuple[float, ...], offset: Tensor) -> Tensor:
    """Decay rates 1 - exp(10 (log(1 - initial) / 10 + offset)): the offset of log(1 - decay) / 10 is learned.

    Args:
        initial: decays at offset 0.
        offset: (len(initial),) meta-parameters, whose dtype is that of the arithmetic, as in the reference.
    """
    return remembered(_effective_decay, initial, offset)


def _effective_decay(initial: tuple[float, ...], offset: Tensor) -> Tensor:
    start = torch.log(1 - constant(initial, offset.dtype, offset.device)) / 10
    return 1 - torch.exp(10 * (start + offset))


def init_accumulators(param: Tensor, layout: str = "torch") -> Accumulators:
    """Zero accumulators in the dtype and on the device of `param`; `layout` as for `factored_dims`."""
    dims = factored_dims(param.shape, layout)
    empty = param.new_zeros((3, 0))
    row, col, diag = empty, empty, empty
    if dims is None:
        diag = param.new_zeros((3, *param.shape))
    else:
        row, col = (param.new_zeros((3, *_without(param.shape, dim))) for dim in reversed(dims))
    record = torch.tensor(dims or (), dtype=torch.int64, device=param.device)
    return Accumulators(param.new_zeros((3, *param.shape)), torch.zeros_like(param), row, col, diag, record)


def update_accumulators(
    state: Accumulators, grad: Tensor, decays: Decays, shard: TensorShard | None = None, layout: str = "torch"
) -> Accumulators:
    """Update the averages with one gradient: a <- b a + (1 - b) x. As in the reference, no bias correction."""
    shape = whole_shape(shard, grad)
    dims = factored_dims(shape, layout)
    square = bounded(grad, shape.numel()).square() + 1e-30
    row, col, diag = state.row, state.col, state.diag
    if dims is None:
        diag = _average(diag, square, decays.adafactor)
    else:
        over_d1, over_d0 = means(shard, *((square, (dim - grad.dim(),)) for dim in dims))
        row, col = _average(row, over_d0, decays.adafactor), _average(col, over_d1, decays.adafactor)
    exp_avg, exp_avg_sq = update_moments(state.exp_avg, state.exp_avg_sq, grad, decays)
    return Accumulators(exp_avg, exp_avg_sq, row, col, diag, state.factored_dims)


def bounded(grad: Tensor, count: int = 1) -> Tensor:
    """Clamp a gradient so that a sum of `count` squares is finite.

    The square of 1e20 overflows in float32, and would spoil an average of squares for good.

    Example:
        >>> bounded(torch.tensor([3.0, -1e20]))
        tensor([ 3.0000e+00, -1.8447e+19])
    """
    limit = math.sqrt(torch.finfo(grad.dtype).max / max(count, 1)) * (1 - 1e-6)
    return grad.clamp(-limit, limit)


def root(square: Tensor) -> Tensor:
    """The square root, whose derivative at 0 is 0 instead of infinite."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), square)


def update_moments(exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, decays: Decays) -> tuple[Tensor, Tensor]:
    """Update the momenta (3, *shape) and the second moment (*shape), which the nominal term reads, with a gradient."""
    rms = decays.rms.squeeze(0)
    exp_avg_sq = rms * exp_avg_sq + (1 - rms) * grad * grad
    return _average(exp_avg, grad, decays.momentum), exp_avg_sq


def inverse_root(exp_avg_sq: Tensor, eps: float = EPS) -> Tensor:
    """1 / sqrt(second moment + eps): STAR's preconditioner 1/v (eq. 22) and the scale of the Adam-like features."""
    return torch.rsqrt(exp_avg_sq + eps)


def input_features(
    state: Accumulators,
    grad: Tensor,
    param: Tensor,
    shard: TensorShard | None = None,
    eps: float = EPS,
    layout: str = "torch",
) -> Features:
    """The 28 input channels, from accumulators that include `grad`; also of a shard, with whole rows and columns.

    In the reference's order: gradient; parameter; 3 momenta; second moment; 3 momenta / sqrt(second moment); its
    inverse root; gradient preconditioned by 3 factored second moments; 3 row and 3 column moments; their inverse roots;
    3 momenta preconditioned by the factored second moments. For a tensor that is not factored, its diagonal moments
    replace both rows and columns.
    """
    inv_root = inverse_root(state.exp_avg_sq, eps)
    dims = factored_dims(whole_shape(shard, grad), layout)
    if dims is None:
        row = col = torch.cat([state.diag, torch.rsqrt(state.diag + 1e-8)])
        grad_factor = _clamped_rsqrt(state.diag + 1e-9)
        # 1e-6 here and 1e-9 for the gradient, as in the reference.
        momentum_factor = torch.rsqrt(state.diag + 1e-6)
    else:
        d1, d0 = dims
        rows, cols = state.row.unsqueeze(d0 + 1), state.col.unsqueeze(d1 + 1)
        of_rows = _clamped_rsqrt(rows / (rows.mean(d1 + 1, keepdim=True) + 1e-9))
        grad_factor = local(shard, of_rows) * local(shard, _clamped_rsqrt(cols))
        momentum_factor = grad_factor
        row, col = (torch.cat([v, torch.rsqrt(v + 1e-8)]) for v in (rows, cols))
    dense = torch.cat(
        [
            torch.stack([grad, param]),
            state.exp_avg,
            # A gradient beyond 1e20 makes the second moment infinite, as in AdamW; its channel must not become NaN.
            state.exp_avg_sq.clamp(max=torch.finfo(grad.dtype).max).unsqueeze(0),
            state.exp_avg * inv_root,
            inv_root.unsqueeze(0),
            grad * grad_factor,
            state.exp_avg * momentum_factor,
        ]
    )
    return Features(dense, row, col)


def mean_square_of(channels: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The question to `means` that gives the mean square of each channel: (c, *shape) -> (c,).

    A channel that is constant along a dim may have size 1 there: its mean square is the same.
    """
    return channels.square(), tuple(range(1 - channels.dim(), 0))


def inverse_root_of_mean(mean_square: Tensor) -> Tensor:
    """1 / sqrt(1e-5 + mean square), the normalizer of a channel."""
    return torch.rsqrt(1e-5 + mean_square)


def contract(weight: Tensor, channels: Tensor) -> Tensor:
    """A linear layer over the channels of each coordinate: weight (c, h), channels (c, *shape) -> (h, *shape)."""
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight

    def layer(local: Tensor) -> Tensor:
        product: Tensor = torch.tensordot(weight, local, dims=([0], [0]))
        return product

    return on_shards(layer, channels)


Outputs = TypeVar("Outputs", Tensor, tuple[Tensor, ...])


def on_shards(function: Callable[..., Outputs], *channels: Tensor) -> Outputs:
    """Apply a coordinatewise function: tensors (c, *shape) -> (d, *shape), or a tuple of such.

    Sharded tensors (DTensor) stay sharded. All must have the same layout.
    """
    if not hasattr(channels[0], "placements"):
        return function(*channels)
    sharded = cast(tuple[Any, ...], channels)
    mesh, placements = sharded[0].device_mesh, sharded[0].placements

    def placed(local: Tensor) -> Tensor:
        shape = torch.Size((local.shape[0], *channels[0].shape[1:]))
        strides = torch.empty(shape, device="meta").stride()
        layout = {"shape": shape, "stride": strides, "run_check": False}
        return cast(Tensor, dtensor().DTensor.from_local(local, mesh, placements, **layout))

    outputs = function(*(each.redistribute(mesh, placements).to_local() for each in sharded))
    return placed(outputs) if isinstance(outputs, Tensor) else tuple(placed(output) for output in outputs)


def time_features(step: Tensor, dtype: torch.dtype) -> Tensor:
    """tanh(step / T - 1) at eleven timescales T from 1 to 100,000 steps: () -> (11,). Step 0 is the first update."""
    timescales = constant(TIMESCALES, dtype, step.device)
    return torch.tanh(step.to(dtype) / timescales - 1)


def _average(old: Tensor, new: Tensor, decay: Tensor) -> Tensor:
    decay = decay.reshape(-1, *[1] * new.dim())
    return decay * old + (1 - decay) * new


def _clamped_rsqrt(x: Tensor) -> Tensor:
    return torch.rsqrt(x.clamp(min=1e-9))


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])
