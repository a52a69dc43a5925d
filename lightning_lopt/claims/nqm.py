"""STAR, section 4 (Harrison et al. 2022, arXiv 2209.11208): stability of the noisy quadratic model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lopt.analysis import nqm
from lightning_lopt.claims.claim import Check, Claim, Measurement, at_least, at_most, below
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


def _diverging(cases: int, seed: int, *, symmetric: bool) -> tuple[int, int]:
    """Number of random cases that the theorem's bounds call stable, and how many of them diverge: a radius above 1."""
    generator = torch.Generator().manual_seed(seed)
    called = wrong = 0
    for size in (1, 2, 3, 5):
        hessian, P, alpha = random_cases(cases // 4, size, generator, symmetric=symmetric)
        values = torch.linalg.eigvals(P).real  # real by construction, up to rounding
        sharpest = torch.linalg.eigvalsh(hessian)[:, -1]
        hold = (values.amin(1) + alpha >= 0) & (2 / sharpest - alpha - values.amax(1) >= 0)
        radius = torch.linalg.eigvals(nqm.dynamics_matrix(hessian, P, alpha)).abs().amax(1)
        called += int(hold.sum())
        wrong += int((radius[hold] > 1 + 1e-9).sum())
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
    numbers: dict[str, list[float]] = {
        name: [] for name in ("lowest at T = 1", "lowest at the longest", "there at alpha 0")
    }
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
        variances = torch.tensor(curves[-1], dtype=F64)
        numbers["lowest at T = 1"].append(float(variances[:, 0].min()))
        numbers["lowest at the longest"].append(float(variances[:, -1].min()))
        numbers["there at alpha 0"].append(float(variances[0, -1]))
    return Measurement(numbers, {"fractions": fractions.tolist(), "horizons": horizons, "variances": curves})


def _draw_variance(found: Measurement) -> Figure:
    from lightning_lopt.analysis import plots

    data = found.data
    return plots.gradient_variance(
        torch.tensor(data["fractions"]), data["horizons"], torch.tensor(data["variances"][0])
    )


def _training(experiment: Experiment) -> Measurement:
    hessian, largest_step = _paper_hessian()
    steps = experiment.pick(1000, 100)
    numbers: dict[str, list[float]] = {f"meta-loss with alpha {fraction:g}": [] for fraction in FRACTIONS}
    best = _best_loss(hessian)
    for seed in experiment.seeds:
        for fraction in FRACTIONS:

            def compute(fraction: float = fraction, seed: int = seed) -> dict[str, Any]:
                losses = nqm.meta_train(hessian, fraction * largest_step, steps=steps, seed=seed).losses
                return {"loss": float(losses[-max(steps // 20, 1) :].mean() / best)}

            key = {"fraction": fraction, "steps": steps, "seed": seed}
            found = experiment.cached(f"nqm meta-training, alpha {fraction:g}, seed {seed}", key, compute)
            numbers[f"meta-loss with alpha {fraction:g}"].append(found["loss"])
    return Measurement(numbers)


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


def _descending_means(*rows: list[float]) -> bool:
    means = [sum(row) / len(row) for row in rows]
    return means == sorted(means, reverse=True)


_SOURCE = "Harrison et al. 2022 (STAR, arXiv 2209.11208)"
CLAIMS = (
    Claim(
        id="nqm-theorem-1",
        source=f"{_SOURCE}, theorem 1",
        statement="A diagonalizable P with real eigenvalues within the bounds (9) and (10) gives stable dynamics.",
        setup="Per seed, 10,000 random cases of 1 to 5 dimensions with symmetric P, and 10,000 with diagonalizable P.",
        measure=_theorem,
        checks=(
            at_most("symmetric P that diverge", 0, published="none"),
            at_most("share of other P that diverge", 0, published="none"),
        ),
        minutes=0.1,
        quick_minutes=0.1,
    ),
    Claim(
        id="nqm-figure-2a",
        source=f"{_SOURCE}, figure 2a",
        statement="A nominal term within the stability bounds lowers the meta-gradient's variance, most for long runs.",
        setup="The paper's Hessian, P = 0, 500 runs for each of 50 alphas, T up to 1000; quick: 11 and 200.",
        measure=_variance,
        checks=(
            below("lowest at the longest", "lowest at T = 1", published="lower"),
            below("lowest at the longest", "there at alpha 0", factor=0.1, published="dramatically lower"),
        ),
        minutes=0.6,
        quick_minutes=0.1,
        plot=_draw_variance,
    ),
    Claim(
        id="nqm-figure-2c",
        source=f"{_SOURCE}, figure 2c",
        statement="With a good nominal term meta-training is near-optimal after 1000 steps; without one it is not.",
        setup="Meta-losses relative to the best constant P's. Antithetic ES with 8 pairs, Adam at 1e-2, P from "
        "N(0, 0.1^2), none of which the paper states. Quick: 100 steps.",
        measure=_training,
        checks=(
            at_most("meta-loss with alpha 0.4", 1.1, published="near-optimal"),
            at_most("meta-loss with alpha 0.3", 1.1, published="near-optimal"),
            at_least("meta-loss with alpha 0", 1.5, published="100 times as many steps, or failure"),
            Check(
                "meta-loss falls from alpha 0 to 0.2",
                tuple(f"meta-loss with alpha {fraction:g}" for fraction in FRACTIONS[:3]),
                _descending_means,
                "ordered",
            ),
        ),
        minutes=2.5,
        quick_minutes=0.3,
        seeds=5,
    ),
)
