"""Tensors that are not plain, numbers that are not usual: lazy signs, overlaps, resizes, overflow, long runs."""

import gc
import weakref

import pytest
import torch
from contract_table import RULES_UNDER_TEST
from lightning.pytorch.core.optimizer import LightningOptimizer
from optimizer_cases import LossRule, assert_equal, hidden, parameters, set_gradients, snapshot, star
from torch import nn

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.optimizer.gradients import dense


@pytest.fixture(params=RULES_UNDER_TEST, ids=lambda case: case.kind)
def rule(request):
    torch.manual_seed(0)
    return request.param.make()


def moved(rule, values, gradients, steps=3, **arguments):
    """Parameters after some steps."""
    params = [nn.Parameter(value) for value in values]
    optimizer = RuleOptimizer(hidden(params), rule, backend="reference", num_steps=10, **arguments)
    optimizer.set_names((str(number), param) for number, param in enumerate(params))
    for _ in range(steps):
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        optimizer.step(loss=1.5)
    return [param.detach() for param in params]


# --- defaults


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(rule, dtype):
    values, gradients = torch.randn(2, 3, 4, 3)
    expected = moved(rule, values.clone(), gradients)
    torch.set_default_dtype(dtype)
    try:
        found = moved(rule, values.clone(), gradients)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(found, expected)


def test_the_default_device_changes_nothing(rule):
    values, gradients = torch.randn(2, 3, 4, 3)
    expected = moved(rule, values.clone(), gradients)
    with torch.device("meta"):
        found = moved(rule, values.clone(), gradients)
    assert_equal(found, expected)


@pytest.mark.parametrize("default", ["dtype", "device"])
@pytest.mark.parametrize("safeguard", [False, True, "fallback"])
def test_defaults_change_neither_safeguard_nor_metrics(safeguard, default):
    found = []
    for changed in (False, True):
        optimizer = RuleOptimizer(parameters([(4, 3)]), star(), safeguard=safeguard, backend="reference")
        set_gradients(optimizer.param_groups[0]["params"], 0)
        optimizer.measure_next_step()
        torch.set_default_dtype(torch.bfloat16 if changed and default == "dtype" else torch.float32)
        try:
            with torch.device("meta" if changed and default == "device" else "cpu"):
                for _ in range(2):
                    optimizer.step(loss=1.2345678)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([*snapshot(optimizer), *(value for value in optimizer.take_metrics() if value is not None)])
    assert_equal(*found)


def test_a_loss_given_as_a_number_is_not_rounded_to_the_default_dtype():
    rule = LossRule()
    optimizer = RuleOptimizer(parameters([(3,)]), rule)
    set_gradients(optimizer.param_groups[0]["params"], 0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer.step(loss=1.2345678)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rule.losses == [pytest.approx(1.2345678, rel=1e-6)]


# --- forms of tensors


def negative(tensor):
    found = torch._neg_view(-tensor)
    assert found.is_neg()
    return found


def wide(tensor):
    """The tensor in every second column of a wider one."""
    found = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)[..., ::2]
    found.copy_(tensor)
    return found


