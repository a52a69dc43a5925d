"""Helpers of MetaTrainer: tasks from names, patterns of meta-parameters, the meta-optimizer, argument checks."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lopt.tasks import Task
from lightning_lopt.tasks import make as make_task

TaskLike = str | tuple[str, dict[str, Any]] | Task


def make_tasks(tasks: Sequence[TaskLike]) -> list[Task]:
    """Make tasks from names, pairs (name, options) and tasks."""
    return [_make_task(task) for task in tasks]


def _make_task(task: TaskLike) -> Task:
    if isinstance(task, Task):
        return task
    name, options = (task, {}) if isinstance(task, str) else task
    # YAML has lists where tasks take tuples.
    return make_task(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def make_labels(tasks: Sequence[Task]) -> list[str]:
    """Return the names of the tasks, numbered where several tasks have the same name."""
    names = [task.name for task in tasks]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}-{count}" for name, count in zip(names, counts, strict=True)]


def assign_tasks(step: int, *, num_processes: int, tasks_per_process: int, num_tasks: int) -> list[list[int]]:
    """Assign tasks to the processes of a training step, in rotation: task indices for each process.

    Example:
        >>> sizes = {"num_processes": 2, "tasks_per_process": 2, "num_tasks": 5}
        >>> assign_tasks(0, **sizes), assign_tasks(1, **sizes)
        ([[0, 1], [2, 3]], [[4, 0], [1, 2]])
    """
    firsts = [(step * num_processes + rank) * tasks_per_process for rank in range(num_processes)]
    return [[(first + i) % num_tasks for i in range(tasks_per_process)] for first in firsts]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the name of a meta-parameter matches one of the shell-style patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise a ValueError for a pattern that matches no name, because it would silently have no effect."""
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"{argument}: {pattern!r} matches no meta-parameter. The rule has {names}.")


def adamw(
    params: Mapping[str, nn.Parameter], lr: float, weight_decay: float, lr_factors: Mapping[str, float]
) -> torch.optim.AdamW:
    """Make the meta-optimizer, with a parameter group for each learning rate."""
    groups: dict[float, list[Tensor]] = {}
    for name, param in params.items():
        factors = (factor for pattern, factor in lr_factors.items() if matches(name, [pattern]))
        groups.setdefault(next(factors, 1.0), []).append(param)
    param_groups = [{"params": group, "lr": lr * factor} for factor, group in groups.items()]
    return torch.optim.AdamW(param_groups, lr=lr, weight_decay=weight_decay)


def cosine(optimizer: torch.optim.Optimizer, num_steps: float) -> torch.optim.lr_scheduler.LRScheduler:
    """Make a cosine schedule that takes the learning rates of the groups to zero after `num_steps`."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / num_steps, 1.0)))
    )


class StepNumbers:
    """The step numbers of an epoch, in place of a DataLoader. Lightning neither shuffles nor shards it.

    It is stateless: what a step does depends only on its number in the whole run. The state-dict methods exist because
    Lightning warns without them when a run resumes in the middle of an epoch.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.number))

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raise a ValueError unless low <= value <= high. If `low` is an int, the value must be one too."""
    types = int if isinstance(low, int) else (int, float)
    if not isinstance(value, types) or not low <= value <= high:
        what = "an integer" if isinstance(low, int) else "a number"
        raise ValueError(f"{name}={value!r} is not allowed: it must be {what} in [{low}, {high}].")
