"""Bad input to LearnedOptimizer gives one-line errors: what came, what is allowed, what to do."""

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_cases import KNOWN_WARNINGS, Module, data, fit, learned, trainer
from optimizer_cases import star
from torch import nn

import lightning_lopt as lopt

pytestmark = KNOWN_WARNINGS


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rule": 3}, TypeError, r"rule must be an UpdateRule or the name of one, got int.*rules.make\(kind\)"),
        ({"rule": "no_such_rule"}, ValueError, r"no_such_rule"),
        ({"lr": 1e-3}, ValueError, r"lr=0.001 is not allowed: use one of \['ignore', 'scale'\]"),
        (
            {"weight_decay": 0.1},
            ValueError,
            r"weight_decay=0.1 is not allowed: use one of \['rule', 'ignore', 'decoupled'\]",
        ),
        ({"reference_lr": 0.1}, ValueError, r"reference_lr=0.1 has no effect with lr='ignore': use it with lr='scale'"),
        ({"lr": "scale", "reference_lr": 0.0}, ValueError, r"reference_lr=0.0 .* must be a positive finite number"),
        ({"only": 0}, ValueError, r"only=0 is not allowed: use a list of positions and optimizer classes"),
        ({"skip": ["AdamW"]}, ValueError, r"skip=\['AdamW'\] is not allowed: use a list of positions and optimizer"),
        ({"safeguard": "yes"}, ValueError, r"safeguard='yes' is not allowed"),
        ({"backend": "triton"}, ValueError, r"backend='triton' is not allowed"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        lopt.LearnedOptimizer(**{"rule": star(), **arguments})
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_an_error_at_once():
    with pytest.raises(ValueError, match="no_such_rule"):
        lopt.LearnedOptimizer.from_pretrained("no_such_rule")


def test_two_learned_optimizers_are_refused_by_lightning(tmp_path):
    with pytest.raises(RuntimeError, match=r"more than one stateful callback of type `LearnedOptimizer`"):
        trainer(tmp_path, learned(), learned())


def test_a_module_without_configure_optimizers_is_refused_by_lightning(tmp_path):
    class Bare(L.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(MisconfigurationException, match=r"No `configure_optimizers\(\)` method defined"):
        trainer(tmp_path, learned()).fit(Bare(), data())


@pytest.mark.parametrize(
    ("name", "advice"), [("DeepSpeedStrategy", "DeepSpeed owns"), ("FSDPStrategy", "FSDP1 flattens")]
)
def test_strategies_that_flatten_parameters_are_refused_by_name(tmp_path, name, advice):
    strategy = type(name, (SingleDeviceStrategy,), {})("cpu")
    runner = trainer(tmp_path, learned(), strategy=strategy)
    with pytest.raises(MisconfigurationException, match=f"does not work with {name}: {advice}.*use") as caught:
        runner.fit(Module(), data())
    assert "\n" not in str(caught.value)
    assert "setup_optimizers" not in vars(strategy)


def test_fsdp1_is_refused_by_lightning_without_an_accelerator(tmp_path):
    with pytest.raises(ValueError, match="strategy `fsdp` requires a GPU accelerator"):
        trainer(tmp_path, learned(), strategy="fsdp")


def test_a_strategy_that_makes_optimizers_in_its_own_way_is_found_out(tmp_path):
    class Own(SingleDeviceStrategy):
        def setup_optimizers(self, trainer):
            pass

        def setup(self, trainer):
            super().setup(trainer)
            self.optimizers = [self.lightning_module.configure_optimizers()]

    strategy = Own("cpu")
    message = "could not replace AdamW under Own: the strategy sets up optimizers in its own way. Use single-device"
    with pytest.raises(MisconfigurationException, match=message) as caught:
        trainer(tmp_path, learned(), strategy=strategy).fit(Module(), data())
    assert "\n" not in str(caught.value)
    assert "setup_optimizers" not in vars(strategy)


def saved(path, callback):
    fit(path, callback, max_epochs=1).save_checkpoint(path / "saved.ckpt")
    return path / "saved.ckpt"


def test_an_adamw_checkpoint_is_refused(tmp_path):
    checkpoint = saved(tmp_path, L.Callback())
    with pytest.raises(ValueError, match="state of another optimizer.*Load the model's weights alone") as caught:
        fit(tmp_path, ckpt_path=checkpoint)
    assert "\n" not in str(caught.value)


def test_the_weights_of_an_adamw_checkpoint_can_be_loaded_alone(tmp_path):
    module = Module()
    module.load_state_dict(torch.load(saved(tmp_path, L.Callback()), weights_only=True)["state_dict"])
    fit(tmp_path, module=module)


def test_our_checkpoint_in_a_plain_trainer(tmp_path):
    # Out of our hands: nothing of ours is there. Lightning names the missing callback, then torch's AdamW fails.
    checkpoint = saved(tmp_path, learned())
    with (
        pytest.warns(UserWarning, match=r"add the following callbacks: \['LearnedOptimizer'\]"),
        pytest.raises(RuntimeError, match=r"doesn't match the broadcast shape \[3, 8, 4\]"),
    ):
        fit(tmp_path, L.Callback(), ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"kind": "blackbox"},
            "rule of kind star, and LearnedOptimizer has kind blackbox. Pass the rule that was saved",
        ),
        ({"kind": "star", "step_mult": 0.5}, r"rule of config \{.*\}, and LearnedOptimizer has config"),
    ],
    ids=["kind", "config"],
)
def test_a_checkpoint_of_another_rule_is_refused(tmp_path, config, message):
    checkpoint = saved(tmp_path, learned())
    callback = lopt.LearnedOptimizer(lopt.rules.make(**config))
    with pytest.raises(MisconfigurationException, match=message) as caught:
        fit(tmp_path, callback, ckpt_path=checkpoint)
    assert "\n" not in str(caught.value)


def test_sparse_gradients(tmp_path):
    class Sparse(Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 1, sparse=True)

        def loss(self, batch):
            return super().loss(batch) + self.embedding(torch.tensor([0])).sum()

    with pytest.raises(RuntimeError, match="shape \\(4, 1\\) is torch.sparse_coo.*sparse=False") as caught:
        fit(tmp_path, module=Sparse())
    assert "\n" not in str(caught.value)


def test_complex_parameters(tmp_path):
    class Complex(Module):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    with pytest.raises(ValueError, match=r"shape \(2,\) is torch.complex64.*view_as_real") as caught:
        fit(tmp_path, module=Complex())
    assert "\n" not in str(caught.value)
