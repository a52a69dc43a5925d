"""Does AdamW's state survive a full state dict when a weight is sharded unevenly? torch alone, without this package.

    python examples/soak/gathered_state.py

torch before 2.13 gathers uneven shards of any dim but the first as a view of padded memory, and gloo sends memory as it
lies (pytorch/pytorch#192920): the second process receives padding in place of numbers. LearnedOptimizer's checkpoints
have no such views; in your own code, call `.contiguous()` on the result of `get_optimizer_state_dict`. Exits with 1 if
numbers are lost.
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh, whole = init_device_mesh("cpu", (2,)), torch.arange(6.0).reshape(2, 3)
    module = nn.Linear(3, 2, bias=False)
    module.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(1)]))  # by columns: two and one
    module.weight.grad = distribute_tensor(whole, mesh, [Shard(1)])
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.step()
    before = optimizer.state[module.weight]["exp_avg"].to_local().clone()
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_optimizer_state_dict(module, optimizer, options=gather)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(module, optimizer, {} if rank else gathered, options=spread)
    after = optimizer.state[module.weight]["exp_avg"].to_local()
    torch.save((before, after), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(work, (folder,), nprocs=2, start_method="fork")
        results = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)]
    for rank, (before, after) in enumerate(results):
        print(f"torch {torch.__version__}, process {rank}: {before.tolist()} came back as {after.tolist()}")
    raise SystemExit(int(not all(torch.equal(before, after) for before, after in results)))


if __name__ == "__main__":
    main()
