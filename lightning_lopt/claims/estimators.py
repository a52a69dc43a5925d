"""How the variance of meta-gradient estimators grows with the horizon.

PES (Vicol et al. 2021, arXiv 2112.13835) is unbiased from short truncations, at the price of a variance that grows with
their number; ES-Single (Vicol 2023, arXiv 2304.11153) keeps one perturbation for an episode, and its variance does not.
Gradients through unstable runs grow without bound (Harrison et al. 2022, arXiv 2209.11208, section 4.1).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lightning_lopt.claims.base import Claim, Measured, at_least, at_most
from lightning_lopt.claims.lab import Lab
from lightning_lopt.claims.plots import Curve, draw_curves
from lightning_lopt.evaluation.baselines import SGDM
from lightning_lopt.meta.estimators import PES, ESSingle, Estimator, FullES, FullUnroll, TruncatedBackprop
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.tasks.analytic import NoisyQuadratic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRUNCATION, MEMBERS, STD = 10, 64, 0.01
STABLE, UNSTABLE = 0.5, 1.4
"""Learning rates of gradient descent on the noisy quadratic, which is stable up to 2 / 1.4707 = 1.36."""
NAMES = ("Full ES", "PES", "ES-Single", "full unroll", "truncated backprop")


def make_estimator(name: str, horizon: int) -> Estimator:
    """One with `MEMBERS` antithetic pairs, or as many runs."""
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
    estimator: Estimator, lr: float, num: int, warmup: int, seed: int, told: Callable[[int], None] | None = None
) -> float:
    """Variance of one member's estimate of the meta-gradient with respect to gradient descent's learning rate.

    The members of an estimate are independent, so that it is their number times the variance of their mean, which is
    taken over `num` estimates one after the other. `warmup` estimates before them fill a staggered population. `told`
    is called with the number of estimates so far.
    """
    rule = SGDM(lr=lr, momentum=0.0)
    params = {name: param.detach() for name, param in rule.named_parameters()}
    learned = {"lr": params.pop("lr")}
    unroll = Unroll(rule, NoisyQuadratic(init_std=1.0), "raw", frozen=params)
    generator = torch.Generator().manual_seed(seed)
    state, found = estimator.init(unroll, learned, generator), []
    for number in range(1, warmup + num + 1):
        estimate = estimator.estimate(unroll, learned, state, generator)
        state = estimate.state
        found.append(float(estimate.meta_grad["lr"]))
        if told:
            told(number)
    return MEMBERS * statistics.variance(found[warmup:])


def growth(case: str, name: str) -> str:
    """The quantity's name: the variance at the longest horizon divided by that at the shortest."""
    return f"{case} runs: growth of the variance, {name}"


def measure(lab: Lab) -> Measured:
    """The variance at each horizon, and its growth from the shortest to the longest."""
    horizons, num = lab.pick((10, 30, 100, 300), (10, 30, 100)), lab.pick(100, 20)
    numbers: dict[str, list[float]] = {}
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for case, lr in (("stable", STABLE), ("unstable", UNSTABLE)):
        curves[case] = {}
        for name in NAMES:
            rows = [[_piece(lab, name, lr, horizon, num, seed) for horizon in horizons] for seed in lab.seeds]
            curves[case][name] = rows
            numbers[growth(case, name)] = [row[-1] / row[0] for row in rows]
    return Measured(numbers, {"horizons": list(horizons), "curves": curves})


def _piece(lab: Lab, name: str, lr: float, horizon: int, num: int, seed: int) -> float:
    estimator = make_estimator(name, horizon)
    whole = isinstance(estimator, (FullES, FullUnroll))
    # Whole runs are dear, and start afresh: fewer of them, and none to warm up.
    count, warmup = (max(num // 5, 10), 0) if whole else (num, horizon // TRUNCATION + 1)
    key = {"estimator": repr(estimator), "lr": lr, "num": count, "warmup": warmup, "seed": seed}

    def compute() -> dict[str, Any]:
        told = lambda done: lab.progress(f"{name}, horizon {horizon}, lr {lr}, seed {seed}", done, warmup + count)  # noqa: E731
        return {"variance": variance(estimator, lr, count, warmup, seed, told)}

    value: float = lab.piece("estimator-variance", key, compute)["variance"]
    return value


def plot(measured: Measured) -> Figure:
    """Variance over horizon, for stable and for unstable inner runs."""
    from matplotlib.figure import Figure

    data = measured.data
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {
        "stable": f"stable inner runs, learning rate {STABLE}",
        "unstable": f"unstable inner runs, learning rate {UNSTABLE}",
    }
    for panel, (case, rows) in zip(panels, data["curves"].items(), strict=True):
        draw_curves(panel, [Curve(name, data["horizons"], values) for name, values in rows.items()])
        panel.set_xscale("log")
        panel.set_xticks(data["horizons"], [f"{horizon}" for horizon in data["horizons"]], minor=False)
        panel.minorticks_off()
        panel.set(title=titles[case], xlabel="horizon of the inner runs, steps", ylabel="variance of a meta-gradient")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return figure


CLAIMS = (
    Claim(
        id="estimators-variance",
        source="Vicol et al. 2021 (arXiv 2112.13835), Vicol 2023 (arXiv 2304.11153), and Harrison et al. 2022 "
        "(arXiv 2209.11208), section 4.1",
        statement="The variance of PES grows with the number of truncations of an episode, that of ES-Single does not; "
        "gradients through unstable inner runs have a variance that diverges with the horizon.",
        setup=f"The learning rate of gradient descent is the one meta-parameter, on STAR's noisy quadratic from starts "
        f"of variance 1; horizons of 10 to 300 steps, truncations of {TRUNCATION}, std {STD}, staggered episodes. The "
        "variance is that of one antithetic pair's, or one run's, estimate from one truncation (Full ES and the full "
        "unroll: one whole run), over at least 20 estimates of 64 each.",
        measure=measure,
        checks=(
            at_least(growth("stable", "PES"), 3.0, published="grows with the number of truncations"),
            at_most(growth("stable", "ES-Single"), 2.0, published="constant in the number of truncations"),
            at_least(growth("unstable", "full unroll"), 1e3, published="diverges for long horizons"),
            at_most(growth("stable", "full unroll"), 2.0, published="bounded for stable dynamics"),
        ),
        minutes=4,
        quick_minutes=0.5,
        seeds=2,
        plot=plot,
    ),
)
