"""The C++ step of STAR is the rule: the same but for rounding, in every configuration that the network has."""

import warnings

import pytest
import torch
from kernel_cases import SHAPES, assert_same, both
from optimizer_cases import AdamRule, parameters, run, snapshot, star

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.kernels.cpu import star as cpu

CONFIGS = {
    "paper": {},
    "large steps of the network": {"step_mult": 0.1, "exp_mult": (0.5, 0.5, 0.5)},
    "SGD": {"nominal_grad_estimator": "SGD", "nominal_controller": False},
    "SGDM": {"nominal_grad_estimator": "SGDM", "exp_mult": (0.1, 0.3, 0.2)},
    "AggMo": {"nominal_grad_estimator": "AggMo", "normalize_blackbox": False},
    "Adam": {"nominal_grad_estimator": "Adam", "selfnormalize_blackbox": True, "step_mult": 1.0},
    "decay": {"weight_decay": 0.01},
    "controlled decay": {"weight_decay": 0.01, "regularization_controller": True, "exp_mult": (0.1, 0.1, 2.0)},
    "one magnitude a tensor": {
        "aggregate_magnitude": True,
        "aggregate_nom_magnitude": True,
        "exp_mult": (2.0, 2.0, 1.0),
    },
    "no network": {"step_mult": 0.0, "nominal_controller": False, "weight_decay": 0.1},
    "network alone": {"nominal_stepsize": 0.0, "step_mult": 0.1},
    "small eps": {"eps": 1e-10},
    "large eps": {"eps": 1},  # an int, which is not a literal of C++'s floats
    "decays": {"initial_momentum_decays": (0.1, 0.5, 0.9), "initial_rms_decays": (0.5,)},
    "another network": {"hidden_size": 7, "hidden_layers": 3, "step_mult": 0.1},
}


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    if why := cpu.supports(star()):
        pytest.skip(why)


def rule_of(config):
    rule = star(**config)
    with torch.no_grad():
        for name, value in rule.named_parameters():  # those that start at zero
            if name.startswith("b"):
                value.copy_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
            if name.endswith("decays"):
                value.add_(0.01)
    return rule


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_configuration(config):
    shapes, steps = (SHAPES, 50) if not config else ([*SHAPES[3:10], (50, 1), (1, 50)], 20)
    assert_same(*both(lambda: parameters(shapes), rule_of(config), steps, safeguard=True))


@pytest.mark.parametrize("config", [{}, {"step_mult": 0.1}, {"step_mult": 0.1, "layout": "jax"}], ids=str)
def test_two_heads(config):
    rule = lopt.rules.make("blackbox", **config)
    assert_same(*both(lambda: parameters([*SHAPES[:10], (8, 8)]), rule, 20))


def test_the_kernels_estimators_are_the_rules():
    grad, exp_avg, root = torch.randn(5), torch.randn(3, 5), torch.rand(5)
    assert set(cpu.DIRECTIONS) == set(lopt.rules.nominal.ESTIMATORS)
    for name, (weights, by_root) in cpu.DIRECTIONS.items():
        direction = torch.tensor(weights) @ torch.stack([grad, *exp_avg]) * (root if by_root else 1)
        torch.testing.assert_close(direction, lopt.rules.nominal.nominal_direction(name, grad, exp_avg, root))


def test_decay_as_the_users_optimizer_has_it():
    pair = []
    for backend in ("reference", "fused"):
        adam = torch.optim.AdamW(parameters([(4, 3), (5,)]), lr=0.1, weight_decay=0.2)
        optimizer = RuleOptimizer.replacing(adam, star(), lr="scale", weight_decay="decoupled", backend=backend)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        run(optimizer, 10, scheduler=scheduler)
        pair.append(optimizer)
    assert_same(*pair)


def test_large_magnitudes_are_looked_at_and_pass():
    # exp of up to +-40: no bound proves such steps finite, and they are.
    config = {"exp_mult": (3.0, 3.0, 3.0)}
    assert_same(*both(lambda: parameters([(30, 20)]), rule_of(config), steps=5, safeguard=True), 1e-3)


def test_float64_takes_the_rule_beside_the_kernel():
    pair = both(
        lambda: [*parameters([(4, 3)], torch.float64), *parameters([(4, 3)])],
        star(),
        5,
        backends=("reference", "auto"),
    )
    assert pair[1].backend == "fused"
    assert torch.equal(*(o.param_groups[0]["params"][0] for o in pair))  # the float64 one, to the bit
    for a, b in zip(*map(snapshot, pair), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_the_kernel_does_not_take_is_an_error_when_it_is_asked_for():
    with pytest.raises(ValueError, match=r"'fused' is missing for parameter 0 of group 0 .*float64.*'reference'"):
        RuleOptimizer(parameters([(3,)], torch.float64), star(), backend="fused")
    with pytest.raises(ValueError, match="up to 64 units, this one has 100"):
        RuleOptimizer(parameters([(3,)]), star(hidden_size=100), backend="fused")

    class Mine(lopt.rules.STAR):
        pass

    with pytest.raises(ValueError, match="Mine is not the class"):
        RuleOptimizer(parameters([(3,)]), Mine(kind="star"), backend="fused")


def test_auto_is_quiet_where_no_kernel_was_ever_written():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = RuleOptimizer(parameters([(3,)]), AdamRule())
        run(optimizer, 1)
    assert optimizer.backend == "reference"
