"""The learned scheduler against NumPy's interpolation and closed forms."""

import math

import numpy as np
import pytest
import torch

import lightning_lopt as lopt
from lightning_lopt import rules
from lightning_lopt.rules import StepContext, scheduler

OPTIONS = {"nominal_stepsize": 1e-2, "step_mult": 1e-3, "nominal_controller": True}


def zeros():
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in scheduler.SHAPES.items()}


def factor(meta_params, *, step=50.0, num_steps=101, rms=(0.1, 1.0, 1.0, 1.0), shape=(30, 30), num_tensors=8):
    shapes = torch.tensor([scheduler.shape_features(shape, num_tensors)], dtype=torch.float64)
    squares = torch.tensor([rms], dtype=torch.float64).square()
    return scheduler.multipliers(meta_params, squares, shapes, torch.tensor(step, dtype=torch.float64), num_steps)


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = scheduler.SHAPES.items()
    return {name: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes}


@pytest.mark.parametrize("step", [0, 1, 7, 50, 99, 100, 5000])
@pytest.mark.parametrize("num_steps", [101, 1000, 3000, 100_000])
def test_the_curve_is_piecewise_linear_in_the_fraction_of_the_run_and_in_the_steps_logarithm(step, num_steps):
    theta = drawn()
    values = theta["schedule_fraction"] + theta["schedule_length"] * np.clip(math.log10(num_steps) - 3, -1, 0.5)
    expected = np.interp(min(step / (num_steps - 1), 1), scheduler.FRACTIONS, values.numpy())
    expected += np.interp(math.log10(step + 1), scheduler.LOG_STEPS, theta["schedule_early"].numpy())
    got = scheduler.log_factor(theta, torch.tensor(float(step)), num_steps)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("step", [0, 5, 300, 10**6])
def test_without_a_known_length_the_curve_is_one_of_steps(step):
    theta = drawn()
    expected = np.interp(math.log10(step + 1), scheduler.LOG_STEPS, theta["schedule_step"].numpy())
    np.testing.assert_allclose(scheduler.log_factor(theta, torch.tensor(float(step)), None), expected, atol=1e-6)


@pytest.mark.parametrize(("feature", "change"), [(1, {"rms": (0.4, 1, 1, 1)}), (5, {"rms": (0.1, 4.0, 1, 1)})])
@pytest.mark.parametrize(("kind", "shape"), [(0, (900,)), (1, (30, 30))])
def test_a_tensors_factor_is_a_power_of_its_scale_and_of_its_momenta(kind, shape, feature, change):
    theta = zeros()
    theta["tensor_powers"][kind, :, feature] = 2 * 0.5  # features are half logarithms: the square root
    theta["tensor_powers"][1 - kind] = 9.0  # the other kind's exponents do not matter
    ratio = factor(theta, shape=shape, **change).factor / factor(theta, shape=shape).factor
    assert ratio.item() == pytest.approx(2.0)


def test_exponents_go_from_their_start_to_their_end():
    theta = zeros()
    theta["tensor_powers"][1, 0, 0], theta["tensor_powers"][1, 1, 0] = 1.0, 3.0
    logs = [factor(theta, step=step).factor.log().item() for step in (0.0, 50.0, 100.0, 900.0)]
    assert logs == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert factor(theta, num_steps=None).factor.log().item() == pytest.approx(2.0)


def test_depth_is_held_within_what_was_learned_on():
    theta = zeros()
    theta["tensor_powers"][1, :, 4] = -0.5
    factors = [factor(theta, num_tensors=n).factor.item() for n in (1, 2, 8, 32, 48, 5000, None)]
    expected = [(n / 8) ** -0.5 for n in (2, 2, 8, 32, 48, 48, 8)]
    assert factors == pytest.approx(expected)


def test_a_tensors_own_factor_is_bounded():
    theta = zeros()
    theta["tensor_powers"] += 100.0
    assert factor(theta).factor.log().item() == pytest.approx(scheduler.LARGEST_POWER)


