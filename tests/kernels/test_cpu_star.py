"""The C++ kernel is the rule: the same steps but for rounding, in every configuration, shape, layout and dtype."""

import copy
import math
import warnings

import pytest
import torch
from optimizer_cases import AdamRule, assert_equal, parameters, run, set_gradients, snapshot, star
from torch import nn

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.kernels.cpu import star as cpu

STEPS = 50
# Fewer, equally many and more coordinates than lanes, chunks and blocks; inner dims that fit into lanes and do not.
SHAPES = [(), (5,), (700,), (1, 1), (4, 3), (17, 33), (130, 257), (300, 200), (2, 3, 3, 3), (16, 3, 3, 3), (3, 40, 7)]
SHAPES += [(20, 32, 3, 3), (7, 30, 2, 10), (9, 12, 5, 5), (30, 25, 20), (1, 70000)]
CONFIGS = {
    "paper": {},
    "large steps of the network": {"step_mult": 0.1, "exp_mult": (0.5, 0.5, 0.5)},
    "SGD": {"nominal_grad_estimator": "SGD", "nominal_controller": False},
    "SGDM": {"nominal_grad_estimator": "SGDM", "exp_mult": (0.1, 0.3, 0.2)},
    "AggMo": {"nominal_grad_estimator": "AggMo", "normalize_blackbox": False},
    "Adam": {"nominal_grad_estimator": "Adam", "selfnormalize_blackbox": True, "step_mult": 1.0},
    "decay": {"weight_decay": 0.01},
    "controlled decay": {"weight_decay": 0.01, "regularization_controller": True, "exp_mult": (0.1, 0.1, 2.0)},
    "one magnitude a tensor": {
        "aggregate_magnitude": True,
        "aggregate_nom_magnitude": True,
        "exp_mult": (2.0, 2.0, 1.0),
    },
    "no network": {"step_mult": 0.0, "nominal_controller": False, "weight_decay": 0.1},
    "network alone": {"nominal_stepsize": 0.0, "step_mult": 0.1},
    "scheduler": {"scheduler": True, "step_mult": 0.1},
    "eps": {"eps": 1e-10},
    "scheduler without network": {"scheduler": True, "step_mult": 0.0, "nominal_controller": False},
    "scheduler, SGDM": {"scheduler": True, "nominal_grad_estimator": "SGDM"},
    "decays": {"initial_momentum_decays": (0.1, 0.5, 0.9), "initial_rms_decays": (0.5,)},
    "another network": {"hidden_size": 7, "hidden_layers": 3, "step_mult": 0.1},
}


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    if why := cpu.supports(star()):
        pytest.skip(why)


def rule_of(config):
    rule = star(**config)
    with torch.no_grad():
        for name, value in rule.named_parameters():  # those that start at zero
            if name.startswith(("schedule", "tensor", "momentum_mix", "b")):
                value.copy_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
            if name == "centering":
                value.copy_(torch.tensor([0.9, 0.5]))
            if name == "caution":
                value.copy_(torch.tensor([0.9, 0.3]))
            if name.endswith("decays"):
                value.add_(0.01)
            if name == "growth":
                value.copy_(torch.tensor([-0.9, 0.5]))
    return rule


def both(make_params, rule, steps=STEPS, scale=1.0, **options):
    """The reference's optimizer and the kernel's after the same steps."""
    pair = []
    for backend in ("reference", "fused"):
        optimizer = RuleOptimizer(make_params(), rule, backend=backend, **options)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for step in range(steps):
            set_gradients(params, step, scale)
            optimizer.step()
        pair.append(optimizer)
    return pair


def assert_same(reference, fused, tolerance=1e-5):
    """Parameters and states, relative to the largest number of each."""
    assert (reference.backend, fused.backend) == ("reference", "fused")
    for a, b in zip(snapshot(reference), snapshot(fused), strict=True):
        assert a.dtype == b.dtype
        size = a.double().abs().max().item() if a.numel() else 0.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * max(size, 1e-6))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_configuration(config):
    shapes, steps = (SHAPES, STEPS) if not config else (SHAPES[3:10], 20)
    assert_same(*both(lambda: parameters(shapes), rule_of(config), steps, num_steps=15, safeguard=True))


