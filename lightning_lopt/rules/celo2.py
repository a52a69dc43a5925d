"""Celo2: a learned direction of unit size. Moudgil, Knyazev, Belilovsky 2026 (arXiv 2602.19142).

    d = MLP(30 features)        of each coordinate
    s = NewtonSchulz(d)         of each matrix; not in `celo2_base`
    s = s / rms(s)              of each matrix or vector
    p = p - lr (s + w p)

in every detail as in the authors' code (github.com/amoudgl/celo2). Only the direction is learned: the rms of a step is
the learning rate, and rate, schedule and weight decay w are set by hand. Features are divided by their rms, too, so
the rule does not see the scale of gradients or parameters. In `celo2`, vectors and embeddings are moved by AdamW at 20
times the learning rate; in `celo2_base` everything is moved by the network.

A matrix has torch's layout here, (out, in), and a convolution (out, in, *spatial). The authors' code has (in, out) and
(*spatial, in, out). Where the difference matters, this file reads tensors in their order (`features.jax_order`):

* the rms, and Newton-Schulz, are over (out, in), for each position of a convolution's kernel on its own;
* of two equal dims, `features.factored_dims` takes the one that is the later in their order.

Deviations:

* a tensor does not move as long as all its gradients have been zero, and does not decay either. In the authors' code
  it moves by the full learning rate, because the network's biases and the features that are constant give a direction,
  which is then divided by its rms. Frozen layers and unused experts would drift;
* gradients beyond the root of the dtype's largest number are clamped for AdamW, so that its moments stay finite. The
  network's are clamped to +-1000, as in the authors' code.

symbol | here              | symbol | here
lr     | step_size         | w      | weight_decay
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
from lightning_lopt.rules.shards import TensorShard, local, means

MOMENTUM_DECAYS, RMS_DECAY, ADAFACTOR_DECAYS = (0.9, 0.99, 0.999), 0.95, (0.9, 0.99, 0.999)
LARGEST_GRADIENT = 1000.0
EPS = 1e-8  # of the second moment's root, and AdamW's
RMS_EPS = 1e-9  # added to mean squares
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of X <- a X + (b A + c A^2) X with A = X X'
NEWTON_SCHULZ_STEPS = 5

# The authors' 14 blocks of features, each with a matrix w0__i of its own: here, rows of w0 in the same order.
WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
NUM_FEATURES = sum(WIDTHS)
# Rows of w0 for the channels of `features.Features`, of which a vector has no more than the first 13 dense ones.
DENSE, PRECONDITIONED_MOMENTA = (0, *range(2, 14)), (27, 28, 29)
ROW = (15, 16, 17, 21, 22, 23)
COL = (18, 19, 20, 24, 25, 26)
MORE = (1, 14)  # the gradient clamped to +-0.1, and divided by the root of the second moment
Group = tuple[list[int], Tensor]  # rows of w0, and their channels


@dataclasses.dataclass(frozen=True)
class Celo2Config(RuleConfig):
    """Configuration of `Celo2`. The defaults are those of the published `celo2`."""

    step_size: float = 1e-3
    """The rms of a step of the network's: that of meta-training. Tune it; RuleOptimizer's lr multiplies it."""
    weight_decay: float = 0.0
    """Decoupled; multiplied by the step size, for AdamW's tensors also by adamw_mult."""
    orthogonalize: bool = True
    """Orthogonalize the directions of matrices by Newton-Schulz; false in celo2_base."""
    adamw: bool = True
    """Move vectors and embeddings by AdamW instead of the network; false in celo2_base."""
    adamw_mult: float = 20.0
    """AdamW's learning rate, in step sizes."""
    adamw_bias_correction: bool = True
    """False: AdamW as in the authors' meta-training, without bias correction and with eps inside the root."""
    embedding_names: tuple[str, ...] = ("embed", "_emb", "wte.", "wpe.", "cls_token")
    """A tensor whose name has one of these, in lower case, is an embedding. The authors take "embed"; the others are
    usual in torch."""
    hidden_size: int = 8
    """Units of each of the two hidden layers."""

    def __post_init__(self) -> None:
        for name in ("step_size", "weight_decay", "adamw_mult"):
            self.check_number(name, 0.0)
        self.check_flags("orthogonalize", "adamw", "adamw_bias_correction")
        names = self.embedding_names
        fits = isinstance(names, tuple) and all(isinstance(name, str) and name for name in names)
        self.check(fits, "embedding_names", "parts of names such as 'embed'")
        self.check_integer("hidden_size", 1, 1024)


