"""The flagship's rule: equal to its recorded trajectory, its numbers against closed forms, each mechanism alone."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from star_trajectory import recorded, trajectory

import lightning_lopt as lopt
from lightning_lopt.rules import ScheduledConfig, StepContext, features, make, scheduled, scheduler

DECAYS = features.Decays(torch.tensor([0.9, 0.99, 0.999]), torch.tensor([0.999]), torch.tensor([]))


def neutral(**numbers):
    """The meta-parameters of these numbers alone, in float64."""
    return {name: value.double() for name, value in scheduled.curves(ScheduledConfig(**numbers)).items()}


def facts(squares, shape, *, first=1.0, role=None, num_tensors=None):
    """Of one tensor, float64."""
    as_row = {"dtype": torch.float64}
    return scheduled.TensorFacts(
        torch.tensor([squares], **as_row),
        torch.tensor([first], **as_row),
        torch.tensor([scheduler.shape_features(shape, num_tensors)], **as_row),
        torch.tensor([scheduled.role_features(shape, role)], **as_row),
    )


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in scheduler.SHAPES.items()}


# --- the bundled star


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("length", ["known", "unknown"])
def test_the_first_flagship_moves_as_it_did_as_a_configuration_of_the_papers_rule(length, dtype, tolerance):
    expected = recorded(length, dtype)
    for step, params in trajectory(length, dtype, "reference").items():
        for ours, theirs in zip(params, expected[step], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_stars_weights_are_what_its_readable_numbers_stand_for():
    star = lopt.load_rule("star")
    expected = scheduled.curves(star.config)
    assert (star.kind, star.num_meta_params(), len(ScheduledConfig.meanings())) == ("scheduled", 99, 36)
    for name, value in star.meta_params().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_dtype_rounds_no_number(dtype):
    torch.set_default_dtype(dtype)
    try:
        rule = lopt.load_rule("star")
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in scheduled.curves(rule.config).items():
        assert torch.equal(rule.meta_params()[name].float(), value), name


# --- the readable numbers


def test_with_the_defaults_it_is_the_nominal_term_of_the_paper():
    torch.manual_seed(0)
    paper = make("hyperparam", nominal_stepsize=1e-2, nominal_controller=False, exp_mult=(0.0, 0.0, 0.0))
    rule = make("scheduled", nominal_stepsize=1e-2, eps=1e-6)
    for param in (torch.randn(4, 3), torch.randn(5), torch.randn(())):
        state, other = rule.init_state(param), paper.init_state(param)
        for step in range(5):
            grad, context = torch.randn_like(param), StepContext(torch.tensor(float(step)), None, 20)
            delta, state = rule.update(rule.meta_params(), grad, state, param, context)
            expected, other = paper.update(paper.meta_params(), grad, other, param, context)
            torch.testing.assert_close(delta, expected)


def log_factor(step, num_steps=1000, **numbers):
    """Of a vector that the other numbers leave alone."""
    theta = {name: value.double() for name, value in scheduled.curves(ScheduledConfig(**numbers)).items()}
    return scheduler.log_factor(theta, torch.tensor(float(step), dtype=torch.float64), num_steps).item()


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.8])
def test_the_curve_is_a_warmup_and_a_power_of_a_cosine(fraction):
    numbers = {"peak": 0.7, "start": -0.4, "warmup": 0.2, "anneal": 0.6}
    up = min(1.0, fraction / 0.2)
    cosine = 0.5 + 0.5 * math.cos(math.pi * max(0.0, fraction - 0.2) / 0.8)
    expected = 0.7 - 0.4 * (1 - up) + 0.6 * math.log(cosine)
    assert log_factor(fraction * 999, **numbers) == pytest.approx(expected, abs=1e-5)
    longer = log_factor(fraction * 2999, 3000, **numbers, length=-0.5, start_length=0.2)
    assert longer == pytest.approx(expected + math.log10(3) * (-0.5 + 0.2 * (1 - up)), abs=1e-5)


def test_bias_correction_1_is_adams():
    for step in (1, 10, 100, 1000):  # knots of the curve lie at powers of ten
        found = log_factor(step - 1, 10**6, bias_correction=1.0)
        assert found == pytest.approx(math.log(math.sqrt(1 - 0.999**step)), rel=1e-4)


def test_a_run_of_unknown_length_has_its_own_curve_over_steps():
    numbers = {"unknown_level": 0.3, "unknown_early": -0.2, "unknown_late": -0.7, "peak": 9.0}
    for step, decades in ((9, -1.477), (999, 0.523), (99_999, 2.523)):
        expected = 0.3 + (-0.2 * -decades if decades < 0 else -0.7 * decades)
        assert log_factor(step, None, **numbers) == pytest.approx(expected, abs=2e-3)


SHAPES_OF = {"matrix": (20, 50), "wide": (20, 500), "vector": (1000,)}


def own_factor(shape, rms=0.1, num_tensors=8, strength=1.0, step=0.0, **numbers):
    """The factor of one tensor, beside the curve."""
    theta = {name: value.double() for name, value in scheduled.curves(ScheduledConfig(**numbers)).items()}
    squares = torch.tensor([[rms**2, strength**2, strength**2, strength**2]], dtype=torch.float64)
    shapes = torch.tensor([scheduler.shape_features(SHAPES_OF[shape], num_tensors)], dtype=torch.float64)
    step = torch.tensor(step, dtype=torch.float64)
    return scheduler.multipliers(theta, squares, shapes, step, 101).factor.item()


@pytest.mark.parametrize(
    ("numbers", "change", "ratio"),
    [
        ({"scale": 0.5}, {"shape": "matrix", "rms": 0.4}, 2.0),
        ({"scale": 0.5}, {"shape": "vector", "rms": 0.4}, None),
        ({"depth": -0.5}, {"shape": "vector", "num_tensors": 32}, 0.5),
        ({"size": 0.3}, {"shape": "wide"}, math.exp(0.3)),
        ({"fan_in": -0.3}, {"shape": "wide"}, math.exp(-0.3)),
        ({"vectors": 0.6}, {"shape": "vector"}, math.exp(0.6)),
        ({"strength_start": 0.5}, {"shape": "matrix", "strength": 0.25}, 0.5),
        ({"strength_start": 0.5}, {"shape": "matrix", "strength": 0.25, "step": 100.0}, None),
        ({"strength_end": 0.5}, {"shape": "matrix", "strength": 0.25, "step": 100.0}, 0.5),
    ],
)
def test_each_number_does_what_its_meaning_says(numbers, change, ratio):
    """By a change of the tensor; None: the number has no part in that."""
    before = {**change, "rms": 0.1, "num_tensors": 8, "strength": 1.0}
    before["shape"] = "matrix" if change["shape"] != "vector" or "vectors" in numbers else "vector"
    found = own_factor(**change, **numbers) / own_factor(**before, **numbers)
    assert found == pytest.approx(1.0 if ratio is None else ratio, rel=1e-5)


def test_decays_and_mixes_are_those_of_the_numbers():
    rule = make("scheduled", fast_offset=0.1, slow_offset=-0.04, rms_offset=0.2, mix_start=0.5, mix_end=-1.0)
    decays = rule.decays(rule.meta_params())
    offsets = zip((0.1, 0.01, 0.001, 0.001), (0.1, -0.02, -0.04, 0.2), strict=True)
    expected = torch.tensor([1 - rest * math.exp(10 * offset) for rest, offset in offsets])
    torch.testing.assert_close(torch.cat([decays.momentum, decays.rms]).detach(), expected)
    start, end = rule.momentum_mix.detach()
    assert (start.tolist(), end.tolist()) == ([0.5, 0.0, -0.5], [-1.0, 0.0, 1.0])


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ScheduledConfig)])
@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, True, 1e6])
def test_numbers_that_are_none_are_refused_by_name(field, value):
    if (field, value) == ("nominal_stepsize", 1e6):
        return
    with pytest.raises(ValueError, match=f"{field}="):
        ScheduledConfig(**{field: value})


def test_the_mix_weighs_the_momenta():
    rule = make("scheduled", nominal_stepsize=1.0, eps=1e-6, mix_start=99.0, mix_end=-99.0)
    param, grad = torch.zeros(3), torch.ones(3)
    for step, momentum in ((0.0, 0.1), (100.0, 0.001)):  # the fastest alone at the start, the slowest at the end
        context = StepContext(torch.tensor(step), None, 101)
        delta, state = rule.update(rule.meta_params(), grad, rule.init_state(param), param, context)
        torch.testing.assert_close(delta, -momentum * torch.rsqrt(state.exp_avg_sq + 1e-6))


# --- growth, centering, caution


@pytest.mark.parametrize(("rms", "grown"), [(0.0, 1.0), (0.2, 1.0), (0.25, 1.0), (0.5, 2.0), (0.75, 3.0)])
@pytest.mark.parametrize(
    ("strength", "counts"),
    [(1.0, 1.0), (math.exp(0.19), 1.0), (math.exp(-0.3), 0.5), (math.exp(0.3), 0.5), (2.0, 0.0), (0.0, 0.0)],
)
@pytest.mark.parametrize("step", [0.0, 100.0])
def test_growth_is_the_exponent_of_how_far_noise_has_moved_a_matrix(monkeypatch, rms, grown, strength, counts, step):
    noise = 0.7e-3
    theta = {**neutral(), "growth": torch.tensor([-1.0, -3.0], dtype=torch.float64)}
    monkeypatch.setattr(scheduled, "noise_strength", lambda *_: torch.tensor(noise, dtype=torch.float64).log())
    squares = (rms**2, 1.0, 1.0, noise * strength)
    for shape, is_matrix in (((5, 16), True), ((5, 4, 2, 2), True), ((16,), False), ((), False)):
        tensors = facts(squares, shape)
        found = scheduled.multipliers(
            theta, tensors, torch.tensor(step), 101, decays=DECAYS, stepsize=1e-2
        ).factor.item()
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
            expected = scheduled.noise_strength(*decays, torch.tensor(float(step))).item()
            assert found == pytest.approx(expected, abs=0.1)


def test_where_gradients_are_noise_steps_relative_to_scale_feed_on_themselves_and_growth_stops_it():
    ends = []
    for exponent in (0.0, -2.0):
        torch.manual_seed(0)
        rule = make("scheduled", nominal_stepsize=0.1)
        theta = {name: p.detach().clone() for name, p in rule.meta_params().items()}
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


def test_caution_1_is_the_cautious_adam_of_its_paper_without_the_division():
    # One momentum, algorithm 2 of Liang et al. in NumPy: m, v, u = m / sqrt(v), and u where u g > 0.
    rule = make("scheduled", nominal_stepsize=0.1, eps=1e-6)
    theta = {name: p.detach().clone() for name, p in rule.meta_params().items()}
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
    theta = {name: p.detach().clone() for name, p in make("scheduled").named_parameters()}
    theta["caution"] = torch.ones(2)
    rule = make("scheduled", nominal_stepsize=0.1)
    param, context = torch.zeros(2), StepContext(torch.tensor(0.0), None, 10)
    _, state = rule.update(theta, torch.tensor([1.0, -1.0]), rule.init_state(param), param, context)
    delta, _ = rule.update(theta, torch.zeros(2), state, param, context)
    assert delta[0] < 0 < delta[1]


def test_centering_1_is_adam_on_centralized_gradients():
    """Yong et al. 2020, algorithm 2 without its bias corrections, in NumPy."""
    rule = make("scheduled", nominal_stepsize=0.1, eps=1e-6)
    theta = neutral()
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


# --- roles, first scale, cap, decay


def factor_of(tensors, step=0.0, num_steps=101, stepsize=1e-2, **numbers):
    time = torch.tensor(step, dtype=torch.float64)
    found = scheduled.multipliers(neutral(**numbers), tensors, time, num_steps, decays=DECAYS, stepsize=stepsize)
    return found.factor.item()


@pytest.mark.parametrize(
    ("role", "shape", "expected"),
    [
        ("hidden", (20, 50), math.exp(0.5 + 0.2 * (math.log10(50) - 1.5))),
        ("experts", (3, 20, 50), math.exp(0.5 + 0.2 * (3 - 1.5))),
        ("embedding", (20, 50), math.exp(-0.3)),
        ("output", (20, 50), math.exp(0.4)),
        ("other", (20, 50), 1.0),
        (None, (20, 50), 1.0),
        ("hidden", (20, 1), 1.0),
        ("hidden", (20,), 1.0),
    ],
)
def test_each_role_has_a_factor_of_its_own(role, shape, expected):
    numbers = {"hidden": 0.5, "hidden_fan_in": 0.2, "embedding": -0.3, "output": 0.4}
    tensors = facts((0.01, 1.0, 1.0, 1.0), shape, role=role)
    found = factor_of(tensors, **numbers)
    if role == "experts":  # its fan-in counts all dims but the first, as for any tensor
        expected = math.exp(0.5 + 0.2 * (math.log10(1000) - 1.5))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("relative", "expected"), [(0.01, 0.1), (0.25, 0.5), (1.0, 1.0), (9.0, 1.0), (0.0, 1.0)])
def test_a_matrix_that_began_small_takes_smaller_steps_by_a_power(relative, expected):
    first = (relative * 0.58 / math.sqrt(50)) ** 2
    found = factor_of(facts((0.01, 1.0, 1.0, 1.0), (20, 50), first=first), first_scale=0.5)
    assert found == pytest.approx(expected, rel=1e-5)
    assert factor_of(facts((0.01, 1.0, 1.0, 1.0), (20,), first=first), first_scale=0.5) == 1.0


def test_the_state_keeps_the_mean_square_before_the_first_step():
    rule = make("scheduled", nominal_stepsize=0.1)
    param = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    state, expected = rule.init_state(param), param.square().mean()
    for step in range(3):
        delta, state = rule.update(
            rule.meta_params(), torch.ones(4, 3), state, param, StepContext(torch.tensor(float(step)), None, 3)
        )
        param = param + delta
        torch.testing.assert_close(state.first_square, expected)


@pytest.mark.parametrize("first", [0.0, 1.0])
@pytest.mark.parametrize("rms", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(20, 50), (20,)])
def test_no_step_of_a_matrix_is_longer_than_the_cap_times_its_scale(first, rms, shape):
    """Against the step itself: the bound by strengths holds for any momenta."""
    torch.manual_seed(0)
    rule = make("scheduled", nominal_stepsize=10.0, cap=math.log(0.2), mix_start=0.5)
    theta = {name: value.double() for name, value in rule.meta_params().items()}
    param = rms * torch.randn(shape, dtype=torch.float64).sign()
    grad = torch.randn(shape, dtype=torch.float64)
    state = rule.init_state(param)._replace(first_square=torch.tensor(first, dtype=torch.float64))
    delta, _ = rule.update(theta, grad, state, param, StepContext(torch.tensor(1.0, dtype=torch.float64), None, 100))
    limit = 0.2 * max(rms, scheduled.FLOORS[0 if first == 0 else 1])
    longest = delta.square().mean().sqrt().item()
    assert (longest <= limit * (1 + 1e-9)) == (len(shape) > 1)
    assert longest > 0.5 * limit  # and it is the cap that holds it back


def test_the_cap_and_the_decay_follow_the_curve_from_its_highest_point():
    numbers = {"peak": 0.7, "start": -0.4, "warmup": 0.2, "anneal": 0.6}
    for fraction in (0.0, 0.2, 0.5, 0.8):
        step = torch.tensor(fraction * 999, dtype=torch.float64)
        found = scheduled.annealed(neutral(**numbers), step, 1000).item()
        assert found == pytest.approx(math.exp(log_factor(fraction * 999, **numbers) - 0.7), rel=1e-5)
        assert scheduled.annealed(neutral(**numbers), step, None).item() == 1


@pytest.mark.parametrize("num_steps", [30, 300, 3000])
def test_decay_takes_the_same_off_a_matrix_whatever_the_length(num_steps):
    """exp(-decay) in all, with a curve that stays at its peak, and nothing off a vector."""
    rule = make("scheduled", nominal_stepsize=0.0, decay=0.5)
    theta = {name: value.double() for name, value in rule.meta_params().items()}
    for shape, expected in (((3, 2), math.exp(-0.5)), ((3,), 1.0)):
        param, grad = torch.ones(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
        state = rule.init_state(param)
        for step in range(num_steps):
            context = StepContext(torch.tensor(float(step), dtype=torch.float64), None, num_steps)
            delta, state = rule.update(theta, grad, state, param, context)
            param = param + delta
        torch.testing.assert_close(param, torch.full_like(param, expected), rtol=0.01, atol=0)


def test_without_decay_nothing_is_taken_off():
    rule = make("scheduled", decay=0.5)
    assert (rule.decay.item(), rule.without_decay().decay.item()) == (0.5, 0.0)


# --- embeddings


def rows_moved(reads, role="embedding", width=4, num_rows=3):
    """What each row has moved by after steps that read some of them: step -> rows."""
    numbers = {"mix_start": 1.0, "centering_start": 0.5, "caution_start": 0.5, "decay": 5.0}
    rule = make("scheduled", nominal_stepsize=0.1, eps=1e-12, **numbers)
    theta = {name: value.double() for name, value in rule.meta_params().items()}
    generator = torch.Generator().manual_seed(0)
    param = torch.ones(num_rows, width, dtype=torch.float64)
    gradients = torch.randn(len(reads), width, generator=generator, dtype=torch.float64)
    start, state = param, rule.init_state(param)
    count = [0] * num_rows
    for step, rows in enumerate(reads):
        grad = torch.zeros_like(param)
        for row in rows:
            grad[row] = gradients[count[row]]  # the same gradients for each row, one after the other
            count[row] += 1
        context = StepContext(torch.tensor(float(step), dtype=torch.float64), None, None, role=role)
        delta, state = rule.update(theta, grad, state, param, context)
        still = [row for row in range(num_rows) if row not in rows]
        if role == "embedding":
            assert not delta[still].any()
        param = param + delta
    return param - start


def test_a_rare_row_of_an_embedding_steps_as_a_frequent_one():
    """Once each has been read as often, with the same gradients: how rare it is makes no difference."""
    reads = [[0] if step % 4 else [0, 1] for step in range(16)] + [[1]] * 12
    moved = rows_moved(reads)
    torch.testing.assert_close(moved[1], moved[0])
    assert not moved[2].any()
    assert not torch.allclose(*rows_moved(reads, role="output")[:2])


def test_rows_that_were_never_read_do_not_count_in_a_tables_strengths():
    """Ten or ten thousand of them: the step of those that are read is the same."""
    few, many = (rows_moved([[0, 1]] * 5, num_rows=rows)[:2] for rows in (3, 300))
    torch.testing.assert_close(few, many)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("num_steps", [None, 30])
def test_behind_the_optimizer_it_is_what_the_rule_says(backend, num_steps):
    torch.manual_seed(3)
    rule = make("scheduled", nominal_stepsize=1e-2)
    rule.load_state_dict({**rule.state_dict(), **drawn(3)})
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
