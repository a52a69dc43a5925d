"""Component-wise GRU ("Reverse engineering learned optimizers reveals known and novel mechanisms").

    x' = x + out_scale (w . h' + b),    h' = u h + (1 - u) c
    r, u = sigmoid(W_gates [g, h]),     c = tanh(W_candidate [g, r h])

One gated recurrent unit (Cho et al. 2014, arXiv 1406.1078) is shared by all coordinates, each of which has its own
state. Source: Maheswaranathan et al. 2021 (arXiv 2011.02159), eqs. 1 and 2 and App. D.2. Where the text is silent or
differs from their released code, this follows the code:

* the reset gate multiplies the state before the matrix product, as in Cho et al.; torch's GRUCell and `networks.gru`
  multiply the product, which is another function;
* the state from which every coordinate starts, `initial`, is learned, and 0 at first. The stored state is the
  difference from it, which starts at 0. So `init_state` needs no meta-parameters, and gradients reach `initial` through
  every step;
* the readout's weights and bias are zero at first: an untrained rule does not move the parameters. The bias is in the
  code, not in eq. 2. It lets the update vanish at a fixed point whose units are not 0;
* weights are normal with variance 1 / inputs, biases 0;
* a gradient enters multiplied by `input_scale` ("raw"), or as its sign and ln(1 + |g|) ("log1p"). It is not known which
  of the paper's tasks used which. "log1p" has no derivative at g = 0. "asinh", which is not in the paper, has one, and
  suits gradients of many sizes equally well;
* `initial_lr`, not in the paper, sets up one half of the untrained rule's units as momentum, which the paper's rules
  discover. That saves most of the meta-training, but then says nothing about what would have been discovered. The other
  half is drawn as usual and not read at first: from units that are all momentum, and so alike, meta-training makes
  little progress.

STAR's stabilizers (Harrison et al. 2022, arXiv 2209.11208, eqs. 21 and 22) can be put around the network, see
`nominal`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lopt.rules import networks, nominal
from lightning_lopt.rules.base import RuleConfig, StepContext, UpdateRule, register

INPUT_SCALINGS = {"raw": 1, "asinh": 1, "log1p": 2}  # name -> number of features
START_NOISE = 0.03  # fraction of the usual weights that units keep which start as momentum: enough to tell them apart
SLOWEST = 4.0  # largest initial logit of the other units' update gates: memories of 2 to 55 steps


class GRUState(NamedTuple):
    """State of one tensor."""

    hidden: Tensor  # (units, *shape) minus `initial`
    exp_avg: Tensor  # (3, *shape) momenta; (0, *shape) without STAR's stabilizers
    exp_avg_sq: Tensor  # (*shape) second moment; (0,) without


class _Weights(NamedTuple):
    """The network's weights, transposed to multiply columns."""

    gates: Tensor  # (2 h, inputs + h)
    b_gates: Tensor  # (2 h, 1)
    candidate: Tensor  # (h, inputs + h)
    b_candidate: Tensor  # (h, 1)
    initial: Tensor  # (h, 1)
    readouts: Tensor  # (1 or 2, h)
    b_readouts: Tensor  # (1 or 2, 1)


