"""LearnedOptimizer replaces every optimizer that Lightning accepts, and leaves everything else unchanged."""

import copy
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning_cases import (
    FORMS,
    KNOWN_WARNINGS,
    Module,
    ValidatedModule,
    adamw,
    csv_logger,
    data,
    fit,
    groups_and_cosine,
    in_lists,
    learned,
    metrics,
    trainer,
    weights,
)
from optimizer_cases import assert_close, assert_equal

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer

pytestmark = KNOWN_WARNINGS


def optimizers_behind(scheduler):
    inner = getattr(scheduler, "_schedulers", ())
    return [scheduler.optimizer, *(o for s in inner for o in optimizers_behind(s))]


@pytest.mark.parametrize("configure", FORMS.values(), ids=FORMS)
def test_every_form_of_configure_optimizers(tmp_path, configure):
    companions = [
        LearningRateMonitor(log_momentum=True, log_weight_decay=True),
        EarlyStopping("loss", patience=100),
        ModelCheckpoint(tmp_path, monitor="loss"),
    ]
    logger = csv_logger(tmp_path)
    ours = fit(tmp_path, learned(), *companions, module=Module(configure), logger=logger, enable_checkpointing=True)
    plain = fit(tmp_path, L.Callback(), module=Module(configure))
    assert [type(o) for o in ours.optimizers] == [RuleOptimizer]
    for config in ours.lr_scheduler_configs:
        assert {id(o) for o in optimizers_behind(config.scheduler)} == {id(ours.optimizers[0])}
    if configure is not FORMS["plateau"]:  # whose schedule depends on the losses
        assert ours.lightning_module.lrs == plain.lightning_module.lrs
    losses = ours.lightning_module.losses  # of two epochs, over the same batches
    assert sum(losses[len(losses) // 2 :]) < sum(losses[: len(losses) // 2])
    assert not all(torch.equal(a, b) for a, b in zip(weights(ours), weights(plain), strict=True))


def test_learning_rate_monitor_logs_the_users_own_values(tmp_path):
    monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    fit(tmp_path, learned(), monitor, module=Module(groups_and_cosine), logger=csv_logger(tmp_path))
    row = next(row for row in metrics(tmp_path) if "lr-RuleOptimizer/first" in row)
    logged = {name.split("/")[1]: value for name, value in row.items() if name.startswith("lr-")}
    assert logged == {
        "first": 0.1,
        "first-momentum": 0.9,
        "first-weight_decay": 0.0,
        "pg2": 0.01,
        "pg2-momentum": 0.9,
        "pg2-weight_decay": 0.2,
    }


@pytest.mark.filterwarnings("ignore:lr='scale' multiplies the update by")  # this warm-up never ends
def test_lr_is_ignored_unless_asked_for(tmp_path):
    flat, cosine = (
        [weights(fit(tmp_path, learned(lr=lr), module=Module(c))) for c in (adamw, FORMS["warmup from 0"])]
        for lr in ("ignore", "scale")
    )
    assert_equal(*flat)
    with pytest.raises(AssertionError):
        assert_equal(*cosine)


def test_scale_at_the_reference_is_the_same_as_ignore(tmp_path):
    first, second = (fit(tmp_path, learned(lr=lr)) for lr in ("ignore", "scale"))
    assert_close(weights(first), weights(second), 1e-6)


def test_scaling_under_a_one_cycle_schedule_is_pointed_out(tmp_path):
    with pytest.warns(UserWarning, match=r"OneCycleLR or CyclicLR.*lr / max_lr"):
        fit(tmp_path, learned(lr="scale"), module=Module(FORMS["one cycle"]))


def test_decoupled_weight_decay_is_the_groups_own(tmp_path):
    def configure(module):
        return adamw(module, weight_decay=0.5)

    plain, decayed = (
        fit(tmp_path, learned(weight_decay=decay), module=Module(configure), max_steps=1)
        for decay in ("ignore", "decoupled")
    )
    start = [p.detach() for p in Module().parameters()]
    expected = [w - 1e-2 * 0.5 * s for w, s in zip(weights(plain), start, strict=True)]
    assert_close(weights(decayed), expected, 1e-7)


def test_none_means_no_optimizer(tmp_path):
    with (
        pytest.warns(UserWarning, match="there is no optimizer for LearnedOptimizer to replace"),
        pytest.warns(UserWarning, match="`LightningModule.configure_optimizers` returned `None`"),
    ):
        runner = fit(tmp_path, learned(), module=Module(lambda module: None))
    assert [type(o).__name__ for o in runner.optimizers] == ["_MockOptimizer"]


def test_an_optimizer_of_ours_in_configure_optimizers_is_kept(tmp_path):
    rule = lopt.rules.make("hyperparam", nominal_stepsize=0.05)
    runner = fit(tmp_path, learned(), module=Module(lambda module: RuleOptimizer(module.parameters(), rule)))
    assert runner.optimizers[0].rule is rule


def test_without_the_callback_a_rule_optimizer_runs_from_configure_optimizers(tmp_path):
    ours = fit(tmp_path, module=Module())
    rule = learned().rule
    own = fit(
        tmp_path, L.Callback(), module=Module(lambda module: RuleOptimizer(module.parameters(), rule, num_steps=16))
    )
    assert_equal(weights(ours), weights(own))


def test_the_module_is_left_alone(tmp_path):
    module = Module()
    fit(tmp_path, module=module)
    twin = Module()
    fit(tmp_path, L.Callback(), module=twin)
    assert set(vars(module)) == set(vars(twin))
    assert list(module.state_dict()) == list(twin.state_dict())
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW)


PATCHED = ("setup_optimizers", "backward")


def assert_restored(runner):
    assert not set(PATCHED) & set(vars(runner.strategy))


def test_the_strategy_is_restored_after_a_fit(tmp_path):
    class During(L.Callback):
        def on_train_start(self, trainer, pl_module):
            assert set(PATCHED) <= set(vars(trainer.strategy))

    assert_restored(fit(tmp_path, learned(), During()))


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start", "on_train_batch_end", "on_train_end"])
@pytest.mark.parametrize("first", [True, False], ids=["learned first", "learned last"])
@pytest.mark.parametrize("exception", [ZeroDivisionError, KeyboardInterrupt])
def test_the_strategy_is_restored_after_an_exception(tmp_path, hook, first, exception):
    class Raises(L.Callback):
        pass

    def fail(*args, **kwargs):
        raise exception

    setattr(Raises, hook, fail)
    callbacks = [learned(), Raises()] if first else [Raises(), learned()]
    runner = trainer(tmp_path, *callbacks)
    with pytest.raises(SystemExit if exception is KeyboardInterrupt else exception):
        runner.fit(Module(), data())
    assert_restored(runner)


def test_what_someone_else_put_on_the_strategy_is_put_back(tmp_path):
    runner = trainer(tmp_path, learned())
    calls, original = [], runner.strategy.setup_optimizers
    runner.strategy.setup_optimizers = lambda t: (calls.append(t), original(t))
    theirs = runner.strategy.setup_optimizers
    runner.fit(Module(), data())
    assert calls == [runner]
    assert runner.strategy.setup_optimizers is theirs


def test_validate_only_touches_nothing(tmp_path):
    runner = trainer(tmp_path, learned())
    module = ValidatedModule()
    before = [p.detach().clone() for p in module.parameters()]
    runner.validate(module, data(), verbose=False)
    assert runner.optimizers == []
    assert_restored(runner)
    assert_equal([p.detach() for p in module.parameters()], before)


def test_validation_inside_a_fit(tmp_path):
    with_validation = fit(tmp_path, module=ValidatedModule(), val_dataloaders=data())
    assert_equal(weights(with_validation), weights(fit(tmp_path)))


def test_a_second_fit_makes_fresh_optimizers(tmp_path):
    runner = fit(tmp_path)
    first = runner.optimizers[0]
    runner.fit_loop.max_epochs = 4
    runner.fit(runner.lightning_module, data())
    assert isinstance(runner.optimizers[0], RuleOptimizer)
    assert runner.optimizers[0] is not first
    assert_restored(runner)


def test_one_callback_serves_one_trainer_after_another(tmp_path):
    callback = learned()
    first, second = (fit(tmp_path, callback) for _ in range(2))
    assert_equal(weights(first), weights(second))


def test_without_the_callback_the_trainer_is_as_before(tmp_path):
    callback = learned()
    runner = fit(tmp_path, callback)
    runner.callbacks.remove(callback)
    runner.fit(runner.lightning_module, data())
    assert isinstance(runner.optimizers[0], torch.optim.AdamW)


@pytest.mark.parametrize("model", [BoringModel, ManualOptimBoringModel])
@pytest.mark.parametrize("mode", [{"fast_dev_run": True}, {"barebones": True}, {}], ids=str)
@pytest.mark.filterwarnings("ignore:You are using `Trainer.barebones")
@pytest.mark.filterwarnings("ignore:.*Skipping val loop")
def test_short_and_bare_runs(tmp_path, model, mode):
    arguments = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path, **mode}
    if "barebones" not in mode:
        arguments.update(
            logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False
        )
    module = model()
    before = [p.detach().clone() for p in module.parameters()]
    L.Trainer(callbacks=[learned()], limit_train_batches=3, limit_val_batches=1, **arguments).fit(module)
    assert not all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"]
)
def test_copies_made_during_a_fit_leave_the_trainer_behind(tmp_path, duplicate):
    class Copies(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.copy = duplicate(callback)

    callback, copies = learned(lr="scale"), Copies()
    first = fit(tmp_path, callback, copies)
    assert (copies.copy.lr, copies.copy.safeguard) == ("scale", True)
    assert_equal(weights(first), weights(fit(tmp_path, copies.copy)))


def test_the_callback_keeps_a_copy_of_the_rule(tmp_path):
    rule = learned().rule.requires_grad_(True)
    callback = lopt.LearnedOptimizer(rule)
    before = [p.detach().clone() for p in rule.parameters()]
    fit(tmp_path, callback)
    assert callback.rule is not rule
    assert all(p.requires_grad and p.grad is None for p in rule.parameters())
    assert_equal([p.detach() for p in callback.rule.parameters()], before)


def test_optimizers_made_anew_in_mid_training_are_learned_too(tmp_path):
    class Unfreezes(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.strategy.setup_optimizers(trainer)

    runner = fit(tmp_path, learned(), Unfreezes(), module=Module(in_lists))
    assert [type(o) for o in runner.optimizers] == [RuleOptimizer]
    assert runner.lr_scheduler_configs[0].scheduler.optimizer is runner.optimizers[0]
    assert runner.optimizers[0].num_steps == 16
    assert {s["step"].item() for s in runner.optimizers[0].state.values()} == {8}


def test_an_optimizer_taken_from_the_scheduler_is_the_learned_one(tmp_path):
    class Takes(L.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.strategy.optimizers = [trainer.lr_scheduler_configs[0].scheduler.optimizer]

    runner = fit(tmp_path, learned(), Takes(), module=Module(in_lists))
    assert [type(o) for o in runner.optimizers] == [RuleOptimizer]


def test_accumulation_is_the_larger_batch(tmp_path):
    halves = fit(tmp_path, train_dataloaders=data(4), accumulate_grad_batches=2)
    whole = fit(tmp_path, train_dataloaders=data(8))
    assert_close(weights(halves), weights(whole), 1e-6)


def test_clipping_comes_before_the_step(tmp_path):
    class Looks(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.norms = []
            (optimizer,) = trainer.optimizers
            optimizer.register_step_post_hook(
                lambda *_: self.norms.append(max(p.grad.norm() for p in pl_module.parameters()))
            )

    looks = Looks()
    fit(tmp_path, learned(), looks, gradient_clip_val=1e-3)
    assert max(looks.norms) <= 1e-3 + 1e-6


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # said once in a process
def test_a_training_step_that_returns_none_is_passed_over(tmp_path):
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    runner = fit(tmp_path, module=Skips())
    assert {s["step"].item() for s in runner.optimizers[0].state.values()} == {8}


def test_a_module_compiled_whole(tmp_path):
    compiled = torch.compile(BoringModel(), backend="eager")
    runner = trainer(tmp_path, learned(), max_steps=2, limit_val_batches=0)
    runner.fit(compiled)
    assert isinstance(runner.optimizers[0], RuleOptimizer)


def test_a_run_of_unknown_length(tmp_path):
    runner = fit(tmp_path, max_epochs=-1, max_steps=5)
    assert runner.optimizers[0].num_steps == 5
    runner = fit(tmp_path, max_epochs=3, accumulate_grad_batches=2)
    assert runner.optimizers[0].num_steps == 12


def test_data_of_unknown_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data(size=16).dataset)

    runner = fit(tmp_path, train_dataloaders=torch.utils.data.DataLoader(Stream(), batch_size=4), max_epochs=1)
    assert runner.optimizers[0].num_steps is None
