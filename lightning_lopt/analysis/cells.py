"""A rule as a dynamical system of one coordinate: h' = F(h, g), delta = D(h, g).

Maheswaranathan et al. 2021 (arXiv 2011.02159), eqs. 1 and 2, for any rule: h is the state that the rule keeps for a
parameter of a single number, its floating tensors one behind the other. Of a component-wise rule (GRU, LSTM) this is
all there is. A rule that pools over a tensor, as STAR's features do, is seen as it acts on a tensor of one number; what
all tensors share (the eigenvalues of `lstm_dmd`) is absent. Counters, which are no floating numbers, are no part of h:
`step` holds them where they are (a ring buffer then writes to one place again and again), `run` lets them count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from lightning_lopt.rules import StepContext, UpdateRule

State = Any  # (d,) vector, or the NamedTuple that a rule keeps for a parameter of one number
LATE = 1000.0
"""Updates made so far, as time-dependent rules are told unless a caller says otherwise: beyond their first steps."""
WARM = 128
"""Updates after which a state's counters have passed what is particular to the first ones."""


class Jacobians(dict[str, Tensor]):
    """Derivatives at one state: `F_h (d, d)`, `F_g (d,)`, `D_h (d,)`, `D_g ()`."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A rule's dynamics on one coordinate, in float64; everything maps over leading axes with `torch.func.vmap`.

    Example:
        >>> import torch
        >>> from lightning_lopt import rules
        >>> cell = Cell.of(rules.make("gru", hidden_size=8))
        >>> delta, state = cell.step(cell.initial, torch.tensor(1.0, dtype=torch.float64))
        >>> cell.size, delta.shape, state.shape
        (8, torch.Size([]), torch.Size([8]))
    """

    rule: UpdateRule
    meta_params: Mapping[str, Tensor]
    param: Tensor  # () the parameter's value, for rules that read it
    step_number: Tensor  # () updates made before
    frame: Any  # a state of one number, whose counters `step` holds

    @classmethod
    def of(cls, rule: UpdateRule, *, param: float = 0.0, step: float = LATE, state: State = None) -> Cell:
        """The cell of a rule with its present meta-parameters.

        Args:
            rule: any rule.
            param: value of the parameter.
            step: updates made before, for rules that depend on it.
            state: whose counters to hold, if it has some. Default: those of a state some way on.
        """
        meta_params = {name: value.detach().double() for name, value in rule.meta_params().items()}
        value, number = (torch.tensor(scalar, dtype=torch.float64) for scalar in (param, step))
        cell = cls(rule, meta_params, value, number, rule.init_state(value))
        late = cell._late() if state is None or isinstance(state, Tensor) else state
        return dataclasses.replace(cell, frame=late)

    @property
    def initial(self) -> Tensor:
        """(d,) the state before the first step."""
        return self.pack(self.rule.init_state(self.param))

    @property
    def size(self) -> int:
        """Numbers in a state, d."""
        return self.initial.numel()

    def pack(self, state: State) -> Tensor:
        """(d,) the floating numbers of a state.

        Args:
            state: a vector, which is returned in float64; or the state of a parameter of one number.

        Raises:
            ValueError: if it has another number of entries than the rule's state of one number.
        """
        if isinstance(state, Tensor):
            return state.double()
        return self._floats(state).detach().double()

    def unpack(self, vector: Tensor) -> Any:
        """The rule's own state from its floating numbers (d,); counters are those of the frame."""
        template, position, fields = self.rule.init_state(self.param), 0, []
        for leaf, held in zip(template, self.frame, strict=True):
            if leaf.is_floating_point():
                fields.append(vector[position : position + leaf.numel()].reshape(leaf.shape))
                position += leaf.numel()
            else:
                fields.append(held.reshape(leaf.shape))
        return type(template)(*fields)

    def step(
        self, state: Tensor, grad: Tensor, param: Tensor | None = None, number: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(delta, next state) from a state (d,) and a gradient (); the parameter and the step where they matter."""
        param, number = self.param if param is None else param, self.step_number if number is None else number
        delta, after = self._update(self.unpack(state), grad, param, number)
        return delta, self._floats(after)

    def check(self, state: State) -> Tensor:
        """(d,) a caller's state, in float64."""
        vector = self.pack(state).detach()
        if vector.shape != (self.size,):
            raise ValueError(
                f"state has {tuple(vector.shape)} numbers, and this {self.rule.kind or type(self.rule).__name__} keeps "
                f"({self.size},) for one coordinate. Pass rule.init_state(torch.zeros(())), what the rule made of it, "
                "or a row of FixedPoints.states."
            )
        return vector

    def jacobians(self, state: Tensor, grad: Tensor) -> Jacobians:
        """Derivatives of both maps, at a state (d,) and a gradient ()."""
        (d_h, d_g), (f_h, f_g) = jacrev(self.step, argnums=(0, 1))(state, grad)
        return Jacobians(F_h=f_h, F_g=f_g, D_h=d_h, D_g=d_g)

    def run(
        self, grads: Tensor, start: Tensor | None = None, params: Tensor | None = None, first: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Drive many coordinates by given gradients.

        Args:
            grads: (steps, n).
            start: (d,) or (n, d); the initial state by default.
            params: (steps, n) values of the parameters, for rules that read them.
            first: number of the first step; by default the cell's own number throughout.

        Returns:
            deltas (steps, n) and states (steps + 1, n, d), the start's first.
        """
        begin = self if start is not None else dataclasses.replace(self, frame=self.rule.init_state(self.param))
        rows = (self.initial if start is None else start).double().expand(grads.shape[1], self.size)
        params = torch.full_like(grads, float(self.param)) if params is None else params
        stepper, deltas, states = vmap(self._update, in_dims=(0, 0, 0, None)), [], [rows]
        with torch.no_grad():
            state = vmap(begin.unpack)(rows)
            for index, (grad, param) in enumerate(zip(grads.double(), params.double(), strict=True)):
                number = self.step_number if first is None else torch.full_like(self.step_number, first + index)
                delta, state = stepper(state, grad, param, number)
                deltas.append(delta)
                states.append(vmap(self._floats)(state))
        return torch.stack(deltas), torch.stack(states)

    def _update(self, state: Any, grad: Tensor, param: Tensor, number: Tensor) -> tuple[Tensor, Any]:
        context = StepContext(number, torch.ones_like(grad) if self.rule.needs_loss else None)
        return self.rule.update(self.meta_params, grad, state, param, context)

    @staticmethod
    def _floats(state: Any) -> Tensor:
        return torch.cat([leaf.reshape(-1) for leaf in state if leaf.is_floating_point()])

    def _late(self) -> Any:
        """A state whose counters have counted; the initial one where there are none."""
        first = state = self.rule.init_state(self.param)
        zero = torch.zeros_like(self.param)
        with torch.no_grad():
            for number in range(WARM):
                _, state = self._update(state, zero, self.param, torch.full_like(self.step_number, number))
                counting = (
                    not torch.equal(*pair) for pair in zip(first, state, strict=True) if not pair[0].is_floating_point()
                )
                if not any(counting):
                    return first
        return state
