"""UpdateRule: the interface of all optimizers of this package, learned or hand-designed.

An `UpdateRule` is an `nn.Module` whose parameters are the meta-parameters. Its math is a pure function, so the same
code runs under `torch.func.vmap` and autograd in meta-training, in place behind `RuleOptimizer`, and in the analysis.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_lopt.rules.shards import TensorShard


class StepContext(NamedTuple):
    """What a rule knows about a step besides one tensor's gradient, state and value."""

    step: Tensor  # () updates of this tensor before this one, 0 at the first; in the dtype of the arithmetic
    loss: Tensor | None = None  # () the step's training loss; given to rules with needs_loss
    num_steps: Tensor | int | None = None  # the run's length in optimizer steps, None if unknown; () if a tensor
    shared: Any = None  # what the rule's `shared_context` returned; None for rules without needs_shared_context
    num_tensors: int | None = None  # how many tensors the net trains, where known; the same at each step of a tensor
    shard: TensorShard | None = None  # the shard that gradient, state and value cover; None for the whole tensor
    in_place: bool = False  # the state's tensors may be overwritten: their old values are not needed
    name: str | None = None  # of the tensor, None if unknown; always given to rules with needs_names
    role: str | None = None  # of the tensor in the net, one of `matrix.ROLES`; None if unknown
    known_step: int | None = None  # `step`, or the steps that were tried so far, where the host knows it
    run: Any = None  # the run's state, with this step in it; None for rules without needs_run_state
    waiting: Sequence[WaitingTensor] = ()  # for `shared_context` and `update_run_state`; frozen tensors, for instance

    def host_step(self) -> int | None:
        """The step as a Python number, for work that is not done in every step; None where vmap or a compiler runs.

        Waits for an accelerator unless `known_step` is given.

        Example:
            >>> StepContext(torch.tensor(20.0)).host_step(), StepContext(torch.tensor(20.0), known_step=21).host_step()
            (20, 21)
        """
        if self.known_step is not None or torch.compiler.is_compiling():
            return self.known_step
        try:
            return int(self.step)
        except RuntimeError:  # what vmap, and tensors without a value, raise
            return None


class WaitingTensor(NamedTuple):
    """A tensor of the net that has moved before, and has no gradient in this step."""

    state: Any
    param: Tensor  # in the dtype of the arithmetic


ConfigType = TypeVar("ConfigType", bound="RuleConfig")


