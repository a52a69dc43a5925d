"""Reading the authors' meta-parameters."""

import goldens
import numpy as np
import pytest
import torch

from lightning_lopt.rules import STAR, StepContext, make

STAR_THETA = goldens.load("star_paper", "f64").theta
BLACKBOX_THETA = goldens.load("blackbox_default", "f64").theta


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"w2": None}, {}, "no matrix 'w2'"),
        ({"w2": np.zeros(4)}, {}, "no matrix 'w2'"),
        ({"b1": None}, {}, r"theta\['b1'\] has shape None, expected \(4,\)"),
        ({"w3": np.zeros((4, 4))}, {}, r"theta\['w3'\] has shape \(4, 4\), expected None"),
        ({"w1": np.zeros((4, 5))}, {}, r"theta\['w1'\] has shape \(4, 5\), expected \(4, 4\)"),
        ({"w2": np.zeros((4, 3))}, {}, r"theta\['w2'\] has shape \(4, 3\), expected \(4, 4\)"),
        ({"rms_decays": np.zeros(3)}, {}, r"theta\['rms_decays'\]"),
        ({}, {"eps": 1e-8}, "'eps' is not an argument of the reference"),
        ({}, {"split_weights": True}, "split_weights=True"),
        ({}, {"make_separate_weights": True}, "make_separate_weights=True"),
        ({}, {"stepmult": 1e-3}, "Unknown config key 'stepmult'"),
        ({}, {"step_mult": -1.0}, r"step_mult=-1.0"),
        ({}, {"hidden_size": 8}, r"expected \(8,\)"),
    ],
)
def test_refuses(changes, arguments, message):
    theta = {name: value for name, value in {**STAR_THETA, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message) as error:
        STAR.from_jax(theta, **arguments)
    assert "\n" not in str(error.value)


def test_defaults_are_the_references_own():
    rule = STAR.from_jax(STAR_THETA)
    assert rule.kind == "star"
    assert rule.config.nominal_stepsize == 0
    assert not rule.config.nominal_controller
    assert not rule.config.normalize_blackbox


def test_two_columns_give_the_blackbox_rule():
    rule = STAR.from_jax(BLACKBOX_THETA)
    assert rule.kind == "blackbox"
    assert rule.config == make("blackbox", layout="jax").config
    assert rule.num_meta_params() == 197


def test_star_with_the_references_defaults_is_the_blackbox_with_two_dead_heads():
    two_heads = {**STAR_THETA, "w2": STAR_THETA["w2"][:, :2], "b2": STAR_THETA["b2"][:2]}
    rules = STAR.from_jax(STAR_THETA), STAR.from_jax(two_heads)
    param, grads = torch.ones(3, 2), torch.randn(4, 3, 2)
    trajectories = []
    for rule in rules:
        value, state = param, rule.init_state(param)
        for step, grad in enumerate(grads):
            delta, state = rule.update(rule.meta_params(), grad, state, value, StepContext(torch.tensor(float(step))))
            value = value + delta
        trajectories.append(value)
    torch.testing.assert_close(*trajectories, rtol=0, atol=1e-7)


def test_weights_and_their_dtype_are_kept():
    theta = {name: value.astype(np.float64) for name, value in STAR_THETA.items()}
    for name, value in STAR.from_jax(theta).named_parameters():
        assert value.dtype == torch.float64
        assert value.requires_grad
        assert np.array_equal(value.detach().numpy(), theta[name])


def test_weights_are_copied():
    theta = {name: value.copy() for name, value in STAR_THETA.items()}
    rule = STAR.from_jax(theta)
    theta["w0"][:] = 0
    assert rule.w0.any()


def test_numpy_arguments_become_plain_configuration():
    arguments = {
        "exp_mult": np.array([0.5, 0.4, 0.3]),
        "step_mult": np.float32(0.5),
        "nominal_controller": np.bool_(True),
        "nominal_grad_estimator": np.str_("Adam"),
        "concat_weights": True,
    }
    config = STAR.from_jax(STAR_THETA, **arguments).config
    assert config.exp_mult == (0.5, 0.4, 0.3)
    assert [type(value) for value in (config.step_mult, config.nominal_controller)] == [float, bool]
    assert config.nominal_grad_estimator == "Adam"


def test_the_blackbox_takes_the_references_scalar_exp_mult():
    assert STAR.from_jax(BLACKBOX_THETA, exp_mult=0.5).config.exp_mult == (0.5, 0.5, 0.5)
