"""The tasks of the real-size suite and of the second unseen suite: their data, starts and special properties."""

import math
from pathlib import Path

import pytest
import torch

from lightning_lopt import tasks
from lightning_lopt.evaluation.suites import JUDGING_ONLY, REAL, REAL_JUDGING, REAL_OPEN, SUITES, UNSEEN2
from lightning_lopt.tasks import datasets, real
from lightning_lopt.tasks.unseen import BoundaryValue, data

ROOT = Path(__file__).parents[2]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def needs(name: str) -> None:
    if not datasets.is_available(name):
        pytest.skip(f"{name} is not here: set {datasets.FOLDER_VARIABLE}")


def test_the_suites_are_in_the_catalog_and_what_judges_is_in_no_recipe():
    assert len(UNSEEN2) >= 14
    for case in (*REAL, *UNSEEN2):
        assert case.task in tasks.list_tasks()
    assert {*REAL_JUDGING, *REAL_OPEN} == set(REAL)
    assert 2 * len(REAL_JUDGING) >= len(REAL)
    assert {case.task for case in REAL} >= JUDGING_ONLY
    assert all(case.one_by_one for case in REAL)
    seen = {case.task for name in ("heldout", "unseen") for case in SUITES[name]}
    judging = JUDGING_ONLY | {case.task for case in UNSEEN2}
    assert not seen & judging
    for path in [*(ROOT / "examples" / "recipes").rglob("*.*"), *(ROOT / "examples" / "configs").rglob("*.*")]:
        text = path.read_text(encoding="utf-8")
        assert not [name for name in judging if name in text], f"{path} may not use them"


@pytest.mark.parametrize("name", [case.task for case in UNSEEN2])
def test_unseen_tasks_have_three_splits(name):
    if (dataset := tasks.dataset_of(name)) is not None:
        needs(dataset)
    task = tasks.make(name)
    assert task.splits == ("train", "valid", "test")
    if isinstance(task, tasks.Supervised):
        parts = [task.source.take(split, torch.arange(50))[0] for split in task.splits]
        assert not torch.equal(parts[0], parts[1])
        assert not torch.equal(parts[1], parts[2])


def test_hidden_matrices_are_neither_embeddings_nor_heads_nor_vectors():
    expected = {
        "digits-mlp": ("layers.0.weight",),
        "digits-logreg": (),
        "digits-conv": ("convs.0.weight", "convs.1.weight"),
        "additions-gru": ("gates.weight", "candidate.weight"),
        "visits-factors": (),
        "relations-pairs": ("up.weight", "middle.weight"),
        "rosenbrock": (),
        "digits-es": ("layers.0.weight",),
    }
    for name, matrices in expected.items():
        assert tasks.make(name).hidden_matrices == matrices, name
    vit = tasks.make("digits-vit").hidden_matrices
    assert "patch.weight" in vit
    assert not {"token", "positions", "head.weight"} & set(vit)
    game = tasks.make("real-policy-gradient").hidden_matrices
    assert game == tuple(f"{part}.layers.{i}.weight" for part in ("policy", "value") for i in (0, 1))


# --- Real kinds of work ---


def test_siren_starts_with_the_papers_deviations():
    task = tasks.make("real-siren")
    params = task.init(generator(), population=20).params
    assert params["layers.0.weight"].std() == pytest.approx(1 / (2 * math.sqrt(3)), rel=0.05)
    assert params["layers.1.weight"].std() == pytest.approx(math.sqrt(2 / 128) / 30, rel=0.02)
    batch = task.batch(generator(), {})
    assert len(batch.x) == int(0.75 * int(0.8 * 32 * 32))  # all pixels of the training set


def test_a_factorization_learns_from_rows_of_very_different_popularity():
    source = tasks.make("real-factorization").source
    counts = source.inputs["train"][:, 0].bincount(minlength=5000)
    assert counts.max() > 200 * counts.float().median()
    assert (counts == 0).sum() > 50
    vectors = {name: torch.randn(30, 16) for name in ("user.weight", "item.weight")}
    pairs = torch.tensor([[3, 4], [0, 29]])
    found = real.Factorization(users=30, items=30).apply(vectors, pairs)
    expected = [vectors["user.weight"][u] @ vectors["item.weight"][i] for u, i in pairs.tolist()]
    torch.testing.assert_close(found.squeeze(1), torch.stack(expected))


def test_wrong_labels_are_in_the_training_set_alone_and_stay(monkeypatch):
    given = datasets.synthetic(num_train=4000)
    monkeypatch.setattr(datasets, "load", lambda name: given)
    task = tasks.make("real-noisy-labels", num=1000)
    train = task.source.targets["train"]
    assert len(train) == 1000
    assert (train != given.train_y[:1000]).float().mean() == pytest.approx(0.4 * 0.9, abs=0.04)
    assert torch.equal(task.source.targets["valid"], given.train_y[1000:3048])
    assert torch.equal(train, tasks.make("real-noisy-labels", num=1000).source.targets["train"])


