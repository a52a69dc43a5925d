"""The dynamics of a rule's state: fixed points, linearization, modes as momenta, the linearized optimizer as a rule.

Maheswaranathan et al. 2021 (arXiv 2011.02159), sections 4.2 and 5.1, App. B and C. Near a fixed point h*

    h' = h* + J (h - h*) + B g,    delta = c + C (h - h*) - D g         J = R E R^-1

answers a unit gradient by -D at once and by C J^(k-1) B after k steps, that is by -sum_j alpha_j beta_j^k: one momentum
for each eigenvalue beta_j of J, with the learning rate alpha_j = -(C r_j)(l_j B) / beta_j. Where delta = w . h', as in
the paper, C = w J, and this is its -(w . r_j)(l_j B). What no mode accounts for of D is gradient descent (`direct`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from lightning_lopt.analysis.cells import LATE, Cell, State
from lightning_lopt.rules import StepContext, UpdateRule

FAST = 1e-9
"""Eigenvalues below this in size have no memory: their modes count as plain gradient descent."""


class FixedPoints(NamedTuple):
    """States that a constant gradient leaves (almost) as they are; float64, the best first."""

    states: Tensor  # (n, d)
    residuals: Tensor  # (n,) |F(h, g) - h|
    gradient: float


def visited_states(rule: UpdateRule, *, seed: int = 0, step: float = LATE) -> Tensor:
    """(n, d) states on the way of random gradients of sizes 1e-3 to 1, and of none, from the initial state on.

    Args:
        rule: any rule.
        seed: of the gradients.
        step: updates made before, for rules that depend on it.
    """
    cell, generator = Cell.of(rule, step=step), torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0.0, 1e-3, 1e-2, 1e-1, 1.0], dtype=torch.float64)
    grads = sizes * torch.randn(100, len(sizes), generator=generator, dtype=torch.float64)
    return cell.run(grads)[1][::5].flatten(0, 1)


def find_fixed_points(
    rule: UpdateRule,
    *,
    gradient: float = 0.0,
    initial_states: Tensor | None = None,
    tolerance: float = 1e-10,
    max_steps: int = 100,
    distance: float = 1e-3,
    outlier_scale: float = 10.0,
    step: float = LATE,
) -> FixedPoints:
    """Solve F(h, g) = h for h from many starts, by Levenberg-Marquardt in float64.

    The paper minimizes 1/2 |F(h, g) - h|^2 by Adam; the damped Newton steps find the same points to rounding, and on a
    line of fixed points, where J - I is singular, the nearest of them.

    Args:
        rule: any rule.
        gradient: g, held.
        initial_states: (n, d) to start from, those of a run for instance. Default: `visited_states`.
        tolerance: the largest |F(h, g) - h| of a fixed point.
        max_steps: of the search.
        distance: points closer than this to a better one are one with it.
        outlier_scale: points that are farther from the starts' mean than so many times the starts' own mean distance
            from it are dropped.
        step: updates made before, for rules that depend on it.

    Returns:
        What was found, none if nothing holds still.

    Example:
        >>> from lightning_lopt import rules
        >>> find_fixed_points(rules.make("gru", hidden_size=8)).states.shape
        torch.Size([1, 8])
    """
    cell = Cell.of(rule, step=step)
    starts = visited_states(rule, step=step) if initial_states is None else initial_states.detach().double()
    if starts.dim() != 2 or starts.shape[1] != cell.size:
        raise ValueError(
            f"initial_states of shape {tuple(starts.shape)} are not allowed: pass (n, {cell.size}), a state a row."
        )
    at = torch.tensor(gradient, dtype=torch.float64)
    points = _solve(lambda state: cell.step(state, at)[1] - state, starts, max_steps, 1e-3 * tolerance)
    with torch.no_grad():
        residuals = vmap(lambda state: cell.step(state, at)[1] - state)(points).norm(dim=1)
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
    """Levenberg-Marquardt on function(h) = 0, all points side by side: damping falls at a success, and rises else."""
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
    """A rule near one state, see the module's docstring. Modes are ordered by |eigenvalue|, the slowest first."""

    state: Tensor  # (d,) where; a fixed point, for the modes to mean something
    start: Tensor  # (d,) the rule's initial state
    jacobian: Tensor  # (d, d) J = dF/dh
    inputs: Tensor  # (d,) B = dF/dg
    outputs: Tensor  # (d,) C = d delta / dh
    feedthrough: float  # D = -d delta / dg
    offset: float  # c, the update without gradient: the readout's drift, 0 at a good fixed point
    eigenvalues: Tensor  # (d,) complex: beta_j
    vectors: Tensor  # (d, d) complex, columns r_j
    amplitudes: Tensor  # (d,) complex: alpha_j, conjugate for conjugate eigenvalues

    @property
    def timescales(self) -> Tensor:
        """(d,) |beta_j|, the momenta."""
        return self.eigenvalues.abs()

    @property
    def learning_rates(self) -> Tensor:
        """(d,) the real part of alpha_j, which is what mode j adds to the first step."""
        return self.amplitudes.real

    @property
    def direct(self) -> float:
        """The learning rate of plain gradient descent beside the modes: D - sum_j alpha_j."""
        return self.feedthrough - float(self.learning_rates.sum())

    @property
    def dominant(self) -> int:
        """The mode that moves a parameter farthest per unit of gradient: the largest |alpha_j / (1 - beta_j)|."""
        return int((self.amplitudes / (1 - self.eigenvalues)).abs().argmax())

    def response(self, steps: int) -> Tensor:
        """(steps,) the updates that a unit gradient in the first step causes."""
        powers = self.eigenvalues.unsqueeze(1) ** torch.arange(steps)
        answer = -(self.amplitudes.unsqueeze(1) * powers).sum(0).real
        answer[0] -= self.direct
        return answer

    def rule(self, modes: Sequence[int] | None = None, *, from_start: bool = True) -> LinearRule:
        """The linearized optimizer, to be run.

        Args:
            modes: which to keep; conjugate ones together. Default: all, and the drift `offset`.
            from_start: begin at the rule's initial state, else at the fixed point.
        """
        begin = (self.start - self.state) * float(from_start)
        if modes is None:
            return LinearRule(self.jacobian, self.inputs, self.outputs, self.feedthrough, self.offset, begin)
        chosen = list(modes)
        vectors, rows = self.vectors[:, chosen], torch.linalg.inv(self.vectors)[chosen]
        matrices = [(vectors * self.eigenvalues[chosen]) @ rows, vectors @ rows]
        if max(float(matrix.imag.abs().max()) for matrix in matrices) > 1e-6:
            raise ValueError(f"modes={chosen} have conjugates that are not among them: name both of a pair.")
        onto, learning_rate = matrices[1].real, float(self.learning_rates[chosen].sum())
        return LinearRule(matrices[0].real, onto @ self.inputs, self.outputs @ onto, learning_rate, 0.0, onto @ begin)


