"""MNG, k Timesteps, k Momentums: a NumPy writing of the thesis, its algorithms by hand, and its table 3.1."""

import itertools

import numpy as np
import pytest
import torch
from history_cases import TABLE_3_1, VARIANTS, by_name, context, randomized, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_history import ReferenceHistory

from lightning_lopt.rules import make

# --- the NumPy reference


def memories():
    timesteps = st.integers(1, 7).map(lambda k: {"k": k, "timescales": ()})
    decays = st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9, 0.99, 0.9999]), min_size=1, max_size=5)
    return timesteps | decays.map(lambda m: {"k": len(m), "timescales": tuple(m)})


def readings():
    network = {"step": st.sampled_from(["softmax", "tanh"]), "parameter_inputs": st.booleans()}
    means = st.fixed_dictionaries({"step": st.just("mean"), "parameter_inputs": st.just(False)})
    signs = st.sampled_from([("max", False), ("max", True), ("adam", False)])
    return st.tuples(means | st.fixed_dictionaries(network), signs).map(
        lambda pair: {**pair[0], "normalization": pair[1][0], "sign_only": pair[1][1]}
    )


def moves():
    return st.fixed_dictionaries(
        {
            "reference": st.sampled_from(["mid-range", "current"]),
            "eta_min": st.sampled_from([0.0, 1e-4, 0.1]),
            "eta_min_schedule": st.sampled_from(["constant", "exponential", "cosine"]),
            "eta_min_half_life": st.sampled_from([3.0, 100.0]),
        }
    )


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    options=st.tuples(memories(), readings(), moves()).map(lambda parts: parts[0] | parts[1] | parts[2]),
    hidden_size=st.sampled_from([1, 3, 50]),
    num_steps=st.sampled_from([None, 20, 40]),
    shape=st.sampled_from([(), (1,), (3,), (2, 2), (1, 2, 1)]),
    scales=st.lists(st.sampled_from([0.0, 1e-8, 1.0, 1.0, 1e6]), min_size=30, max_size=30),
    tied=st.booleans(),
)
def test_equals_the_numpy_reference(seed, options, hidden_size, num_steps, shape, scales, tied):
    rule = randomized(make("k_timesteps", hidden_size=hidden_size, **options), seed % 2**31)
    theta = {name: value.detach().numpy() for name, value in rule.named_parameters()}
    reference = ReferenceHistory(theta, num_steps=num_steps, **options)
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(30, *shape)) * np.reshape(scales, (-1, *[1] * len(shape)))
    grads = np.sign(grads) if tied else grads
    expected = rng.normal(size=shape)
    steps = trajectory(rule, torch.tensor(expected), torch.tensor(grads), num_steps)
    for step, (grad, (param, _)) in enumerate(zip(grads, steps, strict=True)):
        expected = reference.step(np.asarray(expected), np.asarray(grad))
        np.testing.assert_allclose(param.numpy(), expected, rtol=1e-9, atol=1e-9, err_msg=f"step {step} of {options}")


# --- by hand


def test_two_steps_of_algorithm_1_by_hand():
    param, grads = torch.tensor(1.0, dtype=torch.float64), [torch.tensor(g, dtype=torch.float64) for g in (2, -1, 4)]
    rule = make("mng", k=2, eta_min=0.5)
    # Populated with x = 1 and g = 2: 1 - 1 * (0 + .5). H_x = {1, .5}, H_g = {2, -1}: .75 - (1 - .5) / 2 * (.5 + .5).
    # H_x = {.5, .5}, H_g = {-1, 4}: .5 - (-.25 + 1) / 2 * (0 + .5).
    assert [x.item() for x, _ in trajectory(rule, param, grads)] == [0.5, 0.5, 0.3125]


