"""STAR, section 4 (Harrison et al. 2022, arXiv 2209.11208): Lemmas 2 and 3, and the interventions of figure 1."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from lightning_lopt.analysis import nqm
from lightning_lopt.claims.claim import Claim, Measurement, at_least, at_most, below, each_at_most
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.nqm import F64, random_cases, stable

SIZES = (1, 2, 3, 5)
CASES = 10_000


def _lemma_2(cases: int, seed: int, *, symmetric: bool) -> tuple[int, int]:
    """Number of random cases that Lemma 2 calls stable, and how many of them diverge."""
    generator = torch.Generator().manual_seed(seed)
    called = wrong = 0
    for size in SIZES:
        hessian, P, alpha = random_cases(cases // len(SIZES), size, generator, symmetric=symmetric)
        # `random_cases` is in units of the largest step without the preconditioner; here that is its square root.
        sharpest = torch.linalg.eigvalsh(hessian)[:, -1]
        P, alpha = P * sharpest.sqrt().reshape(-1, 1, 1), alpha * sharpest.sqrt()
        values = torch.linalg.eigvals(P).real  # real by construction, up to rounding
        hold = (values.amin(1) + alpha >= 0) & (2 / sharpest.sqrt() - alpha - values.amax(1) >= 0)
        called += int(hold.sum())
        wrong += int((~stable(nqm.dynamics_matrix(hessian, P, alpha, preconditioned=True)[hold])).sum())
    return called, wrong


def _lemma_3(cases: int, seed: int) -> tuple[int, int]:
    """The same for Lemma 3, with diagonal P and disturbances, which commute."""
    generator = torch.Generator().manual_seed(seed)
    called = wrong = 0
    for size in SIZES:
        hessian, P, alpha = random_cases(cases // len(SIZES), size, generator, symmetric=True)
        P = torch.diag_embed(torch.linalg.eigvalsh(P))
        largest = 10 ** (2 * torch.rand(len(P), generator=generator, dtype=F64) - 1)
        disturbance = largest.unsqueeze(1) * torch.rand(len(P), size, generator=generator, dtype=F64)
        hold = nqm.lemma3_margins(hessian, P, alpha, largest).hold
        called += int(hold.sum())
        wrong += int((~stable(nqm.dynamics_matrix(hessian, torch.diag_embed(disturbance) @ P, alpha)[hold])).sum())
    return called, wrong


def _lemmas(experiment: Experiment) -> Measurement:
    numbers: dict[str, list[float]] = {}
    for seed in experiment.seeds:
        experiment.progress("random cases", seed, len(experiment.seeds))
        found = {
            "lemma 2, symmetric P": _lemma_2(CASES, seed, symmetric=True),
            "lemma 2, other P": _lemma_2(CASES, seed, symmetric=False),
            "lemma 3": _lemma_3(CASES, seed),
        }
        for name, (called, wrong) in found.items():
            numbers.setdefault(f"share called stable, {name}", []).append(called / CASES)
            numbers.setdefault(f"share of these that diverge, {name}", []).append(wrong / max(called, 1))
    return Measurement(numbers)


# --- Figure 1 ---

BEFORE, NOMINAL, DECAYED, PRECONDITIONED, ALL = "before", "nominal term", "weight decay", "preconditioned", "all three"
STABLE = "share of stable dynamics"


def _figure_1(experiment: Experiment) -> Measurement:
    """Random learned terms on the paper's Hessian, before and after each intervention."""
    hessian = torch.tensor(nqm.H_PAPER, dtype=F64)
    sharpest = float(torch.linalg.eigvalsh(hessian)[-1])
    alpha = 1 / sharpest
    numbers: dict[str, list[float]] = {}
    for seed in experiment.seeds:
        generator = torch.Generator().manual_seed(seed)
        P = torch.randn(1000, 2, 2, generator=generator, dtype=F64) / sharpest
        many = hessian.expand_as(P)
        step = math.sqrt(sharpest)  # the unit of steps with the preconditioner
        matrices = {
            BEFORE: nqm.dynamics_matrix(many, P, 0.0),
            NOMINAL: nqm.dynamics_matrix(many, P, alpha),
            DECAYED: nqm.dynamics_matrix(many, 0.3 * P, 0.0),
            PRECONDITIONED: nqm.dynamics_matrix(many, step * P, 0.0, preconditioned=True),
            ALL: nqm.dynamics_matrix(many, 0.3 * step * P, step * alpha, preconditioned=True),
        }
        values = {name: torch.linalg.eigvals(A) for name, A in matrices.items()}
        for name, found in values.items():
            numbers.setdefault(f"{STABLE}, {name}", []).append(float(stable(matrices[name]).double().mean()))
            numbers.setdefault(f"mean |imaginary part|, {name}", []).append(float(found.imag.abs().mean()))
        numbers.setdefault("dependence on the Hessian, before", []).append(
            _dependence(P, generator, preconditioned=False)
        )
        numbers.setdefault("dependence on the Hessian, preconditioned", []).append(
            _dependence(P, generator, preconditioned=True)
        )
    return Measurement(numbers)


