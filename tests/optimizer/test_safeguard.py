"""The safeguard: nothing non-finite reaches a parameter or its state, and the watch costs no waiting. StepMetrics."""

import copy
import math

import pytest
import torch
from optimizer_cases import (
    SHAPES,
    AdamRule,
    LossRule,
    SGDRule,
    assert_equal,
    parameters,
    run,
    set_gradients,
    snapshot,
    star,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lopt import RuleOptimizer
from lightning_lopt.optimizer.safeguard import CHECK_EVERY, SKIP_LIMIT

FAULTS = {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf, "overflows_when_squared": 1e30}
COUNTERS = ("skipped", "skipped_in_row")


def poison(param, fault):
    param.grad = param.grad.clone()
    param.grad.view(-1)[-1] = fault


def without_counters(optimizer):
    state = [{k: v for k, v in s.items() if k not in COUNTERS} for s in optimizer.state.values()]
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return [t.clone() for t in (*params, *(v for s in state for v in s.values()))]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("shape", [s for name, s in SHAPES.items() if name != "empty"], ids=str)
def test_a_bad_step_changes_nothing_and_leaves_no_trace(shape, fault):
    params = parameters([shape])
    optimizer = RuleOptimizer(params, star(), safeguard=True)
    run(optimizer, 2)
    before, untroubled = without_counters(optimizer), copy.deepcopy(optimizer)
    set_gradients(params, 50)
    poison(params[0], fault)
    optimizer.step()
    assert_equal(without_counters(optimizer), before)
    for each in (optimizer, untroubled):
        run(each, 3, start=2)
    assert_equal(without_counters(optimizer), without_counters(untroubled))
    assert optimizer.num_skipped() == 1


@pytest.mark.parametrize("fault", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_bad_first_step_in_other_dtypes(dtype, fault):
    params = parameters([(4, 3)], dtype)
    before = params[0].detach().clone()
    optimizer = RuleOptimizer(params, star(), safeguard=True)
    set_gradients(params, 0)
    poison(params[0], fault)
    optimizer.step()
    assert torch.equal(params[0], before)
    assert all(torch.isfinite(t).all() for t in optimizer.state[params[0]].values())
    assert optimizer.state[params[0]]["step"] == 0


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 6.5e4), (torch.bfloat16, 3.3e38)], ids=str)
def test_a_value_that_overflows_its_dtype_is_not_written(dtype, limit):
    param = torch.nn.Parameter(torch.full((3,), limit, dtype=dtype))
    before = param.detach().clone()
    for safeguard in (True, False):
        optimizer = RuleOptimizer([param], SGDRule(), lr=limit / 10, safeguard=safeguard)
        param.grad = torch.full_like(param, -3.0)
        optimizer.step()
        assert torch.equal(param, before) == safeguard
    assert torch.isinf(param).all()


def test_only_the_tensor_at_fault_is_skipped():
    params, twins = parameters([(3,), (4, 3), ()]), parameters([(3,), (4, 3), ()])
    optimizer, untroubled = (RuleOptimizer(p, star(), safeguard=True) for p in (params, twins))
    set_gradients(params, 0)
    set_gradients(twins, 0)
    poison(params[1], math.nan)
    before = params[1].detach().clone()
    optimizer.step()
    untroubled.step()
    assert torch.equal(params[1], before)
    assert_equal([params[0].detach(), params[2].detach()], [twins[0].detach(), twins[2].detach()])
    assert [optimizer.state[p]["skipped"].item() for p in params] == [0, 1, 0]
    assert [optimizer.state[p]["step"].item() for p in params] == [1, 0, 1]


def test_the_same_numbers_with_and_without_where_all_is_well():
    pair = [RuleOptimizer(parameters(), star(), safeguard=safeguard) for safeguard in (False, True)]
    for optimizer in pair:
        run(optimizer, 5)
    assert_equal(without_counters(pair[0]), without_counters(pair[1]))


def test_without_the_safeguard_bad_steps_pass():
    params = parameters([(3,)])
    optimizer = RuleOptimizer(params, star())
    set_gradients(params, 0)
    poison(params[0], math.nan)
    optimizer.step()
    assert torch.isnan(params[0]).any()
    assert not set(COUNTERS) & set(optimizer.state[params[0]])
    assert optimizer.num_skipped() == 0


