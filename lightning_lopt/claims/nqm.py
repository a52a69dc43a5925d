"""The evidence of STAR's section 4 (Harrison et al. 2022, arXiv 2209.11208): the noisy quadratic model's stability."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lopt.analysis import nqm
from lightning_lopt.claims.base import Check, Claim, Measured, at_least, at_most, below
from lightning_lopt.claims.lab import Lab

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
F64 = torch.float64


def random_cases(
    cases: int, size: int, generator: torch.Generator, *, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Hessians (cases, n, n), learned terms P with real eigenvalues, and nominal step sizes (cases,)."""

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=F64)

    basis = torch.linalg.qr(torch.randn(cases, size, size, generator=generator, dtype=F64))[0]
    hessian = (basis * 10 ** uniform(cases, 1, size, low=-3, high=1)) @ basis.mT
    hessian = 0.5 * (hessian + hessian.mT)
    room = 2 / torch.linalg.eigvalsh(hessian)[:, -1]
    values = room.unsqueeze(1) * uniform(cases, size, low=-0.6, high=0.9)
    vectors = torch.randn(cases, size, size, generator=generator, dtype=F64)
    if symmetric:
        vectors = torch.linalg.qr(vectors)[0]
        P = (vectors * values.unsqueeze(1)) @ vectors.mT
        P = 0.5 * (P + P.mT)
    else:
        P = vectors @ torch.diag_embed(values) @ torch.linalg.inv(vectors)
    return hessian, P, room * uniform(cases, low=0, high=1)


def _diverging(cases: int, seed: int, *, symmetric: bool) -> tuple[int, int]:
    """Of random cases: how many the margins call stable, and how many of these have a spectral radius above 1."""
    generator = torch.Generator().manual_seed(seed)
    called, wrong = 0, 0
    for size in (1, 2, 3, 5):
        hessian, P, alpha = random_cases(cases // 4, size, generator, symmetric=symmetric)
        values = torch.linalg.eigvals(P).real  # real by construction, up to rounding
        sharpest = torch.linalg.eigvalsh(hessian)[:, -1]
        hold = (values.amin(1) + alpha >= 0) & (2 / sharpest - alpha - values.amax(1) >= 0)
        radius = torch.linalg.eigvals(nqm.dynamics_matrix(hessian, P, alpha)).abs().amax(1)
        called, wrong = called + int(hold.sum()), wrong + int((radius[hold] > 1 + 1e-9).sum())
    return called, wrong


def _theorem(lab: Lab) -> Measured:
    numbers: dict[str, list[float]] = {"symmetric P that diverge": [], "share of other P that diverge": []}
    for seed in lab.seeds:
        _, wrong = _diverging(10_000, seed, symmetric=True)
        called, others = _diverging(10_000, seed, symmetric=False)
        numbers["symmetric P that diverge"].append(float(wrong))
        numbers["share of other P that diverge"].append(others / called)
    return Measured(numbers)


def _paper_hessian() -> tuple[Tensor, float]:
    hessian = torch.tensor(nqm.H_PAPER, dtype=F64)
    return hessian, 2 / float(torch.linalg.eigvalsh(hessian)[-1])


def _variance(lab: Lab) -> Measured:
    hessian, room = _paper_hessian()
    shares = torch.linspace(0, 1, lab.pick(50, 11), dtype=F64)
    longest = lab.pick(1000, 200)
    horizons = [horizon for horizon in nqm.HORIZONS if horizon <= longest]
    numbers: dict[str, list[float]] = {
        name: [] for name in ("lowest at T = 1", "lowest at the longest", "there at alpha 0")
    }
    curves: list[Any] = []
    for seed in lab.seeds:
        rows = [nqm.gradient_variance(hessian, float(s) * room, horizons, runs=500, seed=seed) for s in shares]
        variances = torch.stack(rows)
        curves.append(variances.tolist())
        numbers["lowest at T = 1"].append(float(variances[:, 0].min()))
        numbers["lowest at the longest"].append(float(variances[:, -1].min()))
        numbers["there at alpha 0"].append(float(variances[0, -1]))
    return Measured(numbers, {"shares": shares.tolist(), "horizons": horizons, "variances": curves})


def _draw_variance(found: Measured) -> Figure:
    from lightning_lopt.analysis import plots

    data = found.data
    return plots.gradient_variance(torch.tensor(data["shares"]), data["horizons"], torch.tensor(data["variances"][0]))


def _training(lab: Lab) -> Measured:
    hessian, room = _paper_hessian()
    steps = lab.pick(1000, 100)
    numbers: dict[str, list[float]] = {f"meta-loss with alpha {share:g}": [] for share in SHARES}
    best = _best_loss(hessian)
    for seed in lab.seeds:
        for share in SHARES:
            losses = nqm.meta_train(hessian, share * room, steps=steps, seed=seed).losses
            numbers[f"meta-loss with alpha {share:g}"].append(float(losses[-max(steps // 20, 1) :].mean() / best))
    return Measured(numbers)


def _best_loss(hessian: Tensor) -> float:
    """The lowest expected mean loss over T = 50 of any constant P, by gradient descent from the nominal term alone."""
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
CLAIMS = (
    Claim(
        id="nqm-theorem-1",
        source=f"{_SOURCE}, theorem 1",
        statement="A diagonalizable P with real eigenvalues within the bounds (9) and (10) gives stable dynamics.",
        setup="10,000 random cases per seed of 1 to 5 dimensions with symmetric P, and as many merely diagonalizable.",
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
        statement="With a good nominal term meta-training is near-optimal in 1000 steps; without, it is far from that.",
        setup="Meta-losses relative to the best constant P's. Antithetic ES with 8 pairs, Adam at 1e-2, P from "
        "N(0, 0.1^2): the paper does not give these. Quick: 100 steps.",
        measure=_training,
        checks=(
            at_most("meta-loss with alpha 0.4", 1.1, published="near-optimal"),
            at_most("meta-loss with alpha 0.3", 1.1, published="near-optimal"),
            at_least("meta-loss with alpha 0", 1.5, published="100 times as many steps, or failure"),
            Check(
                "more of it, lower loss",
                tuple(f"meta-loss with alpha {share:g}" for share in SHARES[:3]),
                lambda *rows: (
                    sorted((sum(row) / len(row) for row in rows), reverse=True) == [sum(row) / len(row) for row in rows]
                ),
                "ordered",
            ),
        ),
        minutes=2.5,
        quick_minutes=0.3,
        seeds=5,
    ),
)
