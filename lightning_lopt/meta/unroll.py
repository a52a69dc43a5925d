"""The inner loop as one pure function, over a population of inner runs at once.

One slot of a run is a training step, or, when the run's episode has ended, a reset: a fresh task, fresh parameters and
rule state, which takes the slot and counts no loss. So the authors' truncated step has it (google/learned_optimization,
`lopt_truncated_step.py`), and an episode of H steps therefore takes H + 1 slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from lightning_lopt.meta.fused import Fused, fused
from lightning_lopt.rules import StepContext, UpdateRule
from lightning_lopt.tasks import Task

MetaParams = Mapping[str, Tensor]
OBJECTIVES: dict[str, Callable[[Task, Tensor, Tensor], Tensor]] = {
    # (task, loss, the run's first loss) -> what meta-training averages
    "raw": lambda task, loss, first: loss,
    "clipped": lambda task, loss, first: task.normalize(loss),
    "ratio": lambda task, loss, first: _capped(loss, first) / first,
    "log": lambda task, loss, first: torch.log(_capped(loss, first) / first + 1e-2),
}


class Inner(NamedTuple):
    """P inner runs; every tensor has a leading axis P. The last three are the episode's clockwork, on the CPU."""

    params: dict[str, Tensor]  # name -> (P, *shape)
    constants: Any  # what the task drew at the start, see tasks.base
    states: dict[str, Any]  # name -> the rule's state
    first_loss: Tensor  # (P,) loss before the first update, the scale of relative objectives
    step: Tensor  # (P,) updates since the start: what the rule sees
    clock: Tensor  # (P,) int64 steps of the episode, which a staggered start sets ahead
    horizon: Tensor  # (P,) int64 clock at which the episode ends
    done: Tensor  # (P,) bool: the next slot is a reset


class Record(NamedTuple):
    """What a truncation of K slots saw."""

    losses: Tensor  # (K, P) objective, 0 in a reset slot
    mask: Tensor  # (K, P) bool: a training step, no reset
    done: Tensor  # (K, P) bool: the episode ended with this slot