@dataclasses.dataclass(frozen=True)
class GRUConfig(RuleConfig):
    """Configuration of `GRURule`."""

    hidden_size: int = 64
    """Units. The paper's rule for quadratics has 256."""
    input_scaling: str = "raw"
    """Scaling of the gradient: "raw", "asinh", or "log1p" (two features)."""
    input_scale: float = 1.0
    """Multiplies the gradient before anything else."""
    out_scale: float = 1.0
    """Multiplies the readout."""
    initial_lr: float = 0.0
    """Learning rate of the momentum that an untrained rule is; with 0, as in the paper, it does nothing."""
    initial_beta: float = 0.9
    """Decay of that momentum."""
    initial_reach: float = 10.0
    """Such a rule clips gradients, times `input_scale`, at about this size."""
    nominal_stepsize: float = 0.0
    """beta_1, the step size of STAR's nominal term; 0 for none."""
    nominal_grad_estimator: str = "AdamAggMo"
    """The nominal direction: SGD, SGDM, AggMo, Adam or AdamAggMo."""
    nominal_controller: bool = False
    """Let the network scale the nominal term, by a second readout."""
    exp_mult: float = 1e-3
    """beta_2: scale of the controller."""
    normalize_blackbox: bool = False
    """Precondition the network's step by 1 / v. v starts at 1e-3: choose `out_scale` accordingly."""

    def __post_init__(self) -> None:
        self.check_integer("hidden_size", 1, 1024)
        for name, low in (("input_scale", 0.0), ("out_scale", 0.0), ("nominal_stepsize", 0.0), ("exp_mult", -math.inf)):
            self.check_number(name, low)
        self.check_number("initial_lr", 0.0)
        self.check_number("initial_beta", 0.0, math.nextafter(1.0, 0.0))
        self.check_number("initial_reach", math.ulp(1.0))
        self.check(self.initial_lr == 0 or self.input_scaling != "log1p", "initial_lr", "0 with input_scaling='log1p'")
        self.check_flags("nominal_controller", "normalize_blackbox")
        for name, allowed in (
            ("input_scaling", list(INPUT_SCALINGS)),
            ("nominal_grad_estimator", list(nominal.ESTIMATORS)),
        ):
            self.check(getattr(self, name) in allowed, name, f"one of {allowed}")
        has_term = self.nominal_stepsize > 0 or not self.nominal_controller
        self.check(has_term, "nominal_controller", "false with nominal_stepsize=0, which leaves it nothing to scale")