@pytest.mark.parametrize(
    "config", [CONFIGS["scheduler"], CONFIGS["scheduler without network"]], ids=["network", "none"]
)
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_with_means_and_zeros_are_centered(config, maximize):
    """Rows from one number to 70,000, and dims before the factored ones; in quarters, as signs of what cancels to 1e-7
    of it are the rounding's."""
    pair = []
    for backend in ("reference", "fused"):
        params = parameters(SHAPES)
        optimizer = RuleOptimizer(params, rule_of(config), backend=backend, num_steps=9, maximize=maximize)
        for step in range(4):
            set_gradients(params, step)
            for param in params:
                there = torch.rand(param.shape, generator=torch.Generator().manual_seed(step)) > 0.3
                param.grad.mul_(4).round_().div_(4).add_(2).mul_(there)
            optimizer.step()
        pair.append(optimizer)
    assert_same(*pair)


@pytest.mark.parametrize("config", [{}, {"step_mult": 0.1}], ids=str)
def test_two_heads(config):
    rule = lopt.rules.make("blackbox", **config)
    assert_same(*both(lambda: parameters(SHAPES[:10]), rule, 20, num_steps=15))


def test_the_kernels_estimators_are_the_rules():
    grad, exp_avg, root = torch.randn(5), torch.randn(3, 5), torch.rand(5)
    assert set(cpu.DIRECTIONS) == set(lopt.rules.nominal.ESTIMATORS)
    for name, (weights, by_root) in cpu.DIRECTIONS.items():
        direction = torch.tensor(weights) @ torch.stack([grad, *exp_avg]) * (root if by_root else 1)
        torch.testing.assert_close(direction, lopt.rules.nominal.nominal_direction(name, grad, exp_avg, root))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
def test_low_precision_parameters_have_float32_state(dtype, tolerance):
    # One rounding in other direction is a step of the parameter's grid, and is forgotten in the state.
    reference, fused = both(lambda: parameters(SHAPES[:10], dtype), rule_of({}))
    assert_same(reference, fused, tolerance)
    assert {t.dtype for p in fused.state for t in fused.state[p].values()} == {torch.float32, torch.int64}


def layouts():
    conv, matrix = (p.detach() for p in parameters([(8, 5, 3, 3), (40, 30)]))
    return [
        nn.Parameter(conv.clone().to(memory_format=torch.channels_last)),
        nn.Parameter(matrix.clone().t()),
        nn.Parameter(matrix.clone()[:, ::2]),
    ]


def test_memory_layouts_are_kept():
    reference, fused = both(layouts, rule_of({}), safeguard=True)
    assert_same(reference, fused)
    strides = [p.stride() for p in layouts()]
    for optimizer in (reference, fused):
        assert [p.stride() for p in optimizer.state] == strides


def test_expanded_gradients():
    pair = []
    for backend in ("reference", "fused"):
        (param,) = parameters([(4, 6)])
        param.grad = torch.arange(6.0).expand(4, 6)
        optimizer = RuleOptimizer([param], star(), backend=backend)
        optimizer.step()
        pair.append(optimizer)
    assert_same(*pair)


def test_three_hundred_tensors_in_groups():
    def make():
        params = parameters([(3 + i % 7, 2 + i % 5) if i % 3 else (1 + i % 40,) for i in range(300)])
        return [
            {"params": params[:100], "lr": 0.5, "weight_decay": 0.1},
            {"params": params[100:200], "lr": torch.tensor(2.0), "maximize": True},
            {"params": params[200:]},
        ]

    assert_same(*both(make, rule_of({}), steps=10))


def test_decay_as_the_users_optimizer_has_it():
    pair = []
    for backend in ("reference", "fused"):
        adam = torch.optim.AdamW(parameters([(4, 3), (5,)]), lr=0.1, weight_decay=0.2)
        optimizer = RuleOptimizer.replacing(adam, star(), lr="scale", weight_decay="decoupled", backend=backend)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        run(optimizer, 10, scheduler=scheduler)
        pair.append(optimizer)
    assert_same(*pair)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e6, 1e12], ids=str)
def test_gradients_of_every_size(scale):
    reference, fused = both(lambda: parameters(SHAPES[:10]), rule_of({}), steps=10, scale=scale, safeguard=True)
    assert reference.num_skipped() == fused.num_skipped() == 0
    assert_same(reference, fused, 1e-4)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_does_not_matter(threads):
    def stepped():
        optimizer = RuleOptimizer(
            parameters([(300, 400), (40,), (3, 50000)]), star(aggregate_magnitude=True), safeguard=True
        )
        run(optimizer, 3)
        return snapshot(optimizer)

    one = stepped()
    torch.set_num_threads(threads)
    try:
        assert_equal(one, stepped())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("first", ["reference", "fused"])
