"""VeLO: "versatile learned optimizer". Metz et al. 2022 (arXiv 2211.09760).

An LSTM sees 30 numbers of each tensor and of the run. From its state come 256 controls and a step factor per tensor.
The controls mix a bank of 256 small networks (159 numbers each) into the tensor's own, which reads 30 features of each
coordinate and gives a direction d and a magnitude m:

    W       = 100 mean_k(control_k W_k)                                         (the tensor's network)
    delta   = -step_mult factor d exp(exp_mult m) (mean p^2 + 1e-9)^1/2

The loss enters only by averages, which are the run's state. `velo_lstm` has them and the LSTM, `velo_mlp` the networks
of coordinates; accumulators and most features are those of `features`. Gradients are first clamped to [-1000, 1000].
There is no learning rate.

This follows the authors' code. Its parts around the network (their `prefab.LearnedOptimizer`) are here, too: the run's
length must be known; runs longer than 150,000 steps average gradients and losses over n = ceil(length / 150,000) steps
and move once in n; weight decay is L2, in the gradient and in the loss. Deviations, each with its reason:

* of equal dims, over which second moments are factored, the later one in the authors' order counts as larger, see
  `features.factored_dims`. Numpy's unstable sort, which the authors use, gives several answers;
* the LSTM's maximum runs over all tensors, and in JAX all have gradients. Here one that has moved before and has no
  gradient now still takes part, by its last state: the others' steps do not jump when it freezes. The L2 term of the
  loss still has it, too;
* a loss that is not finite is left out of the averages;
* the authors' code computes a third layer beside `mix` and `input`, and throws it away. It is not stored.

Each step reads means over whole tensors. On several processes (DDP) all must be given the mean of their losses, which
`LearnedOptimizer` does.

symbol here     | in the authors' code
mix, input      | linear_1, linear_2
gates           | rnn/linear
controls, step  | rnn_to_controls, step_size
w0 ... b2       | ff_mod_stack/~/w0__0 ... w0__13, w1, w2, b0, b1, b2
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lopt.rules import features as feats
from lightning_lopt.rules import velo_lstm as parts
from lightning_lopt.rules import velo_mlp as mlp
from lightning_lopt.rules import velo_theta
from lightning_lopt.rules.base import RuleConfig, StepContext, UpdateRule, register
from lightning_lopt.rules.constants import constant
from lightning_lopt.rules.shards import TensorShard, whole, whole_shape

MAX_GRAD = 1000.0


@dataclasses.dataclass(frozen=True)
class VeLOConfig(RuleConfig):
    """Configuration of `VeLO`. The defaults are those of the published default weights."""

    lstm_hidden_size: int = 512
    """Units of the LSTM."""
    param_inits: int = 256
    """Networks in the bank."""
    step_mult: float = 1e-3
    """Multiplier of the step."""
    exp_mult: float = 1e-3
    """Multiplier of the magnitude."""
    ff_mult: float = 100.0
    """Multiplier of the mixed network. Celo's small VeLO has 1."""
    clip_param_scale_amount: float | None = None
    """a: a tensor's scale is at most a sqrt(number of its coordinates); None for no such limit."""
    bugged_loss_features: bool = False
    """All averages of the loss have the half-life 10, as old checkpoints were trained."""
    bugged_lstm_state: bool = False
    """The LSTM starts anew at each step, as six old checkpoints were trained."""
    max_training_steps: int = 150_000
    """Longer runs average gradients and losses over several steps; 0 for never, which saves 4 bytes per parameter."""
    weight_decay: float = 0.0
    """L2: added to the gradient, times the parameter, and to the loss, times its square. The authors suggest 1e-6."""
    decoupled_weight_decay: bool = False
    """Subtract weight_decay times the parameter at each update instead, with no other effect."""
    layout: str = "torch"
    """How dims are read: as torch's (out, in, *spatial), or as "jax", the authors' (*spatial, in, out)."""

    def __post_init__(self) -> None:
        self.check_integer("lstm_hidden_size", 1, 4096)
        self.check_integer("param_inits", 1, 4096)
        for name in ("step_mult", "exp_mult", "ff_mult", "weight_decay"):
            self.check_number(name, 0.0)
        if self.clip_param_scale_amount is not None:
            self.check_number("clip_param_scale_amount", 0.0)
        self.check_flags("bugged_loss_features", "bugged_lstm_state", "decoupled_weight_decay")
        self.check_integer("max_training_steps", 0, 2**62)
        self.check(self.layout in list(feats.LAYOUTS), "layout", f"one of {list(feats.LAYOUTS)}")


