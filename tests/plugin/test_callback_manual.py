"""LearnedOptimizer under manual optimization, where modules work with Lightning's wrappers of our optimizers."""

import lightning as L
import pytest
import torch
from lightning_cases import KNOWN_WARNINGS, ManualModule, Module, data, fit, weights
from optimizer_cases import assert_close, assert_equal

from lightning_lopt import LearnedOptimizer, RuleOptimizer

pytestmark = KNOWN_WARNINGS


def test_several_optimizers_and_a_scheduler(tmp_path):
    runner = fit(tmp_path, module=ManualModule())
    plain = fit(tmp_path, L.Callback(), module=ManualModule())
    assert [type(o) for o in runner.optimizers] == [RuleOptimizer] * 2
    assert runner.lightning_module.lrs == plain.lightning_module.lrs
    assert [{s["step"].item() for s in o.state.values()} for o in runner.optimizers] == [{16}] * 2
    losses = runner.lightning_module.losses
    assert sum(losses[16:]) < sum(losses[:16])


class OneManual(ManualModule):
    """One optimizer over all layers; `step` is how it is stepped."""

    def __init__(self, step=None):
        super().__init__(lambda module: torch.optim.AdamW(module.parameters(), lr=1e-2))
        self.step = step or type(self).plainly

    def plainly(self, optimizer, batch):
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def in_a_closure(self, optimizer, batch):
        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)

    def toggled(self, optimizer, batch):
        with optimizer.toggle_model():
            self.plainly(optimizer, batch)

    def clipped(self, optimizer, batch):
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1e9, gradient_clip_algorithm="norm")
        optimizer.step()

    def training_step(self, batch, batch_idx):
        self.step(self, self.optimizers(), batch)


@pytest.mark.parametrize("step", [OneManual.plainly, OneManual.in_a_closure, OneManual.toggled, OneManual.clipped])
def test_every_way_to_step_is_the_automatic_one(tmp_path, step):
    manual = fit(tmp_path, module=OneManual(step))
    assert_equal(weights(manual), weights(fit(tmp_path)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_flagship_steps_to_the_bit_as_in_automatic_optimization(tmp_path, precision, backend):
    """Under bf16-true, torch's default dtype is bfloat16 inside training_step, where manual steps are taken."""

    def run(module):
        callback = LearnedOptimizer.from_pretrained("star", backend=backend)
        batches = data(dtype=torch.float64 if precision == "64-true" else torch.float32)
        return weights(fit(tmp_path, callback, module=module, precision=precision, train_dataloaders=batches))

    assert_equal(run(OneManual()), run(Module()))


def test_accumulation_by_hand(tmp_path):
    class Accumulates(OneManual):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch) / 2)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    by_hand = fit(tmp_path, module=Accumulates())
    assert_close(weights(by_hand), weights(fit(tmp_path, train_dataloaders=data(8))), 1e-6)


def test_our_methods_through_lightnings_wrapper(tmp_path):
    class Wrapped(OneManual):
        measured = None

        def training_step(self, batch, batch_idx):
            wrapper = self.optimizers()
            assert type(wrapper).__name__ == "LightningRuleOptimizer"
            wrapper.measure_next_step()
            self.plainly(wrapper, batch)
            self.measured = wrapper.take_metrics()
            assert self.measured.update_rms > 0
            assert wrapper.take_metrics() is None
            assert wrapper.num_skipped() == 0
            wrapper.check_skipped()
            assert wrapper.rule.kind == "star"
            assert wrapper.num_steps == 16
            assert "kind='star'" in repr(wrapper)
            assert wrapper.state_dict()["state"]

    runner = fit(tmp_path, module=Wrapped(), log_every_n_steps=0)
    assert_equal(weights(runner), weights(fit(tmp_path)))


def test_a_group_added_through_lightnings_wrapper(tmp_path):
    class Grows(Module):
        def __init__(self):
            super().__init__(lambda module: torch.optim.AdamW(module.net[2].parameters(), lr=1e-2))

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizers().add_param_group({"params": list(self.net[0].parameters())})

    runner = fit(tmp_path, module=Grows())
    (optimizer,) = runner.optimizers
    steps = [{optimizer.state[p]["step"].item() for p in group["params"]} for group in optimizer.param_groups]
    assert steps == [{16}, {8}]
