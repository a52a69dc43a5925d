"""The history rules at work: the thesis's sum of squares, zeros and ties, populations, meta-gradients, resume."""

import functools
import itertools

import numpy as np
import pytest
import torch
from history_cases import VARIANTS, by_name, context, trajectory
from torch import Tensor, nn

from lightning_lopt import RuleOptimizer, tasks
from lightning_lopt.rules import StepContext, make

DEFAULTS = {
    "k": 5,
    "timescales": (),
    "step": "softmax",
    "sign_only": False,
    "normalization": "max",
    "parameter_inputs": False,
    "reference": "mid-range",
    "eta_min": 1e-3,
    "eta_min_schedule": "constant",
    "eta_min_half_life": 1000.0,
}


def descent(rule, param: Tensor, num_steps: int):
    """Yields the parameter and the state on the sum of squares."""
    state = rule.init_state(param)
    for step in range(num_steps):
        delta, state = rule.update({}, 2 * param, state, param, context(step))
        param = param + delta
        yield param, state


# --- the thesis's sum of squares, in its 1,000 dimensions


@functools.cache
def sum_of_squares(optimizer: str, value: float, num_steps: int = 1000, dtype: torch.dtype = torch.float32) -> Tensor:
    """The losses, the start's first."""
    task = tasks.make("sum-of-squares")
    start = task.init(torch.Generator().manual_seed(0)).params["x"]
    param = nn.Parameter(start.to(dtype))
    if optimizer == "adam":
        inner: torch.optim.Optimizer = torch.optim.Adam([param], lr=value)
    else:
        inner = RuleOptimizer([param], make("mng", k=5, eta_min=value, sign_only=optimizer == "signs"))
    losses = []
    for _ in range(num_steps + 1):
        loss = task.loss({"x": param}, {})
        losses.append(loss.detach().double())
        inner.zero_grad()
        loss.backward()
        inner.step()
    return torch.stack(losses)


@pytest.mark.parametrize("lr", [1e-3, 1e-2, 1e-1])
def test_mng_is_below_adam_on_the_sum_of_squares(lr):
    mng, adam = sum_of_squares("mng", 1e-3), sum_of_squares("adam", lr)
    assert (mng < adam)[50:201].all()
    assert mng.sum() < adam.sum()


def test_eta_min_is_a_floor_below_which_adam_comes_in_the_end():
    assert sum_of_squares("mng", 1e-3)[-1] > 1e6 * sum_of_squares("adam", 1e-1)[-1]


def test_a_smaller_eta_min_starts_later_and_ends_lower():
    curves = [sum_of_squares("mng", eta_min, 200) for eta_min in (1e-1, 1e-2, 1e-3, 1e-4)]
    for larger, smaller in itertools.pairwise(curves):
        assert smaller[10] > larger[10]
        assert smaller[100:].max() < 0.1 * larger[100:].min()


def test_the_smallest_eta_min_of_the_thesis_makes_no_progress_for_want_of_precision():
    """1e-7 is below half a unit in the last place of most of the start's coordinates in float32, not in float64."""
    single, double = (sum_of_squares("mng", 1e-7, 200, dtype) for dtype in (torch.float32, torch.float64))
    assert single[-1] > 0.9 * single[0]
    assert double[-1] < 1e-9 * double[0]


@pytest.mark.parametrize("eta_min", [1e-2, 1e-3, 1e-4])
def test_signs_alone_do_worse(eta_min):
    """From step 40 on; before, they are faster, which the thesis does not say."""
    default, signs = sum_of_squares("mng", eta_min, 200), sum_of_squares("signs", eta_min, 200)
    assert (default[60:] < signs[60:]).all()
    assert default[20] > signs[20]


def test_mng_needs_the_mid_range():
    """The thesis says that what came after MNG can be applied to it; its other reference point cannot."""
    rule, param = make("mng", reference="current"), torch.linspace(-10, 10, 100)
    *_, (moved, _) = descent(rule, param, 200)
    assert moved.square().sum() > 1e3 * param.square().sum()


