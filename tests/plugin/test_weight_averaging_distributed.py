"""Averaged weights under DDP and FSDP2: as in one process with double batches, equal on ranks, resumed to the bit."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_cases import KNOWN_WARNINGS, Report, Sharded, data, reports, trainer
from optimizer_cases import assert_close, assert_equal, star
from sharded_cases import DTensor, fully_shard, on_processes
from torch import nn

import lightning_lopt as lopt

pytestmark = KNOWN_WARNINGS


class Validated(Sharded):
    """With layers that two processes cannot share evenly, and a validation of all data on each process."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1))
        self.val_losses = []

    def validation_step(self, batch, batch_idx):
        self.val_losses.append(self.loss(batch).item())

    def val_dataloader(self):
        return data()


class FullySharded(Validated):
    def configure_model(self):
        if not isinstance(self.net[0].weight, DTensor):
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Reports(Report):
    """What a process has at the end of its fit."""

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        path = self.path / f"rank{trainer.global_rank}.pt"
        torch.save({**torch.load(path, weights_only=True), "val_losses": pl_module.val_losses}, path)


def averaging():
    rule = star()
    rule.average_fraction = 0.75  # of 16 steps: the window begins after the first epoch of 4
    return lopt.LearnedOptimizer(rule)


def run(path, checkpoints, module=Validated, ckpt_path=None, precision=None, **arguments):
    path.mkdir(exist_ok=True)
    saves = ModelCheckpoint(checkpoints, filename="{epoch}", save_top_k=-1)
    options = {"max_epochs": 4, "enable_checkpointing": True, "num_sanity_val_steps": 0, "precision": precision}
    runner = trainer(path, averaging(), Reports(path), saves, use_distributed_sampler=False, **options, **arguments)
    runner.fit(module(), ckpt_path=ckpt_path)


def run_sharded(path, checkpoints, distributed, number=2, **arguments):
    def work():
        strategy = ModelParallelStrategy(
            number, 1, save_distributed_checkpoint=distributed, process_group_backend="gloo"
        )
        run(path / "all", checkpoints, FullySharded, strategy=strategy, devices=number, **arguments)

    path.mkdir(exist_ok=True)
    on_processes(number, work)
    return reports(path / "all", number)


def assert_same(first, second, tolerance):
    assert first["val_losses"] == pytest.approx(second["val_losses"], rel=1e-5)
    assert_close(first["weights"], second["weights"], tolerance)


def test_ddp(tmp_path):
    arguments = {"strategy": "ddp_fork", "devices": 2}
    run(tmp_path / "two", tmp_path, **arguments)
    run(tmp_path / "resumed", tmp_path, **arguments, ckpt_path=tmp_path / "epoch=1.ckpt")
    run(tmp_path / "one", tmp_path / "other")
    ranks, resumed, (one,) = reports(tmp_path / "two"), reports(tmp_path / "resumed"), reports(tmp_path / "one", 1)
    for rank in range(2):
        assert_equal(ranks[rank]["weights"], ranks[0]["weights"])
        assert_equal(resumed[rank]["weights"], ranks[0]["weights"])
        assert_same(ranks[rank], one, 1e-6)
        assert resumed[rank]["val_losses"] == ranks[rank]["val_losses"][-16:]


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="gloo of older torch adds gradients up under FSDP2")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("distributed", [False, True], ids=["one file", "a folder of shards"])
def test_fsdp2(tmp_path, distributed, precision):
    whole = run_sharded(tmp_path / "two", tmp_path, distributed, precision=precision)
    checkpoint = tmp_path / "epoch=1.ckpt"
    resumed = run_sharded(tmp_path / "resumed", tmp_path, distributed, ckpt_path=checkpoint, precision=precision)
    for rank in range(2):
        for key in ("weights", "state"):
            assert_equal(whole[rank][key], whole[0][key])
            assert_equal(resumed[rank][key], whole[0][key])
        assert resumed[rank]["val_losses"] == whole[rank]["val_losses"][-16:]
    if precision == "32-true":
        run(tmp_path / "one", tmp_path / "other")
        (one,) = reports(tmp_path / "one", 1)
        assert_same(whole[0], one, 1e-5)
        on_one = run_sharded(tmp_path / "on one", tmp_path, distributed, number=1, ckpt_path=checkpoint)
        assert_close(on_one[0]["weights"], whole[0]["weights"], 1e-5)
