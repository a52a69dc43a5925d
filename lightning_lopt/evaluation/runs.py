"""Run optimizers on a task, several settings times several seeds as one population, and summarize the losses."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_lopt.meta.unroll import Inner, Unroll
from lightning_lopt.rules import UpdateRule
from lightning_lopt.tasks import Params, Task

MetaParams = Mapping[str, Tensor]
SEED = 0
CURVE_POINTS = 100
VALIDATIONS, VALIDATIONS_OF_LARGE = 20, 10
"""Looks at the validation data in a run that is compared with others; fewer where they are dear."""
CHUNK = 50
"""Steps between two reports of progress, at most."""
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
    valid_loss: list[float] = dataclasses.field(default_factory=list)
    """Loss on the validation data after the last update."""
    best_valid: list[float] = dataclasses.field(default_factory=list)
    """The lowest loss on the validation data at any look, as with early stopping."""
    best_test: list[float] = dataclasses.field(default_factory=list)
    """Loss on the test data at the step with the lowest validation loss."""
    valid_curve: list[list[float]] = dataclasses.field(default_factory=list)
    """Per seed, the validation loss at the ends of equal intervals of the run."""
    metrics: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """The task's metrics on the test data after the last update, by name."""

    @property
    def valid_steps(self) -> list[int]:
        """The steps of `valid_curve`."""
        return look_steps(self.steps, len(self.valid_curve[0])) if self.valid_curve else []

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
        """What a search minimizes: the mean over seeds of a field, or infinity if any seed diverged.

        Without validation data, searches by the validation loss minimize the training loss `tail`.
        """
        if any(self.diverged):
            return math.inf
        loss = self.average(field)
        return self.average("tail") if math.isnan(loss) else loss

    def average(self, field: str) -> float:
        """The mean over seeds of a field; NaN if it was not measured."""
        values = getattr(self, field)
        return statistics.fmean(values) if values else math.nan

    def clamped(self, field: str) -> list[float]:
        """Per seed, the field's loss, clamped as `clamp` does; NaN if it was not measured, as without such data."""
        values = getattr(self, field)
        return [self.clamp(loss) for loss in values] if values else [math.nan] * len(self.initial)

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
    validations: int = 0,
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
        validations: looks at the validation data. Without any, the fields of `Runs` about validation stay empty.
        on_step: called from time to time with the number of steps done.

    Returns:
        A `Runs` per setting.
    """
    generator = torch.Generator().manual_seed(SEED)
    unroll = Unroll(rule, task, "raw", tell_horizon=tell_length)
    judge = Judge(task, steps, validations)

    def look(done: int, inner: Inner) -> None:
        if judge.looks_at(done):
            judge.look(*(members_of(each, len(inner.done)) for each in (inner.params, inner.constants)))
        if on_step:
            on_step(done)

    losses, inner = run_population(
        unroll,
        meta_params,
        generator,
        steps=steps,
        seeds=seeds,
        batched=len(meta_params) > 1,
        on_inner=look,
        stops=filter(judge.looks_at, range(1, steps + 1)),
    )
    verdicts = judge.verdicts(*(members_of(each, len(inner.done)) for each in (inner.params, inner.constants)))
    return [summarize(losses[:, i : i + seeds], verdicts[i : i + seeds]) for i in range(0, losses.shape[1], seeds)]


def run_population(
    unroll: Unroll,
    meta_params: Sequence[MetaParams],
    generator: torch.Generator,
    *,
    steps: int,
    seeds: int,
    batched: bool,
    on_step: Callable[[int], None] | None = None,
    on_inner: Callable[[int, Inner], None] | None = None,
    stops: Iterable[int] = (),
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
        on_inner: the same, with the runs as well; also called after the steps in `stops`.
        stops: numbers of steps after which `on_inner` wants to be called.

    Returns:
        Training losses before each update, (steps, sets * seeds) float64, and the runs after the last update.
    """
    sides = len(meta_params)
    population = stack(meta_params, seeds, batched=batched)
    unroll = dataclasses.replace(unroll, compiled="kernel")
    losses = torch.empty(steps, sides * seeds, dtype=torch.float64)
    with torch.no_grad():
        inner = unroll.start(generator, torch.full((seeds,), steps), sides=sides)
        ends = sorted({*range(CHUNK, steps, CHUNK), *stops, steps} - {0})
        for first, done in zip([0, *ends], ends, strict=False):
            length = done - first
            inner, record = unroll.run(population, inner, length, generator, _no_reset, sides=sides, batched=batched)
            losses[first:done] = record.losses
            if on_step:
                on_step(done)
            if on_inner:
                on_inner(done, inner)
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


