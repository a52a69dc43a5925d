"""VeLO through Lightning: the run's length comes from the Trainer, the loss is the mean of all processes."""

import math

import pytest
import torch
from contract_table import mix_a_momentum_through
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_cases import KNOWN_WARNINGS, ManualModule, Module, Report, Sharded, fit, reports, trainer, weights
from optimizer_cases import assert_close, assert_equal
from torch import nn

import lightning_lopt as lopt

pytestmark = KNOWN_WARNINGS

TWO = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}


def velo(**config):
    """With random meta-parameters, all of which act."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rule = lopt.rules.make("velo", **{"lstm_hidden_size": 8, "param_inits": 4, "step_mult": 1e-2, **config})
        for value in rule.parameters():
            nn.init.normal_(value, std=0.3)
    return rule


def test_trains_with_the_length_from_the_trainer(tmp_path):
    rule = lopt.rules.make("velo", lstm_hidden_size=8, param_inits=4, step_mult=3e-2)
    mix_a_momentum_through(rule)
    runner = fit(tmp_path, lopt.LearnedOptimizer(rule), max_epochs=12)
    losses, (optimizer,) = runner.lightning_module.losses, runner.optimizers
    assert optimizer.num_steps == runner.global_step == 96
    assert sum(losses[-8:]) < 0.2 * sum(losses[:8])
    state = optimizer.state[next(runner.lightning_module.parameters())]
    assert int(state["run_steps"]) == int(state["run_seen"]) == 96


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"max_time": "00:00:10:00"}, "a Timer or max_time may end it"),
        ({"module": ManualModule}, "manual optimization of several optimizers"),
    ],
    ids=["timer", "manual"],
)
def test_a_length_that_nobody_knows_is_refused_before_the_first_step(tmp_path, arguments, reason):
    module = arguments.pop("module", Module)()
    before = [param.detach().clone() for param in module.parameters()]
    with pytest.raises(MisconfigurationException, match=f"Rule 'velo' must know the length of the run.*{reason}. Pass"):
        fit(tmp_path, lopt.LearnedOptimizer(velo()), module=module, **arguments)
    assert_equal(before, list(module.parameters()))
    fit(tmp_path, lopt.LearnedOptimizer(velo(), num_steps=16), module=module, **arguments)


def test_other_rules_do_without(tmp_path):
    fit(tmp_path, lopt.LearnedOptimizer(lopt.rules.make("hyperparam")), max_time="00:00:10:00")


def test_resume_is_equal_to_the_bit(tmp_path):
    """The run's averages and count included; accumulation by Lightning, too."""

    def run(**arguments):
        saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callback = lopt.LearnedOptimizer(velo())
        return fit(tmp_path, callback, saved, max_epochs=4, enable_checkpointing=True, **arguments)

    for accumulate in (1, 2):
        whole = run(accumulate_grad_batches=accumulate)
        resumed = run(accumulate_grad_batches=accumulate, ckpt_path=tmp_path / "epoch=1.ckpt")
        assert_equal(weights(whole), weights(resumed))
        for ours, theirs in zip(*(runner.optimizers[0].state.values() for runner in (whole, resumed)), strict=True):
            assert ours.keys() == theirs.keys()
            assert_equal(ours.values(), theirs.values())
        for file in tmp_path.glob("*.ckpt"):
            file.unlink()


def test_a_rule_from_a_directory_by_name(tmp_path):
    path = lopt.save_rule(velo(), tmp_path / "velo")
    by_name = fit(tmp_path, lopt.LearnedOptimizer(str(path)))
    assert_equal(weights(by_name), weights(fit(tmp_path, lopt.LearnedOptimizer(velo()))))


def test_two_processes_are_one_with_the_double_batch(tmp_path):
    """The LSTM sees the mean of their losses; without it the ranks would drift apart."""

    def run(path, **arguments):
        path.mkdir()
        trainer(path, lopt.LearnedOptimizer(velo(weight_decay=1e-2, step_mult=1e-4)), Report(path), **arguments).fit(
            Sharded()
        )
        return reports(path, arguments.get("devices", 1))

    ranks = run(tmp_path / "two", **TWO)
    (one,) = run(tmp_path / "one")
    assert ranks[0]["losses"] != ranks[1]["losses"]
    for key in ("weights", "state"):
        assert_equal(ranks[0][key], ranks[1][key])
    assert_close(ranks[0]["weights"], one["weights"], 1e-5)
    assert all(math.isfinite(loss) for loss in one["losses"])
