"""Load data sets as tensors, by name.

`digits`, `breast_cancer`, `wine`, `iris`, `diabetes` and `two_moons` come with scikit-learn. `mnist`, `fashion_mnist`,
`cifar10` and `tinyshakespeare` are read from the folder `$LIGHTNING_LOPT_DATA`; torchvision, if it is installed, loads
the images otherwise. From the same text come `tinyshakespeare_ascii`, with the vocabulary of `python_docs` (the help
topics of Python's standard library), and `speakers`: speeches as bags of words. `synthetic` is artificial, and is used
only if requested by name. Nothing is loaded on import, and everything that is loaded stays cached.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import importlib.util
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER_VARIABLE = "LIGHTNING_LOPT_DATA"
_TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
_SHAKESPEARE = ("tinyshakespeare", "tinyshakespeare_ascii", "speakers")
_ASCII = "\n" + "".join(map(chr, range(32, 127)))
_ARRAYS = ("train_x", "train_y", "test_x", "test_y")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test examples on the CPU. Images are float32 in [0, 1], not standardized."""

    name: str
    # Inputs: images (n, c, h, w), features (n, f), or text (n,) as uint8 tokens. Targets: int64 classes (n,), float32
    # values (n,), or the following tokens.
    train_x: Tensor = dataclasses.field(repr=False)
    train_y: Tensor = dataclasses.field(repr=False)
    test_x: Tensor = dataclasses.field(repr=False)
    test_y: Tensor = dataclasses.field(repr=False)
    num_classes: int  # 0 for regression; the vocabulary's size for text

    @property
    def is_text(self) -> bool:
        """Whether the examples are one long sequence of tokens."""
        return self.train_x.dim() == 1


def load(name: str) -> Dataset:
    """Load a data set by name, and keep it in memory.

    Args:
        name: one of `list_datasets()`.

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: if the data are missing; the message says where to put them.
        ModuleNotFoundError: if scikit-learn is required and not installed.

    Example:
        >>> digits = load("digits")
        >>> digits.train_x.shape, digits.test_x.shape, digits.num_classes
        (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]), 10)
    """
    if name not in _LOADERS:
        raise ValueError(f"Unknown dataset {name!r}; known are {list_datasets()}.")
    return _load(name, os.environ.get(FOLDER_VARIABLE))


def list_datasets() -> list[str]:
    """Return the names of all data sets."""
    return sorted(_LOADERS)


def is_available(name: str) -> bool:
    """Whether `load(name)` works without a download."""
    if name in (*_TORCHVISION, *_SHAKESPEARE):
        name = "tinyshakespeare" if name in _SHAKESPEARE else name
        return _file(name, os.environ.get(FOLDER_VARIABLE)) is not None
    if name == "python_docs":
        return importlib.util.find_spec("pydoc_data") is not None
    return name == "synthetic" or importlib.util.find_spec("sklearn") is not None