FORMS = {
    "negative": negative,
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "wide": wide,
    "offset": lambda tensor: torch.cat([torch.full((1, tensor.shape[1]), torch.nan), tensor])[1:],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("of", ["gradient", "parameter"])
def test_a_form_of_a_tensor_gives_what_its_clone_gives(rule, form, of):
    value, gradient = torch.randn(2, 4, 3)
    forms = {"gradient": gradient, "parameter": value.clone()}
    forms[of] = form(forms[of])
    (found,) = moved(rule, [forms["parameter"]], [forms["gradient"]])
    (expected,) = moved(rule, [value.clone()], [gradient])
    torch.testing.assert_close(found.contiguous().resolve_neg(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(1, 3), (4, 1)], ids=str)
def test_gradients_that_overlap_in_memory(rule, shape):
    value, gradient = torch.randn(4, 3), torch.randn(shape).expand(4, 3)
    (found,) = moved(rule, [value.clone()], [gradient])
    (expected,) = moved(rule, [value.clone()], [gradient.clone()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_kernels_are_given_gradients_whose_memory_has_the_sign():
    """Autograd itself gives such gradients, to real parameters behind conj() of complex numbers."""
    given = dense(negative(torch.ones(4, 3)))
    assert not given.is_neg()
    assert torch.equal(given, torch.ones(4, 3))


# --- sizes that do not fit


def resize(optimizer, param):
    param.data = param.detach()[:2].clone()
    param.grad = torch.ones_like(param)


def resize_without_its_gradient(optimizer, param):
    param.data = param.detach()[:2].clone()


def transpose(optimizer, param):
    param.data = param.detach().t().contiguous()
    param.grad = torch.ones_like(param)


def hand_the_state_over(optimizer, param):
    larger = nn.Parameter(torch.ones(9, 3))
    larger.grad = torch.ones(9, 3)
    optimizer.state[larger] = optimizer.state.pop(param)
    optimizer.param_groups[0]["params"][1] = larger


CHANGES = (resize, resize_without_its_gradient, transpose, hand_the_state_over)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_parameter_that_its_state_does_not_fit_is_named_before_anything_is_written(rule, change):
    params = parameters([(4, 3)] * 3)
    optimizer = RuleOptimizer(hidden(params), rule, backend="reference", num_steps=99)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step(loss=1.0)
    change(optimizer, params[1])
    before = snapshot(optimizer)
    named = r"(State '\w+'|The gradient) of parameter 1 of group 0 \(shape "
    with pytest.raises(RuntimeError, match=named) as caught:
        optimizer.step(loss=1.0)
    assert "\n" not in str(caught.value)
    assert_equal(snapshot(optimizer), before)


def test_a_resized_parameter_whose_state_was_deleted_starts_anew():
    params = parameters([(4, 3)])
    optimizer = RuleOptimizer(params, star(), backend="reference")
    set_gradients(params, 0)
    optimizer.step()
    resize(optimizer, params[0])
    del optimizer.state[params[0]]
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


def test_a_sparse_gradient_is_refused_before_anything_is_written():
    params = parameters([(4, 3), (4, 3)])
    optimizer = RuleOptimizer(params, star(), backend="reference")
    set_gradients(params, 0)
    optimizer.step()
    params[1].grad = None
    params[1].grad = torch.ones(4, 3).to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_equal(snapshot(optimizer), before)


# --- numbers


@pytest.mark.parametrize("shape", [(6, 4), (5,)], ids=str)
@pytest.mark.parametrize("size", [1e20, 1e25, -3e38])
def test_one_huge_gradient_leaves_parameters_finite_as_adamw_does(rule, shape, size):
    gradients = torch.randn(11, *shape, generator=torch.Generator().manual_seed(0))
    gradients[5].view(-1)[1] = size
    ends = []

    def by_rule(params):
        return RuleOptimizer(hidden(params), rule, backend="reference", num_steps=99)

    for make in (torch.optim.AdamW, by_rule):
        param = nn.Parameter(torch.zeros(shape))
        optimizer = make([param])
        for gradient in gradients:
            param.grad = gradient.clone()
            optimizer.step(*(() if make is torch.optim.AdamW else (lambda: torch.tensor(1.0),)))
        ends.append(optimizer.state[param] | {"param": param})
    adamw, own = ends
    assert adamw["param"].isfinite().all()
    assert own["param"].isfinite().all()
    if adamw["exp_avg_sq"].isfinite().all():
        assert all(torch.isfinite(tensor).all() for tensor in own.values())


def test_the_step_counter_goes_on_beyond_what_float32_counts():
    params = parameters([(4, 3)])
    optimizer = RuleOptimizer(params, star(), backend="reference", num_steps=5 * 10**7)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.state[params[0]]["step"] = torch.tensor(2.0**24)  # as an older checkpoint has it
    for _ in range(5):
        optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 2**24 + 5
    other = RuleOptimizer(parameters([(4, 3)]), star(), backend="reference")
    other.load_state_dict(optimizer.state_dict())
    set_gradients(other.param_groups[0]["params"], 0)
    other.step()
    assert other.state[other.param_groups[0]["params"][0]]["step"].item() == 2**24 + 6


@pytest.mark.parametrize("number", [-1, 0, 10.5, float("nan"), float("inf"), True, "10", torch.tensor(3.5)])
def test_a_run_length_that_is_not_a_positive_integer_is_refused(number):
    message = r"num_steps=.* is not allowed: it must be the number of optimizer steps of the run.*or None"
    with pytest.raises(ValueError, match=message):
        RuleOptimizer(parameters([(2,)]), star(), num_steps=number)
    optimizer = RuleOptimizer(parameters([(2,)]), star(), num_steps=7)
    with pytest.raises(ValueError, match=message):
        optimizer.num_steps = number
    assert optimizer.num_steps == 7


@pytest.mark.parametrize("number", [1, 10**9, 1e4, torch.tensor(3), None])
def test_run_lengths_that_are_allowed(number):
    optimizer = RuleOptimizer(parameters([(2,)]), star())
    optimizer.num_steps = number
    assert optimizer.num_steps is None if number is None else optimizer.num_steps == int(number)


def test_a_run_length_set_on_lightnings_wrapper_reaches_the_optimizer():
    optimizer = RuleOptimizer(parameters([(2,)]), star())
    wrapper = LightningOptimizer(optimizer)
    wrapper.num_steps = 12
    assert (optimizer.num_steps, wrapper.num_steps) == (12, 12)


# --- what stays alive


@pytest.mark.parametrize("name", ["star", "lstm"])
def test_parameters_that_left_the_optimizer_are_freed(name):
    params = parameters([(4, 3), (3,)])
    optimizer = RuleOptimizer(params, lopt.load_rule(name), backend="reference")
    optimizer.set_names([("weight", params[0]), ("bias", params[1])])
    gone = []
    for step in range(5):
        own = optimizer.param_groups[0]["params"]
        set_gradients(own, step)
        optimizer.step()
        gone.append(weakref.ref(own[0]))
        del optimizer.state[own[0]]
        own[0] = nn.Parameter(own[0].detach().clone())
    del params
    gc.collect()
    assert [each() for each in gone] == [None] * 5


def test_all_parameters_save_one_and_the_same_trust_band():
    params = parameters([(4, 3), (3,), (2,)])
    optimizer = RuleOptimizer(params, star(), safeguard="fallback")
    set_gradients(params, 0)
    optimizer.step(loss=1.0)
    first, *others = (optimizer.state[param]["trust"] for param in params)
    assert all(other is first for other in others)


def test_the_fallback_is_refused_where_the_nominal_term_is_all_there_is():
    with pytest.raises(ValueError, match="kind 'scheduled': the nominal term is its only term.*safeguard=True"):
        RuleOptimizer(parameters([(2,)]), lopt.load_rule("star"), safeguard="fallback")
