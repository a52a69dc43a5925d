"""The torch path that is taken without a compiler is the rule: stacked, chunked, in every configuration that it has."""

import math

import pytest
import torch
from optimizer_cases import parameters, set_gradients, snapshot, star

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer, kernels
from lightning_lopt.kernels.cpu import star as cpu

# Several of a shape, fewer and more than fit into a chunk; dims that are cut first, in the middle and last.
from lightning_lopt.kernels.eager import star as torch_star

# Several of a shape, fewer and more than fit into a chunk; dims that are cut first, in the middle and last.
SHAPES = [(), (5,), (5,), (1, 1), (4, 3), (4, 3), (4, 3), (130, 7), (2, 3, 3, 3), (3, 4, 70), (1, 300), (300,)]
CONFIGS = {
    "paper": {},
    "large steps of the network": {"step_mult": 0.1, "exp_mult": (0.5, 0.5, 0.5), "normalize_blackbox": False},
    "SGD": {"nominal_grad_estimator": "SGD", "nominal_controller": False},
    "SGDM": {"nominal_grad_estimator": "SGDM", "exp_mult": (0.1, 0.3, 0.2)},
    "Adam": {"nominal_grad_estimator": "Adam", "weight_decay": 0.01, "regularization_controller": True},
    "AggMo, decay": {"nominal_grad_estimator": "AggMo", "weight_decay": 0.01, "hidden_size": 7, "hidden_layers": 3},
    "scheduler": {"scheduler": True, "step_mult": 0.1, "eps": 1e-10},
    "as it is shipped": {"scheduler": True, "step_mult": 0.0, "nominal_controller": False},
    "nothing": {"nominal_stepsize": 0.0, "step_mult": 0.0, "nominal_controller": False},
}


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "supports", lambda rule: "no compiler here")
    monkeypatch.setattr(torch_star, "CHUNK", 100)
    monkeypatch.setattr(kernels, "_WARNED", {"no compiler here"})


def both(rule, make=lambda: parameters(SHAPES), steps=6, **options):
    pair = []
    for backend in ("reference", "auto"):
        params = make()
        optimizer = RuleOptimizer(params, rule, backend=backend, **options)
        for step in range(steps):
            set_gradients(params, step)
            optimizer.step()
        pair.append(optimizer)
    return pair


def assert_same(reference, other, tolerance=1e-5):
    for a, b in zip(snapshot(reference), snapshot(other), strict=True):
        assert a.dtype == b.dtype
        size = a.double().abs().max().item() if a.numel() else 0.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * max(size, 1e-6))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_configuration(config, monkeypatch):
    rule = star(**config)
    with torch.no_grad():
        for name, value in rule.named_parameters():  # those that start at zero
            if name.startswith(("schedule", "tensor", "momentum_mix", "b")):
                value.copy_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
            if name == "centering":
                value.copy_(torch.tensor([0.9, 0.5]))
            if name == "caution":
                value.copy_(torch.tensor([0.9, 0.3]))
            if name == "growth":
                value.copy_(torch.tensor([-0.9, 0.5]))
    calls = []
    move = torch_star.TorchStar.step
    monkeypatch.setattr(torch_star.TorchStar, "step", lambda *a, **k: calls.append(len(a[1])) or move(*a, **k))
    assert_same(*both(rule, num_steps=5, safeguard=True))
    assert calls == [len(SHAPES)] * 6


def test_two_heads_groups_and_directions():
    pair, rule = [], lopt.rules.make("blackbox", step_mult=0.1)
    for backend in ("reference", "auto"):
        params = parameters(SHAPES)
        groups = [{"params": params[:4], "lr": 0.5, "weight_decay": 0.1}, {"params": params[4:6], "maximize": True}]
        optimizer = RuleOptimizer([*groups, {"params": params[6:]}], rule, backend=backend)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        pair.append(optimizer)
    assert_same(*pair)


def test_low_precision_has_float32_state_and_float64_is_left_to_the_rule():
    def make():
        return [*parameters([(4, 3), (4, 3), (30, 20)], torch.bfloat16), *parameters([(4, 3)], torch.float64)]

    reference, auto = both(star(), make, steps=4)
    assert_same(reference, auto, 2e-2)
    assert auto.backend == "reference"
    last = [o.param_groups[0]["params"][-1] for o in (reference, auto)]
    assert torch.equal(*last)


@pytest.mark.parametrize("broken", [4, 7], ids=["in a stack", "in chunks"])
def test_what_is_not_finite_is_skipped_alone_and_counted(broken):
    pair = []
    for backend in ("reference", "auto"):
        params = parameters(SHAPES)
        optimizer = RuleOptimizer(params, star(), backend=backend, safeguard=True)
        for step in range(3):
            set_gradients(params, step)
            if step:
                params[broken].grad[-1, 0] = math.inf if step == 1 else math.nan
            optimizer.measure_next_step()
            optimizer.step()
        pair.append(optimizer)
    assert_same(*pair)
    assert [o.num_skipped() for o in pair] == [2, 2]
    one, other = (o.take_metrics() for o in pair)
    torch.testing.assert_close(one.update_rms, other.update_rms, rtol=1e-4, atol=0)
    torch.testing.assert_close(one.nominal_share, other.nominal_share, rtol=1e-4, atol=0)


def test_options_that_need_a_mean_of_the_whole_tensor_are_left_to_the_rule():
    reference, auto = both(star(aggregate_magnitude=True), steps=2)
    for a, b in zip(snapshot(reference), snapshot(auto), strict=True):
        assert torch.equal(a, b)