class GRURule(UpdateRule):
    """Kind `gru`.

    Meta-parameters: `w_gates (inputs + h, 2 h)`, reset before update, `b_gates`, `w_candidate (inputs + h, h)`,
    `b_candidate`, rows in the order input, state; `initial (h,)`, `readout (h,)`, `readout_bias (1,)`, and
    `controller (h,)` if the nominal term has one. 12,801 numbers by default. State: h floats per parameter, 256
    bytes by default, and 16 bytes more with STAR's stabilizers: a rule for small models.

    Example:
        >>> import torch
        >>> from lightning_lopt.rules import StepContext, make
        >>> rule, param = make("gru"), torch.ones(3, 2)
        >>> context = StepContext(torch.tensor(0.0))
        >>> delta, state = rule.update(rule.meta_params(), torch.ones(3, 2), rule.init_state(param), param, context)
        >>> rule.num_meta_params(), delta.abs().max().item(), state.hidden.shape
        (12801, 0.0, torch.Size([64, 3, 2]))
    """

    Config = GRUConfig
    config: GRUConfig
    takes_shards = True
    w_gates: nn.Parameter
    b_gates: nn.Parameter
    w_candidate: nn.Parameter
    readout: nn.Parameter

    def __init__(self, config: GRUConfig | None = None, *, kind: str = "gru") -> None:
        super().__init__(config, kind=kind)
        size, inputs = self.config.hidden_size, INPUT_SCALINGS[self.config.input_scaling] + self.config.hidden_size
        for name, units in (("gates", 2 * size), ("candidate", size)):
            self.register_parameter(f"w_{name}", nn.Parameter(torch.randn(inputs, units) / math.sqrt(inputs)))
            self.register_parameter(f"b_{name}", nn.Parameter(torch.zeros(units)))
        zeros = {"initial": size, "readout": size, "readout_bias": 1}
        for name, units in (zeros | ({"controller": size} if self.config.nominal_controller else {})).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(units)))
        if self.config.initial_lr:
            self._begin_as_momentum()

    def init_state(self, param: Tensor) -> GRUState:
        """Zeros: no difference from `initial`."""
        hidden = param.new_zeros((self.config.hidden_size, *param.shape))
        return GRUState(hidden, *nominal.init_moments(self.config, param))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: GRUState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, GRUState]:
        """One step: moments, network, then the two terms."""
        terms, state = self._step(meta_params, grad, state)
        return sum(terms.values(), torch.zeros_like(param)), state

    def terms(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: GRUState, param: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        """The step's `blackbox` and, if there is one, `nominal` term."""
        return self._step(meta_params, grad, state)[0]

    @torch.no_grad()
    def _begin_as_momentum(self) -> None:
        """Make the first half of the units nearly beta h + (1 - beta) tanh(+-g / reach), whose sum is the update."""
        c, size = self.config, self.config.hidden_size
        half = (size + 1) // 2
        signs = torch.ones(half)
        signs[1::2] = -1.0
        for columns in (self.w_gates[:, :half], self.w_gates[:, size : size + half], self.w_candidate[:, :half]):
            columns.mul_(START_NOISE)
        self.b_gates[size : size + half] = math.log(max(c.initial_beta, 1e-6) / (1 - c.initial_beta))
        self.b_gates[size + half :] = torch.linspace(0.0, SLOWEST, size - half)
        self.w_candidate[0, :half] = signs / c.initial_reach
        self.readout[:half] = -signs * c.initial_lr * c.initial_reach / (half * (1 - c.initial_beta))

    def _step(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: GRUState
    ) -> tuple[dict[str, Tensor], GRUState]:
        moments = nominal.update_moments(self.config, state.exp_avg, state.exp_avg_sq, grad)
        network = partial(self._network, self._weights(meta_params))
        rows = networks.coordinatewise(network, grad.unsqueeze(0), state.hidden)
        readouts, hidden = rows[: -self.config.hidden_size], rows[-self.config.hidden_size :]
        return nominal.stabilized_terms(self.config, readouts, grad, *moments), GRUState(hidden, *moments)

    def _weights(self, meta_params: Mapping[str, Tensor]) -> _Weights:
        readouts, biases = [meta_params["readout"]], [meta_params["readout_bias"]]
        if self.config.nominal_controller:
            readouts, biases = [*readouts, meta_params["controller"]], [*biases, torch.zeros_like(biases[0])]
        columns = (meta_params[name].unsqueeze(1) for name in ("b_gates", "b_candidate", "initial"))
        b_gates, b_candidate, initial = columns
        # Twice the candidate's weights: tanh(x) = 2 sigmoid(2 x) - 1, and torch's tanh takes six times as long.
        candidate = 2 * meta_params["w_candidate"].mT, 2 * b_candidate
        readout = torch.stack(readouts), torch.stack(biases)
        return _Weights(meta_params["w_gates"].mT, b_gates, *candidate, initial, *readout)

    def _network(self, weights: _Weights, grad: Tensor, offset: Tensor) -> Tensor:
        """Gradient (1, n) and state (h, n) -> readouts, then the new state below them."""
        inputs = scale_input(self.config.input_scale * grad, self.config.input_scaling)
        hidden = weights.initial + offset
        gates = torch.addmm(weights.b_gates, weights.gates, torch.cat([inputs, hidden])).sigmoid()
        reset, keep = gates.chunk(2)
        chosen = torch.cat([inputs, reset * hidden])
        candidate = 2 * torch.addmm(weights.b_candidate, weights.candidate, chosen).sigmoid() - 1
        hidden = candidate + keep * (hidden - candidate)
        return torch.cat([torch.addmm(weights.b_readouts, weights.readouts, hidden), hidden - weights.initial])


def scale_input(grad: Tensor, form: str) -> Tensor:
    """Features of a gradient (1, n): itself, its asinh, or for "log1p" its logarithmic size and its sign, (2, n)."""
    if form == "raw":
        return grad
    return grad.asinh() if form == "asinh" else torch.cat([grad.abs().log1p(), grad.sign()])


register("gru", GRURule)
