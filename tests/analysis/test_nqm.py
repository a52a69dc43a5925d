"""The noisy quadratic model: theorems on random cases, closed forms against simulation, derivatives."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_lopt.analysis import nqm

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(values: Tensor, generator: torch.Generator) -> Tensor:
    """Matrices (cases, n, n) with the given eigenvalues (cases, n) in random bases."""
    basis, _ = torch.linalg.qr(torch.randn(*values.shape, values.shape[-1], generator=generator, dtype=F64))
    matrix = (basis * values.unsqueeze(-2)) @ basis.mT
    return 0.5 * (matrix + matrix.mT)


def uniform(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=F64)


def draw(cases: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """Hessians, symmetric P and alpha; by the theorem about half of the cases are stable."""
    generator = seeded(seed)
    hessian = symmetric(10 ** uniform(generator, cases, size, low=-3, high=1), generator)
    room = 2 / torch.linalg.eigvalsh(hessian)[:, -1]
    alpha = room * uniform(generator, cases)
    P = symmetric(room.unsqueeze(1) * uniform(generator, cases, size, low=-0.6, high=0.9), generator)
    return hessian, P, alpha, generator


def radius(A: Tensor) -> Tensor:
    return torch.linalg.eigvals(A).abs().amax(-1)


# --- the theorems


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("lemma", ["theorem 1", "lemma 2"])
def test_margins_that_hold_mean_stability_on_ten_thousand_cases(lemma, size):
    """2,500 cases of each size."""
    hessian, P, alpha, _ = draw(2500, size, seed=size)
    preconditioned = lemma == "lemma 2"
    if preconditioned:  # the bound is of the root: bring P and alpha into its reach
        scale = torch.linalg.eigvalsh(hessian)[:, -1].sqrt()
        P, alpha = P * scale.reshape(-1, 1, 1), alpha * scale
    margins = (nqm.lemma2_margins if preconditioned else nqm.theorem1_margins)(hessian, P, alpha)
    radii = radius(nqm.dynamics_matrix(hessian, P, alpha, preconditioned=preconditioned))
    assert 200 < int(margins.hold.sum()) < 2400
    assert float(radii[margins.hold].max()) <= 1 + 1e-9
    # The bounds are tight: some cases beyond them diverge.
    assert int((radii[~margins.hold] > 1).sum()) > 200


@pytest.mark.parametrize("size", [2, 5])
def test_lemma_3_holds_for_every_disturbance_that_commutes(size):
    """With a diagonal P~, which commutes with every Delta = diag(d)."""
    generator = seeded(size)
    cases = 10_000
    hessian = symmetric(10 ** uniform(generator, cases, size, low=-3, high=1), generator)
    room = 2 / torch.linalg.eigvalsh(hessian)[:, -1]
    largest, alpha = 10 ** uniform(generator, cases, low=-1, high=1), room * uniform(generator, cases, high=1.1)
    spread = uniform(generator, cases, size, low=-0.7, high=0.9)
    P = torch.diag_embed((room / largest).unsqueeze(1) * spread)
    margins = nqm.lemma3_margins(hessian, P, alpha, largest)
    disturbance = torch.diag_embed(largest.unsqueeze(1) * uniform(generator, cases, size, low=1e-6))
    radii = radius(nqm.dynamics_matrix(hessian, disturbance @ P, alpha))
    assert 500 < int(margins.hold.sum()) < 9500
    assert float(radii[margins.hold].max()) <= 1 + 1e-9
    at_the_bound = radius(nqm.dynamics_matrix(hessian, largest.reshape(-1, 1, 1) * P, alpha))
    assert int((at_the_bound[~margins.hold] > 1).sum()) > 500


def test_the_theorem_fails_for_matrices_that_are_merely_diagonalizable():
    """With only real eigenvalues required, as in the paper, some cases with positive margins diverge."""
    generator, cases, size = seeded(0), 10_000, 3
    hessian, _, alpha, _ = draw(cases, size, seed=1)
    room = 2 / torch.linalg.eigvalsh(hessian)[:, -1]
    values = room.unsqueeze(1) * uniform(generator, cases, size, low=-0.6, high=0.9)
    vectors = torch.randn(cases, size, size, generator=generator, dtype=F64)
    P = vectors @ torch.diag_embed(values) @ torch.linalg.inv(vectors)
    hold = ((values.amin(1) + alpha) >= 0) & (room - alpha - values.amax(1) >= 0)
    wrong = radius(nqm.dynamics_matrix(hessian, P, alpha))[hold] > 1 + 1e-6
    assert 0.02 < float(wrong.double().mean()) < 0.5
    for index in hold.nonzero().flatten()[:50].tolist():
        matrices = hessian[index], P[index], float(alpha[index])
        expected = float(radius(nqm.dynamics_matrix(*matrices))) <= 1 + 1e-10
        assert nqm.is_stable(*matrices) == expected


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 6), preconditioned=st.booleans(), skew=st.booleans())
def test_is_stable_is_what_the_powers_of_the_matrix_do(seed, size, preconditioned, skew):
    generator = seeded(seed)
    hessian = symmetric(10 ** uniform(generator, 1, size, low=-2, high=1), generator)[0]
    P = symmetric(uniform(generator, 1, size, low=-1, high=3), generator)[0]
    if skew:
        P = P + torch.triu(torch.randn(size, size, generator=generator, dtype=F64), 1)
    alpha = float(uniform(generator))
    A = nqm.dynamics_matrix(hessian, P, alpha, preconditioned=preconditioned)
    if abs(float(radius(A)) - 1) < 1e-3:
        return
    grown = torch.linalg.matrix_power(A, 100_000).norm()
    assert nqm.is_stable(hessian, P, alpha, preconditioned=preconditioned) == bool(grown < 1)


def test_stability_at_the_bounds_themselves():
    hessian = torch.diag(torch.tensor([4.0, 1.0], dtype=F64))
    P = torch.zeros(2, 2, dtype=F64)
    assert nqm.is_stable(hessian, P, 0.5)  # 2 / lambda_max: eigenvalue -1
    assert not nqm.is_stable(hessian, P, 0.5001)
    assert nqm.is_stable(hessian, P, 1.0, preconditioned=True)  # 2 / sqrt(lambda_max)
    assert not nqm.is_stable(hessian, P, 1.0001, preconditioned=True)
    assert not nqm.is_stable(hessian, -1e-3 * torch.eye(2, dtype=F64), 0.0)


def test_margins_say_by_how_much():
    hessian = torch.diag(torch.tensor([4.0, 1.0], dtype=F64))
    P = torch.diag(torch.tensor([-0.1, 0.2], dtype=F64))
    for margins, expected in (
        (nqm.theorem1_margins(hessian, P, 0.25), (0.15, 0.05)),
        (nqm.lemma2_margins(hessian, P, 0.25), (0.15, 0.55)),
        (nqm.lemma3_margins(hessian, P, 0.25, 2.0), (0.025, -0.075)),
    ):
        assert [float(margin) for margin in margins] == pytest.approx(expected)


def test_invalid_noisy_quadratic_models_are_refused():
    eye = torch.eye(2, dtype=F64)
    with pytest.raises(ValueError, match="not symmetric positive definite"):
        nqm.is_stable(-eye, eye, 0.1)
    with pytest.raises(ValueError, match="not symmetric positive definite"):
        nqm.is_stable(eye + torch.tensor([[0.0, 0.5], [0.0, 0.0]], dtype=F64), eye, 0.1)
    with pytest.raises(ValueError, match="square matrices of the same size"):
        nqm.dynamics_matrix(eye, torch.eye(3, dtype=F64), 0.1)
    with pytest.raises(ValueError, match="complex eigenvalues"):
        nqm.theorem1_margins(eye, torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64), 0.1)


# --- expected losses and gradients

HESSIAN = torch.tensor(nqm.H_PAPER, dtype=F64)
NOISE = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F64)


def test_covariance_is_the_sum_of_equation_7():
    P, steps = torch.tensor([[0.2, 0.1], [-0.3, 0.4]], dtype=F64), 7
    A = nqm.dynamics_matrix(HESSIAN, P, 0.3)
    terms = [torch.linalg.matrix_power(A, k) @ (torch.eye(2, dtype=F64) - A) for k in range(steps)]
    expected = sum(term @ NOISE @ term.T for term in terms)
    torch.testing.assert_close(nqm.covariance(A, NOISE, steps)[-1], expected)


def test_expected_losses_are_the_mean_of_simulated_ones():
    generator, runs, steps = seeded(0), 40_000, 12
    P, alpha = torch.tensor([[0.2, 0.1], [-0.3, 0.4]], dtype=F64), 0.3
    start = torch.tensor([2.0, -1.0], dtype=F64)
    root = torch.linalg.cholesky(NOISE)
    noise = torch.randn(steps + 1, runs, 2, generator=generator, dtype=F64) @ root.T
    losses = nqm.simulate(HESSIAN, P, alpha, start.expand(runs, 2), noise)
    expected = nqm.expected_losses(HESSIAN, nqm.dynamics_matrix(HESSIAN, P, alpha), start, NOISE, steps)
    errors = losses.std(1) / math.sqrt(runs)
    assert float(((losses.mean(1) - expected) / errors).abs().max()) < 4.5
    # A random start with the same second moment has the same expected losses.
    moment = nqm.expected_losses(
        HESSIAN, nqm.dynamics_matrix(HESSIAN, P, alpha), torch.outer(start, start), NOISE, steps
    )
    torch.testing.assert_close(moment, expected)


def test_gradients_of_the_expected_loss_are_those_of_finite_differences():
    def loss(P):
        A = nqm.dynamics_matrix(HESSIAN, P, 0.3)
        return nqm.expected_losses(HESSIAN, A, torch.tensor([2.0, -1.0], dtype=F64), NOISE, 9).mean()

    P = torch.tensor([[0.2, 0.1], [-0.3, 0.4]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (P,))
    noise = torch.randn(5, 3, 2, generator=seeded(0), dtype=F64)
    start = torch.randn(3, 2, generator=seeded(1), dtype=F64)
    assert torch.autograd.gradcheck(lambda P: nqm.simulate(HESSIAN, P, 0.3, start, noise), (P,))


def test_gradient_variance_is_that_of_autograds_gradients():
    horizons, runs, alpha = [1, 3, 10], 20, 0.4
    found = nqm.gradient_variance(HESSIAN, alpha, horizons, runs=runs, seed=3)
    generator = seeded(3)
    start = 10**0.5 * torch.randn(runs, 2, generator=generator, dtype=F64)
    noise = torch.randn(11, runs, 2, generator=generator, dtype=F64)
    for horizon, value in zip(horizons, found, strict=True):
        P = torch.zeros(runs, 2, 2, dtype=F64, requires_grad=True)
        losses = nqm.simulate(HESSIAN, P, alpha, start, noise[: horizon + 1]).mean(0)
        (grads,) = torch.autograd.grad(losses.sum(), P)
        torch.testing.assert_close(value, grads.flatten(1).var(0, unbiased=False).sum())


def test_gradient_variance_explodes_with_the_horizon_only_outside_the_stable_range():
    """Fig. 2a: the variance falls with the horizon within the stable range, and grows at both of its ends."""
    sharpest = float(torch.linalg.eigvalsh(HESSIAN)[-1])
    inside, edge, outside = (
        nqm.gradient_variance(HESSIAN, share * 2 / sharpest, [5, 200], runs=100) for share in (0.4, 0.0, 1.05)
    )
    assert inside[1] < inside[0]
    assert edge[1] > 10 * inside[1]
    assert outside[1] > 1e3 * outside[0]


def test_meta_training_with_a_nominal_term_begins_stable_and_ends_lower():
    """Fig. 2b, c, with fewer steps."""
    sharpest = float(torch.linalg.eigvalsh(HESSIAN)[-1])
    without, with_term = (
        nqm.meta_train(HESSIAN, share * 2 / sharpest, steps=40, seed=1, init=0.0) for share in (0.0, 0.3)
    )
    assert float(with_term.eigenvalues[0].max()) < 1
    assert float(with_term.losses[-1]) < float(without.losses[-1])
    again = nqm.meta_train(HESSIAN, 0.3 * 2 / sharpest, steps=40, seed=1, init=0.0)
    assert torch.equal(again.losses, with_term.losses)
