"""What every update rule must do, whatever it is. A new rule adds one line to `contract_table.RULES_UNDER_TEST`."""

import copy
import dataclasses
import inspect
import json
from typing import Any

import pytest
import torch
from contract_table import RULES_UNDER_TEST, RuleCase
from torch import Tensor

from lightning_lopt.rules import REGISTRY, StepContext, UpdateRule, compute_dtype, make

SHAPES = [(), (1,), (7,), (5, 3), (1, 4), (3, 3), (4, 3, 2), (2, 3, 3, 3)]
HOSTILE_GRADIENTS = {
    "zero": (0.0, 0.0, 0.0),
    "equal": (1.0, 1.0, 1.0),
    "huge": (1e10, -1e10, 1e10),
    "tiny": (1e-30, -1e-30, 1e-30),
    "huge, then zero": (1e10, 0.0, 0.0),
    "zero, then huge": (0.0, 0.0, 1e10),
    "tiny, then huge, then tiny": (1e-30, 1e10, 1e-30),
}


@pytest.fixture(params=RULES_UNDER_TEST, ids=lambda case: case.kind)
def case(request) -> RuleCase:
    return request.param


@pytest.fixture
def rule(case) -> UpdateRule:
    return case.make()


def test_every_kind_of_the_package_is_in_the_table():
    own = {kind for kind, entry in REGISTRY.items() if entry.rule.__module__.startswith("lightning_lopt.")}
    assert {case.kind for case in RULES_UNDER_TEST} == own


# --- the steps


def meta_params_of(rule: UpdateRule, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype) for name, value in rule.meta_params().items()}


def context(rule: UpdateRule, step: int, loss: Tensor | float = 1.0, num_steps: int | None = None) -> StepContext:
    given = torch.as_tensor(loss, dtype=torch.get_default_dtype()) if rule.needs_loss else None
    if rule.needs_num_steps and num_steps is None:
        num_steps = 600
    return StepContext(torch.tensor(float(step)), given, num_steps)


def take(
    rule: UpdateRule,
    meta_params: dict[str, Tensor],
    grad: Tensor,
    state: Any,
    param: Tensor,
    context: StepContext,
    run: Any,
) -> tuple[Tensor, Any, Any]:
    """A step of a net of one tensor: delta, its state, and the run's state."""
    if rule.needs_run_state:
        run = rule.init_run_state(param) if run is None else run
        run = rule.update_run_state(meta_params, run, {"only": param}, context)
        context = context._replace(run=run)
    if rule.needs_shared_context:
        of_one = ({"only": each} for each in (grad, state, param))
        shared, states = rule.shared_context(meta_params, *of_one, context)
        state, context = states["only"], context._replace(shared=shared)
    return *rule.update(meta_params, grad, state, param, context), run