def test_large_but_finite_gradients_are_not_skipped():
    params = parameters([(40, 30), (30,)])
    optimizer = RuleOptimizer(params, star(), safeguard=True)
    for step in range(5):
        set_gradients(params, step, scale=1e12)
        optimizer.step()
    assert optimizer.num_skipped() == 0


def test_a_loss_that_is_not_finite_is_caught_with_the_update_that_it_spoils():
    params = parameters([(3,)])
    before = params[0].detach().clone()
    optimizer = RuleOptimizer(params, LossRule(), safeguard=True)
    run(optimizer, 2, loss=math.nan)
    assert torch.equal(params[0], before)
    assert optimizer.num_skipped() == 2


def spoil(optimizer, param, steps):
    for step in range(steps):
        set_gradients([param], step)
        poison(param, math.nan)
        optimizer.step()


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="optimizers take names from torch 2.6 on")
def test_a_run_of_bad_steps_stops_with_the_parameters_name():
    module = torch.nn.Linear(3, 2)
    before = module.weight.detach().clone()
    optimizer = RuleOptimizer(module.named_parameters(), star(), safeguard=True)
    spoil(optimizer, module.weight, SKIP_LIMIT - 1)
    message = rf"of parameter weight \(shape \(2, 3\)\) was not finite in {SKIP_LIMIT} steps in a row.*safeguard=False"
    with pytest.raises(RuntimeError, match=message) as caught:
        spoil(optimizer, module.weight, 1)
    assert "\n" not in str(caught.value)
    assert torch.equal(module.weight, before)


def test_the_parameter_at_fault_is_named_by_number_where_it_has_no_name():
    params = parameters([(3,), (3,), (4,)])
    optimizer = RuleOptimizer([{"params": params[:1]}, {"params": params[1:]}], star(), safeguard=True)
    with pytest.raises(RuntimeError, match=r"of parameter 1 of group 1 \(shape \(4,\)\)"):
        spoil(optimizer, params[2], SKIP_LIMIT)


def test_one_good_step_starts_the_count_of_a_run_again():
    params = parameters([(3,)])
    optimizer = RuleOptimizer(params, star(), safeguard=True)
    for _ in range(3):
        spoil(optimizer, params[0], SKIP_LIMIT - 1)
        run(optimizer, 1)
    assert optimizer.num_skipped() == 3 * (SKIP_LIMIT - 1)
    assert optimizer.state[params[0]]["skipped_in_row"] == 0


def test_counters_go_through_a_checkpoint_and_between_settings():
    params = parameters([(3,)])
    optimizer = RuleOptimizer(params, star(), safeguard=True)
    spoil(optimizer, params[0], 3)
    saved = optimizer.state_dict()
    same = RuleOptimizer(parameters([(3,)]), star(), safeguard=True)
    same.load_state_dict(saved)
    assert same.num_skipped() == 3
    spoil(same, same.param_groups[0]["params"][0], 1)
    assert same.num_skipped() == 4
    unguarded = RuleOptimizer(parameters([(3,)]), star())
    unguarded.load_state_dict(saved)
    run(unguarded, 1)
    guarded = RuleOptimizer(parameters([(3,)]), star(), safeguard=True)
    plain = RuleOptimizer(parameters([(3,)]), star())
    run(plain, 1)
    guarded.load_state_dict(plain.state_dict())
    spoil(guarded, guarded.param_groups[0]["params"][0], 1)
    assert guarded.num_skipped() == 1


