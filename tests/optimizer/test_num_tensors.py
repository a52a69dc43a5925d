"""A tensor's steps do not depend on which other tensors happen to have a gradient: rules that scale by depth."""

import io

import pytest
import torch
from optimizer_cases import assert_equal, parameters, set_gradients
from torch import nn

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer, kernels
from lightning_lopt.optimizer.groups import NUM_TENSORS

SHAPES = [(6, 4), (6,), (3, 6), (3,), (5, 5), (5,)]
EVERY = range(len(SHAPES))
DEEPER = -0.9  # power of the number of tensors: about that of the bundled rule


def lstm():
    rule = lopt.rules.make("lstm", nominal_stepsize=1e-2, out_scale=1e-6, scheduler=True)
    with torch.no_grad():
        rule.tensor_powers[..., 4] = DEEPER
    return rule


RULES = {"scheduled": lambda: lopt.load_rule("star"), "lstm": lstm}


@pytest.fixture(params=RULES.values(), ids=RULES)
def rule(request):
    torch.manual_seed(0)
    return request.param()


def step(optimizer, params, number, moving):
    """One step in which tensors `moving` have gradients, always the same ones at a step's number."""
    set_gradients(params, number)
    for index, param in enumerate(params):
        if index not in moving:
            param.grad = None
    optimizer.step()


def freeze(params, frozen):
    for index, param in enumerate(params):
        param.requires_grad_(index not in frozen)


def trained(rule, *, steps, moving=EVERY, held=EVERY):
    """Parameters after steps in which tensors `moving` have gradients; the optimizer holds tensors `held`."""
    params = parameters(SHAPES)
    optimizer = RuleOptimizer([params[i] for i in held], rule, num_steps=10)
    for number in range(steps):
        step(optimizer, params, number, moving)
    return [param.detach() for param in params]


def test_the_number_of_tensors_matters_at_all(rule):
    """Else the tests below would show nothing."""
    assert not torch.equal(trained(rule, steps=2)[0], trained(rule, steps=2, held=[0, 1])[0])


def test_tensors_without_a_gradient_count(rule):
    """Stochastic depth, mixtures of experts and unused parameters, from the first step or later."""
    expected = trained(rule, steps=5)
    params = parameters(SHAPES)
    optimizer = RuleOptimizer(params, rule, num_steps=10)
    for number, moving in enumerate([[0], [0, 1, 2], [0], EVERY, [0, 5]]):
        step(optimizer, params, number, moving)
    assert_equal([params[0].detach()], expected[:1])


def test_a_step_for_each_tensor_as_its_gradient_arrives(rule):
    """Gradient release: each gradient is dropped before the next one exists."""
    expected = trained(rule, steps=3)
    params = parameters(SHAPES)
    optimizer = RuleOptimizer(params, rule, num_steps=10)
    for number in range(3):
        for index in reversed(range(len(params))):
            step(optimizer, params, number, [index])
    assert_equal([param.detach() for param in params], expected)


def test_freezing_others_changes_nothing(rule):
    expected = trained(rule, steps=5)
    params = parameters(SHAPES)
    optimizer = RuleOptimizer(params, rule, num_steps=10)
    for number in range(5):
        freeze(params, [] if number < 2 else range(2, 6))
        step(optimizer, params, number, EVERY if number < 2 else [0, 1])
    assert_equal([param.detach() for param in params[:2]], expected[:2])


def test_tensors_that_stay_frozen_do_not_count(rule):
    """LoRA: whether the optimizer holds the frozen weights or not makes no difference."""
    expected = trained(rule, steps=3, held=[0, 1], moving=[0, 1])
    params = parameters(SHAPES)
    freeze(params, range(2, 6))
    optimizer = RuleOptimizer(params, rule, num_steps=10)
    for number in range(3):
        step(optimizer, params, number, [0, 1])
    assert_equal([param.detach() for param in params], expected)