def ill_conditioned_quadratic(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A start (5, 2) and a Hessian (10, 10) with eigenvalues from 1 to 100; the minimum is 0 at 0."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=dtype))
    hessian = basis @ torch.diag(torch.logspace(0, 2, 10, dtype=dtype)) @ basis.T
    return torch.randn(5, 2, generator=generator, dtype=dtype), hessian


def losses_on_quadratic(
    rule: UpdateRule, meta_params: dict[str, Tensor], start: Tensor, hessian: Tensor, num_steps: int
) -> Tensor:
    """(num_steps + 1,) losses, the start's first."""
    param, state, losses, of_run = start, rule.init_state(start), [], None
    for step in range(num_steps):
        grad = (hessian @ param.flatten()).reshape(param.shape)
        losses.append(0.5 * (param * grad).sum())
        delta, state, of_run = take(rule, meta_params, grad, state, param, context(rule, step, losses[-1]), of_run)
        param = param + delta
    return torch.stack([*losses, 0.5 * param.flatten() @ hessian @ param.flatten()])


def run(rule: UpdateRule, param: Tensor, grads: list[Tensor], num_steps: int | None = None) -> tuple[Tensor, Any]:
    """The parameter and the state after the given gradients; both finite after every step."""
    meta_params, state, of_run = meta_params_of(rule, param.dtype), rule.init_state(param), None
    for step, grad in enumerate(grads):
        now = context(rule, step, num_steps=num_steps)
        delta, state, of_run = take(rule, meta_params, grad, state, param, now, of_run)
        assert delta.shape == param.shape
        assert delta.dtype == param.dtype
        assert all(tensor.isfinite().all() for tensor in (delta, *state))
        param = param + delta
    return param, state


# --- what is asked of them


def test_converges_on_an_ill_conditioned_quadratic(rule):
    with torch.no_grad():
        losses = losses_on_quadratic(
            rule, meta_params_of(rule), *ill_conditioned_quadratic(torch.float32), num_steps=600
        )
    assert losses[-20:].max() < 0.01 * losses[0]


def test_state_is_a_named_tuple_of_tensors_of_lasting_structure(rule):
    for shape in SHAPES:
        param = torch.rand(shape)
        state = rule.init_state(param)
        assert isinstance(state, tuple)
        assert all(isinstance(tensor, Tensor) for tensor in state)
        _, later = rule.update(meta_params_of(rule), torch.rand(shape), state, param, context(rule, 0))
        assert type(later) is type(state)
        for name, before, after in zip(state._fields, state, later, strict=True):
            assert (before.shape, before.dtype, before.device) == (after.shape, after.dtype, after.device), name


def test_state_can_be_laid_out_without_memory(rule):
    """The optimizer looks at shapes this way before it loads a checkpoint."""
    for shape in SHAPES:
        for real, meta in zip(
            rule.init_state(torch.zeros(shape)), rule.init_state(torch.zeros(shape, device="meta")), strict=True
        ):
            assert meta.is_meta
            assert (real.shape, real.dtype) == (meta.shape, meta.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_arithmetic_and_state_are_float32_at_least(rule, dtype):
    """The shell converts a parameter to `compute_dtype`; all that comes back is in it."""
    param = torch.rand(4, 3).to(dtype).to(compute_dtype(dtype))
    _, state = run(rule, param, [torch.randn_like(param) for _ in range(3)])
    floating = [tensor.dtype for tensor in state if tensor.is_floating_point()]
    assert floating
    assert set(floating) == {torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("shape", SHAPES)
def test_takes_any_shape(rule, shape):
    run(rule, torch.rand(shape), [torch.randn(shape) for _ in range(3)])


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_takes_empty_tensors(rule, shape):
    param = torch.zeros(shape)
    delta, _ = rule.update(meta_params_of(rule), param, rule.init_state(param), param, context(rule, 0))
    assert delta.shape == shape


@pytest.mark.parametrize("gradients", HOSTILE_GRADIENTS)
def test_hostile_gradients_leave_everything_finite(rule, gradients):
    for shape in SHAPES:
        run(rule, torch.rand(shape), [torch.full(shape, value) for value in HOSTILE_GRADIENTS[gradients]])
        run(rule, torch.zeros(shape), [torch.randn(shape) * value for value in HOSTILE_GRADIENTS[gradients]])


def test_is_a_pure_function(rule):
    param, grad = torch.rand(4, 3), torch.rand(4, 3)
    meta_params = meta_params_of(rule)
    _, state = rule.update(meta_params, grad, rule.init_state(param), param, context(rule, 0))
    arguments = (meta_params, grad, state, param, context(rule, 1))
    before, generator = copy.deepcopy(arguments), torch.get_rng_state()
    first, second = rule.update(*arguments), rule.update(*arguments)
    for once, again in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        assert torch.equal(once, again)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(meta_params[name], value) for name, value in before[0].items())
    for old, new in zip((before[1], *before[2], before[3]), (grad, *state, param), strict=True):
        assert torch.equal(old, new)


def test_memory_layout_makes_no_difference(rule):
    param, grads = torch.rand(2, 3, 4, 5), [torch.randn(2, 3, 4, 5) for _ in range(3)]
    expected, _ = run(rule, param, grads)
    channels_last = [tensor.to(memory_format=torch.channels_last) for tensor in (param, *grads)]
    torch.testing.assert_close(run(rule, channels_last[0], channels_last[1:])[0], expected)


def test_works_with_and_without_knowing_the_number_of_steps(rule):
    param, grads = torch.rand(4, 3), [torch.randn(4, 3) for _ in range(3)]
    for num_steps in (None, 3, 1):  # 1: more steps than were announced
        run(rule, param, grads, num_steps)
    if rule.needs_num_steps:
        with pytest.raises(ValueError, match="must know the length of the run"):
            take(
                rule,
                meta_params_of(rule),
                grads[0],
                rule.init_state(param),
                param,
                StepContext(torch.tensor(0.0), torch.tensor(1.0)),
                None,
            )


def test_vmap_over_a_population_equals_a_loop(rule):
    meta_params = {name: value + 0.01 * torch.randn(3, *value.shape) for name, value in meta_params_of(rule).items()}
    for shape in ((), (5,), (4, 3)):
        params, grads = torch.rand(3, *shape), torch.randn(2, 3, *shape)

        def steps(meta_params, param, grads):
            state, of_run = rule.init_state(param), None
            for step, grad in enumerate(grads):
                delta, state, of_run = take(rule, meta_params, grad, state, param, context(rule, step), of_run)
                param = param + delta
            return param, state

        batched = torch.func.vmap(steps, in_dims=(0, 0, 1))(meta_params, params, grads)
        for member in range(3):
            own = {name: value[member] for name, value in meta_params.items()}
            single = steps(own, params[member], grads[:, member])
            for many, one in zip((batched[0], *batched[1]), (single[0], *single[1]), strict=True):
                torch.testing.assert_close(many[member], one, rtol=1e-4, atol=1e-5)


def test_gradients_flow_to_meta_parameters_and_to_the_start(rule):
    start, hessian = ill_conditioned_quadratic(torch.float32)

    def meta_loss(meta_params, start):
        return losses_on_quadratic(rule, meta_params, start, hessian / 100, num_steps=3)[-1]

    meta_gradient, start_gradient = torch.func.grad(meta_loss, argnums=(0, 1))(meta_params_of(rule), start)
    assert all(gradient.isfinite().all() for gradient in (*meta_gradient.values(), start_gradient))
    assert start_gradient.any()
    assert not meta_gradient or any(gradient.any() for gradient in meta_gradient.values())


def test_meta_gradients_through_zero_gradients_are_finite(rule):
    def meta_loss(meta_params, start):
        return losses_on_quadratic(rule, meta_params, start, torch.zeros(10, 10), num_steps=3)[-1] + 1

    meta_gradient = torch.func.grad(meta_loss)(meta_params_of(rule), torch.ones(5, 2))
    assert all(gradient.isfinite().all() for gradient in meta_gradient.values())


def test_terms_add_up_to_the_update(rule):
    param, grad = torch.rand(4, 3), torch.randn(4, 3)
    arguments = (meta_params_of(rule), grad, rule.init_state(param), param, context(rule, 0))
    torch.testing.assert_close(sum(rule.terms(*arguments).values()), rule.update(*arguments)[0])


def test_is_rebuilt_from_kind_configuration_and_weights(case, rule):
    config = json.loads(json.dumps(rule.config.to_dict()))
    assert type(rule.config).from_dict(config) == rule.config
    rebuilt = make(case.kind, **config)
    rebuilt.load_state_dict(rule.state_dict())
    assert rebuilt.config == rule.config
    param, grads = torch.rand(4, 3), [torch.randn(4, 3) for _ in range(3)]
    assert torch.equal(run(rebuilt, param, grads)[0], run(rule, param, grads)[0])


def test_configuration_fields_are_documented(case):
    """By a string below the field, the command line's help, or by its `meaning`, which `lopt show` prints."""
    config = REGISTRY[case.kind].rule.Config
    source = inspect.getsource(config)
    for field in dataclasses.fields(config):
        assert f"    {field.name}: " in source, f"{field.name} is not defined in {config.__name__} itself"
        after = source.split(f"    {field.name}: ", 1)[1].split("\n", 2)[1]
        assert field.metadata.get("meaning") or after.strip().startswith('"""'), field.name
