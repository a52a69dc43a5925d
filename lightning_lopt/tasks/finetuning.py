"""Fine-tuning: tasks that start from weights trained on another task, whole or through low-rank adapters."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.tasks import draws
from lightning_lopt.tasks.base import Params, Start, Task, check_positive
from lightning_lopt.tasks.wrappers import Wrapper


@functools.lru_cache(maxsize=4)
def pretrained(source: Task, steps: int, lr: float) -> Params:
    """Weights trained on a task by Adam with 5 % warm-up and cosine, from a fixed seed; kept while the process lives.

    Args:
        source: the task.
        steps: number of steps.
        lr: the highest learning rate.
    """
    generator = torch.Generator().manual_seed(0)
    start = source.init(generator)
    params = {name: value.clone() for name, value in start.params.items()}
    optimizer = torch.optim.Adam(list(params.values()), lr=lr)
    warmup = max(round(0.05 * steps), 1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        grads, _ = source.grad_and_value(params, source.batch(generator, start.constants))
        for name, grad in grads.items():
            params[name].grad = grad
        optimizer.step()
    return {name: value.detach() for name, value in params.items()}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FineTuned(Wrapper):
    """A task whose parameters start at weights trained on another task with the same network.

    Metrics have "forgotten" too, unless parts are `fresh`: how much the loss on the source task's test data has risen.
    """

    source: Task
    """What the weights are trained on first."""
    pretrain_steps: int = 500
    pretrain_lr: float = 2e-3
    fresh: tuple[str, ...] = ()
    """Names of parameters that start anew, such as those of a new head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("pretrain_steps", self.pretrain_steps)

    @property
    def weights(self) -> Params:
        """The pretrained weights."""
        return pretrained(self.source, self.pretrain_steps, self.pretrain_lr)

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Start from the pretrained weights, and draw the fresh ones."""
        start = self.task.init(generator, population)
        lead = draws.lead(population)
        params = {
            name: value if name in self.fresh else self.weights[name].expand(*lead, *self.weights[name].shape).clone()
            for name, value in start.params.items()
        }
        return Start(params, start.constants)

    @functools.cached_property
    def _old(self) -> tuple[Any, Tensor]:
        """The source task's test data, and the loss there before fine-tuning."""
        batch = self.source.eval_batch("test", {}, size=512)
        return batch, self.source.eval_loss(self.weights, batch)

    def metrics(self, params: Params, batch: Any) -> dict[str, Tensor]:
        """Compute the metrics of the task, and what is forgotten of the source task."""
        found = self.task.metrics(params, batch)
        if self.fresh:
            return found
        old, before = self._old
        return {**found, "forgotten": self.source.eval_loss(params, old) - before}


class Adapted(NamedTuple):
    """The constants, or a batch, of `LowRank`: those of the inner task, and the frozen weights."""

    inner: Any
    frozen: Params


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LowRank(Wrapper):
    """Fine-tuning of low-rank adapters alone (LoRA, Hu et al. 2021, arXiv 2106.09685): W + alpha / r B A.

    The weights of `task`, a `FineTuned`, are frozen. A (r, in) is uniform as nn.Linear's weights are, B (out, r) starts
    at 0.

    Parameters: `<name>.A`, `<name>.B` for each adapted matrix.
    """

    task: FineTuned
    rank: int = 4
    alpha: float = 8.0
    adapted: tuple[str, ...] = ()
    """Names of the adapted matrices (default: all hidden ones)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("rank", self.rank)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapted matrices."""
        return self.adapted or self.task.hidden_matrices

    @property
    def roles(self) -> dict[str, str]:
        """All parameters are hidden matrices."""
        return dict.fromkeys(self.param_shapes, "hidden")

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw the adapters."""
        start, lead = self.task.init(generator, population), len(draws.lead(population))
        params = {}
        for name in self.names:
            rows, columns = start.params[name].shape[lead:]
            bound = 1 / math.sqrt(columns)
            params[f"{name}.A"] = draws.uniform(generator, (self.rank, columns), population, -bound, bound)
            params[f"{name}.B"] = torch.zeros((*draws.lead(population), rows, self.rank), device=generator.device)
        return Start(
            {name: value.to(self.device) for name, value in params.items()}, Adapted(start.constants, start.params)
        )

    def merged(self, params: Params, frozen: Params) -> Params:
        """The weights with the adapters added."""
        scale = self.alpha / self.rank
        added = {name: scale * params[f"{name}.B"] @ params[f"{name}.A"] for name in self.names}
        return {name: value + added[name] if name in added else value for name, value in frozen.items()}

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Adapted:
        """Draw a batch of the inner task, and add the frozen weights."""
        return Adapted(self.task.batch(generator, constants.inner, population), constants.frozen)

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Compute the loss of the inner task at the merged weights."""
        return self.task.loss(self.merged(params, batch.frozen), batch.inner)

    def eval_loss(self, params: Params, batch: Any) -> Tensor:
        """Compute what the inner task is judged by at the merged weights."""
        return self.task.eval_loss(self.merged(params, batch.frozen), batch.inner)

    def grad_and_value(self, params: Params, batch: Any) -> tuple[Params, Tensor]:
        """Compute the gradient of the adapters, and the loss."""
        result: tuple[Params, Tensor] = torch.func.grad_and_value(self.loss)(params, batch)
        return result

    def metrics(self, params: Params, batch: Any) -> dict[str, Tensor]:
        """Compute the metrics of the inner task at the merged weights."""
        return self.task.metrics(self.merged(params, batch.frozen), batch.inner)

    def eval_batch(self, split: str, constants: Any, population: int | None = None, **options: Any) -> Adapted:
        """Return an evaluation batch of the inner task, with the frozen weights."""
        return Adapted(self.task.eval_batch(split, constants.inner, population, **options), constants.frozen)
