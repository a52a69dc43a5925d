"""Fine-tuning starts from trained weights; low-rank adapters are what LoRA says."""

import pytest
import torch

from lightning_lopt import tasks
from lightning_lopt.tasks.finetuning import FineTuned, LowRank, pretrained


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tuned() -> FineTuned:
    target = tasks.make("digits-mlp", label_noise=(0.5, 0.5))
    return FineTuned(task=target, source=tasks.make("digits-mlp"), pretrain_steps=150, pretrain_lr=1e-2)


def test_the_weights_are_trained_and_the_same_for_all_members(tuned):
    start = tuned.init(generator(), population=2)
    batch = tuned.source.eval_batch("test", {})
    own = {name: value[1] for name, value in start.params.items()}
    fresh = tuned.source.init(generator()).params
    assert tuned.source.loss(own, batch) < 0.3 * tuned.source.loss(fresh, batch)
    for value in start.params.values():
        assert torch.equal(value[0], value[1])
        assert value[0].data_ptr() != value[1].data_ptr()
    assert pretrained(tuned.source, 150, 1e-2) is pretrained(tuned.source, 150, 1e-2)


def test_what_is_forgotten(tuned):
    start = tuned.init(generator())
    batch = tuned.eval_batch("test", start.constants)
    assert tuned.metrics(start.params, batch)["forgotten"] == pytest.approx(0.0, abs=1e-6)
    worse = {name: torch.zeros_like(value) for name, value in start.params.items()}
    assert tuned.metrics(worse, batch)["forgotten"] > 1.0


def test_a_new_head_starts_anew():
    head = ("layers.1.weight", "layers.1.bias")
    mlp = tasks.make("digits-mlp")
    task = FineTuned(task=mlp, source=mlp, pretrain_steps=3, fresh=head)
    start, plain = task.init(generator(5)), mlp.init(generator(5))
    for name, value in start.params.items():
        assert torch.equal(value, plain.params[name]) == (name in head)
    assert set(task.metrics(start.params, task.eval_batch("test", {}))) == {"accuracy"}


def test_low_rank_adapters(tuned):
    task = LowRank(name="lora", task=tuned, rank=2, alpha=6.0, adapted=("layers.0.weight",))
    start = task.init(generator())
    assert {name: tuple(value.shape) for name, value in start.params.items()} == {
        "layers.0.weight.A": (2, 64),
        "layers.0.weight.B": (32, 2),
    }
    batch = task.batch(generator(1), start.constants)
    frozen = start.constants.frozen
    torch.testing.assert_close(task.loss(start.params, batch), tuned.loss(frozen, batch.inner))  # B starts at 0
    params = {name: torch.randn(value.shape, generator=generator(2)) * 0.1 for name, value in start.params.items()}
    a, b = params.values()
    moved = {**frozen, "layers.0.weight": frozen["layers.0.weight"] + 3.0 * b @ a}
    torch.testing.assert_close(task.loss(params, batch), tuned.loss(moved, batch.inner))
    full, loss = tuned.grad_and_value(moved, batch.inner)
    grads, same = task.grad_and_value(params, batch)
    torch.testing.assert_close(same, loss)
    outer = full["layers.0.weight"]
    torch.testing.assert_close(grads["layers.0.weight.A"], 3.0 * b.T @ outer, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads["layers.0.weight.B"], 3.0 * outer @ a.T, rtol=1e-4, atol=1e-6)
    assert task.hidden_matrices == tuple(start.params)
    assert LowRank(task=tuned).names == tuned.hidden_matrices == ("layers.0.weight",)
