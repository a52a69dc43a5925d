"""Fixed points of a rule's state, its linearization, modes as momenta, and the linearized optimizer as a rule.

Source: Maheswaranathan et al. 2021 (arXiv 2011.02159), sections 4.2 and 5.1, App. B and C. Near a fixed point h* the
rule is approximately linear,

    h' = h* + J (h - h*) + B g,    delta = c + C (h - h*) - D g         J = R E R^-1

Its response to a unit gradient is -D in the same step and C J^(k-1) B after k steps, that is -sum_j alpha_j beta_j^k.
So each eigenvalue beta_j of J is a momentum with the learning rate alpha_j = -(C r_j)(l_j B) / beta_j, where r_j are
the columns of R and l_j the rows of R^-1. In the paper delta = w . h', so that C = w J and alpha_j = -(w . r_j)(l_j B).
The part of D that the modes do not explain is plain gradient descent (`direct`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from lightning_lopt.analysis.coordinate import LATE_STEP, CoordinateDynamics, State
from lightning_lopt.rules import StepContext, UpdateRule

FAST = 1e-9
"""Modes with smaller |eigenvalue| have no memory and count as plain gradient descent."""


class FixedPoints(NamedTuple):
    """States that a constant gradient leaves (almost) unchanged, in float64, ordered by residual."""

    states: Tensor  # (n, d)
    residuals: Tensor  # (n,) |F(h, g) - h|
    gradient: float


def visited_states(rule: UpdateRule, *, seed: int = 0, step: float = LATE_STEP) -> Tensor:
    """Collect (n, d) states from runs on random gradients of sizes 0 and 1e-3 to 1.

    Args:
        rule: any rule.
        seed: seed of the gradients.
        step: updates made so far, for rules that depend on it.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0.0, 1e-3, 1e-2, 1e-1, 1.0], dtype=torch.float64)
    grads = sizes * torch.randn(100, len(sizes), generator=generator, dtype=torch.float64)
    _, states = CoordinateDynamics.from_rule(rule, step=step).run(grads)
    return states[::5].flatten(0, 1)


def find_fixed_points(
    rule: UpdateRule,
    *,
    gradient: float = 0.0,
    initial_states: Tensor | None = None,
    tolerance: float = 1e-10,
    max_steps: int = 100,
    distance: float = 1e-3,
    outlier_scale: float = 10.0,
    step: float = LATE_STEP,
) -> FixedPoints:
    """Solve F(h, g) = h for h from many starts, by Levenberg-Marquardt in float64.

    The paper minimizes 1/2 |F(h, g) - h|^2 with Adam. Damped Newton steps find the same points up to rounding; on a
    line of fixed points, where J - I is singular, they find the nearest one.

    Args:
        rule: any rule.
        gradient: the constant gradient g.
        initial_states: (n, d) states to start from, for instance those of a run (default: `visited_states`).
        tolerance: the largest |F(h, g) - h| of a fixed point.
        max_steps: maximum number of steps of the search.
        distance: points closer than this to a better one are merged into it.
        outlier_scale: drop points whose distance from the mean of the starts is more than so many times the mean
            distance of the starts from it.
        step: updates made so far, for rules that depend on it.

    Returns:
        The distinct fixed points; there may be none.

    Example:
        >>> from lightning_lopt import rules
        >>> find_fixed_points(rules.make("gru", hidden_size=8)).states.shape
        torch.Size([1, 8])
    """
    dynamics = CoordinateDynamics.from_rule(rule, step=step)
    starts = visited_states(rule, step=step) if initial_states is None else initial_states.detach().double()
    if starts.dim() != 2 or starts.shape[1] != dynamics.size:
        raise ValueError(
            f"initial_states of shape {tuple(starts.shape)} are not allowed: pass (n, {dynamics.size}), one state per "
            "row."
        )
    at = torch.tensor(gradient, dtype=torch.float64)

    def change(state: Tensor) -> Tensor:
        return dynamics.step(state, at)[1] - state

    points = _solve(change, starts, max_steps, 1e-3 * tolerance)
    with torch.no_grad():
        residuals = vmap(change)(points).norm(dim=1)
    center = starts.mean(0)
    reach = outlier_scale * (starts - center).norm(dim=1).mean().clamp(min=distance)
    good = (residuals <= tolerance) & ((points - center).norm(dim=1) <= reach)
    points, residuals = points[good], residuals[good]
    order = residuals.argsort()
    kept: list[int] = []
    for index in order.tolist():
        if not kept or float((points[kept] - points[index]).norm(dim=1).min()) > distance:
            kept.append(index)
    return FixedPoints(points[kept], residuals[kept], gradient)


