"""STAR: "stabilized through ample regularization". Harrison, Metz, Sohl-Dickstein 2022 (arXiv 2209.11208).

    f = beta_1 exp(beta_2 m_g) g  +  beta_3 (d / v) exp(beta_4 m_b)                                  (eqs. 21 and 22)
        nominal term                 preconditioned blackbox term

A small network reads 39 features of each coordinate and returns a direction d and magnitudes m_b, m_g, m_r. Where the
authors' code differs from the paper, this file follows the code:

* The paper counts 203 meta-parameters (three heads, and beta_1 learned). The code has 207: four heads, the fourth a
  regularizer magnitude m_r that is off by default, and beta_1 is set by hand.
* v is sqrt(second moment + 1e-6) without bias correction, not "of the magnitude of the mean gradient". So the first
  steps are about ten times larger than later ones, and a tensor without gradient moves by the full 1 / sqrt(1e-6).
* With the nominal controller off, m_g is 1, not 0: the nominal term is multiplied by exp(beta_2).

symbol | here                   | symbol | here
beta_1 | nominal_stepsize       | g      | nominal.nominal_direction
beta_2 | exp_mult[1]            | d      | head 0
beta_3 | step_mult              | v      | 1 / features.inverse_root
beta_4 | exp_mult[0]            | m_b, m_g, m_r | heads 1, 2, 3
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lopt.rules import features as feats
from lightning_lopt.rules import nominal
from lightning_lopt.rules.base import RuleConfig, StepContext, UpdateRule, register
from lightning_lopt.rules.jax_arrays import as_tensors, check_shapes
from lightning_lopt.rules.shards import TensorShard, local, means, whole_shape


@dataclasses.dataclass(frozen=True)
class STARConfig(RuleConfig):
    """Configuration of `STAR`. The defaults are the paper's (section 5 and App. B.2)."""

    nominal_stepsize: float = 1e-3
    """beta_1, the nominal term's step size; 0 leaves only the blackbox term."""
    step_mult: float = 1e-3
    """beta_3, the blackbox term's multiplier; 0 leaves only the nominal term and its controller."""
    exp_mult: tuple[float, float, float] = (1e-3, 1e-3, 1e-3)
    """Multipliers of the blackbox, nominal and regularizer magnitudes: beta_4, beta_2, and the code's third."""
    nominal_grad_estimator: str = "AdamAggMo"
    """The nominal direction: SGD, SGDM, AggMo, Adam or AdamAggMo."""
    nominal_controller: bool = True
    """Let the network scale the nominal term."""
    normalize_blackbox: bool = True
    """Precondition the blackbox term by 1 / v."""
    weight_decay: float = 0.0
    """Per step; not multiplied by any learning rate."""
    regularization_controller: bool = False
    """Let the network scale the weight decay."""
    aggregate_magnitude: bool = False
    """One blackbox magnitude per tensor, from the head's mean."""
    aggregate_nom_magnitude: bool = False
    """One nominal magnitude per tensor."""
    aggregate_reg_magnitude: bool = False
    """One regularizer magnitude per tensor. The authors' code fails on this option; here it works."""
    selfnormalize_blackbox: bool = False
    """Multiply the blackbox term by the tensor's signed mean gradient."""
    eps: float = feats.EPS
    """Added to the second moment before its root. The authors' 1e-6 hides gradients below 1e-3, which losses that are
    means over many outputs have; smaller values are not in the paper."""
    hidden_size: int = 4
    """Units of each hidden layer."""
    hidden_layers: int = 2
    """Hidden layers."""
    layout: str = "torch"
    """How dims are read: as torch's (out, in, *spatial), or as "jax", the authors' (*spatial, in, out). It says which
    of two equal dims the rows are."""
    num_heads: int = 4
    """4 (STAR) or 2 (blackbox: direction and magnitude)."""
    initial_momentum_decays: tuple[float, float, float] = (0.9, 0.99, 0.999)
    """Momentum decays at offset zero, slowest last."""
    initial_rms_decays: tuple[float] = (0.999,)
    """Second-moment decay at offset zero."""
    initial_adafactor_decays: tuple[float, float, float] = (0.9, 0.99, 0.999)
    """Decays of the factored second moments at offset zero."""

    def __post_init__(self) -> None:
        if isinstance(self.exp_mult, (int, float)):  # the reference's blackbox has one multiplier
            object.__setattr__(self, "exp_mult", (self.exp_mult,) * 3)
        for name in ("nominal_stepsize", "step_mult", "weight_decay"):
            self.check_number(name, 0.0)
        self.check_numbers("exp_mult", 3)
        self.check(
            self.nominal_grad_estimator in list(nominal.ESTIMATORS),
            "nominal_grad_estimator",
            f"one of {list(nominal.ESTIMATORS)}",
        )
        self.check_flags(
            "nominal_controller", "normalize_blackbox", "regularization_controller", "selfnormalize_blackbox"
        )
        self.check_flags("aggregate_magnitude", "aggregate_nom_magnitude", "aggregate_reg_magnitude")
        self.check_number("eps", 1e-20, 1.0)
        self.check_integer("hidden_size", 1, 1024)
        self.check_integer("hidden_layers", 1, 16)
        self.check(self.layout in list(feats.LAYOUTS), "layout", f"one of {list(feats.LAYOUTS)}")
        self.check(type(self.num_heads) is int and self.num_heads in (2, 4), "num_heads", "2 or 4")
        for name in ("nominal_controller", "regularization_controller"):
            self.check(
                self.num_heads == 4 or not getattr(self, name), name, "false with num_heads=2, which has no head for it"
            )
        for name, length in (("momentum", 3), ("rms", 1), ("adafactor", 3)):
            self.check_numbers(f"initial_{name}_decays", length, 0.0, math.nextafter(1.0, 0.0))


