"""Wrappers that vary a task: rescaled parameters, rescaled initialization, and gradients by evolution strategies."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.tasks import draws
from lightning_lopt.tasks.base import Params, Start, Task, check_choice, check_positive, check_range

LEVELS = ("global", "tensor", "parameter")


class Scaled(NamedTuple):
    """The constants, or a batch, of `Reparametrized`: those of the inner task, and the scales."""

    inner: Any
    scale: Params  # name -> broadcastable to the parameter


class Perturbed(NamedTuple):
    """A batch of `ESGradient`: that of the inner task, and the perturbations, which an evaluation batch lacks."""

    inner: Any
    noise: Params  # name -> (pairs, *shape), standard normal


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Wrapper(Task):
    """Base class of wrappers, which delegates everything to the inner task."""

    task: Task
    name: str = ""
    """Name of the task (default: that of the inner task)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.task.name)
        object.__setattr__(self, "loss_cap", self.task.loss_cap)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the inner task."""
        return self.task.splits

    @property
    def roles(self) -> dict[str, str]:
        """The roles of the inner task's parameters."""
        return self.task.roles

    @property
    def device(self) -> torch.device | None:
        """The device of the inner task."""
        return self.task.device

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw the start of the inner task."""
        return self.task.init(generator, population)

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Any:
        """Draw a batch of the inner task."""
        return self.task.batch(generator, constants, population)

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Compute the loss of the inner task."""
        return self.task.loss(params, batch)

    def eval_loss(self, params: Params, batch: Any) -> Tensor:
        """Compute what the inner task is judged by."""
        return self.task.eval_loss(params, batch)

    def grad_and_value(self, params: Params, batch: Any) -> tuple[Params, Tensor]:
        """Compute the gradient, or its estimate, and the loss of the inner task."""
        return self.task.grad_and_value(params, batch)

    def metrics(self, params: Params, batch: Any) -> dict[str, Tensor]:
        """Compute the metrics of the inner task."""
        return self.task.metrics(params, batch)

    def eval_batch(self, split: str, constants: Any, population: int | None = None, **options: Any) -> Any:
        """Return an evaluation batch of the inner task."""
        return self.task.eval_batch(split, constants, population, **options)

    def to(self, device: torch.device | str) -> Task:
        """Return the same task with its data on a device."""
        return dataclasses.replace(self, task=self.task.to(device))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reparametrized(Wrapper):
    """A task in other units: it optimizes phi = theta / c with the loss(c phi).

    The log-uniform scales c are drawn in `init`. They are constants, neither trained nor seen by the optimizer. This is
    the augmentation of VeLO (Metz et al. 2022, arXiv 2211.09760) and Celo, whose levels and ranges are in
    `families.AUGMENTATIONS`. The level "parameter" with (e^-3, e^3) is the random scaling of RNNProp (Lv et al. 2017,
    arXiv 1703.03633).

    Example:
        >>> from lightning_lopt import tasks
        >>> task = Reparametrized(task=tasks.make("rosenbrock"), level="global", scale_range=(1e-3, 1e3))
        >>> start = task.init(torch.Generator().manual_seed(0))
        >>> theta = start.constants.scale["x"] * start.params["x"]  # in Rosenbrock's own units
        >>> bool(theta.abs().max() <= 3)
        True
    """

    level: str = "global"
    """Draw a scale for each member ("global"), each tensor ("tensor"), or each scalar parameter ("parameter")."""
    scale_range: tuple[float, float] = (1e-3, 1e3)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("level", self.level, LEVELS)
        check_range("scale_range", self.scale_range, 1e-30, 1e30)

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw scales, and the start of the inner task in these units."""
        start = self.task.init(generator, population)
        scale = self._draw(generator, start.params, population)
        params = {name: param / scale[name] for name, param in start.params.items()}
        return Start(params, Scaled(start.constants, scale))

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Scaled:
        """Draw a batch of the inner task, and add the scales."""
        return Scaled(self.task.batch(generator, constants.inner, population), constants.scale)

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Compute the loss of the inner task at c phi."""
        return self.task.loss(_multiply(params, batch.scale), batch.inner)

    def eval_loss(self, params: Params, batch: Any) -> Tensor:
        """Compute what the inner task is judged by at c phi."""
        return self.task.eval_loss(_multiply(params, batch.scale), batch.inner)

    def grad_and_value(self, params: Params, batch: Any) -> tuple[Params, Tensor]:
        """Compute gradient and loss; by the chain rule, the gradient is c times that of the inner task at c phi."""
        grads, loss = self.task.grad_and_value(_multiply(params, batch.scale), batch.inner)
        return _multiply(grads, batch.scale), loss

    def metrics(self, params: Params, batch: Any) -> dict[str, Tensor]:
        """Compute the metrics of the inner task at c phi."""
        return self.task.metrics(_multiply(params, batch.scale), batch.inner)

    def eval_batch(self, split: str, constants: Any, population: int | None = None, **options: Any) -> Scaled:
        """Return an evaluation batch of the inner task, with the scales."""
        inner = self.task.eval_batch(split, constants.inner, population, **options)
        return Scaled(inner, constants.scale)

    def _draw(self, generator: torch.Generator, params: Params, population: int | None) -> Params:
        axes = len(draws.lead(population))
        low, high = self.scale_range
        value = draws.log_uniform(generator, (), population, low, high)  # of the whole member
        scale = {}
        for name, param in params.items():
            shape = tuple(param.shape[axes:])
            if self.level == "parameter":
                scale[name] = draws.log_uniform(generator, shape, population, low, high).to(param.device)
                continue
            if self.level == "tensor":
                value = draws.log_uniform(generator, (), population, low, high)
            scale[name] = value.reshape(*value.shape, *[1] * len(shape)).to(param.device)
        return scale


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScaledInit(Wrapper):
    """A task with another initial scale: weights (two or more dims) get a log-uniform factor per member."""

    scale_range: tuple[float, float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("scale_range", self.scale_range, 1e-30, 1e30)

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw the start of the inner task, and multiply its weights by each member's factor."""
        start = self.task.init(generator, population)
        axes = len(draws.lead(population))
        factor = draws.log_uniform(generator, (), population, *self.scale_range)
        params = {}
        for name, param in start.params.items():
            dims = param.dim() - axes
            own = factor.reshape(*factor.shape, *[1] * dims).to(param.device)
            params[name] = param * own if dims >= 2 else param
        return Start(params, start.constants)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ESGradient(Wrapper):
    """A task whose gradient is estimated by antithetic evolution strategies; its loss is unchanged.

        g = 1/N sum_i e_i (f(x + e_i) - f(x - e_i)) / (2 std^2),  e_i ~ N(0, std^2 I)

    Source: the released code of Metz et al. 2022 (arXiv 2203.11860), whose ESWrapped tasks the STAR paper evaluates on.
    The perturbations are part of the batch, so two unrolls on the same batches see the same perturbations.
    """

    pairs: int = 1
    """Number of antithetic pairs, N."""
    std: float = 0.01
    """Standard deviation of a perturbation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("pairs", self.pairs)
        check_range("(std, std)", (self.std, self.std), 1e-12, 1e12)

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Perturbed:
        """Draw a batch of the inner task, and perturbations for every parameter."""
        inner = self.task.batch(generator, constants, population)
        device = self.device or generator.device
        noise = {
            name: draws.normal(generator, (self.pairs, *shape), population).to(device)
            for name, shape in self.task.param_shapes.items()
        }
        return Perturbed(inner, noise)

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Compute the unperturbed loss of the inner task."""
        return self.task.loss(params, batch.inner)

    def eval_loss(self, params: Params, batch: Any) -> Tensor:
        """Compute what the inner task is judged by."""
        return self.task.eval_loss(params, batch.inner)

    def grad_and_value(self, params: Params, batch: Any) -> tuple[Params, Tensor]:
        """Estimate the gradient, and compute the unperturbed loss."""

        def difference(noise: Params) -> Tensor:
            plus = {name: param + self.std * noise[name] for name, param in params.items()}
            minus = {name: param - self.std * noise[name] for name, param in params.items()}
            return self.task.loss(plus, batch.inner) - self.task.loss(minus, batch.inner)

        weights = torch.func.vmap(difference)(batch.noise) / (2.0 * self.std * self.pairs)
        grads = {name: torch.tensordot(weights, noise, 1) for name, noise in batch.noise.items()}
        return grads, self.loss(params, batch)

    def metrics(self, params: Params, batch: Any) -> dict[str, Tensor]:
        """Compute the metrics of the inner task."""
        return self.task.metrics(params, batch.inner)

    def eval_batch(self, split: str, constants: Any, population: int | None = None, **options: Any) -> Perturbed:
        """Return an evaluation batch of the inner task, without perturbations."""
        return Perturbed(self.task.eval_batch(split, constants, population, **options), {})


def _multiply(params: Params, scale: Params) -> Params:
    return {name: param * scale[name] for name, param in params.items()}