def _solve(function: Any, points: Tensor, max_steps: int, tolerance: float) -> Tensor:
    """Solve function(h) = 0 by Levenberg-Marquardt for all points at once. Damping falls on success, and else rises."""
    identity = torch.eye(points.shape[1], dtype=points.dtype)
    damping = torch.full((len(points),), 1e-2, dtype=points.dtype)
    with torch.no_grad():
        for _ in range(max_steps):
            values = vmap(function)(points)
            if bool((values.norm(dim=1) <= tolerance).all()):
                break
            slopes = vmap(jacrev(function))(points)
            normal = slopes.mT @ slopes + damping.reshape(-1, 1, 1) * identity
            moved = points - torch.linalg.solve(normal, (slopes.mT @ values.unsqueeze(-1))).squeeze(-1)
            better = vmap(function)(moved).norm(dim=1) < values.norm(dim=1)
            points = torch.where(better.unsqueeze(1), moved, points)
            damping = torch.where(better, damping / 5, damping * 4).clamp(1e-15, 1e6)
            if not bool(better.any()) and bool((damping >= 1e6).all()):
                break
    return points


@dataclasses.dataclass(frozen=True)
class Linearization:
    """The linearization of a rule at one state; the symbols are those of the module's docstring.

    Modes are ordered by |eigenvalue|, the slowest first.
    """

    state: Tensor  # (d,) h*; the modes are meaningful if it is a fixed point
    start: Tensor  # (d,) the rule's initial state
    jacobian: Tensor  # (d, d) J = dF/dh
    inputs: Tensor  # (d,) B = dF/dg
    outputs: Tensor  # (d,) C = d delta / dh
    feedthrough: float  # D = -d delta / dg
    offset: float  # c, the update without a gradient; 0 at a good fixed point
    eigenvalues: Tensor  # (d,) complex beta_j
    vectors: Tensor  # (d, d) complex, with the columns r_j
    amplitudes: Tensor  # (d,) complex alpha_j, conjugate for conjugate eigenvalues

    @property
    def timescales(self) -> Tensor:
        """(d,) |beta_j|, the momenta."""
        return self.eigenvalues.abs()

    @property
    def learning_rates(self) -> Tensor:
        """(d,) the real part of alpha_j, which is the contribution of mode j to the first step."""
        return self.amplitudes.real

    @property
    def direct(self) -> float:
        """The learning rate of plain gradient descent beside the modes, D - sum_j alpha_j."""
        return self.feedthrough - float(self.learning_rates.sum())

    @property
    def reach(self) -> Tensor:
        """(d,) |alpha_j / (1 - beta_j)|, how far mode j finally moves a parameter per unit of gradient."""
        return (self.amplitudes / (1 - self.eigenvalues)).abs()

    @property
    def dominant(self) -> int:
        """The mode that moves a parameter farthest per unit of gradient."""
        return int(self.reach.argmax())

    def response(self, steps: int) -> Tensor:
        """Return (steps,) the updates that follow a unit gradient in the first step."""
        powers = self.eigenvalues.unsqueeze(1) ** torch.arange(steps)
        updates = -(self.amplitudes.unsqueeze(1) * powers).sum(0).real
        updates[0] -= self.direct
        return updates

    def rule(self, modes: Sequence[int] | None = None, *, from_start: bool = True) -> LinearRule:
        """Make the linearized optimizer as an update rule.

        Args:
            modes: the modes to keep, with both of a conjugate pair (default: all modes and the `offset`).
            from_start: begin at the rule's initial state, else at the fixed point.
        """
        begin = (self.start - self.state) * float(from_start)
        if modes is None:
            return LinearRule(self.jacobian, self.inputs, self.outputs, self.feedthrough, self.offset, begin)
        chosen = list(modes)
        right = self.vectors[:, chosen]
        left = torch.linalg.inv(self.vectors)[chosen]
        jacobian = (right * self.eigenvalues[chosen]) @ left
        projection = right @ left
        if max(float(matrix.imag.abs().max()) for matrix in (jacobian, projection)) > 1e-6:
            raise ValueError(f"modes={chosen} is not allowed: it lacks a conjugate mode. Pass both modes of a pair.")
        onto = projection.real
        return LinearRule(
            jacobian=jacobian.real,
            inputs=onto @ self.inputs,
            outputs=self.outputs @ onto,
            feedthrough=float(self.learning_rates[chosen].sum()),
            offset=0.0,
            begin=onto @ begin,
        )