def synthetic(
    shape: tuple[int, ...] = (1, 8, 8), num_classes: int = 10, num_train: int = 1024, num_test: int = 256, seed: int = 0
) -> Dataset:
    """Make an artificial classification problem: noisy copies of one random pattern per class, clipped to [0, 1].

    Args:
        shape: shape of one example (default: one channel of 8 x 8).
        num_classes: number of classes (default: 10).
        num_train: number of training examples (default: 1,024).
        num_test: number of test examples (default: 256).
        seed: seed of everything random.

    Example:
        >>> synthetic((3, 4, 4), num_classes=2).train_x.shape
        torch.Size([1024, 3, 4, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(num_classes, *shape, generator=generator)
    labels = torch.randint(num_classes, (num_train + num_test,), generator=generator)
    noise = 0.5 * torch.randn(len(labels), *shape, generator=generator)
    images = (patterns[labels] + noise).clamp(0.0, 1.0)
    return Dataset(
        "synthetic", images[:num_train], labels[:num_train], images[num_train:], labels[num_train:], num_classes
    )


def resize(dataset: Dataset, size: int) -> Dataset:
    """Resize the images of a data set to `size` x `size` pixels by area averaging."""
    if size < 1 or dataset.train_x.dim() != 4:
        raise ValueError(
            f"image_size={size} is not allowed: it must be at least 1, and {dataset.name!r} must have images."
        )
    if dataset.train_x.shape[-2:] == (size, size):
        return dataset
    return dataclasses.replace(
        dataset, train_x=area_resize(dataset.train_x, size), test_x=area_resize(dataset.test_x, size)
    )


@functools.lru_cache(maxsize=8)
def part(dataset: Dataset, num_train: int, classes: tuple[int, ...] | None = None) -> Dataset:
    """The first `num_train` training examples of some classes (default: of all), which are numbered anew from 0.

    Kept, so that tasks on the same examples have one copy in common.

    Example:
        >>> some = part(load("digits"), 100, classes=(3, 7))
        >>> len(some.train_y), some.num_classes, sorted(set(some.test_y.tolist()))
        (100, 2, [0, 1])
    """
    kept = tuple(range(dataset.num_classes)) if classes is None else classes
    chosen = torch.tensor(kept)

    def of(x: Tensor, y: Tensor, num: int | None) -> tuple[Tensor, Tensor]:
        index = torch.isin(y, chosen).nonzero().squeeze(1)[:num]
        return x[index], (y[index].unsqueeze(1) == chosen).long().argmax(1)

    train_x, train_y = of(dataset.train_x, dataset.train_y, num_train)
    test_x, test_y = of(dataset.test_x, dataset.test_y, None)
    return Dataset(dataset.name, train_x, train_y, test_x, test_y, len(kept))


def grayscale(dataset: Dataset) -> Dataset:
    """Average the channels of the images of a data set."""
    if dataset.train_x.dim() != 4:
        raise ValueError(f"grayscale=True is not allowed for {dataset.name!r}: it does not have images.")
    return dataclasses.replace(
        dataset, train_x=dataset.train_x.mean(1, keepdim=True), test_x=dataset.test_x.mean(1, keepdim=True)
    )


def area_resize(images: Tensor, size: int) -> Tensor:
    """Resize images by area averaging: (n, c, h, w) -> (n, c, size, size).

    Old pixels are weighted by their overlap with each new pixel. This is exact even if the sizes do not divide, where
    adaptive pooling gives partly covered pixels their full weight.

    Example:
        >>> area_resize(torch.tensor([[[[0.0, 3.0, 6.0]] * 3]]), 2)[0, 0, 0]
        tensor([1., 5.])
    """
    rows, columns = (_overlap(old, size).to(images) for old in images.shape[-2:])
    return rows @ images @ columns.T


def _overlap(old: int, new: int) -> Tensor:
    """(new, old) fractions of each new pixel that each old one covers; rows sum to 1."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    pixels = torch.arange(old, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return overlap.clamp(min=0) * new / old


@functools.cache
def _load(name: str, folder: str | None) -> Dataset:
    return _LOADERS[name](name, folder)


def _import(module: str, name: str) -> Any:
    # importlib, so that the optional libraries are needed neither to import this package nor to check its types.
    try:
        return importlib.import_module(module)
    except ImportError:
        library = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module)
        raise ModuleNotFoundError(
            f"Dataset {name!r} needs {library}, which is not installed: pip install {library}."
        ) from None


def _file(name: str, folder: str | None) -> Path | None:
    """The path of the data set's file, if it exists."""
    if folder is None:
        return None
    path = Path(folder).expanduser() / (f"{name}.txt" if name == "tinyshakespeare" else f"{name}.npz")
    return path if path.is_file() else None


def _missing(name: str, folder: str | None, more: str) -> FileNotFoundError:
    file = f"{name}.txt" if name == "tinyshakespeare" else f"{name}.npz"
    where = f"{FOLDER_VARIABLE} is not set" if folder is None else f"{FOLDER_VARIABLE}={folder} has no {file}"
    return FileNotFoundError(
        f"Dataset {name!r} was not found: {where}, and {more}. Set {FOLDER_VARIABLE} to a folder with {file}, "
        "or use 'digits' or 'synthetic', which need no files."
    )


