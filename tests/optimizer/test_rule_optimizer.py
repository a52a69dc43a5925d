"""RuleOptimizer keeps torch's optimizer contract: closures, groups, shapes, dtypes, hooks, copies."""

import copy
import pickle

import pytest
import torch
from optimizer_cases import (
    SHAPES,
    AdamRule,
    LossRule,
    SGDRule,
    assert_close,
    assert_equal,
    parameters,
    run,
    set_gradients,
    snapshot,
    star,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("safeguard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_and_dtype_is_stepped_with_state_of_full_precision(shape, dtype, safeguard):
    (param,) = parameters([shape], dtype)
    before = param.detach().clone()
    optimizer = RuleOptimizer([param], star(), safeguard=safeguard)
    run(optimizer, 3)
    assert param.dtype == dtype
    assert param.shape == shape
    assert torch.isfinite(param).all()
    if param.numel():
        assert not torch.equal(param, before)
        floats = {name: t.dtype for name, t in optimizer.state[param].items() if t.is_floating_point()}
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        floats.pop("step", None)  # an integer, but for kernels that count in float32
        assert set(floats.values()) == {expected}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_the_full_precision_step_rounded_once(dtype):
    low, full = parameters([(4, 3)], dtype), parameters([(4, 3)])
    full[0].data.copy_(low[0])
    for param, optimizer in ((low[0], RuleOptimizer(low, star())), (full[0], RuleOptimizer(full, star()))):
        param.grad = torch.full_like(param, 0.5)  # exact in both
        optimizer.step()
    assert torch.equal(low[0], full[0].to(dtype))


def test_step_returns_the_closures_value_and_runs_it_once_with_gradients_enabled():
    param = nn.Parameter(torch.ones(3))
    optimizer, calls = RuleOptimizer([param], star()), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    value = optimizer.step(closure)
    assert calls == [True]
    assert value.item() == 3.0
    assert (param < 1).all()
    assert optimizer.step() is None


def test_parameters_without_gradient_frozen_or_empty_are_left_alone():
    moved, no_grad, frozen, empty = parameters([(3,), (3,), (3,), (0,)])
    frozen.requires_grad_(False)
    before = [p.detach().clone() for p in (no_grad, frozen)]
    optimizer = RuleOptimizer([moved, no_grad, frozen, empty], star())
    for step in range(2):
        set_gradients([moved, empty], step)
        optimizer.step()
    assert_equal([no_grad.detach(), frozen.detach()], before)
    assert set(optimizer.state) == {moved}


def test_nothing_to_do_is_no_error():
    optimizer = RuleOptimizer(parameters([(3,)]), star(), safeguard=True)
    assert optimizer.step() is None
    assert optimizer.num_skipped() == 0
    assert optimizer.take_metrics() is None


def test_a_gradient_that_appears_late_starts_at_step_zero():
    early, late = parameters([(3,), (3,)])
    optimizer = RuleOptimizer([early, late], star())
    for step in range(4):
        set_gradients([early] if step < 3 else [early, late], step)
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (early, late)] == [4, 1]


LAYOUTS = {
    "transposed": lambda: torch.randn(5, 6).t(),
    "strided": lambda: torch.randn(5, 6)[:, ::2],
    "expanded": lambda: torch.randn(1, 6).expand(4, -1),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layout_of_the_gradient_does_not_matter(make):
    gradient = make()
    pairs = []
    for value in (gradient, gradient.contiguous()):
        param = nn.Parameter(torch.ones(gradient.shape))
        param.grad = value
        RuleOptimizer([param], star()).step()
        pairs.append(param.detach())
    assert_close(pairs[:1], pairs[1:], 1e-6)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_memory_layout_of_the_parameter_is_kept(memory_format):
    param = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=memory_format))
    twin = nn.Parameter(param.detach().contiguous().clone())
    strides = param.stride()
    for p in (param, twin):
        run(RuleOptimizer([p], star()), 3)
    assert param.stride() == strides
    assert_close([param.detach()], [twin.detach()], 1e-5)


def test_transposed_parameter():
    param = nn.Parameter(torch.randn(3, 4).t())
    twin = nn.Parameter(param.detach().contiguous().clone())
    for p in (param, twin):
        run(RuleOptimizer([p], star()), 3)
    assert_close([param.detach()], [twin.detach()], 1e-6)


