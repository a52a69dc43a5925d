"""Networks on data: the supervised task, its objectives, and `build`, which puts a task together by name.

The tasks are those of the STAR paper (Harrison et al. 2022, arXiv 2209.11208; defined in the released code of Metz et
al. 2022, arXiv 2203.11860), with one deviation that holds throughout: minibatches are drawn with replacement, where the
reference reshuffles each epoch. A draw then needs no state, and one gather serves a whole population.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lopt.tasks import draws, sources
from lightning_lopt.tasks.base import Params, Start, Task, check_choice, check_positive, check_range
from lightning_lopt.tasks.datasets import Dataset
from lightning_lopt.tasks.layers import SCHEMES, Network, init_params
from lightning_lopt.tasks.networks import MLP, ConvNet, PooledConvNet, ResNet
from lightning_lopt.tasks.sequences import LSTMLanguageModel, TransformerLanguageModel, VisionTransformer

MAX_EVAL_SIZE = 2048


class Batch(NamedTuple):
    """A minibatch."""

    x: Tensor  # (b, *example)
    y: Tensor  # (b, *target)
    masks: tuple[Tensor, ...] = ()  # dropout masks, as `Network.mask_shapes` has them


def cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    """Softmax cross entropy, mean over examples (and positions): outputs (b, ..., classes).

    Example:
        >>> cross_entropy(torch.zeros(2, 10), Batch(torch.zeros(2), torch.tensor([3, 4])))
        tensor(2.3026)
    """
    # On the CPU and for few classes several times faster than log_softmax.
    return (outputs.logsumexp(-1) - outputs.gather(-1, batch.y.unsqueeze(-1)).squeeze(-1)).mean()


def sigmoid_cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of sigmoid outputs divided by their sum: what Keras makes of a sigmoid layer (the LSTM thesis)."""
    return cross_entropy(F.logsigmoid(outputs), batch)


def mse(outputs: Tensor, batch: Batch) -> Tensor:
    """Mean squared difference of outputs and one-hot classes, over examples and classes: outputs (b, classes)."""
    classes = torch.arange(outputs.shape[-1], device=outputs.device)
    return (outputs - (batch.y.unsqueeze(-1) == classes).to(outputs.dtype)).square().mean()


def regression(outputs: Tensor, batch: Batch) -> Tensor:
    """Mean squared error: outputs (b, 1), targets (b,)."""
    return (outputs.squeeze(-1) - batch.y).square().mean()


def reconstruction(outputs: Tensor, batch: Batch) -> Tensor:
    """Mean squared difference of the sigmoid of the outputs and the inputs: outputs (b, pixels)."""
    return (torch.sigmoid(outputs) - batch.x.flatten(1)).square().mean()


def logistic(outputs: Tensor, batch: Batch) -> Tensor:
    """Binary cross entropy: outputs (b, 1), targets 0 or 1 (b,)."""
    logits = outputs.squeeze(-1)
    return (F.softplus(logits) - batch.y * logits).mean()


