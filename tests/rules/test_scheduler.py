"""The learned scheduler against NumPy's interpolation and closed forms."""

import math

import numpy as np
import pytest
import torch

from lightning_lopt.rules import scheduler


def zeros():
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in scheduler.SHAPES.items()}


def factor(meta_params, *, step=50.0, num_steps=101, rms=(0.1, 1.0, 1.0, 1.0), shape=(30, 30), num_tensors=8):
    shapes = torch.tensor([scheduler.shape_features(shape, num_tensors)], dtype=torch.float64)
    squares = torch.tensor([rms], dtype=torch.float64).square()
    return scheduler.multipliers(meta_params, squares, shapes, torch.tensor(step, dtype=torch.float64), num_steps)


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = scheduler.SHAPES.items()
    return {name: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes}


@pytest.mark.parametrize("step", [0, 1, 7, 50, 99, 100, 5000])
@pytest.mark.parametrize("num_steps", [101, 1000, 3000, 100_000])
def test_the_curve_is_piecewise_linear_in_the_fraction_of_the_run_and_in_the_steps_logarithm(step, num_steps):
    theta = drawn()
    values = theta["schedule_fraction"] + theta["schedule_length"] * np.clip(math.log10(num_steps) - 3, -1, 0.5)
    expected = np.interp(min(step / (num_steps - 1), 1), scheduler.FRACTIONS, values.numpy())
    expected += np.interp(math.log10(step + 1), scheduler.LOG_STEPS, theta["schedule_early"].numpy())
    got = scheduler.log_factor(theta, torch.tensor(float(step)), num_steps)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("step", [0, 5, 300, 10**6])
def test_without_a_known_length_the_curve_is_one_of_steps(step):
    theta = drawn()
    expected = np.interp(math.log10(step + 1), scheduler.LOG_STEPS, theta["schedule_step"].numpy())
    np.testing.assert_allclose(scheduler.log_factor(theta, torch.tensor(float(step)), None), expected, atol=1e-6)


@pytest.mark.parametrize(("feature", "change"), [(1, {"rms": (0.4, 1, 1, 1)}), (5, {"rms": (0.1, 4.0, 1, 1)})])
@pytest.mark.parametrize(("kind", "shape"), [(0, (900,)), (1, (30, 30))])
def test_a_tensors_factor_is_a_power_of_its_scale_and_of_its_momenta(kind, shape, feature, change):
    theta = zeros()
    theta["tensor_powers"][kind, :, feature] = 2 * 0.5  # features are half logarithms: the square root
    theta["tensor_powers"][1 - kind] = 9.0  # the other kind's exponents do not matter
    ratio = factor(theta, shape=shape, **change).factor / factor(theta, shape=shape).factor
    assert ratio.item() == pytest.approx(2.0)


def test_exponents_go_from_their_start_to_their_end():
    theta = zeros()
    theta["tensor_powers"][1, 0, 0], theta["tensor_powers"][1, 1, 0] = 1.0, 3.0
    logs = [factor(theta, step=step).factor.log().item() for step in (0.0, 50.0, 100.0, 900.0)]
    assert logs == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert factor(theta, num_steps=None).factor.log().item() == pytest.approx(2.0)


def test_depth_is_held_within_what_was_learned_on():
    theta = zeros()
    theta["tensor_powers"][1, :, 4] = -0.5
    factors = [factor(theta, num_tensors=n).factor.item() for n in (1, 2, 8, 32, 48, 5000, None)]
    expected = [(n / 8) ** -0.5 for n in (2, 2, 8, 32, 48, 48, 8)]
    assert factors == pytest.approx(expected)


def test_a_tensors_own_factor_is_bounded():
    theta = zeros()
    theta["tensor_powers"] += 100.0
    assert factor(theta).factor.log().item() == pytest.approx(scheduler.LARGEST_POWER)


def test_tensors_at_once_are_as_each_alone():
    theta, generator = drawn(1), torch.Generator().manual_seed(2)
    extra = torch.linspace(-1, 1, 5, dtype=torch.float64)
    squares = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    shapes = torch.tensor([scheduler.shape_features(s, 5) for s in [(3,), (4, 5), (), (2, 3, 4), (7, 1)]])
    steps = torch.tensor([0.0, 3.0, 50.0, 99.0, 200.0], dtype=torch.float64)
    together = scheduler.multipliers(theta, squares, shapes.double(), steps, 100, extra)
    for i in range(5):
        own = squares[i : i + 1], shapes[i : i + 1].double(), steps[i]
        alone = scheduler.multipliers(theta, *own, 100, extra[i : i + 1])
        torch.testing.assert_close(together.factor[i : i + 1], alone.factor)
        torch.testing.assert_close(together.momenta[i : i + 1], alone.momenta)


@pytest.mark.parametrize("ends", [(0.0, 0.0), (1.0, 0.5), (0.25, 3.0), (-1.0, 1.0)])
@pytest.mark.parametrize("name", ["caution", "centering"])
def test_a_ramp_goes_from_its_start_to_its_end_within_0_and_1(name, ends):
    theta = {name: torch.tensor(ends)}
    for step, num_steps, fraction in ((0, 101, 0.0), (25, 101, 0.25), (500, 101, 1.0), (7, None, 0.5)):
        expected = np.clip(np.interp(fraction, (0, 1), ends), 0, 1)
        assert scheduler.ramp(theta, name, torch.tensor(float(step)), num_steps).item() == pytest.approx(expected)
