"""STAR's step in eager PyTorch is the rule: stacked, chunked, in every configuration that it takes."""

import pytest
import torch
from kernel_cases import assert_same, both
from optimizer_cases import parameters, set_gradients, snapshot, star

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer, kernels
from lightning_lopt.kernels.cpu import star as cpu
from lightning_lopt.kernels.eager import stacks

# Several of a shape, fewer and more than fit into a chunk; dims that are cut first, in the middle and last.
SHAPES = [(), (5,), (5,), (1, 1), (4, 3), (4, 3), (4, 3), (130, 7), (2, 3, 3, 3), (3, 4, 70), (1, 300), (300,)]
CONFIGS = {
    "paper": {},
    "large steps of the network": {"step_mult": 0.1, "exp_mult": (0.5, 0.5, 0.5), "normalize_blackbox": False},
    "SGD": {"nominal_grad_estimator": "SGD", "nominal_controller": False},
    "SGDM": {"nominal_grad_estimator": "SGDM", "exp_mult": (0.1, 0.3, 0.2)},
    "Adam": {"nominal_grad_estimator": "Adam", "weight_decay": 0.01, "regularization_controller": True},
    "AggMo, decay": {"nominal_grad_estimator": "AggMo", "weight_decay": 0.01, "hidden_size": 7, "hidden_layers": 3},
    "no network": {"step_mult": 0.0, "nominal_controller": False},
    "nothing": {"nominal_stepsize": 0.0, "step_mult": 0.0, "nominal_controller": False},
}


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "supports", lambda rule: "no compiler here")
    monkeypatch.setattr(stacks, "CHUNK", 100)
    monkeypatch.setattr(kernels, "_WARNED", {"no compiler here"})


def eager(rule, make=lambda: parameters(SHAPES), steps=6, **options):
    return both(make, rule, steps, backends=("reference", "auto"), **options)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_configuration(config, monkeypatch):
    rule = star(**config)
    with torch.no_grad():
        for name, value in rule.named_parameters():  # those that start at zero
            if name.startswith("b"):
                value.copy_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    calls = []
    move = stacks.StackKernel.step
    monkeypatch.setattr(stacks.StackKernel, "step", lambda *a, **k: calls.append(len(a[1])) or move(*a, **k))
    assert_same(*eager(rule, safeguard=True))
    assert calls == [len(SHAPES)] * 6


def test_two_heads_groups_and_directions():
    def groups():
        params = parameters(SHAPES)
        first = {"params": params[:4], "lr": 0.5, "weight_decay": 0.1}
        return [first, {"params": params[4:6], "maximize": True}, {"params": params[6:]}]

    assert_same(*eager(lopt.rules.make("blackbox", step_mult=0.1), groups, 3))


def test_low_precision_has_float32_state_and_float64_is_left_to_the_rule():
    def make():
        return [*parameters([(4, 3), (4, 3), (30, 20)], torch.bfloat16), *parameters([(4, 3)], torch.float64)]

    reference, auto = eager(star(), make, 4)
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
                params[broken].grad[-1, 0] = float("inf") if step == 1 else float("nan")
            optimizer.measure_next_step()
            optimizer.step()
        pair.append(optimizer)
    assert_same(*pair)
    assert [o.num_skipped() for o in pair] == [2, 2]
    one, other = (o.take_metrics() for o in pair)
    torch.testing.assert_close(one.update_rms, other.update_rms, rtol=1e-4, atol=0)
    torch.testing.assert_close(one.nominal_share, other.nominal_share, rtol=1e-4, atol=0)


def test_options_that_need_a_mean_of_the_whole_tensor_are_left_to_the_rule():
    reference, auto = eager(star(aggregate_magnitude=True), steps=2)
    for a, b in zip(snapshot(reference), snapshot(auto), strict=True):
        assert torch.equal(a, b)
