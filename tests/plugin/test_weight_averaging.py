"""LearnedOptimizer(average=...): averages in validation, checkpoints and at the end of a fit, and none in training."""

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning_cases import KNOWN_WARNINGS, ManualModule, Module, ValidatedModule, adamw, data, fit, trainer, weights
from optimizer_cases import assert_close, assert_equal, star
from torch import nn

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer

pytestmark = KNOWN_WARNINGS
FRACTION = 0.75  # of 32 steps: the window begins after the first epoch of 8


def averaging(fraction=FRACTION, **arguments):
    rule = star()
    rule.average_fraction = fraction
    return lopt.LearnedOptimizer(rule, **arguments)


class NormModule(ValidatedModule):
    """A net with BatchNorm, and buffers that are not to be averaged."""

    def __init__(self, configure=adamw):
        super().__init__(configure)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.register_buffer("last_mean", torch.zeros(4))

    def training_step(self, batch, batch_idx):
        self.last_mean.copy_(batch[0].mean(0))
        return super().training_step(batch, batch_idx)


class Records(L.Callback):
    """The weights after each step, and those in validation."""

    def __init__(self):
        self.trained, self.validated, self.val_losses = [], [], []

    def on_train_batch_end(self, trainer, *args):
        self.trained.append(tensors(trainer.lightning_module))

    def on_validation_end(self, trainer, *args):
        self.validated.append(tensors(trainer.lightning_module))
        self.val_losses.append(trainer.callback_metrics["val_loss"].item())


def tensors(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def mean(samples):
    return {name: torch.stack([s[name] for s in samples]).double().mean(0) for name in samples[0]}


def run(path, callback, *more, module=ValidatedModule, max_epochs=4, **arguments):
    records = Records()
    arguments = {"val_dataloaders": data(8), "num_sanity_val_steps": 0, **arguments}
    runner = fit(path, callback, records, *more, module=module(), max_epochs=max_epochs, **arguments)
    return runner, records


def averaged_names(samples):
    return [name for name in samples if "num_batches" not in name and name != "last_mean"]


@pytest.mark.parametrize("module", [ValidatedModule, NormModule])
def test_validation_and_the_end_have_the_mean_of_the_window(tmp_path, module):
    runner, records = run(tmp_path, averaging(), module=module)
    plain, plain_records = run(tmp_path, averaging(average=False), module=module)
    for ours, theirs in zip(records.trained, plain_records.trained, strict=True):
        assert_equal(ours.values(), theirs.values())  # averages change nothing in training
    for number, validated in enumerate(records.validated):
        last = 8 * (number + 1)
        expected = mean(records.trained[8:last] or records.trained[last - 1 : last])
        for name in averaged_names(validated):
            assert_close([validated[name].double()], [expected[name]], 1e-6)
    final = tensors(runner.lightning_module)
    assert_equal(final.values(), records.validated[-1].values())
    for name in set(final) - set(averaged_names(final)):
        assert_equal([final[name]], [tensors(plain.lightning_module)[name]])


@pytest.mark.parametrize("weights_only", [False, True], ids=["everything", "weights"])
def test_a_checkpoint_is_the_model_that_was_validated(tmp_path, weights_only):
    saves = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_weights_only=weights_only)
    _, records = run(tmp_path, averaging(), saves, module=NormModule, enable_checkpointing=True)
    for number, val_loss in enumerate(records.val_losses):
        module = NormModule()
        module.load_state_dict(torch.load(tmp_path / f"step={8 * (number + 1)}.ckpt", weights_only=True)["state_dict"])
        (found,) = trainer(tmp_path).validate(module, data(8), verbose=False)
        assert found["val_loss"] == val_loss