@pytest.mark.parametrize("safeguard", [False, True])
def test_mixed_dtypes_in_one_optimizer_are_each_as_alone(safeguard):
    together = [parameters([(4, 3)], dtype)[0] for dtype in DTYPES]
    run(RuleOptimizer(together, star(), safeguard=safeguard), 3)
    for dtype, param in zip(DTYPES, together, strict=True):
        alone = parameters([(4, 3)], dtype)
        optimizer = RuleOptimizer(alone, star(), safeguard=safeguard)
        for step in range(3):
            set_gradients([torch.empty(4, 3)] * DTYPES.index(dtype), step)
            generator = torch.Generator().manual_seed(100 + step)
            gradients = [torch.randn(4, 3, generator=generator) for _ in DTYPES]
            alone[0].grad = gradients[DTYPES.index(dtype)].to(dtype)
            optimizer.step()
        assert torch.equal(alone[0], param)


def test_maximize_is_descent_on_the_negated_gradient():
    up, down = parameters([(4, 3)]), parameters([(4, 3)])
    climbs, descends = RuleOptimizer(up, star(), maximize=True), RuleOptimizer(down, star())
    for step in range(3):
        set_gradients(up, step)
        down[0].grad = -up[0].grad
        climbs.step()
        descends.step()
    assert torch.equal(up[0], down[0])


def test_groups_have_their_own_lr_weight_decay_and_maximize():
    params = parameters([(3,)] * 4)
    for param in params:
        param.data.fill_(1.0)
        param.grad = torch.ones(3)
    groups = [
        {"params": [params[0]]},
        {"params": [params[1]], "lr": 0.5},
        {"params": [params[2]], "weight_decay": 0.1},
        {"params": [params[3]], "maximize": True},
    ]
    RuleOptimizer(groups, SGDRule(), lr=0.1).step()
    assert_close(params, [torch.full((3,), v) for v in (0.9, 0.5, 0.89, 1.1)], 1e-6)


def test_added_group_takes_the_defaults_and_starts_fresh():
    first, second = parameters([(3,), (3,)])
    optimizer = RuleOptimizer([first], star(), lr=0.5, weight_decay=0.1)
    run(optimizer, 2)
    optimizer.add_param_group({"params": [second], "lr": 0.25})
    added = optimizer.param_groups[1]
    assert {k: added[k] for k in ("lr", "weight_decay", "lopt_kind")} == {
        "lr": 0.25,
        "weight_decay": 0.1,
        "lopt_kind": "star",
    }
    run(optimizer, 1, start=2)
    assert [optimizer.state[p]["step"].item() for p in (first, second)] == [3, 1]


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="optimizers take names from torch 2.6 on")
def test_named_parameters_keep_their_names():
    module = nn.Linear(2, 2)
    optimizer = RuleOptimizer(module.named_parameters(), star())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_tensor_lr_is_followed_without_a_copy():
    for shape in ((), (1,)):
        lr = torch.full(shape, 0.1)
        params = parameters([(), (3,)])
        before = [p.detach().clone() for p in params]
        optimizer = RuleOptimizer(params, SGDRule(), lr=lr)
        run(optimizer, 1)
        expected = [b - 0.1 * p.grad for b, p in zip(before, params, strict=True)]
        assert_close([p.detach() for p in params], expected, 1e-6)
        before = [p.detach().clone() for p in params]
        lr.zero_()
        run(optimizer, 1, start=1)
        assert_equal([p.detach() for p in params], before)


def test_zero_grad():
    params = parameters([(3,)])
    optimizer = RuleOptimizer(params, star())
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(params[0].grad, torch.zeros(3))
    optimizer.zero_grad()
    assert params[0].grad is None


DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer))}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_copies_go_on_as_the_original_does(duplicate):
    optimizer = RuleOptimizer(parameters(dtype=torch.bfloat16), star(), lr=0.5, safeguard=True, num_steps=7)
    run(optimizer, 3)
    other = duplicate(optimizer)
    assert (other.num_steps, other.safeguard, other.backend) == (7, True, optimizer.backend)
    assert other.rule is not optimizer.rule
    for each in (optimizer, other):
        run(each, 3, start=3)
    assert_equal(snapshot(optimizer), snapshot(other))


def test_step_hooks_see_and_change_the_arguments():
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    rule, seen = LossRule(), []
    optimizer = RuleOptimizer([param], rule)
    pre = optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {**kwargs, "loss": 2.0}))
    post = optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(kwargs["loss"]))
    everywhere = register_optimizer_step_post_hook(lambda *_: seen.append("global"))
    optimizer.step(loss=1.0)
    for handle in (pre, post, everywhere):
        handle.remove()
    optimizer.step(loss=1.0)
    assert rule.losses == [2.0, 1.0]
    assert seen == [2.0, "global"]


