"""Claims about STAR and about estimators: checks, arithmetic, measurements and plots."""

import math

import numpy
import pytest
from matplotlib.figure import Figure

from lightning_lopt.claims import Experiment, Measurement, estimators, star, star_general, verdict
from lightning_lopt.claims.star import DIVERGED, END, GROWTH, MEAN, Scale
from lightning_lopt.evaluation import Runs

AS_PUBLISHED = {  # variant -> meta-loss at the end and on average, growth of the loss, share that diverged
    "STAR wd 0.1": (0.20, 0.4, 0.3, 0.0),
    "STAR wd 0.5": (0.21, 0.5, 0.2, 0.0),
    "Blackbox": (0.50, 1.0, 8.0, 0.8),
    "Hyperparam": (0.30, 0.6, 0.5, 0.0),
}


def numbers_of(table):
    names = (END, MEAN, GROWTH, DIVERGED)
    return {f"{n}, {variant}": [v] * 3 for variant, row in table.items() for n, v in zip(names, row, strict=True)}


def held(checks, table):
    return [check(numbers_of(table)) for check in checks]


def test_figure_3_passes_as_published_and_fails_otherwise():
    assert verdict(held(star.FIGURE_3, AS_PUBLISHED)) == "reproduced"
    for variant, column, value in (
        ("Blackbox", 0, 0.19),
        ("Blackbox", 1, 0.39),
        ("Blackbox", 2, 0.9),
        ("Hyperparam", 0, 0.1),
        ("STAR wd 0.1", 2, 1.1),
        ("STAR wd 0.5", 3, 0.5),
    ):
        row = list(AS_PUBLISHED[variant])
        row[column] = value
        assert verdict(held(star.FIGURE_3, {**AS_PUBLISHED, variant: row})) == "partly", (variant, column)


def runs_with(curve, final, initial=2.0):
    ones = [1.0] * len(final)
    return Runs(2000, [initial] * len(final), final, final, ones, ones, ones, curve)


def test_growth_is_the_final_loss_over_that_at_the_horizon():
    # A hundred intervals: the tenth ends at the horizon.
    curve = [[3.0] * 9 + [0.5] + [0.1] * 90, [3.0] * 9 + [1.5] + [0.1] * 90]
    assert star._growth(runs_with(curve, [0.2, 0.4])) == pytest.approx(0.3)
    diverged = runs_with(curve, [math.nan, math.nan])
    assert star._growth(diverged) == pytest.approx(4.0)  # twice the initial loss at most
    assert star.mean_curve(diverged)[9] == 1.0


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(star, "QUICK", Scale(horizon=4, num_steps=2, every=1, pairs=1, truncation=2))
    monkeypatch.setattr(star, "RUNS", 2)
    monkeypatch.setattr(star_general, "QUICK_STEPS", 10)


def test_figures_of_meta_training_are_measured_and_drawn(tiny, tmp_path):
    experiment = Experiment(seeds=2, quick=True, cache_dir=tmp_path)
    names = ("STAR wd 0.1", "No Nom.")
    measured = star.measure(experiment, names, "digits-mlp")
    assert {name.split(", ")[1] for name in measured.numbers} == set(names)
    assert all(len(values) == 2 and all(map(math.isfinite, values)) for values in measured.numbers.values())
    curve = measured.data["meta"]["STAR wd 0.1"]
    assert (curve["steps"], [len(row) for row in curve["seeds"]]) == ([0, 1, 2], [3, 3])
    assert curve["seeds"][0] != curve["seeds"][1]  # the meta-seeds differ
    assert isinstance(star.plot(measured), Figure)
    assert isinstance(star.plot(measured, each=True), Figure)
    again = Experiment(seeds=2, quick=True, cache_dir=tmp_path, progress=lambda *_: pytest.fail("it should be cached"))
    assert star.measure(again, names, "digits-mlp").numbers == measured.numbers


def test_generalization_is_measured_and_drawn(tiny, monkeypatch):
    monkeypatch.setattr(star_general, "MAIN", ("STAR wd 0.1", "STAR wd 0.5"))
    target = star_general.Target("wider", "digits-mlp", {"hidden": (40,)})
    measured = star_general.measure(Experiment(seeds=1, quick=True), [target])
    assert set(measured.numbers) == {
        star_general.quantity(name) for name in ("STAR wd 0.1", "STAR wd 0.5", "tuned Adam", "better STAR")
    }
    losses = {name: values[0] for name, values in measured.numbers.items()}
    better = losses[star_general.quantity("better STAR")]
    assert better == min(losses[star_general.quantity(name)] for name in star_general.MAIN)
    assert losses[star_general.quantity("tuned Adam")] < 0.9
    assert isinstance(star_general.plot(measured), Figure)


# --- Estimators ---


def test_variance_of_one_step_is_that_of_its_closed_form():
    """Outside truth: with one update the gradient is -(x1 - xi1)' H H (x0 - xi0), x1 = x0 - lr H (x0 - xi0)."""
    random, hessian, lr = numpy.random.default_rng(0), numpy.array([[1.11, 0.596], [0.596, 0.486]]), 0.5
    x0, first, second = random.standard_normal((3, 400_000, 2))
    slope = (x0 - first) @ hessian
    gradient = -((x0 - lr * slope - second) @ hessian * slope).sum(1)
    estimator = estimators.make_estimator("full unroll", 1)
    found = estimators.variance(estimator, lr, num=150, warmup=0, seed=0)
    assert found == pytest.approx(gradient.var(), rel=0.4)  # four standard errors; fourth moments are large


def test_the_variance_plot():
    rows = {name: [[1.0, 2.0], [2.0, 3.0]] for name in estimators.NAMES}
    measured = Measurement({}, {"horizons": [10, 100], "curves": {"stable": rows, "unstable": rows}})
    assert len(estimators.plot(measured).axes) == 2
