"""Steps from normalized histories of gradients: MNG, k Timesteps and k Momentums.

    x' = x_ref - step(H_g / ||H_g||_inf) (max H_x - min H_x + eta_min)                (algorithms 1 and 2, eqs. 3.1-3.5)

for each coordinate. H_x and H_g hold the parameter and its gradient at the last k timesteps, or their averages at k
timescales; before the first step they are filled with the first values. `step` is the mean of the normalized gradients
(MNG) or the output of a small network, both in [-1, 1]. The range of H_x is the step size: it grows while gradients
agree and shrinks where they alternate, and eta_min keeps it from staying at 0.

Source: Shahid 2017, "Learning to Optimize Deep Neural Networks" (master thesis, University of Freiburg), chapter 3.
Where the text is silent, this follows its released code: parameter inputs are divided by their largest magnitude and
come before the gradients. Deviations:

* the sign: text and code subtract in the algorithms and add in eqs. 3.3 to 3.5. Table 3.1 has positive steps for
  positive gradients, so this subtracts;
* k Momentums starts from x and g of the first step, as algorithm 2 fills H; one version of the code starts from 0,
  which makes the first ranges as large as the parameters;
* Adam-like normalization divides averages of gradients by the root of averages of squared gradients, as in the text;
  the code squares the averages. For timesteps, which the text leaves open, it is the root of the window's mean square;
* dividing by 0 gives 0 everywhere; in the code only for the largest magnitude;
* the text proposes a decay of eta_min without giving one; see `HistoryConfig.eta_min_schedule`.

symbol      | here               | symbol    | here
H_x         | History.params     | eta_min   | eta_min
H_grad L    | History.grads      | x_ref     | reference
m           | timescales         | delta x   | the output of `step_map`
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.rules import features as feats
from lightning_lopt.rules import networks
from lightning_lopt.rules.base import RuleConfig, StepContext, UpdateRule, register
from lightning_lopt.rules.constants import constant

STEPS = ("mean", "softmax", "tanh")
NORMALIZATIONS = ("max", "adam")
REFERENCES = ("mid-range", "current")
SCHEDULES = ("constant", "exponential", "cosine")
NUM_MAGNITUDES = 10  # step sizes of the softmax, evenly from 0 to 1; the signs -1 and 1 come after them
INIT_STD = 0.01


class History(NamedTuple):
    """History of one tensor. Timesteps are in a ring buffer: step t is in slot t % k."""

    params: Tensor  # (k, *shape) the parameter at the last k steps, or its averages at k timescales
    grads: Tensor  # (k, *shape) the same for the gradient
    squares: Tensor  # (k, *shape) averages of the squared gradient if used for normalization; else (0, *shape)
    seen: Tensor  # () int64 steps so far


@dataclasses.dataclass(frozen=True)
class HistoryConfig(RuleConfig):
    """Configuration of `NormalizedHistory`. The defaults are those of k Timesteps."""

    k: int = 5
    """Number of timesteps; with timescales their number, or 0 to count them."""
    timescales: tuple[float, ...] = ()
    """Decays of the averages that replace timesteps; empty for timesteps."""
    step: str = "softmax"
    """"mean" of the normalized gradients; or a network's output, "softmax" over magnitudes and signs, or "tanh"."""
    sign_only: bool = False
    """Use only the signs of the gradients in the history."""
    normalization: str = "max"
    """Divide gradients by the largest magnitude in the history ("max") or by the root of their mean square ("adam")."""
    parameter_inputs: bool = False
    """The network also reads the history of the parameter, divided by its largest magnitude."""
    reference: str = "mid-range"
    """Where the step starts: the "mid-range" of the parameters in the history, or the "current" parameter, from which
    the mean of timesteps diverges even on a sum of squares."""
    eta_min: float = 1e-3
    """Added to the range of the parameters in the history. Tune it; a larger k needs a larger one."""
    eta_min_schedule: str = "constant"
    """"constant"; "exponential", halved every `eta_min_half_life` steps; or "cosine", to 0 at the end of the run, which
    is constant in a run of unknown length."""
    eta_min_half_life: float = 1000.0
    """Steps after which an exponential eta_min has halved."""
    hidden_size: int = 50
    """Units of the network's hidden layer."""

    def __post_init__(self) -> None:
        self.check(isinstance(self.timescales, tuple), "timescales", "a sequence of numbers")
        if self.timescales:
            self.check_numbers("timescales", len(self.timescales), 0.0, math.nextafter(1.0, 0.0))
            if self.k == 0:
                object.__setattr__(self, "k", len(self.timescales))
            self.check(self.k == len(self.timescales), "k", f"0 or {len(self.timescales)}, the number of timescales")
        self.check_integer("k", 1, 1000)
        choices = {"step": STEPS, "normalization": NORMALIZATIONS, "reference": REFERENCES}
        for name, allowed in {**choices, "eta_min_schedule": SCHEDULES}.items():
            self.check(getattr(self, name) in allowed, name, f"one of {list(allowed)}")
        self.check_flags("sign_only", "parameter_inputs")
        self.check(not (self.sign_only and self.normalization != "max"), "sign_only", 'false with normalization="adam"')
        unread = self.parameter_inputs and self.step == "mean"
        self.check(not unread, "parameter_inputs", "false without a network to read them")
        self.check_number("eta_min", 0.0)
        self.check_number("eta_min_half_life", 1e-3)
        self.check_integer("hidden_size", 1, 1024)


