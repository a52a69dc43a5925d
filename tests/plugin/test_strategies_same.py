"""The callback's behavior through Trainer(strategy="lopt") and "lopt_ddp_fork", bit for bit."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.tuner import Tuner
from lightning_cases import (
    FORMS,
    KNOWN_WARNINGS,
    ManualModule,
    Module,
    Report,
    Sharded,
    csv_logger,
    data,
    fit,
    learned,
    metrics,
    reports,
    trainer,
    weights,
)
from optimizer_cases import assert_equal, star

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer

pytestmark = KNOWN_WARNINGS


@pytest.fixture(autouse=True)
def _named(tmp_path, monkeypatch):
    """The names "lopt" and "lopt_ddp_fork" with the tests' own rule as their default."""
    rule = str(lopt.save_rule(star(), tmp_path / "rule"))
    for name in ("lopt", "lopt_ddp_fork"):
        monkeypatch.setitem(StrategyRegistry[name]["init_params"], "name_or_path", rule)


def by_name(path, *callbacks, **arguments):
    return fit(path, *(callbacks or (L.Callback(),)), strategy="lopt", **arguments)


@pytest.mark.parametrize("configure", FORMS.values(), ids=FORMS)
def test_every_form_of_configure_optimizers(tmp_path, configure):
    runner = by_name(tmp_path, module=Module(configure))
    other = fit(tmp_path, learned(), module=Module(configure))
    assert [type(o) for o in runner.optimizers] == [RuleOptimizer]
    assert runner.lightning_module.lrs == other.lightning_module.lrs
    assert_equal(weights(runner), weights(other))


OTHERS = {
    "swa": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1),
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "early stopping": lambda: EarlyStopping("loss", patience=50),
    "learning-rate monitor": lambda: LearningRateMonitor("step"),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_callbacks(tmp_path, make):
    arguments = {"logger": csv_logger(tmp_path), "max_epochs": 3}
    runner = by_name(tmp_path, make(), **arguments)
    assert any("lopt/update_rms" in row for row in metrics(tmp_path))
    assert_equal(weights(runner), weights(fit(tmp_path, learned(), make(), **arguments)))


def test_backbone_finetuning(tmp_path):
    module = Module(lambda m: torch.optim.AdamW(m.net[2].parameters(), lr=1e-2))
    module.backbone = module.net[0]
    runner = by_name(tmp_path, BackboneFinetuning(1, backbone_initial_lr=1e-3, should_align=False), module=module)
    assert [group["lopt_kind"] for group in runner.optimizers[0].param_groups] == ["star", "star"]


def test_the_tuner(tmp_path):
    module = Module()
    module.lr = 1e-2
    runner = trainer(tmp_path, strategy="lopt")
    with pytest.warns(UserWarning, match="nothing to find: LearnedOptimizer ignores lr"):
        Tuner(runner).lr_find(module, data(), num_training=6, update_attr=False)
    assert "setup_optimizers" not in vars(runner.strategy)


def test_optimizers_made_anew_and_exceptions(tmp_path):
    class Anew(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.strategy.setup_optimizers(trainer)
                assert [type(o) for o in trainer.optimizers] == [RuleOptimizer]
                raise ZeroDivisionError

    runner = trainer(tmp_path, Anew(), strategy="lopt")
    with pytest.raises(ZeroDivisionError):
        runner.fit(Module(), data())
    assert not {"setup_optimizers", "backward"} & set(vars(runner.strategy))


SETTINGS = {
    "fp32": {},
    "bf16-true": {"precision": "bf16-true", "train_dataloaders": data(dtype=torch.bfloat16)},
    "accumulate and clip": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    "manual": {"module": ManualModule},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_equal_to_the_bit(tmp_path, name):
    arguments = dict(SETTINGS[name])
    make = arguments.pop("module", Module)
    by_name(tmp_path, module=make(), max_epochs=1, **arguments).save_checkpoint(tmp_path / "saved.ckpt")
    resumed = by_name(tmp_path, module=make(), ckpt_path=tmp_path / "saved.ckpt", **arguments)
    assert_equal(weights(resumed), weights(by_name(tmp_path, module=make(), **arguments)))


def two_processes(path, *callbacks, ckpt_path=None, **arguments):
    path.mkdir(exist_ok=True)
    runner = trainer(path, *callbacks, Report(path), devices=2, use_distributed_sampler=False, **arguments)
    runner.fit(Sharded(), ckpt_path=ckpt_path)
    return reports(path)


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}], ids=str)
def test_two_processes(tmp_path, arguments):
    ours = two_processes(tmp_path / "name", strategy="lopt_ddp_fork", **arguments)
    other = two_processes(tmp_path / "callback", learned(), strategy="ddp_fork", **arguments)
    for rank in range(2):
        assert ours[rank]["optimizers"] == ["RuleOptimizer"]
        for key in ("weights", "state"):
            assert_equal(ours[rank][key], other[0][key])


def test_two_processes_resume(tmp_path):
    arguments = {"strategy": "lopt_ddp_fork", "enable_checkpointing": True}
    saves = [ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1) for _ in range(2)]
    whole = two_processes(tmp_path / "whole", saves[0], **arguments)
    resumed = two_processes(tmp_path / "resumed", saves[1], ckpt_path=tmp_path / "epoch=0.ckpt", **arguments)
    assert len(resumed[0]["losses"]) == 4
    for key in ("weights", "state"):
        assert_equal(whole[0][key], resumed[0][key])
        assert_equal(whole[0][key], resumed[1][key])