def moved_by_adamw(config: Celo2Config, ndim: int, name: str | None) -> bool:
    """Whether AdamW moves a tensor: below two dims, or an embedding by its name. Never for `celo2_base`."""
    is_embedding = any(part in (name or "").lower() for part in config.embedding_names)
    return config.adamw and (ndim < 2 or is_embedding)


class Celo2(UpdateRule):
    """Kinds `celo2` and `celo2_base`.

    Meta-parameters: `w0 (30, h), b0, w1 (h, h), b1, w2 (h, 3), b2`; 347 in all. As in the authors' code the network has
    three outputs, of which only the first is used. State: 4 floats per parameter, and 3 per row and per column of a
    factored tensor (3 per parameter below two dims).

    It is not free of hyper-parameters: tune the step size and use a schedule. With `lr="scale"` and
    `reference_lr=1e-3`, the default `step_size`, the schedule of your optimizer is that of a step's rms; Adam's is
    usually 0.2 to 0.4 times its learning rate. Newton-Schulz on an (n, m) matrix, n <= m, costs about 5 n / T times as
    much as a forward and backward pass over T rows: little for long batches, and more than the whole training step for
    64 units and batches of 128.

    Example:
        >>> import torch
        >>> from lightning_lopt.rules import StepContext, make
        >>> rule, param = make("celo2", step_size=0.01), torch.zeros(3, 2)
        >>> grad, context = torch.randn(3, 2), StepContext(torch.tensor(0.0), name="layer.weight")
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
        self.needs_names = self.config.adamw and bool(self.config.embedding_names)
        sizes = (NUM_FEATURES, self.config.hidden_size, self.config.hidden_size, 3)
        for layer, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            std = 1 / math.sqrt(fan_in)
            weight = nn.init.trunc_normal_(torch.empty(fan_in, fan_out), std=std, a=-2 * std, b=2 * std)
            self.register_parameter(f"w{layer}", nn.Parameter(weight))
            self.register_parameter(f"b{layer}", nn.Parameter(torch.zeros(fan_out)))

    def init_state(self, param: Tensor) -> feats.Accumulators:
        """Zero accumulators."""
        return feats.init_accumulators(param, "jax")

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
        if moved_by_adamw(c, grad.dim(), context.name):
            state = _with_moments(state, grad if c.adamw_bias_correction else _clamped(grad))
            step_size, step = c.step_size * c.adamw_mult, self._adamw(state, context.step)
            (share,) = means(shard, _nonzero(state))
        else:
            step_size, grad = c.step_size, _clamped(grad)
            state = feats.update_accumulators(state, grad, _decays(grad), shard, "jax")
            direction, share = self._direction(meta_params, grad, state, param, shard)
            step = self._normalized(direction, shard)
        delta = -step_size * (step + c.weight_decay * param)
        return torch.where(share > 0, delta, torch.zeros_like(delta)), state

    def _direction(
        self,
        meta_params: Mapping[str, Tensor],
        grad: Tensor,
        state: feats.Accumulators,
        param: Tensor,
        shard: TensorShard | None,
    ) -> tuple[Tensor, Tensor]:
        """(*shape) the network's first output, and () the share of coordinates that have had a gradient.

        The first layer is applied group by group, so that features of rows and columns cost a row or a column.
        """
        dense, factored = self._features(grad, state, param, shard)
        dims = _matrix_dims(grad)
        *mean_squares, share = means(shard, *((x.square(), dims) for _, x in dense), _nonzero(state))
        mean_squares += means(None, *((x.square(), dims) for _, x in factored))  # rows and columns are whole everywhere
        hidden = _bias(meta_params["b0"], grad)
        for (rows, channels), mean in zip(dense + factored, mean_squares, strict=True):
            weight, scale, channels = meta_params["w0"][rows], torch.rsqrt(mean + RMS_EPS), local(shard, channels)
            if scale.dim() == 1:  # of the whole tensor: 8 numbers a channel to multiply instead of a plane
                weight = weight * scale.unsqueeze(1)
            else:
                channels = channels * local(shard, _beside_matrix(scale, grad))
            hidden = hidden + feats.contract(weight, channels)
        rest = {"w0": meta_params["w1"], "b0": meta_params["b1"]}
        rest |= {"w1": meta_params["w2"][:, :1], "b1": meta_params["b2"][:1]}
        output = networks.coordinatewise(lambda units: networks.mlp(rest, torch.relu(units)), hidden)
        return output[0], share

    def _features(
        self, grad: Tensor, state: feats.Accumulators, param: Tensor, shard: TensorShard | None
    ) -> tuple[list[Group], list[Group]]:
        """The channels (c, *shape), and those of a matrix's rows and columns, each with its rows of w0."""
        channels = feats.input_features(state, grad, param, shard, EPS, "jax")
        more = torch.stack([grad.clamp(-0.1, 0.1), grad * feats.inverse_root(state.exp_avg_sq, EPS)])
        if grad.dim() < 2:
            return [(list(DENSE), channels.dense[: len(DENSE)]), (list(MORE), more)], []
        dense = [([*DENSE, *PRECONDITIONED_MOMENTA], channels.dense), (list(MORE), more)]
        return dense, [(list(ROW), channels.row), (list(COL), channels.col)]

    def _normalized(self, direction: Tensor, shard: TensorShard | None) -> Tensor:
        """The direction, orthogonalized if so configured, with rms 1 over each matrix."""
        orthogonalize = self.config.orthogonalize and direction.dim() >= 2
        if orthogonalize:
            (direction,) = means(shard, (direction, ()))  # all of it: every process does the same work
            direction = orthogonalized(direction)
        (mean,) = means(None if orthogonalize else shard, (direction.square(), _matrix_dims(direction)))
        scale = torch.rsqrt(_beside_matrix(mean.unsqueeze(0), direction)[0] + RMS_EPS)
        return local(shard, direction) * local(shard, scale)

    def _adamw(self, state: feats.Accumulators, step: Tensor) -> Tensor:
        """AdamW's direction from the first momentum and the second moment, whose decays are AdamW's .9 and .95."""
        exp_avg, exp_avg_sq = state.exp_avg[0], state.exp_avg_sq
        if not self.config.adamw_bias_correction:
            return exp_avg * feats.inverse_root(exp_avg_sq, EPS)
        count = step.to(exp_avg.dtype) + 1
        first, second = (-torch.expm1(math.log(decay) * count) for decay in (MOMENTUM_DECAYS[0], RMS_DECAY))
        return exp_avg / first / ((exp_avg_sq / second).sqrt() + EPS)

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
            >>> Celo2.from_jax(theta, kind="celo2_base", step_size=1e-2).config.orthogonalize
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


