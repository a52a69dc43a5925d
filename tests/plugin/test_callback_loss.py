"""A rule that reads the loss gets the mean unscaled loss of its step under every kind of Lightning training."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from lightning_cases import KNOWN_WARNINGS, ManualModule, Module, data, fit, learned, trainer
from optimizer_cases import LossRule

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer

pytestmark = KNOWN_WARNINGS

TENSORS = 4  # of the module; the rule is asked, and told the loss, once for each


def grad_scaler(init_scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


def seen(callback, tensors=TENSORS):
    return callback.rule.losses[::tensors]


def windows(losses, length):
    """Means over accumulation windows. Lightning divides a shorter last window by the full length, too."""
    return [sum(losses[start : start + length]) / length for start in range(0, len(losses), length)]


@pytest.mark.parametrize(
    ("arguments", "window"),
    [
        ({}, 1),
        ({"accumulate_grad_batches": 4}, 4),
        ({"accumulate_grad_batches": 3, "max_epochs": 1}, 3),
        ({"gradient_clip_val": 0.1}, 1),
        ({"precision": "bf16-mixed"}, 1),
        ({"precision": "64-true"}, 1),
        ({"init_scale": 16.0}, 1),
        ({"init_scale": 16.0, "accumulate_grad_batches": 2}, 2),
    ],
    ids=str,
)
def test_the_loss_is_the_mean_raw_loss(tmp_path, arguments, window):
    callback = lopt.LearnedOptimizer(LossRule())
    arguments = dict(arguments)
    if "init_scale" in arguments:
        arguments["plugins"] = [grad_scaler(arguments.pop("init_scale"))]
    loaders = data(dtype=torch.float64) if arguments.get("precision") == "64-true" else data()
    runner = fit(tmp_path, callback, train_dataloaders=loaders, **arguments)
    expected = windows(runner.lightning_module.losses, window)
    assert seen(callback) == pytest.approx(expected, rel=1e-5)


def test_steps_that_the_scaler_skips_leave_nothing_behind(tmp_path):
    class Steps(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.taken = []
            trainer.optimizers[0].register_step_post_hook(lambda *_: self.taken.append(pl_module.losses[-1]))

    callback, steps = lopt.LearnedOptimizer(LossRule()), Steps()
    runner = fit(tmp_path, callback, steps, plugins=[grad_scaler(2.0**40)], max_epochs=8)
    assert 0 < len(steps.taken) < len(runner.lightning_module.losses)
    assert seen(callback) == pytest.approx(steps.taken, rel=1e-5)


def test_manual_optimization(tmp_path):
    callback = lopt.LearnedOptimizer(LossRule())
    runner = fit(tmp_path, callback, module=ManualModule())
    assert seen(callback, 2) == pytest.approx(runner.lightning_module.losses, rel=1e-6)


class Own(ManualModule):
    """Manual optimization that clears gradients without zero_grad."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        for param in self.parameters():
            param.grad = None


def test_manual_optimization_without_zero_grad(tmp_path):
    callback = lopt.LearnedOptimizer(LossRule())
    runner = fit(tmp_path, callback, module=Own())
    both = [loss for loss in runner.lightning_module.losses for _ in range(2)]
    assert seen(callback, 2) == pytest.approx(both, rel=1e-6)


def test_accumulation_in_manual_optimization(tmp_path):
    class Accumulates(ManualModule):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch) / 2
            self.losses.append(loss.item())
            self.manual_backward(loss)
            if batch_idx % 2:
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()

    callback = lopt.LearnedOptimizer(LossRule())
    runner = fit(tmp_path, callback, module=Accumulates(), max_epochs=1)
    losses = runner.lightning_module.losses
    sums = [a + b for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert seen(callback, 4) == pytest.approx(sums, rel=1e-6)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # said once in a process
def test_a_training_step_that_returns_none(tmp_path):
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    callback = lopt.LearnedOptimizer(LossRule())
    runner = fit(tmp_path, callback, module=Skips())
    assert seen(callback) == pytest.approx(runner.lightning_module.losses, rel=1e-6)


def test_the_learning_rate_finder_silences_callbacks_and_not_the_loss(tmp_path):
    callback = lopt.LearnedOptimizer(LossRule(), lr="scale")
    module = Module()
    module.lr = 1e-2
    Tuner(trainer(tmp_path, callback)).lr_find(module, data(), num_training=6)
    assert len(seen(callback)) > 0
    assert seen(callback) == pytest.approx(module.losses, rel=1e-6)


def test_the_loss_reaches_a_rule_optimizer_of_the_users_own(tmp_path):
    rule = LossRule()
    module = Module(lambda m: RuleOptimizer(m.parameters(), rule))
    fit(tmp_path, L.Callback(), module=module)
    assert rule.losses[::TENSORS] == pytest.approx(module.losses, rel=1e-6)


def test_rules_that_need_no_loss_do_not_pay_for_it(tmp_path, monkeypatch):
    class Counts(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.calls, reduce = 0, trainer.strategy.reduce

            def counted(*args, **kwargs):
                self.calls += 1
                return reduce(*args, **kwargs)

            monkeypatch.setattr(trainer.strategy, "reduce", counted)

    counts = Counts(), Counts()
    for callback, count in zip((learned(), lopt.LearnedOptimizer(LossRule())), counts, strict=True):
        fit(tmp_path, callback, count, module=Quiet())
    assert [count.calls for count in counts] == [0, 16]


class Quiet(Module):
    def log(self, *args, **kwargs):
        """Does nothing, because logging also calls `reduce`."""
