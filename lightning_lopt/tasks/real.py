"""Tasks of real kinds and sizes, for `lopt evaluate --suite real`: their networks, data and builders.

The catalog registers them, and `evaluation.suites` says how long they run and which of them only judge.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.tasks import datasets, sources
from lightning_lopt.tasks.base import Params, check_positive
from lightning_lopt.tasks.datasets import Dataset
from lightning_lopt.tasks.finetuning import FineTuned, LowRank
from lightning_lopt.tasks.games import Adversarial
from lightning_lopt.tasks.layers import Spec, WithoutDropout, conv, conv_specs, linear
from lightning_lopt.tasks.networks import MLP
from lightning_lopt.tasks.supervised import Supervised, build
from lightning_lopt.tasks.transforms import AddNoise, FlipCrop

_TRUNCATED = 0.87962566103423978
"""Standard deviation of a unit normal truncated at 2, from which the scheme "haiku" draws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Siren(WithoutDropout):
    """A network of sines: coordinates (b, 2) -> values (b, 1) (Sitzmann et al. 2020, arXiv 2006.09661).

    A layer is sin(omega (W x + b)). Weights have the paper's standard deviations, sqrt(2 / fan_in) / omega, and 1 / (3
    fan_in^2) as the variance of the first layer; they are truncated normal where the paper's are uniform.

    Parameters: `layers.<i>.weight, .bias`.
    """

    width: int = 128
    depth: int = 3
    omega: float = 30.0

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        sizes = (2, *[self.width] * self.depth, 1)
        specs = {}
        for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            std = 1 / (math.sqrt(3) * fan_in) if i == 0 else math.sqrt(2 / fan_in) / self.omega
            gain = std * math.sqrt(fan_in) / _TRUNCATED
            specs[f"layers.{i}.weight"] = Spec((fan_out, fan_in), "weight", fan_in, gain)
            specs[f"layers.{i}.bias"] = Spec((fan_out,), "weight", fan_in, gain)
        return specs

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Map (b, 2) to (b, 1)."""
        for i in range(self.depth):
            x = torch.sin(self.omega * linear(params, f"layers.{i}", x))
        return linear(params, f"layers.{self.depth}", x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factorization(WithoutDropout):
    """A recommender: pairs of user and item (b, 2) int64 -> ratings (b, 1), by the product of their vectors.

    Parameters: `user.weight (users, dim)`, `item.weight (items, dim)`, normal with standard deviation 0.05.
    """

    users: int
    items: int
    dim: int = 16

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification."""
        sizes = {"user": self.users, "item": self.items}
        return {
            f"{side}.weight": Spec((num, self.dim), "embedding", gain=0.05 / _TRUNCATED) for side, num in sizes.items()
        }

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Map (b, 2) to (b, 1)."""
        vectors = [torch.nn.functional.embedding(x[:, i], params[f"{side}.weight"]) for i, side in enumerate(_SIDES)]
        return (vectors[0] * vectors[1]).sum(-1, keepdim=True)


_SIDES = ("user", "item")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvDenoiser(WithoutDropout):
    """Convolutions that map a noisy image (b, c, h, w) to the clean one, by way of the noise (Zhang et al. 2017).

    Parameters: `convs.<i>.weight, .bias`.
    """

    in_channels: int = 1
    channels: int = 32
    depth: int = 5

    def specs(self) -> dict[str, Spec]:
        """Return name -> specification, in forward order."""
        check_positive("depth", self.depth)
        sizes = (self.in_channels, *[self.channels] * (self.depth - 1), self.in_channels)
        specs: dict[str, Spec] = {}
        for i, (inputs, outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            specs |= conv_specs(f"convs.{i}", inputs, outputs, 3)
        return specs

    def apply(self, params: Params, x: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Map (b, c, h, w) to the same shape."""
        h = x
        for i in range(self.depth):
            h = conv(params, f"convs.{i}", h if i == 0 else h.relu())
        return x - h


def siren(name: str, omega: float = 30.0, size: int = 32, width: int = 128) -> Supervised:
    """A Siren that fits 60 % of the pixels of an image made by a formula, at every step all of them."""
    axis = torch.linspace(-1, 1, size)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    rings = torch.sin(14 * (rows.square() + (columns - 0.3).square()))
    waves = torch.cos(9 * columns + 5 * rows) * torch.exp(-rows.square())
    edge = torch.tanh(12 * (rows + 0.4 * columns))
    image = ((rings + waves + edge) / 3).flatten()
    source = sources.shuffled(name, torch.stack([rows.flatten(), columns.flatten()], 1), image)
    network = Siren(omega=omega, width=width)
    return Supervised(name=name, network=network, source=source, objective="regression", batch_size=None)