def test_algorithm_3_by_hand():
    param, grads = torch.tensor(1.0, dtype=torch.float64), [torch.tensor(g, dtype=torch.float64) for g in (2, -1)]
    rule = make("k_momentums", timescales=[0.0, 0.5], step="mean", eta_min=0.5)
    # From 1: 1 - 1 * (0 + .5). Then H_x = {.5, .75}, H_g = {-1, .5}: .5 - (-1 + .5) / 2 * (.25 + .5).
    assert [x.item() for x, _ in trajectory(rule, param, grads)] == [0.5, 0.6875]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_ring_holds_the_last_k_steps(k):
    """Over several turns; before the first is full, it is filled up with the first values."""
    rule, grads = make("mng", k=k), torch.randn(4 * k + 3, 2, 3)
    params = [torch.randn(2, 3)]
    for step, (param, state) in enumerate(trajectory(rule, params[0], grads)):
        newest_first = [(step - age) % k for age in range(k)]
        for age, slot in enumerate(newest_first):
            assert torch.equal(state.grads[slot], grads[max(step - age, 0)])
            assert torch.equal(state.params[slot], params[max(step - age, 0)])
        assert state.seen == step + 1
        params.append(param)


@pytest.mark.parametrize("kind", ["mng", "k_timesteps", "k_momentums"])
def test_the_first_step_comes_from_eta_min_alone(kind):
    """Nothing is in the history but x0 and g0: not the zeros that the state starts with."""
    rule, param, grad = make(kind, eta_min=0.25), torch.tensor([3.0, -4.0]), torch.tensor([7.0, -1e-3])
    ((moved, state),) = trajectory(rule, param, [grad])
    assert torch.equal(state.params, param.expand_as(state.params))
    assert torch.equal(state.grads, grad.expand_as(state.grads))
    step = rule.step_map(state.grads.T) if kind != "mng" else grad.sign()
    torch.testing.assert_close(moved, param - step * 0.25)


def test_with_one_timestep_it_is_sign_descent():
    rule, param, grads = make("mng", k=1, eta_min=0.125), torch.zeros(3), torch.randn(9, 3)
    *_, (moved, _) = trajectory(rule, param, grads)
    torch.testing.assert_close(moved, -0.125 * grads.sign().sum(0), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "signs" not in name])
def test_the_scale_of_gradients_does_not_matter(name):
    rule, grads = by_name(name), torch.randn(12, 3, dtype=torch.float64)
    for scale in (1e-12, 1e12):
        for (once, _), (scaled, _) in zip(
            trajectory(rule, torch.ones(3, dtype=torch.float64), grads),
            trajectory(rule, torch.ones(3, dtype=torch.float64), scale * grads),
            strict=True,
        ):
            torch.testing.assert_close(once, scaled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("mng")])
def test_agreeing_gradients_expand_the_range_and_alternating_ones_contract_it(name):
    """Section 3.2."""
    kind, options = VARIANTS[name]
    rule, agreeing = make(kind, **options), [torch.ones(1)] * 12
    ranges = [(s.params.amax() - s.params.amin()).item() for _, s in trajectory(rule, torch.zeros(1), agreeing)]
    assert all(later > earlier for earlier, later in itertools.pairwise(ranges))
    alternating = agreeing + [torch.tensor([-1.0]), torch.tensor([1.0])] * 20
    *_, (_, state) = trajectory(rule, torch.zeros(1), alternating)
    assert state.params.amax() - state.params.amin() < 0.01 * max(ranges)


# --- table 3.1


def test_step_map_of_mng_is_the_mean_of_the_normalized_row():
    expected = [1.0, 0.6, 0.2, -0.2, -0.6, -1.0, 0.12, 0.04, 0.06, 0.18, 0.0, 0.0]
    torch.testing.assert_close(make("mng").step_map(7 * torch.tensor(TABLE_3_1)), torch.tensor(expected))


