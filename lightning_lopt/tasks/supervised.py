"""Supervised tasks: networks on data, their objectives, and `build`, which makes a task from names.

The tasks are those of the STAR paper (Harrison et al. 2022, arXiv 2209.11208; defined in the released code of Metz et
al. 2022, arXiv 2203.11860), with one general deviation: minibatches are drawn with replacement, where the reference
reshuffles the data every epoch. So a draw needs no state, and one gather draws for a whole population.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.tasks import draws, sources
from lightning_lopt.tasks.base import Params, Start, Task, check_choice, check_positive, check_range
from lightning_lopt.tasks.datasets import Dataset
from lightning_lopt.tasks.layers import SCHEMES, Network, init_params, roles_of
from lightning_lopt.tasks.networks import MLP, ConvNet, PooledConvNet, ResNet
from lightning_lopt.tasks.objectives import CLASSIFICATION, OBJECTIVES, Batch
from lightning_lopt.tasks.sequences import LSTMLanguageModel, TransformerLanguageModel, VisionTransformer
from lightning_lopt.tasks.transforms import Transform

MAX_EVAL_SIZE = 2048


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Supervised(Task):
    """A task with a network, a source of examples and an objective.

    Members of a population differ in their initial parameters and batches. With `subset` and `label_noise` they also
    differ in the part of the training data that they see, and in the number of wrong labels (constants `first`, `count`
    and `label_noise`).

    Example:
        >>> from torch.func import vmap
        >>> task, generator = build("my-mlp", "mlp", "digits", hidden=(32,)), torch.Generator().manual_seed(0)
        >>> start = task.init(generator, population=3)
        >>> vmap(task.loss)(start.params, task.batch(generator, start.constants, population=3)).shape
        torch.Size([3])
    """

    network: Network
    source: sources.Source
    objective: str = "cross_entropy"
    """One of `OBJECTIVES`."""
    batch_size: int | None = 128
    """None uses all training examples at every step."""
    scheme: str = "haiku"
    """Initialization scheme, see `layers.init_params`."""
    std: float = 0.01
    """Standard deviation of the scheme "normal"."""
    l2: float = 0.0
    """Adds l2 times the norm (not the squared norm) of all parameters to the loss."""
    weight_decay: float = 0.0
    """Adds weight_decay / 2 times the sum of squares of the `decayed` parameters to the loss."""
    decayed: tuple[str, ...] = ()
    """Names of the parameters with weight decay."""
    subset: tuple[float, float] = (1.0, 1.0)
    """Range of the fraction of the training data that a member sees, uniform."""
    label_noise: tuple[float, float] = (0.0, 0.0)
    """Range of a member's probability, uniform, that a drawn training label is replaced by a random one."""
    transform: Transform | None = None
    """What is done to examples when they are drawn, such as augmentation or added noise."""
    eval_size: int = MAX_EVAL_SIZE
    """Examples of an evaluation batch, unless it is asked for another number."""

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("scheme", self.scheme, SCHEMES)
        check_range("subset", self.subset, 0.0, 1.0)
        check_range("label_noise", self.label_noise, 0.0, 1.0)
        for name in self.decayed:
            check_choice("decayed", name, self.network.specs())
        check_positive("eval_size", self.eval_size)
        if self.batch_size is not None:
            check_positive("batch_size", self.batch_size)
        elif self.subset != (1.0, 1.0):
            raise ValueError(f"subset={self.subset} is not allowed with batch_size=None, which uses all examples.")
        if self.label_noise != (0.0, 0.0) and self.objective not in CLASSIFICATION:
            raise ValueError(
                f"label_noise is not allowed with objective={self.objective!r}, only with {CLASSIFICATION}."
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the data."""
        return self.source.splits

    @property
    def device(self) -> torch.device:
        """The device of the data."""
        return self.source.device

    @property
    def roles(self) -> dict[str, str]:
        """Roles of the network's matrices, in forward order: the last linear layer is the output."""
        return roles_of(self.network.specs())

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw parameters, and for each member its subset of the data and its label noise."""
        params = init_params(self.network.specs(), generator, population, self.scheme, self.std)
        constants: dict[str, Tensor] = {}
        if self.subset != (1.0, 1.0):
            num = self.source.size("train")
            fraction = draws.uniform(generator, (), population, *self.subset)
            constants["first"] = draws.integers(generator, num, (), population)
            constants["count"] = (fraction * num).long().clamp(min=1)
        if self.label_noise != (0.0, 0.0):
            constants["label_noise"] = draws.uniform(generator, (), population, *self.label_noise)
        return Start(self._place(params), self._place(constants))

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Batch:
        """Draw a minibatch for each member, with dropout masks."""
        if self.batch_size is None:
            x, y = self.source.take("train", torch.arange(self.source.size("train"), device=self.device))
            x, y = _shared(x, y, population)
        else:
            x, y = self.source.take("train", self._indices(generator, constants, population, self.batch_size))
        if "label_noise" in constants:
            y = self._corrupt(generator, constants["label_noise"], y)
        num = y.shape[0 if population is None else 1]
        if self.transform is not None:
            x, y = self.transform(generator, x, y, lead=1 if population is None else 2)
        shapes = self.network.mask_shapes(num)
        masks = (draws.dropout_mask(generator, self.network.dropout, shape, population) for shape in shapes)
        return Batch(x, y, tuple(mask.to(x.device) for mask in masks))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Compute the objective plus the penalties."""
        loss = OBJECTIVES[self.objective](self.network.apply(params, batch.x, batch.masks), batch)
        if self.l2:
            loss = loss + self.l2 * torch.stack([param.square().sum() for param in params.values()]).sum().sqrt()
        for name in self.decayed:
            loss = loss + 0.5 * self.weight_decay * params[name].square().sum()
        return loss

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Compute the accuracy of classifiers and language models."""
        if self.objective not in (*CLASSIFICATION, "logistic"):
            return {}
        outputs = self.network.apply(params, batch.x, batch.masks)
        guess = (outputs.squeeze(-1) > 0) if self.objective == "logistic" else outputs.argmax(-1)
        return {"accuracy": (guess == batch.y).to(outputs.dtype).mean()}

    def eval_batch(
        self,
        split: str,
        constants: Any,
        population: int | None = None,
        *,
        size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Return examples of a split, the same for each member; "train" ignores the members' subsets.

        A transform that belongs to the problem, such as noise to be removed, is drawn from a fixed seed.
        """
        check_choice("split", split, self.splits)
        if size is not None:
            check_positive("size", size)
        available = self.source.size(split)
        num = min(size or self.eval_size, available)
        if generator is None:
            index = torch.arange(num) * available // num
        else:
            index = torch.randperm(available, generator=generator, device=generator.device)[:num]
        x, y = self.source.take(split, index.to(self.device))
        if self.transform is not None and self.transform.evaluated:
            x, y = self.transform(torch.Generator().manual_seed(0), x, y, lead=1)
        return Batch(*_shared(x, y, population))

    def to(self, device: torch.device | str) -> Supervised:
        """Return the same task with its data on a device."""
        return dataclasses.replace(self, source=self.source.to(device))

    def _place(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _indices(self, generator: torch.Generator, constants: Any, population: int | None, batch_size: int) -> Tensor:
        num = self.source.size("train")
        if "first" not in constants:
            return draws.integers(generator, num, (batch_size,), population).to(self.device)
        # A member's subset is a window of the data, which wraps around at the end.
        unit = draws.uniform(generator, (batch_size,), population).to(self.device)
        first = constants["first"].unsqueeze(-1)
        count = constants["count"].unsqueeze(-1)
        index: Tensor = (first + (unit * count).long().clamp(max=count - 1)) % num
        return index

    def _corrupt(self, generator: torch.Generator, rate: Tensor, y: Tensor) -> Tensor:
        shape = tuple(y.shape)
        rate = rate.reshape(*rate.shape, *[1] * (y.dim() - rate.dim()))
        wrong = draws.uniform(generator, shape).to(y.device) < rate
        return torch.where(wrong, draws.integers(generator, self.source.num_classes, shape).to(y.device), y)


def _shared(x: Tensor, y: Tensor, population: int | None) -> tuple[Tensor, Tensor]:
    """Examples that are the same for each member, as views of one copy."""
    if population is None:
        return x, y
    return x.expand(population, *x.shape), y.expand(population, *y.shape)


_NETWORKS: dict[str, Any] = {
    "mlp": MLP,
    "conv": ConvNet,
    "pooled_conv": PooledConvNet,
    "resnet": ResNet,
    "vit": VisionTransformer,
    "lstm": LSTMLanguageModel,
    "transformer": TransformerLanguageModel,
}
_LANGUAGE_MODELS = ("lstm", "transformer")


def build(
    name: str,
    network: str,
    dataset: str | Dataset,
    *,
    objective: str = "cross_entropy",
    image_size: int | None = None,
    grayscale: bool = False,
    length: int = 32,
    train_fraction: float = 0.8,
    **options: Any,
) -> Supervised:
    """Make a supervised task from names. Input and output sizes follow from the data and the objective.

    Args:
        name: name of the task.
        network: mlp, conv, pooled_conv, resnet, vit, lstm or transformer.
        dataset: a name for `datasets.load`, or a data set; lstm and transformer need a text.
        objective: one of `OBJECTIVES` (default: cross entropy).
        image_size: resize images to this side in pixels by area averaging (default: keep their size).
        grayscale: average the channels of images.
        length: tokens per example of a text (default: 32).
        train_fraction: fraction of the training set that becomes the split "train" (default: 0.8); the rest is "valid".
        options: further fields of `Supervised`, and of the network's class (see `networks` and `sequences`).

    Raises:
        ValueError: for an unknown network or option, or a value that is not allowed.

    Example:
        >>> build("paper", "mlp", "digits", hidden=(128, 128), norm="layer", batch_size=32).num_params
        26634
    """
    check_choice("network", network, _NETWORKS)
    source: sources.Examples | sources.Windows
    if network in _LANGUAGE_MODELS:
        source = sources.windows(dataset, length, train_fraction=train_fraction)
    else:
        source = sources.examples(dataset, image_size=image_size, grayscale=grayscale, train_fraction=train_fraction)
    sizes = _sizes(network, source, objective)
    fields = {field.name for field in dataclasses.fields(_NETWORKS[network]) if field.init} - set(sizes)
    own = {field.name for field in dataclasses.fields(Supervised)} - {"name", "network", "source", "objective"}
    known = fields | own
    if unknown := sorted(set(options) - known):
        raise ValueError(f"Unknown option {unknown[0]!r} of task {name!r}; allowed are {sorted(known)}.")
    net = _NETWORKS[network](**sizes, **{key: value for key, value in options.items() if key in fields})
    rest = {key: value for key, value in options.items() if key not in fields}
    rest.setdefault("loss_cap", _loss_cap(objective, source.num_classes))
    return Supervised(name=name, network=net, source=source, objective=objective, **rest)


def _sizes(network: str, source: sources.Examples | sources.Windows, objective: str) -> dict[str, Any]:
    """Options of a network that follow from its data and objective."""
    check_choice("objective", objective, OBJECTIVES)
    if isinstance(source, sources.Windows):
        check_choice("objective", objective, ("cross_entropy",))
        vocab = {"vocab": source.num_classes}
        return vocab | {"context": source.length} if network == "transformer" else vocab
    if objective in CLASSIFICATION and source.num_classes < 2:
        raise ValueError(f"objective={objective!r} is not allowed on data without classes: use 'regression'.")
    outputs = source.num_classes if objective in CLASSIFICATION else 1
    if objective == "reconstruction":
        outputs = math.prod(source.shape)
    if network == "mlp":
        return {"inputs": math.prod(source.shape), "outputs": outputs}
    if len(source.shape) != 3:
        raise ValueError(f"network={network!r} is not allowed on examples of shape {source.shape}: it needs images.")
    return {"in_shape": source.shape, "outputs": outputs}


def _loss_cap(objective: str, num_classes: int) -> float | None:
    """As in the reference, 1.5 ln C for cross entropy and 1 for squared differences."""
    if objective in ("cross_entropy", "sigmoid_cross_entropy"):
        return 1.5 * math.log(num_classes)
    return 1.0 if objective in ("mse", "reconstruction") else None
