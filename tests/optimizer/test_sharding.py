"""ModelParallelStrategy (FSDP2) on two processes: sharded parameters and state, as one process with double batches."""

import os

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_cases import KNOWN_WARNINGS, Report, Sharded, learned, reports, trainer
from optimizer_cases import assert_close, assert_equal, star
from sharded_cases import DTensor, fully_shard, on_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import lightning_lopt as lopt

pytestmark = [
    *KNOWN_WARNINGS,
    pytest.mark.skipif(
        torch.__version__ < (2, 7) and not torch.cuda.is_available(), reason="FSDP2 asked for CUDA before torch 2.7"
    ),
]


class Uneven(Sharded):
    """Layers of 7 rows and of 1, which 2 processes and 4 cannot share evenly."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1))


class FullySharded(Uneven):
    """Every layer is split between the processes; a bias of one number leaves one of them nothing."""

    def configure_model(self):
        if not isinstance(self.net[0].weight, DTensor) and self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class Replicated(Uneven):
    """Two replicas, each split between two processes: a mesh of two dims."""

    def configure_model(self):
        if not isinstance(self.net[0].weight, DTensor):
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=mesh)


class Looks(Report):
    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        for param, state in trainer.optimizers[0].state.items():
            assert isinstance(param, DTensor)
            assert {name for name, tensor in state.items() if isinstance(tensor, DTensor)} >= {"exp_avg", "exp_avg_sq"}


def sharded_fit(
    path,
    checkpoints,
    distributed,
    options,
    more=(),
    rule=None,
    ckpt_path=None,
    number=2,
    module=FullySharded,
    **arguments,
):
    strategy = ModelParallelStrategy(number, 1, save_distributed_checkpoint=distributed, process_group_backend="gloo")
    saves = ModelCheckpoint(checkpoints, filename="{epoch}", save_top_k=-1)
    runner = trainer(
        path,
        lopt.LearnedOptimizer(rule or star(), **options),
        Looks(path),
        saves,
        *more,
        strategy=strategy,
        devices=number,
        use_distributed_sampler=False,
        enable_checkpointing=True,
        **arguments,
    )
    runner.fit(module(), ckpt_path=ckpt_path)


def run(path, checkpoints, distributed=False, options=None, number=2, **arguments):
    path.mkdir()

    def work():
        sharded_fit(path, checkpoints, distributed, options or {}, number=number, **arguments)

    on_processes(number, work)
    return reports(path, number)


def average(folder):
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mean = torch.zeros(1)
    dist.reduce_scatter_tensor(mean, torch.ones(2), dist.ReduceOp.AVG)
    (folder / str(rank)).write_text(str(mean.item()))
    dist.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def averages(tmp_path_factory):
    """Older gloo adds gradients up where FSDP2 asks for their average (2.8 does): then one process is no measure."""
    if torch.__version__ < (2, 13):
        folder = tmp_path_factory.mktemp("average")
        on_processes(2, average, folder)
        if (folder / "0").read_text() != "1.0":
            pytest.skip("gloo of this torch does not average, so FSDP2 on CPUs has the sum of all gradients")


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {}),
        ({"safeguard": False}, {}),
        ({"lr": "scale", "weight_decay": "decoupled"}, {"accumulate_grad_batches": 2}),
    ],
    ids=str,
)
def test_two_processes_are_one_with_the_double_batch(tmp_path, options, arguments):
    ranks = run(tmp_path / "two", tmp_path, options=options, **arguments)
    (tmp_path / "one").mkdir()
    trainer(tmp_path, learned(**options), Report(tmp_path / "one"), **arguments).fit(Uneven())
    (one,) = reports(tmp_path / "one", 1)
    for key in ("weights", "state"):
        assert_equal(ranks[0][key], ranks[1][key])
        # One process has kernels, which may count steps in another dtype.
        expected = [tensor.to(own.dtype) for tensor, own in zip(one[key], ranks[0][key], strict=True)]
        assert_close(ranks[0][key], expected, 1e-5)


@pytest.mark.filterwarnings("ignore:The weights of the rule differ from those of the checkpoint")
@pytest.mark.parametrize("distributed", [False, True], ids=["one file", "a folder of shards"])
def test_resume_is_equal_to_the_bit_and_takes_the_weights_of_the_checkpoints_rule(tmp_path, distributed):
    whole = run(tmp_path / "whole", tmp_path, distributed)
    # Here callbacks are restored after the optimizers exist; in one of the cases the rule's weights are others.
    rule = star(seed=5) if distributed else None
    resumed = run(tmp_path / "resumed", tmp_path, distributed, rule=rule, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert len(resumed[0]["losses"]) == len(whole[0]["losses"]) // 2
    for rank in range(2):
        for key in ("weights", "state"):
            assert_equal(whole[rank][key], resumed[rank][key])


@pytest.mark.parametrize("distributed", [False, True], ids=["one file", "a folder of shards"])
def test_what_two_processes_saved_goes_on_on_one_and_on_four(tmp_path, distributed):
    whole = run(tmp_path / "whole", tmp_path, distributed)
    for number in (1, 4):
        arguments = {"number": number, "ckpt_path": tmp_path / "epoch=0.ckpt"}
        resumed = run(tmp_path / f"on {number}", tmp_path, distributed, **arguments)
        for key in ("weights", "state"):
            for rank in resumed:
                assert_equal(rank[key], resumed[0][key])
            assert_close(resumed[0][key], whole[0][key], 1e-5)


def test_replicas_of_shards_go_on_from_what_two_processes_saved(tmp_path):
    """The checkpoint is one of plain shards; examples/soak/sharded.py does so with every rule."""
    whole = run(tmp_path / "whole", tmp_path)
    arguments = {"number": 4, "module": Replicated, "ckpt_path": tmp_path / "epoch=0.ckpt"}
    resumed = run(tmp_path / "on 2 x 2", tmp_path, **arguments)
    for key in ("weights", "state"):
        for rank in resumed:
            assert_equal(rank[key], resumed[0][key])
        assert_close(resumed[0][key], whole[0][key], 1e-5)


@pytest.mark.parametrize("distributed", [False, True], ids=["one file", "a folder of shards"])
def test_the_runs_own_state_is_that_of_one_process_and_goes_on_to_the_bit(tmp_path, distributed):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {"lstm_hidden_size": 7, "param_inits": 4, "step_mult": 1e-4, "weight_decay": 1e-2}  # 7: as a bias
        rule = lopt.rules.make("velo", **config)
        for value in rule.parameters():
            nn.init.normal_(value, std=0.3)
    whole = run(tmp_path / "whole", tmp_path, distributed, rule=rule)
    (tmp_path / "one").mkdir()
    trainer(tmp_path, lopt.LearnedOptimizer(rule), Report(tmp_path / "one")).fit(Uneven())
    (one,) = reports(tmp_path / "one", 1)
    resumed = run(tmp_path / "resumed", tmp_path, distributed, rule=rule, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert len(resumed[0]["losses"]) == len(whole[0]["losses"]) // 2
    for key in ("weights", "state"):
        for rank in range(2):
            assert_equal(whole[0][key], whole[rank][key])
            assert_equal(whole[rank][key], resumed[rank][key])
        assert_close(whole[0][key], one[key], 1e-5)


class SpoilsAShard(L.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 1 and trainer.global_rank == 0:
            pl_module.net[0].bias.grad.to_local()[0] = torch.nan

    def on_train_end(self, trainer, pl_module):
        skipped = {name: trainer.optimizers[0].state[p]["skipped"].item() for name, p in pl_module.named_parameters()}
        assert skipped == {"net.0.weight": 0, "net.0.bias": 1, "net.2.weight": 0, "net.2.bias": 0}


@pytest.mark.filterwarnings("ignore:The safeguard skipped 1 tensor updates")
def test_a_bad_shard_on_one_process_is_skipped_on_all(tmp_path):
    rule = star(step_mult=0.0, nominal_controller=False)  # elementwise: nothing else would tell the other process
    ranks = run(tmp_path / "two", tmp_path, rule=rule, more=[SpoilsAShard()], max_epochs=1)
    assert_equal(ranks[0]["weights"], ranks[1]["weights"])
    assert all(torch.isfinite(tensor).all() for key in ("weights", "state") for tensor in ranks[0][key])
