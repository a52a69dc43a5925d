"""RuleOptimizer: an update rule behind torch's optimizer contract. All state of a run lives here, no maths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_lopt import kernels
from lightning_lopt.kernels import Kernel, WorkItem
from lightning_lopt.optimizer import checkpoints, sharding
from lightning_lopt.optimizer import safeguard as guard
from lightning_lopt.optimizer.gradients import check_real, dense_gradient, descent
from lightning_lopt.optimizer.metrics import StepMetrics, Totals
from lightning_lopt.optimizer.runtime import LossSource, Runtime
from lightning_lopt.optimizer.sharding import placed_like, tensor_scope, whole
from lightning_lopt.optimizer.step import ProposedStep, take, take_together
from lightning_lopt.optimizer.trust_band import TrustBand
from lightning_lopt.rules import StepContext, UpdateRule

BACKENDS = ("auto", "reference", "fused")
_LR_KEYS = ("max_lr", "initial_lr", "lr")  # where a group's reference learning rate is found, in this order
_DROPPED_KEYS = ("params", "fused", "foreach", "capturable", "differentiable")

_Moving = list[tuple[Tensor, dict[str, Any]]]  # parameters and their groups
_Parts = dict[torch.device, tuple[Kernel, list[WorkItem]]]


class RuleOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that moves parameters by an update rule.

    The step is `param <- param + lr * delta - lr * weight_decay * param`, with delta from the rule. `lr` is thus a
    multiplier of the output, 1 unless there is a reason, which any torch scheduler can drive; it is not a learning rate
    to tune. State is kept per parameter in float32 at least (float64 for float64 parameters): for STAR 16 bytes per
    parameter and 12 per row and column.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. A group may set `lr`,
            `weight_decay` and `maximize`. Complex parameters are refused.
        rule: the update rule; it is shared, not copied, and never trained here.
        lr: multiplier of the update.
        weight_decay: decoupled decay, multiplied by `lr` as in `torch.optim.AdamW`.
        num_steps: the run's length in optimizer steps, where known; rules may use it and must work without.
        safeguard: skip a tensor's step when its gradient, new value or new state is not finite; count it; stop with a
            RuntimeError after 20 such steps of one tensor in a row. No device synchronization but one every 10 steps.
            "fallback": besides, take the rule's nominal term alone while the loss is outside its trust band, see
            `trust`; needs the loss, and about twice the time. On several processes each must be given the same loss.
        backend: "reference", the rule's own torch code; "fused", a compiled kernel; "auto", for each tensor the kernel
            if there is one, and the rule where not. `optimizer.backend` tells what runs.
        maximize: ascend instead of descend.

    Raises:
        ValueError: for negative `lr` or `weight_decay`, an unknown or missing backend, or complex parameters.
        RuntimeError: in `step`, for sparse gradients, a missing loss, or non-finite steps in a row.

    Example:
        >>> import torch, lightning_lopt as lopt
        >>> param = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = lopt.RuleOptimizer([param], lopt.rules.make("hyperparam"))
        >>> (param**2).sum().backward()
        >>> optimizer.step()
        >>> bool((param < 1).all())
        True
    """

    def __init__(
        self,
        params: Any,
        rule: UpdateRule,
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        num_steps: int | None = None,
        safeguard: bool | str = False,
        backend: str = "auto",
        maximize: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= float(value) < math.inf:
                raise ValueError(f"{name}={value!r} is not allowed: it must be a finite number >= 0.")
        self.rule = rule
        self.num_steps = num_steps
        self.safeguard = guard.checked(safeguard, rule, backend)
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is not allowed: use one of {list(BACKENDS)}.")
        self._backend = backend
        self._runtime = Runtime()
        defaults: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        # The marker tells our checkpoints from others'; base_lr None makes lr a number that is only logged.
        defaults |= {"lopt_kind": rule.kind, "lopt_base_lr": 1.0, "lopt_decay": True}
        super().__init__(params, defaults)

    @classmethod
    def replacing(
        cls,
        optimizer: Optimizer,
        rule: UpdateRule,
        *,
        lr: str = "ignore",
        reference_lr: float | None = None,
        weight_decay: str = "ignore",
        **arguments: Any,
    ) -> RuleOptimizer:
        """A RuleOptimizer over the parameter groups of another optimizer, with all their keys for those who read them.

        Args:
            optimizer: any torch optimizer; it is left as it is.
            rule: the update rule.
            lr: "ignore", the groups' lr is only logged; "scale", the update is multiplied by lr / reference_lr.
            reference_lr: default: the largest initial lr (or, under a OneCycleLR or CyclicLR, max_lr) of the groups.
            weight_decay: "ignore", or "decoupled": the groups' own decay with their own lr, as AdamW does.
            arguments: further arguments of `RuleOptimizer`.

        Example:
            >>> import torch, lightning_lopt as lopt
            >>> adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=0.1)
            >>> lopt.RuleOptimizer.replacing(adam, lopt.rules.make("star")).param_groups[0]["lr"]
            0.1
        """
        groups = [{"params": group["params"], **_kept(group)} for group in optimizer.param_groups]
        new = cls([dict(group) for group in groups], rule, **arguments)
        reference = reference_lr or max((_reference_lr(group) for group in groups), default=0.0)
        own = {"lopt_base_lr": (reference or 1.0) if lr == "scale" else None, "lopt_decay": weight_decay == "decoupled"}
        new.defaults.update({**_kept(optimizer.defaults), **own})
        for group in new.param_groups:
            group.update(own, lopt_kind=rule.kind)
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            getattr(new, hooks).update(getattr(optimizer, hooks))
        return new

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with this optimizer's defaults for what it leaves open; complex parameters are refused."""
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                check_real(param)
            self.rule.check_params(p for p in self._parameters() if p.requires_grad and not is_lazy(p))
            if self._backend == "fused":
                for param in self.param_groups[-1]["params"]:
                    self._kernel(param)
        except ValueError:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None) -> Any:
        """Move every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss, as in torch.
            loss: () this step's training loss, for rules with `needs_loss`; the closure's value where it is not given.

        Returns:
            The closure's value, or None.
        """
        self._opt_called = True  # what torch's schedulers look for, see below the class
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        moving = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None and p.numel()]
        watched = self.safeguard == "fallback"
        context_loss = self._loss(loss, value) if moving and (self.rule.needs_loss or watched) else None
        runtime = self._runtime
        runtime.num_tensors = len(moving)
        runtime.trust = self._trust().observe(context_loss) if watched and context_loss is not None else None
        runtime.totals = Totals() if runtime.measure_next else None
        shared = self._shared_context(moving, context_loss) if moving and self.rule.needs_shared_context else None
        by_rule = watched or self._backend == "reference"
        others, parts = (moving, {}) if by_rule else self._split(moving)
        self._move(others, context_loss, shared)
        self._run_kernels(parts)
        runtime.steps += 1
        if self.safeguard and runtime.steps % guard.CHECK_EVERY == 0:
            self.check_skipped()
        if runtime.totals is not None:
            measured = runtime.totals.result(self._counts("skipped"))
            fallback = None if runtime.trust is None else runtime.trust.fallback
            runtime.measurements, runtime.measure_next = measured._replace(fallback=fallback), False
        return value

    @property
    def backend(self) -> str:
        """What runs: "fused" if a kernel takes any of the parameters, "reference" if not."""
        kinds = (self._runtime.kernel(self.rule, p.device.type) for p in self._parameters() if self._kernel(p))
        reference = self._backend == "reference" or all(isinstance(kernel, str) for kernel in kinds)
        return "reference" if reference else "fused"

    def measure_next_step(self) -> None:
        """Have the next step measured; it costs that step about twice its time. `take_metrics` gives them."""
        self._runtime.measure_next = True

    def take_metrics(self) -> StepMetrics | None:
        """What the last measured step did; None if there was none since the last call."""
        measured, self._runtime.measurements = self._runtime.measurements, None
        return measured

    def num_skipped(self) -> int:
        """Updates that the safeguard has skipped, over all tensors. Waits for the device."""
        return int(self._counts("skipped").sum())

    def num_handovers(self) -> int:
        """How often safeguard="fallback" has handed over to the nominal term. Waits for the device."""
        return int(self._trust().handovers)

    def check_skipped(self) -> None:
        """Raise a RuntimeError if one tensor has been skipped 20 times in a row. Waits for the device."""
        counted = [p for p in self._parameters() if "skipped_in_row" in self.state.get(p, {})]
        guard.check_rows(self._counts("skipped_in_row"), lambda index: self._name(counted[index]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; float32 state of lower-precision parameters comes back as float32.

        Raises:
            ValueError: for the state of another optimizer, of another kind of rule, or of other shapes.
        """
        final: dict[str, Any] = {}

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            checkpoints.check_marker(loaded, self.rule.kind)
            checkpoints.check_shapes(loaded, self.rule, self._parameters(), self._name)
            final.update(loaded)

        # torch casts state to the parameter's dtype on the way in. Ours is put back between the user's own hooks.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._restore(final), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def set_names(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Tell the names of parameters, as `module.named_parameters()` gives them, to rules that choose by them."""
        self._runtime.names = {param: name for name, param in named}

    def set_loss_source(self, source: LossSource | None) -> None:
        """Where `step` finds the loss that a rule needs; `zero_grad` resets it."""
        self._runtime.loss_source = source

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        super().zero_grad(set_to_none)
        if self._runtime.loss_source is not None:
            self._runtime.loss_source.reset()

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("rule", "num_steps", "safeguard", "_backend")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_runtime", Runtime())

    def __repr__(self) -> str:
        head = f"kind={self.rule.kind!r}, backend={self.backend!r}, safeguard={self.safeguard}"
        return f"RuleOptimizer[{head}]\n{super().__repr__()}"

    def _split(self, moving: _Moving) -> tuple[_Moving, _Parts]:
        """The tensors that the rule moves, and those that have a kernel."""
        others: _Moving = []
        parts: _Parts = {}
        last = None
        for param, group in moving:  # short: a small model's step is over in the time of a few lines
            if (kernel := self._kernel(param)) is None:
                others.append((param, group))
                continue
            if not self.state[param] and self._only_makes_state(param, group, *descent(param, group)):
                continue
            if group is not last:
                lr, base, last = _scalar(group["lr"]), group["lopt_base_lr"], group
                scale = 1.0 if base is None else lr / base
                decay = lr * group["weight_decay"] if group["lopt_decay"] and group["weight_decay"] else 0.0
            part = WorkItem(param, dense_gradient(param), self._flat_state(param), scale, decay, group["maximize"])
            parts.setdefault(param.device, (kernel, []))[1].append(part)
        return others, parts

    def _run_kernels(self, parts: _Parts) -> None:
        runtime = self._runtime
        for device, (kernel, own) in parts.items():
            meta_params = runtime.meta_params(self.rule, device, torch.float32)
            options = {"safeguard": bool(self.safeguard), "measure": runtime.totals is not None}
            squares = kernel.step(own, meta_params, self.num_steps, runtime.num_tensors, **options)
            if runtime.totals is not None and squares is not None:
                runtime.totals.add_squares(sum(part.param.numel() for part in own), *squares)

    def _kernel(self, param: Tensor) -> Kernel | None:
        """The kernel that moves a parameter; None where the rule itself does, which is said once or refused."""
        found = self._runtime.kernel(self.rule, param.device.type)
        if not isinstance(found, str):
            if (why := found.refuses(param)) is None:
                return found
        else:
            why = found
        if self._backend == "fused":
            raise ValueError(f"backend='fused' is missing for {self._name(param)}: {why}. Use 'auto' or 'reference'.")
        if kernels.exists(self.rule, param.device.type):
            kernels.warn_once(why)
            return self._runtime.torch_kernel(self.rule, param) if isinstance(found, str) else None
        return None

    def _shared_context(self, moving: list[tuple[Tensor, dict[str, Any]]], loss: Tensor | None) -> _Shared:
        """Let the rule look at all tensors at once, before they move."""
        params: dict[str, Tensor] = {}
        grads, values, states, steps = {}, {}, {}, []
        for number, (param, group) in enumerate(moving):
            with tensor_scope(param):
                value, grad = descent(param, group)
                if self._only_makes_state(param, group, value, grad):
                    continue
            key = str(number)
            params[key], grads[key], values[key], states[key] = param, grad, value, self._typed_state(param)
            steps.append(self.state[param]["step"].to(moving[0][0].device))
        if not params:
            return _Shared(None, {})
        first = values[next(iter(values))]
        meta_params = self._runtime.meta_params(self.rule, first.device, first.dtype)
        context = StepContext(torch.stack(steps).max(), loss if loss is None else loss.to(first.device), self.num_steps)
        with tensor_scope(next((param for param in params.values() if hasattr(param, "placements")), first)):
            shared, states = self.rule.shared_context(meta_params, grads, states, values, context, in_place=True)
        return _Shared(shared, {params[key]: state for key, state in states.items()})

    def _move(self, moving: list[tuple[Tensor, dict[str, Any]]], loss: Tensor | None, shared: _Shared | None) -> None:
        """Move tensors by the rule: shards of tensors all together, whole tensors one by one."""
        shards = []
        for param, group in moving:
            if self.rule.takes_shards and (part := sharding.shard_of(param)) is not None:
                shards.append((part, partial(self._propose, param, group, loss, shared, part)))
                continue
            with tensor_scope(param):
                if (step := self._propose(param, group, loss, shared)) is not None:
                    take(step, self._runtime.totals, safeguard=bool(self.safeguard))
        made = zip((part for part, _ in shards), sharding.together(shards), strict=True)
        taken = [(part, step) for part, step in made if step is not None]
        take_together(taken, self._runtime.totals, safeguard=bool(self.safeguard))

    def _propose(
        self,
        param: Tensor,
        group: dict[str, Any],
        loss: Tensor | None,
        shared: _Shared | None,
        part: sharding.DTensorShard | None = None,
    ) -> ProposedStep | None:
        """What the rule would do with a tensor, or with this process's part of it."""
        value, grad = descent(param, group)
        if shared is None and self._only_makes_state(param, group, value, grad):
            return None
        if shared is not None and param not in shared.states:  # likewise, see _shared_context
            return None
        flat, lr, dtype, old = self._flat_state(param), _scalar(group["lr"]), value.dtype, self._typed_state(param)
        start = old if shared is None else shared.states[param]
        if part is not None:
            value, grad = sharding.local_of(value), sharding.local_of(grad, like=param)
            old, start = (type(old)(*map(sharding.local_of, state)) for state in (old, start))
        context = StepContext(flat["step"], loss if loss is None else loss.to(param.device, dtype), self.num_steps)
        known = None if shared is None else shared.value
        context = context._replace(shared=known, num_tensors=self._runtime.num_tensors, shard=part)
        # Unless someone goes back to the old state, or takes the step again.
        needed = self.safeguard or self._runtime.totals is not None or part is not None or hasattr(param, "placements")
        name = self._runtime.name(param, self.param_groups) if self.rule.needs_names else None
        context = context._replace(in_place=not needed, name=name)
        arguments = self._runtime.meta_params(self.rule, param.device, dtype), grad, start, value, context
        delta, new = self.rule.update(*arguments)
        trust = self._runtime.trust
        terms = {} if self._runtime.totals is None and trust is None else self._terms_again(arguments, part)
        if trust is not None:
            terms["blackbox"] = torch.where(trust.fallback.to(param.device) > 0, 0.0, terms.get("blackbox", 0.0))
            delta = sum(terms.values(), torch.zeros_like(value))
            flat["trust"] = trust.packed()  # one tensor for all, which every one of them saves
        change = delta if group["lopt_base_lr"] is None else delta * (lr / group["lopt_base_lr"])
        if group["lopt_decay"] and group["weight_decay"]:
            change = change - lr * group["weight_decay"] * value
        return ProposedStep(param, flat, grad, value, (value + change).to(param.dtype), new, old, terms)

    def _terms_again(self, arguments: Any, part: sharding.DTensorShard | None) -> dict[str, Tensor]:
        if part is not None:
            part.asked = 0  # it asks the same again
        return self.rule.terms(*arguments)

    def _only_makes_state(self, param: Tensor, group: dict[str, Any], value: Tensor, grad: Tensor) -> bool:
        """Make a parameter's state at its first step, and tell whether that is all that the step is for."""
        if self.state[param]:
            return False
        self._init_state(param, value)
        # torch.distributed.checkpoint creates state by a step with lr 0 and gradient 0, which must move nothing.
        return bool(group["lr"] == 0 and whole(grad.abs().sum()) == 0)

    def _flat_state(self, param: Tensor) -> dict[str, Tensor]:
        flat: dict[str, Tensor] = self.state[param]
        if flat["step"].device != param.device:  # Lightning and torch leave it on the CPU
            flat["step"] = flat["step"].to(param.device)
        return flat

    def _typed_state(self, param: Tensor) -> Any:
        flat, state_class = self.state[param], self._runtime.state_class(self.rule)
        return state_class(*(flat[name] for name in state_class._fields))

    def _init_state(self, param: Tensor, value: Tensor) -> None:
        flat = self.state[param]
        flat["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for name, tensor in self.rule.init_state(value)._asdict().items():
            flat[name] = placed_like(param, tensor, everywhere=name in self.rule.whole_state)
        if self.safeguard:
            flat.update(guard.new_counters(param.device))

    def _trust(self) -> TrustBand:
        packed = (self.state[p]["trust"] for p in self._parameters() if "trust" in self.state.get(p, {}))
        first = next(packed, None)
        return TrustBand.new() if first is None else TrustBand.unpacked(first)

    def _loss(self, given: Any, closure_value: Any) -> Tensor:
        if given is None and self._runtime.loss_source is not None:
            given = self._runtime.loss_source()
        given = closure_value if given is None else given
        if given is None:
            who = f"Rule {self.rule.kind!r}" if self.rule.needs_loss else "safeguard='fallback'"
            raise RuntimeError(f"{who} reads the training loss, and step() got none. Call step(loss=loss).")
        return torch.as_tensor(given).detach().reshape(())

    def _parameters(self) -> Iterable[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _counts(self, key: str) -> Tensor:
        counts = [self.state[p][key] for p in self._parameters() if key in self.state.get(p, {})]
        return (
            torch.stack([count.to(counts[0].device) for count in counts])
            if counts
            else torch.zeros(0, dtype=torch.int64)
        )

    def _restore(self, loaded: dict[str, Any]) -> None:
        for param, flat in checkpoints.restored(loaded, self._parameters()):
            for name in self.rule.whole_state:  # maybe saved by other processes, of other shards
                flat[name] = placed_like(param, flat[name], everywhere=True)
            self.state[param] = {**flat, **(guard.new_counters(param.device) if self.safeguard else {}), **flat}

    def _name(self, param: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for index, other in enumerate(group["params"]):
                if other is param:
                    name = group["param_names"][index] if "param_names" in group else f"{index} of group {number}"
                    return f"parameter {name} (shape {tuple(param.shape)})"
        raise KeyError(param)


# torch's schedulers wrap the step of the optimizer they are made with, to warn when they are stepped first, and warn of
# any other optimizer. Ours keeps that record itself, so that a scheduler can be handed to it.
RuleOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


class _Shared(NamedTuple):
    """What `UpdateRule.share` gave."""

    value: Any
    states: dict[Tensor, Any]  # parameter -> the state that its update starts from


def _kept(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in _DROPPED_KEYS}


def _scalar(value: float | Tensor) -> float | Tensor:
    """A one-element tensor without its dims, as torch's own optimizers take an lr."""
    return value.squeeze() if isinstance(value, Tensor) else value


def _reference_lr(group: dict[str, Any]) -> float:
    return next((float(group[key]) for key in _LR_KEYS if group.get(key) is not None), 1.0)