class Waits(TorchDispatchMode):
    """Counts reads of a tensor's value, each of which would wait for the device.

    Those of a rule's own parameters do not count: wherever the trained ones are, a rule lies on the CPU.
    """

    def __init__(self, rule):
        super().__init__()
        self.count = 0
        self.own = {param.data_ptr() for param in rule.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        self.count += reads and args[0].data_ptr() not in self.own
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_no_step_reads_a_value_but_one_in_ten(lr):
    params = parameters()
    # The CPU's kernel, which has nothing to wait for, reads the lr.
    optimizer = RuleOptimizer(params, star(), lr=lr, weight_decay=0.1, safeguard=True, backend="reference")
    run(optimizer, 1)  # creates state
    counts = []
    for step in range(1, 2 * CHECK_EVERY):
        set_gradients(params, step)
        with Waits(optimizer.rule) as waits:
            optimizer.step()
        counts.append(waits.count)
    assert counts.pop(CHECK_EVERY - 2) > 0
    assert set(counts[: CHECK_EVERY - 2]) == {0}
    assert sum(counts[: 2 * CHECK_EVERY - 3]) <= 2  # the look at step 20: not a read for every tensor


@pytest.mark.parametrize("safeguard", [False, True])
def test_several_devices_in_one_optimizer(safeguard):
    # The meta device stands for an accelerator: it refuses to be mixed with the CPU, and has no value to wait for.
    params = [
        torch.nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        for shape in ((), (3,), (4, 3))
        for device in ("meta", "cpu")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    optimizer = RuleOptimizer(params, star(), weight_decay=0.1, safeguard=safeguard)
    for _ in range(CHECK_EVERY - 1):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.measure_next_step()
        optimizer.step()
    for param in params:
        assert {t.device for t in optimizer.state[param].values()} == {param.device}
    measured = optimizer.take_metrics()
    assert measured.update_rms.device == measured.nominal_share.device == params[0].device


def test_a_loss_is_brought_to_each_parameters_device_and_dtype():
    seen = []

    class Watching(SGDRule):
        needs_loss = True

        def update(self, meta_params, grad, state, param, context):
            seen.append((context.loss.device.type, context.loss.dtype))
            return -grad * context.loss, state

    params = [torch.nn.Parameter(torch.ones(3, device=device, dtype=torch.bfloat16)) for device in ("meta", "cpu")]
    for param in params:
        param.grad = torch.ones_like(param)
    RuleOptimizer(params, Watching()).step(loss=torch.ones((), dtype=torch.float64))
    assert seen == [("meta", torch.float32), ("cpu", torch.float32)]


def test_state_follows_a_step_counter_left_on_another_device():
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    param.grad = torch.ones_like(param)
    optimizer = RuleOptimizer([param], AdamRule())
    optimizer.step()
    optimizer.state[param]["step"] = torch.ones(())  # as Lightning and torch leave it
    optimizer.step()
    assert optimizer.state[param]["step"].device.type == "meta"


@pytest.mark.parametrize("safeguard", [False, True])
def test_measurements(safeguard):
    params = parameters([(4, 3), (5,)])
    optimizer = RuleOptimizer(params, star(), safeguard=safeguard)
    run(optimizer, 2)
    assert optimizer.take_metrics() is None
    before = [p.detach().clone() for p in params]
    optimizer.measure_next_step()
    run(optimizer, 1, start=2)
    measured = optimizer.take_metrics()
    change = torch.cat([(p.detach() - b).flatten() for p, b in zip(params, before, strict=True)])
    assert measured.update_rms.item() == pytest.approx(change.square().mean().sqrt().item(), rel=1e-5)
    assert 0 < measured.nominal_share < 1
    assert measured.skipped == 0
    assert optimizer.take_metrics() is None
    run(optimizer, 1, start=3)
    assert optimizer.take_metrics() is None


def test_measuring_changes_nothing():
    pair = [RuleOptimizer(parameters(), star(), safeguard=True) for _ in range(2)]
    pair[0].measure_next_step()
    for optimizer in pair:
        run(optimizer, 2)
    assert_equal(snapshot(pair[0]), snapshot(pair[1]))


@pytest.mark.parametrize("config", [{"step_mult": 0.0}, {"nominal_stepsize": 0.0}], ids=["nominal", "blackbox"])
def test_rules_with_one_term_have_no_nominal_share(config):
    optimizer = RuleOptimizer(parameters([(4, 3)]), star(**config))
    optimizer.measure_next_step()
    run(optimizer, 1)
    assert optimizer.take_metrics().nominal_share is None


def test_a_skipped_tensor_does_not_spoil_the_measurements():
    params = parameters([(4, 3), (5,)])
    optimizer = RuleOptimizer(params, star(), safeguard=True)
    set_gradients(params, 0)
    poison(params[0], math.nan)
    optimizer.measure_next_step()
    optimizer.step()
    measured = optimizer.take_metrics()
    assert torch.isfinite(measured.update_rms)
    assert 0 < measured.nominal_share < 1
    assert measured.skipped == 1