def _load_images(name: str, folder: str | None) -> Dataset:
    path = _file(name, folder)
    if path is None:
        return _load_torchvision(name, folder)
    numpy = _import("numpy", name)
    try:
        # Open the stream here: numpy leaves its own open if the file is damaged.
        with path.open("rb") as stream, numpy.load(stream) as file:
            arrays = [torch.from_numpy(file[key]) for key in _ARRAYS]
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read: it must be an .npz with the uint8 arrays {', '.join(_ARRAYS)}."
        ) from error
    return _from_arrays(name, arrays)


def _load_torchvision(name: str, folder: str | None) -> Dataset:
    try:
        torchvision = importlib.import_module("torchvision.datasets")
    except ImportError:
        raise _missing(name, folder, "torchvision is not installed") from None
    root = folder or str(Path("~/.cache/lightning_lopt").expanduser())
    try:
        splits = [getattr(torchvision, _TORCHVISION[name])(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise _missing(name, folder, f"torchvision could not provide it ({error})") from error
    arrays = [torch.as_tensor(array) for split in splits for array in (split.data, split.targets)]
    return _from_arrays(name, arrays)


def _from_arrays(name: str, arrays: list[Tensor]) -> Dataset:
    train_x, train_y, test_x, test_y = arrays
    train_y, test_y = train_y.long(), test_y.long()
    return Dataset(name, _images(train_x), train_y, _images(test_x), test_y, int(train_y.max()) + 1)


def _images(array: Tensor) -> Tensor:
    """(n, h, w) or (n, h, w, c) uint8 -> (n, c, h, w) float32 in [0, 1]."""
    array = array.unsqueeze(1) if array.dim() == 3 else array.permute(0, 3, 1, 2)
    return array.contiguous().float().div_(255.0)  # reorder as uint8, which is smaller


def _shakespeare(folder: str | None) -> str:
    path = _file("tinyshakespeare", folder)
    if path is None:
        raise _missing("tinyshakespeare", folder, "torchvision does not have it")
    text = path.read_text(encoding="utf-8")
    if not 2 <= len(set(text)) <= 256 or len(text) < 1000:
        raise ValueError(
            f"{path} cannot be used: it must be a text of at least 1,000 characters, with 2 to 256 different ones."
        )
    return text


def _load_text(name: str, folder: str | None) -> Dataset:
    text = _shakespeare(folder)
    return _tokens(name, text, "".join(sorted(set(text))))


def _load_ascii(name: str, folder: str | None) -> Dataset:
    """Load a text with the common vocabulary of line ends and printable ASCII; other characters are left out."""
    if name == "python_docs":
        if not is_available(name):
            raise FileNotFoundError(
                "Dataset 'python_docs' is the help topics of Python's standard library (pydoc_data), which this Python "
                "lacks; use an installation of Python with its complete library."
            )
        topics = importlib.import_module("pydoc_data.topics").topics
        text = "\n".join(topics[key] for key in sorted(topics))
    else:
        text = _shakespeare(folder)
    return _tokens(name, "".join(character for character in text if character in _ASCII), _ASCII)


def _load_speakers(name: str, folder: str | None) -> Dataset:
    """Load who speaks: the words of a speech, (2000,) float32 log(1 + count), and the speaker, of the 12 busiest."""
    speeches = [speech.split(":\n", 1) for speech in _shakespeare(folder).split("\n\n") if ":\n" in speech]
    busiest = [who for who, _ in collections.Counter(who for who, _ in speeches).most_common(12)]
    if len(busiest) < 12:
        raise ValueError("Dataset 'speakers' needs a text with the speeches of 12 speakers, each after 'NAME:'.")
    kept = [(re.findall(r"[a-z']+", words.lower()), who) for who, words in speeches if who in busiest]
    counts = collections.Counter(word for words, _ in kept for word in words)
    vocabulary = {word: i for i, word in enumerate(sorted(counts, key=lambda word: (-counts[word], word))[:2000])}
    bags = torch.zeros(len(kept), len(vocabulary))
    for bag, (words, _) in zip(bags, kept, strict=True):
        for word in words:
            if word in vocabulary:
                bag[vocabulary[word]] += 1
    return _split(name, bags.log1p(), torch.tensor([busiest.index(who) for _, who in kept]), len(busiest))


def _tokens(name: str, text: str, alphabet: str) -> Dataset:
    vocabulary = {character: token for token, character in enumerate(alphabet)}
    tokens = torch.tensor([vocabulary[character] for character in text], dtype=torch.uint8)
    split = int(0.9 * len(tokens))
    train, test = tokens[:split], tokens[split:]
    return Dataset(name, train[:-1], train[1:], test[:-1], test[1:], len(vocabulary))


def _load_digits(name: str, folder: str | None) -> Dataset:
    data = _import("sklearn.datasets", name).load_digits()
    return _split(
        name, torch.from_numpy(data.images).float().unsqueeze(1) / 16.0, torch.from_numpy(data.target).long(), 10
    )


def _load_table(name: str, folder: str | None) -> Dataset:
    """Load tabular data. Features and regression targets have mean 0 and standard deviation 1 over the training set."""
    data = getattr(_import("sklearn.datasets", name), f"load_{name}")()
    regression = name == "diabetes"
    y = torch.from_numpy(data.target)
    dataset = _split(name, torch.from_numpy(data.data), y, 0 if regression else int(y.max()) + 1)
    train_x, test_x = _standardize(dataset.train_x, dataset.test_x)
    if not regression:
        return Dataset(name, train_x, dataset.train_y.long(), test_x, dataset.test_y.long(), dataset.num_classes)
    train_y, test_y = _standardize(dataset.train_y, dataset.test_y)
    return Dataset(name, train_x, train_y, test_x, test_y, 0)


def _load_two_moons(name: str, folder: str | None) -> Dataset:
    """Make the 1,024 points of Maheswaranathan et al. 2021 (arXiv 2011.02159), and a test set of 256 points."""
    make_moons = _import("sklearn.datasets", name).make_moons

    def moons(num: int, seed: int) -> tuple[Tensor, Tensor]:
        x, y = make_moons(n_samples=num, shuffle=True, noise=0.1, random_state=seed)
        return torch.from_numpy(x).float(), torch.from_numpy(y).long()

    train_x, train_y = moons(1024, seed=0)
    test_x, test_y = moons(256, seed=1)
    return Dataset(name, train_x, train_y, test_x, test_y, 2)


def _split(name: str, x: Tensor, y: Tensor, num_classes: int) -> Dataset:
    """Split a data set: the first 80 % of a fixed permutation for training, the rest for testing."""
    # numpy's legacy generator is frozen, so this permutation is the same with every version and on every machine.
    order = torch.from_numpy(_import("numpy", name).random.RandomState(0).permutation(len(x)))
    train, test = order[: int(0.8 * len(x))], order[int(0.8 * len(x)) :]
    return Dataset(name, x[train], y[train], x[test], y[test], num_classes)


def _standardize(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(train.double(), 0)
    return tuple(((part.double() - mean) / std).float() for part in (train, test))  # type: ignore[return-value]


_LOADERS: dict[str, Callable[[str, str | None], Dataset]] = {
    "digits": _load_digits,
    "breast_cancer": _load_table,
    "wine": _load_table,
    "iris": _load_table,
    "diabetes": _load_table,
    "two_moons": _load_two_moons,
    "mnist": _load_images,
    "fashion_mnist": _load_images,
    "cifar10": _load_images,
    "tinyshakespeare": _load_text,
    "tinyshakespeare_ascii": _load_ascii,
    "python_docs": _load_ascii,
    "speakers": _load_speakers,
    "synthetic": lambda name, folder: synthetic(),
}
