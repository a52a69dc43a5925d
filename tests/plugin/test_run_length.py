"""The run length that LearnedOptimizer tells the rule: exact, or unknown where nobody can know it."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, Timer
from lightning_cases import KNOWN_WARNINGS, ManualModule, Module, adamw, data, fit, learned, weights
from optimizer_cases import assert_equal

from lightning_lopt import LearnedOptimizer, RuleOptimizer
from lightning_lopt.plugin.strategies import LearnedSingleDevice

pytestmark = KNOWN_WARNINGS


class Growing(Module):
    """Batches that double in size every epoch."""

    def train_dataloader(self):
        return data(2 ** min(self.current_epoch + 1, 5))


class Stepping(Module):
    """Manual optimization: one optimizer, which takes so many steps in the first batch, the second, and so on again."""

    def __init__(self, *steps, wrapped=True, configure=adamw):
        super().__init__(configure)
        self.automatic_optimization = False
        self.steps = steps or (1,)
        self.wrapped = wrapped
        self.told = []  # the length in each step

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.wrapped)
        for _ in range(self.steps[batch_idx % len(self.steps)]):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.told.append(self.trainer.optimizers[0].num_steps)


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
    "manual optimization of two": ({"max_epochs": 2, "module": ManualModule}, None),
    "manual optimization of two, and steps": ({"max_epochs": -1, "max_steps": 6, "module": ManualModule}, None),
    "manual optimization": ({"max_epochs": 2, "module": Stepping}, 16),
    "manual optimization, and steps": ({"max_epochs": 2, "max_steps": 9, "module": Stepping}, 9),
    "manual optimization, and steps alone": ({"max_epochs": -1, "max_steps": 6, "module": Stepping}, 6),
    "manual optimization, a timer": (
        {"max_epochs": 2, "module": Stepping, "callbacks": lambda: [Timer("00:01:00:00")]},
        None,
    ),
    "manual optimization, data without a length": (
        {"max_epochs": 2, "module": Stepping, "train_dataloaders": stream()},
        None,
    ),
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


# Steps in batch after batch (8 an epoch, 3 epochs) -> the length in each step.
BY_HAND = {
    "one a batch": ((1,), [24] * 24),
    "one in four batches": ((0, 0, 0, 1), [6] * 6),
    "the first of two batches": ((1, 0), [24, 24, 16, 16, *[12] * 8]),
    "two a batch": ((2,), [24] * 2 + [48] * 46),
    "a batch with two": ((2, 1, 1, 1, 1, 1, 1, 1), None),
    "in the second half of an epoch": ((0, 0, 0, 0, 1, 1, 1, 1), None),
    "as it likes": ((0, 3, 0, 1, 0, 0, 0, 2), None),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_module_that_steps_as_it_likes_is_counted(tmp_path, caplog, name):
    steps, expected = BY_HAND[name]
    with caplog.at_level("INFO"):
        module = fit(tmp_path, module=Stepping(*steps), max_epochs=3).lightning_module
    taken = 3 * 8 * sum(steps) // len(steps)
    assert len(module.told) == taken
    assert module.trainer.optimizers[0].num_steps == taken
    assert module.told == (expected or module.told)
    assert "24 steps (from the Trainer, with 1 per batch)" in caplog.text
    first_change = next((length for length in [*module.told, taken] if length != 24), 24)
    said = f"the module does not step once a batch, so the run has {first_change} steps"
    assert (said in caplog.text) == (steps != (1,))


def test_max_steps_limits_what_is_counted(tmp_path):
    module = fit(tmp_path, module=Stepping(2), max_epochs=3, max_steps=10).lightning_module
    assert module.told == [10] * 10


def test_the_length_is_unknown_where_steps_cannot_be_seen(tmp_path):
    module = fit(tmp_path, module=Stepping(1, wrapped=False)).lightning_module
    assert module.told == [16] + [None] * 15


def test_a_length_that_the_module_sets_stays(tmp_path):
    class Knows(Stepping):
        def on_train_start(self):
            self.trainer.optimizers[0].num_steps = 7

    assert fit(tmp_path, module=Knows(0, 1)).lightning_module.told == [7] * 8


@pytest.mark.parametrize(("own", "told"), [(None, 8), (5, 5)])
def test_the_modules_own_optimizer_is_told_what_is_counted(tmp_path, own, told):
    rule = learned().rule
    configure = lambda module: RuleOptimizer(module.parameters(), rule, num_steps=own)  # noqa: E731
    assert fit(tmp_path, module=Stepping(0, 1, configure=configure)).lightning_module.told == [told] * 8


@pytest.mark.parametrize("steps", [(1,), (0, 0, 0, 1), (2,)])
def test_a_run_that_was_resumed_goes_on_with_the_length_that_it_had(tmp_path, steps):
    class Stops(Stepping):
        def on_train_epoch_end(self):
            self.trainer.should_stop = self.current_epoch == 1

    def run(module, **options):
        return fit(tmp_path, LearnedOptimizer.from_pretrained("star"), module=module, max_epochs=4, **options)

    whole = run(Stepping(*steps))
    half = run(Stops(*steps))
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = run(Stepping(*steps), ckpt_path=tmp_path / "half.ckpt")
    assert half.lightning_module.told + rest.lightning_module.told == whole.lightning_module.told
    assert_equal(weights(rest), weights(whole))
