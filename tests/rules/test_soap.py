"""SOAP: a reference written from the paper, torch's AdamW for what is not rotated, and properties of the eigenbasis."""

import pytest
import torch
from reference_soap import ReferenceSOAP
from torch import Tensor

from lightning_lopt.rules import StepContext, eigenbasis, make
from lightning_lopt.rules.soap import SOAPState

STEPS = 40


def gradients(shape, steps=STEPS, seed=0, noise=0.3) -> list[Tensor]:
    """Of a quadratic with correlated directions, and noise: a mean gradient and random ones of low rank."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    mean, mix = draw(*shape), draw(shape[-1], shape[-1])
    return [mean + draw(*shape) @ mix + noise * draw(*shape) for _ in range(steps)]


def run(rule, param: Tensor, grads, role="hidden"):
    """The parameter after each gradient, and the last state."""
    state, params = rule.init_state(param), []
    for step, grad in enumerate(grads):
        context = StepContext(torch.tensor(float(step), dtype=param.dtype), role=role)
        delta, state = rule.update({}, grad, state, param, context)
        param = param + delta
        params.append(param)
    return params, state


def reference(param: Tensor, grads, first_bases=None, **arguments) -> list[Tensor]:
    """The same by the reference; from other bases than its own, if they are given."""
    soap, params = ReferenceSOAP(**arguments), []
    for grad in grads:
        param = soap.step(param, grad)
        params.append(param)
        if len(params) == 1 and first_bases is not None:
            soap.q = [basis[0] for basis in first_bases]
    return params


def largest_difference(found, expected) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


# --- the reference


@pytest.mark.parametrize("size", [2, 6, 16])
@pytest.mark.parametrize("every", [1, 3, 10])
def test_equals_the_reference(size, every):
    grads, start = gradients((size, size)), torch.zeros(size, size, dtype=torch.float64)
    found, _ = run(make("soap", precondition_every=every), start, grads)
    assert found[-1].abs().max() > 1e-2
    assert largest_difference(found, reference(start, grads, frequency=every)) < 1e-9


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (24, 8), (8, 24)])
@pytest.mark.parametrize("every", [3, 10])
def test_equals_the_reference_for_oblong_matrices(shape, every):
    """The longer side's first factor has a null space, whose basis is arbitrary: the reference starts from ours."""
    grads, start = gradients(shape), torch.zeros(shape, dtype=torch.float64)
    rule = make("soap", precondition_every=every)
    found, _ = run(rule, start, grads)
    _, first = run(rule, start, grads[:1])
    expected = reference(start, grads, (first.left_basis, first.right_basis), frequency=every)
    assert largest_difference(found, expected) < 1e-9


@pytest.mark.parametrize(
    ("shape", "config", "sides"),
    [
        ((24, 8), {"max_side": 10}, (False, True)),
        ((8, 24), {"max_side": 10}, (True, False)),
        ((24, 8), {"one_sided": True}, (False, True)),
        ((8, 24), {"one_sided": True}, (True, False)),
        ((8, 8), {"one_sided": True}, (False, True)),
        ((8, 8), {"max_side": 4}, (False, False)),
    ],
)
def test_sides_that_are_not_rotated(shape, config, sides):
    grads, start = gradients(shape), torch.zeros(shape, dtype=torch.float64)
    found, state = run(make("soap", **config), start, grads)
    assert largest_difference(found, reference(start, grads, sides=sides)) < 1e-9
    assert [len(state.left[0]) > 0, len(state.right[0]) > 0] == list(sides)


def test_the_configuration_reaches_the_step():
    grads, start = gradients((6, 6)), torch.zeros(6, 6, dtype=torch.float64)
    rule = make("soap", lr=0.1, betas=(0.8, 0.9), eps=1e-3, factor_decay=0.7, precondition_every=4)
    expected = reference(start, grads, lr=0.1, betas=(0.8, 0.9), eps=1e-3, shampoo_beta=0.7, frequency=4)
    assert largest_difference(run(rule, start, grads)[0], expected) < 1e-9


@pytest.mark.parametrize("role", ["hidden", "output"])
def test_decay_is_of_the_value_after_the_step(role):
    """As in the authors' code, where a matrix's first gradient moves nothing, and nothing decays."""
    grads, param = gradients((6, 6)), torch.ones(6, 6, dtype=torch.float64)
    plain, decaying = make("soap", lr=0.1), make("soap", lr=0.1, weight_decay=0.3)
    state = plain.init_state(param)
    for step, grad in enumerate(grads):
        context = StepContext(torch.tensor(float(step), dtype=param.dtype), role=role)
        delta, new = plain.update({}, grad, state, param, context)
        found, state = decaying.update({}, grad, state, param, context)
        keeps = 1.0 if role == "hidden" and step == 0 else 1 - 0.1 * 0.3
        torch.testing.assert_close(param + found, (param + delta) * keeps, rtol=0, atol=1e-13)
        assert all(torch.equal(a, b) for a, b in zip(state, new, strict=True))
        param = param + found


