"""The inner loop: a pure function that advances a population of inner runs together.

Time is counted in slots. A slot of a run is a training step or, after the end of an episode, a reset: the run gets a
fresh task, fresh parameters and a fresh rule state, and the slot contributes no loss. An episode of H steps therefore
takes H + 1 slots, as in the authors' truncated step (google/learned_optimization, `lopt_truncated_step.py`).
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
    # (task, loss, the run's first loss) -> the quantity that meta-training averages
    "raw": lambda task, loss, first: loss,
    "clipped": lambda task, loss, first: task.normalize(loss),
    "ratio": lambda task, loss, first: _capped(loss, first) / first,
    "log": lambda task, loss, first: torch.log(_capped(loss, first) / first + 1e-2),
}


class Inner(NamedTuple):
    """The state of P inner runs. Every tensor has a leading axis P; clock, horizon and done are on the CPU."""

    params: dict[str, Tensor]  # name -> (P, *shape)
    constants: Any  # drawn by the task at the start, see tasks.base
    states: dict[str, Any]  # name -> the rule's state
    run: Any  # the run's state, () for rules without
    first_loss: Tensor  # (P,) loss before the first update, the scale of relative objectives
    step: Tensor  # (P,) updates since the start; the rule sees this number
    clock: Tensor  # (P,) int64 steps of the episode; a staggered start sets it ahead
    horizon: Tensor  # (P,) int64 clock at which the episode ends
    done: Tensor  # (P,) bool: the next slot is a reset


class Record(NamedTuple):
    """The losses of a truncation of K slots."""

    losses: Tensor  # (K, P) objective, 0 in a reset slot
    mask: Tensor  # (K, P) bool: the slot is a training step, not a reset
    done: Tensor  # (K, P) bool: the episode ended with this slot


@dataclasses.dataclass(frozen=True)
class Unroll:
    """An update rule applied to a task.

    Args:
        rule: the update rule.
        task: the task that it trains.
        objective: "raw", the loss; "clipped", as the task normalizes it; "ratio" to the run's first loss, at most 2;
            "log" of that ratio + 1e-2, which gives a halving of the loss the same weight early and late.
        second_order: let gradients of the meta-loss flow through the task's gradient.
        tell_horizon: give the rule the length of the episode, as a Lightning run of known length does.
        compiled: run steps that need no gradient as compiled code. That is the rule's CPU kernel if there is one, else
            `torch.compile`, which compiles once per task and pays off after some thousand steps. "kernel": the rule's
            kernel if there is one, and nothing else.
        idle: after the end of an episode, wait for the next truncation instead of resetting at once.
        frozen: the meta-parameters that do not learn. With those that `run` gets they must be all of the rule's.
        compile_cache: functions that `torch.compile` made. Unrolls that `dataclasses.replace` derives from one another
            share it, and it is freed with the last of them.
    """

    rule: UpdateRule
    task: Task
    objective: str = "clipped"
    second_order: bool = True
    tell_horizon: bool = True
    compiled: bool | str = False
    idle: bool = False
    frozen: MetaParams = dataclasses.field(default_factory=dict, compare=False)
    compile_cache: dict[Any, Callable[..., Any]] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is not allowed: use one of {list(OBJECTIVES)}.")
        if self.compiled not in (False, True, "kernel"):
            raise ValueError(f"compiled={self.compiled!r} is not allowed: use False, True or 'kernel'.")

    def start(self, generator: torch.Generator, horizon: Tensor, *, sides: int = 1) -> Inner:
        """Start fresh runs.

        Args:
            generator: draws tasks and parameters.
            horizon: (N,) int64 lengths of the episodes.
            sides: number of copies of each run, P = sides * N. With 2, for antithetic pairs, the second half of the
                runs is a copy of the first.
        """
        fresh = self.task.init(generator, population=len(horizon))
        device = next(iter(fresh.params.values())).device
        clock = torch.zeros_like(horizon)
        inner = Inner(
            params=fresh.params,
            constants=fresh.constants,
            states={name: vmap(self.rule.init_state)(param) for name, param in fresh.params.items()},
            run=self._run_states(fresh.params),
            first_loss=torch.ones(len(horizon), device=device, dtype=torch.float32),
            step=torch.zeros(len(horizon), device=device, dtype=torch.float32),
            clock=clock,
            horizon=horizon,
            done=clock.bool(),
        )
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
        """Advance every run by a truncation of `length` slots.

        Args:
            meta_params: the rule's; with a leading axis P if `batched`.
            inner: the runs.
            length: number of slots.
            generator: draws batches and resets, the same for all sides of a run.
            draw_horizon: n -> (n,) int64 lengths for new episodes.
            sides: as in `start`.
            batched: each run has its own meta-parameters.
        """
        fused_update = None
        if self.compiled and not torch.is_grad_enabled():
            roles = self.task.roles
            fused_update = fused(self.rule, meta_params, self.frozen, inner.params, batched=batched, roles=roles)
        records = []
        for _ in range(length):
            inner, record, _ = self._slot(
                meta_params, inner, generator, draw_horizon, sides=sides, batched=batched, fused_update=fused_update
            )
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
        """Advance every run by one slot, with the arguments of `run`. Also returns the batch."""
        return self._slot(meta_params, inner, generator, draw_horizon, sides=sides, batched=batched, fused_update=None)

    def _slot(
        self,
        meta_params: MetaParams,
        inner: Inner,
        generator: torch.Generator,
        draw_horizon: Callable[[int], Tensor],
        *,
        sides: int,
        batched: bool,
        fused_update: Fused | None,
    ) -> tuple[Inner, Record, Any]:
        population = len(inner.done) // sides
        # A reset draws whole fresh runs for all; `choose` below takes those whose episode has ended.
        fresh = None
        if bool(inner.done.any()) and not self.idle:
            fresh = self.start(generator, draw_horizon(population), sides=sides)
        batch = _repeat(self.task.batch(generator, _first_side(inner.constants, sides), population), sides)
        num_steps = inner.horizon.to(inner.first_loss.device) if self.tell_horizon else None
        if fused_update is not None:
            grads, losses = vmap(self.task.grad_and_value)(inner.params, batch)
            params, states = fused_update(inner.params, inner.states, inner.step, grads, num_steps)
            run = inner.run
        else:
            update = self._population_step(batched)
            params, states, run, losses = update(
                dict(meta_params),
                dict(self.frozen),
                inner.params,
                inner.states,
                inner.run,
                inner.step,
                batch,
                num_steps,
            )
        first_loss = torch.where(inner.step == 0, losses.detach(), inner.first_loss)
        clock = inner.clock + 1
        stepped = inner._replace(
            params=params,
            states=states,
            run=run,
            first_loss=first_loss,
            step=inner.step + 1,
            clock=clock,
            done=clock >= inner.horizon,
        )
        objective = OBJECTIVES[self.objective](self.task, losses, first_loss)
        mask = ~inner.done
        if not bool(mask.all()):
            stepped = choose(inner.done, inner if fresh is None else fresh, stepped)
            objective = torch.where(mask.to(objective.device), objective, 0.0)
        return stepped, Record(objective, mask, stepped.done & mask), batch

    def loss(self, inner: Inner, batch: Any) -> Tensor:
        """(P,) objective at the runs' current parameters, without an update."""
        losses = vmap(self.task.loss)(inner.params, batch)
        return OBJECTIVES[self.objective](self.task, losses, inner.first_loss)

    def _run_states(self, params: dict[str, Tensor]) -> Any:
        """The state of each fresh run; () for rules without."""
        if not self.rule.needs_run_state:
            return ()
        first = next(iter(params.values()))
        return vmap(self.rule.init_run_state)(first.reshape(len(first), -1)[:, 0])

    def _population_step(self, batched: bool) -> Callable[..., Any]:
        """`_member_step` for a population, compiled where that is asked for and no gradient is needed."""
        of_run = 0 if self.rule.needs_run_state else None
        in_dims = (0 if batched else None, None, 0, 0, of_run, 0, 0, 0 if self.tell_horizon else None)
        step: Callable[..., Any] = vmap(self._member_step, in_dims=in_dims)
        if self.compiled in (False, "kernel") or torch.is_grad_enabled():
            return step
        key = (self, batched)
        if key not in self.compile_cache:
            self.compile_cache[key] = _compile(step)
        return self.compile_cache[key]

    def _member_step(
        self,
        meta_params: dict[str, Tensor],
        frozen: dict[str, Tensor],
        params: dict[str, Tensor],
        states: dict[str, Any],
        run: Any,
        step: Tensor,
        batch: Any,
        num_steps: Tensor | None,
    ) -> tuple[dict[str, Tensor], dict[str, Any], Any, Tensor]:
        """One training step of one run. The loss is that of the parameters before the update."""
        grads, loss = self.task.grad_and_value(params, batch)
        if not self.second_order:
            grads = {name: grad.detach() for name, grad in grads.items()}
        context = StepContext(step, loss.detach(), num_steps, num_tensors=len(params))
        meta_params = {**frozen, **meta_params}
        if self.rule.needs_run_state:
            run = self.rule.update_run_state(meta_params, run, params, context)
            context = context._replace(run=run)
        if self.rule.needs_shared_context:
            shared, states = self.rule.shared_context(meta_params, grads, states, params, context)
            context = context._replace(shared=shared)
        new_params, new_states, roles = {}, {}, self.task.roles
        for name, param in params.items():
            own = context._replace(name=name, role=roles.get(name))
            delta, new_states[name] = self.rule.update(meta_params, grads[name], states[name], param, own)
            new_params[name] = param + delta
        return new_params, new_states, run, loss


