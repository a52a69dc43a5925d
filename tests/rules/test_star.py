"""STAR against the authors' trajectories, against a plain NumPy writing of it, and against finite differences."""

import itertools

import goldens
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_star import ReferenceSTAR
from torch import Tensor

from lightning_lopt.rules import STAR, StepContext, make

TERM_CONFIGS = {
    "star": {},
    "hyperparam": {},
    "blackbox": {},
    "decay": {"weight_decay": 0.02, "regularization_controller": True},
    "decay alone": {"weight_decay": 0.02, "step_mult": 0.0, "nominal_stepsize": 0.0},
    "nothing": {"step_mult": 0.0, "nominal_stepsize": 0.0},
}
FLAGS = {
    "nominal_controller": (False, True),
    "normalize_blackbox": (False, True),
    "selfnormalize_blackbox": (False, True),
    "aggregate_magnitude": (False, True),
    "aggregate_nom_magnitude": (False, True),
    "weight_decay, regularization_controller, aggregate_reg_magnitude": (
        (0.0, False, False),
        (0.02, False, False),
        (0.02, True, False),
        (0.02, True, True),
    ),
}
ESTIMATORS = ("SGD", "SGDM", "AggMo", "Adam", "AdamAggMo")


def random_theta(rng: np.random.Generator, heads: int = 4) -> dict[str, np.ndarray]:
    shapes = {"w0": (39, 4), "b0": (4,), "w1": (4, 4), "b1": (4,), "w2": (4, heads), "b2": (heads,)}
    theta = {name: rng.normal(size=shape) * 0.4 for name, shape in shapes.items()}
    # rms and adafactor offsets reach beyond where their decays are clipped to 0; the momenta's are not clipped.
    decays = {"momentum_decays": (3, 0.25), "rms_decays": (1, 0.8), "adafactor_decays": (3, 0.8)}
    return theta | {name: rng.uniform(-reach, reach, size) for name, (size, reach) in decays.items()}


def assert_equal_runs(theta, options, shape, grads, rng) -> None:
    """Our rule and the NumPy one, from the same parameter, over the same gradients: in torch's layout and in JAX's."""
    rule, reference = STAR.from_jax(theta, layout="torch", **options), ReferenceSTAR(theta, shape, **options)
    meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
    expected = rng.normal(size=shape)
    param = goldens.to_torch(expected)
    state = rule.init_state(param)
    for step, grad in enumerate(grads):
        context = StepContext(torch.tensor(float(step), dtype=torch.float64))
        delta, state = rule.update(meta_params, goldens.to_torch(grad), state, param, context)
        param = param + delta
        expected = reference.step(np.asarray(expected), np.asarray(grad))
        np.testing.assert_allclose(
            param, goldens.to_torch(expected), rtol=1e-9, atol=1e-9, err_msg=f"step {step} of {options}"
        )


# --- the authors' trajectories


@pytest.mark.parametrize("leaf", goldens.LEAVES)
@pytest.mark.parametrize("precision", goldens.DTYPES)
@pytest.mark.parametrize("name", goldens.CONFIGS)
def test_replays_the_recorded_trajectory(name, precision, leaf):
    golden = goldens.load(name, precision)
    tolerance = {"rtol": 0, "atol": golden.tolerance}
    recorded = golden.recorded("params", leaf)
    steps = list(goldens.replay(golden, leaf))
    for step, _, _, _, param in steps:
        torch.testing.assert_close(param, recorded[step], **tolerance)
    state = steps[-1][3]
    last = {"acc_m": state.exp_avg, "acc_rms": state.exp_avg_sq.unsqueeze(0)}
    last |= {"acc_vrow": state.row, "acc_vcol": state.col, "acc_vdiag": state.diag}
    for what, accumulator in last.items():
        assert accumulator.numel() == golden.recorded(what, leaf).numel()
        torch.testing.assert_close(accumulator, golden.channels(what, leaf, accumulator.shape[1:]), **tolerance)


@pytest.mark.parametrize("leaf", goldens.LEAVES)
@pytest.mark.parametrize("name", goldens.CONFIGS)
def test_the_numpy_reference_replays_the_recorded_trajectory(name, leaf):
    golden = goldens.load(name, "f64")
    param = golden.initial(leaf).numpy()
    reference = ReferenceSTAR(golden.theta, param.shape, **golden.arguments)
    for step, grad in enumerate(golden.gradients(leaf).numpy()):
        param = reference.step(param, grad)
        np.testing.assert_allclose(param, golden.recorded("params", leaf)[step].numpy(), rtol=0, atol=1e-12)