# --- zeros and ties


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1e-30])
def test_zeros_and_ties_are_finite_with_their_derivatives(name, value):
    """Tied gradients and parameters, and a parameter of exactly 0."""
    rule = by_name(name).float()

    def moved(meta_params, scale):
        param, state = torch.zeros(3), rule.init_state(torch.zeros(3))
        for step in range(7):
            delta, state = rule.update(meta_params, scale * torch.full((3,), value), state, param, context(step))
            param = param + delta
        return param.sum()

    meta_params = {name: p.detach() for name, p in rule.meta_params().items()}
    result = moved(meta_params, torch.ones(()))
    gradients = torch.func.grad(moved, argnums=(0, 1))(meta_params, torch.ones(()))
    assert all(tensor.isfinite().all() for tensor in (result, *gradients[0].values(), gradients[1]))


def test_without_gradient_mng_stays_or_moves_to_the_mid_range():
    param = torch.tensor([2.0])
    for moved, _ in trajectory(make("mng"), param, [torch.zeros(1)] * 8):
        assert torch.equal(moved, param)


# --- vmap, autograd, the optimizer


@pytest.mark.parametrize("name", VARIANTS)
def test_members_of_a_population_may_stand_at_different_steps(name):
    """Each has its own place in the ring, and so its own order of the first layer's rows."""
    rule, params = by_name(name), torch.randn(3, 4, dtype=torch.float64)
    meta_params = {k: v.detach() for k, v in rule.meta_params().items()}
    states = []
    for member, param in enumerate(params):
        grads = torch.randn(3 * member + 1, 4, dtype=torch.float64)
        *_, (_, state) = trajectory(rule, param, grads)
        states.append(state)
    stacked = type(states[0])(*(torch.stack(field) for field in zip(*states, strict=True)))
    grads, steps = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1.0, 4.0, 7.0])
    update = lambda g, s, p, t: rule.update(meta_params, g, s, p, StepContext(t, num_steps=10))  # noqa: E731
    deltas, _ = torch.func.vmap(update)(grads, stacked, params, steps)
    for member in range(3):
        delta, _ = update(grads[member], states[member], params[member], steps[member])
        torch.testing.assert_close(deltas[member], delta, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("mng")])
def test_meta_gradient_equals_central_differences(name):
    """d (mean loss over 8 steps) / d (every meta-parameter), through ring or averages and inner gradients."""
    rule = by_name(name, seed=1, hidden_size=4, eta_min=0.1)
    theta = {k: 0.5 * v.detach() for k, v in rule.meta_params().items()}
    curvature = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)

    def meta_loss(meta_params):
        param, total = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 0.0
        state = rule.init_state(param)
        for step in range(8):
            delta, state = rule.update(meta_params, curvature * param, state, param, context(step, 10))
            param = param + delta
            total = total + (0.5 * curvature * param.square()).sum() / 8
        return total

    gradient = torch.func.grad(meta_loss)(theta)
    for key, value in theta.items():
        offsets = 1e-6 * torch.eye(value.numel(), dtype=torch.float64).reshape(-1, *value.shape)
        plus, minus = (
            torch.func.vmap(lambda offset, key=key, value=value: meta_loss({**theta, key: value + offset}))(
                sign * offsets
            )
            for sign in (1, -1)
        )
        numeric = ((plus - minus) / 2e-6).reshape(value.shape)
        assert (gradient[key] - numeric).norm() <= 1e-6 * numeric.norm(), key
        assert numeric.norm() > 1e-6, f"{key} has no influence, so nothing was tested"


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_in_the_middle_of_the_ring_is_equal_to_the_bit(name):
    def run(optimizer, steps):
        for step in steps:
            for param in optimizer.param_groups[0]["params"]:
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).to(param.dtype)
            optimizer.step()

    rule = by_name(name).float()
    shapes = ((4, 3), (), (2, 3, 3, 3))
    whole = RuleOptimizer([nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes], rule)
    run(whole, range(7))
    copies = [nn.Parameter(param.detach().clone()) for param in whole.param_groups[0]["params"]]
    resumed = RuleOptimizer(copies, rule)
    resumed.load_state_dict(whole.state_dict())
    for optimizer in (whole, resumed):
        run(optimizer, range(7, 16))
    for first, second in zip(whole.param_groups[0]["params"], copies, strict=True):
        assert torch.equal(first, second)
        assert all(torch.equal(whole.state[first][key], resumed.state[second][key]) for key in whole.state[first])


