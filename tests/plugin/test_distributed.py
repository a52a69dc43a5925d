"""LearnedOptimizer on two processes equals one process with the double batch; ranks are bit-identical."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_cases import KNOWN_WARNINGS, Report, Sharded, ShardedManual, learned, reports, trainer
from optimizer_cases import LossRule, assert_close, assert_equal

import lightning_lopt as lopt

pytestmark = KNOWN_WARNINGS

TWO = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}


def run(path, module=None, callback=None, more=(), ckpt_path=None, **arguments):
    path.mkdir(exist_ok=True)
    callback = callback or learned()
    runner = trainer(path, callback, Report(path, callback), *more, **arguments)
    runner.fit(module or Sharded(), ckpt_path=ckpt_path)
    return reports(path, arguments.get("devices", 1))


def assert_ranks_equal(ranks):
    for key in ("weights", "state"):
        assert_equal(ranks[0][key], ranks[1][key])


@pytest.mark.parametrize(
    "arguments", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}], ids=str
)
def test_two_processes_are_one_with_the_double_batch(tmp_path, arguments):
    ranks = run(tmp_path / "two", **TWO, **arguments)
    (one,) = run(tmp_path / "one", **arguments)
    assert ranks[0]["optimizers"] == ["RuleOptimizer"]
    assert ranks[0]["losses"] != ranks[1]["losses"]
    assert_ranks_equal(ranks)
    assert_close(ranks[0]["weights"], one["weights"], 1e-2 if "precision" in arguments else 1e-6)


def test_every_rank_sees_the_mean_loss(tmp_path):
    ranks = run(tmp_path / "two", callback=lopt.LearnedOptimizer(LossRule()), **TWO)
    (one,) = run(tmp_path / "one", callback=lopt.LearnedOptimizer(LossRule()))
    means = [(a + b) / 2 for a, b in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert ranks[0]["seen"] == ranks[1]["seen"]
    assert ranks[0]["seen"][::4] == pytest.approx(means, rel=1e-6)
    assert ranks[0]["seen"] == pytest.approx(one["seen"], rel=1e-5)
    assert_ranks_equal(ranks)


def test_the_mean_loss_in_manual_optimization_with_several_optimizers(tmp_path):
    ranks = run(tmp_path, module=ShardedManual(), callback=lopt.LearnedOptimizer(LossRule()), **TWO)
    means = [(a + b) / 2 for a, b in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert ranks[0]["seen"] == ranks[1]["seen"]
    assert ranks[0]["seen"][::4] == ranks[0]["seen"][2::4] == pytest.approx(means, rel=1e-6)
    assert_ranks_equal(ranks)


def saves(path):
    return ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)


def test_resume_is_equal_to_the_bit(tmp_path):
    arguments = {"max_epochs": 4, "enable_checkpointing": True}
    whole = run(tmp_path / "whole", more=[saves(tmp_path)], **TWO, **arguments)
    arguments["ckpt_path"] = tmp_path / "epoch=1.ckpt"
    resumed = run(tmp_path / "resumed", more=[saves(tmp_path)], **TWO, **arguments)
    assert len(resumed[0]["losses"]) == len(whole[0]["losses"]) // 2
    for rank in range(2):
        for key in ("weights", "state"):
            assert_equal(whole[rank][key], resumed[rank][key])
    alone = run(tmp_path / "alone", more=[saves(tmp_path)], **arguments)
    assert_close(alone[0]["weights"], whole[0]["weights"], 1e-6)


class Poisoned(Sharded):
    """One batch on one rank has a NaN loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.global_step == 3 and self.global_rank == 1 else loss


@pytest.mark.filterwarnings("ignore:The safeguard skipped 4 tensor updates")
def test_the_safeguard_acts_on_all_ranks_alike(tmp_path):
    ranks = run(tmp_path, module=Poisoned(), **TWO)
    assert_ranks_equal(ranks)
    assert all(torch.isfinite(tensor).all() for tensor in ranks[0]["weights"])


@pytest.mark.slow
def test_spawned_processes(tmp_path):
    ranks = run(tmp_path / "two", **{**TWO, "strategy": "ddp_spawn"})
    (one,) = run(tmp_path / "one")
    assert_ranks_equal(ranks)
    assert_close(ranks[0]["weights"], one["weights"], 1e-6)


SCRIPT = """
import sys
from pathlib import Path
from lightning_cases import Report, Sharded, learned, trainer

path, callback = Path(sys.argv[1]), learned()
trainer(path, callback, Report(path), strategy="ddp", devices=2, use_distributed_sampler=False).fit(Sharded())
"""


@pytest.mark.slow
def test_processes_that_run_the_script_again(tmp_path):
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    code = f"import sys; sys.path[:0] = {folders!r}\n"
    (tmp_path / "script.py").write_text(code + SCRIPT)
    subprocess.run([sys.executable, "script.py", str(tmp_path)], cwd=tmp_path, check=True, timeout=280)
    ranks = reports(tmp_path)
    (one,) = run(tmp_path / "one")
    assert_ranks_equal(ranks)
    assert_close(ranks[0]["weights"], one["weights"], 1e-6)
