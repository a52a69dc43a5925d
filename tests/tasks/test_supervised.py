"""Supervised tasks: their data, the differences between members, and the objectives."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from lightning_lopt import tasks
from lightning_lopt.tasks import datasets, objectives, sources
from lightning_lopt.tasks.supervised import Batch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(num: int = 100, num_classes: int = 2) -> datasets.Dataset:
    """Examples whose values are their indices; those of test examples are negative."""
    x = torch.arange(num, dtype=torch.float32).unsqueeze(1)
    y = torch.arange(num) % num_classes
    return datasets.Dataset("numbered", x, y, -1 - x[:20], y[:20], num_classes)


def text(num: int = 500) -> datasets.Dataset:
    tokens = torch.arange(num).remainder(7).to(torch.uint8)
    return datasets.Dataset("text", tokens[:-1], tokens[1:], tokens[:50], tokens[1:51], 7)


def test_batches_are_uniform_draws_from_the_first_four_fifths():
    task = tasks.build("n", "mlp", numbered(), batch_size=1000)
    batch = task.batch(generator(), {}, population=8)
    assert batch.x.shape == (8, 1000, 1)
    counts = batch.x.flatten().long().bincount(minlength=100)
    assert (counts[80:] == 0).all()
    assert float(counts[:80].float().std()) == pytest.approx(10, rel=0.4)  # of a multinomial: sqrt(8000 / 80)
    assert torch.equal(batch.y, batch.x.squeeze(-1).long() % 2)


def test_splits_do_not_overlap():
    task = tasks.build("n", "mlp", numbered())
    seen = {split: set(task.eval_batch(split, {}).x.flatten().tolist()) for split in task.splits}
    assert seen == {"train": set(range(80)), "valid": set(range(80, 100)), "test": set(range(-20, 0))}
    assert tasks.build("n", "mlp", numbered(), train_fraction=1.0).splits == ("train", "test")


def test_held_out_examples_are_evenly_spaced_or_drawn_without_replacement():
    task = tasks.build("n", "mlp", numbered())
    assert task.eval_batch("train", {}, size=4).x.flatten().tolist() == [0, 20, 40, 60]
    drawn = task.eval_batch("train", {}, size=80, generator=generator()).x.flatten().tolist()
    assert sorted(drawn) == list(range(80))
    assert drawn != list(range(80))
    assert len(task.eval_batch("train", {}, size=1000).x) == 80
    with pytest.raises(ValueError, match="size=0 is not allowed"):
        task.eval_batch("train", {}, size=0)
    shared = task.eval_batch("test", {}, population=5)
    assert shared.x.shape == (5, 20, 1)
    assert shared.x.stride(0) == 0


def test_full_batches():
    task = tasks.build("n", "mlp", numbered(), batch_size=None)
    assert task.batch(generator(), {}, population=3).x[1].flatten().tolist() == list(range(80))
    assert task.batch(generator(), {}).x.flatten().tolist() == list(range(80))
    with pytest.raises(ValueError, match="subset=.* is not allowed with batch_size=None"):
        tasks.build("n", "mlp", numbered(), batch_size=None, subset=(0.1, 0.2))


def test_a_member_sees_its_own_share_of_the_data():
    task = tasks.build("n", "mlp", numbered(), batch_size=500, subset=(0.25, 0.5))
    start = task.init(generator(), population=20)
    seen = [set() for _ in range(20)]
    for seed in range(3):
        batch = task.batch(generator(seed), start.constants, population=20)
        for i in range(20):
            seen[i] |= set(batch.x[i].flatten().long().tolist())
    for i, own in enumerate(seen):
        first, count = (int(start.constants[name][i]) for name in ("first", "count"))
        assert 20 <= count <= 40
        assert own == {(first + k) % 80 for k in range(count)}
    assert len({frozenset(own) for own in seen}) > 10


def test_labels_are_wrong_as_often_as_a_member_has_it():
    task = tasks.build("n", "mlp", numbered(num_classes=4), batch_size=20_000, label_noise=(0.1, 0.5))
    start = task.init(generator(), population=4)
    batch = task.batch(generator(1), start.constants, population=4)
    wrong = (batch.y != batch.x.squeeze(-1).long() % 4).float().mean(1)
    torch.testing.assert_close(wrong, 0.75 * start.constants["label_noise"], rtol=0.05, atol=0.0)
    held_out = task.eval_batch("train", start.constants, population=4)
    assert torch.equal(held_out.y, held_out.x.squeeze(-1).long() % 4)
    single = task.init(generator())
    assert task.batch(generator(1), single.constants).y.shape == (20_000,)


def test_dropout_masks_are_drawn_with_the_batch():
    task = tasks.make("digits-dropout-mlp", dropout=0.3, batch_size=500)
    batch = task.batch(generator(), {}, population=2)
    assert [mask.shape for mask in batch.masks] == [(2, 500, 64), (2, 500, 64)]
    assert torch.equal(batch.masks[0].unique(), torch.tensor([0.0, 1 / 0.7]))
    assert float((batch.masks[0] == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert task.eval_batch("test", {}).masks == ()


def test_windows_of_a_text():
    task = tasks.build("t", "lstm", text(), length=6, batch_size=4, embed=2, hidden=3)
    batch = task.batch(generator(), {}, population=3)
    assert batch.x.shape == batch.y.shape == (3, 4, 6)
    assert torch.equal(batch.y, (batch.x + 1) % 7)
    assert task.source.size("train") == int(0.8 * 499) - 6
    last = task.source.take("train", torch.tensor(task.source.size("train") - 1))
    assert last[1][-1] == task.source.tokens["train"][-1]
    assert vmap(task.loss)(task.init(generator(), 3).params, batch).shape == (3,)


def test_texts_and_tables_are_not_confused():
    with pytest.raises(ValueError, match="it is a text"):
        tasks.build("t", "mlp", text())
    with pytest.raises(ValueError, match="needs a text"):
        tasks.build("t", "lstm", numbered())
    with pytest.raises(ValueError, match="length=60 is not allowed"):
        tasks.build("t", "lstm", text(), length=60)
    with pytest.raises(ValueError, match="objective='mse' is not allowed"):
        tasks.build("t", "lstm", text(), objective="mse")
    with pytest.raises(ValueError, match="length=0 is not allowed"):
        sources.windows(text(), 0)


def test_objectives_are_torchs():
    outputs, labels = torch.randn(8, 5), torch.randint(5, (8,))
    batch = Batch(torch.rand(8, 5), labels)
    close = torch.testing.assert_close
    close(objectives.cross_entropy(outputs, batch), F.cross_entropy(outputs, labels))
    probabilities = torch.sigmoid(outputs) / torch.sigmoid(outputs).sum(1, keepdim=True)
    close(objectives.sigmoid_cross_entropy(outputs, batch), F.nll_loss(probabilities.log(), labels))
    close(objectives.mse(outputs, batch), F.mse_loss(outputs, F.one_hot(labels, 5).float()))
    close(objectives.reconstruction(outputs, batch), F.mse_loss(torch.sigmoid(outputs), batch.x))
    targets = Batch(batch.x, torch.rand(8))
    close(objectives.regression(outputs[:, :1], targets), F.mse_loss(outputs[:, 0], targets.y))
    binary = Batch(batch.x, labels % 2)
    expected = F.binary_cross_entropy_with_logits(outputs[:, 0], binary.y.float())
    close(objectives.logistic(outputs[:, :1], binary), expected)
    words = Batch(torch.zeros(2, 4), torch.randint(5, (2, 4)))
    logits = torch.randn(2, 4, 5)
    close(objectives.cross_entropy(logits, words), F.cross_entropy(logits.flatten(0, 1), words.y.flatten()))


def test_huge_outputs_do_not_overflow():
    outputs, batch = torch.tensor([[1e30, -1e30], [-1e4, 1e4]]), Batch(torch.zeros(2), torch.tensor([0, 0]))
    assert objectives.cross_entropy(outputs, batch) == 1e4
    assert objectives.logistic(outputs[1:, :1], Batch(torch.zeros(1), torch.tensor([1]))) == 1e4


@pytest.mark.parametrize(("name", "share"), [("digits-logreg", 1.0), ("digits-mse-mlp", 1.0), ("two-moons", 1.0)])
def test_the_accuracy_counts_right_answers(name, share):
    task = tasks.make(name)
    start = task.init(generator())
    batch = task.eval_batch("test", start.constants)
    outputs = task.network.apply(start.params, batch.x)
    right = outputs.argmax(1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).long()
    assert float(task.metrics(start.params, batch._replace(y=right))["accuracy"]) == share


def test_the_penalty_is_the_norm_of_all_parameters():
    plain, penalized = tasks.make("two-moons", l2=0.0), tasks.make("two-moons")
    start = plain.init(generator())
    batch = plain.batch(generator(), start.constants)
    norm = torch.cat([param.flatten() for param in start.params.values()]).norm()
    difference = penalized.loss(start.params, batch) - plain.loss(start.params, batch)
    torch.testing.assert_close(difference, 5e-3 * norm, rtol=1e-4, atol=1e-6)


def test_a_longer_run_learns_the_digits():
    """300 steps of Adam on three members together reach 90 % on held-out digits, like logistic regression."""
    task, stream = tasks.make("digits-mlp"), generator()
    start = task.init(stream, population=3)
    params = {name: param.requires_grad_() for name, param in start.params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=1e-2)
    for _ in range(300):
        batch = task.batch(stream, start.constants, population=3)
        grads, _ = vmap(task.grad_and_value)({k: v.detach() for k, v in params.items()}, batch)
        for name, param in params.items():
            param.grad = grads[name]
        optimizer.step()
    held_out = task.eval_batch("test", start.constants, population=3)
    accuracy = vmap(task.metrics)({k: v.detach() for k, v in params.items()}, held_out)["accuracy"]
    assert accuracy.min() > 0.9


def test_the_reference_sizes_follow_from_the_data():
    task = tasks.build("c", "conv", datasets.synthetic((3, 32, 32), num_train=20, num_test=10))
    assert task.num_params == 56_970
    assert task.loss_cap == pytest.approx(1.5 * math.log(10))
    encoder = tasks.build(
        "a", "mlp", datasets.synthetic((1, 28, 28)), hidden=(128, 32, 128), objective="reconstruction"
    )
    assert encoder.num_params == 209_968
    assert encoder.loss_cap == 1.0


def test_weight_decay_is_half_the_squares_of_the_named_parameters():
    plain = tasks.make("digits-mlp")
    decayed = tasks.make("digits-mlp", weight_decay=0.1, decayed=("layers.1.weight",))
    params, batch = plain.init(generator()).params, plain.batch(generator(1), {})
    expected = 0.05 * params["layers.1.weight"].square().sum()
    torch.testing.assert_close(decayed.loss(params, batch) - plain.loss(params, batch), expected)
    with pytest.raises(ValueError, match=r"decayed='w' is not allowed"):
        tasks.make("digits-mlp", decayed=("w",))


def test_a_rescaled_task_is_the_task_in_other_units():
    task = tasks.catalog.rescaled("r", "digits-mlp", scale_range=(0.5, 0.5), hidden=(8,))
    inner = tasks.make("digits-mlp", hidden=(8,))
    start, plain = task.init(generator()), inner.init(generator())
    assert task.num_params == inner.num_params
    for name, param in plain.params.items():
        torch.testing.assert_close(start.params[name], 2 * param)
