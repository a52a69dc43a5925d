"""Celo2: a learned direction of unit size. Moudgil, Knyazev, Belilovsky 2026 (arXiv 2602.19142).

    d = MLP(30 features)        of each coordinate
    s = NewtonSchulz(d)         of each matrix; not in `celo2_base`
    s = s / rms(s)              of each matrix or vector
    p = p - lr (s + w p)

in every detail as in the authors' code (github.com/amoudgl/celo2). Only the direction is learned: the rms of a step is
the learning rate, and rate, schedule and weight decay w are set by hand. Features are divided by their rms, too, so
the rule does not see the scale of gradients or parameters. In `celo2`, vectors and embeddings are moved by AdamW at 20
times the learning rate; in `celo2_base` everything is moved by the network.

A matrix has torch's layout here, (out, in), and a convolution (out, in, *spatial), unless `layout` is "jax". The
authors' code has (in, out) and (*spatial, in, out), and this file reads tensors in that order (`features.jax_order`):

* the rms, and Newton-Schulz, are over (out, in), for each position of a convolution's kernel on its own;
* of two equal dims, `features.factored_dims` takes the one that is the later in their order.

Which tensors are embeddings, `StepContext.role` says; the authors look for "embed" in names.

Deviations:

* a tensor does not move as long as all its gradients have been zero, and does not decay either. In the authors' code
  it moves by the full learning rate, because the network's biases and the features that are constant give a direction,
  which is then divided by its rms. Frozen layers and unused experts would drift;
* gradients beyond the root of the dtype's largest number are clamped for AdamW, so that its moments stay finite. The
  network's are clamped to +-1000, as in the authors' code.

symbol | here              | symbol | here
lr     | lr                | w      | weight_decay
m      | exp_avg           | v      | exp_avg_sq
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lopt.rules import features as feats
from lightning_lopt.rules import networks
from lightning_lopt.rules.base import RuleConfig, StepContext, UpdateRule, register
from lightning_lopt.rules.constants import constant
from lightning_lopt.rules.jax_arrays import as_tensors, check_shapes
from lightning_lopt.rules.matrix import QUINTIC
from lightning_lopt.rules.shards import TensorShard, local, means

MOMENTUM_DECAYS, RMS_DECAY, ADAFACTOR_DECAYS = (0.9, 0.99, 0.999), 0.95, (0.9, 0.99, 0.999)
LARGEST_GRADIENT = 1000.0
EPS = 1e-8  # of the second moment's root, and AdamW's
RMS_EPS = 1e-9  # added to mean squares
NEWTON_SCHULZ_STEPS = 5

# The authors' 14 blocks of features, each with a matrix w0__i of its own: here, rows of w0 in the same order.
WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
NUM_FEATURES = sum(WIDTHS)
# Rows of w0 for the channels of `features.Features`, of which a vector has no more than the first 13 dense ones.
DENSE, PRECONDITIONED_MOMENTA = (0, *range(2, 14)), (27, 28, 29)
ROW = (15, 16, 17, 21, 22, 23)
COL = (18, 19, 20, 24, 25, 26)
FACTORED_GRADIENTS = slice(10, 13)  # of the channels of `features.Features`: the gradient over factored moments
MORE = (1, 14)  # the gradient clamped to +-0.1, and divided by the root of the second moment
Group = tuple[list[int], Tensor]  # rows of w0, and their channels


@dataclasses.dataclass(frozen=True)
class Celo2Config(RuleConfig):
    """Configuration of `Celo2`. The defaults are those of the published `celo2`."""

    lr: float = 1e-3
    """The rms of a step of the network's: that of meta-training. Tune it; RuleOptimizer's lr multiplies it."""
    weight_decay: float = 0.0
    """Decoupled; multiplied by lr, for AdamW's tensors also by vector_mult."""
    orthogonalize: bool = True
    """Orthogonalize the directions of matrices by Newton-Schulz; false in celo2_base."""
    vector_mult: float | None = 20.0
    """AdamW's learning rate for vectors and embeddings, in units of lr; None to move them by the network."""
    tanh: bool = False
    """Tanh instead of ReLU between the network's layers."""
    exp_mult: float = 0.0
    """Multiplier of the network's second output, a logarithm of the direction's size; 0 for none."""
    bias_correction: bool = False
    """Correct all averages for their start at zero: those that the network sees, and AdamW's."""
    adam_bias_correction: bool = False
    """Correct AdamW's alone, as torch's AdamW and the authors' use of the published weights. False, with both: AdamW as
    in the authors' meta-training, without bias correction and with eps inside the root."""
    layout: str = "torch"
    """How dims are read: as torch's (out, in, *spatial), or as "jax", the authors' (*spatial, in, out)."""
    hidden_size: int = 8
    """Units of each of the two hidden layers."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "exp_mult"):
            self.check_number(name, 0.0)
        if self.vector_mult is not None:
            self.check_number("vector_mult", 0.0)
        self.check_flags("orthogonalize", "tanh", "bias_correction", "adam_bias_correction")
        self.check(self.layout in list(feats.LAYOUTS), "layout", f"one of {list(feats.LAYOUTS)}")
        self.check_integer("hidden_size", 1, 1024)


def moved_by_adamw(config: Celo2Config, ndim: int, role: str | None) -> bool:
    """Whether AdamW moves a tensor: below two dims, or no weight of a layer. Never for `celo2_base`.

    A matrix whose role is unknown is moved by the network.
    """
    return config.vector_mult is not None and (ndim < 2 or role in ("embedding", "other"))


class Celo2(UpdateRule):
    """Kinds `celo2` and `celo2_base`.

    Meta-parameters: `w0 (30, h), b0, w1 (h, h), b1, w2 (h, 3), b2`; 347 in all. As in the authors' code the network has
    three outputs, of which only the first is used. State: 4 floats per parameter, and 3 per row and per column of a
    factored tensor (3 per parameter below two dims).

    It is not free of hyper-parameters: tune the step size and use a schedule. With `lr="scale"` and
    `reference_lr=1e-3`, the default of our own `lr`, the schedule of your optimizer is that of a step's rms; Adam's is
    usually 0.2 to 0.4 times its learning rate. Newton-Schulz on an (n, m) matrix, n <= m, costs about 5 n / T times as
    much as a forward and backward pass over T rows: little for long batches, and more than the whole training step for
    64 units and batches of 128.

    Example:
        >>> import torch
        >>> from lightning_lopt.rules import StepContext, make
        >>> rule, param = make("celo2", lr=0.01), torch.zeros(3, 2)
        >>> grad, context = torch.randn(3, 2), StepContext(torch.tensor(0.0), role="hidden")
        >>> delta, state = rule.update(rule.meta_params(), grad, rule.init_state(param), param, context)
        >>> delta.detach().square().mean().sqrt(), rule.num_meta_params()
        (tensor(0.0100), 347)
    """

    Config = Celo2Config
    config: Celo2Config
    takes_shards = True
    whole_state = frozenset({"row", "col"})

    def __init__(self, config: Celo2Config | None = None, *, kind: str = "celo2") -> None:
        super().__init__(config, kind=kind)
        sizes = (NUM_FEATURES, self.config.hidden_size, self.config.hidden_size, 3)
        for layer, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            std = 1 / math.sqrt(fan_in)
            weight = nn.init.trunc_normal_(torch.empty(fan_in, fan_out), std=std, a=-2 * std, b=2 * std)
            self.register_parameter(f"w{layer}", nn.Parameter(weight))
            self.register_parameter(f"b{layer}", nn.Parameter(torch.zeros(fan_out)))

    @property
    def uses_roles(self) -> bool:
        """Embeddings and other tensors that are no weight of a layer are moved by AdamW."""
        return self.config.vector_mult is not None

    def init_state(self, param: Tensor) -> feats.Accumulators:
        """Zero accumulators."""
        return feats.init_accumulators(param, self.config.layout)

    def update(
        self,
        meta_params: Mapping[str, Tensor],
        grad: Tensor,
        state: feats.Accumulators,
        param: Tensor,
        context: StepContext,
    ) -> tuple[Tensor, feats.Accumulators]:
        """One step: accumulators first, then the direction of the network or AdamW's, then the decay."""
        c, shard = self.config, context.shard
        if c.vector_mult is not None and moved_by_adamw(c, grad.dim(), context.role):
            corrects = c.bias_correction or c.adam_bias_correction
            state = _with_moments(state, grad if corrects else _clamped(grad))
            lr, step = c.lr * c.vector_mult, _adamw(state, context.step, corrects=corrects)
            (share,) = means(shard, _nonzero(state))
        else:
            lr, grad = c.lr, _clamped(grad)
            state = feats.update_accumulators(state, grad, _decays(grad), shard, c.layout)
            direction, share = self._direction(meta_params, grad, state, param, context)
            step = self._normalized(direction, shard)
        delta = -lr * (step + c.weight_decay * param)
        return torch.where(share > 0, delta, torch.zeros_like(delta)), state

    def _direction(
        self,
        meta_params: Mapping[str, Tensor],
        grad: Tensor,
        state: feats.Accumulators,
        param: Tensor,
        context: StepContext,
    ) -> tuple[Tensor, Tensor]:
        """(*shape) the network's direction, and () the share of coordinates that have had a gradient.

        The first layer is applied group by group, so that features of rows and columns cost a row or a column.
        """
        c, shard = self.config, context.shard
        dense, factored = self._features(grad, state, param, context)
        dims = _matrix_dims(grad, c.layout)
        *mean_squares, share = means(shard, *((x.square(), dims) for _, x in dense), _nonzero(state))
        mean_squares += means(None, *((x.square(), dims) for _, x in factored))  # rows and columns are whole everywhere
        hidden = _bias(meta_params["b0"], grad)
        for (rows, channels), mean in zip(dense + factored, mean_squares, strict=True):
            weight, scale, channels = meta_params["w0"][rows], torch.rsqrt(mean + RMS_EPS), local(shard, channels)
            if scale.dim() == 1:  # of the whole tensor: 8 numbers a channel to multiply instead of a plane
                weight = weight * scale.unsqueeze(1)
            else:
                channels = channels * local(shard, _beside_matrix(scale, grad, c.layout))
            hidden = hidden + feats.contract(weight, channels)
        count = 2 if c.exp_mult else 1  # of the outputs that matter
        layers = [{"w0": meta_params["w1"], "b0": meta_params["b1"]}]
        layers.append({"w0": meta_params["w2"][:, :count], "b0": meta_params["b2"][:count]})
        activation = torch.tanh if c.tanh else torch.relu

        def rest(units: Tensor) -> Tensor:
            for layer in layers:
                units = networks.mlp(layer, activation(units))
            return units

        output = networks.coordinatewise(rest, hidden)
        return output[0] * torch.exp(c.exp_mult * output[1]) if c.exp_mult else output[0], share

    def _features(
        self, grad: Tensor, state: feats.Accumulators, param: Tensor, context: StepContext
    ) -> tuple[list[Group], list[Group]]:
        """The channels (c, *shape), and those of a matrix's rows and columns, each with its rows of w0."""
        shard, layout = context.shard, self.config.layout
        channels = feats.input_features(state, grad, param, shard, EPS, layout)
        if self.config.bias_correction:
            state, by_factors = _corrected(state, context.step), channels.dense[FACTORED_GRADIENTS]
            channels = feats.input_features(state, grad, param, shard, EPS, layout)
            # The authors divide the gradient by factored moments that are not corrected.
            start, stop = FACTORED_GRADIENTS.start, FACTORED_GRADIENTS.stop
            dense = torch.cat([channels.dense[:start], by_factors, channels.dense[stop:]])
            channels = channels._replace(dense=dense)
        more = torch.stack([grad.clamp(-0.1, 0.1), grad * feats.inverse_root(state.exp_avg_sq, EPS)])
        if grad.dim() < 2:
            return [(list(DENSE), channels.dense[: len(DENSE)]), (list(MORE), more)], []
        whole = [([*DENSE, *PRECONDITIONED_MOMENTA], channels.dense), (list(MORE), more)]
        return whole, [(list(ROW), channels.row), (list(COL), channels.col)]

    def _normalized(self, direction: Tensor, shard: TensorShard | None) -> Tensor:
        """The direction, orthogonalized if so configured, with rms 1 over each matrix."""
        layout = self.config.layout
        orthogonalize = self.config.orthogonalize and direction.dim() >= 2
        if orthogonalize:
            (direction,) = means(shard, (direction, ()))  # all of it: every process does the same work
            direction = orthogonalized(direction, layout)
        (mean,) = means(None if orthogonalize else shard, (direction.square(), _matrix_dims(direction, layout)))
        scale = torch.rsqrt(_beside_matrix(mean.unsqueeze(0), direction, layout)[0] + RMS_EPS)
        return local(shard, direction) * local(shard, scale)

    @classmethod
    def from_jax(cls, theta: Mapping[str, Any], *, kind: str = "celo2", **config: Any) -> Celo2:
        """A rule from the authors' meta-parameters.

        Args:
            theta: `w0__0 .. w0__13, b0, w1, b1, w2, b2` as arrays, see `hub.read_theta`. Their dtype is kept.
            kind: "celo2" or "celo2_base": the arrays do not tell.
            config: values in which the rule differs from the kind's defaults.

        Raises:
            ValueError: for another kind; for missing, unknown or wrongly shaped arrays.

        Example:
            >>> import torch
            >>> theta = {f"w0__{i}": torch.zeros(width, 8) for i, width in enumerate(WIDTHS)}
            >>> theta |= {"w1": torch.zeros(8, 8), "w2": torch.zeros(8, 3)}
            >>> theta |= {"b0": torch.zeros(8), "b1": torch.zeros(8), "b2": torch.zeros(3)}
            >>> Celo2.from_jax(theta, kind="celo2_base", lr=1e-2).config.orthogonalize
            False
        """
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not allowed: it must be one of {list(KINDS)}.")
        tensors = as_tensors(theta, _FLAT)
        units = tensors["b0"].numel() if "b0" in tensors else 0
        rule = cls(Celo2Config.from_dict({"hidden_size": units or 8, **KINDS[kind], **config}), kind=kind)
        expected = {name: tuple(p.shape) for name, p in rule.named_parameters() if name != "w0"}
        expected |= {f"w0__{block}": (width, *expected["b0"]) for block, width in enumerate(WIDTHS)}
        check_shapes(tensors, expected, _FLAT)
        joined = torch.cat([tensors.pop(f"w0__{block}") for block in range(len(WIDTHS))])
        for name, tensor in {"w0": joined, **tensors}.items():
            setattr(rule, name, nn.Parameter(tensor))
        return rule


