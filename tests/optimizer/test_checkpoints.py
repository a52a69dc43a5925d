"""State dicts of RuleOptimizer: exact resume, float32 state of bfloat16 parameters, refusals that change nothing."""

import copy
import io

import pytest
import torch
from optimizer_cases import AdamRule, assert_equal, parameters, run, set_gradients, snapshot, star
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(optimizer, make):
    """A new optimizer over copies of the parameters, with the state of the first."""
    params = [torch.nn.Parameter(p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    other = make(params)
    other.load_state_dict(through_file(optimizer.state_dict()))
    return other


@pytest.mark.parametrize("safeguard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_resume_is_equal_to_the_bit(dtype, safeguard):
    def make(params):
        return RuleOptimizer(params, star(), lr=0.5, weight_decay=0.01, safeguard=safeguard)

    optimizer = make(parameters(dtype=dtype))
    run(optimizer, 3)
    other = resumed(optimizer, make)
    assert_equal(snapshot(optimizer), snapshot(other))
    for each in (optimizer, other):
        run(each, 5, start=3)
    assert_equal(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("kind", sorted(lopt.rules.REGISTRY))
def test_resume_is_equal_to_the_bit_for_every_kind(kind):
    rule = lopt.rules.make(kind)

    def make(params):
        return RuleOptimizer(params, rule, num_steps=8)

    optimizer = make(parameters(dtype=torch.bfloat16))
    run(optimizer, 4, loss=1.5)
    other = resumed(optimizer, make)
    for each in (optimizer, other):
        run(each, 4, start=4, loss=1.25)
    assert_equal(snapshot(optimizer), snapshot(other))


def test_state_is_flat_tensors_under_the_names_of_the_rules_state():
    params = parameters([(4, 3)])
    optimizer = RuleOptimizer(params, star())
    run(optimizer, 1)
    saved = optimizer.state_dict()
    assert list(saved["state"][0]) == ["step", *optimizer.rule.init_state(params[0])._fields]
    assert all(type(value) is torch.Tensor for value in saved["state"][0].values())
    expected = {
        "lr",
        "weight_decay",
        "maximize",
        "lopt_kind",
        "lopt_base_lr",
        "lopt_decay",
        "lopt_strength",
        "lopt_num_tensors",
        "lopt_roles",
        "lopt_steps",
        "params",
    }
    assert set(saved["param_groups"][0]) == expected


def test_loading_copies_and_leaves_the_saved_state_as_it_was():
    optimizer = RuleOptimizer(parameters([(4, 3)], torch.bfloat16), star())
    run(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other = RuleOptimizer(parameters([(4, 3)], torch.bfloat16), star())
    other.load_state_dict(saved)
    for name, value in saved["state"][0].items():
        assert other.state[other.param_groups[0]["params"][0]][name].data_ptr() != value.data_ptr() or not value.numel()
    run(other, 2)
    assert_equal(saved["state"][0].values(), kept["state"][0].values())
    assert saved["param_groups"] == kept["param_groups"]


@pytest.mark.parametrize(("saved_in", "loaded_in"), [(torch.float64, torch.float32), (torch.bfloat16, torch.float64)])
def test_state_is_brought_to_the_precision_of_other_parameters(saved_in, loaded_in):
    first = RuleOptimizer(parameters([(4, 3), (3,)], saved_in), star())
    run(first, 2)
    second = RuleOptimizer(parameters([(4, 3), (3,)], loaded_in), star())
    second.load_state_dict(first.state_dict())
    floats = [t for s in second.state.values() for k, t in s.items() if t.is_floating_point() and k != "step"]
    assert {t.dtype for t in floats} == {loaded_in}
    run(second, 1, start=2)


def test_before_the_first_step_there_is_no_state_to_load():
    optimizer = RuleOptimizer(parameters([(3,)]), star(), lr=0.5)
    other = RuleOptimizer(parameters([(3,)]), star())
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 0.5
    assert not other.state
    run(other, 1)


def test_parameters_without_state_stay_so():
    params = parameters([(3,), (4,), (0,)])
    optimizer = RuleOptimizer(params, star())
    set_gradients(params[:1], 0)
    optimizer.step()
    other = resumed(optimizer, lambda p: RuleOptimizer(p, star()))
    assert [bool(other.state.get(p)) for p in other.param_groups[0]["params"]] == [True, False, False]
    for each in (optimizer, other):
        run(each, 2, start=1)
    assert_equal(snapshot(optimizer), snapshot(other))


def test_scheduler_and_tensor_lr_resume_together():
    def make(params):
        optimizer = RuleOptimizer(params, star(), lr=torch.tensor(0.5))
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    first, schedule = make(parameters())
    run(first, 3, scheduler=schedule)
    second, other_schedule = make(parameters())
    for param, other in zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True):
        other.data.copy_(param.data)
    other_schedule.load_state_dict(through_file(schedule.state_dict()))
    second.load_state_dict(through_file(first.state_dict()))
    run(first, 4, start=3, scheduler=schedule)
    run(second, 4, start=3, scheduler=other_schedule)
    assert_equal(snapshot(first), snapshot(second))


def adamw_state():
    optimizer = torch.optim.AdamW(parameters([(4, 3), (3,)]))
    run(optimizer, 1)
    return optimizer.state_dict()


def changed(change):
    optimizer = RuleOptimizer(parameters([(4, 3), (3,)]), star())
    run(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    return saved


REFUSED = {
    "AdamW": (adamw_state, "state of another optimizer.*no 'lopt_kind'.*Load the model's weights alone"),
    "other kind": (
        lambda: changed(lambda s: s["param_groups"][0].update(lopt_kind="lstm")),
        r"rule of kind \['lstm'\], but this optimizer's rule is of kind 'star'",
    ),
    "other shape": (
        lambda: changed(lambda s: s["state"][0].update(exp_avg=torch.zeros(3, 4, 4))),
        r"State 'exp_avg' of parameter 0 of group 0 \(shape \(4, 3\)\) is of shape \(3, 4, 4\) in the checkpoint, but "
        r"must have shape \(3, 4, 3\)",
    ),
    "missing entry": (
        lambda: changed(lambda s: s["state"][1].pop("diag")),
        "State 'diag' of parameter 1.* is missing in the checkpoint",
    ),
    "no step": (lambda: changed(lambda s: s["state"][1].pop("step")), "State 'step' of parameter 1.* is missing"),
    "entry that is no tensor": (
        lambda: changed(lambda s: s["state"][1].update(exp_avg=[1.0, 2.0])),
        "State 'exp_avg' of parameter 1.* is missing",
    ),
    "fewer groups": (lambda: changed(lambda s: s["param_groups"].clear()), "different number of parameter groups"),
    "fewer parameters": (lambda: changed(lambda s: s["param_groups"][0]["params"].pop()), "doesn't match the size"),
    "no state dict": (lambda: {"weights": 1}, "not an optimizer's state dict"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_anything_changes(make, message):
    optimizer = RuleOptimizer(parameters([(4, 3), (3,)]), star(), lr=0.25)
    run(optimizer, 2)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.load_state_dict(make())
    assert "\n" not in str(caught.value)
    assert_equal(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_state_dict_hooks_run_in_torchs_order_and_can_change_what_is_saved_and_loaded():
    optimizer = RuleOptimizer(parameters([(4, 3)], torch.bfloat16), star())
    run(optimizer, 1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before save"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "note": "mine"})
    saved = optimizer.state_dict()
    assert seen == ["before save"]
    assert saved["note"] == "mine"

    def halve(o, loaded):
        state = {name: tensor / 2 if name == "exp_avg" else tensor for name, tensor in loaded["state"][0].items()}
        return {**loaded, "state": {0: state}}

    other = RuleOptimizer(parameters([(4, 3)], torch.bfloat16), star())
    (param,) = other.param_groups[0]["params"]
    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[param]["exp_avg"].dtype))
    other.load_state_dict(saved)
    assert seen[1:] == [torch.float32]
    assert torch.equal(other.state[param]["exp_avg"], saved["state"][0]["exp_avg"] / 2)


def test_a_hook_may_adapt_the_state_of_another_optimizer():
    optimizer = RuleOptimizer(parameters([(4, 3)]), AdamRule())

    def adapt(o, loaded):
        own = {"lopt_kind": "test_adam", "lopt_base_lr": 1.0, "lopt_decay": True, "lopt_strength": 1.0}
        return {**loaded, "param_groups": [{**group, **own} for group in loaded["param_groups"]]}

    theirs = torch.optim.Adam(parameters([(4, 3)]), lr=0.1)
    run(theirs, 2)
    optimizer.param_groups[0]["params"][0].data.copy_(theirs.param_groups[0]["params"][0].data)
    optimizer.register_load_state_dict_pre_hook(adapt)
    optimizer.load_state_dict(theirs.state_dict())
    for each in (optimizer, theirs):
        run(each, 3, start=2)
    torch.testing.assert_close(optimizer.param_groups[0]["params"][0], theirs.param_groups[0]["params"][0])


@pytest.mark.parametrize("lr", ["ignore", "scale"])
def test_distributed_checkpoint_reads_and_writes_the_state_without_moving_parameters(lr):
    models = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    adams = [torch.optim.Adam(model.parameters(), lr=0.5) for model in models]
    trained, fresh = (RuleOptimizer.replacing(adam, star(), lr=lr) for adam in adams)
    run(trained, 3)
    models[1].load_state_dict(models[0].state_dict())
    before = [p.detach().clone() for p in models[1].parameters()]
    set_optimizer_state_dict(models[1], fresh, get_optimizer_state_dict(models[0], trained))
    assert_equal([p.detach() for p in models[1].parameters()], before)
    assert fresh.param_groups[0]["lr"] == 0.5
    for optimizer in (trained, fresh):
        run(optimizer, 2, start=3)
    assert_equal(snapshot(trained), snapshot(fresh))