def test_state_dicts_go_from_one_backend_to_the_other(first):
    params, rule = parameters(SHAPES[:10]), star()
    optimizer = RuleOptimizer(params, rule, backend=first)
    run(optimizer, 5)
    for _ in range(2):
        other = RuleOptimizer(params, rule, backend="fused" if optimizer.backend == "reference" else "reference")
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(other, 5, start=5)
        optimizer = other
    alone = RuleOptimizer(parameters(SHAPES[:10]), rule, backend=first)
    run(alone, 5)
    run(alone, 5, start=5)
    run(alone, 5, start=5)
    for a, b in zip(snapshot(alone), snapshot(optimizer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_moved_memory_is_found():
    params = parameters([(40, 30), (5,)])
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, twin = RuleOptimizer(params, star()), RuleOptimizer(twins, star())
    run(optimizer, 2)
    params[0].data = params[0].detach().clone()
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].clone()
    state["exp_avg_sq"].data = state["exp_avg_sq"].detach().double()  # as if loaded by other means
    state["row"] = state["row"].t().contiguous().t()
    run(optimizer, 2, start=2)
    run(twin, 4)
    assert_equal(snapshot(optimizer), snapshot(twin))


def test_autograd_notices_that_a_parameter_has_changed():
    (param,) = parameters([(4, 3)])
    optimizer = RuleOptimizer([param], star(), backend="fused")
    loss = param.square().sum()
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("share", ["reference", "fused"])
def test_measurements_are_those_of_the_rule(share):
    rule = star(weight_decay=0.01, step_mult=0.1)
    measured = []
    for backend in ("reference", share):
        params = parameters(SHAPES[:10])
        optimizer = RuleOptimizer(params, rule, backend=backend, safeguard=True)
        run(optimizer, 2)
        set_gradients(params, 2)
        params[5].grad[0] = math.nan
        optimizer.measure_next_step()
        optimizer.step()
        measured.append(optimizer.take_metrics())
    for name in ("update_rms", "nominal_share"):
        torch.testing.assert_close(*(getattr(each, name) for each in measured), rtol=1e-4, atol=0)
    assert [int(each.skipped) for each in measured] == [1, 1]


LIMITS = {torch.float32: 3.4028234e38, torch.bfloat16: 3.3895e38, torch.float16: 65504.0}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 40000)], ids=str)
def test_values_at_the_end_of_the_range_are_skipped_as_the_reference_does(dtype, shape):
    results = []
    for backend in ("reference", "fused"):
        param = nn.Parameter(torch.ones(shape, dtype=dtype))
        with torch.no_grad():
            param[..., -1] = LIMITS[dtype]
        param.grad = -torch.ones_like(param)
        optimizer = RuleOptimizer(
            [param], star(nominal_stepsize=1.0, step_mult=0.0), lr=LIMITS[dtype] / 50, safeguard=True, backend=backend
        )
        before = param.detach().clone()
        optimizer.step()
        assert torch.equal(param, before)
        results.append(snapshot(optimizer))
    assert_equal(results[0], results[1])
    assert optimizer.num_skipped() == 1


def test_large_magnitudes_are_looked_at_and_pass():
    # exp of up to +-40: no bound proves such steps finite, and they are.
    assert_same(
        *both(lambda: parameters([(30, 20)]), rule_of({"exp_mult": (3.0, 3.0, 3.0)}), steps=5, safeguard=True), 1e-3
    )


def test_float64_takes_the_rule_beside_the_kernel():
    pair = []
    for backend in ("reference", "auto"):
        params = [*parameters([(4, 3)], torch.float64), *parameters([(4, 3)])]
        optimizer = RuleOptimizer(params, star(), backend=backend)
        run(optimizer, 5)
        pair.append(optimizer)
    assert pair[1].backend == "fused"
    assert torch.equal(*(o.param_groups[0]["params"][0] for o in pair))  # the float64 one, to the bit
    for a, b in zip(*map(snapshot, pair), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_the_kernel_does_not_take_is_an_error_when_it_is_asked_for():
    with pytest.raises(ValueError, match=r"'fused' is missing for parameter 0 of group 0 .*float64.*'reference'"):
        RuleOptimizer(parameters([(3,)], torch.float64), star(), backend="fused")
    with pytest.raises(ValueError, match="up to 64 units, this one has 100"):
        RuleOptimizer(parameters([(3,)]), star(hidden_size=100), backend="fused")

    class Mine(lopt.rules.STAR):
        pass

    with pytest.raises(ValueError, match="Mine is not the class"):
        RuleOptimizer(parameters([(3,)]), Mine(kind="star"), backend="fused")


def test_auto_is_quiet_where_no_kernel_was_ever_written():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = RuleOptimizer(parameters([(3,)]), AdamRule())
        run(optimizer, 1)
    assert optimizer.backend == "reference"