@dataclasses.dataclass(frozen=True)
class Unroll:
    """A rule on a task, ready to be run.

    Args:
        rule: the update rule.
        task: what it is run on.
        objective: "raw" loss; "clipped" as the task normalizes it; "ratio" to the run's first loss, at most 2; "log" of
            that ratio + 1e-2, which weighs a halving alike early and late.
        second_order: let gradients of the meta-loss flow through the task's gradient.
        tell_horizon: give the rule the episode's length, as a Lightning run of known length would.
        compiled: run steps that need no gradient by compiled code: the rule's kernel where the CPU has one, else
            by `torch.compile`, once per task, which pays after some thousand.
        idle: after the end of an episode wait for the next truncation instead of resetting at once.
        frozen: the meta-parameters that do not learn; those that `run` is given and these are all of the rule's.
    """

    rule: UpdateRule
    task: Task
    objective: str = "clipped"
    second_order: bool = True
    tell_horizon: bool = True
    compiled: bool = False
    idle: bool = False
    frozen: MetaParams = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is not allowed: use one of {list(OBJECTIVES)}.")

    def start(self, generator: torch.Generator, horizon: Tensor, *, sides: int = 1) -> Inner:
        """Fresh runs.

        Args:
            generator: draws tasks and parameters.
            horizon: (N,) int64 lengths of the episodes.
            sides: copies of each, P = sides * N: 2 for antithetic pairs, the second half a copy of the first.
        """
        fresh = self.task.init(generator, population=len(horizon))
        states = {name: vmap(self.rule.init_state)(param) for name, param in fresh.params.items()}
        device = next(iter(fresh.params.values())).device
        first = torch.ones(len(horizon), device=device, dtype=torch.float32)
        step = torch.zeros_like(first)
        clock = torch.zeros_like(horizon)
        inner = Inner(fresh.params, fresh.constants, states, first, step, clock, horizon, clock.bool())
        repeated: Inner = _repeat(inner, sides)
        return repeated

    def run(
        self,
        meta_params: MetaParams,
        inner: Inner,
        length: int,
        generator: torch.Generator,
        draw_horizon: Callable[[int], Tensor],
        *,
        sides: int = 1,
        batched: bool = False,
    ) -> tuple[Inner, Record]:
        """A truncation: `length` slots of every run.

        Args:
            meta_params: the rule's; with a leading axis P if `batched`.
            inner: where the runs stand.
            length: number of slots.
            generator: draws batches and resets, the same for all sides of a run.
            draw_horizon: n -> (n,) int64 lengths for new episodes.
            sides: as in `start`.
            batched: one set of meta-parameters per run.
        """
        records, arguments, move = [], (generator, draw_horizon, sides, batched), None
        if self.compiled and not torch.is_grad_enabled():
            runs = inner.params, inner.states, inner.step
            move = fused(self.rule, meta_params, self.frozen, batched, *runs)
        for _ in range(length):
            inner, record, _ = self._slot(meta_params, inner, *arguments, move)
            records.append(record)
        return inner, Record(*(torch.stack(rows) for rows in zip(*records, strict=True)))

    def slot(
        self,
        meta_params: MetaParams,
        inner: Inner,
        generator: torch.Generator,
        draw_horizon: Callable[[int], Tensor],
        *,
        sides: int = 1,
        batched: bool = False,
    ) -> tuple[Inner, Record, Any]:
        """One slot of every run, arguments as for `run`; also returns the batch that it used."""
        return self._slot(meta_params, inner, generator, draw_horizon, sides, batched, None)

    def _slot(
        self,
        meta_params: MetaParams,
        inner: Inner,
        generator: torch.Generator,
        draw_horizon: Callable[[int], Tensor],
        sides: int,
        batched: bool,
        move: Fused | None,
    ) -> tuple[Inner, Record, Any]:
        population = len(inner.done) // sides
        fresh = None
        if bool(inner.done.any()) and not self.idle:
            fresh = self.start(generator, draw_horizon(population), sides=sides)
        batch = _repeat(self.task.batch(generator, _half(inner.constants, sides), population), sides)
        params, states, num_steps = inner.params, inner.states, self._num_steps(inner)
        if move is not None:
            grads, losses = vmap(self.task.grad_and_value)(params, batch)
            params, states = move(params, states, inner.step, grads, num_steps)
        else:
            meta = dict(meta_params), dict(self.frozen)
            params, states, losses = self._stepper(batched)(*meta, params, states, inner.step, batch, num_steps)
        first = torch.where(inner.step == 0, losses.detach(), inner.first_loss)
        clock = inner.clock + 1
        done = clock >= inner.horizon
        stepped = Inner(params, inner.constants, states, first, inner.step + 1, clock, inner.horizon, done)
        objective, mask = OBJECTIVES[self.objective](self.task, losses, first), ~inner.done
        if not bool(mask.all()):
            stepped = choose(inner.done, inner if fresh is None else fresh, stepped)
            objective = torch.where(mask.to(objective.device), objective, 0.0)
        return stepped, Record(objective, mask, stepped.done & mask), batch

    def loss(self, inner: Inner, batch: Any) -> Tensor:
        """(P,) objective where the runs stand, without an update."""
        losses = vmap(self.task.loss)(inner.params, batch)
        return OBJECTIVES[self.objective](self.task, losses, inner.first_loss)

    def _num_steps(self, inner: Inner) -> Tensor | None:
        return inner.horizon.to(inner.first_loss.device) if self.tell_horizon else None

    def _stepper(self, batched: bool) -> Callable[..., Any]:
        in_dims = (0 if batched else None, None, 0, 0, 0, 0, 0 if self.tell_horizon else None)
        if not self.compiled or torch.is_grad_enabled():
            stepper: Callable[..., Any] = vmap(self._member_step, in_dims=in_dims)
            return stepper
        key = (self, batched)
        if key not in _COMPILED:
            _COMPILED[key] = _compile(vmap(self._member_step, in_dims=in_dims))
        return _COMPILED[key]

    def _member_step(
        self,
        meta_params: dict[str, Tensor],
        frozen: dict[str, Tensor],
        params: dict[str, Tensor],
        states: dict[str, Any],
        step: Tensor,
        batch: Any,
        num_steps: Tensor | None,
    ) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
        """One training step of one run: the loss is that of the parameters before the update."""
        grads, loss = self.task.grad_and_value(params, batch)
        if not self.second_order:
            grads = {name: grad.detach() for name, grad in grads.items()}
        context = StepContext(step, loss.detach(), num_steps, num_tensors=len(params))
        meta_params = {**frozen, **meta_params}
        if self.rule.needs_shared_context:
            shared, states = self.rule.shared_context(meta_params, grads, states, params, context)
            context = context._replace(shared=shared)
        new_params, new_states = {}, {}
        for name, param in params.items():
            own = context._replace(name=name)
            delta, new_states[name] = self.rule.update(meta_params, grads[name], states[name], param, own)
            new_params[name] = param + delta
        return new_params, new_states, loss


_COMPILED: dict[tuple[Unroll, bool], Callable[..., Any]] = {}
_MOST_COMPILED = 256  # torch's default of 8 counts all tasks as one function, and the ninth would silently run eager


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo

    compiled = torch.compile(function, dynamic=False)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"

    def call(*arguments: Any) -> Any:
        with torch._dynamo.config.patch({limit: _MOST_COMPILED}):
            return compiled(*arguments)

    return call


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast or TF32 and with float32 as the default dtype, which tasks are in; whatever a Trainer's are.

    An estimate is made of differences of losses, which TF32's three digits would drown.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False), _without_tf32():
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def _without_tf32() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    try:
        matmul, conv = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # the newer settings are in use, and torch then refuses to read the older ones
        places = [torch.backends.cuda.matmul, cudnn.conv]
        before = [place.fp32_precision for place in places]
        try:
            for place in places:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, precision in zip(places, before, strict=True):
                place.fp32_precision = precision
        return
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32 = conv


def detach(inner: Inner) -> Inner:
    """Cut the graph: what a truncation carries on to the next."""
    detached: Inner = tree_map(lambda t: t.detach(), inner)
    return detached


def _repeat(tree: Any, sides: int) -> Any:
    return tree if sides == 1 else tree_map(lambda t: torch.cat([t] * sides), tree)


def _half(tree: Any, sides: int) -> Any:
    return tree if sides == 1 else tree_map(lambda t: t[: len(t) // sides], tree)


def choose(condition: Tensor, yes: Inner, no: Inner) -> Inner:
    """Run by run, one of two: condition (P,) bool."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.to(b.device).reshape(-1, *[1] * (b.dim() - 1)), a, b)

    picked: Inner = tree_map(pick, yes, no)
    return picked


def _capped(loss: Tensor, first: Tensor) -> Tensor:
    return torch.nan_to_num(loss, nan=torch.inf).clamp(min=0).minimum(2 * first)
