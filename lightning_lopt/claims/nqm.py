"""STAR, section 4 (Harrison et al. 2022, arXiv 2209.11208): stability of the noisy quadratic model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lopt.analysis import nqm
from lightning_lopt.claims.claim import Claim, Measurement, at_least, at_most, below, each_at_most
from lightning_lopt.claims.experiment import Experiment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4)
F64 = torch.float64


def random_cases(
    cases: int, size: int, generator: torch.Generator, *, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Random Hessians (cases, n, n), learned terms P with real eigenvalues, and nominal step sizes (cases,)."""

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=F64)

    basis = torch.linalg.qr(torch.randn(cases, size, size, generator=generator, dtype=F64))[0]
    hessian = (basis * 10 ** uniform(cases, 1, size, low=-3, high=1)) @ basis.mT
    hessian = 0.5 * (hessian + hessian.mT)
    largest_step = 2 / torch.linalg.eigvalsh(hessian)[:, -1]
    values = largest_step.unsqueeze(1) * uniform(cases, size, low=-0.6, high=0.9)
    vectors = torch.randn(cases, size, size, generator=generator, dtype=F64)
    if symmetric:
        vectors = torch.linalg.qr(vectors)[0]
        P = (vectors * values.unsqueeze(1)) @ vectors.mT
        P = 0.5 * (P + P.mT)
    else:
        P = vectors @ torch.diag_embed(values) @ torch.linalg.inv(vectors)
    return hessian, P, largest_step * uniform(cases, low=0, high=1)


def stable(matrices: Tensor) -> Tensor:
    """Whether each dynamics matrix (cases, n, n) has a spectral radius of at most 1, up to rounding."""
    held: Tensor = torch.linalg.eigvals(matrices).abs().amax(1) <= 1 + 1e-9
    return held


