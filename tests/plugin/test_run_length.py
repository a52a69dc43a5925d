"""The run length that LearnedOptimizer tells the rule: exact, or unknown where nobody can know it."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, Timer
from lightning_cases import KNOWN_WARNINGS, ManualModule, Module, data, fit, learned

from lightning_lopt import RuleOptimizer
from lightning_lopt.plugin.strategies import LearnedSingleDevice

pytestmark = KNOWN_WARNINGS


class Growing(Module):
    """Batches that double in size every epoch."""

    def train_dataloader(self):
        return data(2 ** min(self.current_epoch + 1, 5))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(data(size=16).dataset)


def stream():
    return torch.utils.data.DataLoader(Stream(), batch_size=4)


def early_stopping():
    return EarlyStopping("loss", patience=2, min_delta=1e9)


# What the Trainer is told -> the steps that each optimizer will take (8 batches an epoch), None if nobody can know.
LENGTHS = {
    "epochs": ({"max_epochs": 3}, 24),
    "steps": ({"max_epochs": -1, "max_steps": 5}, 5),
    "epochs and steps": ({"max_epochs": 3, "max_steps": 5}, 5),
    "accumulation": ({"max_epochs": 3, "accumulate_grad_batches": 3}, 9),
    "limited batches": ({"max_epochs": 2, "limit_train_batches": 5}, 10),
    "accumulation that changes": (
        {"max_epochs": 5, "callbacks": lambda: [GradientAccumulationScheduler({0: 4, 1: 3, 3: 1})]},
        2 + 3 + 3 + 8 + 8,
    ),
    "accumulation that changes, and steps": (
        {"max_epochs": 5, "max_steps": 7, "callbacks": lambda: [GradientAccumulationScheduler({0: 4, 1: 3})]},
        7,
    ),
    "early stopping within chosen epochs": ({"max_epochs": 2, "callbacks": lambda: [early_stopping()]}, 16),
    "early stopping within the default epochs": ({"max_epochs": 1000, "callbacks": lambda: [early_stopping()]}, None),
    "a timer": ({"max_epochs": 2, "callbacks": lambda: [Timer("00:01:00:00")]}, None),
    "max_time": ({"max_epochs": 2, "max_time": "00:01:00:00"}, None),
    "reloaded loaders": (
        {"max_epochs": 2, "module": Growing, "train_dataloaders": None, "reload_dataloaders_every_n_epochs": 1},
        None,
    ),
    "reloaded loaders, and steps alone": (
        {"max_steps": 9, "module": Growing, "train_dataloaders": None, "reload_dataloaders_every_n_epochs": 1}
        | {"max_epochs": -1},
        9,
    ),
    "data without a length": ({"max_epochs": 2, "train_dataloaders": stream()}, None),
    "data without a length, and steps": ({"max_epochs": -1, "max_steps": 5, "train_dataloaders": stream()}, 5),
    "manual optimization": ({"max_epochs": 2, "module": ManualModule}, None),
    "manual optimization, and steps": ({"max_epochs": -1, "max_steps": 6, "module": ManualModule}, None),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_length_is_right_or_unknown(tmp_path, name):
    arguments, expected = LENGTHS[name]
    arguments = dict(arguments)
    callbacks = arguments.pop("callbacks", list)()
    module = arguments.pop("module", Module)()
    runner = fit(tmp_path, learned(), *callbacks, module=module, **arguments)
    assert [optimizer.num_steps for optimizer in runner.optimizers] == [expected] * len(runner.optimizers)
    if expected is not None and "early" not in name:
        assert runner.global_step == expected


@pytest.mark.parametrize("num_steps", [1, 7, None])
@pytest.mark.parametrize("module", [Module, ManualModule])
@pytest.mark.parametrize("by", ["callback", "strategy"])
def test_who_knows_the_length_can_say_it(tmp_path, num_steps, module, by):
    if by == "callback":
        runner = fit(tmp_path, learned(num_steps=num_steps), module=module())
    else:
        strategy = LearnedSingleDevice(num_steps=num_steps)
        runner = fit(tmp_path, Timer("00:01:00:00"), module=module(), strategy=strategy)
    assert {optimizer.num_steps for optimizer in runner.optimizers} == {num_steps}


@pytest.mark.parametrize("num_steps", [0, -1, 1.0, 2.5, True, "many", "7"])
@pytest.mark.parametrize("by", ["callback", "strategy"])
def test_other_lengths_are_refused(tmp_path, num_steps, by):
    message = f"num_steps={num_steps!r} is not allowed: use 'auto', a positive whole number, or None for a run of"
    make = {
        "callback": lambda: learned(num_steps=num_steps),
        "strategy": lambda: fit(tmp_path, L.Callback(), strategy=LearnedSingleDevice(num_steps=num_steps)),
    }[by]
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("own", "told"), [(None, 16), (5, 5)])
def test_a_rule_optimizer_of_the_modules_own_keeps_the_length_that_it_knows(tmp_path, own, told):
    rule = learned().rule
    module = Module(lambda module: RuleOptimizer(module.parameters(), rule, num_steps=own))
    assert fit(tmp_path, learned(), module=module).optimizers[0].num_steps == told
