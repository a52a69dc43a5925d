"""The C++ step of `scheduled` is the rule but for rounding: every schedule, every shape, gradients of every size."""

import pytest
import star_trajectory
import torch
from kernel_cases import SHAPES, assert_same, both, centered_gradients, scheduled
from optimizer_cases import parameters, set_gradients
from torch import nn

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.kernels.cpu import scheduled as cpu

CONFIGS = {
    "a schedule of random numbers": (scheduled, {}),
    "large eps": (scheduled, {"eps": 1}),  # an int, which is not a literal of C++'s floats
    "nothing learned": (lambda **config: lopt.rules.make("scheduled", **config), {}),
    "readable numbers": (
        lambda **config: lopt.rules.make("scheduled", **config),
        {"peak": 1.0, "anneal": 1.0, "scale": 1.0, "mix_end": 2.0, "centering_start": 1.0, "caution_end": 1.0},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    if why := cpu.supports(scheduled()):
        pytest.skip(why)


@pytest.mark.parametrize(("make", "config"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("num_steps", [15, None])
def test_every_schedule(make, config, num_steps):
    shapes, steps = (SHAPES, 50) if make is scheduled and not config else (SHAPES[3:10], 20)
    rule = make(**config)
    assert_same(*both(lambda: parameters(shapes), rule, steps, num_steps=num_steps, safeguard=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_with_means_and_zeros_are_centered(maximize, dtype, tolerance):
    options = {"gradients": centered_gradients, "num_steps": 9, "maximize": maximize}
    assert_same(*both(lambda: parameters(SHAPES, dtype), scheduled(), 4, **options), tolerance)


@pytest.mark.parametrize(("num_steps", "safeguard"), [(15, True), (None, False)])
def test_float64_has_a_kernel_in_double_precision(num_steps, safeguard):
    shapes = SHAPES[:14]  # the largest has several blocks
    pair = both(lambda: parameters(shapes, torch.float64), scheduled(), 50, num_steps=num_steps, safeguard=safeguard)
    assert_same(*pair, 1e-12)
    assert {t.dtype for state in pair[1].state.values() for t in state.values()} == {torch.float64, torch.int64}


@pytest.mark.parametrize("config", [{"eps": 1}, {"eps": 1e-20}], ids=str)
def test_constants_are_in_double_precision(config):
    assert_same(*both(lambda: parameters(SHAPES[:8], torch.float64), scheduled(**config), 20), 1e-12)


def test_parameters_of_all_dtypes_take_turns():
    """In one optimizer: those of lower precision by the kernel in float32, the others by that in float64."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float64)
    reference, fused = both(
        lambda: [p for dtype in dtypes for p in parameters([(4, 3), (5,)], dtype)], scheduled(), 20, num_steps=15
    )
    assert_same(reference, fused, 2e-2)
    for a, b in zip(reference.state, fused.state, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol={torch.float32: 1e-5, torch.float64: 1e-12}.get(a.dtype, 1e-2))


def test_what_is_measured_in_float64():
    pair = [
        RuleOptimizer(parameters(SHAPES[3:6], torch.float64), scheduled(), backend=b) for b in ("reference", "fused")
    ]
    for optimizer in pair:
        set_gradients(optimizer.param_groups[0]["params"], 0)
        optimizer.measure_next_step()
        optimizer.step()
    for a, b in zip(*(optimizer.take_metrics() for optimizer in pair), strict=True):
        assert (a is None) == (b is None)
        assert a is None or float(a) == pytest.approx(float(b), rel=1e-6)


@pytest.mark.parametrize("length", star_trajectory.LENGTHS)
def test_star_moves_as_recorded(length):
    found = star_trajectory.trajectory(length, torch.float32, "fused")
    for step, params in star_trajectory.recorded(length, torch.float32).items():
        for a, b in zip(params, found[step], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("safeguard", [False, True])
@pytest.mark.parametrize("shape", [(5,), (30, 40), (3, 40000)], ids=str)
@pytest.mark.parametrize(("dtype", "large", "tolerance"), [(torch.float32, 1e20, 1e-5), (torch.float64, 3e155, 1e-12)])
def test_gradients_whose_squares_leave_the_range_are_the_rules(shape, safeguard, dtype, large, tolerance):
    """AdamW too stays finite at 1e20, and moves on."""

    def gradients(params, step, scale):
        set_gradients(params, step, scale)
        if step == 2:
            params[0].grad.flatten()[3] = large

    pair = both(lambda: parameters([shape], dtype), scheduled(), 6, gradients=gradients, safeguard=safeguard)
    assert_same(*pair, tolerance)
    assert all(tensor.isfinite().all() for state in pair[1].state.values() for tensor in state.values())
    before = pair[1].param_groups[0]["params"][0].detach().clone()
    pair[1].step()
    assert not torch.equal(before, pair[1].param_groups[0]["params"][0])


def test_infinite_second_moments_move_nothing_more():
    """1 / sqrt(inf) is 0, as in the rule: without safeguard a coordinate stands still, and is not NaN."""

    def gradients(params, step, scale):
        set_gradients(params, step, scale)
        params[0].grad[3] = 3e30 if step == 0 else 1.0

    reference, fused = both(lambda: parameters([(40,)]), scheduled(), 3, gradients=gradients)
    assert_same(reference, fused)
    assert fused.state[fused.param_groups[0]["params"][0]]["exp_avg_sq"][3] == float("inf")


def test_a_row_longer_than_a_block_is_summed_once_for_all_its_blocks():
    """By one thread and by three, to the bit; matrix products, of hidden layers, are torch's and depend on threads."""
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            params = parameters([(3, 50000), (200, 700)])
            optimizer = RuleOptimizer([{"params": params, "role": "output"}], scheduled(), num_steps=9)
            for step in range(3):
                centered_gradients(params, step, 1.0)
                optimizer.step()
        finally:
            torch.set_num_threads(1)
        found.append(params)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_what_the_kernel_does_not_take_is_an_error_when_it_is_asked_for():
    class Mine(lopt.rules.Scheduled):
        pass

    with pytest.raises(ValueError, match="Mine is not the class"):
        RuleOptimizer([nn.Parameter(torch.ones(3))], Mine(), backend="fused")
