"""torch's sharded tensors and FSDP2, which older versions have under other names."""

from lightning_lopt.rules.shards import dtensor

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch before 2.6
    from torch.distributed._composable.fsdp import fully_shard

DTensor, Replicate, Shard = dtensor().DTensor, dtensor().Replicate, dtensor().Shard
distribute_tensor = dtensor().distribute_tensor

__all__ = ["DTensor", "Replicate", "Shard", "distribute_tensor", "fully_shard"]
