"""Sources of training data: a table of examples, or windows of a text. One gather draws for a whole population."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import torch
from torch import Tensor

from lightning_lopt.tasks import datasets
from lightning_lopt.tasks.base import check_positive
from lightning_lopt.tasks.datasets import Dataset


class Source(Protocol):
    """The interface of sources: indexed examples in named splits."""

    @property
    def num_classes(self) -> int:
        """Number of classes or of tokens; 0 for regression."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the examples."""
        ...

    def size(self, split: str) -> int:
        """Return the number of examples in a split."""
        ...

    def take(self, split: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (..., *example) and targets (..., *target) for an index (...) int64."""
        ...

    def to(self, device: torch.device | str) -> Source:
        """Return the same examples on a device."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A table of examples with their targets."""

    inputs: dict[str, Tensor] = dataclasses.field(repr=False)  # split -> (n, *example)
    targets: dict[str, Tensor] = dataclasses.field(repr=False)  # split -> (n, *target)
    num_classes: int  # 0 for regression

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.inputs)

    @property
    def device(self) -> torch.device:
        """The device of the examples."""
        return self.inputs["train"].device

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.inputs["train"].shape[1:])

    def size(self, split: str) -> int:
        """Return the number of examples in a split."""
        return len(self.inputs[split])

    def take(self, split: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (..., *example) and targets (..., *target) for an index (...)."""
        # On the CPU, index_select with a flat index is several times faster than indexing with a matrix.
        flat = index.flatten()
        inputs = self.inputs[split].index_select(0, flat)
        targets = self.targets[split].index_select(0, flat)
        return inputs.reshape(*index.shape, *self.shape), targets.reshape(*index.shape, *targets.shape[1:])

    def to(self, device: torch.device | str) -> Examples:
        """Return the same examples on a device."""
        return dataclasses.replace(self, inputs=_move(self.inputs, device), targets=_move(self.targets, device))


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a text. An example has `length` tokens, and its target the token after each of them."""

    tokens: dict[str, Tensor] = dataclasses.field(repr=False)  # split -> (n,) uint8
    length: int
    num_classes: int  # size of the vocabulary

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.tokens)

    @property
    def device(self) -> torch.device:
        """The device of the text."""
        return self.tokens["train"].device

    def size(self, split: str) -> int:
        """Return the number of windows in a split."""
        return len(self.tokens[split]) - self.length

    def take(self, split: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (..., length) and targets (..., length) of the windows that start at an index (...)."""
        offsets = torch.arange(self.length + 1, device=self.device)
        window = self.tokens[split][index.unsqueeze(-1) + offsets].long()
        return window[..., :-1], window[..., 1:]

    def to(self, device: torch.device | str) -> Windows:
        """Return the same text on a device."""
        return dataclasses.replace(self, tokens=_move(self.tokens, device))


def examples(
    dataset: str | Dataset, *, image_size: int | None = None, grayscale: bool = False, train_fraction: float = 0.8
) -> Examples:
    """Make a source of a data set's examples. Its training set is split, without shuffling, into "train" and "valid".

    Args:
        dataset: a name for `datasets.load`, or a data set.
        image_size: resize images to this side in pixels (default: keep their size).
        grayscale: average the channels.
        train_fraction: fraction of the training set that becomes "train"; with 1.0 there is no "valid". The default,
            0.8, is that of the STAR reference.

    Example:
        >>> source = examples("digits")
        >>> [source.size(split) for split in source.splits], source.shape
        ([1149, 288, 360], (1, 8, 8))
    """
    data = _prepared(datasets.load(dataset) if isinstance(dataset, str) else dataset, image_size, grayscale)
    if data.is_text:
        raise ValueError(f"dataset={data.name!r} is not allowed: it is a text, but this task needs images or features.")
    num_train = _num_train(data, train_fraction)
    inputs = {"train": data.train_x[:num_train], "valid": data.train_x[num_train:], "test": data.test_x}
    targets = {"train": data.train_y[:num_train], "valid": data.train_y[num_train:], "test": data.test_y}
    if not len(inputs["valid"]):
        del inputs["valid"], targets["valid"]
    return Examples(inputs, targets, data.num_classes)


def shuffled(name: str, inputs: Tensor, targets: Tensor, num_classes: int = 0) -> Examples:
    """Make a source of examples made by a formula, in a fixed random order: 60 % train, 20 % valid, 20 % test."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(5))
    x, y, num = inputs[order], targets[order], int(0.8 * len(inputs))
    return examples(Dataset(name, x[:num], y[:num], x[num:], y[num:], num_classes), train_fraction=0.75)


def windows(dataset: str | Dataset, length: int, *, train_fraction: float = 0.8) -> Windows:
    """Make a source of windows of `length` tokens from a text, which is split as by `examples`."""
    data = datasets.load(dataset) if isinstance(dataset, str) else dataset
    check_positive("length", length)
    if not data.is_text:
        raise ValueError(
            f"dataset={data.name!r} is not allowed: a language model needs a text, such as 'tinyshakespeare'."
        )
    num_train = _num_train(data, train_fraction)
    tokens = {"train": data.train_x[:num_train], "valid": data.train_x[num_train:], "test": data.test_x}
    tokens = {split: text for split, text in tokens.items() if len(text)}
    shortest = min(len(text) for text in tokens.values())
    if length >= shortest:
        raise ValueError(f"length={length} is not allowed: it must be below {shortest}.")
    return Windows(tokens, length, data.num_classes)


def _num_train(data: Dataset, train_fraction: float) -> int:
    if not 0.0 < train_fraction <= 1.0:
        raise ValueError(f"train_fraction={train_fraction!r} is not allowed: it must be in (0, 1].")
    return max(int(train_fraction * len(data.train_x)), 1)


def _move(tensors: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    return {split: tensor.to(device) for split, tensor in tensors.items()}


@functools.lru_cache(maxsize=32)
def _prepared(dataset: Dataset, image_size: int | None, grayscale: bool) -> Dataset:
    """Cached, so that tasks on the same data have one copy in common."""
    if grayscale:
        dataset = datasets.grayscale(dataset)
    return dataset if image_size is None else datasets.resize(dataset, image_size)
