"""The analysis of optimizers with known dynamics: momentum, Adam's moments, linear recurrences."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_lopt import analysis
from lightning_lopt.analysis import CoordinateDynamics, find_fixed_points, linearize, update_function
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import REGISTRY, StepContext, UpdateRule, make
from lightning_lopt.tasks import make as make_task

F64 = torch.float64
CONTEXT = StepContext(torch.tensor(0.0))


class HiddenState(NamedTuple):
    """State of one tensor."""

    h: Tensor  # (d, *shape)


class HiddenMomenta(UpdateRule):
    """Momenta v_j' = beta_j v_j + g, x' = x - sum_j alpha_j v_j' in a random basis, with a tanh of the gradient.

    F(h, g) = M^-1 (B M (h - center) + 1 tanh(g)) + center: neither modes nor fixed point are where one would look.
    """

    def __init__(self, betas: Tensor, alphas: Tensor, seed: int = 0, reach: float = 1.0) -> None:
        super().__init__(kind="hidden_momenta")
        self.reach = reach
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(len(betas), len(betas), generator=generator, dtype=F64)
        self.center = nn.Parameter(torch.randn(len(betas), generator=generator, dtype=F64))
        self.jacobian = nn.Parameter(torch.linalg.inv(mixing) @ torch.diag(betas) @ mixing)
        self.inputs = nn.Parameter(torch.linalg.inv(mixing) @ torch.ones(len(betas), dtype=F64))
        self.readout = nn.Parameter(-alphas @ mixing)

    def init_state(self, param: Tensor) -> HiddenState:
        return HiddenState(param.new_zeros((len(self.center), *param.shape)))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> tuple[Tensor, HiddenState]:
        w = {name: value.to(grad.dtype) for name, value in meta_params.items()}
        center = w["center"].reshape(-1, *[1] * grad.dim())
        moved = torch.tensordot(w["jacobian"], state.h - center, dims=1)
        h = center + moved + w["inputs"].reshape(-1, *[1] * grad.dim()) * (self.reach * torch.tanh(grad / self.reach))
        return torch.tensordot(w["readout"], h - center, dims=1), HiddenState(h)


BETAS = torch.tensor([0.95, 0.7, 0.3, -0.2], dtype=F64)
ALPHAS = torch.tensor([0.4, 3.7585, 0.02, 0.1], dtype=F64)


def momentum_losses(rule: UpdateRule, steps: int = 60) -> Tensor:
    """Losses (steps, runs) on quadratics."""
    task = make_task("linear-regression", log10_range=(-2.0, 0.0))
    unroll, generator = Unroll(rule, task, objective="raw", tell_horizon=False), torch.Generator().manual_seed(0)
    inner = unroll.start(generator, torch.full((4,), steps + 1))
    with torch.no_grad():
        _, record = unroll.run(rule.meta_params(), inner, steps, generator, lambda n: torch.full((n,), steps + 1))
    return record.losses


# --- fixed points and modes


def test_linear_momenta_are_recovered():
    rule = HiddenMomenta(BETAS, ALPHAS)
    points = find_fixed_points(rule)
    assert points.states.shape == (1, 4)
    torch.testing.assert_close(points.states[0], rule.center.detach(), rtol=0, atol=1e-9)
    modes = linearize(rule, points.states[0])
    torch.testing.assert_close(modes.eigenvalues.real, BETAS, rtol=0, atol=1e-6)
    torch.testing.assert_close(modes.timescales, BETAS.abs(), rtol=0, atol=1e-6)
    torch.testing.assert_close(modes.learning_rates, ALPHAS, rtol=0, atol=1e-6)
    assert modes.eigenvalues.imag.abs().max() < 1e-9
    assert modes.direct == pytest.approx(0, abs=1e-9)
    assert modes.offset == pytest.approx(0, abs=1e-9)
    assert modes.dominant == 1  # 3.76 / 0.3 is more than 0.4 / 0.05


def test_a_conjugate_pair_is_recovered():
    angle, size = 0.6, 0.9
    rule = HiddenMomenta(torch.ones(2, dtype=F64), torch.tensor([1.0, 0.5], dtype=F64))
    with torch.no_grad():
        rule.jacobian.copy_(
            size * torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=F64)
        )
    modes = linearize(rule, rule.center)
    torch.testing.assert_close(modes.timescales, torch.full((2,), size, dtype=F64))
    assert modes.eigenvalues.angle().abs().tolist() == pytest.approx([angle, angle])
    first, second = modes.amplitudes.tolist()
    assert first == pytest.approx(second.conjugate())
    # The response of all modes together equals that of the recurrence at every step.
    grads = torch.zeros(20, 1, dtype=F64)
    grads[0] = 1e-5
    deltas, _ = CoordinateDynamics.from_rule(rule).run(grads, start=rule.center.detach())
    torch.testing.assert_close(modes.response(20), deltas[:, 0] / 1e-5, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="lacks a conjugate mode. Pass both modes of a pair"):
        modes.rule([0])


def test_modes_of_a_rule_with_plain_gradient_descent_beside_its_momentum():
    """AggMo and SGD, as the nominal terms of a GRU whose network returns 0."""
    rule = make("gru", hidden_size=1, nominal_stepsize=0.3, nominal_grad_estimator="AggMo")
    modes = linearize(rule, rule.init_state(torch.zeros(())))
    slow = modes.learning_rates.abs() > 1e-9
    torch.testing.assert_close(modes.timescales[slow], torch.tensor([0.999, 0.99, 0.9], dtype=F64))
    torch.testing.assert_close(modes.learning_rates[slow], 0.1 * torch.tensor([0.001, 0.01, 0.1], dtype=F64))
    plain = make("gru", hidden_size=1, nominal_stepsize=0.3, nominal_grad_estimator="SGD")
    modes = linearize(plain, plain.init_state(torch.zeros(())))
    assert modes.direct == pytest.approx(0.3)
    assert modes.learning_rates.abs().max() < 1e-12
    assert modes.response(3).tolist() == pytest.approx([-0.3, 0.0, 0.0])


def test_the_linearized_rule_runs_as_the_rule_does():
    rule = HiddenMomenta(BETAS[1:], 0.1 * ALPHAS[1:], reach=1e3)
    modes = linearize(rule, rule.center)
    expected = momentum_losses(rule)
    torch.testing.assert_close(momentum_losses(modes.rule()), expected, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(momentum_losses(modes.rule([0, 1, 2])), expected, rtol=1e-3, atol=1e-8)
    # One mode alone is that momentum.
    alone = HiddenMomenta(BETAS[1:2], 0.1 * ALPHAS[1:2], reach=1e3)
    single = momentum_losses(modes.rule([0], from_start=False))
    torch.testing.assert_close(
        single, momentum_losses(linearize(alone, alone.center).rule(from_start=False)), rtol=1e-3, atol=1e-8
    )


def test_exactly_the_fixed_points_are_found():
    class Cubic(HiddenMomenta):
        """h' = h - 0.5 (h^3 - h): fixed points -1, 0 and 1; with a gradient, h' = h + 0.1 + ...: none near."""

        def update(self, meta_params, grad, state, param, context):
            h = state.h - 0.5 * (state.h**3 - state.h) + grad
            return h[0], HiddenState(h)

    rule = Cubic(BETAS[:1], ALPHAS[:1])
    starts = torch.linspace(-1.5, 1.5, 31, dtype=F64).unsqueeze(1)
    points = find_fixed_points(rule, initial_states=starts)
    assert sorted(points.states.flatten().tolist()) == pytest.approx([-1, 0, 1], abs=1e-8)
    assert points.residuals.max() <= 1e-10
    shifted = find_fixed_points(rule, gradient=0.05, initial_states=starts)
    for state in shifted.states.flatten().tolist():
        assert 0.5 * (state**3 - state) == pytest.approx(0.05)
    assert len(find_fixed_points(rule, initial_states=starts[:1], outlier_scale=1e-9).states) == 0

    class Drift(HiddenMomenta):
        def update(self, meta_params, grad, state, param, context):
            return grad, HiddenState(state.h + 1)

    assert find_fixed_points(Drift(BETAS[:1], ALPHAS[:1]), initial_states=starts).states.shape == (0, 1)
    with pytest.raises(ValueError, match=r"pass \(n, 1\)"):
        find_fixed_points(rule, initial_states=torch.zeros(3))


# --- responses


def test_update_functions_are_the_rules_updates():
    for rule in (make("lstm", hidden_size=5), make("star", nominal_stepsize=1e-2), make("mng")):
        param = torch.zeros(())
        meta_params, state = rule.meta_params(), rule.init_state(param)
        with torch.no_grad():
            for grad in (0.3, -1.0, 0.2):
                _, state = rule.update(meta_params, torch.tensor(grad), state, param, CONTEXT)
            grads = torch.linspace(-2, 2, 9)
            expected = [
                rule.update(meta_params, grad, state, param, StepContext(torch.tensor(3.0)))[0] for grad in grads
            ]
        found = update_function(rule, state, grads.reshape(3, 3), step=3.0)
        torch.testing.assert_close(found.flatten().float(), torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_effective_learning_rates_are_slopes_of_update_functions():
    torch.manual_seed(0)
    rule = make("lstm", hidden_size=5, preprocessing="none", out_scale=1.0)
    _, states = CoordinateDynamics.from_rule(rule).run(torch.randn(6, 2))
    rates = analysis.effective_learning_rate(rule, states, gradient=0.4)
    assert rates.shape == (7, 2)
    for state, rate in zip(states.reshape(14, -1), rates.flatten(), strict=True):
        low, high = update_function(rule, state, torch.tensor([0.4 - 1e-5, 0.4 + 1e-5], dtype=F64))
        assert float(rate) == pytest.approx(float((low - high) / 2e-5), rel=1e-5, abs=1e-9)


def test_jacobians_are_those_of_finite_differences():
    torch.manual_seed(0)
    rule = make("gru", hidden_size=4)
    with torch.no_grad():
        rule.readout.normal_()
    cell = CoordinateDynamics.from_rule(rule)
    state, grad = torch.randn(4, dtype=F64), torch.tensor(0.3, dtype=F64)
    assert torch.autograd.gradcheck(lambda h, g: cell.step(h, g), (state.requires_grad_(), grad.requires_grad_()))
    found = cell.jacobians(state.detach(), grad.detach())
    expected = torch.autograd.functional.jacobian(cell.step, (state.detach(), grad.detach()))
    for name, value in zip(("D_h", "D_g", "F_h", "F_g"), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("slope", [0.1, 2.0])
def test_clipping_is_where_tanh_has_lost_half(slope):
    class Clip(HiddenMomenta):
        def update(self, meta_params, grad, state, param, context):
            return -slope * torch.tanh(grad) + state.h[0], HiddenState(state.h)

    rule = Clip(BETAS[:1], ALPHAS[:1])
    seen = torch.tensor([0.1, -0.5, 3.0, -9.0])
    found = analysis.clipping(rule, torch.tensor([5.0]), seen=seen)
    assert found.learning_rate == pytest.approx(slope, rel=1e-4)
    assert found.threshold == pytest.approx(1.9150, rel=0.02)  # tanh(t) = t / 2
    assert (found.monotonic, found.fraction) == (True, 0.5)


def test_a_state_of_several_coordinates_is_refused():
    rule = make("gru", hidden_size=4)
    with pytest.raises(ValueError, match=r"\(4,\) for one coordinate"):
        update_function(rule, rule.init_state(torch.zeros(3)), torch.zeros(1))


# --- trajectories


def test_recorded_states_are_those_of_the_run():
    """For a component-wise rule, replaying a coordinate's gradients gives the states of the run."""
    torch.manual_seed(0)
    rule, task = make("gru", hidden_size=5), make_task("linear-regression")
    with torch.no_grad():
        rule.readout.normal_(std=0.1)
    recording = analysis.record(rule, task, steps=9, runs=3, coordinates=100, seed=4)
    unroll, generator = Unroll(rule, task, objective="raw", tell_horizon=False), torch.Generator().manual_seed(4)
    inner = unroll.start(generator, torch.full((3,), 10))
    order = torch.randperm(5, generator=generator)
    with torch.no_grad():
        inner, record = unroll.run(rule.meta_params(), inner, 9, generator, lambda n: torch.full((n,), 10))
    hidden = inner.states["x"].hidden[:, :, order]  # (runs, units, coordinates)
    expected = hidden.transpose(1, 2).reshape(15, 5)
    torch.testing.assert_close(recording.tensors["x"].states[-1].float(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recording.losses, record.losses)
    assert recording.states.shape == (10, 15, 5)
    assert recording.grads.shape == (9, 15)


def test_principal_components_are_those_of_the_singular_value_decomposition():
    states = torch.randn(20, 7, 5, dtype=F64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)
    projection = analysis.principal_components(states, 2)
    rows = (states.reshape(-1, 5) - states.reshape(-1, 5).mean(0)).numpy()
    _, sizes, axes = np.linalg.svd(rows, full_matrices=False)
    np.testing.assert_allclose(np.abs(projection.axes.numpy()), np.abs(axes[:2]), atol=1e-9)
    np.testing.assert_allclose(projection.explained.numpy(), (sizes**2 / (sizes**2).sum())[:2])
    assert projection(states).shape == (20, 7, 2)


def test_autonomous_schedules_are_what_happens_without_gradients():
    rule = HiddenMomenta(BETAS, ALPHAS)
    schedule = analysis.autonomous(rule, steps=30)
    assert schedule.states.shape == (31, 4)
    expected = -ALPHAS @ (BETAS.unsqueeze(1) ** torch.arange(1, 31)).mul(_modes_at_start(rule).unsqueeze(1))
    torch.testing.assert_close(schedule.drift, expected)
    torch.testing.assert_close(schedule.learning_rates, ALPHAS.sum().expand(31))


def _modes_at_start(rule: HiddenMomenta) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 4, generator=generator, dtype=F64)
    return mixing @ -rule.center.detach()


