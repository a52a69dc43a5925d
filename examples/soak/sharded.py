"""Train every rule on sharded parameters, resume it on other numbers of processes, and compare with one process.

    python examples/soak/sharded.py

DDP on 4 processes; FSDP2 on 2 and on 4, where some hold nothing of the smaller tensors; replicas of shards on 2 x 2.
Checkpoints of two processes are resumed on 1, 2, 4 and 2 x 2. Failures: ranks that differ by a bit, a result further
than 1e-5 from that of one process, and a resumed run on two processes that is not bit-equal to the undisturbed one.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import lightning_lopt as lopt

TOLERANCE = 1e-5
TOLERANCES = {"velo": 1e-3}  # it divides differences of nearly equal averages of the loss, and so their rounding errors
NETWORK = {"nominal_stepsize": 1e-2, "step_mult": 1e-4}
RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("star", NETWORK),
    ("star", {**NETWORK, "selfnormalize_blackbox": True}),
    ("scheduled", {"centering_start": 0.5}),
    ("star", {**NETWORK, "aggregate_magnitude": True, "aggregate_nom_magnitude": True}),
    ("hyperparam", {"nominal_stepsize": 1e-2}),
    ("blackbox", {}),
    ("celo2", {}),
    ("celo2_base", {}),
    ("lstm", {"nominal_stepsize": 1e-2, "nominal_controller": True, "out_scale": 1e-2}),
    ("lstm_dmd", {"num_snapshots": 3, "rank": 2, "out_scale": 1e-2}),
    ("lstm_dmd", {"num_snapshots": 3, "scope": "tensor", "out_scale": 1e-2}),
    ("gru", {"nominal_stepsize": 1e-2, "out_scale": 1e-2, "hidden_size": 8}),
    ("mng", {}),
    ("k_timesteps", {}),
    ("k_momentums", {}),
    ("multiscale_adam", {"mixer": "la_b"}),
    ("multiscale_adam", {"mixer": "rnn2"}),
    ("multiscale_adam", {"mixer": "gru"}),
    ("velo", {"lstm_hidden_size": 8, "param_inits": 4, "weight_decay": 1e-2}),
)
# name -> processes, and the run whose checkpoint it resumes
RUNS: dict[str, tuple[int, str | None]] = {
    "one": (1, None),
    "DDP 4": (4, None),
    "FSDP2 2": (2, None),
    "FSDP2 4": (4, None),
    "FSDP2 2x2": (4, None),
    "2 -> 1": (1, "FSDP2 2"),
    "2 -> 2": (2, "FSDP2 2"),
    "2 -> 4": (4, "FSDP2 2"),
    "2 -> 2x2": (4, "FSDP2 2"),
}


class Module(L.LightningModule):
    """Splits the batches of eight that one process would see among the processes."""

    def __init__(self, mesh: tuple[int, ...] | None) -> None:
        super().__init__()
        self.mesh = mesh
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1))

    def configure_model(self) -> None:
        if self.mesh is not None and not isinstance(self.net[0].weight, DTensor):
            mesh = init_device_mesh("cpu", self.mesh, mesh_dim_names=("replicate", "shard")[-len(self.mesh) :])
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def train_dataloader(self) -> DataLoader[Tensor]:
        batches = torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(3))
        mine = batches.chunk(self.trainer.world_size, 1)[self.trainer.global_rank]
        return DataLoader(list(mine), batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class End(Callback):
    """Saves the final weights and state of each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        states = [trainer.optimizers[0].state[p] for p in pl_module.parameters()]
        found = [*pl_module.parameters(), *(t for state in states for _, t in sorted(state.items()))]
        ends = [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in found]
        torch.save(ends, self.folder / f"rank{trainer.global_rank}.pt")


def make(number: int) -> Any:
    torch.manual_seed(number)
    kind, config = RULES[number]
    rule = lopt.rules.make(kind, **config)
    with torch.no_grad():
        for param in rule.parameters():
            param += 0.01 * torch.randn(param.shape)
    return rule


def fit(number: int, name: str, folder: Path, checkpoint: Path | None) -> None:
    processes, _ = RUNS[name]
    sharded = name != "one" and not name.startswith("DDP")
    strategy: Any = SingleDeviceStrategy("cpu")
    if sharded:
        folders = bool(number % 2)  # one file for half of the rules, a folder of shards for the others
        strategy = ModelParallelStrategy(
            processes, 1, save_distributed_checkpoint=folders, process_group_backend="gloo"
        )
    elif processes > 1:
        strategy = DDPStrategy(process_group_backend="gloo")
    mesh = (2, 2) if name.endswith("2x2") else (processes,)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        max_epochs=2,
        strategy=strategy,
        devices=processes,
        callbacks=[
            lopt.LearnedOptimizer(make(number)),
            End(folder),
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
        ],
        use_distributed_sampler=False,
        **quiet,
    )
    trainer.fit(Module(mesh if sharded else None), ckpt_path=checkpoint)


def run(number: int, name: str, folder: Path, checkpoint: Path | None) -> list[list[Tensor]] | None:
    """Train on several processes; returns the final weights and state of each, None if one failed."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(RUNS[name][0]):
        if child := os.fork():
            children.append(child)
            continue
        status, log = 1, os.open(folder / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT)
        try:
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            fit(number, name, folder, checkpoint)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        print(f"{RULES[number]} {name} failed:\n{(folder / 'log0.txt').read_text()[-400:]}", flush=True)
        return None
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(len(children))]


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest |a - b| / (1 + |b|)."""
    return max(
        float(((a.double() - b.double()).abs() / (1 + b.double().abs())).max())
        for a, b in zip(first, second, strict=True)
        if a.numel()
    )


def soak(number: int, scratch: Path) -> int:
    """Do all runs of a rule; returns the number of failures."""
    ends: dict[str, list[list[Tensor]] | None] = {}
    words, failures = [], 0
    for name, (_, before) in RUNS.items():
        checkpoint = None if before is None else scratch / before / "epoch=0.ckpt"
        ranks = ends[name] = run(number, name, scratch / name, checkpoint)
        if ranks is None:
            failures += 1
            continue
        alike = all(torch.equal(a, b) for rank in ranks for a, b in zip(rank, ranks[0], strict=True))
        one, whole = ends["one"], ends.get("FSDP2 2")
        far = distance(ranks[0], one[0]) if one else float("nan")
        bits = name != "2 -> 2" or (whole is not None and distance(ranks[0], whole[0]) == 0)
        failures += not (alike and far <= TOLERANCES.get(RULES[number][0], TOLERANCE) and bits)
        words.append(f"{name} {far:.0e}" + ("" if alike else " RANKS DIFFER") + ("" if bits else " BITS DIFFER"))
    kind, config = RULES[number]
    print(f"{kind} {config}: {', '.join(words)}", flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", type=int, nargs="+", default=range(len(RULES)), help="indices into RULES")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    failures = 0
    for number in arguments.rules:
        with tempfile.TemporaryDirectory() as scratch:
            failures += soak(number, Path(scratch))
    print(f"{len(arguments.rules) * len(RUNS)} runs, {failures} failures")
    sys.exit(int(failures > 0))


if __name__ == "__main__":
    main()
