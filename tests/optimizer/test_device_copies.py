"""No step copies anything from the host to the device: such copies make the host wait for the device."""

import contextlib
import copy

import pytest
import torch
from contract_table import RULES_UNDER_TEST
from optimizer_cases import hidden, parameters
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.rules import constants
from lightning_lopt.rules.features import effective_decay

SHAPES = [(4, 3), (5,), (), (2, 3, 3, 3)]
CONSTRUCTORS = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray}


class Constructors(TorchFunctionMode):
    """Lists the tensors that are made of Python's numbers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in CONSTRUCTORS and not isinstance(args[0], Tensor):
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


class CopiesFromCPU(TorchDispatchMode):
    """Lists copies of CPU tensors to the meta device, which stands for an accelerator."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [arg.device.type for arg in args if isinstance(arg, Tensor) and arg.dim()]
        if isinstance(result, Tensor) and result.is_meta and "cpu" in given:
            self.calls.append(func)
        return result


def steps(rule, device, num_steps=3, **arguments):
    """What `num_steps` steps make of Python's numbers or copy to the device, a list for each step."""
    params = [torch.nn.Parameter(param.detach().to(device)) for param in parameters(SHAPES)]
    arguments = {"num_steps": 10, "backend": "reference", "safeguard": True, **arguments}
    optimizer = RuleOptimizer(hidden(params), rule, **arguments)
    optimizer.set_names((str(index), param) for index, param in enumerate(params))
    loss = torch.ones((), device=device)
    found = []
    for _ in range(num_steps):
        for param in params:
            param.grad = torch.ones_like(param)
        with Constructors() as made, CopiesFromCPU() as copied:
            optimizer.step(loss=loss)
        found.append([*made.calls, *copied.calls])
    return found


@pytest.mark.parametrize("case", RULES_UNDER_TEST, ids=lambda case: case.kind)
def test_no_step_but_the_first_copies_anything_to_the_device(case):
    assert steps(case.make(), "meta")[1:] == [[], []]


def test_copies_would_be_seen(monkeypatch):
    monkeypatch.setattr(constants, "keeping", lambda cache: contextlib.nullcontext())
    first, second, third = steps(lopt.load_rule("star"), "meta")
    assert len(first) > len(second) == len(third) > 0  # the meta-parameters are copied at the first step alone


def test_the_bundled_star_copies_nothing_either():
    assert steps(lopt.load_rule("star"), "meta")[1:] == [[], []]
    assert steps(lopt.load_rule("star"), "cpu")[1:] == [[], []]


def test_the_fallback_copies_nothing_once_its_trust_band_is_there():
    rule = lopt.rules.make("star", nominal_stepsize=1e-2)
    assert steps(rule, "cpu", safeguard="fallback")[1:] == [[], []]


def test_constants_are_made_anew_outside_of_an_optimizer_and_inside_once():
    cpu = torch.device("cpu")
    cache = {}
    with constants.keeping(cache):
        kept = [constants.constant((1.0, 2.0), torch.float32, cpu) for _ in range(2)]
        other = constants.constant((1.0, 2.0), torch.float64, cpu)
    assert kept[0] is kept[1]
    assert other.dtype == torch.float64
    assert constants.constant((1.0, 2.0), torch.float32, cpu) is not kept[0]
    with constants.keeping({}):
        assert constants.constant((1.0, 2.0), torch.float32, cpu) is not kept[0]


def test_decays_are_computed_once_for_all_tensors_and_again_when_they_change():
    offset = torch.zeros(3)
    initial = (0.9, 0.99, 0.999)
    with constants.keeping({}):
        first = effective_decay(initial, offset)
        assert effective_decay(initial, offset) is first
        offset += 0.1
        assert torch.equal(effective_decay(initial, offset), effective_decay(initial, offset.clone()))
        assert not torch.equal(effective_decay(initial, offset), first)


def test_what_is_made_in_inference_mode_can_be_used_outside_of_it():
    with constants.keeping({}):
        with torch.inference_mode():
            made = constants.constant((1.0,), torch.float32, torch.device("cpu"))
        assert not made.is_inference()


@pytest.mark.parametrize("change", ["in place", "data in place", "data", "parameter"])
def test_a_change_of_the_meta_parameters_is_noticed(change):
    """`data` has no version that would tell of it."""
    rule = lopt.load_rule("star")
    optimizer = RuleOptimizer(parameters(SHAPES), rule, num_steps=10, backend="reference")
    for step in range(2):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        fresh = copy.deepcopy(optimizer)  # has seen nothing
        for each in (optimizer, fresh):
            for param, twin in zip(each.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
                param.grad = torch.ones_like(twin)
            each.step()
        for param, twin in zip(optimizer.param_groups[0]["params"], fresh.param_groups[0]["params"], strict=True):
            assert torch.equal(param, twin), step
        own = rule.momentum_decays
        with torch.no_grad():
            if change == "in place":
                own += 0.1
            elif change == "data in place":
                own.data.add_(0.1)
            elif change == "data":
                own.data = own.data + 0.1
            else:
                rule.momentum_decays = torch.nn.Parameter(own + 0.1)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_rule_that_was_loaded_in_inference_mode_moves_like_any_other(backend):
    with torch.inference_mode():
        inference = lopt.load_rule("star")
    found = []
    for rule in (inference, lopt.load_rule("star")):
        params = parameters(SHAPES)
        optimizer = RuleOptimizer(params, rule, num_steps=10, backend=backend)
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        found.append(params)
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_the_meta_parameters_are_walked_once_a_step(monkeypatch):
    rule = lopt.load_rule("star")
    optimizer = RuleOptimizer(parameters(SHAPES), rule, backend="reference")
    walks = []
    walk = rule.meta_params
    monkeypatch.setattr(rule, "meta_params", lambda: (walks.append(1), walk())[1])
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert len(walks) == 1
