"""How the variance of meta-gradient estimators grows with the horizon.

PES (Vicol et al. 2021, arXiv 2112.13835) is unbiased with short truncations, but its variance grows with their number.
ES-Single (Vicol 2023, arXiv 2304.11153) keeps one perturbation per episode, and its variance does not grow. Gradients
through unstable runs grow without bound (Harrison et al. 2022, arXiv 2209.11208, section 4.1).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lightning_lopt.claims.claim import Claim, Measurement, at_least, at_most
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.plots import Curve, draw_curves
from lightning_lopt.evaluation.baselines import SGDM
from lightning_lopt.meta.estimators import PES, ESSingle, Estimator, FullES, FullUnroll, TruncatedBackprop
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.tasks.analytic import NoisyQuadratic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRUNCATION = 10
MEMBERS = 64
STD = 0.01
LEARNING_RATES = {"stable": 0.5, "unstable": 1.4}
"""Of gradient descent on the noisy quadratic, which is stable up to 2 / 1.4707 = 1.36."""
NAMES = ("Full ES", "PES", "ES-Single", "full unroll", "truncated backprop")


def make_estimator(name: str, horizon: int) -> Estimator:
    """An estimator with `MEMBERS` antithetic pairs, or `MEMBERS` runs."""
    lengths = Horizon(horizon)
    estimators: dict[str, Estimator] = {
        "Full ES": FullES(num_pairs=MEMBERS, horizon=horizon, std=STD),
        "PES": PES(num_pairs=MEMBERS, truncation=TRUNCATION, std=STD, horizon=lengths),
        "ES-Single": ESSingle(num_pairs=MEMBERS, truncation=TRUNCATION, std=STD, horizon=lengths),
        "full unroll": FullUnroll(num_runs=MEMBERS, horizon=horizon),
        "truncated backprop": TruncatedBackprop(num_runs=MEMBERS, truncation=TRUNCATION, horizon=lengths),
    }
    return estimators[name]


def variance(
    estimator: Estimator, lr: float, num: int, warmup: int, seed: int, report: Callable[[int], None] | None = None
) -> float:
    """Variance of one member's estimate of the meta-gradient with respect to gradient descent's learning rate.

    Members are independent, so this is their number times the variance of their mean, over `num` successive estimates.
    `warmup` estimates before those fill a staggered population. `report` is called with the number of estimates so far.
    """
    rule = SGDM(lr=lr, momentum=0.0)
    params = {name: param.detach() for name, param in rule.named_parameters()}
    learned = {"lr": params.pop("lr")}
    unroll = Unroll(rule, NoisyQuadratic(init_std=1.0), "raw", frozen=params)
    generator = torch.Generator().manual_seed(seed)
    state = estimator.init(unroll, learned, generator)
    found = []
    for number in range(1, warmup + num + 1):
        estimate = estimator.estimate(unroll, learned, state, generator)
        state = estimate.state
        found.append(float(estimate.meta_grad["lr"]))
        if report:
            report(number)
    return MEMBERS * statistics.variance(found[warmup:])


def growth(case: str, name: str) -> str:
    """Name of the quantity: the variance at the longest horizon divided by that at the shortest."""
    return f"{case} runs: growth of the variance, {name}"


def measure(experiment: Experiment) -> Measurement:
    """The variance at each horizon, and its growth from the shortest to the longest."""
    horizons = experiment.pick((10, 30, 100, 300), (10, 30, 100))
    num = experiment.pick(100, 20)
    numbers: dict[str, list[float]] = {}
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for case, lr in LEARNING_RATES.items():
        curves[case] = {}
        for name in NAMES:
            rows = [[_variance(experiment, name, lr, h, num, seed) for h in horizons] for seed in experiment.seeds]
            curves[case][name] = rows
            numbers[growth(case, name)] = [row[-1] / row[0] for row in rows]
    return Measurement(numbers, {"horizons": list(horizons), "curves": curves})


def _variance(experiment: Experiment, name: str, lr: float, horizon: int, num: int, seed: int) -> float:
    estimator = make_estimator(name, horizon)
    if isinstance(estimator, (FullES, FullUnroll)):
        # Whole runs are expensive and each starts afresh: take fewer of them, without warm-up.
        count = max(num // 5, 10)
        warmup = 0
    else:
        count = num
        warmup = horizon // TRUNCATION + 1
    key = {"estimator": repr(estimator), "lr": lr, "num": count, "warmup": warmup, "seed": seed}

    def compute() -> dict[str, Any]:
        report = experiment.reporter(f"{name}, horizon {horizon}, lr {lr}, seed {seed}", warmup + count)
        return {"variance": variance(estimator, lr, count, warmup, seed, report)}

    value: float = experiment.cached("estimator-variance", key, compute)["variance"]
    return value


def plot(measured: Measurement) -> Figure:
    """Plot the variance over the horizon, for stable and for unstable inner runs."""
    from matplotlib.figure import Figure

    data = measured.data
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, (case, rows) in zip(panels, data["curves"].items(), strict=True):
        draw_curves(panel, [Curve(name, data["horizons"], values) for name, values in rows.items()])
        panel.set_xscale("log")
        panel.set_xticks(data["horizons"], [f"{horizon}" for horizon in data["horizons"]], minor=False)
        panel.minorticks_off()
        panel.set_title(f"{case} inner runs, learning rate {LEARNING_RATES[case]}")
        panel.set(xlabel="horizon of the inner runs, steps", ylabel="variance of a meta-gradient")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return figure


CLAIMS = (
    Claim(
        id="estimators-variance",
        source="Vicol et al. 2021 (arXiv 2112.13835), Vicol 2023 (arXiv 2304.11153), and Harrison et al. 2022 "
        "(arXiv 2209.11208), section 4.1",
        title="a noisy quadratic of two dimensions, one meta-parameter, horizons of 10 to 300 steps",
        in_paper="Vicol: an LSTM copy task, a toy of two dimensions and others; STAR: a remark in the text.",
        statement="The variance of PES grows with the number of truncations per episode, that of ES-Single does not; "
        "the variance of gradients through unstable inner runs diverges with the horizon.",
        setup="The learning rate of gradient descent is the only meta-parameter, on STAR's noisy quadratic with starts "
        f"of variance 1; horizons of 10 to 300 steps, truncations of {TRUNCATION}, std {STD}, staggered episodes. The "
        "variance is that of the estimate of one antithetic pair or one run, from one truncation (Full ES and the full "
        "unroll: one whole run), over at least 20 estimates of 64 each.",
        measure=measure,
        checks=(
            at_least(growth("stable", "PES"), 3.0, published="grows with the number of truncations"),
            at_most(growth("stable", "ES-Single"), 2.0, published="constant in the number of truncations"),
            at_least(growth("unstable", "full unroll"), 1e3, published="diverges for long horizons"),
            at_most(growth("stable", "full unroll"), 2.0, published="bounded for stable dynamics"),
        ),
        minutes=6,
        quick_minutes=0.5,
        plot=plot,
    ),
)