def test_a_loss_comes_from_the_argument_before_the_closure():
    rule = LossRule()
    param = nn.Parameter(torch.ones(3))
    optimizer = RuleOptimizer([param], rule)
    param.grad = torch.ones(3)
    optimizer.step(lambda: torch.tensor(3.0))
    optimizer.step(lambda: torch.tensor(3.0), loss=torch.tensor([4.0], requires_grad=True))
    assert rule.losses == [3.0, 4.0]
    with pytest.raises(RuntimeError, match=r"'test_loss' reads the training loss.*Call step\(loss=loss\)"):
        optimizer.step()


def test_a_missing_loss_is_no_error_where_nothing_is_stepped():
    optimizer = RuleOptimizer(parameters([(3,)]), LossRule())
    assert optimizer.step(lambda: None) is None  # as Lightning calls it after training_step returned None


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(4, 2\) is torch.sparse_coo.*sparse=False"):
        RuleOptimizer(embedding.parameters(), star()).step()


def test_complex_parameters_are_refused_and_leave_no_group_behind():
    bad = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"shape \(2,\) is torch.complex64.*view_as_real"):
        RuleOptimizer([bad], star())
    optimizer = RuleOptimizer(parameters([(2,)]), star())
    with pytest.raises(ValueError, match="view_as_real"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 is not allowed: it must be a finite number >= 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"backend": "cuda"}, r"backend='cuda' is not allowed: use one of \['auto', 'reference', 'fused'\]"),
    ],
)
def test_bad_arguments_are_named_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        RuleOptimizer(parameters([(2,)]), star(), **arguments)
    assert "\n" not in str(caught.value)


def test_a_backend_that_is_missing_is_an_error_when_asked_for():
    with pytest.raises(ValueError, match="backend='fused'.*'test_adam'.*'reference'"):
        RuleOptimizer(parameters([(2,)]), AdamRule(), backend="fused")


def test_repr_shows_kind_and_backend():
    text = repr(RuleOptimizer(parameters([(2,)]), star(), lr=0.5, backend="reference"))
    for part in ("RuleOptimizer[kind='star', backend='reference', safeguard=False]", "lr: 0.5", "Parameter Group 0"):
        assert part in text


def test_replacing_meta_parameters_takes_effect_at_the_next_step():
    rule = star()
    param = parameters([(4, 3)])[0]
    optimizer = RuleOptimizer([param], rule)
    run(optimizer, 1)
    other = star(seed=9)
    for change in (
        lambda: rule.load_state_dict(other.state_dict()),
        lambda: setattr(rule, "w0", nn.Parameter(rule.w0.detach() + 1)),
        lambda: setattr(rule.w0, "data", rule.w0.detach() - 2),
    ):
        change()
        fresh = copy.deepcopy(optimizer)
        for each in (optimizer, fresh):
            run(each, 1, start=1)
        assert_equal(snapshot(optimizer), snapshot(fresh))


def test_lightning_does_not_take_it_for_a_wrapper_of_an_optimizer():
    assert not hasattr(RuleOptimizer(parameters([(3,)]), star()), "optimizer")  # LearningRateMonitor would unwrap it


def test_meta_parameters_are_in_no_group_and_follow_the_parameters_device():
    params = [nn.Parameter(torch.ones(3, device=device)) for device in ("cpu", "meta")]
    optimizer = RuleOptimizer(params, star())
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["params"] == [0, 1]
    assert {p.device.type for p in optimizer.rule.parameters()} == {"cpu"}


def test_the_rule_is_shared_and_not_trained():
    rule = lopt.rules.make("star")
    param = parameters([(3,)])[0]
    optimizer = RuleOptimizer([param], rule)
    run(optimizer, 1)
    assert optimizer.rule is rule
    assert all(p.grad is None for p in rule.parameters())
    assert not any(t.requires_grad for t in optimizer.state[param].values())


def test_replacing_keeps_the_step_hooks_of_the_user() -> None:
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    calls: list[str] = []
    adam.register_step_pre_hook(lambda *_: calls.append("pre"))
    adam.register_step_post_hook(lambda *_: calls.append("post"))
    lopt.RuleOptimizer.replacing(adam, lopt.rules.make("hyperparam")).step()
    assert calls == ["pre", "post"]