def test_tensors_at_once_are_as_each_alone():
    theta, generator = drawn(1), torch.Generator().manual_seed(2)
    theta["growth"] = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    noise = torch.full((5,), 0.5, dtype=torch.float64).log()
    squares = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    shapes = torch.tensor([scheduler.shape_features(s, 5) for s in [(3,), (4, 5), (), (2, 3, 4), (7, 1)]])
    steps = torch.tensor([0.0, 3.0, 50.0, 99.0, 200.0], dtype=torch.float64)
    together = scheduler.multipliers(theta, squares, shapes.double(), steps, 100, noise)
    for i in range(5):
        own = squares[i : i + 1], shapes[i : i + 1].double(), steps[i]
        alone = scheduler.multipliers(theta, *own, 100, noise[i])
        torch.testing.assert_close(together.factor[i : i + 1], alone.factor)
        torch.testing.assert_close(together.momenta[i : i + 1], alone.momenta)


@pytest.mark.parametrize("estimator", ["SGD", "AggMo", "AdamAggMo"])
@pytest.mark.parametrize("num_steps", [None, 20])
def test_at_zero_it_is_the_papers_form(estimator, num_steps):
    torch.manual_seed(0)
    plain = rules.make("star", nominal_grad_estimator=estimator, **OPTIONS)
    scheduled = rules.make("star", nominal_grad_estimator=estimator, scheduler=True, **OPTIONS)
    scheduled.load_state_dict(plain.state_dict(), strict=False)
    for param in (torch.randn(4, 3), torch.randn(5), torch.randn(())):
        states = [plain.init_state(param)] * 2
        for step in range(5):
            grad, deltas = torch.randn_like(param), []
            for i, rule in enumerate((plain, scheduled)):
                context = StepContext(torch.tensor(float(step)), None, num_steps)
                delta, states[i] = rule.update(rule.meta_params(), grad, states[i], param, context)
                deltas.append(delta)
            torch.testing.assert_close(*deltas)


def test_the_mix_weighs_the_momenta():
    theta = {name: p.detach() for name, p in rules.make("star", scheduler=True).named_parameters()}
    theta["momentum_mix"] = torch.tensor([[0.0, -200.0, -200.0], [-200.0, -200.0, 0.0]])
    rule = rules.make("star", nominal_stepsize=1.0, step_mult=0.0, nominal_controller=False, scheduler=True)
    rule = rules.make("star", **{**rule.config.to_dict(), "exp_mult": (0.0, 0.0, 0.0)})
    param, grad = torch.zeros(3), torch.ones(3)
    for step, momentum in ((0.0, 0.1), (100.0, 0.001)):  # only the fastest at the start, only the slowest at the end
        delta, state = rule.update(
            theta, grad, rule.init_state(param), param, StepContext(torch.tensor(step), None, 101)
        )
        expected = -momentum * torch.rsqrt(state.exp_avg_sq + 1e-6)
        torch.testing.assert_close(delta, expected)


@pytest.mark.parametrize(("rms", "grown"), [(0.0, 1.0), (0.2, 1.0), (0.25, 1.0), (0.5, 2.0), (0.75, 3.0)])
@pytest.mark.parametrize(
    ("strength", "counts"),
    [(1.0, 1.0), (math.exp(0.19), 1.0), (math.exp(-0.3), 0.5), (math.exp(0.3), 0.5), (2.0, 0.0), (0.0, 0.0)],
)
@pytest.mark.parametrize("step", [0.0, 100.0])
def test_growth_is_the_exponent_of_how_far_noise_has_moved_a_matrix(rms, grown, strength, counts, step):
    noise = 0.7e-3
    theta = {**zeros(), "growth": torch.tensor([-1.0, -3.0], dtype=torch.float64)}
    squares = torch.tensor([[rms**2, 1.0, 1.0, noise * strength]], dtype=torch.float64)
    for shape, is_matrix in (((5, 16), True), ((5, 4, 2, 2), True), ((16,), False), ((), False)):
        shapes = torch.tensor([scheduler.shape_features(shape)], dtype=torch.float64)
        level = torch.tensor(noise, dtype=torch.float64).log()
        found = scheduler.multipliers(theta, squares, shapes, torch.tensor(step), 101, level).factor.item()
        assert found == pytest.approx(grown ** (counts * (-1 - 2 * step / 100)) if is_matrix else 1.0, rel=1e-5)