# By default torch compiles at most 8 variants of a function and then silently runs it eagerly. Every task is a variant
# of `_member_step`.
_MAX_VARIANTS = 256


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo

    compiled = torch.compile(function, dynamic=False)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"

    def call(*arguments: Any) -> Any:
        with torch._dynamo.config.patch({limit: _MAX_VARIANTS}):
            return compiled(*arguments)

    return call


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn off autocast and TF32, and make float32 the default dtype, whatever the Trainer's precision is.

    Estimates are differences of losses, which would be lost in the rounding errors of TF32's three digits.
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
        matmul = torch.get_float32_matmul_precision()
        conv = cudnn.allow_tf32
    except RuntimeError:  # torch refuses to read these settings once the newer fp32_precision has been set
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
    """Detach the runs from the graph, at the boundary of two truncations."""
    detached: Inner = tree_map(lambda t: t.detach(), inner)
    return detached


def _repeat(tree: Any, sides: int) -> Any:
    return tree if sides == 1 else tree_map(lambda t: torch.cat([t] * sides), tree)


def _first_side(tree: Any, sides: int) -> Any:
    return tree if sides == 1 else tree_map(lambda t: t[: len(t) // sides], tree)


def choose(condition: Tensor, yes: Inner, no: Inner) -> Inner:
    """Select each run from `yes` where the condition (P,) holds, else from `no`."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.to(b.device).reshape(-1, *[1] * (b.dim() - 1)), a, b)

    picked: Inner = tree_map(pick, yes, no)
    return picked


def _capped(loss: Tensor, first: Tensor) -> Tensor:
    return torch.nan_to_num(loss, nan=torch.inf).clamp(min=0).minimum(2 * first)
