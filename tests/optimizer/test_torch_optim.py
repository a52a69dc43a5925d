"""RuleOptimizer against outside truths: the same trajectories as torch.optim, under every torch scheduler."""

import math
import warnings

import pytest
import torch
from optimizer_cases import AdamRule, SGDRule, assert_close, parameters, run, set_gradients, star
from torch.optim import lr_scheduler as schedulers

from lightning_lopt import RuleOptimizer

SCHEDULES = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LambdaLR from 0": lambda o: schedulers.LambdaLR(o, lambda step: min(1.0, step / 5)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.2, total_steps=20, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=2),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.CosineAnnealingLR(o, 6)], [4]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 4), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
}


def twins(dtype=torch.float64):
    shapes = [(4, 3), (5,), (), (2, 3, 3, 3)]
    return parameters(shapes, dtype), parameters(shapes, dtype)


def test_the_table_holds_every_scheduler_of_torch():
    names = {name for name in schedulers.__all__ if name not in ("LRScheduler",)}
    assert names <= {name.split()[0] for name in SCHEDULES}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_lr_is_driven_by_every_scheduler_as_sgds_is(make):
    ours, theirs = twins()
    pair = RuleOptimizer(ours, SGDRule(), lr=0.1), torch.optim.SGD(theirs, lr=0.1)
    for optimizer in pair:
        run(optimizer, 12, scheduler=make(optimizer))
    assert pair[0].param_groups[0]["lr"] == pair[1].param_groups[0]["lr"]
    assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_schedulers_that_drive_a_tensor_lr(make):
    ours, theirs = twins()
    lrs = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    pair = RuleOptimizer(ours, SGDRule(), lr=lrs[0]), torch.optim.SGD(theirs, lr=lrs[1])
    for optimizer in pair:
        run(optimizer, 8, scheduler=make(optimizer))
    assert_close(ours, theirs, 1e-12)


def test_a_scheduler_stepped_first_is_warned_of_as_in_torch():
    optimizer = RuleOptimizer(parameters([(3,)]), SGDRule())
    scheduler = schedulers.StepLR(optimizer, 3)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)"):
        scheduler.step()


def test_cycling_momentum_is_refused_by_torch_where_there_is_none():
    optimizer = RuleOptimizer(parameters([(3,)]), SGDRule())
    with pytest.raises(ValueError, match="must support momentum"):
        schedulers.OneCycleLR(optimizer, 0.2, total_steps=20)


@pytest.mark.parametrize(
    ("rule", "twin", "options"),
    [
        (SGDRule, torch.optim.SGD, {}),
        (SGDRule, torch.optim.SGD, {"maximize": True}),
        (AdamRule, torch.optim.Adam, {}),
        (AdamRule, torch.optim.Adam, {"maximize": True}),
        (AdamRule, torch.optim.AdamW, {"weight_decay": 0.1}),
        (AdamRule, torch.optim.AdamW, {"weight_decay": 0.1, "maximize": True}),
    ],
)
@pytest.mark.parametrize("safeguard", [False, True])
def test_same_trajectory_as_torch_optim(rule, twin, options, safeguard):
    ours, theirs = twins()
    pair = RuleOptimizer(ours, rule(), lr=0.05, safeguard=safeguard, **options), twin(theirs, lr=0.05, **options)
    for optimizer in pair:
        run(optimizer, 30, scheduler=schedulers.CosineAnnealingLR(optimizer, 30))
    assert_close(ours, theirs, 1e-9)