class NormalizedHistory(UpdateRule):
    """Kinds `mng`, `k_timesteps` and `k_momentums`: configurations of one rule.

    Meta-parameters: none for `mng`; else `w0 (inputs, 50), b0, w1 (50, outputs), b1`, with k inputs, 2 k with parameter
    inputs, and 12 outputs, 1 with "tanh". Rows of `w0` are for the oldest timestep first, as the columns of table 3.1,
    or for the timescales in their order. State: 8 k bytes per float32 parameter (40 for `mng` and `k_timesteps` with k
    = 5, 48 for `k_momentums` with k = 6), 12 k for momentums with Adam-like normalization, and 8 bytes per tensor.

    The learning rate of `RuleOptimizer` multiplies the whole way to x', including that to the mid-range.

    Example:
        >>> import torch
        >>> from lightning_lopt.rules import StepContext, make
        >>> rule, param = make("mng", k=3, eta_min=0.5), torch.ones(2)
        >>> delta, state = rule.update(
        ...     {}, torch.tensor([4.0, -0.1]), rule.init_state(param), param, StepContext(torch.tensor(0.0))
        ... )
        >>> delta
        tensor([-0.5000,  0.5000])
        >>> make("mng", k=4).step_map(torch.tensor([[1.0, 1.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]]))
        tensor([0.3750, 0.0000])
    """

    Config = HistoryConfig
    config: HistoryConfig
    takes_shards = True

    def __init__(self, config: HistoryConfig | None = None, *, kind: str = "k_timesteps") -> None:
        super().__init__(config, kind=kind)
        c = self.config
        if c.step != "mean":
            sizes = [c.k * (1 + c.parameter_inputs), c.hidden_size, NUM_MAGNITUDES + 2 if c.step == "softmax" else 1]
            for name, value in networks.init_mlp(sizes, INIT_STD).items():
                self.register_parameter(name, value)

    def init_state(self, param: Tensor) -> History:
        """An empty history, which the first step fills."""
        with_squares = bool(self.config.timescales) and self.config.normalization == "adam"
        empty = param.new_zeros((self.config.k, *param.shape))
        squares = param.new_zeros((self.config.k if with_squares else 0, *param.shape))
        return History(empty, empty.clone(), squares, torch.zeros((), dtype=torch.int64, device=param.device))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: History, param: Tensor, context: StepContext
    ) -> tuple[Tensor, History]:
        """One step: update the history, normalize it, compute the step."""
        meta_params, written = self._in_order(meta_params, state.seen), self._written(state.seen, param.dtype)
        move = partial(self._move, meta_params, self._eta_min(context, param.dtype), written)
        channels = (*state[:3], grad.unsqueeze(0), param.unsqueeze(0))
        delta, params, grads, squares = networks.coordinatewise(move, *channels)
        return delta[0], History(params, grads, squares, state.seen + 1)

    @torch.no_grad()
    def step_map(self, grads: Tensor, params: Tensor | None = None, squares: Tensor | None = None) -> Tensor:
        """The steps delta x for histories: table 3.1.

        Args:
            grads: (..., k) gradients, oldest first, or their averages in the order of the timescales; of any scale.
            params: (..., k) parameters, for a rule with parameter inputs; 0 if not given.
            squares: (..., k) averages of squared gradients, which Adam-like normalization of momentums needs.

        Returns:
            (...) numbers in [-1, 1], to be multiplied by the range and subtracted.

        Raises:
            ValueError: for histories of another length, and for missing squares.
        """
        c = self.config
        if squares is None and c.timescales and c.normalization == "adam":
            raise ValueError('normalization="adam" of momentums needs the averages of squared gradients: pass squares.')
        given = {"grads": grads, "params": params, "squares": squares}
        columns = {name: torch.zeros_like(grads) if value is None else value for name, value in given.items()}
        for name, value in columns.items():
            if value.shape[-1:] != (c.k,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}; it must have {c.k} columns, as this rule.")
        rows = (columns[name].movedim(-1, 0) for name in ("params", "grads", "squares"))
        meta_params = {name: value.to(grads.dtype) for name, value in self.meta_params().items()}
        return networks.coordinatewise(partial(self._step, meta_params), *rows)[0]

    def _written(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """(k, 1) where the history takes new values: the rates of the averages, or the slots (bool); all at first."""
        first, timescales = (seen == 0).unsqueeze(0), self.config.timescales
        if not timescales:
            return (first | (torch.arange(self.config.k, device=seen.device) == seen % self.config.k)).unsqueeze(1)
        # 1 - m in double precision: in float32, that of m = .9999 would be off by 2e-4.
        rates = constant(tuple(1 - m for m in timescales), dtype, seen.device)
        return torch.where(first, 1.0, rates).unsqueeze(1)

    def _in_order(self, meta_params: Mapping[str, Tensor], seen: Tensor) -> Mapping[str, Tensor]:
        """The meta-parameters, with the first layer's rows in the order of the ring buffer."""
        c = self.config
        if c.timescales or "w0" not in meta_params:
            return meta_params
        rows = (torch.arange(c.k, device=seen.device) - seen - 1) % c.k
        rows = torch.cat([rows, rows + c.k]) if c.parameter_inputs else rows
        return {**meta_params, "w0": meta_params["w0"][rows]}

    def _move(
        self,
        meta_params: Mapping[str, Tensor],
        eta_min: Tensor | float,
        written: Tensor,
        params: Tensor,
        grads: Tensor,
        squares: Tensor,
        grad: Tensor,
        param: Tensor,
    ) -> tuple[Tensor, ...]:
        """(k, n) histories, (1, n) gradients and parameters -> (1, n) the way to x', and the new histories."""
        if written.dtype == torch.bool:
            params, grads = torch.where(written, param, params), torch.where(written, grad, grads)
        else:
            grad = feats.bounded(grad)
            params, grads = torch.lerp(params, param, written), torch.lerp(grads, grad, written)
            squares = torch.lerp(squares, grad * grad, written) if len(squares) else squares
        high, low = params.amax(0), params.amin(0)
        delta = -self._step(meta_params, params, grads, squares) * (high - low + eta_min)
        if self.config.reference == "mid-range":
            delta = delta + 0.5 * (high - param) + 0.5 * (low - param)
        return delta, params, grads, squares

    def _step(self, meta_params: Mapping[str, Tensor], params: Tensor, grads: Tensor, squares: Tensor) -> Tensor:
        """(k, n) histories -> (1, n) delta x."""
        c = self.config
        if c.sign_only:
            inputs = grads.sign()
        elif c.normalization == "adam" and c.timescales:
            inputs = _divided(grads, feats.root(squares))
        else:
            inputs = _by_largest(grads)
            if c.normalization == "adam":  # numbers up to 1, whose squares neither overflow nor vanish
                inputs = _divided(inputs, feats.root(inputs.square().mean(0)))
        if c.step == "mean":
            return inputs.mean(0, keepdim=True)
        inputs = torch.cat([_by_largest(params), inputs]) if c.parameter_inputs else inputs
        return _read(networks.mlp(meta_params, inputs), softmax=c.step == "softmax")

    def _eta_min(self, context: StepContext, dtype: torch.dtype) -> Tensor | float:
        c, step = self.config, context.step.to(dtype)
        if c.eta_min_schedule == "exponential":
            return c.eta_min * torch.exp2(-step / c.eta_min_half_life)
        if c.eta_min_schedule == "cosine" and context.num_steps is not None:
            return c.eta_min * 0.5 * (1 + torch.cos(math.pi * (step / context.num_steps).clamp(max=1)))
        return c.eta_min


def _read(outputs: Tensor, *, softmax: bool) -> Tensor:
    """Section 3.3's readout: (outputs, n) -> (1, n), the product of the expected magnitude and the expected sign."""
    if not softmax:
        return torch.tanh(outputs)
    levels = torch.linspace(0, 1, NUM_MAGNITUDES, dtype=outputs.dtype, device=outputs.device)
    magnitude = levels @ torch.softmax(outputs[:NUM_MAGNITUDES], 0)
    sign = torch.tanh((outputs[-1] - outputs[-2]) / 2)  # the expectation of -1 and 1 under a softmax of two
    return (magnitude * sign).unsqueeze(0)


def _by_largest(history: Tensor) -> Tensor:
    """Divide by the largest magnitude in the history; a history of zeros stays."""
    return _divided(history, history.abs().amax(0))


def _divided(history: Tensor, norm: Tensor) -> Tensor:
    return history / torch.where(norm == 0, 1.0, norm)


K_MOMENTUMS_TIMESCALES = (0.2, 0.358, 0.516, 0.674, 0.832, 0.99)  # section 3.5.2: evenly spaced, k = 6

register("mng", NormalizedHistory, step="mean")
register("k_timesteps", NormalizedHistory)
register("k_momentums", NormalizedHistory, k=0, timescales=K_MOMENTUMS_TIMESCALES, reference="current")