# --- configuration


@pytest.mark.parametrize(
    ("kind", "options", "num_meta_params", "num_bytes"),
    [
        ("mng", {}, 0, 40),
        ("k_timesteps", {}, 5 * 50 + 50 + 50 * 12 + 12, 40),
        ("k_timesteps", {"step": "tanh", "k": 3}, 3 * 50 + 50 + 50 + 1, 24),
        ("k_timesteps", {"parameter_inputs": True}, 10 * 50 + 50 + 50 * 12 + 12, 40),
        ("k_momentums", {}, 6 * 50 + 50 + 50 * 12 + 12, 48),
        ("k_momentums", {"normalization": "adam"}, 6 * 50 + 50 + 50 * 12 + 12, 72),
    ],
)
def test_numbers_of_meta_parameters_and_bytes_of_state(kind, options, num_meta_params, num_bytes):
    rule = make(kind, **options)
    assert rule.num_meta_params() == num_meta_params
    sizes = [tensor.numel() * tensor.element_size() for tensor in rule.init_state(torch.zeros(10, 10))]
    assert sum(sizes) == 100 * num_bytes + 8


def test_fresh_meta_parameters_are_the_thesis_initialization():
    rule = make("k_timesteps", k=50)
    for name, value in rule.named_parameters():
        assert value.std().item() == pytest.approx(0.01, rel=0.1) if name[0] == "w" else not value.any()


def test_k_momentums_are_evenly_spaced_timescales():
    config = make("k_momentums").config
    assert config.timescales == pytest.approx(np.linspace(0.2, 0.99, 6))
    assert (config.k, config.reference) == (6, "current")
    assert make("k_momentums", timescales=[0.1, 0.5, 0.9]).config.k == 3


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mng", {"k": 0}, r"k=0 is not allowed"),
        ("mng", {"k": 2.0}, r"k=2.0 is not allowed"),
        ("mng", {"eta_min": -1e-3}, r"eta_min=-0.001 is not allowed"),
        ("mng", {"eta_min": float("nan")}, r"eta_min=nan is not allowed"),
        ("mng", {"sign_only": 1}, r"sign_only=1 is not allowed: it must be true or false"),
        ("mng", {"sign_only": True, "normalization": "adam"}, r"sign_only=True is not allowed"),
        ("mng", {"parameter_inputs": True}, r"parameter_inputs=True is not allowed"),
        ("mng", {"step": "median"}, r"step='median' is not allowed: it must be one of"),
        ("k_timesteps", {"normalization": "l2"}, r"normalization='l2' is not allowed"),
        ("k_timesteps", {"reference": "last"}, r"reference='last' is not allowed"),
        ("k_timesteps", {"eta_min_schedule": "linear"}, r"eta_min_schedule='linear' is not allowed"),
        ("k_timesteps", {"eta_min_half_life": 0.0}, r"eta_min_half_life=0.0 is not allowed"),
        ("k_timesteps", {"hidden_size": 0}, r"hidden_size=0 is not allowed"),
        ("k_timesteps", {"timescales": [0.5]}, r"k=5 is not allowed: it must be 0 or 1"),
        ("k_momentums", {"timescales": [0.5, 1.0]}, r"timescales=\(0.5, 1.0\) is not allowed"),
        ("k_momentums", {"timescales": 0.5}, r"timescales=0.5 is not allowed"),
        ("k_momentums", {"k": 5}, r"k=5 is not allowed: it must be 0 or 6"),
        ("k_momentums", {"timescales": []}, r"k=0 is not allowed"),
    ],
)
def test_configurations_that_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **options)


def test_defaults_are_those_that_this_file_says():
    config = make("k_timesteps").config.to_dict()
    assert config == {**DEFAULTS, "timescales": [], "hidden_size": 50}
