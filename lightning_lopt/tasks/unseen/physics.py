"""A physics-informed network: a differential equation in place of data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from lightning_lopt.tasks import draws
from lightning_lopt.tasks.base import Params, Start, Task, check_choice, check_positive
from lightning_lopt.tasks.layers import init_params, roles_of
from lightning_lopt.tasks.networks import MLP


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BoundaryValue(Task):
    """u'' + 4 u = f on [0, 1] with u(0) = u(1) = 0, solved by u(x) = x (1 - x) net(x) (Raissi et al. 2019).

    f is such that u = sin(pi x) + sin(2 pi x) / 2 - sin(3 pi x) / 4. The loss is the mean square of u'' + 4 u - f,
    divided by that of f, at points that are drawn anew at each step. It is judged by the relative error of u: the root
    mean square of the difference, divided by that of the solution.

    Parameters: those of an MLP.
    """

    hidden: tuple[int, ...] = (32, 32)
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_positive("batch_size", self.batch_size)

    @property
    def network(self) -> MLP:
        """The network."""
        return MLP(inputs=1, hidden=self.hidden, outputs=1, activation="tanh")

    @property
    def roles(self) -> dict[str, str]:
        """Roles of the network's matrices."""
        return roles_of(self.network.specs())

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw the network, like nn.Linear does."""
        return Start(init_params(self.network.specs(), generator, population, "torch"), {})

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Tensor:
        """Draw points (b,)."""
        return draws.uniform(generator, (self.batch_size,), population)

    def solution(self, params: Params, x: Tensor) -> Tensor:
        """The network's u at a point ()."""
        return x * (1 - x) * self.network.apply(params, x.reshape(1, 1)).reshape(())

    def loss(self, params: Params, batch: Tensor) -> Tensor:
        """Compute how far the equation is from holding."""
        solution = lambda x: self.solution(params, x)  # noqa: E731
        curvature = vmap(grad(grad(solution)))(batch)
        right = sum(a * (4 - k * k) * torch.sin(k * batch) for k, a in _TERMS)
        scale = 0.5 * sum((a * (4 - k * k)) ** 2 for k, a in _TERMS)
        residual: Tensor = curvature + 4 * vmap(solution)(batch) - right
        return residual.square().mean() / scale

    def eval_loss(self, params: Params, batch: Tensor) -> Tensor:
        """Compute the relative error of the solution."""
        exact = torch.stack([a * torch.sin(k * batch) for k, a in _TERMS]).sum(0)
        found = vmap(lambda x: self.solution(params, x))(batch)
        return (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()

    def eval_batch(
        self,
        split: str,
        constants: Any,
        population: int | None = None,
        *,
        size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return points that are the same at each call (default: 256 of them) and differ between the splits."""
        check_choice("split", split, self.splits)
        random = torch.Generator().manual_seed(self.splits.index(split)) if generator is None else generator
        points = draws.uniform(random, (size or 256,))
        return points if population is None else points.expand(population, -1)


_TERMS = ((math.pi, 1.0), (2 * math.pi, 0.5), (3 * math.pi, -0.25))
"""(frequency, amplitude) of the solution's terms."""
