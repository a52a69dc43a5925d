"""Rules that move hidden matrices as matrices, behind the optimizer and under Lightning: roles, resume, shards."""

import copy

import pytest
import torch
import torch.distributed as dist
from sharded_cases import DTensor, Replicate, Shard, distribute_tensor
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.rules import make

CASES = {"muon": {"adam_lr": 0.03}, "soap": {"lr": 0.03, "precondition_every": 3}}


@pytest.fixture(params=CASES)
def rule(request):
    return make(request.param, **CASES[request.param])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 9))


def optimizer_of(model: nn.Module, rule, **arguments) -> RuleOptimizer:
    optimizer = RuleOptimizer(model.named_parameters(), rule, **arguments)
    optimizer.set_roles(model)
    return optimizer


def train(model: nn.Module, optimizer: RuleOptimizer, steps) -> None:
    for step in steps:
        batch = torch.randint(9, (16,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), (batch + 1) % 9).backward()
        optimizer.step()


def test_only_hidden_layers_move_as_matrices(rule):
    one, other = net(), net()
    train(one, optimizer_of(one, rule), range(1))
    train(other, RuleOptimizer([{"params": other.parameters(), "role": "other"}], rule), range(1))
    moved = {n: not torch.equal(p, dict(other.named_parameters())[n]) for n, p in one.named_parameters()}
    assert moved == {"0.weight": False, "1.weight": True, "1.bias": False, "3.weight": False, "3.bias": False}


def test_matrices_of_unknown_role_are_warned_of(rule):
    model = net()
    with pytest.warns(UserWarning, match="roles of 3 matrices"):
        train(model, RuleOptimizer(model.parameters(), rule), range(1))


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_is_bit_equal(rule, stop):
    whole, first = net(), net()
    train(whole, optimizer_of(whole, rule), range(9))
    before = optimizer_of(first, rule)
    train(first, before, range(stop))
    second = copy.deepcopy(first)
    after = optimizer_of(second, rule)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(second, after, range(stop, 9))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_step_that_is_not_finite_is_skipped_and_leaves_no_trace(rule, bad):
    faulty, sound = net(), net()
    optimizers = optimizer_of(faulty, rule, safeguard=True), optimizer_of(sound, rule)
    for step in range(8):
        if step == bad:
            for param in faulty.parameters():
                param.grad = torch.full_like(param, torch.nan)
            optimizers[0].step()
        train(faulty, optimizers[0], [step])
        train(sound, optimizers[1], [step])
    for a, b in zip(faulty.parameters(), sound.parameters(), strict=True):
        assert torch.equal(a, b)


def test_trains_under_lightning(rule):
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.losses = net(), []

        def training_step(self, batch):
            loss = nn.functional.cross_entropy(self.net(batch), (batch + 1) % 9)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)]

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.arange(90) % 9, batch_size=18, shuffle=True)

    module, callback = Module(), lopt.LearnedOptimizer(rule=rule, lr="scale", weight_decay="decoupled")
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    trainer = L.Trainer(max_epochs=8, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **options)
    trainer.fit(module)
    (optimizer,) = trainer.optimizers
    assert module.losses[-1] < 0.9 * module.losses[0]
    state = optimizer.state[module.net[1].weight]
    if rule.kind == "muon":
        assert not state["exp_avg_sq"].any()  # the hidden layer was Muon's
    else:
        assert state["left"].any()
        assert not optimizer.state[module.net[0].weight]["left"].any()


def test_no_step_asks_the_device_for_its_number(monkeypatch):
    """On the meta device, which stands for an accelerator, no tensor has a value that could be asked for."""
    calls, counts, own = [], [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda x: (calls.append(x), own(x))[1])
    params = [nn.Parameter(torch.zeros(4, 3, device="meta"))]
    optimizer = RuleOptimizer([{"params": params, "role": "hidden"}], make("soap"), backend="reference")
    for _ in range(25):
        params[0].grad = torch.zeros_like(params[0])
        optimizer.step()
        counts.append(len(calls))
    assert [step for step in range(1, 25) if counts[step] > counts[step - 1]] == [10, 20]
    assert len(calls) == 4


# --- shards

SHAPES = {
    "hidden": [(5, 3), (4, 4), (3, 2, 2), (6, 2)],
    "experts": [(3, 4, 4)],
    "embedding": [(5, 3)],
    None: [(7,), (1,)],
}


def compare(rank, store):
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for kind, config in [*CASES.items(), ("soap", {**CASES["soap"], "experts": True, "max_side": 4})]:
        rule = make(kind, **config)
        torch.manual_seed(0)
        starts = {role: [torch.randn(shape) for shape in shapes] for role, shapes in SHAPES.items()}
        sides = []
        for place in (lambda x: x.clone(), lambda x: distribute_tensor(x, mesh, [Shard(0)])):
            groups = [{"params": [nn.Parameter(place(x)) for x in xs], "role": role} for role, xs in starts.items()]
            sides.append((RuleOptimizer(groups, rule, safeguard=True), place))
        for step in range(8):
            for optimizer, place in sides:
                generator = torch.Generator().manual_seed(step)
                for group in optimizer.param_groups:
                    for param in group["params"]:
                        param.grad = place(torch.randn(param.shape, generator=generator))
                optimizer.step()
        for plain_group, split_group in zip(*(optimizer.param_groups for optimizer, _ in sides), strict=True):
            for plain, split in zip(plain_group["params"], split_group["params"], strict=True):
                torch.testing.assert_close(split.full_tensor(), plain, rtol=1e-4, atol=1e-5)
                states = [optimizer.state[p] for (optimizer, _), p in zip(sides, (plain, split), strict=True)]
                for name in rule.init_state(plain)._fields:
                    tensor, is_moment = states[1][name], name.startswith("exp_avg")
                    assert is_moment <= isinstance(tensor, DTensor)
                    if isinstance(tensor, DTensor):
                        assert tensor.placements == ((Shard(0) if is_moment else Replicate()),)
                        tensor = tensor.full_tensor()
                    torch.testing.assert_close(tensor, states[0][name], rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="DTensor of torch 2.4 lacks operations that some rules need")
def test_shards_of_matrices_move_as_whole_ones(tmp_path):
    torch.multiprocessing.start_processes(compare, (tmp_path / "store",), nprocs=2, start_method="fork")
