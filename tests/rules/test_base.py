"""Configurations, the registry, and the dtype of arithmetic."""

import json
import math

import pytest
import torch

from lightning_lopt.rules import REGISTRY, STAR, RuleConfig, STARConfig, UpdateRule, compute_dtype, make, register

NOT_A_SIZE = (-1.0, math.nan, math.inf, "1e-3", None, True, (1e-3,))
NOT_A_FLAG = (1, 0.0, "true", None)
NOT_THREE_DECAYS = ((0.9, 0.99), (0.9, 0.99, 1.0), (0.9, 0.99, -0.1), (0.9, 0.99, math.nan), 0.9, None)
BAD_VALUES = {
    "nominal_stepsize": NOT_A_SIZE,
    "step_mult": NOT_A_SIZE,
    "weight_decay": NOT_A_SIZE,
    "exp_mult": ((1e-3, 1e-3), (1e-3, 1e-3, math.nan), (1e-3, 1e-3, True), "abc", None, math.inf, True),
    "nominal_grad_estimator": ("adam", "", None, 3),
    "nominal_controller": NOT_A_FLAG,
    "normalize_blackbox": NOT_A_FLAG,
    "regularization_controller": NOT_A_FLAG,
    "selfnormalize_blackbox": NOT_A_FLAG,
    "aggregate_magnitude": NOT_A_FLAG,
    "aggregate_nom_magnitude": NOT_A_FLAG,
    "aggregate_reg_magnitude": NOT_A_FLAG,
    "eps": (0.0, -1e-6, 2.0, "1e-6", None),
    "hidden_size": (0, -1, 1025, 4.0, "4", None, True),
    "hidden_layers": (0, 17, 2.0, "2", None),
    "layout": ("numpy", "", None, 1, ["torch"]),
    "num_heads": (0, 3, 5, "4", None),
    "initial_momentum_decays": NOT_THREE_DECAYS,
    "initial_rms_decays": ((0.9, 0.99), (), (1.0,), 0.999, None),
    "initial_adafactor_decays": NOT_THREE_DECAYS,
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_config_refuses(name, value):
    with pytest.raises(ValueError, match="is not allowed: it must be") as error:
        STARConfig.from_dict({name: value})
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_every_config_field_has_bad_values_in_the_table():
    assert set(BAD_VALUES) == set(STARConfig().to_dict())


@pytest.mark.parametrize("name", ["nominal_controller", "regularization_controller"])
def test_config_refuses_a_controller_without_its_head(name):
    with pytest.raises(ValueError, match=f"{name}=True .* num_heads=2"):
        make("blackbox", **{name: True})


def test_config_survives_json():
    config = STARConfig(exp_mult=(0.5, 0.4, 0.3), nominal_grad_estimator="SGDM", weight_decay=0.1)
    assert STARConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        STARConfig().step_mult = 1.0


def test_config_refuses_unknown_keys():
    with pytest.raises(ValueError, match=r"Unknown config key 'lr'; allowed are \['aggregate_magnitude', "):
        STARConfig.from_dict({"lr": 1e-3})


def test_make_refuses_unknown_kinds():
    with pytest.raises(ValueError, match="Unknown kind 'adam'; known are .*'blackbox'.*'star'"):
        make("adam")


@pytest.mark.parametrize("kind", REGISTRY)
def test_make_gives_the_kind_asked_for(kind):
    rule = make(kind)
    assert isinstance(rule, REGISTRY[kind].rule)
    assert rule.kind == kind
    assert rule.config == REGISTRY[kind].rule.Config.from_dict(REGISTRY[kind].defaults)
    assert f"kind={kind!r}" in repr(rule)


def test_make_puts_its_arguments_before_the_kinds_defaults():
    assert make("hyperparam").config.step_mult == 0
    assert make("hyperparam", step_mult=0.5).config.step_mult == 0.5


def test_register_refuses_names_that_cannot_be_kinds():
    with pytest.raises(ValueError, match="kind='my rule' is not allowed"):
        register("my rule", STAR)


def test_register_refuses_a_name_that_is_taken():
    class Other(UpdateRule):
        pass

    with pytest.raises(ValueError, match="kind='star' is taken by STAR"):
        register("star", Other)
    assert REGISTRY["star"].rule is STAR


def test_register_makes_a_rule_known(monkeypatch):
    class Own(UpdateRule):
        Config = RuleConfig

    monkeypatch.setattr("lightning_lopt.rules.base.REGISTRY", dict(REGISTRY))
    register("own", Own)
    assert isinstance(make("own"), Own)
    assert make("own").num_meta_params() == 0


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_compute_dtype(dtype, expected):
    assert compute_dtype(dtype) == expected
