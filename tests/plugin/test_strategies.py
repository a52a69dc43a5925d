"""Trainer(strategy="lopt") and "lopt_ddp" do what the callback does."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.fabric import Fabric
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_cases import (
    KNOWN_WARNINGS,
    ManualModule,
    Module,
    ValidatedModule,
    data,
    fit,
    learned,
    trainer,
    weights,
)
from optimizer_cases import assert_equal, star

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.plugin import callback as callback_module
from lightning_lopt.plugin.strategies import LearnedSingleDevice

pytestmark = KNOWN_WARNINGS
DDP = ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")


@pytest.fixture
def saved_rule(tmp_path):
    return str(lopt.save_rule(star(), tmp_path / "rule"))


@pytest.fixture
def named(saved_rule, monkeypatch):
    """The name "lopt" with the saved rule as its default."""
    for name in ("lopt",):
        monkeypatch.setitem(StrategyRegistry[name]["init_params"], "name_or_path", saved_rule)


def strategy_fit(path, strategy, module=None, **arguments):
    runner = trainer(path, strategy=strategy, **arguments)
    runner.fit(module or Module(), data())
    return runner


@pytest.mark.parametrize("registry", [StrategyRegistry, pytorch_lightning.strategies.StrategyRegistry])
def test_each_ddp_strategy_of_lightning_has_its_counterpart(registry):
    theirs = [name for name in registry.available_strategies() if name.partition("_find")[0] in DDP]
    assert len(theirs) == 12
    for name in theirs:
        assert registry[f"lopt_{name}"]["init_params"] == registry[name]["init_params"]
        assert issubclass(registry[f"lopt_{name}"]["strategy"], registry[name]["strategy"])


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("module", [Module, ManualModule])
def test_one_device_is_the_callback_to_the_bit(tmp_path, module):
    by_name = strategy_fit(tmp_path, "lopt", module())
    by_callback = fit(tmp_path, learned(), module=module())
    assert type(by_name.strategy) is LearnedSingleDevice
    assert by_name.strategy.root_device == torch.device("cpu")
    assert_equal(weights(by_name), weights(by_callback))


@pytest.mark.parametrize(
    "options",
    [{"lr": "scale"}, {"weight_decay": "decoupled"}, {"safeguard": False}, {"average": True}, {"device": "cpu"}],
    ids=str,
)
def test_options_are_those_of_the_callback_and_the_base(tmp_path, saved_rule, options):
    runner = strategy_fit(tmp_path, LearnedSingleDevice(saved_rule, **options))
    callback_options = {name: value for name, value in options.items() if name != "device"}
    assert_equal(weights(runner), weights(fit(tmp_path, learned(**callback_options))))


@pytest.mark.usefixtures("named")
def test_checkpoints_go_from_one_to_the_other(tmp_path):
    strategy_fit(tmp_path, "lopt", max_epochs=1).save_checkpoint(tmp_path / "name.ckpt")
    fit(tmp_path, learned(), max_epochs=1).save_checkpoint(tmp_path / "callback.ckpt")
    whole = fit(tmp_path, learned())
    by_callback = fit(tmp_path, learned(), ckpt_path=tmp_path / "name.ckpt")
    by_name = trainer(tmp_path, strategy="lopt")
    by_name.fit(Module(), data(), ckpt_path=tmp_path / "callback.ckpt")
    for runner in (by_callback, by_name):
        assert_equal(weights(runner), weights(whole))


@pytest.mark.usefixtures("named")
def test_a_second_fit_and_validation(tmp_path):
    runner = trainer(tmp_path, strategy="lopt")
    module = ValidatedModule()
    runner.validate(module, data(), verbose=False)
    runner.fit(module, data(), data())
    runner.fit_loop.max_epochs = 3
    runner.fit(module, data(), data())
    assert isinstance(runner.optimizers[0], RuleOptimizer)
    assert sum(isinstance(callback, lopt.LearnedOptimizer) for callback in runner.callbacks) == 1


@pytest.mark.usefixtures("named")
def test_several_devices_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(MisconfigurationException, match="runs on one device, got 2; use strategy='lopt_ddp'") as caught:
        trainer(tmp_path, strategy="lopt", devices=2)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("named")
def test_a_callback_beside_the_strategy_is_refused(tmp_path):
    runner = trainer(tmp_path, learned(), strategy="lopt")
    with pytest.raises(
        MisconfigurationException, match="either the LearnedOptimizer callback or strategy='lopt', not both"
    ) as caught:
        runner.fit(Module(), data())
    assert "\n" not in str(caught.value)


def test_an_unknown_rule_is_an_error_before_training(tmp_path):
    with pytest.raises(ValueError, match="no_such_rule"):
        strategy_fit(tmp_path, LearnedSingleDevice("no_such_rule"))


REMEMBERS = """
import sys
from pathlib import Path
from lightning_cases import Module, data, trainer

