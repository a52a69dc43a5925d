"""torch's sharded tensors and FSDP2, which older versions have under other names."""

import os
import socket

import torch

from lightning_lopt.rules.shards import dtensor

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch before 2.6
    from torch.distributed._composable.fsdp import fully_shard

DTensor, Replicate, Shard = dtensor().DTensor, dtensor().Replicate, dtensor().Shard
distribute_tensor = dtensor().distribute_tensor

__all__ = ["DTensor", "Replicate", "Shard", "distribute_tensor", "fully_shard"]


def in_process(rank, port, work, arguments):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(*arguments)


def on_processes(number, work, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(in_process, (port, work, arguments), nprocs=number, start_method="fork")