_FLAT = "Pass the flat mapping of w0__0 to w0__13, b0, w1, b1, w2, b2"


def orthogonalized(matrices: Tensor, layout: str = "torch") -> Tensor:
    """Each matrix's nearest one with equal singular values, roughly, by five Newton-Schulz steps.

    Matrices are (out, in, *spatial), or (*spatial, in, out) for the layout "jax". Singular values end between about
    0.7 and 1.2; those below a thousandth of the Frobenius norm stay smaller.

    Example:
        >>> torch.linalg.svdvals(orthogonalized(torch.diag(torch.tensor([3.0, 1.0])))) > 0.6
        tensor([True, True])
    """
    batch = matrices.permute(feats.jax_order(matrices.dim(), layout))
    is_tall = batch.shape[-2] > batch.shape[-1]
    x: Tensor = batch.mT if is_tall else batch
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + EPS)
    a, b, c = QUINTIC
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if is_tall else x
    return x if layout == "jax" else x.movedim((-1, -2), (0, 1))


def _adamw(state: feats.Accumulators, step: Tensor, *, corrects: bool) -> Tensor:
    """AdamW's direction from the first momentum and the second moment, whose decays are AdamW's .9 and .95."""
    exp_avg, exp_avg_sq = state.exp_avg[0], state.exp_avg_sq
    if not corrects:
        return exp_avg * feats.inverse_root(exp_avg_sq, EPS)
    first, second = (_weight(decay, step.to(exp_avg.dtype)) for decay in (MOMENTUM_DECAYS[0], RMS_DECAY))
    return exp_avg / first / ((exp_avg_sq / second).sqrt() + EPS)


