"""Tasks made of a task: re-scaled parameters, re-scaled starts, and gradients by evolution strategies."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.tasks import draws
from lightning_lopt.tasks.base import Params, Start, Task, check_choice, check_positive, check_range

LEVELS = ("global", "tensor", "parameter")


class Scaled(NamedTuple):
    """The constants, and a batch, of `Reparametrized`: the inner task's, and the scales."""

    inner: Any
    scale: Params  # name -> broadcastable to the parameter


class Perturbed(NamedTuple):
    """A batch of `ESGradient`: the inner task's and the perturbations; none in an evaluation batch."""

    inner: Any
    noise: Params  # name -> (pairs, *shape), standard normal


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Wrapper(Task):
    """Base of the tasks that hold a task: what a wrapper leaves alone is the inner task's."""

    task: Task
    name: str = ""
    """Default: the inner task's name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.task.name)
        object.__setattr__(self, "loss_cap", self.task.loss_cap)

    @property
    def splits(self) -> tuple[str, ...]:
        """The inner task's."""
        return self.task.splits

    @property
    def device(self) -> torch.device | None:
        """The inner task's."""
        return self.task.device

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """The inner task's start."""
        return self.task.init(generator, population)

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Any:
        """The inner task's batch."""
        return self.task.batch(generator, constants, population)

    def loss(self, params: Params, batch: Any) -> Tensor:
        """The inner task's loss."""
        return self.task.loss(params, batch)

    def grad_and_value(self, params: Params, batch: Any) -> tuple[Params, Tensor]:
        """The inner task's gradient or estimate, and loss."""
        return self.task.grad_and_value(params, batch)

    def metrics(self, params: Params, batch: Any) -> dict[str, Tensor]:
        """The inner task's."""
        return self.task.metrics(params, batch)

    def eval_batch(
        self,
        split: str,
        constants: Any,
        population: int | None = None,
        *,
        size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """The inner task's."""
        return self.task.eval_batch(split, constants, population, size=size, generator=generator)

    def to(self, device: torch.device | str) -> Task:
        """The same task with its data on `device`."""
        return dataclasses.replace(self, task=self.task.to(device))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reparametrized(Wrapper):
    """The task in other units: it optimizes phi = theta / c, with loss(c phi). The same functions, at another scale.

    The scales c are drawn in `init`, log-uniform, and are constants: neither trained nor seen by the optimizer. The
    augmentation of VeLO (Metz et al. 2022, arXiv 2211.09760) and Celo, whose levels and ranges are in
    `families.AUGMENTATIONS`; "parameter" with (e^-3, e^3) is the random scaling of RNNProp (Lv et al. 2017, arXiv
    1703.03633).

    Example:
        >>> from lightning_lopt import tasks
        >>> task = Reparametrized(task=tasks.make("rosenbrock"), level="global", scale_range=(1e-3, 1e3))
        >>> start = task.init(torch.Generator().manual_seed(0))
        >>> theta = start.constants.scale["x"] * start.params["x"]  # in Rosenbrock's own units
        >>> bool(theta.abs().max() <= 3)
        True
    """

    level: str = "global"
    """What has a scale of its own: "global" the member, "tensor" each tensor, "parameter" each number."""
    scale_range: tuple[float, float] = (1e-3, 1e3)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("level", self.level, LEVELS)
        check_range("scale_range", self.scale_range, 1e-30, 1e30)

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """The inner task's start in units of the scales that are drawn."""
        start = self.task.init(generator, population)
        scale = self._draw(generator, start.params, population)
        params = {name: param / scale[name] for name, param in start.params.items()}
        return Start(params, Scaled(start.constants, scale))

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Scaled:
        """The inner task's batch, with the scales."""
        return Scaled(self.task.batch(generator, constants.inner, population), constants.scale)

    def loss(self, params: Params, batch: Any) -> Tensor:
        """The inner task's loss at c phi."""
        return self.task.loss(_multiply(params, batch.scale), batch.inner)

    def grad_and_value(self, params: Params, batch: Any) -> tuple[Params, Tensor]:
        """By the chain rule, c times the inner task's gradient or estimate at c phi."""
        grads, loss = self.task.grad_and_value(_multiply(params, batch.scale), batch.inner)
        return _multiply(grads, batch.scale), loss

    def metrics(self, params: Params, batch: Any) -> dict[str, Tensor]:
        """The inner task's at c phi."""
        return self.task.metrics(_multiply(params, batch.scale), batch.inner)

    def eval_batch(
        self,
        split: str,
        constants: Any,
        population: int | None = None,
        *,
        size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Scaled:
        """The inner task's, with the scales."""
        inner = self.task.eval_batch(split, constants.inner, population, size=size, generator=generator)
        return Scaled(inner, constants.scale)

    def _draw(self, generator: torch.Generator, params: Params, population: int | None) -> Params:
        axes = len(draws.lead(population))
        one = draws.log_uniform(generator, (), population, *self.scale_range)
        scale = {}
        for name, param in params.items():
            shape = param.shape[axes:]
            if self.level == "parameter":
                value = draws.log_uniform(generator, tuple(shape), population, *self.scale_range)
            else:
                value = (
                    draws.log_uniform(generator, (), population, *self.scale_range) if self.level == "tensor" else one
                )
                value = value.reshape(*value.shape, *[1] * len(shape))
            scale[name] = value.to(param.device)
        return scale


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScaledInit(Wrapper):
    """The task from another initial scale: a log-uniform factor per member on its weights (two or more dims)."""

    scale_range: tuple[float, float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("scale_range", self.scale_range, 1e-30, 1e30)

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """The inner task's start, its weights multiplied by each member's factor."""
        start, axes = self.task.init(generator, population), len(draws.lead(population))
        factor = draws.log_uniform(generator, (), population, *self.scale_range)
        params = {}
        for name, param in start.params.items():
            dims = param.dim() - axes
            own = factor.reshape(*factor.shape, *[1] * dims).to(param.device)
            params[name] = param * own if dims >= 2 else param
        return Start(params, start.constants)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ESGradient(Wrapper):
    """The task with its gradient estimated by antithetic evolution strategies; its loss stays what it was.

        g = 1/N sum_i e_i (f(x + e_i) - f(x - e_i)) / (2 std^2),  e_i ~ N(0, std^2 I)

    As in the released code of Metz et al. 2022 (arXiv 2203.11860), whose ESWrapped tasks the STAR paper evaluates on.
    The perturbations are drawn into the batch, so two unrolls that share batches share them.
    """

    pairs: int = 1
    """Antithetic pairs, N."""
    std: float = 0.01
    """Standard deviation of a perturbation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("pairs", self.pairs)
        check_range("(std, std)", (self.std, self.std), 1e-12, 1e12)

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Perturbed:
        """The inner task's batch, with perturbations for every parameter."""
        inner, device = self.task.batch(generator, constants, population), self.device or generator.device
        shapes = self.task.param_shapes
        noise = {
            name: draws.normal(generator, (self.pairs, *shape), population).to(device) for name, shape in shapes.items()
        }
        return Perturbed(inner, noise)

    def loss(self, params: Params, batch: Any) -> Tensor:
        """The inner task's loss, not perturbed."""
        return self.task.loss(params, batch.inner)

    def grad_and_value(self, params: Params, batch: Any) -> tuple[Params, Tensor]:
        """The estimate, and the loss that is not perturbed."""

        def difference(noise: Params) -> Tensor:
            plus = {name: param + self.std * noise[name] for name, param in params.items()}
            minus = {name: param - self.std * noise[name] for name, param in params.items()}
            return self.task.loss(plus, batch.inner) - self.task.loss(minus, batch.inner)

        weights = torch.func.vmap(difference)(batch.noise) / (2.0 * self.std * self.pairs)
        grads = {name: torch.tensordot(weights, noise, 1) for name, noise in batch.noise.items()}
        return grads, self.loss(params, batch)

    def metrics(self, params: Params, batch: Any) -> dict[str, Tensor]:
        """The inner task's."""
        return self.task.metrics(params, batch.inner)

    def eval_batch(
        self,
        split: str,
        constants: Any,
        population: int | None = None,
        *,
        size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Perturbed:
        """The inner task's, without perturbations."""
        return Perturbed(self.task.eval_batch(split, constants, population, size=size, generator=generator), {})


def _multiply(params: Params, scale: Params) -> Params:
    return {name: param * scale[name] for name, param in params.items()}
