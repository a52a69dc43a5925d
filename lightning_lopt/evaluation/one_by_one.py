"""Train a task with a torch optimizer, seed by seed, as a user's training loop does.

The runs of `runs.run` share one vectorized step, which suits small networks and rules that are pure functions. Large
networks are faster one by one, with fused kernels and without `vmap`; and optimizers from other packages have no
other form. Starting points and batches are those of `runs.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_lopt.evaluation.runs import SEED, Judge, Runs, members_of, summarize
from lightning_lopt.optimizer import RuleOptimizer
from lightning_lopt.rules import UpdateRule
from lightning_lopt.tasks import Task

Parameters = dict[str, nn.Parameter]


class Stepper(Protocol):
    """Moves the parameters of one run."""

    def step(self, grads: Mapping[str, Tensor], loss: Tensor) -> None:
        """Take a step, given the gradients and the training loss."""
        ...

    def evaluate(self, on: bool) -> None:
        """Show, or hide again, the weights that are for evaluation, of optimizers that have such."""
        ...


MakeStepper = Callable[[Parameters, Task, int], Stepper]
"""Makes the optimizer of one run from its parameters, the task and the number of steps."""


class RuleStepper:
    """An update rule, as `RuleOptimizer` runs it for users."""

    def __init__(
        self, params: Parameters, rule: UpdateRule, num_steps: int | None, roles: Mapping[str, str] | None = None
    ) -> None:
        roles = roles or {}
        groups = [
            {"params": [(name, param)], **({"role": roles[name]} if name in roles else {})}
            for name, param in params.items()
        ]
        self.params = params
        self.optimizer = RuleOptimizer(groups, rule, num_steps=num_steps)

    def step(self, grads: Mapping[str, Tensor], loss: Tensor) -> None:
        """Take a step."""
        for name, param in self.params.items():
            param.grad = grads[name].detach()
        self.optimizer.step(loss=loss)

    def evaluate(self, on: bool) -> None:
        """Do nothing: the weights that train are those to evaluate."""


def run(
    make: MakeStepper,
    task: Task,
    *,
    steps: int,
    seeds: int,
    validations: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Runs:
    """Run an optimizer from the starting points and on the batches of `runs.run`.

    Args:
        make: makes the optimizer of each run.
        task: the task to train on.
        steps: length of the runs.
        seeds: number of runs. Their starting points and batches depend on this number too.
        validations: looks at the validation data.
        on_step: called after each step of all seeds with the number of steps done.

    Example:
        >>> import lightning_lopt as lopt
        >>> rule = lopt.load_rule("star")
        >>> make = lambda params, task, steps: RuleStepper(params, rule, steps, task.roles)
        >>> found = run(make, lopt.tasks.make("synthetic-mlp"), steps=4, seeds=2, validations=2)
        >>> len(found.final), len(found.valid_curve[0])
        (2, 2)
    """
    generator = torch.Generator().manual_seed(SEED)
    start = task.init(generator, seeds)
    constants = members_of(start.constants, seeds)
    members: list[Parameters] = [
        {name: nn.Parameter(value.clone()) for name, value in params.items()}
        for params in members_of(start.params, seeds)
    ]
    steppers = [make(params, task, steps) for params in members]
    judge = Judge(task, steps, validations)
    losses = torch.empty(steps, seeds, dtype=torch.float64)
    for step in range(steps):
        batches = members_of(task.batch(generator, start.constants, seeds), seeds)
        for seed, (params, stepper, batch) in enumerate(zip(members, steppers, batches, strict=True)):
            grads, loss = task.grad_and_value(_values(params), batch)
            losses[step, seed] = loss.detach()
            stepper.step(grads, loss.detach())
        if judge.looks_at(step + 1):
            _show(steppers, True)
            judge.look([_values(params) for params in members], constants)
            _show(steppers, False)
        if on_step:
            on_step(step + 1)
    _show(steppers, True)
    return summarize(losses, judge.verdicts([_values(params) for params in members], constants))


def step_seconds(make: MakeStepper, task: Task, *, num: int = 5) -> float:
    """CPU seconds of one training step of one run, gradient and update: the fastest of `num` steps after two more."""
    generator = torch.Generator().manual_seed(SEED)
    start = task.init(generator)
    params = {name: nn.Parameter(value.clone()) for name, value in start.params.items()}
    stepper, times = make(params, task, 1000), []
    for _ in range(num + 2):
        batch = task.batch(generator, start.constants)
        begin = time.process_time()
        grads, loss = task.grad_and_value(_values(params), batch)
        stepper.step(grads, loss.detach())
        times.append(time.process_time() - begin)
    return min(times[2:])


def _values(params: Parameters) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in params.items()}


def _show(steppers: list[Stepper], on: bool) -> None:
    for stepper in steppers:
        stepper.evaluate(on)
