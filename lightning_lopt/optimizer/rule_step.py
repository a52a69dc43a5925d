"""A step by the rule's own torch code: shards of tensors all together, whole tensors one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.optimizer import sharding
from lightning_lopt.optimizer.gradients import descent
from lightning_lopt.optimizer.groups import MovingTensor, lr_and_decay
from lightning_lopt.optimizer.metrics import Totals
from lightning_lopt.optimizer.sharding import DTensorShard, tensor_scope
from lightning_lopt.optimizer.states import TensorStates, with_step
from lightning_lopt.optimizer.step import ProposedStep, take, take_together
from lightning_lopt.optimizer.trust_band import TrustBand
from lightning_lopt.rules import StepContext, UpdateRule, WaitingTensor, compute_dtype


class RuleStep:
    """One step of an optimizer, as far as the rule itself takes it.

    Args:
        rule: the update rule.
        states: of the tensors.
        num_steps: the run's length, None if it is unknown.
        loss: () this step's loss, None where nobody reads it.
        trust: the trust band after this loss, with safeguard="fallback".
        totals: sums of what the tensors do, in a step that is measured.
        name: parameter -> its name, for rules with `needs_names`.
        waiting: tensors that have moved before and have no gradient now, for rules with `needs_shared_context` or
            `needs_run_state`.
        run: the run's state before this step, None for rules without one; after `move`, that with this step in it.
    """

    def __init__(
        self,
        rule: UpdateRule,
        states: TensorStates,
        *,
        num_steps: int | None,
        loss: Tensor | None,
        trust: TrustBand | None,
        totals: Totals | None,
        name: Callable[[Tensor], str],
        waiting: Iterable[tuple[Tensor, dict[str, Tensor]]] = (),
        run: Any = None,
    ) -> None:
        self.rule = rule
        self.states = states
        self.safeguard = states.safeguard
        self.num_steps = num_steps
        self.trust = trust
        self.totals = totals
        self.name = name
        self.waiting = waiting
        self.run = run
        self.shared: Any = None  # what `UpdateRule.shared_context` gave,
        self.shared_states: dict[Tensor, Any] = {}  # and the states that updates start from where it was called
        self._losses = {} if loss is None else {(loss.device, loss.dtype): loss}
        self._packed_trust: dict[torch.device, Tensor] = {}

    def move(self, tensors: list[MovingTensor]) -> None:
        """Move tensors, and their states with them."""
        if tensors and (self.rule.needs_shared_context or self.rule.needs_run_state):
            self._look_at_all(tensors)
        attempts = []
        for tensor in tensors:
            shard = sharding.shard_of(tensor.param) if self.rule.takes_shards else None
            if shard is not None:
                attempts.append((shard, partial(self._propose, tensor, shard)))
                continue
            with tensor_scope(tensor.param):
                take(self._propose(tensor), self.totals, safeguard=self.safeguard)
        steps = sharding.together(attempts)
        shards = [shard for shard, _ in attempts]
        take_together(list(zip(shards, steps, strict=True)), self.totals, safeguard=self.safeguard)

    def _look_at_all(self, tensors: list[MovingTensor]) -> None:
        """Let the rule look at all tensors at once, before they move."""
        first = tensors[0].param
        params: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        grads: dict[str, Tensor] = {}
        states: dict[str, Any] = {}
        counts = []
        for number, tensor in enumerate(tensors):
            key = str(number)
            params[key] = tensor.param
            with tensor_scope(tensor.param):
                values[key], grads[key] = descent(tensor.param, tensor.grad, maximize=tensor.group["maximize"])
            states[key] = self.states.typed(tensor.param, tensor.state)
            counts.append(with_step(tensor)["step"].to(first.device))
        dtype = values["0"].dtype
        meta_params = self.states.runtime.meta_params(first.device, dtype)
        step = torch.stack(counts).max().to(dtype)
        context = StepContext(step, self._loss(first.device, None), self.num_steps, waiting=self._waiting())
        with tensor_scope(next((param for param in params.values() if hasattr(param, "placements")), first)):
            if self.rule.needs_run_state:
                self.run = self.rule.update_run_state(meta_params, self.run, values, context)
                context = context._replace(run=self.run)
            if self.rule.needs_shared_context:
                self.shared, states = self.rule.shared_context(
                    meta_params, grads, states, values, context, in_place=True
                )
        self.shared_states = {params[key]: state for key, state in states.items()}

    def _waiting(self) -> list[WaitingTensor]:
        found = []
        for param, state in self.waiting:
            value = param.detach().to(compute_dtype(param.dtype))
            found.append(WaitingTensor(self.states.typed(param, state), value))
        return found

    def _propose(self, tensor: MovingTensor, shard: DTensorShard | None = None) -> ProposedStep:
        """What the rule would do with a tensor, or with this process's shard of it."""
        param, grad, _, group, num_tensors, role, known_step = tensor
        value, grad = descent(param, grad, maximize=group["maximize"])
        dtype = value.dtype
        flat = with_step(tensor)
        old = self.states.typed(param, flat)
        start = self.shared_states.get(param, old)
        if shard is not None:
            value = sharding.local_of(value)
            grad = sharding.local_of(grad, like=param)
            old = type(old)(*map(sharding.local_of, old))
            start = type(start)(*map(sharding.local_of, start))
        # The old state is needed where someone goes back to it, or takes the step again.
        is_needed = self.safeguard or self.totals is not None or shard is not None or hasattr(param, "placements")
        context = StepContext(
            step=flat["step"].to(dtype),
            loss=self._loss(param.device, dtype),
            num_steps=self.num_steps,
            shared=self.shared,
            num_tensors=num_tensors,
            shard=shard,
            in_place=not is_needed,
            name=self.name(param) if self.rule.needs_names else None,
            role=role,
            known_step=None if param.is_cpu else known_step,  # a CPU is asked at no cost, and knows what was skipped
            run=self.run,
        )
        meta_params = self.states.runtime.meta_params(param.device, dtype)
        delta, new = self.rule.update(meta_params, grad, start, value, context)
        terms: dict[str, Tensor] = {}
        if self.totals is not None or self.trust is not None:
            if shard is not None:
                shard.asked = 0  # it asks the same again
            terms = self.rule.terms(meta_params, grad, start, value, context)
        if self.trust is not None:
            falls_back = self.trust.fallback.to(param.device) > 0
            terms["blackbox"] = torch.where(falls_back, 0.0, terms.get("blackbox", 0.0))
            delta = sum(terms.values(), torch.zeros_like(value))
            flat["trust"] = self._trust_on(param.device)
        moved = (value + _change(delta, value, group)).to(param.dtype)
        return ProposedStep(param, flat, grad, value, moved, new, old, terms)

    def _loss(self, device: torch.device, dtype: torch.dtype | None) -> Tensor | None:
        """This step's loss on a device, in a dtype if one is given; copied there once."""
        if not self._losses:
            return None
        given = next(iter(self._losses.values()))
        key = (device, dtype or given.dtype)
        if key not in self._losses:
            self._losses[key] = given.to(*key)
        return self._losses[key]

    def _trust_on(self, device: torch.device) -> Tensor:
        """The trust band as state: one tensor, which all parameters of a device share and save."""
        if device not in self._packed_trust:
            assert self.trust is not None
            self._packed_trust[device] = self.trust.packed().to(device)
        return self._packed_trust[device]


def _change(delta: Tensor, value: Tensor, group: dict[str, Any]) -> Tensor:
    """What is added to a parameter, from a rule's delta and the parameter's value."""
    lr, scale, decay = lr_and_decay(group)
    change = delta * scale
    return change - decay * value if group["lopt_decay"] and group["weight_decay"] else change