def look_steps(steps: int, looks: int) -> list[int]:
    """The steps after which to look at the validation data: the ends of equal intervals of the run.

    Example:
        >>> look_steps(10, 4), look_steps(2, 4), look_steps(10, 0)
        ([3, 5, 8, 10], [1, 2], [])
    """
    looks = min(looks, steps)
    return [math.floor((i + 1) * steps / looks + 0.5) for i in range(looks)]


class Verdict(NamedTuple):
    """One run, judged on data that it was not trained on."""

    test_loss: float
    metrics: dict[str, float]
    valid_curve: list[float]
    best_test: float


class Judge:
    """Looks at the validation losses of runs as they train, and at last at their test losses.

    Keeps a copy of the parameters of each run from where its validation loss was lowest. Evaluation batches have no
    dropout, augmentation or wrong labels; batch norm uses the statistics of the evaluation batch.

    Args:
        task: the task.
        steps: length of the runs.
        looks: number of looks at the validation data, which tasks without a split "valid" do not have.
    """

    def __init__(self, task: Task, steps: int, looks: int) -> None:
        self.task = task
        self.steps = set(look_steps(steps, looks if "valid" in task.splits else 0))
        self.curves: list[list[float]] = []
        self.best: list[Params] = []
        self._batches: dict[str, Any] = {}

    def looks_at(self, step: int) -> bool:
        """Whether to look after so many steps."""
        return step in self.steps

    def look(self, members: Sequence[Params], constants: Sequence[Any]) -> None:
        """Look at the validation loss of each run."""
        if not self.curves:
            self.curves, self.best = [[] for _ in members], [{} for _ in members]
        for number, (params, own) in enumerate(zip(members, constants, strict=True)):
            loss = self._loss("valid", params, own)
            if not self.best[number] or loss < min(self.curves[number]):
                self.best[number] = {name: value.detach().clone() for name, value in params.items()}
            self.curves[number].append(loss)

    def verdicts(self, members: Sequence[Params], constants: Sequence[Any]) -> list[Verdict]:
        """Judge each run at its last parameters and at its best."""
        found = []
        for number, (params, own) in enumerate(zip(members, constants, strict=True)):
            with torch.no_grad():
                metrics = self.task.metrics(params, self._batch("test", own))
            best = self._loss("test", self.best[number], own) if self.best else math.nan
            curve = self.curves[number] if self.curves else []
            numbers = {name: float(value) for name, value in metrics.items()}
            found.append(Verdict(self._loss("test", params, own), numbers, curve, best))
        return found

    def _loss(self, split: str, params: Params, constants: Any) -> float:
        # One member at a time: a whole population at once would take too much memory.
        with torch.no_grad():
            return float(self.task.eval_loss(params, self._batch(split, constants)))

    def _batch(self, split: str, constants: Any) -> Any:
        if tree_leaves(constants):  # members may have different data
            return self.task.eval_batch(split, constants)
        if split not in self._batches:
            self._batches[split] = self.task.eval_batch(split, constants)
        return self._batches[split]


def members_of(population: Any, num: int) -> list[Any]:
    """The members of a pytree of tensors with a leading axis, which may have no tensors.

    Example:
        >>> members_of({"x": torch.tensor([1.0, 2.0])}, 2), members_of({}, 2)
        ([{'x': tensor(1.)}, {'x': tensor(2.)}], [{}, {}])
    """
    return [tree_map(lambda leaf, i=i: leaf[i], population) for i in range(num)]


def summarize(losses: Tensor, verdicts: Sequence[Verdict]) -> Runs:
    """The `Runs` of one setting, from its training losses (steps, seeds) and a verdict per seed."""
    steps = len(losses)
    last, tail = (min(max(50, round(fraction * steps)), steps) for fraction in (0.05, 0.1))
    intervals = losses.tensor_split(min(CURVE_POINTS, steps))
    curve = torch.stack([interval.mean(0) for interval in intervals], 1)
    names = verdicts[0].metrics
    metrics = {name: [verdict.metrics[name] for verdict in verdicts] for name in names}
    validated = bool(verdicts[0].valid_curve)
    return Runs(
        steps=steps,
        initial=losses[0].tolist(),
        final=losses[-last:].mean(0).tolist(),
        tail=losses[-tail:].mean(0).tolist(),
        mean=losses.mean(0).tolist(),
        test_loss=[verdict.test_loss for verdict in verdicts],
        accuracy=metrics.get("accuracy", [math.nan] * len(verdicts)),
        curve=curve.tolist(),
        valid_loss=[verdict.valid_curve[-1] for verdict in verdicts] if validated else [],
        best_valid=[_lowest(verdict.valid_curve) for verdict in verdicts] if validated else [],
        best_test=[verdict.best_test for verdict in verdicts] if validated else [],
        valid_curve=[verdict.valid_curve for verdict in verdicts] if validated else [],
        metrics=metrics,
    )


def _lowest(curve: list[float]) -> float:
    return min((loss for loss in curve if math.isfinite(loss)), default=math.nan)