class VeLOState(NamedTuple):
    """State of one tensor; the first six fields are those of `features.Accumulators`."""

    exp_avg: Tensor  # (3, *shape)
    exp_avg_sq: Tensor  # (*shape)
    row: Tensor  # (3, *shape without dim d0)
    col: Tensor  # (3, *shape without dim d1)
    diag: Tensor  # (3, *shape) below two dims
    factored_dims: Tensor  # (2,) the dims (d1, d0), or (0,); for readers of saved states
    hidden: Tensor  # (h,) of the LSTM, minus its learned start
    cell: Tensor  # (h,) of the LSTM, minus its learned start
    grad_sum: Tensor  # (*shape) gradients since the last update of a long run; (0,) without max_training_steps


class VeLORunState(NamedTuple):
    """State of the run: `velo_lstm.LossBuffer`, then counters."""

    seen: Tensor  # () int64
    means: Tensor  # (10,)
    lows: Tensor  # (10,)
    steps: Tensor  # () int64 optimizer steps, this one included
    loss_sum: Tensor  # () finite losses since the last update of a long run
    loss_count: Tensor  # () int64 their number


class Pace(NamedTuple):
    """How a step stands to the updates of a run; without accumulation each step is an update."""

    num_updates: Tensor  # () in the whole run
    before: Tensor  # () before this step
    every: Tensor | int  # steps per update
    due: Tensor | bool  # () whether this step is one


