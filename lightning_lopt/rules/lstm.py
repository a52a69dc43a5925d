"""Coordinatewise LSTM ("Learning to learn by gradient descent by gradient descent"), optionally with DMD eigenvalues.

    theta' = theta + out_scale readout(h'),     (h', c') = LSTM([preprocess(g), eigenvalues], h, c)

One small network is shared by all coordinates, each of which has its own state. Sources: Andrychowicz et al.
2016 (arXiv 1606.04474), section 2.1 and App. A; Schroeter's thesis (2022, "Machine Learning of Gradient-Based
Optimization Methods", TU Hamburg), section 5; the eigenvalues of Dynamic Mode Decomposition (DMD): Simanek et al. 2022
(L2O-DMD, arXiv 2211.16268), section 4, see `dmd`. STAR's stabilizers (Harrison et al. 2022, arXiv 2209.11208, eqs. 21
and 22; see `nominal`) can be put around the network:

    theta' = theta + factor (out_scale readout(h') / v - beta_1 exp(beta_2 m_g) g_nominal)

with factor 1, or that of the learned scheduler, see `scheduler`.

Where the sources differ or are silent:

* preprocessing (App. A), with p = 10 in the papers and 5 in DeepMind's code: "logsign" has two features,
  (ln|g| / p, sign g) where |g| >= e^-p, else (-1, e^p g). The thesis has one, ln|g| sign(g) / p, else -e^p g
  ("logsign1"), which is not injective beyond |g| = 1. Neither is bounded above. They use "none" for quadratics;
* the readout has no bias (thesis, footnote 4: its gradient dominates the others'); "sum" adds up the units, as there;
* each gate has one bias; torch's LSTMCell has two, of which only the sum matters. Weights are initialized as there; the
  bias of the forget gate is not raised, unlike in Keras and Sonnet;
* L2O-DMD does not say how complex eigenvalues enter, see `dmd.features`. Its snapshots include the loss (loss_scale =
  1), which is off by default because the rule then needs the loss at each step. The loss soon weighs nothing beside
  |theta|, which grows with the number of parameters n: sqrt(n / 6370) keeps the weight that it has in the paper's net;
* with m = 100 snapshots and 100 inner steps, as in the paper, eigenvalues are 0 throughout meta-training: choose a
  smaller m;
* raw snapshots of a net hardly move: eigenvalues are 1 up to 1e-4 to 1e-1. `eigenvalue_scale` spreads them out, and
  increments or shifted snapshots carry more information;
* separate networks for kinds of layers (Andrychowicz et al., section 3.3: for convolutions; thesis 5.4.2: no gain) are
  chosen by a tensor's number of dims, `ndim_splits`, or by its name, `name_splits`;
* the factor of the nominal term is 1 without the nominal controller, and starts at 1 with it. Momenta and v are STAR's
  at its initial decays, which are learned only with the scheduler.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lopt.rules import dmd, networks, nominal, scheduler
from lightning_lopt.rules import features as feats
from lightning_lopt.rules.base import RuleConfig, StepContext, UpdateRule, register
from lightning_lopt.rules.shards import means, whole, whole_shape

PREPROCESSING = {"none": 1, "logsign": 2, "logsign1": 1}  # name -> number of features
READOUTS = ("linear", "sum")
SCOPES = ("global", "tensor")
SCHEDULE = {"momentum_decays": (3,), "rms_decays": (1,), **scheduler.SHAPES}  # meta-parameters of the scheduler


class LSTMState(NamedTuple):
    """State of one tensor."""

    hidden: Tensor  # (layers, units, *shape)
    cell: Tensor  # (layers, units, *shape)
    exp_avg: Tensor  # (3, *shape) momenta; (0, *shape) without STAR's stabilizers
    exp_avg_sq: Tensor  # (*shape) second moment; (0,) without


class LSTMDMDState(NamedTuple):
    """State of one tensor with eigenvalues: that of `LSTMState` and that of `dmd.Window`."""

    hidden: Tensor  # (layers, units, *shape)
    cell: Tensor  # (layers, units, *shape)
    exp_avg: Tensor  # (3, *shape), or (0, *shape)
    exp_avg_sq: Tensor  # (*shape), or (0,)
    snapshots: Tensor  # (k, *shape) or (k, sketch_size)
    last: Tensor  # (*shape) or (0,)
    gram: Tensor  # (2, k, k)
    losses: Tensor  # (m + 1,) or (0,)
    signs: Tensor  # (n,) or (0,)
    seen: Tensor  # ()


class _Weights(NamedTuple):
    """The network of one tensor."""

    layers: list[tuple[Tensor, Tensor]]  # weight (4 h, inputs + h) and bias (4 h, 1), as they multiply columns
    readouts: Tensor  # (1 or 2, h)


@dataclasses.dataclass(frozen=True)
class LSTMConfig(RuleConfig):
    """Configuration of `LSTMRule`. `rank` > 0 adds eigenvalues; the fields after it are read only then."""

    hidden_size: int = 20
    """Units of each layer."""
    num_layers: int = 2
    """LSTM layers."""
    preprocessing: str = "logsign"
    """Of the gradient: "none", "logsign" (two features) or "logsign1" (one)."""
    p: float = 10.0
    """Gradients below e^-p enter linearly."""
    out_scale: float = 0.1
    """Multiplier of the readout."""
    readout: str = "linear"
    """"linear", learned weights without bias, or "sum" of the last layer's units."""
    ndim_splits: tuple[int, ...] = ()
    """Increasing numbers of dims from which tensors have a separate network: (3,) separates convolutions."""
    name_splits: tuple[str, ...] = ()
    """Patterns such as "*.bias": the first that matches a tensor's name selects its network; the last is for others."""
    nominal_stepsize: float = 0.0
    """beta_1, the step size of STAR's nominal term; 0 for none."""
    nominal_grad_estimator: str = "AdamAggMo"
    """The nominal direction: SGD, SGDM, AggMo, Adam or AdamAggMo."""
    nominal_controller: bool = False
    """Let the network scale the nominal term, by a second readout."""
    exp_mult: float = 1e-3
    """beta_2: scale of the controller."""
    normalize_blackbox: bool = False
    """Precondition the network's step by 1 / v. v starts at sqrt(eps): choose `out_scale` accordingly."""
    eps: float = feats.EPS
    """Added to the second moment before its root, for v and the nominal term."""
    scheduler: bool = False
    """Multiply both terms by a learned schedule and a factor per tensor; learn the decays; see `scheduler`."""
    rank: int = 0
    """Number of eigenvalues that the network reads; 0 is the plain LSTM."""
    num_snapshots: int = 100
    """m: eigenvalues are those of the last m + 1 values of the parameters, and 0 until there are as many."""
    snapshots: str = "raw"
    """"raw", "increments", or "shifted" by the oldest value."""
    method: str = "gram"
    """"gram" exact; "sketch" approximate, with little memory; "svd" for reference."""
    scope: str = "global"
    """Eigenvalues of all tensors together, or of each "tensor" alone."""
    sketch_size: int = dmd.SKETCH_SIZE
    """Size of a tensor's snapshot with the method "sketch"."""
    loss_scale: float = 0.0
    """The loss times this is another coordinate of the snapshots (L2O-DMD: 1); 0 leaves it out."""
    eigenvalue_scale: float = 0.0
    """s > 0: the network reads s (eigenvalue - 1) instead of the eigenvalue."""
    memory_limit: int = 4 * 2**30
    """Most bytes that snapshots may take; beyond, the rule refuses to start."""

    def __post_init__(self) -> None:
        self.check_integer("hidden_size", 1, 1024)
        self.check_integer("num_layers", 1, 16)
        self.check_number("p", 1e-2, 80.0)  # e^p is a float32
        for name in ("out_scale", "nominal_stepsize", "loss_scale", "eigenvalue_scale"):
            self.check_number(name, 0.0)
        self.check_number("exp_mult")
        self.check_flags("nominal_controller", "normalize_blackbox", "scheduler")
        self.check_number("eps", 1e-20, 1.0)
        self.check(nominal.stabilized(self) or not self.scheduler, "scheduler", "false without a stabilizer")
        choices = {"preprocessing": PREPROCESSING, "readout": READOUTS, "nominal_grad_estimator": nominal.ESTIMATORS}
        choices |= {"snapshots": dmd.SNAPSHOTS, "method": dmd.METHODS, "scope": SCOPES}
        for name, allowed in choices.items():
            self.check(getattr(self, name) in list(allowed), name, f"one of {list(allowed)}")
        splits = self.ndim_splits
        fits = isinstance(splits, tuple) and all(type(n) is int and n > 0 for n in splits)
        self.check(fits and list(splits) == sorted(set(splits)), "ndim_splits", "rising integers > 0")
        names = self.name_splits
        fits = isinstance(names, tuple) and all(isinstance(name, str) and name for name in names)
        self.check(fits and not (names and splits), "name_splits", "patterns, and only without ndim_splits")
        self.check_integer("num_snapshots", 1, 10_000)
        columns = self.num_snapshots - (self.snapshots == "increments")
        self.check_integer("rank", 0, columns)
        self.check_integer("sketch_size", 1, 2**24)
        self.check_integer("memory_limit", 0, 2**63 - 1)


