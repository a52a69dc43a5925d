"""Every rule on parameters that two processes share (DTensor): as on whole ones."""

import pytest
import torch
import torch.distributed as dist
from contract_table import RULES_UNDER_TEST
from kernel_cases import in_roles
from sharded_cases import DTensor, Shard, distribute_tensor
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_lopt import RuleOptimizer

# Of (1,), a process has nothing; no state but of tensors ends in these.
SHAPES = ((5, 3), (3, 4, 2), (6, 3), (7,), (1,), (3, 2, 2))


def compare_all(rank, store):
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for case in RULES_UNDER_TEST:
        torch.manual_seed(0)
        try:
            compare(case.make(), mesh)
        except Exception as error:
            raise AssertionError(f"{case.kind} {case.config}") from error
    dist.destroy_process_group()


def compare(rule, mesh):
    starts = [torch.randn(shape) for shape in SHAPES]
    whole = [nn.Parameter(start.clone()) for start in starts]
    sharded = [nn.Parameter(distribute_tensor(start, mesh, [Shard(0)])) for start in starts]
    optimizers = (
        RuleOptimizer(in_roles(whole), rule, num_steps=9),
        RuleOptimizer(in_roles(sharded), rule, num_steps=9, safeguard=True),
    )
    for step in range(7):
        for plain, split in zip(whole, sharded, strict=True):
            plain.grad = torch.randn(plain.shape, generator=torch.Generator().manual_seed(step))
            split.grad = distribute_tensor(plain.grad, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step(loss=torch.tensor(1.0))
    for plain, split in zip(whole, sharded, strict=True):
        torch.testing.assert_close(split.full_tensor(), plain, rtol=1e-4, atol=1e-5)
        for name, tensor in optimizers[1].state[split].items():
            extra = tensor.dim() - plain.dim()
            if extra > 0 and tensor.shape[extra:] == plain.shape:
                assert isinstance(tensor, DTensor), name
                assert tensor.placements == (Shard(extra),), name


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="DTensor of torch 2.4 lacks operations that some rules need")
def test_sharded_parameters_move_as_whole_ones(tmp_path):
    torch.multiprocessing.start_processes(compare_all, (tmp_path / "store",), nprocs=2, start_method="fork")
