"""LearnedOptimizer beside Lightning's other callbacks, in both orders, and under its Tuner."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning_cases import KNOWN_WARNINGS, Module, csv_logger, data, fit, learned, trainer, weights
from optimizer_cases import assert_close, assert_equal

from lightning_lopt import RuleOptimizer

pytestmark = KNOWN_WARNINGS


class Backboned(Module):
    """With the `backbone` that BackboneFinetuning asks for."""

    def __init__(self):
        super().__init__(lambda module: torch.optim.AdamW(module.head(), lr=1e-2))
        self.backbone = self.net[0]

    def head(self):
        return self.net[2].parameters()


class WithLR(Module):
    """With the `lr` and `batch_size` that the Tuner changes."""

    def __init__(self, lr=1e-2):
        super().__init__(lambda module: torch.optim.AdamW(module.parameters(), lr=module.lr))
        self.lr, self.batch_size = lr, 4

    def train_dataloader(self):
        return data(self.batch_size)


def from_step(step):
    class FromStep(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return step_idx is not None and step_idx >= step

    return FromStep()


OTHERS = {
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1),
    "WeightAveraging": lambda: from_step(4),
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.9),
    "GradientAccumulationScheduler": lambda: GradientAccumulationScheduler({0: 1, 1: 2}),
    "Timer": lambda: Timer("00:01:00:00"),
    "EarlyStopping": lambda: EarlyStopping("loss", patience=50),
    "LearningRateMonitor": lambda: LearningRateMonitor("step", log_momentum=True, log_weight_decay=True),
    "LambdaCallback": lambda: LambdaCallback(on_before_optimizer_step=lambda *_: None),
    "ModelPruning": lambda: ModelPruning("l1_unstructured", amount=0.5, parameter_names=["weight"]),
}


@pytest.mark.parametrize("first", [True, False], ids=["learned first", "learned last"])
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_beside_other_callbacks(tmp_path, make, first):
    callbacks = [learned(), make()] if first else [make(), learned()]
    runner = fit(tmp_path, *callbacks, logger=csv_logger(tmp_path), max_epochs=3)
    assert [type(o) for o in runner.optimizers] == [RuleOptimizer]
    assert all(torch.isfinite(w).all() for w in weights(runner))
    losses = runner.lightning_module.losses
    assert sum(losses[-8:]) < sum(losses[:8])


class History(L.Callback):
    """The weights after every epoch, before another callback touches them."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append([p.detach().clone() for p in pl_module.parameters()])


def test_stochastic_weight_averaging_averages_learned_weights(tmp_path):
    history = History()
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=2, annealing_epochs=1)
    averaged = fit(tmp_path, learned(), history, swa, max_epochs=4)
    plain = History()
    fit(tmp_path, learned(), plain, max_epochs=4)
    assert_equal(history.epochs[0], plain.epochs[0])
    assert_equal(history.epochs[3], plain.epochs[3])  # the lr that SWA sets is ignored
    # It takes the weights in at the start of the second, third and fourth epoch.
    expected = [torch.stack(epochs).mean(0) for epochs in zip(*plain.epochs[:3], strict=True)]
    assert_close(weights(averaged), expected, 1e-6)


def test_the_batch_norm_epoch_of_stochastic_weight_averaging(tmp_path):
    steps = []
    for callback in (learned(), L.Callback()):
        module, swa = Module(), StochasticWeightAveraging(1e-2, swa_epoch_start=2)
        module.net.insert(1, torch.nn.BatchNorm1d(8))
        runner = fit(tmp_path, callback, swa, module=module, max_epochs=3)
        steps.append({state["step"].item() for state in runner.optimizers[0].state.values()})
    assert steps[0] == steps[1]  # 25: Lightning makes one step there, with the last gradient, with AdamW, too


def test_the_lr_of_stochastic_weight_averaging_acts_where_lr_scales(tmp_path):
    swa = StochasticWeightAveraging(1e-9, swa_epoch_start=2, annealing_epochs=1, annealing_strategy="linear")
    history = History()
    runner = fit(tmp_path, learned(lr="scale"), history, swa, max_epochs=5)
    assert runner.lightning_module.lrs[-1] == [1e-9]
    assert_close(history.epochs[3], history.epochs[4], 1e-6)


def test_gradient_accumulation_scheduler_decides_the_steps(tmp_path):
    runner = fit(tmp_path, learned(), GradientAccumulationScheduler({0: 1, 1: 2}))
    assert {state["step"].item() for state in runner.optimizers[0].state.values()} == {8 + 4}


def test_early_stopping_stops(tmp_path):
    runner = fit(tmp_path, learned(), EarlyStopping("loss", stopping_threshold=1e9), max_epochs=5)
    assert runner.current_epoch == 1


def finetuning():
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3, should_align=False, verbose=False)