class LSTMRule(UpdateRule):
    """Kinds `lstm` and `lstm_dmd`: one rule, without and with DMD eigenvalues.

    Meta-parameters of layer i: `w_input{i} (inputs, 4 h)`, `w_hidden{i} (h, 4 h)`, `b{i} (4 h,)`, gates in torch's
    order input, forget, cell, output; `readout (h,)` if linear, `controller (h,)` if the nominal term has one; a
    leading axis of networks if `ndim_splits` or `name_splits`. The inputs of layer 0 are the features of the gradient,
    then those of the eigenvalues. 5,140 numbers by default, 80 more for one eigenvalue; `SCHEDULE` if `scheduler`.

    State: 2 * layers * h floats per parameter, 320 bytes by default, so the rule is for small models; 16 bytes more
    with STAR's stabilizers; with eigenvalues also m + 1 copies of the parameters, 404 bytes by default. If the copies
    exceed `memory_limit`, the rule refuses and names alternatives. Behind `RuleOptimizer` without a safeguard, the
    state is overwritten chunk by chunk. Scope "tensor" copies the snapshots at each step; "global" writes them in
    place.

    Example:
        >>> import torch
        >>> from lightning_lopt.rules import StepContext, make
        >>> rule, param = make("lstm"), torch.ones(3, 2)
        >>> rule.num_meta_params(), make("lstm_dmd").num_meta_params()
        (5140, 5220)
        >>> context = StepContext(torch.tensor(0.0))
        >>> delta, state = rule.update(rule.meta_params(), torch.ones(3, 2), rule.init_state(param), param, context)
        >>> delta.shape, state.hidden.shape
        (torch.Size([3, 2]), torch.Size([2, 20, 3, 2]))
    """

    Config = LSTMConfig
    config: LSTMConfig

    def __init__(self, config: LSTMConfig | None = None, *, kind: str = "lstm") -> None:
        super().__init__(config, kind=kind)
        c = self.config
        self.online = dmd.OnlineDMD(c.rank, c.num_snapshots, c.snapshots, c.method, c.sketch_size, c.loss_scale)
        self.needs_loss = bool(c.rank and c.loss_scale)
        self.needs_shared_context = bool(c.rank) and c.scope == "global"
        self.takes_shards = not c.rank or self.needs_shared_context  # else `update` itself takes inner products
        self.needs_names = bool(c.name_splits)
        axis = (len(c.ndim_splits or c.name_splits) + 1,) if c.ndim_splits or c.name_splits else ()
        bound = c.hidden_size**-0.5
        for name, shape in self._shapes().items():
            value = torch.empty((*axis, *shape)).uniform_(-bound, bound)
            self.register_parameter(name, nn.Parameter(torch.zeros_like(value) if name == "controller" else value))
        for name, shape in SCHEDULE.items() if c.scheduler else ():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def init_state(self, param: Tensor) -> LSTMState | LSTMDMDState:
        """Zeros."""
        c = self.config
        cells = param.new_zeros((c.num_layers, c.hidden_size, *param.shape))
        state = LSTMState(cells, torch.zeros_like(cells), *nominal.init_moments(c, param))
        if not c.rank:
            return state
        self.check_params([param])
        return LSTMDMDState(*state, *self.online.init(param))

    def check_params(self, params: Iterable[Tensor]) -> None:
        """Raise a ValueError if the tensors' snapshots would exceed `memory_limit`."""
        limit, params = self.config.memory_limit, list(params)
        needed = sum(self.online.num_bytes(param) for param in params) if self.config.rank else 0
        if needed > limit:
            sketched = dataclasses.replace(self.online, method="sketch")
            way_out = f"method='sketch' ({sum(map(sketched.num_bytes, params)):,} bytes)"
            raise ValueError(
                f"num_snapshots={self.config.num_snapshots} of {sum(param.numel() for param in params):,} parameters "
                f"take {needed:,} bytes, above memory_limit={limit:,}. Use fewer snapshots, "
                f"{'a smaller sketch_size' if self.config.method == 'sketch' else way_out}, or a higher limit."
            )

    def shared_context(
        self,
        meta_params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        states: Mapping[str, LSTMDMDState],
        params: Mapping[str, Tensor],
        context: StepContext,
        *,
        in_place: bool = False,
    ) -> tuple[Tensor, dict[str, LSTMDMDState]]:
        """For scope "global": the features of the eigenvalues of all tensors together, and windows with this step."""
        windows = [dmd.Window(*state[4:]) for state in states.values()]
        windows = self.online.push(windows, [params[key] for key in states], context.loss, in_place=in_place)
        pushed = {key: LSTMDMDState(*states[key][:4], *w) for key, w in zip(states, windows, strict=True)}
        return dmd.features(self.online.eigenvalues(windows), self.config.eigenvalue_scale), pushed

    def update(
        self,
        meta_params: Mapping[str, Tensor],
        grad: Tensor,
        state: LSTMState | LSTMDMDState,
        param: Tensor,
        context: StepContext,
    ) -> tuple[Tensor, LSTMState | LSTMDMDState]:
        """One step: window, moments, network, then the two terms.

        With scope "global" the eigenvalues come from `shared_context`; without a call of it they count as 0.
        """
        terms, state = self._step(meta_params, grad, state, param, context)
        return sum(terms.values(), torch.zeros_like(param)), state

    def terms(
        self,
        meta_params: Mapping[str, Tensor],
        grad: Tensor,
        state: LSTMState | LSTMDMDState,
        param: Tensor,
        context: StepContext,
    ) -> dict[str, Tensor]:
        """The step's `blackbox` and, if there is one, `nominal` term."""
        return self._step(meta_params, grad, state, param, context)[0]

    @property
    def _num_eigenvalue_features(self) -> int:
        return self.config.rank if self.config.rank < 2 else 2 * self.config.rank

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        c = self.config
        inputs = PREPROCESSING[c.preprocessing] + self._num_eigenvalue_features
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(c.num_layers):
            shapes[f"w_input{layer}"] = (c.hidden_size if layer else inputs, 4 * c.hidden_size)
            shapes[f"w_hidden{layer}"] = (c.hidden_size, 4 * c.hidden_size)
            shapes[f"b{layer}"] = (4 * c.hidden_size,)
        if c.readout == "linear":
            shapes["readout"] = (c.hidden_size,)
        if c.nominal_controller:
            shapes["controller"] = (c.hidden_size,)
        return shapes

    def _step(
        self,
        meta_params: Mapping[str, Tensor],
        grad: Tensor,
        state: LSTMState | LSTMDMDState,
        param: Tensor,
        context: StepContext,
    ) -> tuple[dict[str, Tensor], LSTMState | LSTMDMDState]:
        c, window, shared = self.config, state[4:], context.shared
        if c.rank and c.scope == "tensor":
            (window,) = self.online.push([dmd.Window(*window)], [param], context.loss)
            shared = dmd.features(self.online.eigenvalues([window]), c.eigenvalue_scale)
        learned = meta_params if c.scheduler else None
        moments = nominal.update_moments(c, state.exp_avg, state.exp_avg_sq, grad, learned)
        factor, momenta = self._multipliers(meta_params, moments, param, context)
        size, in_place = c.num_layers * c.hidden_size, context.in_place and not torch.is_grad_enabled()
        in_place = in_place and state.hidden.is_contiguous() and state.cell.is_contiguous()  # else rows are copies
        network = partial(self._network, self._weights(meta_params, grad.dim(), context.name, shared), in_place)
        rows = networks.coordinatewise(network, grad.unsqueeze(0), state.hidden.flatten(0, 1), state.cell.flatten(0, 1))
        if in_place:
            new = LSTMState(state.hidden, state.cell, *moments)
        else:
            layers = (c.num_layers, c.hidden_size, *grad.shape)
            hidden, cell = rows[-2 * size : -size].reshape(layers), rows[-size:].reshape(layers)
            rows, new = rows[: -2 * size], LSTMState(hidden, cell, *moments)
        terms = nominal.stabilized_terms(c, rows, grad, *moments, eps=c.eps, factor=factor, weights=momenta)
        return terms, LSTMDMDState(*new, *window) if c.rank else new

    def _multipliers(
        self, meta_params: Mapping[str, Tensor], moments: tuple[Tensor, Tensor], param: Tensor, context: StepContext
    ) -> tuple[Tensor | float, Tensor | None]:
        """The factor of both terms and the weights of the momenta; without a scheduler 1, and None for equal ones."""
        if not self.config.scheduler:
            return 1.0, None
        shard, every = context.shard, tuple(range(-param.dim(), 0))
        squares = scheduler.scales(param, moments[0], feats.inverse_root(moments[1], self.config.eps))
        asked = [whole(mean) for mean in means(shard, *((square, every) for square in squares))]
        shape = whole_shape(shard, param)
        return scheduler.of_tensor(meta_params, asked, shape, context.step, context.num_steps, context.num_tensors)

    def _weights(
        self, meta_params: Mapping[str, Tensor], ndim: int, name: str | None, shared: Tensor | None
    ) -> _Weights:
        """The network of a tensor with `ndim` dims. Inputs that all coordinates share go into the first bias."""
        c, num_features = self.config, PREPROCESSING[self.config.preprocessing]
        if c.ndim_splits or c.name_splits:
            matching = (i for i, pattern in enumerate(c.name_splits) if fnmatch.fnmatchcase(name or "", pattern))
            by_name = next(matching, len(c.name_splits))
            number = by_name if c.name_splits else sum(ndim >= split for split in c.ndim_splits)
            meta_params = {key: meta_params[key][number] for key in self._shapes()}
        layers = []
        for layer in range(c.num_layers):
            of_input, bias = meta_params[f"w_input{layer}"], meta_params[f"b{layer}"]
            if not layer and shared is not None:
                bias = bias + shared.to(device=bias.device, dtype=bias.dtype) @ of_input[num_features:]
            rows = of_input if layer else of_input[:num_features]
            # Twice the candidate's columns: tanh(x) = 2 sigmoid(2 x) - 1, and torch's tanh takes six times as long.
            twice = torch.cat([torch.full_like(bias[: c.hidden_size], factor) for factor in (1.0, 1.0, 2.0, 1.0)])
            weight = torch.cat([rows, meta_params[f"w_hidden{layer}"]])
            layers.append(((twice * weight).mT, (twice * bias).unsqueeze(1)))
        readouts = [torch.ones_like(bias[: c.hidden_size]) if c.readout == "sum" else meta_params["readout"]]
        readouts += [meta_params["controller"]] if c.nominal_controller else []
        return _Weights(layers, torch.stack(readouts))

    def _network(self, weights: _Weights, in_place: bool, grad: Tensor, hidden: Tensor, cell: Tensor) -> Tensor:
        """Gradient (1, n), hidden and cell (layers * h, n) -> readouts, hidden and cell, one below the other.

        In place, `hidden` and `cell` are overwritten, and only the readouts are returned. Other results overwrite gates
        that are no longer needed, because fresh memory costs as much as the arithmetic.
        """
        size, units = self.config.hidden_size, preprocess(grad, self.config.preprocessing, self.config.p)
        kept, remembered = [], []
        pairs = zip(torch.split(hidden, size), torch.split(cell, size), strict=True)
        for (weight, bias), (old, memory) in zip(weights.layers, pairs, strict=True):
            gates = torch.addmm(bias, weight, torch.cat([units, old])).sigmoid_()
            take, keep, candidate, show = torch.split(gates, size)
            room = (memory, keep, old) if in_place else (None, None, None)
            memory = torch.mul(keep, memory, out=room[0])
            memory = torch.addcmul(memory, take, candidate, value=2, out=room[0]).sub_(take)  # + take * tanh
            shown = torch.mul(memory, 2, out=room[1]).sigmoid_()
            units = torch.addcmul(show, show, shown, value=-2, out=room[2]).neg_()  # show * tanh(memory)
            kept.append(units)
            remembered.append(memory)
        readouts = weights.readouts @ units
        return readouts if in_place else torch.cat([readouts, *kept, *remembered])


def preprocess(grad: Tensor, form: str, p: float) -> Tensor:
    """Features of a gradient (1, n): (1, n), or (2, n) for "logsign"; see the module's docstring.

    Neither branch has an infinite derivative at 0.
    """
    if form == "none":
        return grad
    small, size = math.exp(-p), grad.abs()
    log = size.clamp(min=small).log() / p
    if form == "logsign1":
        return torch.where(size >= small, log * grad.sign(), -grad / small)
    return torch.cat([log, (grad / small).clamp(-1.0, 1.0)])


register("lstm", LSTMRule)
register("lstm_dmd", LSTMRule, rank=1)