@pytest.mark.parametrize(("momentum", "second"), [(0.99, 0.9), (0.999, 0.999), (0.9991, 0.9963), (0.9, 0.999)])
def test_white_noise_has_the_strength_that_growth_looks_for(momentum, second):
    """At every age: both averages begin at nothing, and one of them is long done when the other is young."""
    torch.manual_seed(0)
    average, square, decays = torch.zeros(4000), torch.zeros(4000), (torch.tensor(momentum), torch.tensor(second))
    for step in range(3000):
        grad = torch.randn(4000)
        average, square = torch.lerp(average, grad, 1 - momentum), torch.lerp(square, grad * grad, 1 - second)
        if step in (0, 10, 100, 1000, 2999):
            found = (average.square().mean() / square.mean()).log().item()
            expected = scheduler.noise_strength(*decays, torch.tensor(float(step))).item()
            assert found == pytest.approx(expected, abs=0.1)


def test_where_gradients_are_noise_steps_relative_to_scale_feed_on_themselves_and_growth_stops_it():
    ends = []
    for exponent in (0.0, -2.0):
        torch.manual_seed(0)
        rule = rules.make("star", nominal_stepsize=0.1, step_mult=0.0, nominal_controller=False, scheduler=True)
        theta = {name: torch.zeros_like(p) for name, p in rule.meta_params().items()}
        theta["tensor_powers"][1, :, 1] = 2.0
        theta["growth"] = torch.full((2,), exponent)
        param = torch.randn(32, 64) / 8
        state = rule.init_state(param)
        for step in range(200):
            context = StepContext(torch.tensor(float(step)), None, 200)
            delta, state = rule.update(theta, torch.randn(32, 64), state, param, context)
            param = param + delta
        ends.append(param.square().mean().sqrt().item())
    assert ends[0] > 10 * ends[1], ends


@pytest.mark.parametrize("ends", [(0.0, 0.0), (1.0, 0.5), (0.25, 3.0), (-1.0, 1.0)])
@pytest.mark.parametrize("name", ["caution", "centering"])
def test_a_share_goes_from_its_start_to_its_end_within_0_and_1(name, ends):
    theta = {name: torch.tensor(ends)}
    for step, num_steps, fraction in ((0, 101, 0.0), (25, 101, 0.25), (500, 101, 1.0), (7, None, 0.5)):
        expected = np.clip(np.interp(fraction, (0, 1), ends), 0, 1)
        assert scheduler.ramp(theta, name, torch.tensor(float(step)), num_steps).item() == pytest.approx(expected)


def test_caution_1_is_the_cautious_adam_of_its_paper_without_the_division():
    # One momentum, algorithm 2 of Liang et al. in NumPy: m, v, u = m / sqrt(v), and u where u g > 0.
    rule = rules.make("star", nominal_stepsize=0.1, step_mult=0.0, nominal_controller=False, scheduler=True)
    rule = rules.make("star", **{**rule.config.to_dict(), "exp_mult": (0.0, 0.0, 0.0)})
    theta = {name: torch.zeros_like(p) for name, p in rule.meta_params().items()}
    theta["momentum_mix"] = torch.tensor([[0.0, -200.0, -200.0]] * 2)
    theta["caution"] = torch.ones(2)
    theta = {name: value.double() for name, value in theta.items()}
    draw = np.random.default_rng(0)
    param, m, v = torch.zeros(4, 5, dtype=torch.float64), np.zeros((4, 5)), np.zeros((4, 5))
    state, held = rule.init_state(param), 0
    for step in range(30):
        grad = draw.standard_normal((4, 5))
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        expected = -0.1 * m / np.sqrt(v + 1e-6) * (m * grad > 0)
        context = StepContext(torch.tensor(float(step)), None, 30)
        delta, state = rule.update(theta, torch.from_numpy(grad), state, param, context)
        np.testing.assert_allclose(delta, expected, rtol=1e-9, atol=1e-12)
        held += (m * grad <= 0).sum()
    assert held > 100