module, runner = Module(), trainer(sys.argv[1], strategy="lopt_ddp", devices=2)
runner.fit(module, data())
names = [type(optimizer).__name__ for optimizer in runner.optimizers]
Path(sys.argv[1], f"rank{runner.global_rank}.txt").write_text(f"{len(module.losses)} {names}")
"""


@pytest.mark.slow
def test_what_a_module_remembers_in_python_survives_the_fit(tmp_path):
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    imports = f"import sys; sys.path[:0] = {folders!r}; import lightning_lopt\n"
    (tmp_path / "script.py").write_text(imports + REMEMBERS)
    subprocess.run([sys.executable, "script.py", str(tmp_path)], cwd=tmp_path, check=True, timeout=280)
    assert (tmp_path / "rank0.txt").read_text() == "8 ['RuleOptimizer']"  # rank 0 is the process that was started


@pytest.mark.parametrize("name", ["lopt", "lopt_ddp"])
def test_fabric_is_told_what_to_do_instead(name):
    with pytest.raises(
        MisconfigurationException, match=r"with Fabric .* Use lightning_lopt.RuleOptimizer\(.*fabric.setup"
    ):
        Fabric(accelerator="cpu", strategy=name)


def test_a_module_may_bring_the_callback(tmp_path):
    class Brings(Module):
        def configure_callbacks(self):
            return [learned()]

    runner = fit(tmp_path, L.Callback(), module=Brings())
    assert_equal(weights(runner), weights(fit(tmp_path)))


class Other(pytorch_lightning.LightningModule):
    """A module of the `pytorch_lightning` namespace, whose classes are not those of `lightning`."""

    def __init__(self):
        super().__init__()
        self.net = Module().net

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def other_fit(path, *callbacks, module=None, ckpt_path=None, **arguments):
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    arguments = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, **off, **arguments}
    runner = pytorch_lightning.Trainer(default_root_dir=path, callbacks=list(callbacks), **arguments)
    runner.fit(module or Other(), data(), ckpt_path=ckpt_path)
    return runner


def test_the_callback_in_a_trainer_of_pytorch_lightning(tmp_path):
    runner = other_fit(tmp_path, learned(), log_every_n_steps=1)
    assert [type(o) for o in runner.optimizers] == [RuleOptimizer]
    assert "lopt/update_rms" in runner.callback_metrics
    assert "setup_optimizers" not in vars(runner.strategy)
    assert_equal(weights(runner), weights(fit(tmp_path)))


def test_resume_in_a_trainer_of_pytorch_lightning(tmp_path):
    other_fit(tmp_path, learned(), max_epochs=1).save_checkpoint(tmp_path / "saved.ckpt")
    resumed = other_fit(tmp_path, learned(), ckpt_path=tmp_path / "saved.ckpt")
    assert_equal(weights(resumed), weights(other_fit(tmp_path, learned())))


def test_the_strategy_by_name_in_a_trainer_of_pytorch_lightning(tmp_path):
    runner = other_fit(tmp_path, strategy="lopt")
    assert [type(o) for o in runner.optimizers] == [RuleOptimizer]
    assert_equal(weights(runner), weights(fit(tmp_path, lopt.LearnedOptimizer("star"))))


@pytest.mark.parametrize(
    ("version", "needed"), [("1.9.5", False), ("2.5.5", True), ("2.6.6", False), ("3.0", False), (None, False)]
)
def test_the_callback_is_one_of_pytorch_lightnings_where_its_version_asks_for_that(monkeypatch, version, needed):
    def installed(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version if name == "pytorch-lightning" else "2.6.6"

    monkeypatch.setattr(metadata, "version", installed)
    assert callback_module._pytorch_lightnings_callback() == ((pytorch_lightning.Callback,) if needed else ())


def test_no_optimizer_in_a_trainer_of_pytorch_lightning(tmp_path):
    module = Other()
    module.configure_optimizers = lambda: None
    with (
        pytest.warns(UserWarning, match="there is no optimizer for LearnedOptimizer to replace"),
        pytest.warns(UserWarning, match="`LightningModule.configure_optimizers` returned `None`"),
    ):
        other_fit(tmp_path, learned(), module=module)


def test_a_bundled_rule_by_name(tmp_path):
    runner = strategy_fit(tmp_path, "lopt")
    assert runner.optimizers[0].rule.kind == "scheduled"
    by_callback = fit(tmp_path, lopt.LearnedOptimizer.from_pretrained("star"))
    assert_equal(weights(runner), weights(by_callback))
