"""MetaTrainer's checkpoints: a resumed run equals an uninterrupted one bit for bit, also on two processes."""

import faulthandler
import os
import socket

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning_cases import KNOWN_WARNINGS
from meta_cases import TWO, Descent, Parabola, assert_reports_equal, fit, meta, meta_params, run, star
from optimizer_cases import assert_equal
from torch.multiprocessing import ProcessRaisedException
from torch.utils._pytree import tree_leaves

from lightning_lopt import MetaTrainer
from lightning_lopt.meta.estimators import PES, ESSingle, FullES, OneStep, TruncatedBackprop
from lightning_lopt.meta.schedules import Horizon

pytestmark = [*KNOWN_WARNINGS, pytest.mark.filterwarnings("ignore:.*save_top_k=-1.*")]
NOISY = Parabola(noise=0.3, random_start=True)

SETTINGS = {
    "plain": ({}, {}),
    "accumulate and clip": ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "validation": ({"validation_tasks": [NOISY]}, {}),
    "turns": ({"tasks": [NOISY, Parabola(name="other"), Parabola(name="third")], "tasks_per_step": 2}, {}),
    "ES-Single": ({"estimator": ESSingle(num_pairs=3, truncation=2, horizon=Horizon(3, 5))}, {}),
    "full ES": ({"estimator": FullES(num_pairs=3, horizon=3)}, {}),
    "truncated": ({"estimator": TruncatedBackprop(num_runs=3, truncation=2, horizon=Horizon(3, 5))}, {}),
    "one step": ({"estimator": OneStep(num_runs=3, horizon=Horizon(3, 5))}, {}),
    "STAR": ({"rule": {"kind": "star"}, "tasks": ["linear-regression"], "trainable": ["w*", "rms_decays"]}, {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_equal_to_the_bit(tmp_path, name):
    options, arguments = SETTINGS[name]
    options = {"tasks": [NOISY], **options}
    whole, _ = run(tmp_path, "whole", meta(**options), **arguments)
    step = 8 // arguments.get("accumulate_grad_batches", 1)
    checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
    assert set(checkpoint["meta_training"]) == {"kind", "config", "best", "tasks", "inner_runs"}
    module = meta(**options)
    for param in module.rule.parameters():
        torch.nn.init.zeros_(param)  # the checkpoint has them
    resume = {"ckpt_path": tmp_path / f"step={step}.ckpt"}
    resumed, runner = run(tmp_path, "resumed", module, **arguments, **resume)
    assert runner.fit_loop.total_batch_idx == 15
    assert_reports_equal(whole, resumed)


@pytest.mark.skipif(
    L.__version__.startswith("2.4."), reason="Lightning 2.4 counts the batches of a resumed epoch otherwise"
)
def test_resume_within_an_epoch_is_equal_to_the_bit(tmp_path):
    whole, _ = run(tmp_path, "whole", meta(tasks=[NOISY]), every=3)
    resumed, _ = run(tmp_path, "resumed", meta(tasks=[NOISY]), every=3, ckpt_path=tmp_path / "step=6.ckpt")
    for key in ("weights", "optimizer", "states"):
        assert_equal(tree_leaves(whole[0][key]), tree_leaves(resumed[0][key]))


# --- Two processes ---


class Plain(MetaTrainer):
    """A MetaTrainer with plain SGD as meta-optimizer, which records its estimates."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def _average(self, grads):
        self.best["estimates"] = [*self.best.get("estimates", []), super()._average(grads)]
        return self.best["estimates"][-1]


def test_two_processes_make_the_mean_of_their_estimates(tmp_path):
    before = meta_params(Descent())
    estimator = FullES(num_pairs=4, horizon=3)
    module = meta(kind=Plain, tasks=[NOISY], steps_per_epoch=1, estimator=estimator)
    ranks, _ = run(tmp_path, "two", module, ranks=2, **TWO)
    assert_equal(*(rank["weights"].values() for rank in ranks))
    estimates = [rank["best"]["estimates"] for rank in ranks]
    assert estimates[0][0] != estimates[1][0]  # inner runs and perturbations of their own
    for name, p in before.items():
        steps = [(a[name] + b[name]) / 2 for a, b in zip(*estimates, strict=True)]
        torch.testing.assert_close(ranks[0]["weights"][name], p - sum(steps), rtol=1e-12, atol=1e-12)


def test_two_processes_resume_equal_to_the_bit(tmp_path):
    options = {"tasks": ["noisy-quadratic"], "validation_tasks": ["rosenbrock"], "export": str(tmp_path / "rule")}
    whole, _ = run(tmp_path, "whole", meta(star(), **options), ranks=2, **TWO)
    assert not torch.equal(whole[0]["states"][0], whole[1]["states"][0])
    resume = {"ckpt_path": tmp_path / "step=8.ckpt"}
    resumed, _ = run(tmp_path, "resumed", meta(star(), **options), ranks=2, **TWO, **resume)
    assert_reports_equal(whole, resumed)
    with pytest.raises(MisconfigurationException, match="runs of 2 processes, and this run has 1. Use 2 processes"):
        run(tmp_path, "one", meta(star(), **options), **resume)


class SaveOnException(Callback):
    """Fails in process 0 only, which then saves a checkpoint while process 1 goes on training."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 0 and trainer.global_step == 2:
            faulthandler.dump_traceback_later(10, exit=True)  # instead of hanging
            raise RuntimeError("only here")

    def on_exception(self, trainer, pl_module, exception):
        if trainer.global_rank == 0:
            trainer.strategy.barrier = lambda *arguments: None  # Lightning's own, after the file has been written
            torch.save(tree_leaves(pl_module._states), self.path / "states.pt")
            trainer.save_checkpoint(self.path / "exception.ckpt")


def fail_in_one_process(rank, path, port):
    """Two processes as torchrun starts them: an exception is handled in the process that raised it."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fit(path, meta(tasks=[NOISY]), SaveOnException(path), strategy="ddp", devices=2)


@pytest.mark.filterwarnings("ignore:.*does not have the inner runs of process 1:UserWarning")
def test_a_checkpoint_that_one_of_two_processes_saves_after_an_exception(tmp_path):
    """It has the inner runs of the process that saved it; the other one starts fresh runs when training resumes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        arguments = (tmp_path, free.getsockname()[1])
    with pytest.raises(ProcessRaisedException, match="only here"):
        torch.multiprocessing.start_processes(fail_in_one_process, arguments, nprocs=2, start_method="fork")
    saved = torch.load(tmp_path / "exception.ckpt", weights_only=True)["meta_training"]["inner_runs"]
    assert_equal(saved[0][0], torch.load(tmp_path / "states.pt", weights_only=True))
    assert saved[1] is None

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            path = tmp_path / f"start{trainer.global_rank}.pt"
            steps = pl_module._states[0].inner.step
            torch.save({"states": tree_leaves(pl_module._states), "steps": steps}, path)

    fit(tmp_path, meta(tasks=[NOISY]), Look(), ckpt_path=tmp_path / "exception.ckpt", **TWO)
    first, second = (torch.load(tmp_path / f"start{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_equal(first["states"], saved[0][0])
    assert first["steps"].max() > 0
    assert second["steps"].max() == 0


# --- What is refused ---


@pytest.fixture
def checkpoint(tmp_path):
    fit(tmp_path, meta(), max_epochs=1).save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tasks": [Parabola(), Parabola()]},
            r"runs on \['parabola'\], not on \['parabola', 'parabola-2'\]. Pass its tasks",
        ),
        ({"estimator": PES(num_pairs=5)}, "runs on 'parabola' have other shapes than those of this estimator and task"),
        ({"estimator": FullES()}, "runs on 'parabola' have other shapes"),
        ({"trainable": ["momentum"]}, "runs on 'parabola' have other shapes"),
        ({"rule": {"kind": "star"}, "tasks": ["quadratic"]}, "rule has kind test_descent, but this one has star"),
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit(tmp_path, checkpoint, options, message):
    with pytest.raises((MisconfigurationException, RuntimeError), match=message):
        fit(tmp_path, meta(**options), ckpt_path=checkpoint)


def test_another_configuration_of_the_rule_is_refused(tmp_path):
    options = {"tasks": ["quadratic"]}
    fit(tmp_path, meta(star(), **options), max_epochs=1).save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(MisconfigurationException, match="rule has config .*'step_mult': 0.0001.* but this one has "):
        fit(tmp_path, meta(star(step_mult=1e-3), **options), ckpt_path=tmp_path / "saved.ckpt")


def test_a_checkpoint_of_another_module_is_refused(tmp_path, checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    del saved["meta_training"]
    torch.save(saved, checkpoint)
    with pytest.raises(MisconfigurationException, match="not made by MetaTrainer"):
        fit(tmp_path, meta(), ckpt_path=checkpoint)


def test_a_second_fit_and_a_module_loaded_by_itself_begin_anew(tmp_path, checkpoint):
    arguments = {"rule": Descent(), "tasks": [Parabola(noise=0.1)], "estimator": meta().estimator, "steps_per_epoch": 4}
    loaded = MetaTrainer.load_from_checkpoint(checkpoint, **arguments, lr=1e-2, weights_only=True)
    twin = MetaTrainer.load_from_checkpoint(checkpoint, **{**arguments, "rule": Descent()}, lr=1e-2, weights_only=True)
    assert_equal(loaded.rule.parameters(), twin.rule.parameters())
    twin._restored = None
    fit(tmp_path, loaded)
    fit(tmp_path, twin)
    assert_equal(tree_leaves(loaded._states), tree_leaves(twin._states))
    assert_equal(loaded.rule.parameters(), twin.rule.parameters())
    before = tree_leaves(loaded._states)
    fit(tmp_path, loaded, max_steps=1)
    assert loaded._states[0].inner.step.max() <= 3  # one truncation from a fresh start
    assert len(before) == len(tree_leaves(loaded._states))