def _weight(decay: float, step: Tensor) -> Tensor:
    """What all gradients weigh in an average so far: 1 - decay^(step + 1)."""
    return -torch.expm1(math.log(decay) * (step + 1))


def _corrected(state: feats.Accumulators, step: Tensor) -> feats.Accumulators:
    """The averages that a matrix's features are of, corrected for their start at zero."""
    step = step.to(state.exp_avg.dtype)
    momenta, factored = (torch.stack([_weight(b, step) for b in d]) for d in (MOMENTUM_DECAYS, ADAFACTOR_DECAYS))
    return state._replace(
        exp_avg=state.exp_avg / _bias(momenta, state.exp_avg[0]),
        exp_avg_sq=state.exp_avg_sq / _weight(RMS_DECAY, step),
        row=state.row / _bias(factored, state.row[0]),
        col=state.col / _bias(factored, state.col[0]),
    )


def _with_moments(state: feats.Accumulators, grad: Tensor) -> feats.Accumulators:
    """The state after a gradient, with the rows and columns left as they are: AdamW does not read them."""
    exp_avg, exp_avg_sq = feats.update_moments(state.exp_avg, state.exp_avg_sq, feats.bounded(grad), _decays(grad))
    return state._replace(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


def _decays(like: Tensor) -> feats.Decays:
    decays = (MOMENTUM_DECAYS, (RMS_DECAY,), ADAFACTOR_DECAYS)
    return feats.Decays(*(constant(values, like.dtype, like.device) for values in decays))


def _clamped(grad: Tensor) -> Tensor:
    return grad.clamp(-LARGEST_GRADIENT, LARGEST_GRADIENT)


def _nonzero(state: feats.Accumulators) -> tuple[Tensor, tuple[int, ...]]:
    """The question to `means` that gives the share of coordinates that have had a gradient: (3, *shape) -> ()."""
    touched = (state.exp_avg != 0).any(0)
    return touched.to(state.exp_avg.dtype), tuple(range(-touched.dim(), 0))


def _matrix_dims(tensor: Tensor, layout: str) -> tuple[int, ...]:
    """The dims that an rms is over, counted from the end of (*shape): out and in, or that of a vector."""
    dims = tuple(range(-tensor.dim(), 0))
    return dims[-2:] if layout == "jax" else dims[:2]


def _beside_matrix(mean: Tensor, like: Tensor, layout: str) -> Tensor:
    """(c, *spatial) means over `_matrix_dims`, reshaped for broadcasting over (c, *shape)."""
    spatial, ones = mean.shape[1:], [1] * len(_matrix_dims(like, layout))
    return mean.reshape(len(mean), *(*spatial, *ones) if layout == "jax" else (*ones, *spatial))


def _bias(bias: Tensor, like: Tensor) -> Tensor:
    return bias.reshape(-1, *[1] * like.dim())


KINDS: dict[str, dict[str, Any]] = {"celo2": {}, "celo2_base": {"orthogonalize": False, "vector_mult": None}}
for _kind, _defaults in KINDS.items():
    register(_kind, Celo2, **_defaults)
