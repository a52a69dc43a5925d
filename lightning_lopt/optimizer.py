"""RuleOptimizer: an update rule behind torch's optimizer contract. All state of a run lives here, no maths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_lopt.rules import StepContext, UpdateRule, compute_dtype

BACKENDS = ("auto", "reference", "fused")
SKIP_LIMIT = 20  # steps in a row that one tensor may be skipped before training stops
CHECK_EVERY = 10  # steps between looks at the skip counters, each of which waits for the device once

_LR_KEYS = ("max_lr", "initial_lr", "lr")  # where a group's reference learning rate is found, in this order
_DROPPED_KEYS = ("params", "fused", "foreach", "capturable", "differentiable")


class Measurements(NamedTuple):
    """What one step did, over all tensors; tensors of no dims, on the parameters' device."""

    update_rms: Tensor  # root mean square of the change of the parameters
    nominal_share: Tensor | None  # rms of the nominal term / sum of the terms' rms; None for rules without one
    skipped: Tensor  # updates skipped by the safeguard since the start, over all tensors


class LossSource(Protocol):
    """Gives the loss of the current step, None where it has seen none."""

    def __call__(self) -> Tensor | None: ...  # noqa: D102

    def reset(self) -> None: ...  # noqa: D102


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
        backend: "auto" (the best there is), "reference" (the rule's own torch code) or "fused".
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
        safeguard: bool = False,
        backend: str = "auto",
        maximize: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= float(value) < math.inf:
                raise ValueError(f"{name}={value!r} is not allowed: it must be a finite number >= 0.")
        self.rule = rule
        self.num_steps = num_steps
        self.safeguard = safeguard
        self.backend = _resolve_backend(backend, rule)
        self._shell = _Shell()
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
        weight_decay: str = "ignore",
        **arguments: Any,
    ) -> RuleOptimizer:
        """A RuleOptimizer over the parameter groups of another optimizer, with all their keys for those who read them.

        Args:
            optimizer: any torch optimizer; it is left as it is.
            rule: the update rule.
            lr: "ignore", the groups' lr is only logged; "scale", the update is multiplied by lr / reference, the
                reference being the largest initial lr (or, under a OneCycleLR or CyclicLR, max_lr) of the groups.
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
        reference = max((_reference_lr(group) for group in groups), default=0.0)
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
                _check_real(param)
            self.rule.check_params(p for p in self._parameters() if p.requires_grad and not is_lazy(p))
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
        context_loss = self._loss(loss, value) if moving and self.rule.needs_loss else None
        shell = self._shell
        shell.totals = _Totals() if shell.measure_next else None
        shared = self._share(moving, context_loss) if moving and self.rule.needs_share else None
        for param, group in moving:
            with _tensor_scope(param):
                self._update(param, group, context_loss, shared)
        shell.steps += 1
        if self.safeguard and shell.steps % CHECK_EVERY == 0:
            self.check_skipped()
        if shell.totals is not None:
            shell.measurements, shell.measure_next = shell.totals.result(self._counts("skipped")), False
        return value

    def measure_next_step(self) -> None:
        """Have the next step measured; it costs that step about twice its time. `take_measurements` gives them."""
        self._shell.measure_next = True

    def take_measurements(self) -> Measurements | None:
        """What the last measured step did; None if there was none since the last call."""
        measured, self._shell.measurements = self._shell.measurements, None
        return measured

    def num_skipped(self) -> int:
        """Updates that the safeguard has skipped, over all tensors. Waits for the device."""
        return int(self._counts("skipped").sum())

    def check_skipped(self) -> None:
        """Raise a RuntimeError if one tensor has been skipped `SKIP_LIMIT` times in a row. Waits for the device."""
        rows = self._counts("skipped_in_row").cpu()
        if not len(rows) or int(rows.max()) < SKIP_LIMIT:
            return
        index = int(rows.argmax())
        param = [p for p in self._parameters() if "skipped_in_row" in self.state.get(p, {})][index]
        raise RuntimeError(
            f"Gradient, value or update of {self._name(param)} was not finite in {int(rows[index])} steps in a row. "
            "All were skipped, so every parameter and its state is as it was before. Look for NaN in the data or an "
            "overflow in the loss (lower precision, log of 0); safeguard=False lets such steps pass."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; float32 state of lower-precision parameters comes back as float32.

        Raises:
            ValueError: for the state of another optimizer, of another kind of rule, or of other shapes.
        """
        final: dict[str, Any] = {}

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            _check_marker(loaded, self.rule.kind)
            self._check_shapes(loaded)
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

    def set_loss_source(self, source: LossSource | None) -> None:
        """Where `step` finds the loss that a rule needs; `zero_grad` resets it."""
        self._shell.loss_source = source

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        super().zero_grad(set_to_none)
        if self._shell.loss_source is not None:
            self._shell.loss_source.reset()

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("rule", "num_steps", "safeguard", "backend")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_shell", _Shell())

    def __repr__(self) -> str:
        head = f"kind={self.rule.kind!r}, backend={self.backend!r}, safeguard={self.safeguard}"
        return f"RuleOptimizer[{head}]\n{super().__repr__()}"

    def _share(self, moving: list[tuple[Tensor, dict[str, Any]]], loss: Tensor | None) -> _Shared:
        """Let the rule look at all tensors at once, before they move."""
        params: dict[str, Tensor] = {}
        grads, values, states, steps = {}, {}, {}, []
        for number, (param, group) in enumerate(moving):
            with _tensor_scope(param):
                value, grad = _inputs(param, group)
                if self._only_makes_state(param, group, value, grad):
                    continue
            key = str(number)
            params[key], grads[key], values[key], states[key] = param, grad, value, self._typed_state(param)
            steps.append(self.state[param]["step"].to(moving[0][0].device))
        if not params:
            return _Shared(None, {})
        first = values[next(iter(values))]
        meta_params = self._shell.meta_params(self.rule, first.device, first.dtype)
        context = StepContext(torch.stack(steps).max(), loss if loss is None else loss.to(first.device), self.num_steps)
        with _tensor_scope(next((param for param in params.values() if hasattr(param, "placements")), first)):
            shared, states = self.rule.share(meta_params, grads, states, values, context, in_place=True)
        return _Shared(shared, {params[key]: state for key, state in states.items()})

    def _update(self, param: Tensor, group: dict[str, Any], loss: Tensor | None, shared: _Shared | None) -> None:
        value, grad = _inputs(param, group)
        if shared is None and self._only_makes_state(param, group, value, grad):
            return
        if shared is not None and param not in shared.states:  # likewise, see _share
            return
        flat, lr, dtype, old = self.state[param], _scalar(group["lr"]), value.dtype, self._typed_state(param)
        if flat["step"].device != param.device:  # Lightning and torch leave it on the CPU
            flat["step"] = flat["step"].to(param.device)
        context = StepContext(flat["step"], loss if loss is None else loss.to(param.device, dtype), self.num_steps)
        arguments = (
            self._shell.meta_params(self.rule, param.device, dtype),
            grad,
            old if shared is None else shared.states[param],
            value,
            context if shared is None else context._replace(shared=shared.value),
        )
        delta, new = self.rule.update(*arguments)
        change = delta if group["lopt_base_lr"] is None else delta * (lr / group["lopt_base_lr"])
        if group["lopt_decay"] and group["weight_decay"]:
            change = change - lr * group["weight_decay"] * value
        moved = (value + change).to(param.dtype)
        counted: Tensor | int = 1
        if self.safeguard:
            counted = _all_finite(grad, moved, *(a for a, b in zip(new, old, strict=True) if a is not b))
            moved = torch.where(counted, moved, param)
            pairs = zip(new, old, strict=True)
            new = type(new)(*(a if a is b else torch.where(counted, a, b) for a, b in pairs))
            flat["skipped"] = flat["skipped"] + ~counted
            flat["skipped_in_row"] = (flat["skipped_in_row"] + 1) * ~counted
        if self._shell.totals is not None:
            self._shell.totals.add(moved.to(dtype) - value, self.rule.terms(*arguments), counted)
        param.copy_(_placed_like(param, moved))
        flat.update((name, _placed_like(param, tensor)) for name, tensor in zip(new._fields, new, strict=True))
        flat["step"] = flat["step"] + counted

    def _only_makes_state(self, param: Tensor, group: dict[str, Any], value: Tensor, grad: Tensor) -> bool:
        """Make a parameter's state at its first step, and tell whether that is all that the step is for."""
        if self.state[param]:
            return False
        self._init_state(param, value)
        # torch.distributed.checkpoint creates state by a step with lr 0 and gradient 0, which must move nothing.
        return bool(group["lr"] == 0 and _whole(grad.abs().sum()) == 0)

    def _typed_state(self, param: Tensor) -> Any:
        flat, state_class = self.state[param], self._shell.state_class(self.rule)
        return state_class(*(flat[name] for name in state_class._fields))

    def _init_state(self, param: Tensor, value: Tensor) -> None:
        flat = self.state[param]
        flat["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for name, tensor in self.rule.init_state(value)._asdict().items():
            flat[name] = _placed_like(param, tensor)
        if self.safeguard:
            flat.update(self._new_counters(param))

    def _loss(self, given: Any, closure_value: Any) -> Tensor:
        if given is None and self._shell.loss_source is not None:
            given = self._shell.loss_source()
        given = closure_value if given is None else given
        if given is None:
            raise RuntimeError(
                f"Rule {self.rule.kind!r} reads the training loss, and step() got none. Call step(loss=loss)."
            )
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

    def _name(self, param: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for index, other in enumerate(group["params"]):
                if other is param:
                    name = group["param_names"][index] if "param_names" in group else f"{index} of group {number}"
                    return f"parameter {name} (shape {tuple(param.shape)})"
        raise KeyError(param)

    def _check_shapes(self, loaded: dict[str, Any]) -> None:
        saved_ids = [index for group in loaded["param_groups"] for index in group["params"]]
        for index, param in zip(
            saved_ids, self._parameters(), strict=False
        ):  # torch itself refuses other numbers of parameters
            if not (raw := loaded["state"].get(index)):
                continue
            expected = {
                "step": torch.empty(()),
                **self.rule.init_state(torch.empty_like(param, device="meta"))._asdict(),
            }
            for name, tensor in expected.items():
                if getattr(raw.get(name), "shape", None) != tensor.shape:
                    came = f"of shape {tuple(raw[name].shape)}" if isinstance(raw.get(name), Tensor) else "not there"
                    raise ValueError(
                        f"State {name!r} of {self._name(param)} is {came} in the checkpoint, and {tuple(tensor.shape)} "
                        "here. It belongs to another model or rule; load the one that was saved."
                    )

    def _restore(self, loaded: dict[str, Any]) -> None:
        """Put the loaded state in place in the dtype of the arithmetic, on the parameter's device."""
        saved_ids = [index for group in loaded["param_groups"] for index in group["params"]]
        for index, param in zip(saved_ids, self._parameters(), strict=True):
            if raw := loaded["state"].get(index):
                dtype = compute_dtype(param.dtype)
                dtypes = {name: dtype for name, tensor in raw.items() if name != "step" and tensor.is_floating_point()}
                flat = {name: t.to(param.device, dtypes.get(name, t.dtype), copy=True) for name, t in raw.items()}
                self.state[param] = flat
                for name, count in self._new_counters(param).items() if self.safeguard else ():
                    flat.setdefault(name, count)

    def _new_counters(self, param: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros((), dtype=torch.int64, device=param.device) for name in ("skipped", "skipped_in_row")}


# torch's schedulers wrap the step of the optimizer they are made with, to warn when they are stepped first, and warn of
# any other optimizer. Ours keeps that record itself, so that a scheduler can be handed to it.
RuleOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


class _Shared(NamedTuple):
    """What `UpdateRule.share` gave."""

    value: Any
    states: dict[Tensor, Any]  # parameter -> the state that its update starts from


class _Totals:
    """Sums over the tensors of one step."""

    def __init__(self) -> None:
        self.count = 0
        self.change: Tensor | float = 0.0
        self.terms: dict[str, Tensor | float] = {}

    def add(self, change: Tensor, terms: dict[str, Tensor], counted: Tensor | int) -> None:
        self.count += change.numel()
        self.change = _plus(self.change, _whole(change.square().sum()))
        for name, term in terms.items():
            total = _whole(term.square().sum())
            total = torch.where(counted, total, 0.0) if isinstance(counted, Tensor) else total
            self.terms[name] = _plus(self.terms.get(name, 0.0), total)

    def result(self, skipped: Tensor) -> Measurements:
        roots = {name: torch.as_tensor(total).sqrt() for name, total in self.terms.items()}
        share = roots["nominal"] / sum(roots.values(), torch.tensor(1e-30)) if "nominal" in roots else None
        rms = torch.as_tensor(self.change / max(self.count, 1)).sqrt()
        return Measurements(rms, share, skipped.sum())


def _plus(total: Tensor | float, term: Tensor) -> Tensor:
    """A sum over tensors that may lie on several devices."""
    return total + (term.to(total.device) if isinstance(total, Tensor) else term)


class _Shell:
    """What a RuleOptimizer keeps beside torch's own attributes, in one object.

    Lightning wraps optimizers in an object through which reads fall through to ours but writes do not: mutable state
    must sit in a container. Nothing in it belongs into a checkpoint.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.measure_next = False
        self.totals: _Totals | None = None
        self.measurements: Measurements | None = None
        self.loss_source: LossSource | None = None
        self._meta_params: dict[Any, tuple[Any, list[Tensor], dict[str, Tensor]]] = {}
        self._state_class: Any = None

    def state_class(self, rule: UpdateRule) -> Any:
        """The NamedTuple type of the rule's state."""
        if self._state_class is None:
            self._state_class = type(rule.init_state(torch.zeros(1)))
        return self._state_class

    def meta_params(self, rule: UpdateRule, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The rule's meta-parameters on a device in a dtype; copied anew only after they have changed."""
        params = rule.meta_params()
        stamp = tuple((p.data_ptr(), p._version) for p in params.values())
        key = (device, dtype)
        if key not in self._meta_params or self._meta_params[key][0] != stamp:
            sources = [p.detach() for p in params.values()]  # held, so that their addresses are not used again
            self._meta_params[key] = stamp, sources, {k: v.detach().to(device, dtype) for k, v in params.items()}
        return self._meta_params[key][2]


def _resolve_backend(backend: str, rule: UpdateRule) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not allowed: use one of {list(BACKENDS)}.")
    if backend == "fused":
        raise ValueError(
            f"backend='fused': there is no fused kernel for kind {rule.kind!r} yet; use 'auto' or 'reference'."
        )
    return "reference"


def _tensor_scope(param: Tensor) -> AbstractContextManager[None]:
    """Where a sharded parameter (DTensor) may meet plain tensors, which are the same on all ranks."""
    if type(param) in (Tensor, torch.nn.Parameter):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def _placed_like(param: Any, tensor: Any) -> Any:
    """Lay a sharded tensor out like its parameter, where its last dims are the parameter's; on every rank where not.

    So each state tensor has one layout from the start, and a resumed run adds in the same order as one that was not
    stopped.
    """
    if not hasattr(param, "placements") or not hasattr(tensor, "placements"):
        return tensor
    from torch.distributed.tensor import Replicate, Shard

    extra = tensor.dim() - param.dim()
    alike = extra >= 0 and tensor.shape[extra:] == param.shape
    placements = [Shard(p.dim + extra) if alike and isinstance(p, Shard) else Replicate() for p in param.placements]
    return tensor.redistribute(param.device_mesh, placements)


def _kept(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in _DROPPED_KEYS}


def _scalar(value: float | Tensor) -> float | Tensor:
    """A one-element tensor without its dims, as torch's own optimizers take an lr."""
    return value.squeeze() if isinstance(value, Tensor) else value


def _reference_lr(group: dict[str, Any]) -> float:
    return next((float(group[key]) for key in _LR_KEYS if key in group), 1.0)


def _inputs(param: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A parameter and the gradient that it is to descend, in the dtype of the arithmetic."""
    dtype = compute_dtype(param.dtype)
    grad = _dense_gradient(param).to(dtype)
    return param.to(dtype), -grad if group["maximize"] else grad


def _check_real(param: Tensor) -> None:
    if param.is_complex():
        raise ValueError(
            f"A parameter of shape {tuple(param.shape)} is {param.dtype}; update rules take real parameters. "
            "Hold it as torch.view_as_real(parameter)."
        )


def _dense_gradient(param: Tensor) -> Tensor:
    grad = param.grad
    assert grad is not None  # the caller has looked
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"The gradient of a parameter of shape {tuple(param.shape)} is {grad.layout}; update rules take dense "
            "gradients. Use nn.Embedding(sparse=False), or give these parameters torch.optim.SparseAdam and manual "
            "optimization."
        )
    return grad


def _all_finite(*tensors: Tensor) -> Tensor:
    """() bool: no NaN or inf in any floating tensor. A sum carries them, in one read and without a temporary."""
    sums = [t.sum(dtype=compute_dtype(t.dtype)) for t in tensors if t.is_floating_point()]
    return torch.isfinite(_whole(torch.stack(sums).sum()))


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's value, the same on all ranks; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _check_marker(state_dict: dict[str, Any], kind: str) -> None:
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError(
            f"This is no optimizer's state dict: it has the keys {sorted(state_dict)}. Pass what state_dict() gave."
        )
    kinds = {group.get("lopt_kind") for group in state_dict["param_groups"]}
    if None in kinds:
        raise ValueError(
            "This is the state of another optimizer (its groups carry no 'lopt_kind'), and its moments mean nothing to "
            "a learned optimizer. Load the model's weights alone, or go on with the optimizer that was saved."
        )
    if kinds != {kind} and kinds:
        raise ValueError(
            f"This is the state of a rule of kind {sorted(kinds)}, this optimizer's is {kind!r}. Load the rule that "
            "was saved."
        )