def _diverging(cases: int, seed: int, *, symmetric: bool) -> tuple[int, int]:
    """Number of random cases that the theorem's bounds call stable, and how many of them diverge: a radius above 1."""
    generator = torch.Generator().manual_seed(seed)
    called = wrong = 0
    for size in (1, 2, 3, 5):
        hessian, P, alpha = random_cases(cases // 4, size, generator, symmetric=symmetric)
        values = torch.linalg.eigvals(P).real  # real by construction, up to rounding
        sharpest = torch.linalg.eigvalsh(hessian)[:, -1]
        hold = (values.amin(1) + alpha >= 0) & (2 / sharpest - alpha - values.amax(1) >= 0)
        called += int(hold.sum())
        wrong += int((~stable(nqm.dynamics_matrix(hessian, P, alpha)[hold])).sum())
    return called, wrong


def _theorem(experiment: Experiment) -> Measurement:
    numbers: dict[str, list[float]] = {"symmetric P that diverge": [], "share of other P that diverge": []}
    for seed in experiment.seeds:
        experiment.progress("random cases", seed, len(experiment.seeds))
        _, wrong = _diverging(10_000, seed, symmetric=True)
        called, others = _diverging(10_000, seed, symmetric=False)
        numbers["symmetric P that diverge"].append(float(wrong))
        numbers["share of other P that diverge"].append(others / called)
    return Measurement(numbers)


def _paper_hessian() -> tuple[Tensor, float]:
    """The paper's Hessian, and the largest stable step size."""
    hessian = torch.tensor(nqm.H_PAPER, dtype=F64)
    return hessian, 2 / float(torch.linalg.eigvalsh(hessian)[-1])


def _variance(experiment: Experiment) -> Measurement:
    hessian, largest_step = _paper_hessian()
    fractions = torch.linspace(0, 1, experiment.pick(50, 11), dtype=F64)
    longest = experiment.pick(1000, 200)
    horizons = [horizon for horizon in nqm.HORIZONS if horizon <= longest]
    curves: list[Any] = []
    for seed in experiment.seeds:

        def compute(seed: int = seed) -> dict[str, Any]:
            report = experiment.reporter(f"gradient variance, seed {seed}", len(fractions))
            rows = []
            for number, fraction in enumerate(fractions):
                report(number)
                alpha = float(fraction) * largest_step
                rows.append(nqm.gradient_variance(hessian, alpha, horizons, runs=500, seed=seed).tolist())
            return {"variances": rows}

        key = {"alphas": len(fractions), "horizons": horizons, "runs": 500, "seed": seed}
        curves.append(experiment.cached("nqm gradient variance", key, compute)["variances"])
    shown = [*(horizon for horizon in SHOWN if horizon < longest), longest]
    numbers = variance_ratios(torch.tensor(curves, dtype=F64), horizons, shown)
    if longest != SHOWN[-1]:  # the quick scale
        numbers[_ratio(SHOWN[-1])] = numbers[_ratio(longest)]
    return Measurement(numbers, {"fractions": fractions.tolist(), "horizons": horizons, "variances": curves})


SHOWN = (1, 10, 100, 1000)


def _ratio(horizon: int) -> str:
    return f"log10 of variance at the best alpha / at alpha 0, T = {horizon}"


def variance_ratios(curves: Tensor, horizons: Sequence[int], shown: Sequence[int]) -> dict[str, list[float]]:
    """For each of some horizons, the variance that a nominal term leaves: a logarithm per seed.

    Args:
        curves: (seeds, alphas, horizons) variances; the first alpha is 0.
        horizons: of the last axis.
        shown: those to look at.
    """
    numbers = {}
    for horizon in shown:
        rows = curves[:, :, list(horizons).index(horizon)]
        found = []
        for seed in range(len(rows)):
            # Choose alpha on another seed: the lowest of many noisy numbers is low even if alpha does nothing.
            other = rows[(seed + 1) % len(rows)]
            best = int(other[1:].argmin()) + 1
            found.append(float((rows[seed, best] / rows[seed, 0]).log10()))
        numbers[_ratio(horizon)] = found
    return numbers


def _draw_variance(found: Measurement) -> Figure:
    from lightning_lopt.analysis import plots

    data = found.data
    return plots.gradient_variance(
        torch.tensor(data["fractions"]), data["horizons"], torch.tensor(data["variances"][0])
    )


def _training(experiment: Experiment) -> Measurement:
    hessian, largest_step = _paper_hessian()
    steps = experiment.pick(1000, 100)
    numbers: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {}
    best = _best_loss(hessian)
    for seed in experiment.seeds:
        for fraction in FRACTIONS:

            def compute(fraction: float = fraction, seed: int = seed) -> dict[str, Any]:
                found = nqm.meta_train(hessian, fraction * largest_step, steps=steps, seed=seed)
                last = found.losses[-max(steps // 20, 1) :].mean() / best
                return {"loss": float(last), "largest": found.eigenvalues[:, 0].tolist()}

            key = {"fraction": fraction, "steps": steps, "seed": seed}
            found = experiment.cached(f"nqm meta-training, alpha {fraction:g}, seed {seed}", key, compute)
            numbers.setdefault(_loss(fraction), []).append(found["loss"])
            numbers.setdefault(_largest(fraction), []).append(sum(found["largest"]) / steps)
            curves.setdefault(f"alpha {fraction:g}", []).append(found["largest"][:: max(steps // 100, 1)])
    return Measurement(numbers, {"every": max(steps // 100, 1), "curves": curves})


def _loss(fraction: float) -> str:
    return f"meta-loss with alpha {fraction:g}"


def _largest(fraction: float) -> str:
    return f"largest |eigenvalue|, mean over meta-training, alpha {fraction:g}"


def _draw_eigenvalues(found: Measurement) -> Figure:
    from matplotlib.figure import Figure

    from lightning_lopt.claims.plots import Curve, draw_curves

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    panel = figure.subplots()
    curves = found.data["curves"]
    steps = [found.data["every"] * i for i in range(len(next(iter(curves.values()))[0]))]
    draw_curves(panel, [Curve(name, steps, rows) for name, rows in curves.items()])
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set(xlabel="meta-training step", ylabel="largest |eigenvalue| of the dynamics")
    panel.legend(frameon=False, fontsize=8)
    return figure


def _best_loss(hessian: Tensor) -> float:
    """The lowest expected mean loss over 50 steps of any constant P, found by L-BFGS."""
    learned = torch.nn.Parameter(0.3 * torch.eye(2, dtype=F64))
    lbfgs = torch.optim.LBFGS([learned], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        lbfgs.zero_grad()
        A = nqm.dynamics_matrix(hessian, learned, 0.0)
        loss = nqm.expected_losses(hessian, A, 10 * torch.eye(2, dtype=F64), torch.eye(2, dtype=F64), 50).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    lbfgs.step(closure)  # type: ignore[no-untyped-call]
    return float(closure().detach())


_SOURCE = "Harrison et al. 2022 (STAR, arXiv 2209.11208)"
_IN_PAPER = (
    "The same Hessian; PES with one truncation of T = 50 steps (that is ES), std 0.01, AdamW with clipping at 1, five "
    "seeds; the learning rate, the number of pairs and the initial P are not stated."
)
CLAIMS = (
    Claim(
        id="nqm-theorem-1",
        source=f"{_SOURCE}, theorem 1",
        title="theorem 1 on 10,000 random cases of 1 to 5 dimensions a seed",
        statement="A diagonalizable P with real eigenvalues within the bounds (9) and (10) gives stable dynamics.",
        setup="Per seed, 10,000 random cases of 1 to 5 dimensions with symmetric P, and 10,000 with diagonalizable P.",
        in_paper="A proof.",
        measure=_theorem,
        checks=(
            each_at_most("symmetric P that diverge", 0, published="none"),
            each_at_most("share of other P that diverge", 0, published="none"),
        ),
        minutes=0.1,
        quick_minutes=0.1,
    ),
    Claim(
        id="nqm-figure-2a",
        source=f"{_SOURCE}, figure 2a",
        title="figure 2a as in the paper",
        statement="A nominal term within the stability bounds lowers the meta-gradient's variance at all horizons, "
        "most at long ones.",
        setup="The paper's Hessian, P = 0, 500 runs for each of 50 alphas, T up to 1000; quick: 11 and 200. A seed's "
        "alpha is the best one of another seed.",
        in_paper="The same.",
        measure=_variance,
        checks=(
            *(at_most(_ratio(horizon), 0.0, published="lower for all T") for horizon in SHOWN),
            at_most(_ratio(SHOWN[-1]), -1.0, published="particularly dramatic reduction"),
        ),
        minutes=0.6,
        quick_minutes=0.1,
        plot=_draw_variance,
    ),
    Claim(
        id="nqm-figure-2b",
        source=f"{_SOURCE}, figure 2b",
        title="figure 2b's form, with a meta-learning rate of our choice",
        statement="With a nominal term the dynamics are more stable in meta-training: the eigenvalues are smaller.",
        setup="The larger |eigenvalue| of A, mean over 1,000 meta-steps, for five alphas. Antithetic ES with 8 pairs, "
        "Adam at 1e-2, P from N(0, 0.1^2), none of which the paper states. Quick: 100 steps.",
        in_paper=_IN_PAPER,
        measure=_training,
        checks=tuple(
            below(_largest(more), _largest(less), published="more stable, smaller magnitude")
            for less, more in zip(FRACTIONS, FRACTIONS[1:], strict=False)
        ),
        minutes=2.5,
        quick_minutes=0.1,
        seeds=5,
        plot=_draw_eigenvalues,
    ),
    Claim(
        id="nqm-figure-2c",
        source=f"{_SOURCE}, figure 2c",
        title="figure 2c's form, with a meta-learning rate of our choice",
        statement="With a good nominal term meta-training is near-optimal after 1000 steps; without one it is not.",
        setup="Meta-losses, mean over the last 5 % of 1,000 meta-steps, relative to the best constant P's. Antithetic "
        "ES with 8 pairs, Adam at 1e-2, P from N(0, 0.1^2), none of which the paper states. Quick: 100 steps.",
        in_paper=_IN_PAPER,
        measure=_training,
        checks=(
            *(at_most(_loss(fraction), 1.1, published="near-optimal") for fraction in (0.4, 0.3)),
            at_least(_loss(0.0), 1.5, published="100 times as many steps, or failure"),
            *(below(_loss(more), _loss(less), published="ordered") for less, more in ((0.0, 0.1), (0.1, 0.2))),
        ),
        minutes=2.5,
        quick_minutes=0.1,
        seeds=5,
        plot=_draw_eigenvalues,
    ),
)