def test_groups_as_torch_optim_has_them():
    ours, theirs = twins()
    options = [{"lr": 0.1, "weight_decay": 0.0}, {"weight_decay": 0.2}, {"maximize": True}, {"lr": 0.0}]

    def groups(params):
        return [{"params": [p], **extra} for p, extra in zip(params, options, strict=True)]

    pair = (
        RuleOptimizer(groups(ours), AdamRule(), lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(groups(theirs), lr=0.01, weight_decay=0.1),
    )
    for optimizer in pair:
        run(optimizer, 10)
    assert_close(ours, theirs, 1e-9)


def test_float32_stays_within_rounding_of_torch_optim():
    ours, theirs = twins(torch.float32)
    for optimizer in (RuleOptimizer(ours, AdamRule(), lr=0.01), torch.optim.Adam(theirs, lr=0.01)):
        run(optimizer, 50)
    assert_close(ours, theirs, 1e-5)


def test_stars_nominal_term_alone_is_sgd():
    ours, theirs = twins()
    rule = star(nominal_grad_estimator="SGD", nominal_stepsize=0.05, step_mult=0.0, nominal_controller=False)
    # With the controller off the authors' code multiplies the nominal term by exp(exp_mult).
    pair = RuleOptimizer(ours, rule), torch.optim.SGD(theirs, lr=0.05 * math.exp(1e-3))
    for optimizer in pair:
        run(optimizer, 20)
    assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_star_trains_what_torch_optim_trains(kind):
    torch.manual_seed(0)
    inputs = torch.randn(64, 4)
    targets = inputs @ torch.randn(4, 1)
    model = torch.nn.Linear(4, 1)
    rule = star(nominal_grad_estimator="AdamAggMo")
    optimizer = RuleOptimizer.replacing(kind(model.parameters(), lr=0.1), rule)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


TORCH_OPTIMIZERS = sorted(
    (
        cls
        for cls in vars(torch.optim).values()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    ),
    key=lambda cls: cls.__name__,
)


@pytest.mark.parametrize("cls", TORCH_OPTIMIZERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("lr", ["ignore", "scale"])
def test_every_torch_optimizer_can_be_replaced(cls, lr):
    params = parameters([(4, 3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = cls(params)
    ours = RuleOptimizer.replacing(theirs, star(), lr=lr, weight_decay="decoupled")
    group, old = ours.param_groups[0], theirs.param_groups[0]
    kept = {k: v for k, v in old.items() if k not in ("foreach", "fused", "capturable", "differentiable", "params")}
    assert {k: group[k] for k in kept} == kept
    assert not {"foreach", "fused", "capturable"} & set(group)
    assert group["lopt_kind"] == "star"
    assert {k: ours.defaults[k] for k in kept if k in theirs.defaults} == {
        k: kept[k] for k in kept if k in theirs.defaults
    }
    before = params[0].detach().clone()
    run(ours, 1)
    assert not torch.equal(params[0], before)


def test_replacing_keeps_names_groups_and_the_old_optimizer():
    module = torch.nn.Linear(2, 2)
    theirs = torch.optim.AdamW(
        [
            {"params": [("weight", module.weight)], "lr": 0.1, "note": "mine"},
            {"params": [("bias", module.bias)], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    ours = RuleOptimizer.replacing(theirs, star())
    ours.param_groups[0]["lr"] = 7.0
    assert [group["param_names"] for group in ours.param_groups] == [["weight"], ["bias"]]
    assert ours.param_groups[0]["note"] == "mine"
    assert [group["weight_decay"] for group in ours.param_groups] == [0.01, 0.0]
    assert theirs.param_groups[0]["lr"] == 0.1
    assert "lopt_kind" not in theirs.param_groups[0]


def one_step_change(optimizer):
    (param,) = optimizer.param_groups[0]["params"]
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    optimizer.step()
    return (param.detach() - before)[0].item()


@pytest.mark.parametrize(
    ("lr", "weight_decay", "expected"),
    [
        ("ignore", "ignore", -1.0),
        ("scale", "ignore", -0.5),
        ("ignore", "decoupled", -1.0 - 0.05 * 0.1 * 2.0),  # as AdamW: the group's lr times decay times value
        ("scale", "decoupled", -0.5 - 0.05 * 0.1 * 2.0),
    ],
)
def test_policies_of_lr_and_weight_decay(lr, weight_decay, expected):
    param = torch.nn.Parameter(torch.full((3,), 2.0))
    theirs = torch.optim.AdamW([param], lr=0.1, weight_decay=0.1)
    ours = RuleOptimizer.replacing(theirs, SGDRule(), lr=lr, weight_decay=weight_decay)
    ours.param_groups[0]["lr"] = 0.05  # half the reference, as a schedule has it
    assert one_step_change(ours) == pytest.approx(expected, rel=1e-6)


def test_scale_takes_the_largest_initial_lr_as_reference_for_all_groups():
    params = parameters([(3,), (3,)])
    theirs = torch.optim.SGD([{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.4}])
    schedulers.LinearLR(theirs, 0.5)  # lr is halved now, initial_lr is what it was
    ours = RuleOptimizer.replacing(theirs, SGDRule(), lr="scale")
    assert [group["lopt_base_lr"] for group in ours.param_groups] == [0.4, 0.4]
    set_gradients(params, 0)
    before = [p.detach().clone() for p in params]
    ours.step()
    changes = [(p.detach() - b) / -p.grad for p, b in zip(params, before, strict=True)]
    assert_close(changes, [torch.full((3,), 0.125), torch.full((3,), 0.5)], 1e-4)


def test_scale_under_one_cycle_refers_to_max_lr():
    theirs = torch.optim.AdamW(parameters([(3,)]), lr=1e-3)
    schedulers.OneCycleLR(theirs, max_lr=0.1, total_steps=20)
    assert RuleOptimizer.replacing(theirs, SGDRule(), lr="scale").param_groups[0]["lopt_base_lr"] == 0.1


def test_a_given_reference_lr_takes_the_place_of_the_initial_lr():
    param = torch.nn.Parameter(torch.ones(3))
    theirs = torch.optim.SGD([param], lr=0.1)
    ours = RuleOptimizer.replacing(theirs, SGDRule(), lr="scale", reference_lr=0.4)
    assert one_step_change(ours) == pytest.approx(-0.25)


def test_changing_initial_lr_later_does_not_move_the_reference():
    param = torch.nn.Parameter(torch.ones(3))
    ours = RuleOptimizer.replacing(torch.optim.SGD([param], lr=0.1), SGDRule(), lr="scale")
    ours.param_groups[0].update(initial_lr=0.001, lr=0.2)  # as the learning-rate finder and SWA do
    assert one_step_change(ours) == pytest.approx(-2.0)


@pytest.mark.parametrize("maximize", [False, True])
def test_maximize_of_the_replaced_optimizer_is_honored(maximize):
    theirs = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], maximize=maximize)
    change = one_step_change(RuleOptimizer.replacing(theirs, SGDRule()))
    assert change == pytest.approx(1.0 if maximize else -1.0)


def test_ignored_lr_of_zero_does_not_stop_the_first_step():
    param = torch.nn.Parameter(torch.ones(3))
    theirs = torch.optim.SGD([param], lr=0.1)
    schedulers.LambdaLR(theirs, lambda step: step / 10)  # a warmup that starts at lr 0
    assert one_step_change(RuleOptimizer.replacing(theirs, SGDRule())) == pytest.approx(-1.0)


def test_group_added_after_replacing_has_the_users_defaults():
    first, second = parameters([(3,), (3,)])
    theirs = torch.optim.AdamW([first], lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    ours = RuleOptimizer.replacing(theirs, SGDRule(), lr="scale", weight_decay="decoupled")
    ours.add_param_group({"params": [second]})
    old, new = ({k: v for k, v in group.items() if k != "params"} for group in ours.param_groups)
    assert new == old