OBJECTIVES: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    function.__name__: function
    for function in (cross_entropy, sigmoid_cross_entropy, mse, regression, reconstruction, logistic)
}
_OF_CLASSES = ("cross_entropy", "sigmoid_cross_entropy", "mse")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Supervised(Task):
    """A network, a source of examples and an objective.

    Members of a population differ in initial parameters and batches, and, where asked for, in the share of the training
    data that they see and in how many labels are wrong (constants `first`, `count` and `label_noise`).

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
    """None for all training examples at once."""
    scheme: str = "haiku"
    """How `layers.init_params` draws the initial parameters."""
    std: float = 0.01
    """Of the scheme "normal"."""
    l2: float = 0.0
    """Multiplies the norm (not its square) of all parameters, which is added to the loss."""
    weight_decay: float = 0.0
    """Half of it multiplies the squares of the `decayed` parameters, whose sum is added to the loss."""
    decayed: tuple[str, ...] = ()
    """Names of the parameters that decay."""
    subset: tuple[float, float] = (1.0, 1.0)
    """Range of the share of the training data that a member sees, uniform."""
    label_noise: tuple[float, float] = (0.0, 0.0)
    """Range of the probability that a training label is replaced by a random one at a draw, uniform per member."""

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("scheme", self.scheme, SCHEMES)
        check_range("subset", self.subset, 0.0, 1.0)
        check_range("label_noise", self.label_noise, 0.0, 1.0)
        for name in self.decayed:
            check_choice("decayed", name, self.network.specs())
        if self.batch_size is not None:
            check_positive("batch_size", self.batch_size)
        elif self.subset != (1.0, 1.0):
            raise ValueError(f"subset={self.subset} is not allowed with batch_size=None, which takes all examples.")
        if self.label_noise != (0.0, 0.0) and self.objective not in _OF_CLASSES:
            raise ValueError(f"label_noise is not allowed with objective={self.objective!r}; it is for {_OF_CLASSES}.")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that `eval_batch` knows."""
        return self.source.splits

    @property
    def device(self) -> torch.device:
        """Where the data are."""
        return self.source.device

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw parameters, and each member's data where members differ in them."""
        params = init_params(self.network.specs(), generator, population, self.scheme, self.std)
        constants: dict[str, Tensor] = {}
        if self.subset != (1.0, 1.0):
            num = self.source.size("train")
            share = draws.uniform(generator, (), population, *self.subset)
            constants["first"] = draws.integers(generator, num, (), population)
            constants["count"] = (share * num).long().clamp(min=1)
        if self.label_noise != (0.0, 0.0):
            constants["label_noise"] = draws.uniform(generator, (), population, *self.label_noise)
        return Start(self._place(params), self._place(constants))

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Batch:
        """A minibatch per member, with dropout masks."""
        if self.batch_size is None:
            x, y = self._shared("train", torch.arange(self.source.size("train")), population)
        else:
            x, y = self.source.take("train", self._indices(generator, constants, population, self.batch_size))
        if "label_noise" in constants:
            y = self._corrupt(generator, constants["label_noise"], y)
        shapes = self.network.mask_shapes(y.shape[0 if population is None else 1])
        masks = (draws.dropout_mask(generator, self.network.dropout, shape, population) for shape in shapes)
        return Batch(x, y, tuple(mask.to(x.device) for mask in masks))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The objective, with the penalty where there is one."""
        loss = OBJECTIVES[self.objective](self.network.apply(params, batch.x, batch.masks), batch)
        if self.l2:
            loss = loss + self.l2 * torch.stack([param.square().sum() for param in params.values()]).sum().sqrt()
        for name in self.decayed:
            loss = loss + 0.5 * self.weight_decay * params[name].square().sum()
        return loss

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """The accuracy, for classifiers and language models."""
        if self.objective not in (*_OF_CLASSES, "logistic"):
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
        """Examples of a split, the same for each member; "train" is all of it, whatever share a member sees."""
        sources.check_split(self.source, split)
        if size is not None:
            check_positive("size", size)
        available = self.source.size(split)
        num = min(size or MAX_EVAL_SIZE, available)
        if generator is None:
            index = torch.arange(num) * available // num
        else:
            index = torch.randperm(available, generator=generator, device=generator.device)[:num]
        return Batch(*self._shared(split, index, population))

    def to(self, device: torch.device | str) -> Supervised:
        """The same task with its data on `device`."""
        return dataclasses.replace(self, source=self.source.to(device))

    def _place(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _indices(self, generator: torch.Generator, constants: Any, population: int | None, batch_size: int) -> Tensor:
        num = self.source.size("train")
        if "first" not in constants:
            return draws.integers(generator, num, (batch_size,), population).to(self.device)
        # A member's share is a window of the data, which wraps around the end.
        unit = draws.uniform(generator, (batch_size,), population).to(self.device)
        first, count = (constants[name].unsqueeze(-1) for name in ("first", "count"))
        index: Tensor = (first + (unit * count).long().clamp(max=count - 1)) % num
        return index

    def _shared(self, split: str, index: Tensor, population: int | None) -> tuple[Tensor, Tensor]:
        """The same examples for each member, as views of one copy."""
        x, y = self.source.take(split, index.to(self.device))
        if population is None:
            return x, y
        return x.expand(population, *x.shape), y.expand(population, *y.shape)

    def _corrupt(self, generator: torch.Generator, rate: Tensor, y: Tensor) -> Tensor:
        shape, rate = tuple(y.shape), rate.reshape(*rate.shape, *[1] * (y.dim() - rate.dim()))
        wrong = draws.uniform(generator, shape).to(y.device) < rate
        return torch.where(wrong, draws.integers(generator, self.source.num_classes, shape).to(y.device), y)


_NETWORKS: dict[str, Any] = {
    "mlp": MLP,
    "conv": ConvNet,
    "pooled_conv": PooledConvNet,
    "resnet": ResNet,
    "vit": VisionTransformer,
    "lstm": LSTMLanguageModel,
    "transformer": TransformerLanguageModel,
}
_OF_TEXT = ("lstm", "transformer")


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
    """A supervised task from names; input and output sizes follow from the data and the objective.

    Args:
        name: the task's.
        network: mlp, conv, pooled_conv, resnet, vit, lstm or transformer.
        dataset: a name for `datasets.load`, or a data set; a text for lstm and transformer.
        objective: one of `OBJECTIVES`, default cross entropy.
        image_size: side in pixels to bring images to by area averaging; None leaves them.
        grayscale: average the channels of images.
        length: tokens of an example, for texts, default 32.
        train_fraction: of the training part, for training; the rest is the split "valid". Default 0.8.
        options: further fields of `Supervised`, and of the network's class (see `networks` and `sequences`).

    Raises:
        ValueError: unknown network, option or value.

    Example:
        >>> build("paper", "mlp", "digits", hidden=(128, 128), norm="layer", batch_size=32).num_params
        26634
    """
    check_choice("network", network, _NETWORKS)
    source: sources.Examples | sources.Windows
    if network in _OF_TEXT:
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
    """The options of a network that follow from its data."""
    check_choice("objective", objective, OBJECTIVES)
    if isinstance(source, sources.Windows):
        check_choice("objective", objective, ("cross_entropy",))
        return {"vocab": source.num_classes, **({"context": source.length} if network == "transformer" else {})}
    if objective in _OF_CLASSES and source.num_classes < 2:
        raise ValueError(f"objective={objective!r} is not allowed on data without classes: take 'regression'.")
    outputs = source.num_classes if objective in _OF_CLASSES else 1
    if objective == "reconstruction":
        outputs = math.prod(source.shape)
    if network == "mlp":
        return {"inputs": math.prod(source.shape), "outputs": outputs}
    if len(source.shape) != 3:
        raise ValueError(f"network={network!r} is not allowed on examples of shape {source.shape}: it needs images.")
    return {"in_shape": source.shape, "outputs": outputs}


def _loss_cap(objective: str, num_classes: int) -> float | None:
    """1.5 ln C for cross entropy and 1 for squared differences, as in the reference."""
    if objective in ("cross_entropy", "sigmoid_cross_entropy"):
        return 1.5 * math.log(num_classes)
    return 1.0 if objective in ("mse", "reconstruction") else None