def _dependence(P: Tensor, generator: torch.Generator, *, preconditioned: bool) -> float:
    """How much log10 |lambda - 1| varies over random Hessians: a standard deviation, mean over learned terms."""
    logs = []
    for _ in range(20):
        hessian, _, _ = random_cases(1, 2, generator, symmetric=True)
        A = nqm.dynamics_matrix(hessian.expand_as(P), P, 0.0, preconditioned=preconditioned)
        distance = (torch.linalg.eigvals(A) - 1).abs().clamp(min=1e-12)
        logs.append(distance.log10().mean(1))
    return statistics.fmean(torch.stack(logs).std(0).tolist())


_SOURCE = "Harrison et al. 2022 (STAR, arXiv 2209.11208)"
CLAIMS = (
    Claim(
        id="nqm-lemmas",
        source=f"{_SOURCE}, lemmas 2 and 3",
        title="lemmas 2 and 3 on 10,000 random cases of 1 to 5 dimensions a seed",
        statement="With the preconditioner H^-1/2 the step may be larger (lemma 2); a learned term stays stable under "
        "every bounded diagonal disturbance that commutes with it (lemma 3).",
        setup="Per seed, 10,000 random cases each of 1 to 5 dimensions: lemma 2 with symmetric and with other "
        "diagonalizable P, lemma 3 with diagonal P and disturbances.",
        in_paper="Proofs.",
        measure=_lemmas,
        checks=(
            *(
                each_at_most(
                    f"share of these that diverge, {name}",
                    0.0,
                    published="none",
                    controls=(at_least(f"share called stable, {name}", 0.05, kind="control"),),
                )
                for name in ("lemma 2, symmetric P", "lemma 2, other P", "lemma 3")
            ),
        ),
        minutes=0.2,
        quick_minutes=0.1,
    ),
    Claim(
        id="nqm-figure-1",
        source=f"{_SOURCE}, figure 1",
        title="figure 1's interventions on 1,000 random learned terms a seed, with the paper's Hessian",
        statement="A nominal term pulls eigenvalues toward the real line and stabilizes; weight decay stabilizes; the "
        "preconditioner makes eigenvalues depend less on the problem; all three together are stable.",
        setup="P from N(0, 1 / lambda_max(H)^2). Nominal term 1 / lambda_max(H); decay of P to 0.3 P; with the "
        "preconditioner, steps in units of sqrt(lambda_max(H)). Dependence on the problem: how much log10 |lambda - 1| "
        "varies over 20 random Hessians. That decay pulls eigenvalues to 1 holds by construction and is not checked.",
        in_paper="A drawing of one unnamed case each.",
        measure=_figure_1,
        checks=(
            below(
                f"mean |imaginary part|, {NOMINAL}",
                f"mean |imaginary part|, {BEFORE}",
                published="decay toward the real line",
            ),
            *(below(f"{STABLE}, {BEFORE}", f"{STABLE}, {name}", published="stable") for name in (NOMINAL, DECAYED)),
            below(
                "dependence on the Hessian, preconditioned",
                "dependence on the Hessian, before",
                published="depend less on the problem",
            ),
            at_least(f"{STABLE}, {ALL}", 0.95, published="all eigenvalues in the unit circle"),
            at_most(f"{STABLE}, {BEFORE}", 0.5, kind="control"),
        ),
        minutes=0.1,
        quick_minutes=0.1,
    ),
)
