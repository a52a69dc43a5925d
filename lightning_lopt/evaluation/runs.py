"""Run optimizers on a task, several settings times several seeds as one population, and summarize the losses."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_lopt.meta.unroll import Inner, Unroll
from lightning_lopt.rules import UpdateRule
from lightning_lopt.tasks import Task

MetaParams = Mapping[str, Tensor]
SEED = 0
CURVE_POINTS = 100
CHUNK = 50
"""Steps between two reports of progress."""
FLOOR, CEILING = 1e-3, 2.0
"""Losses are clamped to these multiples of the task's initial loss before they are divided."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of one optimizer with one setting on one task. Lists have one number per seed; NaN: not available."""

    steps: int
    initial: list[float]
    """Training loss before the first update."""
    final: list[float]
    """Mean training loss over the last 5 % of the steps, or the last 50 steps if that is more."""
    tail: list[float]
    """Mean training loss over the last 10 %, or the last 50 steps if that is more: smoother, for choosing settings."""
    mean: list[float]
    """Mean training loss over all steps."""
    test_loss: list[float]
    """Loss on the test data after the last update."""
    accuracy: list[float]
    """Accuracy on the test data; NaN for tasks without an accuracy."""
    curve: list[list[float]]
    """Per seed, the mean training loss over each of up to `CURVE_POINTS` equal intervals of the run."""

    @property
    def scale(self) -> float:
        """The task's initial loss, mean over seeds: the same for every optimizer."""
        return statistics.fmean(self.initial)

    @property
    def curve_steps(self) -> list[float]:
        """The steps in the middle of the intervals of `curve`."""
        points = len(self.curve[0])
        return [(i + 0.5) * self.steps / points for i in range(points)]

    @property
    def diverged(self) -> list[bool]:
        """Per seed, whether a loss was not finite or the final loss is more than twice the initial one."""
        rows = zip(self.final, self.mean, self.test_loss, strict=True)
        return [not math.isfinite(sum(row)) or row[0] > CEILING * self.scale for row in rows]

    def tuning_loss(self, field: str) -> float:
        """What a search minimizes: the mean over seeds of a field, or infinity if any seed diverged."""
        return math.inf if any(self.diverged) else self.average(field)

    def average(self, field: str) -> float:
        """The mean over seeds of a field."""
        return statistics.fmean(getattr(self, field))

    def clamped(self, field: str) -> list[float]:
        """Per seed, the field's loss, clamped as `clamp` does."""
        return [self.clamp(loss) for loss in getattr(self, field)]

    def clamp(self, loss: float) -> float:
        """The loss within `FLOOR` and `CEILING` times the initial loss; NaN becomes the upper bound."""
        ceiling = CEILING * self.scale
        return ceiling if math.isnan(loss) else min(max(loss, FLOOR * self.scale), ceiling)