def test_the_first_gradient_of_a_matrix_makes_its_bases_and_moves_nothing():
    (grad,), start = gradients((4, 4), steps=1), torch.ones(4, 4, dtype=torch.float64)
    (param,), state = run(make("soap"), start, [grad])
    assert torch.equal(param, start)
    rotated = eigenbasis.rotate(eigenbasis.Eigenbasis(*state[2:]), grad.unsqueeze(0))[0]
    torch.testing.assert_close(rotated.abs().diagonal(), torch.linalg.svdvals(grad))  # Q_L and Q_R are U and V
    torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()))


def test_is_adam_for_gradients_that_are_diagonal_already():
    """Their factors are diagonal, so the bases are permutations, which Adam does not see; it starts one step later."""
    grads = [torch.diag(torch.tensor([3.0, 2.0, 1.0]) * (-1) ** (step // 3)).double() for step in range(20)]
    param = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    adam = torch.optim.Adam([param], lr=3e-3, betas=(0.95, 0.95))
    for grad in grads[1:]:
        param.grad = grad
        adam.step()
    found, _ = run(make("soap"), torch.zeros(3, 3, dtype=torch.float64), grads)
    torch.testing.assert_close(found[-1], param.detach(), rtol=0, atol=1e-12)


# --- layouts


def test_a_convolution_is_one_matrix():
    start, grads = torch.zeros(4, 2, 2, 1, dtype=torch.float64), gradients((4, 4))
    expected, _ = run(make("soap"), start.reshape(4, 4), grads)
    found, state = run(make("soap"), start, [grad.reshape(start.shape) for grad in grads])
    torch.testing.assert_close(found[-1].reshape(4, 4), expected[-1], rtol=0, atol=1e-12)
    assert state.left.shape == (1, 4, 4)


def test_experts_are_rotated_one_by_one():
    rule, start = make("soap", experts=True), torch.zeros(3, 4, 4, dtype=torch.float64)
    members = [gradients((4, 4), seed=seed) for seed in range(3)]
    found, state = run(rule, start, [torch.stack(grads) for grads in zip(*members, strict=True)], role="experts")
    for index, grads in enumerate(members):
        torch.testing.assert_close(found[-1][index], run(rule, start[0], grads)[0][-1], rtol=0, atol=1e-12)
    assert state.left.shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("shape", "role", "config"),
    [
        ((4, 4), "embedding", {}),
        ((4, 4), "output", {}),
        ((4, 4), "other", {}),
        ((4, 4), None, {}),
        ((4,), "hidden", {}),
        ((), "hidden", {}),
        ((4, 1), "hidden", {}),
        ((3, 4, 4), "experts", {}),  # laid out as a convolution
        ((3, 4, 4), "hidden", {"experts": True}),
    ],
)
def test_all_else_takes_adams_step(shape, role, config):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    param = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
    adam = torch.optim.AdamW([param], lr=3e-3, betas=(0.95, 0.95), weight_decay=0.0)
    for grad in grads:
        param.grad = grad
        adam.step()
    found, state = run(make("soap", **config), torch.ones(shape, dtype=torch.float64), grads, role)
    torch.testing.assert_close(found[-1], param.detach(), rtol=0, atol=1e-12)
    assert not state.left.any()


def test_state_has_the_size_that_the_documentation_says():
    state = make("soap").init_state(torch.zeros(6, 8))
    assert 4 * sum(tensor.numel() for tensor in state) == 8 * 6 * 8 + 8 * (6**2 + 8**2)
    assert make("soap", max_side=7).init_state(torch.zeros(6, 8)).right.shape == (1, 0, 0)
    assert sum(tensor.numel() for tensor in make("soap").init_state(torch.zeros(9))) == 2 * 9


# --- when decompositions are computed


@pytest.mark.parametrize("told", [False, True], ids=["read", "told"])
def test_decompositions_are_computed_only_when_they_are_due(monkeypatch, told):
    calls = []
    for name in ("qr", "eigh"):
        own = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda x, own=own, name=name: (calls.append((step, name)), own(x))[1])
    rule, param = make("soap"), torch.zeros(4, 4)
    state = rule.init_state(param)
    for step in range(25):
        context = StepContext(torch.tensor(float(step)), role="hidden", known_step=step if told else None)
        _, state = rule.update({}, torch.randn(4, 4), state, param, context)
    assert calls == [(0, "eigh"), (0, "eigh"), (10, "qr"), (10, "qr"), (20, "qr"), (20, "qr")]


def test_vmap_over_runs_of_different_age_equals_a_loop():
    rule, ages = make("soap", precondition_every=3), torch.tensor([0.0, 1.0, 2.0, 3.0])
    grads = torch.stack(gradients((4, 4), steps=8))

    def update(grad, state, param, step):
        return rule.update({}, grad, state, param, StepContext(step, role="hidden"))

    starts = [run(rule, torch.ones(4, 4, dtype=torch.float64), grads[: int(age)])[1] for age in ages]
    params = torch.ones(4, 4, 4, dtype=torch.float64)
    batched = SOAPState(*(torch.stack(tensors) for tensors in zip(*starts, strict=True)))
    delta, state = torch.func.vmap(update)(grads[4:], batched, params, ages)
    for member, age in enumerate(ages):
        single = update(grads[4 + member], starts[member], params[member], age)
        for many, one in zip(
            (delta[member], *(field[member] for field in state)), (single[0], *single[1]), strict=True
        ):
            torch.testing.assert_close(many, one, rtol=0, atol=1e-12)


def test_a_first_step_that_was_skipped_is_made_up_for():
    """The host may count a step that the safeguard skipped: then the bases begin as identities, and are refreshed."""
    rule, param = make("soap"), torch.zeros(6, 6, dtype=torch.float64)
    state = rule.init_state(param)
    for step, grad in enumerate(gradients((6, 6), steps=60)):
        context = StepContext(torch.tensor(float(step), dtype=torch.float64), role="hidden", known_step=step + 1)
        delta, state = rule.update({}, grad, state, param, context)
        assert delta.isfinite().all()
    factor, basis = state.right[0], state.right_basis[0]
    diagonals = [(q.T @ factor @ q).diagonal().norm() for q in (basis, torch.eye(6, dtype=torch.float64))]
    assert diagonals[0] > 0.95 * factor.norm() > diagonals[1]


# --- the eigenbasis


def test_refreshes_converge_to_the_eigenvectors():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    factor = vectors @ torch.diag(torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0], dtype=torch.float64)) @ vectors.T
    basis = eigenbasis.init(factor, 1, 5, 0)._replace(left=factor.unsqueeze(0))
    for _ in range(60):
        basis, _ = eigenbasis.refresh_bases(basis)
    cosines = (basis.left_basis[0] * vectors).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones(5, dtype=torch.float64))