@pytest.mark.parametrize("shifted", range(6))
@pytest.mark.parametrize("name", ["mng", "mng, signs", "mng, adam", "k_timesteps", "k_timesteps, adam"])
def test_step_map_is_what_the_rule_does_with_that_history(name, shifted):
    """Wherever in the ring the history starts: the columns are in the order of time."""
    rule, rows = by_name(name, eta_min=0.5), torch.tensor(TABLE_3_1, dtype=torch.float64)
    start = torch.zeros(len(rows), dtype=torch.float64)
    before = torch.randn(shifted, len(rows), dtype=torch.float64)
    *_, (param, _), (moved, state) = trajectory(rule, start, [*before, *rows.T])
    high, low = state.params.amax(0), state.params.amin(0)
    reference = param if rule.config.reference == "current" else (high + low) / 2
    torch.testing.assert_close(rule.step_map(rows), (reference - moved) / (high - low + 0.5))


def test_step_map_with_parameters_and_squares():
    rule, grads = by_name("k_momentums, adam"), torch.randn(15, 4, dtype=torch.float64)
    *_, (param, _), (moved, state) = trajectory(rule, torch.ones(4, dtype=torch.float64), grads)
    step = rule.step_map(state.grads.T, state.params.T, state.squares.T)
    expected = (param - moved) / (state.params.amax(0) - state.params.amin(0) + 1e-3)
    torch.testing.assert_close(step, expected)


def test_the_softmax_readout_is_a_product_of_two_expectations():
    rule = make("k_timesteps").double()
    logits = torch.randn(12, dtype=torch.float64)
    with torch.no_grad():
        for value in rule.parameters():
            value.zero_()
        rule.b1.copy_(logits)
    magnitude = (logits[:10].exp() * torch.arange(10) / 9).sum() / logits[:10].exp().sum()
    sign = (logits[11].exp() - logits[10].exp()) / logits[10:].exp().sum()
    expected = (magnitude * sign).expand(2)
    torch.testing.assert_close(rule.step_map(torch.randn(2, 5, dtype=torch.float64)), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_are_between_minus_1_and_1(name):
    rule, squares = by_name(name), torch.rand(200, 6, dtype=torch.float64)
    k = rule.config.k
    # Averages of squares are at least the squares of averages.
    grads = torch.randn(200, k, dtype=torch.float64)
    steps = rule.step_map(grads, torch.randn_like(grads), grads.square() + squares[:, :k])
    assert steps.abs().max() <= 1
    assert steps.abs().max() > 0.3


@pytest.mark.parametrize(
    ("kind", "options", "arguments", "message"),
    [
        ("k_timesteps", {}, {"grads": torch.ones(3, 4)}, r"grads has shape \(3, 4\); it must have 5 columns"),
        ("k_timesteps", {}, {"grads": torch.tensor(1.0)}, r"grads has shape \(\); it must have 5 columns"),
        ("k_timesteps", {}, {"grads": torch.ones(5), "params": torch.ones(4)}, r"params has shape \(4,\)"),
        ("k_momentums", {"normalization": "adam"}, {"grads": torch.ones(6)}, "pass squares"),
    ],
)
def test_step_map_refuses_other_histories(kind, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **options).step_map(**arguments)


# --- eta_min


def first_range(schedule: str, step: int, num_steps: int | None, **options) -> float:
    rule = make("mng", eta_min=0.5, eta_min_schedule=schedule, **options)
    param = torch.zeros((), dtype=torch.float64)
    delta, _ = rule.update({}, torch.ones_like(param), rule.init_state(param), param, context(step, num_steps))
    return -delta.item()


@pytest.mark.parametrize(
    ("schedule", "step", "num_steps", "expected"),
    [
        ("constant", 10**6, 100, 0.5),
        ("exponential", 0, None, 0.5),
        ("exponential", 20, 100, 0.125),
        ("cosine", 0, 100, 0.5),
        ("cosine", 50, 100, 0.25),
        ("cosine", 100, 100, 0.0),
        ("cosine", 170, 100, 0.0),
        ("cosine", 170, None, 0.5),
    ],
)
def test_eta_min_schedules(schedule, step, num_steps, expected):
    assert first_range(schedule, step, num_steps, eta_min_half_life=10.0) == pytest.approx(expected, abs=1e-15)