class Source(NamedTuple):
    """Where a rule was loaded from: `rule.source`."""

    name: str  # bundled name, directory or Hub repo id
    revision: str | None  # commit sha, for a Hub repo


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Base of the rules' configurations: frozen, self-validating, JSON-serializable."""

    @classmethod
    def from_dict(cls: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
        """Build and validate a configuration; lists (as JSON has them) become tuples.

        Raises:
            ValueError: for an unknown name, or a value that is not allowed.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"Unknown config key {unknown[0]!r}; allowed are {sorted(known)}. Remove or rename it.")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def check(self, condition: bool, name: str, allowed: str) -> None:
        """Raise a ValueError naming the field, its value and what is allowed, unless `condition` holds."""
        if not condition:
            raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}.")

    def check_number(self, name: str, low: float = -math.inf, high: float = math.inf) -> None:
        """Require a finite real number between `low` and `high`."""
        value = getattr(self, name)
        self.check(_is_finite(value) and low <= value <= high, name, f"a number in [{low}, {high}]")

    def check_numbers(self, name: str, length: int, low: float = -math.inf, high: float = math.inf) -> None:
        """Require a tuple of `length` finite real numbers between `low` and `high`."""
        value = getattr(self, name)
        fits = isinstance(value, tuple) and len(value) == length
        fits = fits and all(_is_finite(x) and low <= x <= high for x in value)
        self.check(fits, name, f"{length} numbers in [{low}, {high}]")

    def check_integer(self, name: str, low: int, high: int) -> None:
        """Require an int between `low` and `high`."""
        value = getattr(self, name)
        self.check(type(value) is int and low <= value <= high, name, f"an integer in [{low}, {high}]")

    def check_flags(self, *names: str) -> None:
        """Require booleans."""
        for name in names:
            self.check(isinstance(getattr(self, name), bool), name, "true or false")


def _is_finite(value: object) -> bool:
    # An int beyond the floats counts as infinite. bool is an int to Python, but not here.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class UpdateRule(nn.Module):
    """A map from gradients to parameter updates; its `nn.Parameter`s are the meta-parameters.

    A subclass names its `Config`, creates its meta-parameters in `__init__`, and implements `init_state` and `update`.
    State is a `NamedTuple` of tensors, so that it is a pytree for vmap and can be stored flat, field by field.

    Most state belongs to a tensor, and is saved, moved and dropped with it. What belongs to the run, such as averages
    of its losses, is the *run's state*, for rules with `needs_run_state`: another NamedTuple of tensors, kept once.
    It goes on while tensors freeze and others join.
    """

    Config: ClassVar[type[RuleConfig]] = RuleConfig
    needs_loss: bool = False
    needs_shared_context: bool = False
    needs_names: bool = False
    needs_run_state: bool = False
    needs_num_steps: bool = False  # the run's length must be known: `StepContext.num_steps` is never None
    takes_shards: bool = False  # `update` is coordinatewise, except for what it asks of `shards.means`
    whole_state: frozenset[str] = frozenset()  # fields of the state that are not sharded
    average_fraction: float | None = None  # the last part of a run whose weights are averaged, in (0, 1]; None: none
    kind: str
    config: RuleConfig
    source: Source | None = None

    def __init__(self, config: RuleConfig | None = None, *, kind: str = "") -> None:
        super().__init__()
        self.config = config if config is not None else self.Config()
        self.kind = kind

    @property
    def uses_roles(self) -> bool:
        """Whether steps depend on `StepContext.role`; the optimizer then warns of matrices whose role is unknown."""
        return False

    def without_decay(self) -> UpdateRule:
        """The same rule without a weight decay of its own, if it has one; a copy. `weight_decay` is the key of it."""
        rule = copy.deepcopy(self)
        if getattr(rule.config, "weight_decay", 0.0):
            rule.config = dataclasses.replace(rule.config, **{"weight_decay": 0.0})
        return rule

    def init_state(self, param: Tensor) -> Any:
        """The state of a parameter before its first step: a NamedTuple of tensors of its dtype and on its device."""
        raise NotImplementedError(f"{type(self).__name__} must define init_state(param).")

    def init_run_state(self, like: Tensor) -> Any:
        """The run's state before its first step: a NamedTuple of tensors of the dtype of `like`, on its device."""
        raise NotImplementedError(f"{type(self).__name__} must define init_run_state(like).")

    def update_run_state(
        self, meta_params: Mapping[str, Tensor], run: Any, params: Mapping[str, Tensor], context: StepContext
    ) -> Any:
        """The run's state with a step in it; a pure function. Called once a step, before all else.

        Args:
            meta_params: name -> meta-parameter.
            run: what `init_run_state` or the last call returned.
            params: key -> value of each tensor that moves.
            context: as for `shared_context`, which gets the result as `context.run`, like `update`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define update_run_state(meta_params, run, params, context)."
        )

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Any]:
        """One step for one tensor, as a pure function.

        Args:
            meta_params: name -> meta-parameter, as `self.meta_params()` gives them.
            grad: gradient, any shape.
            state: what `init_state` or the last `update` returned.
            param: the parameter's value, shape of `grad`.
            context: step count, loss and run length.

        Returns:
            (delta, state): `param + delta` is the new parameter; delta has the shape of `grad`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define update(meta_params, grad, state, param, context)."
        )

    def shared_context(
        self,
        meta_params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        states: Mapping[str, Any],
        params: Mapping[str, Tensor],
        context: StepContext,
        *,
        in_place: bool = False,
    ) -> tuple[Any, dict[str, Any]]:
        """What the updates of one step have in common, computed from all tensors that move; a pure function, too.

        It is called before the updates, only for rules with `needs_shared_context`. It has no state of its own, but
        that of the tensors, and the run's.

        Args:
            meta_params: name -> meta-parameter.
            grads: any key -> gradient of a tensor.
            states: key -> its state, as for `update`.
            params: key -> its value.
            context: of the step; its `step` is that of the tensor with the most updates, and `waiting` has the tensors
                that have moved before, but not in this step.
            in_place: buffers of `states` may be overwritten, as long as `states` still allows taking the same step
                again: the safeguard may go back to them.

        Returns:
            (shared, states): `update` gets the former as `context.shared`, and starts from each tensor's new state.
        """
        return None, dict(states)

    def check_params(self, params: Iterable[Tensor]) -> None:
        """Raise a ValueError for parameters that the rule cannot train together. Called when an optimizer is made."""

    def terms(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        """The terms of this step's delta by name, for metrics and analysis; a single one unless a rule has several."""
        return {"blackbox": self.update(meta_params, grad, state, param, context)[0]}

    def meta_params(self) -> dict[str, Tensor]:
        """The meta-parameters by name, as `update` takes them."""
        if self._modules:
            return dict(self.named_parameters())
        # Asked at every step of an optimizer: walking through a module takes many times as long.
        return {name: param for name, param in self._parameters.items() if param is not None}

    def num_meta_params(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.parameters())

    def extra_repr(self) -> str:
        """Kind, size and configuration."""
        values = ", ".join(f"{k}={v}" for k, v in self.config.to_dict().items())
        return f"kind={self.kind!r}, {self.num_meta_params()} meta-parameters, {values}"


class Kind(NamedTuple):
    """An entry of the registry: a class, and the defaults in which the kind differs from it."""

    rule: type[UpdateRule]
    defaults: dict[str, Any]


REGISTRY: dict[str, Kind] = {}
RuleClass = TypeVar("RuleClass", bound=type[UpdateRule])


def register(kind: str, rule: type[UpdateRule], **defaults: Any) -> None:
    """Make `rule` known as `kind` to `make`, to saved files and to the command line.

    Args:
        kind: name in `config.json`; letters, digits and underscores.
        rule: the class.
        defaults: config values in which this kind differs from the class's defaults.

    Raises:
        ValueError: for a name that is not an identifier, or that another class has.
    """
    if not kind.isidentifier():
        raise ValueError(f"kind={kind!r} is not allowed: use letters, digits and underscores.")
    if kind in REGISTRY and REGISTRY[kind].rule.__qualname__ != rule.__qualname__:
        raise ValueError(f"kind={kind!r} is taken by {REGISTRY[kind].rule.__name__}; choose another name.")
    REGISTRY[kind] = Kind(rule, defaults)


def make(kind: str, **config: Any) -> UpdateRule:
    """A fresh rule with untrained meta-parameters (drawn from torch's global generator, as `nn.Linear` does).

    Args:
        kind: a registered kind, e.g. "star".
        config: values in which the rule differs from the kind's defaults.

    Raises:
        ValueError: unknown kind, unknown config key or a value out of range.

    Example:
        >>> import lightning_lopt as lopt
        >>> rule = lopt.rules.make("star", nominal_stepsize=1e-2)
        >>> rule.num_meta_params()
        207
    """
    if kind not in REGISTRY:
        raise ValueError(
            f"Unknown kind {kind!r}; known are {sorted(REGISTRY)}. Register a rule of your own by rules.register first."
        )
    rule, defaults = REGISTRY[kind]
    return rule(rule.Config.from_dict({**defaults, **config}), kind=kind)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's state and arithmetic: at least float32."""
    return torch.promote_types(dtype, torch.float32)