def test_rotating_back_undoes_rotating_and_carrying_is_both():
    grads = torch.stack([torch.stack(gradients((4, 6), steps=3, seed=seed)) for seed in range(2)])
    old = eigenbasis.first_bases(eigenbasis.update_factors(eigenbasis.init(grads, 2, 4, 6), grads[:, 0], 0.95))
    for side in (old.left_basis, old.right_basis):
        torch.testing.assert_close(side.mT @ side, torch.eye(side.shape[-1], dtype=side.dtype).expand_as(side))
    torch.testing.assert_close(eigenbasis.rotate_back(old, eigenbasis.rotate(old, grads[:, 1])), grads[:, 1])
    new, _ = eigenbasis.refresh_bases(eigenbasis.update_factors(old, grads[:, 1], 0.95))
    carried = eigenbasis.carried(old, new, eigenbasis.rotate(old, grads[:, 2]))
    torch.testing.assert_close(carried, eigenbasis.rotate(new, grads[:, 2]))


def test_squares_follow_their_basis_vectors():
    """Bases that are permutations of the coordinates: after reordering, each square is again that of its coordinate."""
    eigenvalues = torch.tensor([1.0, 3.0, 2.0])
    basis = eigenbasis.init(eigenvalues, 1, 3, 3)._replace(
        left=torch.diag(eigenvalues).unsqueeze(0), right=torch.diag(eigenvalues.flip(0)).unsqueeze(0)
    )
    squares = torch.arange(9.0).reshape(1, 3, 3)
    new, orders = eigenbasis.refresh_bases(basis)
    assert [order.tolist() for order in orders] == [[[1, 2, 0]], [[1, 0, 2]]]
    torch.testing.assert_close(eigenbasis.reordered(orders, squares), eigenbasis.rotate(new, squares).abs())


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"lr": -1.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"factor_decay": 1.0}, "factor_decay"),
        ({"precondition_every": 0}, "precondition_every"),
        ({"max_side": 1.5}, "max_side"),
        ({"one_sided": 1}, "one_sided"),
    ],
)
def test_configurations_that_are_refused(config, name):
    with pytest.raises(ValueError, match=name):
        make("soap", **config)
