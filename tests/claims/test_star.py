"""Claims about STAR and about estimators: checks, arithmetic, measurements and plots."""

import math

import numpy
import pytest
import torch
from matplotlib.figure import Figure

from lightning_lopt.analysis import nqm as analysis_nqm
from lightning_lopt.claims import Experiment, Measurement, estimators, nqm, star, star_general, verdict
from lightning_lopt.claims.star import DIVERGED, END, GROWTH, MEAN, START, Scale
from lightning_lopt.evaluation import Runs

AS_PUBLISHED = {  # variant -> meta-loss at the start, at the end, on average; growth of the loss; share that diverged
    "STAR wd 0.1": (0.9, 0.20, 0.4, -0.5, 0.0),
    "STAR wd 0.5": (0.9, 0.21, 0.5, -0.7, 0.0),
    "Blackbox": (2.0, 0.50, 1.0, 0.9, 0.8),
    "Hyperparam": (0.9, 0.30, 0.6, -0.3, 0.0),
}


def numbers_of(table):
    names = (START, END, MEAN, GROWTH, DIVERGED)
    return {f"{n}, {variant}": [v] * 3 for variant, row in table.items() for n, v in zip(names, row, strict=True)}


def held(checks, table):
    return [check(numbers_of(table)) for check in checks]


def test_figure_3_passes_as_published_and_fails_otherwise():
    assert verdict(held(star.FIGURE_3, AS_PUBLISHED)) == "reproduced"
    for variant, column, value in (
        ("Blackbox", 1, 0.19),
        ("Blackbox", 2, 0.39),
        ("Blackbox", 3, -0.1),
        ("Blackbox", 0, 0.5),  # it diverges, but it had learned nothing: the control fails
        ("Hyperparam", 1, 0.1),
        ("Hyperparam", 2, 0.1),
        ("STAR wd 0.1", 3, 0.1),
        ("STAR wd 0.5", 4, 0.5),
    ):
        row = list(AS_PUBLISHED[variant])
        row[column] = value
        assert verdict(held(star.FIGURE_3, {**AS_PUBLISHED, variant: row})) == "partly", (variant, column)


def test_one_unstable_meta_seed_is_enough():
    numbers = numbers_of(AS_PUBLISHED)
    numbers[f"{DIVERGED}, STAR wd 0.1"] = [0.0, 0.0, 0.25]
    assert [check.text for check in star.FIGURE_3 if not check(numbers)] == [
        f"{DIVERGED}, STAR wd 0.1 <= 0 with every seed"
    ]


def runs_with(curve, final, initial=2.0):
    ones = [1.0] * len(final)
    return Runs(2000, [initial] * len(final), final, final, ones, ones, ones, curve)


def test_growth_is_the_final_loss_over_that_at_the_horizon():
    # A hundred intervals: the second ends at a fiftieth of the run, the horizon.
    curve = [[3.0, 0.5] + [0.1] * 98, [3.0, 1.5] + [0.1] * 98]
    assert star._growth(runs_with(curve, [0.2, 0.4])) == pytest.approx(math.log10(0.3))
    diverged = runs_with(curve, [math.nan, math.nan])
    assert star._growth(diverged) == pytest.approx(math.log10(4.0))  # twice the initial loss at most
    assert star.mean_curve(diverged)[1] == 1.0


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(star, "QUICK", Scale(horizon=4, num_steps=2, every=1, pairs=1, truncation=2))
    monkeypatch.setattr(star, "RUNS", 2)
    monkeypatch.setattr(star_general, "QUICK_STEPS", 10)


def test_figures_of_meta_training_are_measured_and_drawn(tiny, tmp_path):
    experiment = Experiment(seeds=2, quick=True, cache_dir=tmp_path)
    names = ("STAR wd 0.1", "No Nom.")
    measured = star.measure(experiment, names, "mlp")
    assert {name.split(", ")[1] for name in measured.numbers} == set(names)
    assert all(map(math.isfinite, (value for values in measured.numbers.values() for value in values)))
    assert len(measured.numbers[f"{END}, STAR wd 0.1"]) == 2
    worst = max(measured.numbers[f"{END}, STAR wd 0.1"])
    assert (
        measured.numbers[f"{star.WITHOUT_WORST}, STAR wd 0.1"]
        == [min(measured.numbers[f"{END}, STAR wd 0.1"])]
        != [worst]
    )
    curve = measured.data["meta"]["STAR wd 0.1"]
    assert (curve["steps"], [len(row) for row in curve["seeds"]]) == ([0, 1, 2], [3, 3])
    assert curve["seeds"][0] != curve["seeds"][1]  # the meta-seeds differ
    assert isinstance(star.plot(measured), Figure)
    assert isinstance(star.plot(measured, each=True), Figure)
    again = Experiment(seeds=2, quick=True, cache_dir=tmp_path, progress=lambda *_: pytest.fail("it should be cached"))
    assert star.measure(again, names, "mlp").numbers == measured.numbers


def test_generalization_is_measured_and_drawn(tiny, monkeypatch):
    monkeypatch.setattr(star_general, "MAIN", ("STAR wd 0.1", "STAR wd 0.5", "Blackbox"))
    target = star_general.Target("wider", "digits-mlp", {"hidden": (40,)})
    measured = star_general.measure(Experiment(seeds=2, quick=True), [target])
    losses = {
        name: measured.numbers[star_general.quantity(name, target)] for name in (*star_general.STARS, "better STAR")
    }
    assert losses["better STAR"] == min(losses.values(), key=sum)
    assert all(len(row) == 2 for row in losses.values())
    (adam,) = measured.numbers[star_general.quantity("tuned Adam", target)]
    assert adam < 0.9
    assert measured.numbers[star_general.RATIO] == [pytest.approx(math.log10(numpy.mean(losses["better STAR"]) / adam))]
    assert len(measured.numbers[f"{START}, Blackbox"]) == len(measured.numbers[f"{END}, Blackbox"]) == 2
    assert isinstance(star_general.plot(measured), Figure)


def test_the_nominal_terms_step_is_chosen_on_another_seed():
    """Two alphas beside 0: each seed's own best would always be below alpha 0; the other seed's need not be."""
    curves = torch.tensor([[[1.0], [0.1], [10.0]], [[1.0], [10.0], [0.1]]])
    (found,) = nqm.variance_ratios(curves, [1], [1]).values()
    assert found == pytest.approx([1.0, 1.0])
    curves[1] = curves[0]
    (found,) = nqm.variance_ratios(curves, [1], [1]).values()
    assert found == pytest.approx([-1.0, -1.0])


def test_lemma_3_is_tight():
    """Beyond its bound there are disturbances that diverge, so that a check of none within it can fail."""
    generator = torch.Generator().manual_seed(0)
    hessian, _, alpha = nqm.random_cases(200, 3, generator, symmetric=True)
    P = torch.diag_embed(3 / torch.linalg.eigvalsh(hessian)[:, -1:].expand(-1, 3))
    matrices = analysis_nqm.dynamics_matrix(hessian, P, alpha)
    assert not analysis_nqm.lemma3_margins(hessian, P, alpha, torch.ones(200)).hold.any()
    assert not nqm.stable(matrices).any()


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
