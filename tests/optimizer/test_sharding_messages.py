"""Sharded tensors move together: how many messages a step takes, on 2 and 4 processes and on meshes of two dims."""

import pytest
import torch
import torch.distributed as dist
from optimizer_cases import hidden
from sharded_cases import Replicate, Shard, distribute_tensor
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.optimizer.sharding import shard_of
from lightning_lopt.rules.shards import TensorShard, Unknown, means

# Of (1,), (1, 1) and (2, 7) some of four processes have nothing; a (3, 2, 2) has rows of its own shape.
SHAPES = ((5, 3), (4,), (1,), (3, 2, 2), (2, 7), (1, 1), ())
NETWORK = {"nominal_stepsize": 1e-2, "step_mult": 1e-3}
# kind, config -> messages of a step: those of the rule, whatever the number of tensors; the safeguard has one more.
CASES = (
    ("star", NETWORK, 2),
    ("star", {**NETWORK, "selfnormalize_blackbox": True}, 2),
    ("star", {**NETWORK, "aggregate_magnitude": True}, 3),
    ("hyperparam", {"nominal_controller": False}, 1),
    ("blackbox", {}, 2),
    ("celo2", {}, 3),
    ("celo2_base", {}, 3),
    ("lstm", {"nominal_stepsize": 1e-2}, 0),
    ("lstm_dmd", {"num_snapshots": 3, "rank": 2}, 1),
    ("lstm_dmd", {"num_snapshots": 3, "nominal_stepsize": 1e-2, "scheduler": True}, 2),
    ("gru", {}, 0),
    ("k_timesteps", {}, 0),
    ("k_momentums", {}, 0),
    ("multiscale_adam", {}, 0),
    ("scheduled", {"orthogonal_start": 0.9, "decay": 0.1}, 2),
    ("muon", {}, 1),
    ("soap", {"precondition_every": 2}, 1),
    ("velo", {"lstm_hidden_size": 4, "param_inits": 2}, 4),
    ("velo", {"lstm_hidden_size": 4, "param_inits": 2, "weight_decay": 1e-2}, 5),
)


class Messages(TorchDispatchMode):
    """Counts what the processes send each other."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sent = func.namespace in ("c10d", "_c10d_functional") and not func.__name__.startswith(("wait", "_wrap"))
        self.count += sent
        return func(*args, **(kwargs or {}))


def make(kind, config):
    torch.manual_seed(0)
    rule = lopt.rules.make(kind, **config)
    with torch.no_grad():
        for param in rule.parameters():
            param += 0.01 * torch.randn(param.shape)
        if hasattr(rule, "centering"):
            rule.centering.copy_(torch.tensor([0.9, 0.5]))
    return rule


def layouts(world_size):
    yield init_device_mesh("cpu", (world_size,)), [Shard(0)]
    if world_size == 4:
        yield init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)]
        yield init_device_mesh("cpu", (2, 2)), [Shard(0), Shard(1)]


def placed(tensor, mesh, placements):
    fits = [p if isinstance(p, Replicate) or p.dim < tensor.dim() else Replicate() for p in placements]
    return distribute_tensor(tensor, mesh, fits)


def steps(optimizer, place, num_steps=5):
    """Messages of the last step but one, which is not measured, and of the last, which is."""
    params, counts = optimizer.param_groups[0]["params"], []
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = place(torch.randn(param.shape, generator=generator))
        if step == num_steps - 1:
            optimizer.measure_next_step()
        with Messages() as messages:
            optimizer.step(loss=torch.tensor(1.0))
        counts.append(messages.count)
    return counts[-2:]


def compare(kind, config, expected, mesh, placements, *, safeguard):
    rule, starts = make(kind, config), [torch.randn(s, generator=torch.Generator().manual_seed(9)) for s in SHAPES]
    whole = RuleOptimizer(hidden([nn.Parameter(s.clone()) for s in starts]), rule, num_steps=9, backend="reference")
    shards = [nn.Parameter(placed(s, mesh, placements)) for s in starts]
    sharded = RuleOptimizer(
        hidden(shards), rule, num_steps=9, safeguard=safeguard, weight_decay=0.1, backend="reference"
    )
    whole.param_groups[0]["weight_decay"] = 0.1
    steps(whole, lambda tensor: tensor)
    plain, measured = steps(sharded, lambda tensor: placed(tensor, mesh, placements))
    if sum(isinstance(p, Shard) for p in placements) == 1:  # on other meshes matrices and vectors lie differently
        assert (plain, measured) == (expected + safeguard, expected + 1), (kind, plain, measured)
    for first, second in zip(whole.param_groups[0]["params"], shards, strict=True):
        state = {name: sharded.state[second][name] for name in whole.state[first]}  # the other has counters too
        everything = zip([first, *whole.state[first].values()], [second, *state.values()], strict=True)
        for a, b in everything:
            b = b.full_tensor() if hasattr(b, "full_tensor") else b
            torch.testing.assert_close(b, a.detach(), rtol=1e-5, atol=1e-5)
            same = [None] * dist.get_world_size()
            dist.all_gather_object(same, b.detach())
            assert all(torch.equal(each, b) for each in same)  # on all processes, to the bit
    for a, b in zip(whole.take_metrics(), sharded.take_metrics(), strict=True):
        assert a is b is None or torch.allclose(a.float(), b.float(), rtol=1e-4), (kind, a, b)


def in_process(rank, world_size, store):
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world_size), rank=rank, world_size=world_size)
    for mesh, placements in layouts(world_size):
        for number, (kind, config, expected) in enumerate(CASES if mesh.ndim == 1 else CASES[:3]):
            try:
                compare(kind, config, expected, mesh, placements, safeguard=bool((number + world_size // 2) % 2))
            except Exception as error:
                raise AssertionError(f"{kind} {config} {placements}") from error
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.timeout(900)  # processes that wait for each other take long where others want the cores
def test_shards_move_as_the_whole_in_a_few_messages(world_size, tmp_path):
    arguments = (world_size, tmp_path / "store")
    torch.multiprocessing.start_processes(in_process, arguments, nprocs=world_size, start_method="fork")


# --- Shards, without processes ---


def test_the_shares_of_all_shards_are_the_mean():
    tensor = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    questions = [(-2, -1), (-1,), (-2,), ()]
    shares = []
    for start, length in ((0, 2), (2, 2), (4, 1), (5, 0)):
        part = TensorShard((5, 3), (start, 0), (length, 3))
        with pytest.raises(Unknown, match="outside of") as caught:
            means(part, *((tensor[:, start : start + length], dims) for dims in questions))
        shares.append(caught.value.sums)
    for dims, *sums in zip(questions, *shares, strict=True):
        expected = tensor.mean(dims) if dims else tensor
        torch.testing.assert_close(torch.stack(sums).sum(0), expected)


def test_a_value_of_the_whole_is_cut_to_the_shard():
    part = TensorShard((5, 3), (2, 0), (2, 3))
    whole = torch.arange(15).reshape(5, 3)
    assert torch.equal(part.local(whole), whole[2:4])
    assert torch.equal(part.local(whole[:, :1][None]), whole[None, 2:4, :1])
    assert part.local(whole[:1]).shape == (1, 3)


def test_plain_tensors_are_not_shards():
    assert shard_of(torch.zeros(3)) is None