class Statistics(NamedTuple):
    """Means over one tensor that its step reads."""

    channels: list[Tensor]  # mean squares of the features' channels: (16,), (6,), (6,); empty without a network
    means: list[Tensor]  # () mean gradient, for selfnormalize_blackbox


class STAR(UpdateRule):
    """STAR. `hyperparam` (step_mult 0) and `blackbox` (two heads, no nominal term) are configurations of it.

    Meta-parameters: `w0 (39, h), b0, w1 (h, h), b1, ..., w2 (h, heads), b2` and the decay offsets
    `momentum_decays (3,)`, `rms_decays (1,)`, `adafactor_decays (3,)`; 207 in all, 197 for `blackbox`. State: 4 floats
    per parameter, and 3 per row and per column of a factored tensor (3 per parameter below two dims).

    Example:
        >>> import torch
        >>> from lightning_lopt.rules import StepContext, make
        >>> rule, param = make("star"), torch.ones(3, 2)
        >>> delta, state = rule.update(
        ...     rule.meta_params(), torch.ones(3, 2), rule.init_state(param), param, StepContext(torch.tensor(0.0))
        ... )
        >>> delta.shape, state.row.shape, state.col.shape
        (torch.Size([3, 2]), torch.Size([3, 2]), torch.Size([3, 3]))
    """

    Config = STARConfig
    config: STARConfig
    takes_shards = True
    whole_state = frozenset({"row", "col"})

    def __init__(self, config: STARConfig | None = None, *, kind: str = "star") -> None:
        super().__init__(config, kind=kind)
        sizes = [feats.NUM_FEATURES, *[self.config.hidden_size] * self.config.hidden_layers, self.config.num_heads]
        for layer, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            std = 1 / math.sqrt(fan_in)
            weight = nn.init.trunc_normal_(torch.empty(fan_in, fan_out), std=std, a=-2 * std, b=2 * std)
            self.register_parameter(f"w{layer}", nn.Parameter(weight))
            self.register_parameter(f"b{layer}", nn.Parameter(torch.zeros(fan_out)))
        self.momentum_decays = nn.Parameter(torch.zeros(3))
        self.rms_decays = nn.Parameter(torch.zeros(1))
        self.adafactor_decays = nn.Parameter(torch.zeros(3))

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
        """One step: accumulators first, then the features from them, then the network's heads, then the two terms."""
        state = self._accumulated(meta_params, grad, state, context)
        terms = self._terms(meta_params, grad, state, param, context)
        return sum(terms.values(), torch.zeros_like(param)), state

    def terms(
        self,
        meta_params: Mapping[str, Tensor],
        grad: Tensor,
        state: feats.Accumulators,
        param: Tensor,
        context: StepContext,
    ) -> dict[str, Tensor]:
        """The step's `blackbox`, `nominal` and `decay` terms, as far as the configuration has them."""
        state = self._accumulated(meta_params, grad, state, context)
        return self._terms(meta_params, grad, state, param, context)

    def decays(self, meta_params: Mapping[str, Tensor]) -> feats.Decays:
        """Effective decay rates. The reference clips all but the momenta's to [0, 1], and so do we."""
        c = self.config
        return feats.Decays(
            feats.effective_decay(c.initial_momentum_decays, meta_params["momentum_decays"]),
            feats.effective_decay(c.initial_rms_decays, meta_params["rms_decays"]).clamp(0, 1),
            feats.effective_decay(c.initial_adafactor_decays, meta_params["adafactor_decays"]).clamp(0, 1),
        )

    def heads(
        self,
        meta_params: Mapping[str, Tensor],
        features: feats.Features,
        mean_squares: Sequence[Tensor],
        time: Tensor,
        shard: TensorShard | None = None,
    ) -> Tensor:
        """The network's outputs (heads, *shape): direction, blackbox, nominal and regularizer magnitude.

        The first layer is applied group by group, with the normalizer folded into its rows. So features that are
        constant along a dim cost a row or a column instead of a plane, and the 39 planes are never formed.
        """
        w0, ndim = meta_params["w0"], features.dense.dim() - 1
        hidden = _bias(meta_params["b0"] + time @ w0[feats.NUM_CHANNELS :], ndim)
        for rows, channels, mean in zip((feats.DENSE, feats.ROW, feats.COL), features, mean_squares, strict=True):
            weight = w0[list(rows)] * feats.inverse_root_of_mean(mean).unsqueeze(1)
            hidden = hidden + local(shard, feats.contract(weight, channels))
        for layer in range(1, self.config.hidden_layers + 1):
            weight, bias = meta_params[f"w{layer}"], meta_params[f"b{layer}"]
            hidden = feats.contract(weight, torch.relu(hidden)) + _bias(bias, ndim)
        return hidden

    def _accumulated(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: feats.Accumulators, context: StepContext
    ) -> feats.Accumulators:
        return feats.update_accumulators(state, grad, self.decays(meta_params), context.shard, self.config.layout)

    def _terms(
        self,
        meta_params: Mapping[str, Tensor],
        grad: Tensor,
        state: feats.Accumulators,
        param: Tensor,
        context: StepContext,
    ) -> dict[str, Tensor]:
        c, shard = self.config, context.shard
        inv_root, heads, features = feats.inverse_root(state.exp_avg_sq, c.eps), torch.zeros(0), None
        if c.step_mult or c.nominal_controller or (c.weight_decay and c.regularization_controller):
            features = feats.input_features(state, grad, param, shard, c.eps, c.layout)
        whole = self._statistics(grad, features, shard)
        if features is not None:
            time = feats.time_features(context.step, param.dtype)
            heads = self.heads(meta_params, features, whole.channels, time, shard)
        terms = {}
        if c.step_mult:
            size = nominal.magnitude(c.exp_mult[0], heads[1], aggregate=c.aggregate_magnitude, shard=shard)
            step = c.step_mult * heads[0] * size
            if c.normalize_blackbox:
                step = nominal.precondition(step, inv_root)
            if c.selfnormalize_blackbox:
                step = step * whole.means[0]
            terms["blackbox"] = -step
        if c.nominal_stepsize:
            control: Tensor | float = math.exp(c.exp_mult[1])
            if c.nominal_controller:
                control = nominal.magnitude(c.exp_mult[1], heads[2], aggregate=c.aggregate_nom_magnitude, shard=shard)
            direction = nominal.nominal_direction(c.nominal_grad_estimator, grad, state.exp_avg, inv_root)
            terms["nominal"] = -nominal.nominal_term(c.nominal_stepsize, direction, control)
        if c.weight_decay:
            decay: Tensor | float = c.weight_decay
            if c.regularization_controller:
                size = nominal.magnitude(c.exp_mult[2], heads[3], aggregate=c.aggregate_reg_magnitude, shard=shard)
                decay = decay * size
            terms["decay"] = -decay * param
        return terms

    def _statistics(self, grad: Tensor, features: feats.Features | None, shard: TensorShard | None) -> Statistics:
        """All means over the tensor that the step reads, asked for at once: each question of a shard is a message."""
        c, every = self.config, tuple(range(-grad.dim(), 0))
        # Rows and columns are whole in every shard.
        factored = features is not None and feats.factored_dims(whole_shape(shard, grad)) is not None
        groups: Sequence[Tensor] = () if features is None else features[:1] if factored else features
        questions = [feats.mean_square_of(channels) for channels in groups]
        questions += [(grad, every)] if c.selfnormalize_blackbox else []
        answers = means(shard, *questions) if questions else []
        channels = answers[: len(groups)]
        if features is not None and factored:
            channels += means(None, *(feats.mean_square_of(rows) for rows in features[1:]))
        return Statistics(channels, answers[-1:])

    @classmethod
    def from_jax(cls, theta: Mapping[str, Any], **arguments: Any) -> STAR:
        """A rule from the authors' meta-parameters.

        Args:
            theta: `w0 b0 w1 b1 w2 b2 momentum_decays rms_decays adafactor_decays` as arrays. A last layer of two
                columns gives the `blackbox` rule. The arrays' dtype is kept.
            arguments: those of the reference's constructor (`MLPNomLOpt`, or `AdafacMLPLOpt` with its scalar
                `exp_mult`), with its defaults: nominal_stepsize 0, nominal_controller False, normalize_blackbox False.
                Also `layout`: "jax", as the reference reads tensors, by default; pass "torch" for nets in torch, whose
                matrices are (out, in).

        Raises:
            ValueError: for missing, unknown or wrongly shaped arrays; for arguments that the reference does not have
                or that change how the same weights are read (`split_weights`, `make_separate_weights`).

        Example:
            >>> import lightning_lopt as lopt
            >>> theta = {name: p.detach().numpy() for name, p in lopt.rules.make("star").named_parameters()}
            >>> lopt.rules.STAR.from_jax(theta, nominal_stepsize=1e-3, nominal_controller=True).kind
            'star'
        """
        tensors = as_tensors(theta, _FLAT)
        rule = _from_reference(cls, tensors, arguments)
        check_shapes(tensors, {name: tuple(p.shape) for name, p in rule.named_parameters()}, _FLAT)
        for name, tensor in tensors.items():
            setattr(rule, name, nn.Parameter(tensor))
        return rule