@pytest.mark.parametrize("how", ["requires_grad", "add_param_group"])
def test_unfreezing_leaves_the_head_as_it_was_and_gives_the_backbone_the_steps_of_the_whole_net(rule, how):
    head, backbone = [0, 1], [2, 3, 4, 5]
    expected = [*trained(rule, steps=5, held=head, moving=head)[:2], *trained(rule, steps=3)[2:]]
    params = parameters(SHAPES)
    freeze(params, backbone)
    own = params if how == "requires_grad" else params[:2]
    optimizer = RuleOptimizer(own, rule, num_steps=10)
    for number in range(2):
        step(optimizer, params, number, head)
    freeze(params, [])
    if how == "add_param_group":
        optimizer.add_param_group({"params": params[2:]})
    for number in range(2, 5):
        set_gradients(params, number)  # of the head
        gradients = [param.grad for param in params[:2]]
        set_gradients(params, number - 2)
        for param, gradient in zip(params, gradients, strict=False):
            param.grad = gradient
        optimizer.step()
    assert_equal([param.detach() for param in params], expected)


def test_a_resumed_run_keeps_the_numbers(rule):
    params = parameters(SHAPES)
    freeze(params, range(2, 6))
    optimizer = RuleOptimizer(params, rule, num_steps=10)
    step(optimizer, params, 0, [0, 1])
    freeze(params, [])
    step(optimizer, params, 1, EVERY)
    assert optimizer.param_groups[0][NUM_TENSORS] == [2, 2, 6, 6, 6, 6]

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    freeze(twins, range(1, 6))  # as a callback leaves them before it restores its own state
    resumed = RuleOptimizer(twins, rule, num_steps=10)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups[0][NUM_TENSORS] == [2, 2, 6, 6, 6, 6]
    for each, own in ((optimizer, params), (resumed, twins)):
        step(each, own, 2, [0, 3])
    assert_equal([param.detach() for param in params], [param.detach() for param in twins])


def test_empty_tensors_do_not_count_and_gradients_set_by_hand_do(rule):
    params = [*parameters([(6, 4), (0, 3)]), torch.ones(3)]
    optimizer = RuleOptimizer(params, rule)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.param_groups[0][NUM_TENSORS] == [2, None, 2]


class RecordingKernel:
    """Moves nothing; remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def refuses(self, param):
        return None

    def step(self, work_items, meta_params, num_steps, num_tensors=None, *, safeguard, measure):
        self.calls.append((num_tensors, [tuple(item.param.shape) for item in work_items]))


def test_a_kernel_is_called_once_for_each_number(monkeypatch, rule):
    kernel = RecordingKernel()
    monkeypatch.setattr(kernels, "find", lambda *_: kernel)
    params = parameters(SHAPES)
    freeze(params, range(2, 6))
    optimizer = RuleOptimizer(params, rule)
    step(optimizer, params, 0, [0, 1])
    freeze(params, [])
    step(optimizer, params, 1, EVERY)
    step(optimizer, params, 2, [0])
    assert kernel.calls == [(2, SHAPES[:2]), (2, SHAPES[:2]), (6, SHAPES[2:]), (2, SHAPES[:1])]


def test_a_parameter_that_takes_anothers_place_takes_its_number_too(rule):
    """Densification and growing nets put a new parameter into an old one's place."""
    params = parameters(SHAPES)
    optimizer = RuleOptimizer(params, rule)
    step(optimizer, params, 0, EVERY)
    freeze(params, range(1, 6))
    params[0] = optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(9, 4))
    step(optimizer, params, 1, [0])
    assert optimizer.param_groups[0][NUM_TENSORS] == [6] * 6


def test_a_group_whose_parameters_were_changed_by_hand_is_counted_anew(rule):
    params = parameters(SHAPES)
    optimizer = RuleOptimizer(params, rule)
    step(optimizer, params, 0, EVERY)
    optimizer.param_groups[0]["params"] = params[:3]
    step(optimizer, params, 1, [0, 1])
    assert optimizer.param_groups[0][NUM_TENSORS] == [3, 3, None]