class VeLO(UpdateRule):
    """VeLO.

    Meta-parameters: `velo_lstm.lstm_shapes`, `controls_w (h, n), controls_b (n,)`, `step_w (h,), step_b ()`, and the
    bank of n networks `w0 (n, 30, 4), b0 (n, 4), w1 (n, 4, 4), b1 (n, 4), w2 (n, 4, 3), b2 (n, 3)`; 2,304,513 numbers
    by default. State: 20 bytes per parameter (16 with max_training_steps=0), 4 KiB per tensor, and what `features`
    keeps for rows and columns.

    The LSTM's part of a step is `shared_context`, which leaves its new state in the tensors'. A call of `update` alone
    reads the state that it finds there.

    Example:
        >>> import torch, lightning_lopt as lopt
        >>> rule = lopt.rules.make("velo", lstm_hidden_size=8, param_inits=4)
        >>> param = torch.nn.Parameter(torch.ones(3, 2))
        >>> optimizer = lopt.RuleOptimizer([param], rule, num_steps=100)
        >>> loss = (param**2).sum()
        >>> loss.backward()
        >>> optimizer.step(loss=loss)
        >>> optimizer.state[param]["hidden"].shape, optimizer.state[param]["run_means"].shape
        (torch.Size([8]), torch.Size([10]))
    """

    Config = VeLOConfig
    config: VeLOConfig
    needs_loss = True
    needs_shared_context = True
    needs_run_state = True
    needs_num_steps = True
    takes_shards = True
    whole_state = frozenset({"row", "col", "hidden", "cell"})

    def __init__(self, config: VeLOConfig | None = None, *, kind: str = "velo") -> None:
        super().__init__(config, kind=kind)
        for name, shape in self._shapes().items():
            value = torch.zeros(shape)
            if name.endswith("_w") or name[0] == "w":  # as haiku initializes layers; the rest starts at 0
                std = 1 / math.sqrt(shape[-2] if len(shape) > 1 else shape[0])
                nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std)
            self.register_parameter(name, nn.Parameter(value))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        size, bank = self.config.lstm_hidden_size, self.config.param_inits
        of_heads = {"controls_w": (size, bank), "controls_b": (bank,), "step_w": (size,), "step_b": ()}
        of_bank = {name: (bank, *shape) for name, shape in mlp.SHAPES.items()}
        return {**parts.lstm_shapes(size), **of_heads, **of_bank}

    # --- state

    def init_state(self, param: Tensor) -> VeLOState:
        """Zeros: the LSTM's state is stored as the distance from its learned start."""
        c, units = self.config, param.new_zeros(self.config.lstm_hidden_size)
        return VeLOState(
            *feats.init_accumulators(param, c.layout),
            hidden=units,
            cell=units.clone(),
            grad_sum=param.new_zeros(param.shape if c.max_training_steps else (0,)),
        )

    def init_run_state(self, like: Tensor) -> VeLORunState:
        """An empty loss buffer."""
        zero = like.new_zeros((), dtype=torch.int64)
        return VeLORunState(*parts.new_loss_buffer(like), zero, like.new_zeros(()), zero.clone())

    def update_run_state(
        self, meta_params: Mapping[str, Tensor], run: VeLORunState, params: Mapping[str, Tensor], context: StepContext
    ) -> VeLORunState:
        """Count the step, and add its loss to the averages: at each update, the mean since the last one."""
        if context.loss is None:
            raise ValueError(f"Rule {self.kind!r} reads the training loss, and the step's context has none. Pass it.")
        loss = context.loss.to(run.means.dtype)
        run = run._replace(steps=run.steps + 1)
        pace = self._pace(context._replace(run=run))
        if self.config.weight_decay and not self.config.decoupled_weight_decay:
            tensors = [*params.values(), *(tensor.param for tensor in context.waiting)]
            squares = whole(torch.stack([tensor.square().sum().to(loss) for tensor in tensors])).sum()
            loss = loss + self.config.weight_decay * squares
        finite = loss.isfinite()
        total, count = run.loss_sum + torch.where(finite, loss, 0.0), run.loss_count + finite
        old, decays = parts.LossBuffer(*run[:3]), self._loss_decays(pace, loss.dtype)
        # No finite loss at all: the mean is 0 / 0, which `add_loss` leaves out.
        added = parts.add_loss(old, total / count, decays)
        seen, averages, lows = (_where(pace.due, a, b) for a, b in zip(added, old, strict=True))
        total, count = (_where(pace.due, torch.zeros_like(x), x) for x in (total, count))
        return VeLORunState(seen, averages, lows, run.steps, total, count)

    def _pace(self, context: StepContext) -> Pace:
        """Raises a ValueError if the length of the run is unknown."""
        steps, limit, length = context.run.steps, self.config.max_training_steps, context.num_steps
        if length is None:
            raise ValueError(
                f"Rule {self.kind!r} must know the length of the run: num_steps is None. Pass the number of steps."
            )
        every: Tensor | int = 1
        if isinstance(length, Tensor):
            length = length.to(steps.device, torch.int64)
            every = ((length - 1) // limit + 1).clamp(min=1) if limit else 1
        else:
            every = (length - 1) // limit + 1 if limit else 1
            length = constant(length, torch.int64, steps.device)
        due = True if isinstance(every, int) and every == 1 else steps % every == 0
        return Pace(length // every, (steps - 1) // every, every, due)

    def _loss_decays(self, pace: Pace, dtype: torch.dtype) -> Tensor:
        length = pace.num_updates.to(dtype)
        return parts.loss_decays(torch.full_like(length, 10.0) if self.config.bugged_loss_features else length)

    # --- the step

    def lstm_inputs(self, params: Iterable[Tensor], states: Iterable[VeLOState], context: StepContext) -> Tensor:
        """What the LSTM sees: (T, 30), in the authors' order, which is that of the inputs' names.

        Args:
            params: values of T tensors.
            states: of these tensors, before the step.
            context: with the run's state after `update_run_state`.
        """
        run = context.run
        like, pace = run.means, self._pace(context)
        stage = parts.stage_features(pace.before.to(like.dtype) / pace.num_updates.to(like.dtype))
        of_loss = parts.loss_features(parts.LossBuffer(*run[:3]), self._loss_decays(pace, like.dtype))
        of_run = torch.cat([stage, of_loss])
        tensors = [(p, s.exp_avg, s.exp_avg_sq) for p, s in zip(params, states, strict=True)]
        return torch.cat([of_run.expand(len(tensors), -1), parts.tensor_features(tensors, like)], dim=1)

    def shared_context(
        self,
        meta_params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        states: Mapping[str, VeLOState],
        params: Mapping[str, Tensor],
        context: StepContext,
        *,
        in_place: bool = False,
    ) -> tuple[None, dict[str, VeLOState]]:
        """Advance the LSTM of all tensors, whose new state `update` reads. Gradients do not enter."""
        values = [*(params[key] for key in states), *(tensor.param for tensor in context.waiting)]
        everyone = self.lstm_inputs(values, [*states.values(), *(w.state for w in context.waiting)], context)
        inputs, others = everyone[: len(states)], everyone[len(states) :]
        starts = meta_params["initial_hidden"], meta_params["initial_cell"]
        old = [
            torch.stack([whole(state[place]).to(inputs) for state in states.values()]) + start
            for place, start in zip((-3, -2), starts, strict=True)
        ]
        new = parts.lstm(meta_params, inputs, old[0], old[1], others)
        due = self._pace(context).due
        kept = (_where(due, a, b) - start for a, b, start in zip(new, old, starts, strict=True))
        moved = {}
        for (key, state), hidden, cell in zip(states.items(), *(rows.unbind() for rows in kept), strict=True):
            moved[key] = state._replace(hidden=hidden.to(params[key]), cell=cell.to(params[key]))
        return None, moved

    def heads(self, meta_params: Mapping[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The controls (n,) and the step factor () of a tensor, from the LSTM's state (h,) as it is stored."""
        units = hidden + meta_params["initial_hidden"]
        controls = units @ meta_params["controls_w"] + meta_params["controls_b"]
        return controls, units @ meta_params["step_w"] + meta_params["step_b"]

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: VeLOState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, VeLOState]:
        """One step of one tensor: accumulators first, then the features from them, then the tensor's network."""
        terms, state = self._step(meta_params, grad, state, param, context)
        return sum(terms.values(), torch.zeros_like(param)), state

    def terms(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: VeLOState, param: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        """The step's `blackbox` and, if weight decay is decoupled, `decay` term."""
        return self._step(meta_params, grad, state, param, context)[0]

    def _step(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: VeLOState, param: Tensor, context: StepContext
    ) -> tuple[dict[str, Tensor], VeLOState]:
        pace = None if context.run is None else self._pace(context)
        if pace is None or pace.due is True:
            terms, new = self._update(meta_params, grad, state, param, context.shard)
        else:
            grad_sum = state.grad_sum + grad
            terms, new = self._update(meta_params, grad_sum / pace.every, state, param, context.shard)
            terms = {name: _where(pace.due, term, torch.zeros_like(term)) for name, term in terms.items()}
            fields = (a if a is b else _where(pace.due, a, b) for a, b in zip(new, state, strict=True))
            new = VeLOState(*fields)._replace(grad_sum=_where(pace.due, torch.zeros_like(grad_sum), grad_sum))
        if self.config.bugged_lstm_state:
            new = new._replace(hidden=torch.zeros_like(new.hidden), cell=torch.zeros_like(new.cell))
        return terms, new

    def _update(
        self,
        meta_params: Mapping[str, Tensor],
        grad: Tensor,
        state: VeLOState,
        param: Tensor,
        shard: TensorShard | None,
    ) -> tuple[dict[str, Tensor], VeLOState]:
        c, terms = self.config, {}
        if c.weight_decay and c.decoupled_weight_decay:
            terms["decay"] = -c.weight_decay * param
        elif c.weight_decay:
            grad = grad + c.weight_decay * param
        grad = grad.clamp(-MAX_GRAD, MAX_GRAD)
        moved = feats.update_accumulators(feats.Accumulators(*state[:6]), grad, mlp.decays(param), shard, c.layout)
        features = mlp.input_features(moved, grad, param, shard, c.layout)
        mean_squares = mlp.mean_squares_of(features, shard)
        controls, factor = self.heads(meta_params, state.hidden)
        network = mlp.mixed_network(meta_params, controls, c.ff_mult)
        direction, magnitude, _ = mlp.outputs(network, features, mean_squares, shard)
        scale = (mean_squares[0][1] + 1e-9).sqrt()  # of the second dense channel, which is the parameter
        if c.clip_param_scale_amount is not None:
            scale = scale.clamp(max=c.clip_param_scale_amount * math.sqrt(math.prod(whole_shape(shard, param))))
        step = c.step_mult * factor * scale * (direction * torch.exp(c.exp_mult * magnitude))
        terms["blackbox"] = -step
        return terms, VeLOState(*moved, *state[6:])

    @classmethod
    def from_jax(cls, theta: Mapping[str, Any], **arguments: Any) -> VeLO:
        """A rule from the authors' meta-parameters.

        Args:
            theta: path -> array, with the names of `velo_theta.NAMES` and `velo_theta.BLOCKS`, or in the form of
                `velo_theta.path`. The arrays' dtype is kept; sizes are those of the arrays.
            arguments: of `VeLOConfig`; the names of the authors' constructor are taken, too. Beware of its default
                use_bugged_loss_features=True, which its published default weights do not use.

        Raises:
            ValueError: for missing, unknown or wrongly shaped arrays, and unknown arguments.

        Example:
            >>> import lightning_lopt as lopt
            >>> lopt.rules.VeLO.from_jax(lopt.hub.read_theta("theta.state"), weight_decay=1e-6)  # doctest: +SKIP
        """
        tensors = {velo_theta.path(name): velo_theta.as_tensor(name, value) for name, value in theta.items()}
        own = {velo_theta.ARGUMENTS.get(name, name): value for name, value in arguments.items()}
        config = VeLOConfig.from_dict({**velo_theta.sizes(tensors), **own})
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # shapes without memory or random numbers
            rule = cls(config, kind="velo")
        rule.load_state_dict(velo_theta.converted(tensors, rule.meta_params()), assign=True)
        return rule


def _where(condition: Tensor | bool, new: Tensor, old: Tensor) -> Tensor:
    if isinstance(condition, bool):
        return new if condition else old
    return torch.where(condition, new, old)


register("velo", VeLO)
