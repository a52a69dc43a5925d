"""Claims about the learned GRUs: what they measure of a rule whose mechanisms are known."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from lightning_lopt import rules, tasks
from lightning_lopt.analysis.findings import analyze
from lightning_lopt.claims import Measurement, find, gru, gru_mechanisms
from lightning_lopt.claims.gru_mechanisms import BEYOND, DECAY, FALLS, SLOPE, TENSORS, WARM_UP, measure_rule, of


def analyzed(rule):
    torch.manual_seed(0)
    return measure_rule(analyze(rule, tasks.make("linear-regression"), steps=20, runs=2))


def test_gradient_descent_has_none_of_the_mechanisms():
    """An untrained GRU returns 0, which leaves the nominal term: a linear rule with one learning rate."""
    found = analyzed(rules.make("gru", nominal_stepsize=0.5, nominal_grad_estimator="SGD", hidden_size=4))
    assert found[SLOPE] == pytest.approx(1.0)
    assert (found[BEYOND], found[FALLS]) == (0.0, 0.0)
    assert found[WARM_UP] == pytest.approx(1.0)
    assert found[DECAY] == pytest.approx(1.0)
    assert found[TENSORS] == pytest.approx(1.0)
    for name in ("gru-clipping", "gru-tensors", "gru-schedule"):
        (claim,) = find([name])
        numbers = {
            quantity: [found[quantity.split(": ")[1]]] * 2 for check in claim.checks for quantity in check.quantities
        }
        held = {check.text for check in claim.checks if check(numbers)}
        assert held < {check.text for check in claim.checks}, name  # every claim can fail
    (claim,) = find(["gru-clipping"])
    numbers = {
        quantity: [found[quantity.split(": ")[1]]] * 2 for check in claim.checks for quantity in check.quantities
    }
    saturates = [check for check in claim.checks if SLOPE in check.text]
    assert len(saturates) == 4
    assert not any(check(numbers) for check in saturates)


def test_the_quick_measurement_has_a_number_per_rule_and_seed(monkeypatch):
    from lightning_lopt.claims import Experiment

    (claim,) = find(["gru-adaptation"])
    monkeypatch.setattr(gru_mechanisms, "RUNS", dict.fromkeys(gru_mechanisms.RUNS, 1))
    names = gru_mechanisms.FIRST_THREE[:2]
    measured = gru_mechanisms._measure(Experiment(seeds=2, quick=True), names, (gru_mechanisms.ADAPTED,))
    assert set(measured.numbers) == {of(gru_mechanisms.ADAPTED, name) for name in names}
    assert all(len(values) == 2 and not any(map(math.isnan, values)) for values in measured.numbers.values())
    assert {quantity for check in claim.checks for quantity in check.quantities} > set(measured.numbers)


def test_figure_17_compares_problem_by_problem():
    """Problems differ by much more than the optimizers do on each: paired, the difference counts."""
    (claim,) = find(["gru-rosenbrock-figure-17"])
    problems = [0.01, 0.1, 0.5, 0.9]
    numbers = {f"objective of {name}": [value + 0.01 for value in problems] for name in gru.BASELINES}
    numbers |= {"objective of gru-rosenbrock": problems, "settings at a grid's edge": [0.0]}
    assert all(check(numbers) for check in claim.checks)
    numbers["settings at a grid's edge"] = [1.0]  # the grid was too small: nothing counts
    assert not any(check(numbers) for check in claim.checks)
    assert isinstance(gru.draw(Measurement(numbers)), Figure)
