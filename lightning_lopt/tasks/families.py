"""Distributions of tasks for meta-training.

vmap needs equal shapes across a population. So a family's `sample` fixes everything that shapes and code paths depend
on: network, depth, width, activation, norm, data, batch size, scheme. What may differ between the members of a
population is drawn by the task itself in `init`: the scale of the initialization, the fraction of the data and of wrong
labels (`Supervised`), and the scales of a reparametrization (`wrappers`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch

from lightning_lopt.tasks import draws
from lightning_lopt.tasks.analytic import LogUniformQuadratic, NoisyQuadratic
from lightning_lopt.tasks.base import Task, check_choice
from lightning_lopt.tasks.supervised import build
from lightning_lopt.tasks.wrappers import Reparametrized, ScaledInit

T = TypeVar("T")
Augmentation = tuple[str, tuple[float, float]] | None

AUGMENTATIONS: tuple[Augmentation, ...] = (
    None,
    None,
    ("global", (1e-3, 1e3)),
    ("global", (1e-3, 1e3)),
    ("tensor", (1e-2, 1e2)),
    ("tensor", (1e-2, 1e2)),
    ("parameter", (1e-1, 1e1)),
)
"""Levels and ranges of VeLO's and Celo's reparametrizations, with equal probabilities."""


class Family(Protocol):
    """A distribution of tasks."""

    @property
    def name(self) -> str:
        """The name in tables and logs."""
        ...

    def sample(self, generator: torch.Generator) -> Task:
        """Sample a task; the generator is the only source of randomness."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkFamily:
    """A family of classifiers and autoencoders. Choices from tuples are uniform, and ranges are inclusive.

    Example:
        >>> family = NetworkFamily(name="tiny", depth=(1, 2), width=(8, 16))
        >>> task = family.sample(torch.Generator().manual_seed(0))
        >>> task.init(torch.Generator().manual_seed(1), population=4).params["layers.0.weight"].shape[0]
        4
    """

    name: str
    networks: tuple[str, ...] = ("mlp",)
    """mlp, conv, resnet, vit or autoencoder."""
    datasets: tuple[str, ...] = ("digits",)
    """Names for `datasets.load`. They must have images, unless all networks are MLPs."""
    image_sizes: tuple[int | None, ...] = (None,)
    """Side in pixels; None keeps the images' own size."""
    grayscale: bool = False
    depth: tuple[int, int] = (1, 4)
    """Number of hidden layers, convolutions, groups of residual blocks or transformer blocks."""
    width: tuple[int, int] = (16, 64)
    """Units of a hidden layer, log-uniform. Convolutions have a quarter as many channels."""
    activations: tuple[str, ...] = ("relu", "tanh", "gelu", "sigmoid", "leaky_relu", "elu")
    norms: tuple[str, ...] = ("none", "none", "layer", "batch")
    batch_sizes: tuple[int, ...] = (32, 64, 128)
    schemes: tuple[str, ...] = ("haiku", "torch")
    init_scale: tuple[float, float] = (0.5, 2.0)
    """Factor on the initial weights of a member, log-uniform."""
    subset: tuple[float, float] = (0.5, 1.0)
    """Fraction of the training data that a member sees, uniform."""
    label_noise: tuple[float, float] = (0.0, 0.1)
    """Probability of a wrong label for a member of a classifier, uniform."""
    augmentations: tuple[Augmentation, ...] = AUGMENTATIONS
    """Reparametrizations. The task draws one level and range, and each member its scales."""

    def __post_init__(self) -> None:
        for network in self.networks:
            check_choice("network", network, ("mlp", "conv", "resnet", "vit", "autoencoder"))

    def sample(self, generator: torch.Generator) -> Task:
        """Sample a network and a data set."""
        kind = _choose(generator, self.networks)
        dataset = _choose(generator, self.datasets)
        depth = _integer(generator, *self.depth)
        widths = [_log_integer(generator, *self.width) for _ in range(depth)]
        options: dict[str, Any] = {
            "batch_size": _choose(generator, self.batch_sizes),
            "scheme": _choose(generator, self.schemes),
            "image_size": _choose(generator, self.image_sizes),
            "grayscale": self.grayscale,
            "subset": self.subset,
        }
        activation = _choose(generator, self.activations)
        norm = _choose(generator, self.norms)
        if kind == "autoencoder":
            options["objective"] = "reconstruction"
        else:
            options["label_noise"] = self.label_noise
        network = "mlp" if kind == "autoencoder" else kind
        options |= _architecture(network, widths, activation, norm)
        name = "-".join([dataset, kind, "x".join(str(width) for width in widths)])
        if "activation" in options:
            name = f"{name}-{activation}-{norm}"
        task = build(name, network, dataset, **options)
        return _augment(task, self.init_scale, _choose(generator, self.augmentations))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageFamily:
    """A family of character-level LSTM and transformer language models."""

    name: str
    networks: tuple[str, ...] = ("lstm", "transformer")
    dataset: str = "tinyshakespeare"
    depth: tuple[int, int] = (1, 3)
    """Number of transformer blocks; an LSTM has one layer."""
    width: tuple[int, int] = (16, 64)
    """Width of the network, log-uniform, rounded up to a multiple of 4."""
    lengths: tuple[int, ...] = (8, 16, 32)
    batch_sizes: tuple[int, ...] = (8, 16, 32)
    init_scale: tuple[float, float] = (0.5, 2.0)
    subset: tuple[float, float] = (0.1, 1.0)
    augmentations: tuple[Augmentation, ...] = AUGMENTATIONS

    def sample(self, generator: torch.Generator) -> Task:
        """Sample a language model."""
        kind = _choose(generator, self.networks)
        depth = _integer(generator, *self.depth)
        width = 4 * math.ceil(_log_integer(generator, *self.width) / 4)
        options: dict[str, Any] = {"embed": width, "hidden": width}
        if kind == "transformer":
            options = {"width": width, "depth": depth, "heads": 4}
        options |= {"length": _choose(generator, self.lengths), "batch_size": _choose(generator, self.batch_sizes)}
        name = f"{self.dataset}-{kind}-{width}" + (f"x{depth}" if kind == "transformer" else "")
        task = build(name, kind, self.dataset, subset=self.subset, **options)
        return _augment(task, self.init_scale, _choose(generator, self.augmentations))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuadraticFamily:
    """A family of deterministic and noisy quadratics with log-uniform eigenvalues."""

    name: str
    dims: tuple[int, int] = (2, 50)
    """Number of dimensions, log-uniform."""
    log10_low: tuple[float, float] = (-3.0, -1.0)
    """Decimal logarithm of the smallest eigenvalue, uniform; the largest is at most 1."""
    noisy: float = 0.5
    """Probability of the two-dimensional noisy quadratic model instead."""
    noise_std: tuple[float, float] = (0.1, 1.0)
    """Standard deviation of its noise, log-uniform."""
    augmentations: tuple[Augmentation, ...] = AUGMENTATIONS

    def sample(self, generator: torch.Generator) -> Task:
        """Sample a quadratic."""
        task: Task
        if _uniform(generator, 0.0, 1.0) < self.noisy:
            low, high = self.noise_std
            std = math.exp(_uniform(generator, math.log(low), math.log(high)))
            task = NoisyQuadratic(name=f"noisy-quadratic-{std:.2g}", noise_std=std)
        else:
            dim = _log_integer(generator, *self.dims)
            low = _uniform(generator, *self.log10_low)
            task = LogUniformQuadratic(name=f"quadratic-{dim}d-{low:.1f}", dim=dim, log10_range=(low, 0.0))
        return _augment(task, (1.0, 1.0), _choose(generator, self.augmentations))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of families."""

    name: str
    families: tuple[Family, ...]
    weights: tuple[float, ...] | None = None
    """Relative probabilities of the families; None for equal ones."""

    def __post_init__(self) -> None:
        weights = self.weights
        if not self.families or (weights is not None and (len(weights) != len(self.families) or min(weights) < 0)):
            raise ValueError(
                f"weights={weights!r} is not allowed: it must be one number >= 0 for each of the {len(self.families)} "
                "families, of which there must be at least one."
            )

    def sample(self, generator: torch.Generator) -> Task:
        """Sample a family, and a task from it."""
        weights = torch.tensor(
            self.weights or (1.0,) * len(self.families), device=generator.device, dtype=torch.float32
        )
        return self.families[int(torch.multinomial(weights, 1, generator=generator))].sample(generator)


_NONE: tuple[Augmentation, ...] = (None,)
_SMALL_MLPS = NetworkFamily(name="small-mlps")
_SMALL_IMAGES = NetworkFamily(
    name="small-images", networks=("conv", "resnet", "vit", "autoencoder"), depth=(1, 3), batch_sizes=(16, 32, 64)
)
_TABLES = NetworkFamily(
    name="tables", datasets=("wine", "breast_cancer", "two_moons"), depth=(0, 3), batch_sizes=(16, 32, 64)
)
_EIGHT_BY_EIGHT = NetworkFamily(
    name="8x8-mlps",
    datasets=("mnist", "fashion_mnist", "cifar10"),
    image_sizes=(8,),
    grayscale=True,
    depth=(1, 1),
    width=(32, 32),
    activations=("relu",),
    norms=("none",),
    batch_sizes=(64,),
    schemes=("haiku",),
    init_scale=(1.0, 1.0),
    subset=(1.0, 1.0),
    label_noise=(0.0, 0.0),
    augmentations=(("global", (1e-3, 1e3)),),
)
_LANGUAGE = LanguageFamily(name="small-language")
_QUADRATICS = QuadraticFamily(name="quadratics")
_PLAIN_MLPS = dataclasses.replace(_SMALL_MLPS, name="small-mlps-plain", augmentations=_NONE)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _SMALL_MLPS,
        _PLAIN_MLPS,
        _SMALL_IMAGES,
        _TABLES,
        _EIGHT_BY_EIGHT,
        _LANGUAGE,
        _QUADRATICS,
        # This mixture needs only scikit-learn's data.
        Mixture(name="small-mix", families=(_SMALL_MLPS, _SMALL_IMAGES, _TABLES, _QUADRATICS), weights=(4, 3, 2, 1)),
    )
}


def make(name: str, **changes: Any) -> Family:
    """Make a family by name.

    Args:
        name: one of `list_families()`. On digits: "small-mlps", "small-mlps-plain" and "small-images" (convolutional,
            residual and transformer networks and autoencoders). Others without data files: "tables", "quadratics", and
            the mixture "small-mix". With data files: "8x8-mlps" (Celo's, on three of its four data sets) and
            "small-language".
        changes: fields of the family to change.

    Raises:
        ValueError: for an unknown name or field.

    Example:
        >>> make("small-mlps", depth=(2, 2)).sample(torch.Generator().manual_seed(0)).name.startswith("digits-mlp")
        True
    """
    check_choice("family", name, FAMILIES)
    family: Any = FAMILIES[name]
    known = [field.name for field in dataclasses.fields(family)]
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(f"Unknown option {unknown[0]!r} of family {name!r}; allowed are {known}.")
    replaced: Family = dataclasses.replace(family, **changes)
    return replaced


def list_families() -> list[str]:
    """Return the names of all families."""
    return sorted(FAMILIES)


def _architecture(network: str, widths: list[int], activation: str, norm: str) -> dict[str, Any]:
    """Options of a network with these widths. Residual networks and transformers have their own norms."""
    channels = tuple(max(width // 4, 4) for width in widths)
    if network == "mlp":
        return {"hidden": tuple(widths), "activation": activation, "norm": norm}
    if network == "conv":
        strides = (2, *[1] * (len(channels) - 1))
        return {"channels": channels, "strides": strides, "activation": activation, "norm": norm}
    if network == "resnet":
        return {"channels": channels, "blocks": (1,) * len(channels), "stem_channels": channels[0]}
    return {"patch": 2, "width": 4 * math.ceil(widths[0] / 4), "depth": len(widths), "heads": 4}


def _augment(task: Task, init_scale: tuple[float, float], augmentation: Augmentation) -> Task:
    if init_scale != (1.0, 1.0):
        task = ScaledInit(task=task, scale_range=init_scale)
    if augmentation is None:
        return task
    level, scale_range = augmentation
    return Reparametrized(name=f"{task.name}-by-{level}", task=task, level=level, scale_range=scale_range)


def _choose(generator: torch.Generator, options: Sequence[T]) -> T:
    return options[int(draws.integers(generator, len(options), ()))]


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return float(draws.uniform(generator, (), None, low, high))


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return low + int(draws.integers(generator, high - low + 1, ()))


def _log_integer(generator: torch.Generator, low: int, high: int) -> int:
    return min(round(math.exp(_uniform(generator, math.log(low), math.log(high)))), high)
