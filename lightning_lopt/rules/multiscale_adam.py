"""Multiscale Adam: several Adams at different timescales, mixed per coordinate.

    d_j = -m_hat_j / sqrt(v_hat_j + eps^2),   j = 1 .. k                                  (algorithm 4, line 7)
    x' = x + eta sum_j w_j(d) d_j                                                         (lines 10 and 11)

with the weights w of one of these mixers (section 4.3):

    la_a        w_j = u_j / sum u, of one free number u_j per Adam; may be negative
    la_b        w_j = |u_j| / sum |u|
    la_c        w_j = u_j
    mlp, rnn1   softmax of a network k-50-k that reads the coordinate's d
    rnn2        the same with another hidden layer, k-50-50-k
    gru         softmax of a linear map of a recurrent state that reads d: not in the thesis, which suggests it as
                future work (section 4.6)

Source: Shahid 2017, "Learning to Optimize Deep Neural Networks" (master thesis, University of Freiburg), chapter 4, and
its released code. Notes and deviations:

* the thesis's "RNN" has no state. `rnn1` is identical to `mlp`; the name says that it was meta-trained through 20
  unrolled steps on the mean of their losses (eq. 4.1);
* eps^2 is inside the root, as in the code; in eq. 1.1, and in torch's Adam, eps is outside. Inside, derivatives are
  finite where all gradients were 0. The two differ by a factor between 1 and 1 + eps / sqrt(v_hat);
* the bias correction advances at every step; in the code it stays constant within an unroll;
* eq. 1.1 omits the moments in its bias correction, and table 4.1b misprints .995 for .95 and .8855 for .8885;
* la_a does not divide by a sum near 0: |sum u| counts as at least a hundredth of sum |u|. Initial weights have mean 0,
  so their sum can be arbitrarily small. Weights that are all 0 give no step, with la_b, too.

symbol       | here           | symbol       | here
beta_1, 2    | betas          | m            | Moments.exp_avg
eta          | eta            | v            | Moments.exp_avg_sq
epsilon      | eps            | w            | weights
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lopt.rules import features as feats
from lightning_lopt.rules import networks
from lightning_lopt.rules.base import RuleConfig, StepContext, UpdateRule, register
from lightning_lopt.rules.constants import constant

LINEAR = ("la_a", "la_b", "la_c")
HIDDEN_LAYERS = {"mlp": 1, "rnn1": 1, "rnn2": 2}
MIXERS = (*LINEAR, *HIDDEN_LAYERS, "gru")
INIT_STD = 0.01

# Table 4.1.
SIX = ((0.99, 0.9999), (0.9, 0.999), (0.8, 0.888), (0.7, 0.777), (0.6, 0.666), (0.5, 0.555))
FIVE_MORE = ((0.95, 0.9995), (0.85, 0.8885), (0.75, 0.7775), (0.65, 0.6665), (0.55, 0.5555))
BETAS = {5: SIX[:5], 6: SIX, 11: tuple(sorted(SIX + FIVE_MORE, reverse=True))}


class Moments(NamedTuple):
    """The moments of all Adams of one tensor, and the state of the mixer."""

    exp_avg: Tensor  # (k, *shape) first moments, not bias-corrected
    exp_avg_sq: Tensor  # (k, *shape) second moments, not bias-corrected
    hidden: Tensor  # (h, *shape) state of the recurrent mixer; (0, *shape) for other mixers


@dataclasses.dataclass(frozen=True)
class MultiscaleAdamConfig(RuleConfig):
    """Configuration of `MultiscaleAdam`."""

    mixer: str = "rnn2"
    """la_a, la_b, la_c, mlp, rnn1, rnn2 or gru."""
    k: int = 0
    """Number of Adams: 5, 6 or 11 as in the thesis; 0 for the number of betas, or 6 if there are none."""
    betas: tuple[tuple[float, float], ...] = ()
    """(beta_1, beta_2) of each Adam; by default those of the thesis."""
    eta: float = 1e-2
    """Step size; the learning rate of `RuleOptimizer` multiplies it."""
    eps: float = 1e-8
    """Its square is added to the second moments."""
    hidden_size: int = 50
    """Units of the hidden layers of mlp, rnn1 and rnn2."""
    recurrent_size: int = 8
    """Units of gru, which each coordinate has as state."""

    def __post_init__(self) -> None:
        self.check(self.mixer in MIXERS, "mixer", f"one of {list(MIXERS)}")
        self.check(isinstance(self.betas, tuple), "betas", "a sequence of pairs")
        self.check(all(isinstance(pair, (tuple, list)) for pair in self.betas), "betas", "a sequence of pairs")
        object.__setattr__(self, "betas", tuple(tuple(pair) for pair in self.betas))
        if type(self.k) is int and self.k == 0:
            object.__setattr__(self, "k", len(self.betas) or 6)
        if not self.betas:
            self.check(type(self.k) is int and self.k in BETAS, "k", f"one of {list(BETAS)}, or betas must be given")
            object.__setattr__(self, "betas", BETAS[self.k])
        self.check(type(self.k) is int and self.k == len(self.betas), "k", f"0 or {len(self.betas)}, that of the betas")
        inside = all(len(pair) == 2 and all(_is_decay(beta) for beta in pair) for pair in self.betas)
        self.check(inside, "betas", "pairs of numbers in [0, 1)")
        self.check_number("eta", 0.0)
        self.check_number("eps", 1e-9, 1.0)  # below, derivatives at 0 leave float32
        self.check_integer("hidden_size", 1, 1024)
        self.check_integer("recurrent_size", 1, 1024)


class MultiscaleAdam(UpdateRule):
    """Kind `multiscale_adam`.

    Meta-parameters: `weights (k,)` for la_a, la_b and la_c; `w0 (k, 50), b0, w1 (50, k), b1` for mlp and rnn1, one
    layer more for rnn2; `w_input, b_input, w_hidden, b_hidden, w0 (h, k), b0` for gru. State: 8 k bytes per float32
    parameter (40 for k = 5, 48 for 6, 88 for 11; Adam has 8), and for gru 4 per unit more (80 for k = 6 and 8 units).

    Learning-rate schedules act on eta: `RuleOptimizer` multiplies the step by its `lr`.

    Example:
        >>> import torch
        >>> from lightning_lopt.rules import StepContext, make
        >>> rule, param = make("multiscale_adam", mixer="rnn2", k=6), torch.ones(2)
        >>> grad, context = torch.tensor([2.0, -1e-3]), StepContext(torch.tensor(0.0))
        >>> delta, state = rule.update(rule.meta_params(), grad, rule.init_state(param), param, context)
        >>> delta.detach(), state.exp_avg.shape
        (tensor([-0.0100,  0.0100]), torch.Size([6, 2]))
    """

    Config = MultiscaleAdamConfig
    config: MultiscaleAdamConfig
    takes_shards = True

    def __init__(self, config: MultiscaleAdamConfig | None = None, *, kind: str = "multiscale_adam") -> None:
        super().__init__(config, kind=kind)
        c = self.config
        layers = {}
        if c.mixer in LINEAR:
            layers["weights"] = nn.Parameter(INIT_STD * torch.randn(c.k))
        elif c.mixer == "gru":
            layers |= networks.init_gru(c.k, c.recurrent_size)
            layers |= networks.init_mlp([c.recurrent_size, c.k], INIT_STD)
        else:
            layers |= networks.init_mlp([c.k, *[c.hidden_size] * HIDDEN_LAYERS[c.mixer], c.k], INIT_STD)
        for name, value in layers.items():
            self.register_parameter(name, value)

    def init_state(self, param: Tensor) -> Moments:
        """Zero moments, and a recurrent state of zeros."""
        units = self.config.recurrent_size if self.config.mixer == "gru" else 0
        exp_avg = param.new_zeros((self.config.k, *param.shape))
        return Moments(exp_avg, exp_avg.clone(), param.new_zeros((units, *param.shape)))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Moments, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Moments]:
        """One step: update the moments, compute the k directions, mix them."""
        step = partial(self._step, self._prepared(meta_params), self._corrections(context.step, grad.dtype))
        delta, *moments = networks.coordinatewise(step, *state, grad.unsqueeze(0))
        return delta[0], Moments(*moments)

    def directions(self, state: Moments, step: Tensor) -> Tensor:
        """(k, *shape) the step of each Adam with learning rate 1, from moments that already include the gradient.

        Args:
            state: of `update`.
            step: () updates made before the last gradient.
        """
        corrections = self._corrections(step, state.exp_avg.dtype)
        return networks.coordinatewise(lambda m, v: torch.mul(*self._directions(corrections, m, v)), *state[:2])

    @torch.no_grad()
    def mixing_weights(self, directions: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(k, *shape) the weights that mix directions; those of the linear mixers (table 4.2) are the same everywhere.

        Args:
            directions: (k, *shape) as `directions` gives them.
            hidden: (h, *shape) recurrent state before the step, for gru; zeros if not given.
        """
        if hidden is None:
            units = self.config.recurrent_size if self.config.mixer == "gru" else 0
            hidden = directions.new_zeros((units, *directions.shape[1:]))
        meta_params = self._prepared(self.meta_params())
        return networks.coordinatewise(
            lambda d, h: self._weights(meta_params, d, h)[0].expand_as(d), directions, hidden
        )

    def _prepared(self, meta_params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The meta-parameters, with the weights of a linear mixer as `linear_weights` gives them."""
        if self.config.mixer not in LINEAR:
            return meta_params
        return {"weights": linear_weights(self.config.mixer, meta_params["weights"])}

    def _corrections(self, step: Tensor, dtype: torch.dtype) -> Tensor:
        """(2, k, 1) the bias corrections 1 - beta^t, which the moments are divided by."""
        # Logarithms in double precision: in float32, that of .9999 would be off by 2e-4 at first.
        logs = tuple(tuple(math.log(beta) if beta else -math.inf for beta in pair) for pair in self.config.betas)
        powers = (step.to(dtype) + 1) * constant(logs, dtype, step.device)
        return -torch.expm1(powers).mT.unsqueeze(2)

    def _step(
        self,
        meta_params: Mapping[str, Tensor],
        corrections: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        hidden: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor, ...]:
        """(k, n) moments, (h, n) state and (1, n) gradient -> (1, n) the step, and the new moments and state."""
        # 1 - beta in double precision: in float32, that of .9999 would be off by 2e-4.
        rates = constant(tuple(tuple(1 - beta for beta in pair) for pair in self.config.betas), grad.dtype, grad.device)
        first, second = rates.unsqueeze(2).unbind(1)
        grad = feats.bounded(grad)
        exp_avg = torch.lerp(exp_avg, grad, first)
        exp_avg_sq = torch.lerp(exp_avg_sq, grad * grad, second)
        sizes, scales = self._directions(corrections, exp_avg, exp_avg_sq)
        if self.config.mixer in LINEAR:
            mixed = (meta_params["weights"] * scales.squeeze(1)).unsqueeze(0) @ sizes
        else:
            directions = scales * sizes
            weights, hidden = self._weights(meta_params, directions, hidden)
            mixed = (weights * directions).sum(0, keepdim=True)
        return self.config.eta * mixed, exp_avg, exp_avg_sq, hidden

    def _directions(self, corrections: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor]:
        """(k, n) moments -> (k, n) and (k, 1), whose product is the directions.

            -m / c_1 / sqrt(v / c_2 + eps^2) = m / sqrt(v + c_2 eps^2) * (-sqrt(c_2) / c_1)

        so a linear mixer can first multiply the latter by its weights, before anything of size n.
        """
        offsets, factors = self.scales(corrections)
        return exp_avg * torch.rsqrt(exp_avg_sq + offsets), factors

    def scales(self, corrections: Tensor) -> tuple[Tensor, Tensor]:
        """(k, 1) c_2 eps^2 and (k, 1) -sqrt(c_2) / c_1, from the bias corrections (2, k, 1)."""
        first, second = corrections
        return second * self.config.eps**2, -second.sqrt() / first

    def _weights(self, meta_params: Mapping[str, Tensor], directions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(k, n) directions and (h, n) state -> weights, (k, n) or (k, 1) if all share them, and the new state."""
        if self.config.mixer in LINEAR:
            return meta_params["weights"].unsqueeze(1), hidden
        if self.config.mixer == "gru":
            hidden = networks.gru(meta_params, directions, hidden)
        inputs = hidden if self.config.mixer == "gru" else directions
        return torch.softmax(networks.mlp(meta_params, inputs), 0), hidden


def linear_weights(mixer: str, weights: Tensor) -> Tensor:
    """The weights that la_a, la_b and la_c apply: (k,) free numbers -> (k,).

    Example:
        >>> import torch
        >>> linear_weights("la_b", torch.tensor([3.0, -1.0]))
        tensor([0.7500, 0.2500])
        >>> linear_weights("la_a", torch.tensor([3.0, -1.0]))
        tensor([ 1.5000, -0.5000])
    """
    if mixer == "la_c":
        return weights
    size = weights.abs().sum()
    if mixer == "la_b":
        return weights.abs() / torch.where(size == 0, 1.0, size)
    total = weights.sum()
    total = torch.where(total.abs() < size / 100, torch.copysign(size / 100, total), total)
    return weights / torch.where(size == 0, 1.0, total)


def _is_decay(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


register("multiscale_adam", MultiscaleAdam)