def test_s_curve_of_momentum_is_a_line_through_its_fixed_points():
    """v = tanh(g) / (1 - beta) for each momentum; the effective learning rate is the same everywhere."""
    rule, gradients = HiddenMomenta(BETAS[1:2], ALPHAS[1:2]), torch.tensor([-2.0, -0.1, 0.0, 0.1, 2.0])
    curve = analysis.s_curve(rule, gradients)
    assert curve.gradients.tolist() == pytest.approx(gradients.tolist())
    velocity = (curve.states - rule.center)[:, 0] / rule.inputs[0]
    torch.testing.assert_close(velocity.detach(), torch.tanh(gradients.double()) / 0.3)
    torch.testing.assert_close(curve.learning_rates, ALPHAS[1:2].expand(5))


# --- every rule


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_every_kind_can_be_analyzed(kind):
    """Update functions, a run without gradients, and the modes at its end."""
    torch.manual_seed(0)
    small = {"lstm": {"hidden_size": 4}, "gru": {"hidden_size": 4}}
    small["velo"] = {"lstm_hidden_size": 4, "param_inits": 2}
    small["lstm_dmd"] = {"hidden_size": 4, "rank": 1, "num_snapshots": 2, "scope": "tensor"}
    rule = make(kind, **small.get(kind, {}))
    state = rule.init_state(torch.zeros(()))
    deltas = update_function(rule, state, torch.linspace(-1, 1, 5))
    assert deltas.shape == (5,)
    assert deltas.isfinite().all()
    schedule = analysis.autonomous(rule, steps=5)
    assert schedule.learning_rates.isfinite().all()
    modes = linearize(rule, schedule.states[-1], gradient=0.1)
    assert modes.eigenvalues.shape == (CoordinateDynamics.from_rule(rule).size,)
    assert modes.timescales.isfinite().all()
    assert modes.learning_rates.isfinite().all()


def test_moments_of_star_are_its_modes():
    """The state of STAR consists of moving averages, which decay at their own rates without gradients."""
    rule = make("star", nominal_stepsize=1e-2)
    points = find_fixed_points(rule)
    modes = linearize(rule, points.states[0])
    expected = sorted([0.9, 0.99, 0.999, 0.999, 0.9, 0.99, 0.999], reverse=True)
    assert points.states[0].abs().max() < 1e-6
    assert modes.timescales.tolist() == pytest.approx(expected, abs=1e-6)
