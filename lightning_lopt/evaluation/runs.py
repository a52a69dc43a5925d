"""Runs of optimizers on a task: several settings times several seeds as one population, and what is kept of them."""

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
FLOOR, CEILING = 1e-3, 2.0
"""A loss counts as at least and at most these multiples of the task's initial loss before anything is divided."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """One optimizer with one setting on one task: lists have one number per seed, NaN where there is none."""

    steps: int
    initial: list[float]
    """Training loss before the first update."""
    final: list[float]
    """Training loss, mean over the last 5 % of the steps, or the last 50 where that is more."""
    tail: list[float]
    """Training loss, mean over the last tenth, or the last 50 steps: smoother, what settings are chosen by."""
    mean: list[float]
    """Training loss, mean over all steps."""
    test_loss: list[float]
    """Loss on the test part after the last update."""
    accuracy: list[float]
    """Accuracy there; NaN for tasks without."""
    curve: list[list[float]]
    """Training loss as means over up to `CURVE_POINTS` equal stretches of the run, for each seed."""

    @property
    def scale(self) -> float:
        """The task's initial loss: the mean over seeds, the same for every optimizer."""
        return statistics.fmean(self.initial)

    @property
    def diverged(self) -> list[bool]:
        """Per seed: a loss was not finite, or the final one is more than twice the initial."""
        rows = zip(self.final, self.mean, self.test_loss, strict=True)
        return [not math.isfinite(sum(row)) or row[0] > CEILING * self.scale for row in rows]

    def score(self, measure: str) -> float:
        """What a search minimizes: the mean over seeds of `measure`, infinite if a seed diverged."""
        return math.inf if any(self.diverged) else self.average(measure)

    def average(self, measure: str) -> float:
        """The mean over seeds of a field."""
        return statistics.fmean(getattr(self, measure))

    def bounded(self, measure: str) -> list[float]:
        """Per seed, the field between `FLOOR` and `CEILING` times the initial loss; NaN counts as the latter."""
        low, high = FLOOR * self.scale, CEILING * self.scale
        return [high if math.isnan(loss) else min(max(loss, low), high) for loss in getattr(self, measure)]


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
    """Run every setting from the same starts on the same batches, whatever the optimizer: common random numbers.

    Args:
        rule: the update rule.
        meta_params: its meta-parameters, one set per setting.
        task: what it is run on.
        steps: length of the runs.
        seeds: runs per setting. Which starts and batches they get depends on this number too.
        tell_length: give the rule the runs' length.
        on_step: called with the number of steps done, after each.

    Returns:
        A `Runs` per setting.
    """
    generator, unroll = torch.Generator().manual_seed(SEED), Unroll(rule, task, "raw", tell_horizon=tell_length)
    sides = len(meta_params)
    population = _stack(meta_params, seeds)
    losses = torch.empty(steps, sides * seeds, dtype=torch.float64)
    with torch.no_grad():
        inner = unroll.start(generator, torch.full((seeds,), steps), sides=sides)
        for step in range(steps):
            inner, record, _ = unroll.slot(population, inner, generator, _no_reset, sides=sides, batched=sides > 1)
            losses[step] = record.losses
            if on_step:
                on_step(step + 1)
        tests = [_test(task, inner, member) for member in range(sides * seeds)]
    return [_summarize(losses[:, i : i + seeds], tests[i : i + seeds]) for i in range(0, sides * seeds, seeds)]


def initial_losses(task: Task, seeds: int) -> list[float]:
    """The losses before the first update that `run` will see."""
    generator = torch.Generator().manual_seed(SEED)
    start = task.init(generator, seeds)
    losses: Tensor = torch.func.vmap(task.loss)(start.params, task.batch(generator, start.constants, seeds))
    return [float(loss) for loss in losses]


def step_seconds(rule: UpdateRule, meta_params: MetaParams, task: Task, *, num: int = 10) -> float:
    """CPU seconds of one training step of one run: the fastest of `num`, after two that warm up.

    It is the reference implementation that is timed, with the task's gradient; a fused backend is quicker.
    """
    generator, unroll = torch.Generator().manual_seed(SEED), Unroll(rule, task, "raw")
    times = []
    with torch.no_grad():
        inner = unroll.start(generator, torch.full((1,), 1000))
        for _ in range(num + 2):
            start = time.process_time()
            inner, _, _ = unroll.slot(meta_params, inner, generator, _no_reset)
            times.append(time.process_time() - start)
    return min(times[2:])


def _stack(meta_params: Sequence[MetaParams], seeds: int) -> dict[str, Tensor]:
    """One set as it is; several with a leading axis: each once per seed."""
    if len(meta_params) == 1:
        return {name: value.detach() for name, value in meta_params[0].items()}
    names = meta_params[0]
    stacked = {name: torch.stack([setting[name].detach() for setting in meta_params]) for name in names}
    return {name: values.repeat_interleave(seeds, 0) for name, values in stacked.items()}


def _no_reset(num: int) -> Tensor:
    raise AssertionError("A run ended before its last step.")


def _test(task: Task, inner: Inner, member: int) -> tuple[float, float]:
    """Test loss and accuracy of one member; one at a time, since a population times the test part is much memory."""
    params, constants = tree_map(lambda leaf: leaf[member], (inner.params, inner.constants))
    batch = task.eval_batch("test", constants)
    accuracy = task.metrics(params, batch).get("accuracy", torch.tensor(math.nan))
    return float(task.loss(params, batch)), float(accuracy)


def _summarize(losses: Tensor, tests: list[tuple[float, float]]) -> Runs:
    """`losses`: (steps, seeds)."""
    steps = len(losses)
    last, tail = (min(max(50, round(share * steps)), steps) for share in (0.05, 0.1))
    stretches = losses.tensor_split(min(CURVE_POINTS, steps))
    curve = torch.stack([stretch.mean(0) for stretch in stretches], 1)
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
