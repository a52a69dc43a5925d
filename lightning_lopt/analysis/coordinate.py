"""A rule as a dynamical system of one coordinate: h' = F(h, g), delta = D(h, g).

This is Maheswaranathan et al. 2021 (arXiv 2011.02159), eqs. 1 and 2, for any rule. h is the rule's state for a
parameter with a single element, its floating-point tensors concatenated. For a component-wise rule (GRU, LSTM) this is
a complete description. A rule that pools over a tensor, like STAR's features, is described as it acts on a tensor of
one element; a context that all tensors share (the eigenvalues of `lstm_dmd`) is missing.

Integer counters are not part of h. `step` holds them fixed, so that a ring buffer keeps writing to the same place;
`run` lets them count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from lightning_lopt.rules import StepContext, UpdateRule

State = Any  # (d,) vector, or the NamedTuple that a rule keeps for a parameter of one element
LATE_STEP = 1000.0
"""Default step number for time-dependent rules, well after their first steps."""
WARMUP_STEPS = 128
"""Updates after which a state's counters are past the special cases of the first steps."""


class Jacobians(dict[str, Tensor]):
    """Derivatives of both maps at one state: `F_h (d, d)`, `F_g (d,)`, `D_h (d,)`, `D_g ()`."""


@dataclasses.dataclass(frozen=True)
class CoordinateDynamics:
    """A rule's dynamics of one coordinate, in float64. Methods can be mapped over leading axes with `torch.func.vmap`.

    Example:
        >>> import torch
        >>> from lightning_lopt import rules
        >>> dynamics = CoordinateDynamics.from_rule(rules.make("gru", hidden_size=8))
        >>> delta, state = dynamics.step(dynamics.initial, torch.tensor(1.0, dtype=torch.float64))
        >>> dynamics.size, delta.shape, state.shape
        (8, torch.Size([]), torch.Size([8]))
    """

    rule: UpdateRule
    meta_params: Mapping[str, Tensor]
    param: Tensor  # () the parameter's value, for rules that read it
    step_number: Tensor  # () updates made so far
    counters: Any  # a state of one element, whose integer fields `step` holds fixed

    @classmethod
    def from_rule(
        cls, rule: UpdateRule, *, param: float = 0.0, step: float = LATE_STEP, state: State = None
    ) -> CoordinateDynamics:
        """Make the dynamics of a rule with its current meta-parameters.

        Args:
            rule: any rule.
            param: value of the parameter.
            step: updates made so far, for rules that depend on it.
            state: the state whose counters are held fixed (default: a state after some warm-up).
        """
        value = torch.tensor(param, dtype=torch.float64)
        dynamics = cls(
            rule=rule,
            meta_params={name: value.detach().double() for name, value in rule.meta_params().items()},
            param=value,
            step_number=torch.tensor(step, dtype=torch.float64),
            counters=rule.init_state(value),
        )
        counters = dynamics._warmed_up() if state is None or isinstance(state, Tensor) else state
        return dataclasses.replace(dynamics, counters=counters)

    @property
    def initial(self) -> Tensor:
        """(d,) the state before the first step."""
        return self.pack(self.rule.init_state(self.param))

    @property
    def size(self) -> int:
        """The size d of a state."""
        return self.initial.numel()

    def pack(self, state: State) -> Tensor:
        """Concatenate the floating-point fields of a state to a vector (d,); a vector is returned in float64."""
        if isinstance(state, Tensor):
            return state.double()
        return self._concatenate(state).detach().double()

    def unpack(self, vector: Tensor) -> Any:
        """Rebuild the rule's state from a vector (d,), with the fixed counters."""
        template = self.rule.init_state(self.param)
        position = 0
        fields = []
        for leaf, counter in zip(template, self.counters, strict=True):
            if leaf.is_floating_point():
                fields.append(vector[position : position + leaf.numel()].reshape(leaf.shape))
                position += leaf.numel()
            else:
                fields.append(counter.reshape(leaf.shape))
        return type(template)(*fields)

    def step(self, state: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Map a state (d,) and a gradient () to the update delta () and the next state (d,)."""
        delta, after = self._update(self.unpack(state), grad, self.param, self.step_number)
        return delta, self._concatenate(after)

    def check(self, state: State) -> Tensor:
        """Return a caller's state as a vector (d,) in float64.

        Raises:
            ValueError: if its size is not that of the rule's state for one element.
        """
        vector = self.pack(state).detach()
        if vector.shape != (self.size,):
            raise ValueError(
                f"state has shape {tuple(vector.shape)}, but the state of this "
                f"{self.rule.kind or type(self.rule).__name__} has shape ({self.size},) for one coordinate. Pass "
                "rule.init_state(torch.zeros(())), a state that rule.update returned for it, or a row of "
                "FixedPoints.states."
            )
        return vector

    def jacobians(self, state: Tensor, grad: Tensor) -> Jacobians:
        """Differentiate both maps at a state (d,) and a gradient ()."""
        (d_h, d_g), (f_h, f_g) = jacrev(self.step, argnums=(0, 1))(state, grad)
        return Jacobians(F_h=f_h, F_g=f_g, D_h=d_h, D_g=d_g)

    def run(
        self, grads: Tensor, start: Tensor | None = None, params: Tensor | None = None, first: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run n coordinates on given gradients.

        Args:
            grads: (steps, n) gradients.
            start: (d,) or (n, d) states to start from (default: the initial state).
            params: (steps, n) values of the parameters, for rules that read them.
            first: number of the first step (default: `step_number` at every step).

        Returns:
            The updates (steps, n), and the states (steps + 1, n, d) from the start on.
        """
        # A run from the initial state starts its counters at their initial values too.
        begin = self if start is not None else dataclasses.replace(self, counters=self.rule.init_state(self.param))
        rows = (self.initial if start is None else start).double().expand(grads.shape[1], self.size)
        params = torch.full_like(grads, float(self.param)) if params is None else params
        update = vmap(self._update, in_dims=(0, 0, 0, None))
        deltas = []
        states = [rows]
        with torch.no_grad():
            state = vmap(begin.unpack)(rows)
            for index, (grad, param) in enumerate(zip(grads.double(), params.double(), strict=True)):
                number = self.step_number if first is None else torch.full_like(self.step_number, first + index)
                delta, state = update(state, grad, param, number)
                deltas.append(delta)
                states.append(vmap(self._concatenate)(state))
        return torch.stack(deltas), torch.stack(states)

    def _update(self, state: Any, grad: Tensor, param: Tensor, number: Tensor) -> tuple[Tensor, Any]:
        context = StepContext(number, torch.ones_like(grad) if self.rule.needs_loss else None)
        return self.rule.update(self.meta_params, grad, state, param, context)

    @staticmethod
    def _concatenate(state: Any) -> Tensor:
        return torch.cat([leaf.reshape(-1) for leaf in state if leaf.is_floating_point()])

    def _warmed_up(self) -> Any:
        """A state after `WARMUP_STEPS` updates without gradient; the initial one if it has no counters."""
        first = state = self.rule.init_state(self.param)
        zero = torch.zeros_like(self.param)
        with torch.no_grad():
            for number in range(WARMUP_STEPS):
                _, state = self._update(state, zero, self.param, torch.full_like(self.step_number, number))
                counters = [
                    (before, after)
                    for before, after in zip(first, state, strict=True)
                    if not before.is_floating_point()
                ]
                if all(torch.equal(before, after) for before, after in counters):
                    return first
        return state