def test_new_classes_are_not_the_old_ones(monkeypatch):
    given = datasets.synthetic(shape=(3, 8, 8), num_train=8000)
    monkeypatch.setattr(datasets, "load", lambda name: given)
    task = tasks.make("real-finetune-conv", num=500, image_size=8, channels=(4, 4, 4), pretrain_steps=1)
    assert (task.task.source.num_classes, task.source.source.num_classes) == (5, 5)
    old, new = given.train_x[given.train_y < 5], given.train_x[given.train_y >= 5]
    assert torch.equal(task.task.source.inputs["train"], new[:500])
    assert torch.equal(task.source.source.inputs["train"], old[: len(task.source.source.inputs["train"])])
    start, params = task.init(generator()).params, task.weights
    changed = {name for name, value in start.items() if not torch.equal(value, params[name])}
    assert changed <= {"head.weight", "head.bias"}
    assert "head.weight" in changed


def test_texts_with_one_vocabulary():
    needs("python_docs")
    docs = datasets.load("python_docs")
    assert docs.num_classes == 96
    assert docs.train_x.max() < 96
    needs("tinyshakespeare")
    assert datasets.load("tinyshakespeare_ascii").num_classes == 96
    plain = datasets.load("tinyshakespeare")
    assert len(datasets.load("tinyshakespeare_ascii").train_x) == len(plain.train_x)


def test_speeches_as_bags_of_words(monkeypatch, tmp_path):
    names = [f"SPEAKER {i}" for i in range(12)]
    speeches = [f"{name}:\nword{chr(97 + i)} word{chr(97 + i)} the" for i, name in enumerate(names) for _ in range(20)]
    (tmp_path / "tinyshakespeare.txt").write_text("\n\n".join([*speeches, "RARE:\nonce"]), encoding="utf-8")
    monkeypatch.setenv(datasets.FOLDER_VARIABLE, str(tmp_path))
    found = datasets.load("speakers")
    assert found.num_classes == 12
    assert len(found.train_x) + len(found.test_x) == 240
    for bag, who in zip(found.train_x[:20], found.train_y[:20], strict=True):
        # The commonest word is "the"; then the speakers' words, in alphabetical order.
        assert sorted(bag.nonzero().squeeze(1).tolist()) == [0, 1 + int(who)]
        assert bag[1 + int(who)] == pytest.approx(math.log(3))


def test_a_text_without_speeches_is_refused(monkeypatch, tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("no one speaks " * 100, encoding="utf-8")
    monkeypatch.setenv(datasets.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match="12 speakers"):
        datasets.load("speakers")


# --- Data made by formulas ---


def test_diameters_and_graphs_by_hand():
    x, y = data.diameters(num=50)
    expected = torch.tensor([max(float((a - b).norm()) for a in cloud for b in cloud) for cloud in x])
    assert torch.corrcoef(torch.stack([y, expected]))[0, 1] > 0.9999
    graphs, share = data.clustering(num=30)
    assert torch.equal(graphs, graphs.mT)
    found = []
    for graph in graphs.long().tolist():
        paths = [
            (a, b, c) for b in range(12) for a in range(12) for c in range(12) if a != c and graph[a][b] and graph[b][c]
        ]
        found.append(sum(graph[a][c] for a, _, c in paths) / len(paths))
    assert torch.corrcoef(torch.stack([share, torch.tensor(found)]))[0, 1] > 0.9999


def test_brackets_are_labeled_by_whether_they_match():
    x, y = data.brackets(num=300)
    kinds = {0: "(", 1: "[", 2: ")", 3: "]"}
    for row, label in zip(x.tolist(), y.tolist(), strict=True):
        text = "".join(kinds[token] for token in row)
        while "()" in text or "[]" in text:
            text = text.replace("()", "").replace("[]", "")
        assert (text == "") == bool(label)
    assert 0.4 < y.mean() < 0.7


def test_additions_and_relations():
    x, y = data.additions(num=200)
    sums = (x[..., 0] * x[..., 1]).sum(1)
    assert (x[..., 1].sum(1) == 2).all()
    torch.testing.assert_close(y, (sums - sums.mean()) / sums.std())
    pairs, kinds = data.relations(things=12, groups=3, kinds=4, wrong=0.0)
    table = kinds.reshape(12, 12)  # pairs are in order
    assert torch.equal(pairs[13], torch.tensor([1, 1]))
    # Things of the same group relate to all others alike.
    assert len({tuple(row) for row in table.tolist()}) <= 3
    assert len({tuple(column) for column in table.T.tolist()}) <= 3


def test_the_boundary_value_problem_has_the_solution_that_it_says(monkeypatch):
    def exact(self, params, x):
        pi = math.pi
        return torch.sin(pi * x) + 0.5 * torch.sin(2 * pi * x) - 0.25 * torch.sin(3 * pi * x)

    task = BoundaryValue(name="exact")
    points = task.batch(generator(), {}).double()
    ends = torch.tensor([0.0, 1.0])
    params = task.init(generator()).params
    assert torch.vmap(lambda x: task.solution(params, x))(ends).abs().max() == 0
    monkeypatch.setattr(BoundaryValue, "solution", exact)
    assert task.loss({}, points) < 1e-20
    assert task.eval_loss({}, points) < 1e-12
    assert exact(task, {}, ends.double()).abs().max() < 1e-12
    monkeypatch.setattr(BoundaryValue, "solution", lambda self, params, x: 0.0 * x)
    assert task.eval_loss({}, points) == pytest.approx(1.0)
    assert task.loss({}, torch.linspace(0, 1, 4001).double()) == pytest.approx(1.0, rel=1e-2)