def run(
    rule: UpdateRule,
    meta_params: Sequence[MetaParams],
    task: Task,
    *,
    steps: int,
    seeds: int,
    tell_length: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> list[Runs]:
    """Run every setting from the same starting points on the same batches, whatever the optimizer.

    Args:
        rule: the update rule.
        meta_params: its meta-parameters, one set per setting.
        task: the task to train on.
        steps: length of the runs.
        seeds: runs per setting. Their starting points and batches depend on this number too.
        tell_length: tell the rule how long the runs are.
        on_step: called from time to time with the number of steps done.

    Returns:
        A `Runs` per setting.
    """
    generator = torch.Generator().manual_seed(SEED)
    unroll = Unroll(rule, task, "raw", tell_horizon=tell_length)
    losses, inner = run_population(
        unroll, meta_params, generator, steps=steps, seeds=seeds, batched=len(meta_params) > 1, on_step=on_step
    )
    with torch.no_grad():
        tests = [_test(task, inner, member) for member in range(losses.shape[1])]
    return [_summarize(losses[:, i : i + seeds], tests[i : i + seeds]) for i in range(0, losses.shape[1], seeds)]


def run_population(
    unroll: Unroll,
    meta_params: Sequence[MetaParams],
    generator: torch.Generator,
    *,
    steps: int,
    seeds: int,
    batched: bool,
    on_step: Callable[[int], None] | None = None,
) -> tuple[Tensor, Inner]:
    """Run several sets of meta-parameters, each with several seeds, as one population, by the rule's kernel if any.

    Args:
        unroll: the rule on its task.
        meta_params: the sets of meta-parameters.
        generator: draws starting points and batches.
        steps: length of the runs.
        seeds: runs per set, with different starting points and batches.
        batched: give every run its own copy of its meta-parameters. With a single set, all runs can do without.
        on_step: called every `CHUNK` steps, and at the end, with the number of steps done.

    Returns:
        Training losses before each update, (steps, sets * seeds) float64, and the runs after the last update.
    """
    sides = len(meta_params)
    population = stack(meta_params, seeds, batched=batched)
    unroll = dataclasses.replace(unroll, compiled="kernel")
    losses = torch.empty(steps, sides * seeds, dtype=torch.float64)
    with torch.no_grad():
        inner = unroll.start(generator, torch.full((seeds,), steps), sides=sides)
        for first in range(0, steps, CHUNK):
            length = min(CHUNK, steps - first)
            inner, record = unroll.run(population, inner, length, generator, _no_reset, sides=sides, batched=batched)
            losses[first : first + length] = record.losses
            if on_step:
                on_step(first + length)
    return losses, inner


def stack(meta_params: Sequence[MetaParams], seeds: int, *, batched: bool) -> dict[str, Tensor]:
    """Sets of meta-parameters along a leading axis, each repeated for every seed; not `batched`, the one set alone."""
    if not batched:
        return {name: value.detach() for name, value in meta_params[0].items()}
    stacked = {name: torch.stack([each[name].detach() for each in meta_params]) for name in meta_params[0]}
    return {name: values.repeat_interleave(seeds, 0) for name, values in stacked.items()}


def initial_losses(task: Task, seeds: int) -> list[float]:
    """The losses before the first update in `run`, one per seed."""
    generator = torch.Generator().manual_seed(SEED)
    start = task.init(generator, seeds)
    losses: Tensor = torch.func.vmap(task.loss)(start.params, task.batch(generator, start.constants, seeds))
    return [float(loss) for loss in losses]


def step_seconds(rule: UpdateRule, meta_params: MetaParams, task: Task, *, num: int = 10) -> float:
    """CPU seconds of one training step of one run: the fastest of `num` steps, after two for warm-up.

    Times the task's gradient and the rule's reference implementation; a fused backend is faster.
    """
    generator = torch.Generator().manual_seed(SEED)
    unroll = Unroll(rule, task, "raw")
    times = []
    with torch.no_grad():
        inner = unroll.start(generator, torch.full((1,), 1000))
        for _ in range(num + 2):
            start = time.process_time()
            inner, _, _ = unroll.slot(meta_params, inner, generator, _no_reset)
            times.append(time.process_time() - start)
    return min(times[2:])


def _no_reset(num: int) -> Tensor:
    raise AssertionError("A run ended before its last step.")


def _test(task: Task, inner: Inner, member: int) -> tuple[float, float]:
    """Test loss and accuracy of one member. A whole population at once would take too much memory."""
    params, constants = tree_map(lambda leaf: leaf[member], (inner.params, inner.constants))
    batch = task.eval_batch("test", constants)
    accuracy = task.metrics(params, batch).get("accuracy", torch.tensor(math.nan))
    return float(task.loss(params, batch)), float(accuracy)


def _summarize(losses: Tensor, tests: list[tuple[float, float]]) -> Runs:
    """`losses`: (steps, seeds)."""
    steps = len(losses)
    last, tail = (min(max(50, round(fraction * steps)), steps) for fraction in (0.05, 0.1))
    intervals = losses.tensor_split(min(CURVE_POINTS, steps))
    curve = torch.stack([interval.mean(0) for interval in intervals], 1)
    return Runs(
        steps=steps,
        initial=losses[0].tolist(),
        final=losses[-last:].mean(0).tolist(),
        tail=losses[-tail:].mean(0).tolist(),
        mean=losses.mean(0).tolist(),
        test_loss=[loss for loss, _ in tests],
        accuracy=[accuracy for _, accuracy in tests],
        curve=curve.tolist(),
    )
