"""Where supervised tasks draw from: a table of examples, or windows of a text. One gather serves a population."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import torch
from torch import Tensor

from lightning_lopt.tasks import datasets
from lightning_lopt.tasks.base import check_choice, check_positive
from lightning_lopt.tasks.datasets import Dataset


class Source(Protocol):
    """Examples by index, in named splits."""

    @property
    def num_classes(self) -> int:
        """Classes, or tokens; 0 for regression."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits' names."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        ...

    def size(self, split: str) -> int:
        """How many examples a split has."""
        ...

    def take(self, split: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets by index: (...) int64 -> (..., *example), (..., *target)."""
        ...

    def to(self, device: torch.device | str) -> Source:
        """The same examples on a device."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A table of examples with their targets."""

    inputs: dict[str, Tensor] = dataclasses.field(repr=False)  # split -> (n, *example)
    targets: dict[str, Tensor] = dataclasses.field(repr=False)  # split -> (n,)
    num_classes: int  # 0 for regression

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits' names."""
        return tuple(self.inputs)

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        return self.inputs["train"].device

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.inputs["train"].shape[1:])

    def size(self, split: str) -> int:
        """How many examples a split has."""
        return len(self.inputs[split])

    def take(self, split: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets by index: (...) -> (..., *example), (...)."""
        # index_select on the flat index is several times faster on the CPU than indexing with a matrix.
        flat = index.flatten()
        inputs, targets = (part[split].index_select(0, flat) for part in (self.inputs, self.targets))
        return inputs.reshape(*index.shape, *self.shape), targets.reshape(index.shape)

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on a device."""
        inputs, targets = ({k: v.to(device) for k, v in part.items()} for part in (self.inputs, self.targets))
        return dataclasses.replace(self, inputs=inputs, targets=targets)


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a text: an example is `length` tokens, its target the tokens that follow each of them."""

    tokens: dict[str, Tensor] = dataclasses.field(repr=False)  # split -> (n,) uint8
    length: int
    num_classes: int  # the vocabulary's size

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits' names."""
        return tuple(self.tokens)

    @property
    def device(self) -> torch.device:
        """Where the text is."""
        return self.tokens["train"].device

    def size(self, split: str) -> int:
        """How many windows a split has."""
        return len(self.tokens[split]) - self.length

    def take(self, split: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """Windows by where they start: (...) -> (..., length), (..., length)."""
        offsets = torch.arange(self.length + 1, device=self.device)
        window = self.tokens[split][index.unsqueeze(-1) + offsets].long()
        return window[..., :-1], window[..., 1:]

    def to(self, device: torch.device | str) -> Windows:
        """The same text on a device."""
        return dataclasses.replace(self, tokens={k: v.to(device) for k, v in self.tokens.items()})


def examples(
    dataset: str | Dataset, *, image_size: int | None = None, grayscale: bool = False, train_fraction: float = 0.8
) -> Examples:
    """A data set's examples. Its training part is cut in two, in its own order: training first, then validation.

    Args:
        dataset: a name for `datasets.load`, or a data set.
        image_size: side in pixels to bring images to; None leaves them.
        grayscale: average the channels.
        train_fraction: of the training part, for training; the rest is "valid", which 1.0 does without. The default,
            0.8, is the STAR reference's.

    Example:
        >>> source = examples("digits")
        >>> [source.size(split) for split in source.splits], source.shape
        ([1149, 288, 360], (1, 8, 8))
    """
    data = _prepared(datasets.load(dataset) if isinstance(dataset, str) else dataset, image_size, grayscale)
    if data.is_text:
        raise ValueError(f"dataset={data.name!r} is not allowed: it is a text, and this task is of images or features.")
    num_train = _num_train(data, train_fraction)
    parts = {"train": slice(None, num_train), "valid": slice(num_train, None)}
    inputs = {split: data.train_x[part] for split, part in parts.items() if len(data.train_x[part])}
    targets = {split: data.train_y[part] for split, part in parts.items() if split in inputs}
    return Examples({**inputs, "test": data.test_x}, {**targets, "test": data.test_y}, data.num_classes)


def windows(dataset: str | Dataset, length: int, *, train_fraction: float = 0.8) -> Windows:
    """A text's windows of `length` tokens; split as by `examples`."""
    data = datasets.load(dataset) if isinstance(dataset, str) else dataset
    check_positive("length", length)
    if not data.is_text:
        raise ValueError(
            f"dataset={data.name!r} is not allowed: a language model needs a text, e.g. 'tinyshakespeare'."
        )
    num_train = _num_train(data, train_fraction)
    tokens = {"train": data.train_x[:num_train], "valid": data.train_x[num_train:], "test": data.test_x}
    tokens = {split: part for split, part in tokens.items() if len(part)}
    if any(len(part) <= length for part in tokens.values()):
        raise ValueError(
            f"length={length} is not allowed: it must be below {min(len(part) for part in tokens.values())}."
        )
    return Windows(tokens, length, data.num_classes)


def check_split(source: Source, split: str) -> None:
    """Raise a ValueError unless the source has the split."""
    check_choice("split", split, source.splits)


def _num_train(data: Dataset, train_fraction: float) -> int:
    if not 0.0 < train_fraction <= 1.0:
        raise ValueError(f"train_fraction={train_fraction!r} is not allowed: it must be in (0, 1].")
    return max(int(train_fraction * len(data.train_x)), 1)


@functools.lru_cache(maxsize=32)
def _prepared(dataset: Dataset, image_size: int | None, grayscale: bool) -> Dataset:
    """Cached, so that tasks on the same data share one copy."""
    if grayscale:
        dataset = datasets.grayscale(dataset)
    return dataset if image_size is None else datasets.resize(dataset, image_size)