_LAYOUT_ARGUMENTS = {"concat_weights", "make_separate_weights", "split_weights"}
_NOT_IN_THE_REFERENCE = {"num_heads", "eps"}
_FLAT = "Pass the flat mapping of w0, b0, w1, b1, w2, b2, momentum_decays, rms_decays, adafactor_decays"


def _from_reference(cls: type[STAR], theta: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> STAR:
    if theta.get("w2", torch.empty(0)).dim() != 2:
        raise ValueError(f"theta has no matrix 'w2'; it has {sorted(theta)}. {_FLAT}.")
    if refused := [name for name in ("make_separate_weights", "split_weights") if arguments.get(name)]:
        raise ValueError(
            f"{refused[0]}=True reads the same weights as another function; it is not supported. Leave it False."
        )
    if unknown := sorted(_NOT_IN_THE_REFERENCE.intersection(arguments)):
        raise ValueError(f"{unknown[0]!r} is not an argument of the reference; for our own options use rules.make.")
    config = {name: _plain(value) for name, value in arguments.items() if name not in _LAYOUT_ARGUMENTS}
    kind = "blackbox" if theta["w2"].shape[1] == 2 else "star"
    defaults = dict(_BLACKBOX, num_heads=2 if kind == "blackbox" else 4, layout="jax")
    return cls(STARConfig.from_dict({**defaults, **config}), kind=kind)


_BLACKBOX = {"nominal_stepsize": 0.0, "nominal_controller": False, "normalize_blackbox": False}


def _plain(value: Any) -> Any:
    """NumPy and torch values as Python's own, so that the configuration stays JSON."""
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _bias(bias: Tensor, ndim: int) -> Tensor:
    return bias.reshape(-1, *[1] * ndim)


register("star", STAR)
register("hyperparam", STAR, step_mult=0.0)
register("blackbox", STAR, num_heads=2, **_BLACKBOX)