def test_caution_lets_momenta_go_on_where_there_is_no_gradient():
    theta = {name: torch.zeros_like(p) for name, p in rules.make("star", scheduler=True).named_parameters()}
    theta["caution"] = torch.ones(2)
    rule = rules.make("star", nominal_stepsize=0.1, step_mult=0.0, nominal_controller=False, scheduler=True)
    param, context = torch.zeros(2), StepContext(torch.tensor(0.0), None, 10)
    _, state = rule.update(theta, torch.tensor([1.0, -1.0]), rule.init_state(param), param, context)
    delta, _ = rule.update(theta, torch.zeros(2), state, param, context)
    assert delta[0] < 0 < delta[1]


def test_centering_1_is_adam_on_centralized_gradients():
    """Yong et al. 2020, algorithm 2 without its bias corrections, in NumPy."""
    rule = rules.make("star", nominal_stepsize=0.1, step_mult=0.0, nominal_controller=False, scheduler=True)
    rule = rules.make("star", **{**rule.config.to_dict(), "exp_mult": (0.0, 0.0, 0.0)})
    theta = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in rule.meta_params().items()}
    theta["momentum_mix"] = torch.tensor([[0.0, -200.0, -200.0]] * 2, dtype=torch.float64)
    theta["centering"] = torch.ones(2, dtype=torch.float64)
    draw = np.random.default_rng(0)
    shape = (4, 3, 2, 2)
    param, m, v = torch.zeros(shape, dtype=torch.float64), np.zeros(shape), np.zeros(shape)
    state = rule.init_state(param)
    for step in range(30):
        grad = draw.standard_normal(shape) + 1
        central = grad - grad.mean((1, 2, 3), keepdims=True)
        m, v = 0.9 * m + 0.1 * central, 0.999 * v + 0.001 * central**2
        context = StepContext(torch.tensor(float(step)), None, 30)
        delta, state = rule.update(theta, torch.from_numpy(grad), state, param, context)
        np.testing.assert_allclose(delta, -0.1 * m / np.sqrt(v + 1e-6), rtol=1e-9, atol=1e-12)
    theta["centering"] = torch.tensor([1.0, 0.0], dtype=torch.float64)  # all at the start, nothing at the end
    for step, share in ((0, 1.0), (29, 0.0)):
        context = StepContext(torch.tensor(float(step)), None, 30)
        _, found = rule.update(theta, torch.from_numpy(grad), rule.init_state(param), param, context)
        torch.testing.assert_close(found.exp_avg[0], torch.from_numpy(0.1 * (grad - share * (grad - central))))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("num_steps", [None, 30])
def test_behind_the_optimizer_it_is_what_the_rule_says(backend, num_steps):
    torch.manual_seed(3)
    rule = rules.make("star", scheduler=True, **OPTIONS)
    rule.load_state_dict({**rule.state_dict(), **{name: value.float() for name, value in drawn(3).items()}})
    rule.caution.data.copy_(torch.tensor([0.8, 0.4]))
    rule.centering.data.copy_(torch.tensor([0.9, 0.3]))
    rule.growth.data.copy_(torch.tensor([-0.9, 0.5]))
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (6,), (3, 2, 3, 3), ())]
    expected, states = [p.detach().clone() for p in params], [rule.init_state(p) for p in params]
    optimizer = lopt.RuleOptimizer(params, rule, num_steps=num_steps, backend=backend)
    for step in range(10):
        for i, param in enumerate(params):
            param.grad = torch.randn_like(param)
            context = StepContext(torch.tensor(float(step)), None, num_steps, num_tensors=len(params))
            delta, states[i] = rule.update(rule.meta_params(), param.grad, states[i], expected[i], context)
            expected[i] = (expected[i] + delta).detach()
        optimizer.step()
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=2e-5, atol=2e-6)
