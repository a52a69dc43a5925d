"""The interface of tasks: pure functions that batch over a population with `torch.func.vmap`.

A task has three functions, which exchange tensors only:

    start = task.init(generator, population)                       # drawn once, when an inner run starts
    batch = task.batch(generator, start.constants, population)     # drawn at every inner step
    grads, losses = vmap(task.grad_and_value)(start.params, batch) # deterministic

**Constants are part of the batch.** Some quantities are fixed over a run but differ between members of a population:
the matrix of a random quadratic, the scales of a reparametrization, a member's subset of the data. `init` draws them as
`Start.constants`, a pytree. The caller keeps it beside the parameters and passes it to `batch`, which adds to the batch
what the loss needs. So `loss` has the same two arguments in every task, constants are never trained or seen by the
optimizer, and a caller that resets members at different times can select between two `Start`s leaf by leaf. Tasks
without constants have an empty dict.

**Randomness is part of the batch.** `loss` draws nothing. `batch` draws dropout masks, gradient noise and the
perturbations of evolution strategies, so that the two sides of an antithetic pair, which use the same batch, see the
same noise. Tasks use only the generators that they are given. With `population=P` every drawn leaf has a leading axis
P, from one vectorized draw (one gather for data); with None it has no such axis.
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
    """The start of an inner run. Leaves have a leading population axis if `init` got a population."""

    params: Params  # name -> tensor, the optimizee's parameters
    constants: Any  # pytree of tensors that are fixed over the run; {} if the task has none


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task(ABC):
    """A loss, its data and its initialization. Subclasses are final; to vary a task, wrap it (`wrappers`).

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
    """The value at which `normalize` clips a meta-loss; None for losses without a natural scale."""

    @abstractmethod
    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw parameters and constants.

        Args:
            generator: the only source of randomness. Results are on the task's device, see `to`.
            population: number of independent members, or None for one member without a leading axis.
        """

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Any:
        """Draw the batch of one training step: a pytree of tensors, including the constants that the loss reads.

        Args:
            generator: the only source of randomness.
            constants: constants of the run's `Start`.
            population: as passed to `init`.

        Returns:
            The batch. The default, for deterministic tasks, is the constants.
        """
        return constants

    @abstractmethod
    def loss(self, params: Params, batch: Any) -> Tensor:
        """Compute the training loss of one member on one batch: a deterministic, differentiable scalar."""

    def eval_batch(
        self,
        split: str,
        constants: Any,
        population: int | None = None,
        *,
        size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Return a batch for evaluation, without dropout, label noise or gradient noise.

        Args:
            split: one of `splits`. For a task without data all are the same, the noise-free problem.
            constants: constants of the run's `Start`.
            population: as passed to `init`. All members get views of the same data.
            size: number of examples (default: the whole split, but at most 2,048 examples).
            generator: draws the examples (default: examples evenly spaced over the split, the same at each call).
        """
        check_choice("split", split, self.splits)
        return constants

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that `eval_batch` accepts."""
        return SPLITS

    @property
    def roles(self) -> dict[str, str]:
        """Name -> role in the net (`rules.matrix.ROLES`) of parameters with two dims or more; others are unknown."""
        return {}

    @property
    def device(self) -> torch.device | None:
        """The device of everything that the task draws; None, the generator's device, for a task without data."""
        return None

    def metrics(self, params: Params, batch: Any) -> dict[str, Tensor]:
        """Compute further scalars of one member on one batch, such as {"accuracy": ...}; empty by default."""
        return {}

    def eval_loss(self, params: Params, batch: Any) -> Tensor:
        """Compute what one member is judged by on validation and test batches, lower is better: by default the loss."""
        return self.loss(params, batch)

    def grad_and_value(self, params: Params, batch: Any) -> tuple[Params, Tensor]:
        """Compute the gradient (a dict like `params`) and the loss, in the order of `torch.func.grad_and_value`.

        A task may override it where training does not descend its loss: to return an estimate of the gradient
        (`wrappers.ESGradient`), or the gradients of a game or of a policy (`games`). The second value is always `loss`.
        """
        result: tuple[Params, Tensor] = torch.func.grad_and_value(self.loss)(params, batch)
        return result

    def normalize(self, loss: Tensor) -> Tensor:
        """Clip a loss to [0, loss_cap] for use in a meta-loss, and replace NaN by loss_cap; without a cap, do nothing.

        Classification clips at 1.5 ln C and autoencoders at 1, as in the STAR reference (Metz et al. 2022, arXiv
        2203.11860, released code). Deviations from it: NaN is replaced for all tasks, there only for MLPs; language
        models are clipped at 1.5 ln C, there not at all; and the factors by which it multiplies some clipped losses (10
        for the MSE of classifiers, 10 / ln 2C for vision transformers) are left to the caller.
        """
        if self.loss_cap is None:
            return loss
        return loss.clamp(0.0, self.loss_cap).nan_to_num(nan=self.loss_cap)

    @functools.cached_property
    def param_shapes(self) -> dict[str, torch.Size]:
        """Name -> shape of the parameters of one member."""
        return {name: param.shape for name, param in self.init(torch.Generator()).params.items()}

    @property
    def hidden_matrices(self) -> tuple[str, ...]:
        """Names of the hidden layers' weights, which matrix methods such as Muon are for."""
        return tuple(name for name, role in self.roles.items() if role == "hidden")

    @property
    def num_params(self) -> int:
        """Number of scalar parameters of one member."""
        return sum(shape.numel() for shape in self.param_shapes.values())

    def to(self, device: torch.device | str) -> Task:
        """Return the same task with its data, and so everything that it draws, on a device.

        A task without data draws on the generator's device. A generator may be on another device than the data, which
        costs a copy per draw; a CPU generator gives the same draws on every device.
        """
        return self


def check_choice(name: str, value: Any, allowed: Mapping[str, Any] | tuple[Any, ...]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
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
