"""What the contract asks of every rule, of hidden matrices and experts, which rules with roles move in another way."""

import pytest
import torch
from torch import Tensor

from lightning_lopt.rules import StepContext, UpdateRule, make

CASES = {
    "muon": ("muon", {}, "hidden", [(5, 3), (1, 4), (3, 3), (4, 3, 2), (2, 3, 3, 3), (7,), ()]),
    "muon, experts": ("muon", {}, "experts", [(2, 5, 3), (2, 2, 4, 3)]),
    "muon, bfloat16": ("muon", {"bfloat16": True}, "hidden", [(5, 3), (2, 3, 3, 3)]),
    "soap": ("soap", {"precondition_every": 2}, "hidden", [(5, 3), (1, 4), (3, 3), (4, 3, 2), (2, 3, 3, 3), (7,), ()]),
    "soap, experts": ("soap", {"precondition_every": 2, "experts": True}, "experts", [(2, 5, 3), (2, 2, 4, 3)]),
    "soap, one-sided": ("soap", {"precondition_every": 2, "one_sided": True}, "hidden", [(5, 3), (3, 5)]),
}
SIZES = {
    "zero": (0.0, 0.0, 0.0, 0.0),
    "huge": (1e10, 1e10, 1e10, 1e10),
    "beyond squares": (1e30, 1e30, 1e30, 1e30),
    "tiny": (1e-30, 1e-30, 1e-30, 1e-30),
    "huge, then zero": (1e10, 0.0, 0.0, 0.0),
    "zero, then huge": (0.0, 0.0, 1e10, 1e10),
    "tiny, then huge, then tiny": (1e-30, 1e10, 1e-30, 1e-30),
}


@pytest.fixture(params=CASES)
def case(request):
    kind, config, role, shapes = CASES[request.param]
    return make(kind, **config), role, shapes


def run(rule: UpdateRule, role: str, param: Tensor, grads):
    """The parameter and the state after the gradients."""
    state = rule.init_state(param)
    for step, grad in enumerate(grads):
        context = StepContext(torch.tensor(float(step), dtype=param.dtype), role=role)
        delta, new = rule.update({}, grad, state, param, context)
        assert (delta.shape, delta.dtype) == (param.shape, param.dtype)
        assert type(new) is type(state)
        for before, after in zip(state, new, strict=True):
            assert (before.shape, before.dtype, before.device) == (after.shape, after.dtype, after.device)
        param, state = param + delta, new
    return param, state


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_hostile_gradients_leave_everything_finite(case, sizes):
    rule, role, shapes = case
    for shape in shapes:
        for draw in (torch.randn, torch.ones):
            param, state = run(rule, role, torch.rand(shape), [size * draw(shape) for size in sizes])
            assert all(tensor.isfinite().all() for tensor in (param, *state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_parameter_descends_by_a_constant_gradient(case, dtype):
    rule, role, shapes = case
    for shape in shapes:
        grad, start = torch.randn(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        param, _ = run(rule, role, start, [grad] * 5)
        assert (param * grad).sum() < 0


def test_is_a_pure_function(case):
    rule, role, shapes = case
    for shape in shapes:
        param, state = run(rule, role, torch.rand(shape), [torch.randn(shape) for _ in range(3)])
        grad, context = torch.randn(shape), StepContext(torch.tensor(4.0), role=role)
        before = [tensor.clone() for tensor in (grad, *state, param)]
        once, again = (rule.update({}, grad, state, param, context) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip((once[0], *once[1]), (again[0], *again[1]), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, (grad, *state, param), strict=True))
        torch.testing.assert_close(sum(rule.terms({}, grad, state, param, context).values()), once[0])


def test_vmap_over_a_population_equals_a_loop(case):
    rule, role, shapes = case
    for shape in shapes:
        params, grads = torch.rand(3, *shape), torch.randn(6, 3, *shape)
        batched = torch.func.vmap(lambda param, grads: run(rule, role, param, grads), in_dims=(0, 1))(params, grads)
        for member in range(3):
            single = run(rule, role, params[member], grads[:, member])
            for many, one in zip((batched[0], *batched[1]), (single[0], *single[1]), strict=True):
                tolerance = 2e-2 if getattr(rule.config, "bfloat16", False) else 1e-4
                torch.testing.assert_close(many[member], one, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_derivatives_are_finite(case, size):
    rule, role, shapes = case
    for shape in shapes:
        curvature = size * torch.rand(shape)

        def loss(param, curvature=curvature):
            state = rule.init_state(param)
            for step in range(4):
                context = StepContext(torch.tensor(float(step)), role=role)
                delta, state = rule.update({}, curvature * param, state, param, context)
                param = param + delta
            return (param**2).sum()

        assert torch.func.grad(loss)(torch.rand(shape)).isfinite().all()


def test_memory_layout_makes_no_difference(case):
    rule, role, shapes = case
    for shape in (shape for shape in shapes if len(shape) == 4):
        param, grads = torch.rand(shape), [torch.randn(shape) for _ in range(5)]
        last = [tensor.to(memory_format=torch.channels_last) for tensor in (param, *grads)]
        torch.testing.assert_close(run(rule, role, last[0], last[1:])[0], run(rule, role, param, grads)[0])
