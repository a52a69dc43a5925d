"""A resumed run is bit-identical to an uninterrupted one."""

import copy
import inspect

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning_cases import KNOWN_WARNINGS, ManualModule, Module, data, fit, learned, weights
from optimizer_cases import assert_equal, star

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer

pytestmark = KNOWN_WARNINGS


def cosine(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 32)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def everything(runner):
    """Weights, optimizer state and groups."""
    states = [optimizer.state[p] for optimizer in runner.optimizers for p in optimizer.state]
    return [*weights(runner), *(tensor for state in states for tensor in state.values())]


def run(path, callback, arguments, **more):
    module = arguments.get("module", Module)()
    rest = {name: value() if callable(value) else value for name, value in arguments.items() if name != "module"}
    saves = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    return fit(path, callback, saves, module=module, enable_checkpointing=True, max_epochs=4, **rest, **more)


def scaler():
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))]


SETTINGS = {
    "fp32": ({}, {}),
    "bf16-true": ({"precision": "bf16-true", "train_dataloaders": lambda: data(dtype=torch.bfloat16)}, {}),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {}),
    "fp16 with a GradScaler": ({"plugins": scaler}, {}),
    "accumulate and clip": ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, {}),
    "schedule and decay": ({"module": lambda: Module(cosine)}, {"lr": "scale", "weight_decay": "decoupled"}),
    "manual, two optimizers": ({"module": ManualModule}, {}),
    "without safeguard": ({}, {"safeguard": False}),
    "weights_only": ({}, {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_equal_to_the_bit(tmp_path, name):
    arguments, options = SETTINGS[name]
    if name == "weights_only" and name not in inspect.signature(L.Trainer.fit).parameters:
        pytest.skip("Lightning of before 2.6")
    whole = run(tmp_path, learned(**options), arguments)
    extra = {"weights_only": True} if name == "weights_only" else {}
    resumed = run(tmp_path, learned(**options), arguments, ckpt_path=tmp_path / "epoch=1.ckpt", **extra)
    assert resumed.global_step == whole.global_step
    assert resumed.lightning_module.lrs == whole.lightning_module.lrs[len(whole.lightning_module.lrs) // 2 :]
    assert_equal(everything(whole), everything(resumed))


LSTMS = {
    "lstm": ("lstm", {"nominal_stepsize": 1e-2, "nominal_controller": True, "normalize_blackbox": True}),
    "as L2O-DMD has it": ("lstm_dmd", {"num_snapshots": 5, "loss_scale": 1.0}),
    "each tensor's eigenvalues": ("lstm_dmd", {"num_snapshots": 4, "rank": 2, "scope": "tensor"}),
    "increments": ("lstm_dmd", {"num_snapshots": 5, "rank": 2, "snapshots": "increments"}),
    "sketch": ("lstm_dmd", {"num_snapshots": 20, "method": "sketch", "sketch_size": 4}),
}


@pytest.mark.parametrize("safeguard", [False, True], ids=["in place", "safeguard"])
@pytest.mark.parametrize("name", LSTMS)
def test_lstms_resume_to_the_bit(tmp_path, name, safeguard):
    """Also with windows that are only partly full at the checkpoint: m = 20, after 16 steps."""
    kind, config = LSTMS[name]
    torch.manual_seed(0)
    rule = lopt.rules.make(kind, hidden_size=4, **config)
    whole, resumed = (
        run(tmp_path, lopt.LearnedOptimizer(rule, safeguard=safeguard), {}, **extra)
        for extra in ({}, {"ckpt_path": tmp_path / "epoch=1.ckpt"})
    )
    assert resumed.global_step == whole.global_step == 32
    assert_equal(everything(whole), everything(resumed))


class Embedded(Module):
    """The same behind a table, which a rule may treat by its role."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(3, 4)

    def loss(self, batch):
        inputs, targets = batch
        rows = torch.arange(len(inputs), device=inputs.device) % 2  # never the third
        return super().loss([inputs + self.embed(rows), targets])


@pytest.mark.parametrize("kind", ["celo2", "celo2_base"])
def test_celo2_takes_roles_from_lightning_and_resumes_to_the_bit(tmp_path, kind):
    torch.manual_seed(0)
    rule = lopt.rules.make(kind, lr=1e-3)
    start = Embedded()
    before = [value.detach().clone() for value in (start.embed.weight, start.net[0].weight)]
    whole, resumed = (
        run(tmp_path, lopt.LearnedOptimizer(rule), {"module": lambda: copy.deepcopy(start)}, **extra)
        for extra in ({}, {"ckpt_path": tmp_path / "epoch=1.ckpt"})
    )
    assert resumed.global_step == whole.global_step == 32
    assert_equal(everything(whole), everything(resumed))
    table, matrix = whole.lightning_module.embed.weight.detach(), whole.lightning_module.net[0].weight.detach()
    assert not torch.equal(matrix, before[1])
    # AdamW leaves the row alone that is never looked up; the network does not know rows.
    assert torch.equal(table[2], before[0][2]) == (kind == "celo2")
    assert not torch.equal(table[0], before[0][0])


class Stateful:
    """A loader that saves its position, which Lightning needs to resume within an epoch."""

    def __init__(self):
        self.batches, self.position = list(data()), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_resume_within_an_epoch_with_a_loader_that_remembers(tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=5)
    arguments = {"enable_checkpointing": True, "max_epochs": 2}
    whole = fit(tmp_path, learned(), saves, train_dataloaders=Stateful(), **arguments)
    arguments["ckpt_path"] = tmp_path / "step=5.ckpt"
    resumed = fit(tmp_path, learned(), copy.deepcopy(saves), train_dataloaders=Stateful(), **arguments)
    assert resumed.global_step == 16
    assert_equal(everything(whole), everything(resumed))


@pytest.fixture
def checkpoint(tmp_path):
    fit(tmp_path, max_epochs=1).save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt"


def test_the_checkpoint_says_which_rule_it_was(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)["callbacks"]["LearnedOptimizer"]
    rule = star()
    assert set(saved) == {
        "kind",
        "config",
        "lr",
        "reference_lr",
        "weight_decay",
        "strength",
        "source",
        "revision",
        "sha256",
        "weights",
    }
    assert saved["kind"] == "star"
    assert saved["config"] == rule.config.to_dict()
    assert saved["source"] is saved["revision"] is None
    assert len(saved["sha256"]) == 64
    assert_equal(saved["weights"].values(), [p.detach() for p in rule.state_dict().values()])


def test_a_loaded_rules_source_is_in_the_checkpoint(tmp_path):
    lopt.save_rule(star(), tmp_path / "mine")
    callback = lopt.LearnedOptimizer.from_pretrained(tmp_path / "mine")
    saved = callback.state_dict()
    assert saved["source"] == callback.rule.source.name
    assert "mine" in saved["source"]


def test_the_fingerprint_is_that_of_kind_configuration_and_weights():
    def fingerprint(rule):
        return lopt.LearnedOptimizer(rule).state_dict()["sha256"]

    assert fingerprint(star()) == fingerprint(star())
    assert len({fingerprint(rule) for rule in (star(), star(seed=1), star(step_mult=0.5))}) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rules_of_every_dtype_that_files_hold_reach_a_checkpoint(tmp_path, dtype):
    def rule():
        made = star().to(dtype)
        made.register_buffer("scalar", torch.ones((), dtype=dtype))
        return made

    def fingerprint(rule):
        return lopt.LearnedOptimizer(rule).state_dict()["sha256"]

    fit(tmp_path, lopt.LearnedOptimizer(rule()), max_epochs=1).save_checkpoint(tmp_path / "saved.ckpt")
    fit(tmp_path, lopt.LearnedOptimizer(rule()), ckpt_path=tmp_path / "saved.ckpt")  # warnings are errors
    other = rule()
    other.scalar += 1
    assert fingerprint(rule()) == fingerprint(rule()) != fingerprint(other)


def test_other_weights_of_the_same_rule_give_way_to_the_checkpoints(tmp_path, checkpoint):
    whole = fit(tmp_path, ckpt_path=checkpoint)
    other = lopt.LearnedOptimizer(star(seed=5))
    with pytest.warns(
        UserWarning, match=r"weights of the rule differ.*\(made in code, sha256 .*continues with the checkpoint's"
    ):
        resumed = fit(tmp_path, other, ckpt_path=checkpoint)
    assert resumed.optimizers[0].rule is other.rule
    assert_equal(everything(whole), everything(resumed))


@pytest.mark.parametrize("option", [{"lr": "scale"}, {"weight_decay": "decoupled"}], ids=str)
def test_another_policy_gives_way_to_the_checkpoints_and_is_pointed_out(tmp_path, checkpoint, option):
    (name,) = option
    with pytest.warns(
        UserWarning, match=f"made with {name}='(ignore|rule)', and the run continues with that, not with {name}="
    ):
        resumed = fit(tmp_path, learned(**option), ckpt_path=checkpoint)
    assert_equal(everything(resumed), everything(fit(tmp_path, ckpt_path=checkpoint)))


def test_a_lightning_checkpoint_goes_on_in_a_plain_loop(tmp_path, checkpoint):
    whole = fit(tmp_path, ckpt_path=checkpoint)
    saved = torch.load(checkpoint, weights_only=True)
    module = Module()
    module.load_state_dict(saved["state_dict"])
    optimizer = RuleOptimizer(module.parameters(), star(), safeguard=True, num_steps=16)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    for batch in data():
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    assert_equal([p.detach() for p in module.parameters()], weights(whole))


def test_a_plain_loops_state_goes_on_in_lightning(tmp_path, checkpoint):
    module = Module()
    optimizer = RuleOptimizer.replacing(module.configure_optimizers(), star(), safeguard=True, num_steps=8)
    for batch in data():
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    saved = torch.load(checkpoint, weights_only=True)
    assert_equal(saved["state_dict"].values(), [p.detach() for p in module.state_dict().values()])
    saved["optimizer_states"] = [optimizer.state_dict()]
    torch.save(saved, tmp_path / "swapped.ckpt")
    first, second = (fit(tmp_path, ckpt_path=path) for path in (checkpoint, tmp_path / "swapped.ckpt"))
    assert_equal(everything(first), everything(second))


def test_state_of_full_precision_survives_in_bfloat16(tmp_path):
    arguments = {"precision": "bf16-true", "train_dataloaders": data(dtype=torch.bfloat16)}
    fit(tmp_path, max_epochs=1, **arguments).save_checkpoint(tmp_path / "low.ckpt")
    resumed = fit(tmp_path, ckpt_path=tmp_path / "low.ckpt", **arguments)
    for param, state in resumed.optimizers[0].state.items():
        assert param.dtype == torch.bfloat16
        assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}


def receive(rank, store, sent):
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    tensor = torch.empty(sent.shape) if rank else sent
    dist.broadcast(tensor, 0)
    torch.save(tensor, f"{store}{rank}.pt")
    dist.destroy_process_group()


def test_gathered_state_is_saved_without_the_gaps_that_gloo_would_send(tmp_path):
    """Older torch gathers shards as views of padded tensors; rank 0 hands what is in a file to the other processes."""
    gathered, in_order = torch.rand(3, 4, 2)[:, :3], torch.rand(1, 2, 3, 3).to(memory_format=torch.channels_last)
    checkpoint = {"optimizer_states": [{"state": {0: {"exp_avg": gathered, "exp_avg_sq": in_order}}}, {}]}
    learned().on_save_checkpoint(None, None, checkpoint)
    saved = checkpoint["optimizer_states"][0]["state"][0]
    arguments = (tmp_path / "store", saved["exp_avg"])
    torch.multiprocessing.start_processes(receive, arguments, nprocs=2, start_method="fork")
    assert_equal([torch.load(tmp_path / "store1.pt"), saved["exp_avg_sq"]], [gathered, in_order])
    assert saved["exp_avg_sq"].stride() == in_order.stride()  # a dense tensor lies as it lay
    assert checkpoint["optimizer_states"][1] == {}