def linearize(
    rule: UpdateRule, state: State, *, gradient: float = 0.0, param: float = 0.0, step: float = LATE_STEP
) -> Linearization:
    """Linearize a rule's dynamics at a state, to read them as momenta with timescales and learning rates.

    Args:
        rule: any rule.
        state: state of one coordinate, normally a fixed point: a row of `FixedPoints.states`, or as for
            `update_function`.
        gradient: gradient at which to linearize. Rules whose input has no derivative at 0 (`input_scaling="log1p"`,
            signs) need another value.
        param: value of the parameter, for rules that read it.
        step: updates made so far, for rules that depend on it.

    Example:
        >>> import torch
        >>> from lightning_lopt import rules
        >>> rule = rules.make("gru", hidden_size=1, nominal_stepsize=1.0, nominal_grad_estimator="SGDM")
        >>> modes = linearize(rule, rule.init_state(torch.zeros(())))
        >>> round(modes.timescales[modes.dominant].item(), 4)  # the slowest of its momenta
        0.999
    """
    dynamics = CoordinateDynamics.from_rule(rule, param=param, step=step, state=state)
    vector = dynamics.check(state)
    at = torch.tensor(gradient, dtype=torch.float64)
    slopes = {name: value.detach() for name, value in dynamics.jacobians(vector, at).items()}
    with torch.no_grad():
        offset = float(dynamics.step(vector, at)[0])
    J, B, C = slopes["F_h"], slopes["F_g"], slopes["D_h"]
    values, vectors = torch.linalg.eig(J)
    order = values.abs().argsort(descending=True)
    values, vectors = values[order], vectors[:, order]
    # A defective Jacobian has no invertible matrix of eigenvectors. The pseudo-inverse covers the part of the dynamics
    # that its eigenvectors span.
    products = (C.to(values.dtype) @ vectors) * (torch.linalg.pinv(vectors, rtol=1e-13) @ B.to(values.dtype))
    slow = values.abs() > FAST
    return Linearization(
        state=vector,
        start=dynamics.initial,
        jacobian=J,
        inputs=B,
        outputs=C,
        feedthrough=-float(slopes["D_g"]),
        offset=offset,
        eigenvalues=values,
        vectors=vectors,
        amplitudes=torch.where(slow, -products / torch.where(slow, values, 1.0), 0.0),
    )


class LinearState(NamedTuple):
    """State of one tensor."""

    x: Tensor  # (d, *shape) difference from the fixed point, minus `begin`


class LinearRule(UpdateRule):
    """The linear rule delta = c + C x - D g, x' = J x + B g: several momenta in parallel. Its matrices are parameters.

    x starts at `begin`, a meta-parameter too. The stored state is the difference from it, as in `GRURule`.

    Args:
        jacobian: (d, d) J.
        inputs: (d,) B.
        outputs: (d,) C.
        feedthrough: D.
        offset: c.
        begin: (d,) x before the first step.
    """

    begin: nn.Parameter

    def __init__(
        self, jacobian: Tensor, inputs: Tensor, outputs: Tensor, feedthrough: float, offset: float, begin: Tensor
    ) -> None:
        super().__init__(kind="linear")
        values: dict[str, Any] = {"jacobian": jacobian, "inputs": inputs, "outputs": outputs, "begin": begin}
        values |= {"feedthrough": torch.tensor(feedthrough), "offset": torch.tensor(offset)}
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.detach().double(), requires_grad=False))

    def init_state(self, param: Tensor) -> LinearState:
        """Zeros."""
        return LinearState(param.new_zeros((len(self.begin), *param.shape)))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: LinearState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, LinearState]:
        """One step, in the dtype of the gradient."""
        at = {name: value.to(grad.dtype) for name, value in meta_params.items()}
        begin = at["begin"].reshape(-1, *[1] * grad.dim())
        x = state.x + begin
        delta = at["offset"] + torch.tensordot(at["outputs"], x, dims=1) - at["feedthrough"] * grad
        x = torch.tensordot(at["jacobian"], x, dims=1) + at["inputs"].reshape(-1, *[1] * grad.dim()) * grad
        return delta, LinearState(x - begin)