def factorization(
    name: str, users: int = 5000, items: int = 1000, num: int = 60_000, batch_size: int = 512
) -> Supervised:
    """Ratings of items by users, of rank 8 and with noise; a few users and items have most of the ratings."""
    generator = torch.Generator().manual_seed(3)
    tables = [0.6 * torch.randn(count, 8, generator=generator) for count in (users, items)]
    # Popularity falls as 1 / rank^0.8, so that many rows are seen a few times or never.
    chosen = [
        torch.multinomial((torch.arange(count) + 1.0) ** -0.8, num, replacement=True, generator=generator)
        for count in (users, items)
    ]
    ratings = (tables[0][chosen[0]] * tables[1][chosen[1]]).sum(1) + 0.3 * torch.randn(num, generator=generator)
    source = sources.shuffled(name, torch.stack(chosen, 1), ratings)
    network = Factorization(users=users, items=items)
    return Supervised(name=name, network=network, source=source, objective="regression", batch_size=batch_size)


def denoiser(name: str, dataset: str, batch_size: int = 32, channels: int = 32, depth: int = 5) -> Supervised:
    """Images with noise of standard deviation 0.5, to be removed by convolutions."""
    source = sources.examples(dataset)
    network = ConvDenoiser(in_channels=source.shape[0], channels=channels, depth=depth)
    transform = AddNoise(0.5)
    return Supervised(
        name=name,
        network=network,
        source=source,
        objective="vector_regression",
        batch_size=batch_size,
        transform=transform,
    )


def noisy_labels(
    name: str,
    dataset: str,
    wrong: float = 0.4,
    num: int = 4000,
    batch_size: int = 64,
    hidden: tuple[int, ...] = (256, 256),
) -> Supervised:
    """An MLP on a few images, of which a share has wrong labels for good; validation and test labels are right."""
    some = datasets.part(datasets.load(dataset), num + 2048)
    source = sources.examples(some, train_fraction=(num + 0.5) / (num + 2048))
    generator = torch.Generator().manual_seed(4)
    labels = source.targets["train"]
    random = torch.randint(source.num_classes, labels.shape, generator=generator)
    is_wrong = torch.rand(labels.shape, generator=generator) < wrong
    source = dataclasses.replace(source, targets={**source.targets, "train": torch.where(is_wrong, random, labels)})
    network = MLP(inputs=math.prod(source.shape), hidden=hidden, outputs=source.num_classes)
    return Supervised(name=name, network=network, source=source, batch_size=batch_size)


def new_classes(
    name: str,
    dataset: str,
    num: int = 2000,
    batch_size: int = 64,
    image_size: int = 16,
    channels: tuple[int, ...] = (16, 32, 64),
    pretrain_steps: int = 500,
) -> FineTuned:
    """A residual net that knows the first five classes learns the other five from a few images, with a new head."""
    data = datasets.load(dataset)
    fewer = datasets.part(data, num + 2048, classes=(5, 6, 7, 8, 9))
    first = datasets.part(data, 10_000, classes=(0, 1, 2, 3, 4))

    def task(own: str, part: Dataset, fraction: float) -> Supervised:
        return build(
            own,
            "resnet",
            part,
            train_fraction=fraction,
            image_size=image_size,
            channels=channels,
            batch_size=batch_size,
            transform=FlipCrop(image_size // 8),
        )

    target = task(name, fewer, (num + 0.5) / (num + 2048))
    source = task(f"{name}-source", first, 0.8)
    return FineTuned(task=target, source=source, pretrain_steps=pretrain_steps, fresh=("head.weight", "head.bias"))


def new_text(
    name: str,
    dataset: str,
    source: str = "python_docs",
    width: int = 96,
    depth: int = 4,
    length: int = 64,
    batch_size: int = 16,
    pretrain_steps: int = 500,
) -> FineTuned:
    """A character transformer that knows one text learns another, and forgets of the first."""

    def task(own: str, text: str) -> Supervised:
        sizes: dict[str, Any] = {"width": width, "depth": depth, "heads": 4, "batch_size": batch_size, "eval_size": 512}
        return build(own, "transformer", text, length=length, **sizes)

    return FineTuned(task=task(name, dataset), source=task(f"{name}-source", source), pretrain_steps=pretrain_steps)


def adapters(name: str, dataset: str, rank: int = 4, **options: Any) -> LowRank:
    """The task of `new_text`, with its options, by low-rank adapters of all hidden matrices alone."""
    return LowRank(name=name, task=new_text(name, dataset, **options), rank=rank)


def adversarial(
    name: str, dataset: str, image_size: int = 14, batch_size: int = 64, latent: int = 32, width: int = 256
) -> Adversarial:
    """A GAN of two MLPs on small images, the generator with batch norm."""
    source = sources.examples(dataset, image_size=image_size, grayscale=True)
    pixels = math.prod(source.shape)
    generator = MLP(inputs=latent, hidden=(width, width), outputs=pixels, norm="batch")
    discriminator = MLP(inputs=pixels, hidden=(width, width // 2), outputs=1, activation="leaky_relu")
    return Adversarial(
        name=name,
        source=source,
        generator=generator,
        discriminator=discriminator,
        batch_size=batch_size,
        sigmoid=True,
    )