# --- the NumPy reference


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_the_numpy_reference_in_every_configuration(estimator):
    rng = np.random.default_rng(1)
    for values in itertools.product(*FLAGS.values()):
        options = {"nominal_grad_estimator": estimator, "nominal_stepsize": 0.03, "exp_mult": (0.5, 0.4, 0.3)}
        for names, value in zip(FLAGS, values, strict=True):
            options |= dict(zip(names.split(", "), value if isinstance(value, tuple) else (value,), strict=True))
        assert_equal_runs(random_theta(rng), options, (2, 3), rng.normal(size=(3, 2, 3)), rng)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.sampled_from([1, 2, 2, 3, 4]), max_size=4).map(tuple),
    scales=st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 1.0, 1.0, 30.0, 1e8]), min_size=10, max_size=10),
    options=st.fixed_dictionaries(
        {
            "nominal_grad_estimator": st.sampled_from(ESTIMATORS),
            "nominal_stepsize": st.sampled_from([0.0, 1e-3, 0.1]),
            "step_mult": st.sampled_from([0.0, 1e-3, 0.1]),
            "exp_mult": st.sampled_from([(1e-3, 1e-3, 1e-3), (0.5, 0.4, 0.3), (-0.1, 0.0, 0.1)]),
            "weight_decay": st.sampled_from([0.0, 0.01]),
            **{name: st.booleans() for name in list(FLAGS)[:-1]},
            **{name: st.booleans() for name in ("regularization_controller", "aggregate_reg_magnitude")},
        }
    ),
)
def test_equals_the_numpy_reference_on_any_shape_and_scale(seed, shape, scales, options):
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(len(scales), *shape)) * np.reshape(scales, (-1, *[1] * len(shape)))
    assert_equal_runs(random_theta(rng), options, shape, grads, rng)


def test_blackbox_equals_the_numpy_reference():
    rng = np.random.default_rng(2)
    for shape in ((), (3,), (2, 3), (2, 2, 2)):
        assert_equal_runs(random_theta(rng, heads=2), {"step_mult": 0.01}, shape, rng.normal(size=(5, *shape)), rng)


# --- meta-parameters


@pytest.mark.parametrize(("kind", "count"), [("star", 207), ("hyperparam", 207), ("blackbox", 197)])
def test_number_of_meta_parameters(kind, count):
    rule = make(kind)
    assert rule.num_meta_params() == sum(value.numel() for value in rule.meta_params().values()) == count


def test_fresh_meta_parameters_are_the_references_initialization():
    """Weights truncated normal at two standard deviations 1 / sqrt(fan in), all else zero."""
    for name, value in make("star", hidden_size=64).named_parameters():
        if name.startswith("w"):
            parent = value.shape[0] ** -0.5
            assert value.abs().max() <= 2 * parent
            assert value.std().item() == pytest.approx(0.88 * parent, rel=0.1)  # 0.88: what the truncation leaves
        else:
            assert not value.any()


def test_other_network_sizes():
    rule = make("star", hidden_size=8, hidden_layers=3)
    assert {name: tuple(p.shape) for name, p in rule.named_parameters() if name[0] == "w"} == {
        "w0": (39, 8),
        "w1": (8, 8),
        "w2": (8, 8),
        "w3": (8, 4),
    }
    delta, _ = step_once(rule, torch.ones(3, 2), torch.ones(3, 2))
    assert delta.shape == (3, 2)


# --- terms


@pytest.mark.parametrize("name", TERM_CONFIGS)
def test_terms_add_up_to_the_update(name):
    rule = make(name if name in ("hyperparam", "blackbox") else "star", **TERM_CONFIGS[name]).double()
    param, grad = torch.rand(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    _, state = step_once(rule, grad, param)
    arguments = (rule.meta_params(), grad * 2, state, param, StepContext(torch.tensor(1.0)))
    delta, _ = rule.update(*arguments)
    torch.testing.assert_close(sum(rule.terms(*arguments).values(), torch.zeros_like(param)), delta, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("star", {"blackbox", "nominal"}),
        ("hyperparam", {"nominal"}),
        ("blackbox", {"blackbox"}),
        ("decay", {"blackbox", "nominal", "decay"}),
        ("nothing", set()),
    ],
)
def test_terms_are_those_that_the_configuration_has(name, expected):
    rule = make(name if name in ("hyperparam", "blackbox") else "star", **TERM_CONFIGS[name])
    param = torch.rand(2)
    assert (
        set(rule.terms(rule.meta_params(), param, rule.init_state(param), param, StepContext(torch.tensor(0.0))))
        == expected
    )