def linearize(
    rule: UpdateRule, state: State, *, gradient: float = 0.0, param: float = 0.0, step: float = LATE
) -> Linearization:
    """A rule's dynamics near a state as momenta: eigenvalues, timescales and learning rates.

    Args:
        rule: any rule.
        state: of one coordinate, a fixed point: a row of `FixedPoints.states`, or as for `update_function`.
        gradient: g*. Rules whose input has no derivative at 0 (`input_scaling="log1p"`, signs) want another one.
        param: value of the parameter, for rules that read it.
        step: updates made before, for rules that depend on it.

    Example:
        >>> import torch
        >>> from lightning_lopt import rules
        >>> rule = rules.make("gru", hidden_size=1, nominal_stepsize=1.0, nominal_grad_estimator="SGDM")
        >>> modes = linearize(rule, rule.init_state(torch.zeros(())))
        >>> round(modes.timescales[modes.dominant].item(), 4)  # the slowest of its momenta
        0.999
    """
    cell = Cell.of(rule, param=param, step=step, state=state)
    vector, at = cell.check(state), torch.tensor(gradient, dtype=torch.float64)
    slopes = {name: value.detach() for name, value in cell.jacobians(vector, at).items()}
    with torch.no_grad():
        offset = float(cell.step(vector, at)[0])
    J, B, C = slopes["F_h"], slopes["F_g"], slopes["D_h"]
    values, vectors = torch.linalg.eig(J)
    order = values.abs().argsort(descending=True)
    values, vectors = values[order], vectors[:, order]
    # A defective Jacobian has no inverse of eigenvectors; the pseudo-inverse gives what its eigenvectors can express.
    products = (C.to(values.dtype) @ vectors) * (torch.linalg.pinv(vectors, rtol=1e-13) @ B.to(values.dtype))
    slow = values.abs() > FAST
    amplitudes = torch.where(slow, -products / torch.where(slow, values, 1.0), 0.0)
    feedthrough = -float(slopes["D_g"])
    return Linearization(vector, cell.initial, J, B, C, feedthrough, offset, values, vectors, amplitudes)


class LinearState(NamedTuple):
    """State of one tensor."""

    x: Tensor  # (d, *shape) difference from the fixed point, minus `begin`


class LinearRule(UpdateRule):
    """delta = c + C x - D g, x' = J x + B g: momenta side by side, run as any rule. The matrices are meta-parameters.

    The state begins at `begin`, which is a meta-parameter too: what is kept is the difference from it, as in `GRURule`.

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