def test_a_checkpoint_outside_of_validation_has_averages_and_leaves_training_alone(tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    _, records = run(tmp_path, averaging(), saves, enable_checkpointing=True)
    _, plain = run(tmp_path, averaging(average=False))
    assert_equal(records.trained[-1].values(), plain.trained[-1].values())
    state = torch.load(tmp_path / "step=15.ckpt", weights_only=True)["state_dict"]
    assert_close([t.double() for t in state.values()], list(mean(records.trained[8:15]).values()), 1e-6)


SETTINGS = {
    "fp32": {},
    "bf16-true": {
        "module": Module,
        "precision": "bf16-true",
        "train_dataloaders": lambda: data(dtype=torch.bfloat16),
        "val_dataloaders": lambda: None,
    },
    "bf16-mixed": {"precision": "bf16-mixed"},
    "accumulate": {"accumulate_grad_batches": 2},
    "manual, two optimizers": {"module": ManualModule, "val_dataloaders": lambda: None},
    "BatchNorm": {"module": NormModule},
    "unknown length": {"callback": {"num_steps": None}},
    "window after the checkpoint": {"callback": {"fraction": 0.1}},
}


def settings_of(name):
    setting = {**SETTINGS[name]}
    arguments = {"module": setting.pop("module", ValidatedModule), "callback": averaging(**setting.pop("callback", {}))}
    arguments |= {key: value() if callable(value) else value for key, value in setting.items()}
    return arguments


def everything(runner):
    states = [optimizer.state[p] for optimizer in runner.optimizers for p in optimizer.state]
    return [*tensors(runner.lightning_module).values(), *(t for state in states for t in state.values())]


@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_equal_to_the_bit(tmp_path, name):
    def resumable(**more):
        saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        arguments = settings_of(name)
        return run(tmp_path, arguments.pop("callback"), saves, enable_checkpointing=True, **arguments, **more)

    whole, records = resumable()
    resumed, rest = resumable(ckpt_path=tmp_path / "epoch=1.ckpt", num_sanity_val_steps=2)
    assert resumed.global_step == whole.global_step
    half = len(records.trained) // 2
    for ours, theirs in zip(records.trained[half:], rest.trained, strict=True):
        assert_equal(ours.values(), theirs.values())
    assert_equal(everything(whole), everything(resumed))


def test_without_averages_a_resumed_run_goes_on_with_the_trained_weights(tmp_path):
    half, _ = run(tmp_path, averaging(num_steps=32), max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    plain, _ = run(tmp_path, averaging(average=False, num_steps=32))
    resumed, _ = run(tmp_path, averaging(average=False, num_steps=32), ckpt_path=tmp_path / "half.ckpt")
    assert_equal(weights(resumed), weights(plain))


def test_averages_begin_where_a_checkpoint_without_them_was_resumed(tmp_path):
    half, _ = run(tmp_path, averaging(average=False, num_steps=32), max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, records = run(tmp_path, averaging(num_steps=32), ckpt_path=tmp_path / "half.ckpt")
    expected = mean(records.trained)
    assert_close([w.double() for w in weights(resumed)], list(expected.values()), 1e-6)


def test_manual_optimization_of_several_optimizers_with_a_known_length(tmp_path):
    runner, records = run(tmp_path, averaging(0.5, num_steps=32), module=ManualModule, val_dataloaders=None)
    assert runner.global_step == 2 * 32
    expected = mean([*records.trained[16:17], *(r for r in records.trained[17:] for _ in range(2))])
    assert_close([w.double() for w in weights(runner)], list(expected.values()), 1e-6)


def test_bfloat16_weights_are_averaged_in_float32(tmp_path):
    arguments = {"precision": "bf16-true", "train_dataloaders": data(dtype=torch.bfloat16), "val_dataloaders": None}
    runner, records = run(tmp_path, averaging(), module=Module, **arguments)
    expected = {name: value.bfloat16() for name, value in mean(records.trained[8:]).items()}
    differing = sum(int((w != e).sum()) for w, e in zip(weights(runner), expected.values(), strict=True))
    assert differing <= 1  # a mean in the middle of two bfloat16 numbers may be rounded to either


def test_where_early_stopping_may_end_the_run_the_window_grows(tmp_path):
    stops = EarlyStopping("val_loss", mode="max", patience=1)  # after the second epoch, since the loss falls
    runner, records = run(tmp_path, averaging(0.1), stops, max_epochs=40)
    assert runner.global_step == 16
    steps = torch.arange(1, 17, dtype=torch.float64)
    moved = [(w.double() - t).abs().sum() for w, t in zip(weights(runner), records.trained[-1].values(), strict=True)]
    assert sum(moved) > 0
    shares = [min(1.0, 1 / (0.1 * step)) for step in steps.tolist()]
    expected = mean(records.trained[:1])
    for share, trained in zip(shares, records.trained, strict=True):
        expected = {name: value + share * (trained[name] - value) for name, value in expected.items()}
    assert_close([w.double() for w in weights(runner)], list(expected.values()), 1e-6)


class Half(ValidatedModule):
    """Trains its last layer alone."""

    def __init__(self):
        super().__init__(lambda module: adamw(module.net[2]))
        self.net[0].requires_grad_(False)


def test_frozen_weights_are_not_copied(tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="last")
    run(tmp_path, averaging(), saves, module=Half, enable_checkpointing=True)
    record = torch.load(tmp_path / "last.ckpt", weights_only=True)["lopt_averaged_weights"]
    assert set(record["training"]) == {"net.2.weight", "net.2.bias"}


class Replaces(L.Callback):
    """Puts a wider last layer into the module after the second epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.net[0] = nn.Linear(4, 6)
            pl_module.net[2] = nn.Linear(6, 1)
            trainer.strategy.setup_optimizers(trainer)


def test_layers_that_are_replaced_start_averages_of_their_own(tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    runner, records = run(tmp_path, averaging(), Replaces(), saves, enable_checkpointing=True)
    record = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["lopt_averaged_weights"]
    assert set(record["training"]) == {"net.2.bias"}  # which alone has its shape still
    assert all(torch.isfinite(w).all() for w in weights(runner))
    assert runner.lightning_module.net[0].weight.shape == (6, 4)


def test_a_checkpoint_made_after_the_fit_resumes_to_the_bit(tmp_path):
    whole, _ = run(tmp_path, averaging(num_steps=32))
    half, _ = run(tmp_path, averaging(num_steps=32), max_epochs=2)
    half.save_checkpoint(tmp_path / "after.ckpt")
    assert_equal(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"].values(), weights(half))
    resumed, _ = run(tmp_path, averaging(num_steps=32), ckpt_path=tmp_path / "after.ckpt")
    assert_equal(everything(resumed), everything(whole))


def test_after_the_fit_other_weights_of_the_users_are_saved_as_they_are(tmp_path):
    runner, _ = run(tmp_path, averaging())
    with torch.no_grad():
        runner.lightning_module.net[0].weight.zero_()
    runner.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert_equal([saved["state_dict"]["net.0.weight"]], [torch.zeros(8, 4)])
    assert "lopt_averaged_weights" not in saved


@pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model")
@pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint")
@pytest.mark.parametrize("where", ["training", "validation"])
def test_an_exception_leaves_averages_and_a_checkpoint_with_both(tmp_path, where):
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 15 and where == "training":
                raise ZeroDivisionError

        def on_validation_batch_end(self, trainer, *args):
            if trainer.global_step == 16 and where == "validation":
                raise ZeroDivisionError

    records, module = Records(), ValidatedModule()
    callbacks = (averaging(), records, Fails(), OnExceptionCheckpoint(tmp_path))
    runner = trainer(tmp_path, *callbacks, max_epochs=4, enable_checkpointing=True)
    with pytest.raises(ZeroDivisionError):
        runner.fit(module, data(), data())
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    expected = list(mean(records.trained[8:]).values())
    for state in (tensors(module), saved["state_dict"]):
        assert_close([t.double() for t in state.values()], expected, 1e-6)
    assert_equal(saved["lopt_averaged_weights"]["training"].values(), records.trained[-1].values())


def test_nothing_is_averaged_unless_somebody_asks(tmp_path):
    runner, records = run(tmp_path, lopt.LearnedOptimizer(star()))
    assert_equal(weights(runner), records.trained[-1].values())
    assert "lightning_module_state_dict" not in vars(runner.strategy)
    asked, trained = run(tmp_path, lopt.LearnedOptimizer(star(), average=True))  # the last fifth of 32 steps
    assert_close([w.double() for w in weights(asked)], list(mean(trained.trained[-6:]).values()), 1e-6)


def test_the_strategy_gets_its_methods_back(tmp_path):
    runner, _ = run(tmp_path, averaging())
    assert not {"lightning_module_state_dict", "on_validation_end"} & set(vars(runner.strategy))


def test_a_second_fit_goes_on_from_the_averages(tmp_path):
    runner, records = run(tmp_path, averaging())
    before = weights(runner)
    runner.fit_loop.max_epochs = 5
    starts = []
    runner.callbacks.append(StartOf(starts))
    runner.fit(runner.lightning_module, data(), data(8))
    assert_equal(starts[0], before)
    assert isinstance(runner.optimizers[0], RuleOptimizer)


class StartOf(L.Callback):
    def __init__(self, starts):
        self.starts = starts

    def on_train_start(self, trainer, *args):
        self.starts.append(weights(trainer))


def test_the_start_of_a_fit_says_what_it_takes(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(tmp_path, averaging(), max_epochs=1)
        run(tmp_path, averaging(average=False), max_epochs=1)
    said = [record.message for record in caplog.records if "trains 49 parameters" in record.message]
    assert "averaged over the last 0.75 of the run (4.0 more bytes per parameter from there on" in said[0]
    assert "averaged" not in said[1]


@pytest.mark.parametrize("average", ["yes", None, 0.1, "True"])
def test_other_values_are_refused(average):
    with pytest.raises(ValueError, match=r"average=.* is not allowed: use one of \[True, False, 'rule'\]"):
        lopt.LearnedOptimizer(star(), average=average)


def test_a_second_callback_that_averages_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging both average the weights: remove"):
        fit(tmp_path, averaging(), StochasticWeightAveraging(1e-2), module=Module())
    fit(tmp_path, averaging(average=False), StochasticWeightAveraging(1e-2), module=Module())