def test_weight_decay_is_per_step_and_multiplied_by_no_stepsize():
    rule = make("star", step_mult=0.0, nominal_stepsize=0.0, weight_decay=0.25)
    delta, _ = step_once(rule, torch.ones(2), torch.tensor([4.0, -8.0]))
    assert delta.tolist() == [-1.0, 2.0]


# --- vmap and autograd


def test_vmap_over_a_population_equals_a_loop():
    rule = make("star", exp_mult=(0.5, 0.4, 0.3), weight_decay=0.01, regularization_controller=True).double()
    rng = torch.Generator().manual_seed(3)

    def update(meta_params, grad, state, param, step):
        return rule.update(meta_params, grad, state, param, StepContext(step))

    for shape in ((), (5,), (4, 3), (2, 3, 2, 2)):
        meta_params = population(rule, 4, rng)
        params, grads = (torch.randn(4, *shape, generator=rng, dtype=torch.float64) for _ in range(2))
        states = torch.func.vmap(rule.init_state)(params)
        for step in range(3):
            steps = torch.arange(4.0, dtype=torch.float64) + step
            now = grads * (step + 1)
            deltas, states_after = torch.func.vmap(update)(meta_params, now, states, params, steps)
            for member in range(4):
                own = {name: value[member] for name, value in meta_params.items()}
                own_state = type(states)(*(field[member] for field in states))
                delta, state = update(own, now[member], own_state, params[member], steps[member])
                torch.testing.assert_close(deltas[member], delta, rtol=1e-12, atol=1e-15)
                for batched, single in zip(states_after, state, strict=True):
                    torch.testing.assert_close(batched[member], single, rtol=1e-12, atol=1e-15)
            states, params = states_after, params + deltas


def test_meta_gradient_equals_central_differences():
    """d (mean loss after each of 3 steps) / d (every meta-parameter), through states, features and inner gradients."""
    config = {"nominal_stepsize": 0.1, "step_mult": 0.03, "exp_mult": (0.5, 0.4, 0.3)}
    rule = make("star", weight_decay=0.05, regularization_controller=True, **config).double()
    theta = {name: value.detach().clone() for name, value in rule.meta_params().items()}
    generator = torch.Generator().manual_seed(4)
    for name in ("momentum_decays", "rms_decays", "adafactor_decays"):
        theta[name] += 0.05 * torch.randn(theta[name].shape, generator=generator, dtype=torch.float64)
    start = {shape: torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (5,))}

    def meta_loss(meta_params: dict[str, Tensor]) -> Tensor:
        return sum(unrolled_loss(rule, meta_params, param) for param in start.values())

    gradient = torch.func.grad(meta_loss)(theta)
    for name, value in theta.items():
        offsets = 1e-6 * torch.eye(value.numel(), dtype=torch.float64).reshape(-1, *value.shape)
        plus, minus = (
            torch.func.vmap(lambda offset, name=name, value=value: meta_loss({**theta, name: value + offset}))(
                sign * offsets
            )
            for sign in (1, -1)
        )
        numeric = ((plus - minus) / 2e-6).reshape(value.shape)
        assert (gradient[name] - numeric).norm() <= 1e-5 * numeric.norm(), name
        assert numeric.norm() > 1e-6, f"{name} has no influence, so nothing was tested"


def test_autograd_and_func_grad_agree():
    rule = make("star").double()
    param = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    unrolled_loss(rule, rule.meta_params(), param).backward()
    gradient = torch.func.grad(lambda theta: unrolled_loss(rule, theta, param))(
        {name: value.detach() for name, value in rule.meta_params().items()}
    )
    for name, value in rule.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad, gradient[name])


def step_once(rule: STAR, grad: Tensor, param: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return rule.update(rule.meta_params(), grad, rule.init_state(param), param, StepContext(torch.tensor(0.0)))


def population(rule: STAR, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: value.detach() + 0.05 * torch.randn(size, *value.shape, generator=generator, dtype=value.dtype)
        for name, value in rule.meta_params().items()
    }


def unrolled_loss(rule: STAR, meta_params: dict[str, Tensor], param: Tensor, num_steps: int = 3) -> Tensor:
    """Mean of the losses after each step, on a quadratic with curvatures from 0.5 to 3."""
    curvature = torch.linspace(0.5, 3.0, param.numel(), dtype=param.dtype).reshape(param.shape)
    state, total = rule.init_state(param), torch.zeros((), dtype=param.dtype)
    for step in range(num_steps):
        delta, state = rule.update(meta_params, curvature * param, state, param, StepContext(torch.tensor(float(step))))
        param = param + delta
        total = total + (0.5 * curvature * param.square()).mean() / num_steps
    return total
