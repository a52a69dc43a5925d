"""The nominal term: its directions, its size, and where it stands still."""

import math

import pytest
import torch

from lightning_lopt.rules import StepContext, make, nominal

GRAD = torch.tensor([1.0, -2.0], dtype=torch.float64)
MOMENTA = torch.tensor([[3.0, 6.0], [1.0, -1.0], [5.0, 4.0]], dtype=torch.float64)  # slowest last
INVERSE_ROOT = torch.tensor([10.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("SGD", [1.0, -2.0]),
        ("SGDM", [5.0, 4.0]),
        ("AggMo", [3.0, 3.0]),
        ("Adam", [50.0, 2.0]),
        ("AdamAggMo", [30.0, 1.5]),
    ],
)
def test_directions(estimator, expected):
    assert nominal.nominal_direction(estimator, GRAD, MOMENTA, INVERSE_ROOT).tolist() == expected


def test_every_estimator_has_a_direction_in_this_table():
    assert set(nominal.ESTIMATORS) == {"SGD", "SGDM", "AggMo", "Adam", "AdamAggMo"}


def test_magnitude_is_the_exponential_of_the_head_or_of_its_mean():
    head = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert nominal.magnitude(0.5, head).tolist() == pytest.approx([math.exp(0.5), math.exp(1.5)])
    assert nominal.magnitude(0.5, head, aggregate=True).item() == pytest.approx(math.e)


def test_the_first_step_is_1_17_times_the_stepsize():
    """No bias correction: mean(1 - b) / sqrt(1 - c) with b = .9, .99, .999 and c = .999."""
    rule = make("hyperparam", nominal_controller=False, exp_mult=(0.0, 0.0, 0.0), nominal_stepsize=1e-3).double()
    param = torch.zeros(3, dtype=torch.float64)
    grad = torch.tensor([1e4, -1e5, 1e6], dtype=torch.float64)  # large beside the preconditioner's 1e-6
    delta, _ = rule.update(rule.meta_params(), grad, rule.init_state(param), param, StepContext(torch.tensor(0.0)))
    expected = 1e-3 * (0.1 + 0.01 + 0.001) / 3 / math.sqrt(1e-3)
    assert expected == pytest.approx(1.17e-3, rel=1e-3)
    torch.testing.assert_close(delta, -expected * grad.sign(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("estimator", nominal.ESTIMATORS)
def test_zero_gradients_leave_the_nominal_term_at_rest(estimator):
    rule = make("hyperparam", nominal_grad_estimator=estimator)
    param, grad = torch.rand(4, 3), torch.zeros(4, 3)
    state = rule.init_state(param)
    for step in range(5):
        delta, state = rule.update(rule.meta_params(), grad, state, param, StepContext(torch.tensor(float(step))))
        assert torch.equal(delta, torch.zeros_like(param))
        assert all(field.isfinite().all() for field in state)


def test_zero_gradients_move_a_preconditioned_blackbox_by_a_thousand_times_its_multiplier():
    """A deviation of the code from the paper's text that users meet as dead units that move; see star.py."""
    rule = make("star", nominal_stepsize=0.0, exp_mult=(0.0, 0.0, 0.0), step_mult=1e-3).double()
    plain = make("star", nominal_stepsize=0.0, exp_mult=(0.0, 0.0, 0.0), step_mult=1.0, normalize_blackbox=False)
    param = torch.ones(2, 2, dtype=torch.float64)
    arguments = (torch.zeros_like(param), rule.init_state(param), param, StepContext(torch.tensor(0.0)))
    delta, _ = rule.update(rule.meta_params(), *arguments)
    direction, _ = plain.update(rule.meta_params(), *arguments)
    torch.testing.assert_close(delta, direction)
    assert delta.abs().max() > 0.01