@pytest.mark.parametrize("first", [True, False], ids=["learned first", "learned last"])
def test_backbone_finetuning_adds_a_group_of_ours(tmp_path, first):
    history, callbacks = History(), [learned(weight_decay="decoupled"), finetuning()]
    runner = fit(tmp_path, *callbacks[:: 1 if first else -1], history, module=Backboned(), max_epochs=3)
    (optimizer,) = runner.optimizers
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    head, backbone = optimizer.param_groups
    for key in ("lopt_kind", "lopt_base_lr", "lopt_decay", "weight_decay"):
        assert backbone[key] == head[key]
    start = [p.detach() for p in Backboned().net[0].parameters()]
    assert_equal(history.epochs[0][:2], start)
    assert not torch.equal(history.epochs[1][0], start[0])
    assert {optimizer.state[p]["step"].item() for p in backbone["params"]} == {16}


def test_backbone_finetuning_resumes(tmp_path):
    # Not to the bit, nor does it with SGD: the callback itself keeps the mapping of groups by name.
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    arguments = {"enable_checkpointing": True, "max_epochs": 3}
    fit(tmp_path, learned(), finetuning(), saves, module=Backboned(), **arguments)
    arguments["ckpt_path"] = tmp_path / "epoch=1.ckpt"
    runner = fit(tmp_path, learned(), finetuning(), copy.deepcopy(saves), module=Backboned(), **arguments)
    (optimizer,) = runner.optimizers
    assert isinstance(optimizer, RuleOptimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert {group["lopt_kind"] for group in optimizer.param_groups} == {"star"}
    assert {optimizer.state[p]["step"].item() for p in optimizer.param_groups[0]["params"]} == {24}


def test_the_tuner_finds_a_learning_rate_where_lr_scales(tmp_path):
    runner, module = trainer(tmp_path, learned(lr="scale")), WithLR()
    before = [p.detach().clone() for p in module.parameters()]
    finder = Tuner(runner).lr_find(module, num_training=20, max_lr=10.0, early_stop_threshold=None)
    assert len(finder.results["lr"]) >= 15
    assert len({round(loss, 6) for loss in finder.results["loss"]}) > 10
    assert "setup_optimizers" not in vars(runner.strategy)
    assert_equal([p.detach() for p in module.parameters()], before)
    runner.fit(module)
    fresh = fit(tmp_path, learned(lr="scale"), module=WithLR())
    assert_equal(weights(runner), weights(fresh))


@pytest.mark.parametrize("by", ["Tuner", "callback"])
def test_looking_for_a_learning_rate_that_is_ignored_is_pointed_out(tmp_path, by):
    message = r"nothing to find: LearnedOptimizer ignores lr. Remove the finder, or use LearnedOptimizer\(lr='scale'\)"
    finds = {
        "Tuner": lambda: Tuner(trainer(tmp_path, learned())).lr_find(WithLR(), num_training=6, update_attr=False),
        "callback": lambda: fit(tmp_path, learned(), LearningRateFinder(num_training_steps=6), module=WithLR()),
    }
    with pytest.warns(UserWarning, match=message):
        finds[by]()


@pytest.mark.filterwarnings("ignore:lr='scale' multiplie")  # the finder may find an lr far from the first one
def test_the_finder_callback_drives_our_optimizer_and_leaves_its_reference(tmp_path):
    seen = {}

    class Looks(L.Callback):
        def on_train_start(self, trainer, pl_module):
            group = trainer.optimizers[0].param_groups[0]
            seen.update({key: group[key] for key in ("lr", "lopt_base_lr")}, module=pl_module.lr)

    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    runner = fit(tmp_path, learned(lr="scale"), Looks(), finder, module=WithLR(), max_epochs=4)
    assert [type(o) for o in runner.optimizers] == [RuleOptimizer]
    assert seen["lr"] == seen["module"] == finder.optimal_lr.suggestion() != 1e-2
    assert seen["lopt_base_lr"] == 1e-2
    assert {state["step"].item() for state in runner.optimizers[0].state.values()} == {32}


def test_the_tuner_finds_a_batch_size(tmp_path):
    runner, module = trainer(tmp_path, learned()), WithLR()
    Tuner(runner).scale_batch_size(module, init_val=2, max_trials=2, steps_per_trial=1)
    assert module.batch_size > 2
    assert "setup_optimizers" not in vars(runner.strategy)
    runner.fit(module)
    assert [type(o) for o in runner.optimizers] == [RuleOptimizer]


def test_the_batch_size_finder_callback(tmp_path):
    finder = BatchSizeFinder(init_val=2, max_trials=2, steps_per_trial=1)
    module = WithLR()
    runner = trainer(tmp_path, learned(), finder)
    runner.fit(module)
    assert finder.optimal_batch_size == module.batch_size
    assert [type(o) for o in runner.optimizers] == [RuleOptimizer]
    assert all(torch.isfinite(w).all() for w in weights(runner))
