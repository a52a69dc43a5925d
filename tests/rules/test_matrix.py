"""Orthogonal steps against the polar factor by SVD, in both forms of the iteration, and what stays the same."""

import pytest
import torch

from lightning_lopt.rules import StepContext, make, matrix
from lightning_lopt.rules.shards import TensorShard, Unknown

SHAPES = [(8, 8), (5, 40), (40, 5), (3, 6, 7), (2, 4, 16), (1, 3)]


def polar(matrices):
    """The nearest orthogonal matrices U V^T."""
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    return u @ v


def drawn(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_iteration_goes_to_the_polar_factor(shape):
    """With coefficients that converge (Newton-Schulz of order five: 15/8, -10/8, 3/8), not Muon's, which overshoot."""
    given = drawn(shape)
    found = matrix.newton_schulz(given, 60, (1.875, -1.25, 0.375))
    torch.testing.assert_close(found, polar(given), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_the_iteration_is_a_polynomial_in_the_singular_values(shape, iterations):
    """In the short and in the long form: wide matrices iterate on their Gram matrix alone."""
    given = drawn(shape)
    u, s, v = torch.linalg.svd(given, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    a, b, c = matrix.QUINTIC
    for _ in range(iterations):
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ v
    torch.testing.assert_close(matrix.newton_schulz(given, iterations), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1e-25, 1e-3, 1.0, 1e25])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_step_keeps_its_root_mean_square_at_any_size(size, share):
    step = size * drawn((6, 3, 2, 2), dtype=torch.float32)
    found = matrix.orthogonal_step(step, "hidden", share)
    assert found.norm().item() / size == pytest.approx(step.norm().item() / size, rel=1e-5)
    if not share:
        torch.testing.assert_close(found, step)


def test_no_step_stays_none():
    assert not matrix.orthogonal_step(torch.zeros(4, 3), "hidden", 1.0).any()


def test_a_full_share_is_the_iteration_and_directions_turn_towards_it():
    step = drawn((6, 4))
    wanted = matrix.newton_schulz(step)
    cosines = []
    for share in (0.0, 0.5, 1.0):
        found = matrix.orthogonal_step(step, "hidden", torch.tensor(share, dtype=torch.float64))
        cosines.append(float((found * wanted).sum() / (found.norm() * wanted.norm())))
    assert cosines[0] < cosines[1] < cosines[2] == pytest.approx(1.0)


def test_experts_are_treated_one_by_one():
    step = drawn((3, 4, 6))
    step[1] *= 100
    found = matrix.orthogonal_step(step, "experts", 1.0)
    for own, one in zip(step, found, strict=True):
        torch.testing.assert_close(one, matrix.orthogonal_step(own, "hidden", 1.0))


def test_a_convolution_is_out_times_the_rest():
    step = drawn((5, 2, 3, 3))
    flat = matrix.orthogonal_step(step.reshape(5, 18), "hidden", 1.0)
    torch.testing.assert_close(matrix.orthogonal_step(step, "hidden", 1.0), flat.reshape(5, 2, 3, 3))


def test_a_shard_takes_its_part_of_the_whole_step():
    step = drawn((6, 4))
    whole = matrix.orthogonal_step(step, "hidden", 1.0)
    shard = TensorShard((6, 4), (2, 0), (3, 4), (0,))
    with pytest.raises(Unknown) as asked:
        matrix.orthogonal_step(step[2:5], "hidden", 1.0, shard)
    assert asked.value.sums[0].shape == (6, 4)
    assert torch.equal(asked.value.sums[0][2:5], step[2:5])
    shard.known, shard.asked = [[step]], 0
    torch.testing.assert_close(matrix.orthogonal_step(step[2:5], "hidden", 1.0, shard), whole[2:5])


@pytest.mark.parametrize(
    ("shape", "role", "expected"),
    [
        ((8, 4), "hidden", True),
        ((8, 4), "output", False),
        ((8, 4), "embedding", False),
        ((8, 4), "other", False),
        ((8, 4), None, False),
        ((8, 1), "hidden", False),
        ((1, 8, 3), "hidden", False),
        ((8, 1, 3), "hidden", True),
        ((8,), "hidden", False),
        ((), "hidden", False),
        ((3, 8, 1), "experts", False),
        ((3, 8, 2), "experts", True),
    ],
)
def test_roles_decide_what_is_a_matrix(shape, role, expected):
    assert matrix.is_matrix(shape, role) is expected


@pytest.mark.parametrize("role", matrix.ROLES)
def test_only_hidden_layers_of_the_flagship_step_orthogonally(role):
    """The direction of its first step: of hidden layers near orthogonal, of others the sign of the gradient."""
    rule = make("scheduled", nominal_stepsize=0.1, orthogonal_start=1.0, orthogonal_end=1.0)
    param, grad = torch.zeros(3, 6, 5), drawn((3, 6, 5), dtype=torch.float32)
    delta, _ = rule.update(
        rule.meta_params(), grad, rule.init_state(param), param, StepContext(torch.tensor(0.0), None, 10, role=role)
    )
    plain = rule.update(
        rule.meta_params(), grad, rule.init_state(param), param, StepContext(torch.tensor(0.0), None, 10)
    )
    expected = matrix.orthogonal_step(plain[0], role, 1.0) if role in ("hidden", "experts") else plain[0]
    torch.testing.assert_close(delta, expected)
