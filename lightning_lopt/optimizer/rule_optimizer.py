"""RuleOptimizer: an update rule behind torch's optimizer contract.

One step, from top to bottom: `RuleOptimizer.step` finds the tensors with a gradient (`groups`) and the loss;
`states` makes and checks their states; `kernel_step` moves those that have a fused kernel, and `rule_step` the others
by the rule itself, which `step` and `safeguard` take or skip.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_lopt.kernels.mismatch import TensorMismatch
from lightning_lopt.optimizer import checkpoints, kernel_step, roles, run_state
from lightning_lopt.optimizer import safeguard as guard
from lightning_lopt.optimizer.gradients import check_real
from lightning_lopt.optimizer.groups import (
    NUM_TENSORS,
    ROLES,
    MovingTensor,
    check_role,
    kept_keys,
    largest_lr,
    moving_tensors,
    waiting_tensors,
)
from lightning_lopt.optimizer.kernel_step import KernelChoice
from lightning_lopt.optimizer.metrics import StepMetrics, Totals
from lightning_lopt.optimizer.rule_step import RuleStep
from lightning_lopt.optimizer.runtime import LossSource, Runtime, checked_num_steps
from lightning_lopt.optimizer.sharding import placed_like
from lightning_lopt.optimizer.states import TensorStates
from lightning_lopt.optimizer.trust_band import TrustBand
from lightning_lopt.rules import UpdateRule, compute_dtype, constants

BACKENDS = ("auto", "reference", "fused")


class RuleOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that moves parameters by an update rule.

    The step is `param <- param + lr * delta - lr * weight_decay * param`, with delta from the rule. `lr` is thus a
    multiplier of the output, 1 unless there is a reason, which any torch scheduler can drive; it is not a learning rate
    to tune. State is kept per parameter in float32 at least (float64 for float64 parameters).

    Rules with a scheduler scale their steps by the number of tensors that the net trains. A tensor gets this number at
    its own first step: it is the count of trainable tensors (`requires_grad`, not empty) in the optimizer at that time.
    It is saved in the checkpoint and never changes. So the size of a step does not depend on which other tensors happen
    to have a gradient, and freezing or unfreezing layers leaves the steps of the others as they are. Tensors that start
    to train later, because they were frozen or are added in a new group, count everything that trains by then: a
    backbone that is unfrozen takes the small steps of a deep net, while its head keeps the larger steps it had. Weights
    that stay frozen do not count, whether the optimizer holds them or not. Weights that never get a gradient do: at a
    tensor's first step nobody knows which of the others will get one later. Freeze them if there are many.

    Some rules move hidden matrices in another way than embeddings and the last layer. The role of a tensor
    (`rules.matrix.ROLES`) is told by a group's `role`; else by the types of modules (`set_roles`); else by the names of
    named parameters (`optimizer.roles`). It is decided at the tensor's first step, and saved in the checkpoint.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. A group may set `lr`,
            `weight_decay`, `maximize`, `role` and `strength`, another multiplier of the update. Complex parameters are
            refused.
        rule: the update rule; it is shared, not copied, and never trained here.
        lr: multiplier of the update.
        weight_decay: decoupled decay, multiplied by `lr` as in `torch.optim.AdamW`; besides the rule's own decay, which
            `rule.without_decay()` leaves out.
        num_steps: the run's length in optimizer steps, None if it is unknown; rules may use it, and work without it
            unless they have `needs_num_steps`. May be set later: `optimizer.num_steps = 1000`.
        safeguard: skip a tensor's step when its gradient, new value or new state is not finite; count it; stop with a
            RuntimeError after 20 such steps of one tensor in a row. Synchronizes with the device every 10 steps.
            "fallback": also take the rule's nominal term alone while the loss is outside the trust band (see
            `trust_band`); for rules that have another term besides. Needs the loss, and takes about twice the time. On
            several processes, give each the same loss.
        backend: "reference", the rule's own torch code; "fused", a compiled kernel; "auto", for each tensor the kernel
            if there is one, else the rule. `optimizer.backend` says what runs.
        maximize: ascend instead of descend.

    Raises:
        ValueError: for a negative `lr` or `weight_decay`, a `num_steps` that is not a positive integer, an unknown or
            missing backend, or complex parameters.
        RuntimeError: in `step`, for sparse gradients, a missing loss or length of the run, a parameter whose gradient
            or state does not fit it, or non-finite steps in a row.

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
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is not allowed: use one of {list(BACKENDS)}.")
        self.rule = rule
        self.safeguard = guard.checked(safeguard, rule, backend)
        self._backend = backend
        self._runtime = Runtime()
        self.num_steps = num_steps
        defaults: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        # The marker tells our checkpoints from others'; base_lr None makes lr a number that is only logged.
        defaults |= {"lopt_kind": rule.kind, "lopt_base_lr": 1.0, "lopt_decay": True, "lopt_strength": 1.0}
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
        strength: float = 1.0,
        **arguments: Any,
    ) -> RuleOptimizer:
        """A RuleOptimizer over the parameter groups of another optimizer, with all their keys for those who read them.

        Args:
            optimizer: any torch optimizer; it is left as it is.
            rule: the update rule.
            lr: "ignore", the groups' lr is only logged; "scale", the update is multiplied by lr / reference_lr.
            reference_lr: default: the largest initial lr (or, under a OneCycleLR or CyclicLR, max_lr) of the groups.
            weight_decay: "decoupled", the groups' own with their own lr, as AdamW does; else they have no effect.
            strength: multiplier of the update, beside a group's own `strength`.
            arguments: further arguments of `RuleOptimizer`.

        Example:
            >>> import torch, lightning_lopt as lopt
            >>> adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=0.1)
            >>> lopt.RuleOptimizer.replacing(adam, lopt.rules.make("star")).param_groups[0]["lr"]
            0.1
        """
        groups = [{"params": group["params"], **kept_keys(group)} for group in optimizer.param_groups]
        new = cls(groups, rule, **arguments)
        reference = reference_lr or largest_lr(optimizer.param_groups)
        own: dict[str, Any] = {"lopt_base_lr": reference if lr == "scale" else None}
        own |= {"lopt_decay": weight_decay == "decoupled", "lopt_strength": strength}
        new.defaults.update({**kept_keys(optimizer.defaults), **own})
        for group in new.param_groups:
            group.update(own, lopt_kind=rule.kind)
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            getattr(new, hooks).update(getattr(optimizer, hooks))
        return new

    @property
    def num_steps(self) -> int | None:
        """The run's length in optimizer steps, None if it is unknown."""
        return self._runtime.num_steps

    @num_steps.setter
    def num_steps(self, num_steps: int | None) -> None:
        self._runtime.num_steps = checked_num_steps(num_steps)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with this optimizer's defaults for what it leaves open; complex parameters are refused."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group[NUM_TENSORS], group[ROLES] = [None] * len(group["params"]), [None] * len(group["params"])
        try:
            check_role(group)
            for param in group["params"]:
                check_real(param)
            self.rule.check_params(p for p in self._parameters() if p.requires_grad and not is_lazy(p))
            if self._backend == "fused":
                for param in group["params"]:
                    self._kernels().of(param)
        except ValueError:
            del self.param_groups[-1]
            raise
        named = [pair for g in self.param_groups for pair in zip(g.get("param_names", ()), g["params"], strict=False)]
        self._runtime.roles_by_name = WeakTensorKeyDictionary(roles.by_name(named))

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
        moving = moving_tensors(self.param_groups, self.state, self._runtime.role)
        if moving:
            self._warn_of_unknown_roles(moving)
            try:
                with constants.keeping(self._runtime.constants), _without_autocast(moving):
                    self._move(moving, loss, value)
            except TensorMismatch as error:
                raise RuntimeError(error.about(self._name(error.param))) from None
        self._runtime.steps += 1
        if self.safeguard and self._runtime.steps % guard.CHECK_EVERY == 0:
            self.check_skipped()
        return value

    def _move(self, moving: list[MovingTensor], given_loss: Any, closure_value: Any) -> None:
        """Move tensors: those that have a kernel by it, the others by the rule."""
        runtime = self._runtime
        runtime.read_meta_params(self.rule)
        totals = Totals() if runtime.measure_next else None
        states = TensorStates(self.rule, runtime, safeguard=bool(self.safeguard))
        ready = states.prepare(moving)
        loss = self._loss(given_loss, closure_value) if ready else None
        run = self._run_state(moving)
        trust = self._trust().observe(loss) if self.safeguard == "fallback" and loss is not None else None
        calls: kernel_step.Calls = {}
        by_rule = ready
        if trust is None and self._backend != "reference" and not self.rule.needs_shared_context:
            calls, by_rule = kernel_step.split(ready, self._kernels())
        for param, grad, state, *_ in by_rule:  # before anything is written; kernels check theirs on their own
            states.check(param, grad, state)
        step = RuleStep(
            self.rule,
            states,
            num_steps=self._known_num_steps() if ready else None,
            loss=loss,
            trust=trust,
            totals=totals,
            name=lambda param: runtime.name(param, self.param_groups),
            waiting=waiting_tensors(self.param_groups, self.state),
            run=run,
        )
        step.move(by_rule)
        if run is not None:
            run_state.write(step.run, self.state.items())
        kernel_step.run(calls, states, totals)
        if totals is not None:
            fallback = None if trust is None else trust.fallback
            runtime.metrics = totals.result(self._counts("skipped"), fallback)
            runtime.measure_next = False

    @property
    def backend(self) -> str:
        """What runs: "fused" if a kernel takes any of the parameters, "reference" if not."""
        if self._backend == "reference":
            return "reference"
        choice = self._kernels()
        return "fused" if any(map(choice.is_fused, self._parameters())) else "reference"

    def measure_next_step(self) -> None:
        """Have the next step measured; it costs that step about twice its time. `take_metrics` gives them."""
        self._runtime.measure_next = True

    def take_metrics(self) -> StepMetrics | None:
        """What the last measured step did; None if there was none since the last call."""
        metrics = self._runtime.metrics
        self._runtime.metrics = None
        return metrics

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
        self._runtime.names.clear()
        for name, param in named:
            self._runtime.names[param] = name

    def set_roles(self, module: torch.nn.Module) -> None:
        """Tell the roles of parameters in the net from the types of a model's modules; `LearnedOptimizer` does it.

        Example:
            >>> import lightning_lopt as lopt
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
            >>> optimizer = RuleOptimizer(model.parameters(), lopt.rules.make("scheduled"))
            >>> optimizer.set_roles(model)
        """
        self._runtime.roles.update(roles.by_module(module, self._parameters()))

    def set_loss_source(self, source: LossSource | None) -> None:
        """Where `step` finds the loss that a rule needs; `zero_grad` resets it."""
        self._runtime.loss_source = source

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        super().zero_grad(set_to_none)
        if self._runtime.loss_source is not None:
            self._runtime.loss_source.reset()

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("rule", "safeguard", "_backend")}
        return {**super().__getstate__(), **own, "_num_steps": self.num_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_num_steps" in state:  # a copy; `load_state_dict` comes here, too
            state = dict(state)
            self._runtime = Runtime()
            self.num_steps = state.pop("_num_steps")
        super().__setstate__(state)

    def __repr__(self) -> str:
        head = f"kind={self.rule.kind!r}, backend={self.backend!r}, safeguard={self.safeguard}"
        lines = super().__repr__().splitlines()
        return "\n".join(
            [f"RuleOptimizer[{head}]", *(line for line in lines if not (NUM_TENSORS in line or ROLES in line))]
        )

    def _warn_of_unknown_roles(self, moving: list[MovingTensor]) -> None:
        """Warn, at the first step, of matrices whose role is not known, if the rule would use it."""
        if not self.rule.uses_roles or self._runtime.steps:
            return
        unknown = [tensor.param for tensor in moving if tensor.role is None and tensor.param.dim() > 1]
        if unknown:
            warnings.warn(
                f"The roles of {len(unknown)} matrices in the net are unknown, such as {self._name(unknown[0])}'s. "
                f"Rule {self.rule.kind!r} moves hidden layers in another way than embeddings, and has to guess. Make "
                "the optimizer from model.named_parameters(), call set_roles(model), or give groups a 'role'.",
                stacklevel=4,
            )

    def _kernels(self) -> KernelChoice:
        return KernelChoice(self.rule, self._runtime, must_exist=self._backend == "fused", name=self._name)

    def _trust(self) -> TrustBand:
        for param in self._parameters():
            if "trust" in self.state.get(param, {}):
                return TrustBand.unpacked(self.state[param]["trust"])
        return TrustBand.new()

    def _loss(self, given: Any, closure_value: Any) -> Tensor | None:
        """This step's loss, None where nobody reads it."""
        if not self.rule.needs_loss and self.safeguard != "fallback":
            return None
        if given is None and self._runtime.loss_source is not None:
            given = self._runtime.loss_source()
        given = closure_value if given is None else given
        if given is None:
            who = f"Rule {self.rule.kind!r}" if self.rule.needs_loss else "safeguard='fallback'"
            raise RuntimeError(f"{who} reads the training loss, and step() got none. Call step(loss=loss).")
        is_tensor = isinstance(given, Tensor)
        value: Tensor = given.detach() if is_tensor else torch.tensor(given, dtype=torch.float32, device="cpu")
        return value.reshape(())

    def _run_state(self, moving: list[MovingTensor]) -> Any:
        """The run's state, None for rules without; on the device and in the arithmetic of the first tensor."""
        if not self.rule.needs_run_state:
            return None
        first = moving[0].param
        like = torch.empty((), dtype=compute_dtype(first.dtype), device=first.device)
        return run_state.read(self.rule, self.state.values(), like)

    def _known_num_steps(self) -> int | None:
        if self.rule.needs_num_steps and self.num_steps is None:
            raise RuntimeError(
                f"Rule {self.rule.kind!r} must know the length of the run. Pass num_steps=, the number of optimizer "
                "steps, to RuleOptimizer or LearnedOptimizer, or set optimizer.num_steps."
            )
        return self.num_steps

    def _parameters(self) -> Iterable[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _counts(self, key: str) -> Tensor:
        counts = [self.state[p][key] for p in self._parameters() if key in self.state.get(p, {})]
        if not counts:
            return torch.zeros(0, dtype=torch.int64, device="cpu")
        return torch.stack([count.to(counts[0].device) for count in counts])

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


@contextlib.contextmanager
def _without_autocast(moving: Iterable[MovingTensor]) -> Iterator[None]:
    """Turn autocast off: under manual optimization a step is taken in its scope, and matrix products would obey it."""
    with contextlib.ExitStack() as stack:
        for device_type in {tensor.param.device.type for tensor in moving}:
            if device_type != "meta" and torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


# torch's schedulers wrap the step of the optimizer they are made with, to warn when they are stepped first, and warn of
# any other optimizer. Ours keeps that record itself, so that a scheduler can be handed to it.
RuleOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
