"""LearnedOptimizer in LightningCLI: YAML files, flags, from_pretrained by class path, and the strategies by name."""

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning_cases import KNOWN_WARNINGS, ManualModule, Module, data, fit, learned, weights
from optimizer_cases import assert_equal, star

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer

pytestmark = [*KNOWN_WARNINGS, pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")]


@pytest.fixture(autouse=True)
def _no_deprecation_warnings(monkeypatch):
    # Lightning's CLI uses what jsonargparse has deprecated.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


class CLIModule(Module):
    """A module that LightningCLI can build: annotated arguments with defaults, and its own data."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width

    def train_dataloader(self):
        return data()


class TwoOptimizers(ManualModule):
    """Two optimizers, an AdamW and an SGD, and its own data."""

    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self):
        return data()


@pytest.fixture
def saved_rule(tmp_path):
    return str(lopt.save_rule(star(), tmp_path / "rule"))


QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def cli_run(module, *args, **arguments):
    return LightningCLI(module, args=list(args), save_config_callback=None, seed_everything_default=False, **arguments)


def run(path, trainer, *flags, module=CLIModule, model=None, **arguments):
    config = {"trainer": {**QUIET, **trainer}, **({"model": model} if model else {})}
    file = path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return cli_run(module, "fit", f"--config={file}", *flags, **arguments)


def callback_of(cli):
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, lopt.LearnedOptimizer)]
    return callback


def test_from_pretrained_by_class_path(tmp_path, saved_rule):
    entry = {
        "class_path": "lightning_lopt.LearnedOptimizer.from_pretrained",
        "init_args": {"name_or_path": saved_rule, "lr": "scale", "weight_decay": "decoupled", "average": True},
    }
    cli = run(tmp_path, {"callbacks": [entry]})
    callback = callback_of(cli)
    assert (callback.lr, callback.weight_decay, callback.average) == ("scale", "decoupled", True)
    expected = fit(tmp_path, learned(lr="scale", weight_decay="decoupled", average=True))
    assert_equal(weights(cli.trainer), weights(expected))


def test_a_rule_by_class_path(tmp_path):
    rule = {
        "class_path": "lightning_lopt.rules.STAR",
        "init_args": {
            "config": {"class_path": "lightning_lopt.rules.STARConfig", "init_args": {"step_mult": 0.0}},
            "kind": "hyperparam",
        },
    }
    entry = {"class_path": "lightning_lopt.LearnedOptimizer", "init_args": {"rule": rule, "lr": "scale"}}
    callback = callback_of(run(tmp_path, {"callbacks": [entry]}))
    assert (callback.rule.kind, callback.rule.config.step_mult, callback.lr) == ("hyperparam", 0.0, "scale")


def test_a_rule_by_name(tmp_path):
    init_args = {"rule": "star", "num_steps": 7, "skip": ["torch.optim.SGD", 1], "lr": "scale", "reference_lr": 0.01}
    entry = {"class_path": "lightning_lopt.LearnedOptimizer", "init_args": init_args}
    cli = run(tmp_path, {"callbacks": [entry]}, module=TwoOptimizers)
    callback = callback_of(cli)
    assert callback.rule.source.name == "star"
    assert (callback.num_steps, callback.skip, callback.reference_lr) == (7, [torch.optim.SGD, 1], 0.01)
    assert [type(o) for o in cli.trainer.optimizers] == [RuleOptimizer, torch.optim.SGD]


def test_a_rule_by_make(tmp_path):
    rule = {"class_path": "lightning_lopt.rules.make", "init_args": {"kind": "hyperparam"}}
    entry = {"class_path": "lightning_lopt.LearnedOptimizer", "init_args": {"rule": rule}}
    assert callback_of(run(tmp_path, {"callbacks": [entry]})).rule.kind == "hyperparam"


def test_the_short_name_once_the_package_is_imported(tmp_path):
    rule = {"class_path": "lightning_lopt.load_rule", "init_args": {"name_or_path": "star"}}
    entry = {"class_path": "LearnedOptimizer", "init_args": {"rule": rule}}
    assert callback_of(run(tmp_path, {"callbacks": [entry]})).rule.source.name == "star"


def test_rule_optimizer_as_the_optimizer(tmp_path, saved_rule):
    flags = [
        "--optimizer=lightning_lopt.RuleOptimizer",
        "--optimizer.rule=lightning_lopt.load_rule",
        f"--optimizer.rule.name_or_path={saved_rule}",
        "--optimizer.lr=0.5",
    ]
    with pytest.warns(UserWarning, match="configure_optimizers` will be overridden by `LightningCLI"):
        cli = run(tmp_path, {}, *flags)
    (optimizer,) = cli.trainer.optimizers
    assert (type(optimizer), optimizer.rule.kind, optimizer.param_groups[0]["lr"]) == (RuleOptimizer, "star", 0.5)


def test_one_callback_that_is_not_in_a_list(tmp_path, saved_rule):
    entry = {
        "class_path": "lightning_lopt.LearnedOptimizer.from_pretrained",
        "init_args": {"name_or_path": saved_rule},
    }
    assert callback_of(run(tmp_path, {"callbacks": entry})).rule.kind == "star"


def test_flags(tmp_path, saved_rule):
    cli = run(
        tmp_path,
        {},
        "--trainer.callbacks+=lightning_lopt.LearnedOptimizer.from_pretrained",
        f"--trainer.callbacks.name_or_path={saved_rule}",
        "--trainer.callbacks.lr=scale",
    )
    assert callback_of(cli).lr == "scale"


def test_a_saved_configuration_runs_again(tmp_path, saved_rule):
    entry = {
        "class_path": "lightning_lopt.LearnedOptimizer.from_pretrained",
        "init_args": {"name_or_path": saved_rule, "lr": "scale"},
    }
    first = run(tmp_path, {"callbacks": [entry]})
    text = first.parser.dump(first.config, skip_none=False)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(yaml.safe_load(text)["fit"]))
    second = cli_run(CLIModule, "fit", f"--config={tmp_path / 'again.yaml'}")
    assert callback_of(second).lr == "scale"
    assert_equal(weights(first.trainer), weights(second.trainer))


@pytest.mark.parametrize("mode", ["omegaconf", "omegaconf+"])
def test_interpolation(tmp_path, saved_rule, mode):
    reference = {"omegaconf": "${model.width}", "omegaconf+": "${fit.model.width}"}[mode]
    entry = {
        "class_path": "lightning_lopt.LearnedOptimizer.from_pretrained",
        "init_args": {"name_or_path": saved_rule},
    }
    trainer = {"callbacks": [entry], "log_every_n_steps": reference}
    cli = run(tmp_path, trainer, model={"width": 5}, parser_kwargs={"parser_mode": mode})
    assert cli.trainer.log_every_n_steps == 5
    assert callback_of(cli).rule.kind == "star"


def test_an_optimizer_and_a_scheduler_by_flag_are_taken_over(tmp_path, saved_rule):
    flags = [
        "--optimizer=torch.optim.AdamW",
        "--optimizer.lr=0.02",
        "--lr_scheduler=torch.optim.lr_scheduler.ExponentialLR",
        "--lr_scheduler.gamma=0.5",
        "--trainer.callbacks+=lightning_lopt.LearnedOptimizer.from_pretrained",
        f"--trainer.callbacks.name_or_path={saved_rule}",
    ]
    with pytest.warns(UserWarning, match="configure_optimizers` will be overridden by `LightningCLI"):
        cli = run(tmp_path, {}, *flags)
    assert [type(o) for o in cli.trainer.optimizers] == [RuleOptimizer]
    (config,) = cli.trainer.lr_scheduler_configs
    assert config.scheduler.optimizer is cli.trainer.optimizers[0]
    assert [cli.model.lrs[0], cli.model.lrs[-1]] == [[0.02], [0.005]]


@pytest.mark.parametrize("by", ["class path", "name"])
def test_the_strategy(tmp_path, saved_rule, by):
    strategy = {
        "name": "lopt",
        "class path": {
            "class_path": "lightning_lopt.plugin.strategies.LearnedSingleDevice",
            "init_args": {"name_or_path": saved_rule, "lr": "scale"},
        },
    }[by]
    cli = run(tmp_path, {"strategy": strategy})
    assert [type(o) for o in cli.trainer.optimizers] == [RuleOptimizer]
    assert callback_of(cli).lr == ("scale" if by == "class path" else "ignore")


def mistaken(path, saved_rule, init_args):
    entry = {
        "class_path": "lightning_lopt.LearnedOptimizer.from_pretrained",
        "init_args": {"name_or_path": saved_rule, **init_args},
    }
    run(path, {"callbacks": [entry]})


@pytest.mark.parametrize("init_args", [{"lr": 0.1}, {"nonsense": 1}, {"safeguard": "perhaps"}], ids=str)
def test_arguments_that_do_not_fit_end_with_status_2(tmp_path, saved_rule, capsys, init_args):
    with pytest.raises(SystemExit) as caught:
        mistaken(tmp_path, saved_rule, init_args)
    assert caught.value.code == 2
    assert next(iter(init_args)) in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("name_or_path", "no_such_rule"), ("lr", "fast")])
def test_values_that_are_not_allowed_are_named(tmp_path, saved_rule, name, value):
    with pytest.raises(ValueError, match=value):
        mistaken(tmp_path, saved_rule, {name: value})