def orthogonalized(matrices: Tensor) -> Tensor:
    """(out, in, *spatial) each matrix's nearest one with equal singular values, roughly, by five Newton-Schulz steps.

    Singular values end between about 0.7 and 1.2; those below a thousandth of the Frobenius norm stay smaller.

    Example:
        >>> torch.linalg.svdvals(orthogonalized(torch.diag(torch.tensor([3.0, 1.0])))) > 0.6
        tensor([True, True])
    """
    batch = matrices.permute(feats.jax_order(matrices.dim()))
    is_tall = batch.shape[-2] > batch.shape[-1]
    x: Tensor = batch.mT if is_tall else batch
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + EPS)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if is_tall else x
    return x.movedim((-1, -2), (0, 1))


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


def _matrix_dims(tensor: Tensor) -> tuple[int, ...]:
    """The dims that an rms is over, counted from the end of (*shape): out and in, or that of a vector."""
    return tuple(range(-tensor.dim(), 0))[:2]


def _beside_matrix(mean: Tensor, like: Tensor) -> Tensor:
    """(c, *spatial) means over `_matrix_dims`, reshaped for broadcasting over (c, *shape)."""
    return mean.reshape(len(mean), *[1] * len(_matrix_dims(like)), *mean.shape[1:])


def _bias(bias: Tensor, like: Tensor) -> Tensor:
    return bias.reshape(-1, *[1] * like.dim())


KINDS: dict[str, dict[str, Any]] = {"celo2": {}, "celo2_base": {"orthogonalize": False, "adamw": False}}
for _kind, _defaults in KINDS.items():
    register(_kind, Celo2, **_defaults)
