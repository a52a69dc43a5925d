"""The task: what an optimizer is run on, as pure functions that batch over a population with `torch.func.vmap`.

A task has three parts, and everything that a run of it needs passes through them as tensors:

    start = task.init(generator, population)                       # what is drawn once, when an inner run starts
    batch = task.batch(generator, start.constants, population)     # what is drawn at every inner step
    grads, losses = vmap(task.grad_and_value)(start.params, batch) # deterministic

**Constants ride in the batch.** Much is fixed over a run and differs between members of a population: the matrix of a
random quadratic, the scales of a reparametrization, a member's share of the data. `init` draws it as `Start.constants`,
a pytree that the caller keeps beside the parameters and hands to `batch`, which puts what the loss needs into the batch
it returns. So `loss` has two arguments in every task, constants are never trained nor seen by the optimizer, and a
caller that resets members at different times selects between two `Start`s leaf by leaf. Tasks without constants have an
empty dict.

**Randomness is data.** `loss` draws nothing. Dropout masks, gradient noise and the perturbations of evolution
strategies are drawn by `batch`, so that the two sides of an antithetic pair that share a batch share all of its noise.
Only the generators that are passed in are used. With `population=P` every leaf that is drawn has a leading axis P, made
in one vectorized draw (one gather for data); with None it has none.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]
SPLITS = ("train", "valid", "test")


class Start(NamedTuple):
    """What an inner run starts from; leaves have a leading population axis where one was asked for."""

    params: Params  # name -> tensor, the optimizee's parameters
    constants: Any  # pytree of tensors that stay fixed over the run; {} where a task has none


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task(ABC):
    """A loss, its data and its starting point. Subclasses are final: a task is varied by wrapping it (`wrappers`).

    Example:
        >>> import torch
        >>> from torch.func import vmap
        >>> from lightning_lopt import tasks
        >>> task, generator = tasks.make("rosenbrock"), torch.Generator().manual_seed(0)
        >>> start = task.init(generator, population=4)
        >>> batch = task.batch(generator, start.constants, population=4)
        >>> grads, losses = vmap(task.grad_and_value)(start.params, batch)
        >>> losses.shape, grads["x"].shape
        (torch.Size([4]), torch.Size([4, 2]))
    """

    name: str
    """The name in tables and logs."""
    loss_cap: float | None = None
    """Where `normalize` clips a meta-loss; None for losses without a natural scale."""

    @abstractmethod
    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw parameters and constants.

        Args:
            generator: the only source of randomness. Results are on the task's device, see `to`.
            population: number of independent members, or None for one without a leading axis.
        """

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Any:
        """Draw what one training step needs: a pytree of tensors, with the constants that the loss reads.

        Args:
            generator: the only source of randomness.
            constants: of the `Start` that the run began with.
            population: as it was passed to `init`.

        Returns:
            The batch; for a deterministic task, unless it says otherwise, the constants.
        """
        return constants

    @abstractmethod
    def loss(self, params: Params, batch: Any) -> Tensor:
        """The training loss of one member on one batch: a scalar, deterministic and differentiable, under vmap too."""

    def eval_batch(
        self,
        split: str,
        constants: Any,
        population: int | None = None,
        *,
        size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """A batch for evaluation, without dropout, label noise or gradient noise.

        Args:
            split: one of `splits`; for a task without data all are the same, the noise-free problem.
            constants: of the `Start` that the run began with.
            population: as it was passed to `init`; data are shared between members without a copy.
            size: number of examples; None for the whole split, or 2,048 of it if it is larger.
            generator: draws the examples; None takes them evenly spaced over the split, the same at each call.
        """
        check_choice("split", split, self.splits)
        return constants

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that `eval_batch` knows."""
        return SPLITS

    @property
    def device(self) -> torch.device | None:
        """Where everything that the task draws is; None for a task without data: on the generator's device."""
        return None

    def metrics(self, params: Params, batch: Any) -> dict[str, Tensor]:
        """Further scalars of one member on one batch, e.g. {"accuracy": ...}; empty unless a task has some."""
        return {}

    def grad_and_value(self, params: Params, batch: Any) -> tuple[Params, Tensor]:
        """Gradient (as a dict like `params`) and loss, in `torch.func.grad_and_value`'s order.

        It is a seam: a task may give a gradient estimate in place of the gradient (`wrappers.ESGradient`).
        """
        result: tuple[Params, Tensor] = torch.func.grad_and_value(self.loss)(params, batch)
        return result

    def normalize(self, loss: Tensor) -> Tensor:
        """A loss made fit for a meta-loss: clipped to [0, loss_cap], NaN to loss_cap; unchanged where there is no cap.

        Classification clips at 1.5 ln C and autoencoders at 1, as the STAR reference does (Metz et al. 2022, arXiv
        2203.11860, released code). Where this deviates from it: NaN is replaced for all tasks, there for MLPs only;
        language models are clipped at 1.5 ln C too, there not at all; and the factors by which the reference weights
        some clipped losses (10 for the MSE of classifiers, 10 / ln 2C for vision transformers) are left to the caller.
        """
        if self.loss_cap is None:
            return loss
        return loss.clamp(0.0, self.loss_cap).nan_to_num(nan=self.loss_cap)

    def initial_loss(self, generator: torch.Generator, num_draws: int = 8) -> Tensor:
        """The loss before training, mean over `num_draws` starts and batches: a task's scale for meta-losses."""
        start = self.init(generator, num_draws)
        batch = self.batch(generator, start.constants, num_draws)
        return torch.func.vmap(self.loss)(start.params, batch).mean()

    @functools.cached_property
    def param_shapes(self) -> dict[str, torch.Size]:
        """Name -> shape of the parameters of one member."""
        return {name: param.shape for name, param in self.init(torch.Generator()).params.items()}

    @property
    def num_params(self) -> int:
        """How many numbers one member optimizes."""
        return sum(shape.numel() for shape in self.param_shapes.values())

    def to(self, device: torch.device | str) -> Task:
        """The same task with its data on `device`, where all that it draws will then be.

        A task without data has nothing to move: what it draws is on the generator's device. Generators may be on
        another device than the data, at the price of a copy at each draw; a CPU generator gives the same draws wherever
        the task runs.
        """
        return self


def check_choice(name: str, value: Any, allowed: Mapping[str, Any] | tuple[Any, ...]) -> None:
    """Raise a ValueError naming the argument, its value and what is allowed, unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed: it must be one of {list(allowed)}.")


def check_positive(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not allowed: it must be an integer of at least 1.")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise a ValueError unless `value` is a pair (a, b) of numbers with low <= a <= b <= high."""
    pair = isinstance(value, tuple) and len(value) == 2
    if not pair or not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{name}={value!r} is not allowed: it must be a pair (a, b) with {low} <= a <= b <= {high}.")
