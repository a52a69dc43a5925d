"""The step of `scheduled` in eager PyTorch is the rule: stacked, chunked, with all of its mechanisms."""

import math

import pytest
import star_trajectory
import torch
from kernel_cases import assert_same, both, centered_gradients, in_roles, scheduled
from optimizer_cases import parameters, set_gradients

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer, kernels
from lightning_lopt.kernels.cpu import scheduled as cpu
from lightning_lopt.kernels.eager import scheduled as eager

SHAPES = [(), (5,), (5,), (1, 1), (4, 3), (4, 3), (4, 3), (130, 7), (2, 3, 3, 3), (3, 4, 70), (1, 300), (300,)]


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "supports", lambda *_: "no compiler here")
    monkeypatch.setattr(eager, "CHUNK", 100)
    monkeypatch.setattr(kernels, "_WARNED", {"no compiler here"})


@pytest.mark.parametrize("make", [scheduled, lambda: lopt.rules.make("scheduled")], ids=["random", "defaults"])
@pytest.mark.parametrize("num_steps", [5, None])
def test_every_schedule(make, num_steps):
    pair = both(
        lambda: parameters(SHAPES),
        make(),
        6,
        gradients=centered_gradients,
        backends=("reference", "auto"),
        num_steps=num_steps,
        safeguard=True,
    )
    assert_same(*pair)


@pytest.mark.parametrize("length", star_trajectory.LENGTHS)
def test_star_moves_as_recorded(length):
    found = star_trajectory.trajectory(length, torch.float32, "auto")
    for step, params in star_trajectory.recorded(length, torch.float32).items():
        for a, b in zip(params, found[step], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("broken", [4, 7], ids=["in a stack", "in chunks"])
def test_what_is_not_finite_is_skipped_alone_and_counted(broken):
    """And what only leaves the range of float32 in its square is not."""
    pair = []
    for backend in ("reference", "auto"):
        params = parameters(SHAPES)
        optimizer = RuleOptimizer(in_roles(params), scheduled(), backend=backend, safeguard=True)
        for step, value in enumerate((1.0, math.inf, math.nan, 1e20)):
            set_gradients(params, step)
            params[broken].grad[-1, 0] = value
            optimizer.measure_next_step()
            optimizer.step()
        pair.append(optimizer)
    assert_same(*pair)
    assert [o.num_skipped() for o in pair] == [2, 2]
    one, other = (o.take_metrics() for o in pair)
    torch.testing.assert_close(one.update_rms, other.update_rms, rtol=1e-4, atol=0)
    torch.testing.assert_close(one.nominal_share, other.nominal_share, rtol=1e-4, atol=0)
