"""Load data sets: their contents, the places that are searched, and the errors if data are missing."""

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_lopt import tasks
from lightning_lopt.tasks import datasets

ARRAYS = ("train_x", "train_y", "test_x", "test_y")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder."""
    monkeypatch.setenv(datasets.FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def images(num: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, *shape), dtype=np.uint8)


def labels(num: int) -> np.ndarray:
    return (np.arange(num) % 10).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "shape", "num_train", "num_test", "num_classes"),
    [
        ("digits", (1, 8, 8), 1437, 360, 10),
        ("breast_cancer", (30,), 455, 114, 2),
        ("wine", (13,), 142, 36, 3),
        ("diabetes", (10,), 353, 89, 0),
        ("two_moons", (2,), 1024, 256, 2),
        ("synthetic", (1, 8, 8), 1024, 256, 10),
    ],
)
def test_data_that_need_no_files(name, shape, num_train, num_test, num_classes, monkeypatch):
    monkeypatch.delenv(datasets.FOLDER_VARIABLE, raising=False)
    data = datasets.load(name)
    assert data.train_x.shape == (num_train, *shape)
    assert data.test_x.shape == (num_test, *shape)
    assert data.num_classes == num_classes
    assert data.train_x.dtype == torch.float32
    assert data.train_y.dtype == (torch.int64 if num_classes else torch.float32)
    if num_classes:
        assert set(data.train_y.tolist()) == set(data.test_y.tolist()) == set(range(num_classes))
    if len(shape) == 3:
        assert data.train_x.min() >= 0
        assert data.train_x.max() <= 1
    assert datasets.load(name) is data
    assert datasets.is_available(name)


def test_the_digits_are_split_in_the_same_way_for_ever():
    data = datasets.load("digits")
    assert data.train_y[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]
    assert data.test_y[:10].tolist() == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1]
    assert data.train_x.max() == 1


def test_tables_are_standardized_by_their_training_part():
    data = datasets.load("diabetes")
    for part in (data.train_x, data.train_y):
        torch.testing.assert_close(part.mean(0), torch.zeros_like(part.mean(0)), rtol=0, atol=1e-5)
        torch.testing.assert_close(part.std(0), torch.ones_like(part.std(0)), rtol=0, atol=1e-5)
    assert data.test_x.mean(0).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "shape"), [("mnist", (28, 28)), ("fashion_mnist", (28, 28)), ("cifar10", (32, 32, 3))]
)
def test_images_are_read_from_the_folder(folder, name, shape):
    train, test = images(20, *shape), images(10, *shape)
    np.savez(folder / f"{name}.npz", train_x=train, train_y=labels(20), test_x=test, test_y=labels(10))
    data = datasets.load(name)
    channels = shape[2] if len(shape) == 3 else 1
    assert data.train_x.shape == (20, channels, *shape[:2])
    assert data.test_x.shape == (10, channels, *shape[:2])
    assert float(data.train_x[7, channels - 1, 3, 5]) == pytest.approx(train[(7, 3, 5, 2)[: train.ndim]] / 255)
    assert torch.equal(data.train_y, torch.arange(20) % 10)
    assert data.num_classes == 10
    assert tasks.build("c", "mlp", name, hidden=(4,)).source.size("train") == 16


def test_a_text_is_read_from_the_folder(folder):
    (folder / "tinyshakespeare.txt").write_text("to be or not\n" * 100)
    data = datasets.load("tinyshakespeare")
    assert data.is_text
    assert data.num_classes == len(set("to be or not\n"))
    assert data.train_x.dtype == torch.uint8
    assert torch.equal(data.train_x[1:], data.train_y[:-1])
    assert len(data.train_x) + len(data.test_x) + 2 == 1300
    vocabulary = sorted(set("to be or not\n"))
    assert "".join(vocabulary[token] for token in data.train_x[:5]) == "to be"


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "tinyshakespeare"])
def test_missing_data_say_where_they_are_looked_for(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.delenv(datasets.FOLDER_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match="LIGHTNING_LOPT_DATA is not set.* Set LIGHTNING_LOPT_DATA to a folder"):
        datasets.load(name)
    assert not datasets.is_available(name)
    monkeypatch.setenv(datasets.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"LIGHTNING_LOPT_DATA=.* has no {name}\.(npz|txt)") as error:
        datasets.load(name)
    assert "\n" not in str(error.value)


def test_unknown_data_name_the_known():
    with pytest.raises(ValueError, match=r"Unknown dataset 'imagenet'; known are \['breast_cancer', 'cifar10'"):
        datasets.load("imagenet")


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_a_broken_file_is_named(folder, content):
    (folder / "mnist.npz").write_bytes(content)
    with pytest.raises(ValueError, match="mnist.npz cannot be read: it must be an .npz with the uint8 arrays train_x"):
        datasets.load("mnist")


def test_a_file_without_its_arrays_is_named(folder):
    np.savez(folder / "mnist.npz", train_x=images(3, 28, 28))
    with pytest.raises(ValueError, match="cannot be read"):
        datasets.load("mnist")
    (folder / "tinyshakespeare.txt").write_text("short")
    with pytest.raises(ValueError, match="at least 1,000 characters"):
        datasets.load("tinyshakespeare")


def test_torchvision_is_asked_where_the_folder_has_nothing(folder, monkeypatch):
    asked = []

    class CIFAR10:
        def __init__(self, root, train, download):
            asked.append((root, train, download))
            self.data = images(12 if train else 10, 32, 32, 3)
            self.targets = labels(12 if train else 10).tolist()

    class MNIST:
        def __init__(self, root, train, download):
            raise RuntimeError("no network")

    module = types.SimpleNamespace(CIFAR10=CIFAR10, MNIST=MNIST)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    data = datasets.load("cifar10")
    assert asked == [(str(folder), True, True), (str(folder), False, True)]
    assert data.train_x.shape == (12, 3, 32, 32)
    assert data.test_y.tolist() == list(range(10))
    with pytest.raises(FileNotFoundError, match=r"torchvision could not provide it \(no network\)"):
        datasets.load("mnist")


def test_without_scikit_learn_the_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="'wine' needs scikit-learn, which is not installed: pip install"):
        datasets._load.__wrapped__("wine", None)


def test_area_resizing_is_average_pooling_where_sizes_divide():
    x = torch.rand(3, 2, 12, 12)
    torch.testing.assert_close(datasets.area_resize(x, 4), F.avg_pool2d(x, 3))
    torch.testing.assert_close(datasets.area_resize(x, 12), x)


@pytest.mark.parametrize("size", [1, 5, 8, 14, 20])
def test_area_resizing_keeps_the_mean(size):
    x = torch.rand(3, 2, 14, 14)
    resized = datasets.area_resize(x, size)
    assert resized.shape == (3, 2, size, size)
    torch.testing.assert_close(resized.mean((2, 3)), x.mean((2, 3)))


def test_resized_gray_images_are_shared_between_tasks():
    data = datasets.synthetic((3, 12, 12))
    one, other = (tasks.build("t", "mlp", data, image_size=4, grayscale=True, hidden=(h,)) for h in (3, 5))
    assert one.source.shape == (1, 4, 4)
    assert one.source.inputs["test"].data_ptr() == other.source.inputs["test"].data_ptr()
    expected = F.avg_pool2d(data.test_x.mean(1, keepdim=True), 3)
    torch.testing.assert_close(one.source.inputs["test"], expected)


def test_only_images_are_resized():
    with pytest.raises(ValueError, match="image_size=4 is not allowed"):
        tasks.make("wine-mlp", image_size=4)
    with pytest.raises(ValueError, match="grayscale=True is not allowed for 'wine'"):
        tasks.make("wine-mlp", grayscale=True)


def test_the_synthetic_data_come_from_their_seed():
    global_state = torch.get_rng_state()
    assert torch.equal(datasets.synthetic(seed=1).train_x, datasets.synthetic(seed=1).train_x)
    assert not torch.equal(datasets.synthetic(seed=1).train_x, datasets.synthetic(seed=2).train_x)
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize(
    ("name", "num_train", "mean"),
    [("mnist", 60_000, 0.1307), ("fashion_mnist", 60_000, 0.2860), ("cifar10", None, 0.4734)],
)
def test_the_real_images(name, num_train, mean):
    if not datasets.is_available(name):
        pytest.skip(f"{name} is not here: set {datasets.FOLDER_VARIABLE}")
    data = datasets.load(name)
    assert len(data.test_x) == 10_000
    assert num_train in (None, len(data.train_x))
    assert float(data.train_x.mean()) == pytest.approx(mean, abs=0.003)
