"""Learned rules against tuned hand-designed optimizers, on the same starts and batches.

Every optimizer gets the same random numbers: the same initial parameters and the same batches, seed by seed. The
baselines are tuned on the very task and seeds that they are compared on, for the final and for the mean training loss
apart, which favors them; the learned rules are run as they are. Beside the rules stands the nominal term alone
(`hyperparam`): what a learned rule does better than it is what has been learned.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_lopt.evaluation.cache import Cache
from lightning_lopt.evaluation.results import DEFAULT_ADAM, Entry, Results
from lightning_lopt.evaluation.runs import Runs, initial_losses, run, step_seconds
from lightning_lopt.evaluation.suites import Case
from lightning_lopt.evaluation.tuning import BASELINES, MEASURES, Baseline, RandomSearch, Trial, Tuned
from lightning_lopt.hub import load_rule
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import UpdateRule
from lightning_lopt.tasks import Task, catalog, datasets
from lightning_lopt.tasks import make as make_task
from lightning_lopt.tasks.base import check_choice, check_positive

NOMINAL = "hyperparam"
MAX_ELEMENTS = 4_000_000
Progress = Callable[[str, int, int], None]
"""Called with what is being run, the steps done, and the steps to do."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How runs are made."""

    seeds: int = 3
    """Runs per setting."""
    tell_length: bool = True
    """Tell the learned rules how long the run is. The baselines with a schedule always know it."""
    samples: int = 50
    """Settings that a random search tries (`nadamw`)."""
    max_population: int = 15
    """Most runs at once; fewer where their parameters would take much memory."""
    cache_dir: str | Path | None = Path("runs/evaluate")
    """Where results are kept, and found again; None keeps none."""

    def __post_init__(self) -> None:
        for name in ("seeds", "samples", "max_population"):
            check_positive(name, getattr(self, name))


def evaluate(
    rules: str | Path | UpdateRule | Sequence[str | Path | UpdateRule],
    cases: Iterable[Case | tuple[str, int]],
    baselines: Sequence[str] = ("adam", "adamw", "sgdm"),
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Results:
    """Compare rules with tuned baselines, Adam at its default 1e-3, and the nominal term alone.

    Args:
        rules: one or several, as names or paths for `load_rule`, or as rules.
        cases: tasks by name, each with the number of steps; see `suites`.
        baselines: names from `tuning.BASELINES`.
        options: how runs are made.
        progress: told what is going on.

    Raises:
        ValueError: unknown name of a rule, task or baseline, or a number that is not allowed.

    Example:
        >>> results = evaluate(
        ...     "star", [Case("synthetic-mlp", 20)], baselines=[], options=Options(seeds=2, cache_dir=None)
        ... )
        >>> [entry.optimizer for entry in results.entries]
        ['adam-1e-3', 'star', 'hyperparam']
    """
    options = options or Options()
    for name in baselines:
        check_choice("baseline", name, BASELINES)
    learned = _load(rules)
    # All is checked before anything is run, which may take hours.
    benches = [_Bench(Case(*case), options, progress) for case in cases]
    if not benches:
        raise ValueError("cases is empty; give at least one task with its number of steps.")
    prints, entries = {label: fingerprint(rule) for label, rule in learned.items()}, []
    for bench in benches:
        entries += [bench.tuned(name, BASELINES[name]) for name in baselines]
        entries.append(bench.default_adam())
        entries += [bench.learned(label, rule, prints[label]) for label, rule in learned.items()]
    return Results(options.seeds, entries)


def fingerprint(rule: UpdateRule) -> str:
    """A hash of what a rule is and does: kind, configuration, meta-parameters, and its first steps on a small task.

    The steps make it change when the code of the rule does.
    """
    unroll, generator = Unroll(rule, make_task("synthetic-mlp", hidden=(8,)), "raw"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        inner = unroll.start(generator, torch.tensor([5]))
        for _ in range(5):
            inner, record, _ = unroll.slot(rule.meta_params(), inner, generator, lambda n: torch.full((n,), 5))
    # Three digits: what is beyond depends on the machine.
    response = [f"{float(param.double().norm()):.2e}" for param in (*inner.params.values(), record.losses)]
    digest = hashlib.sha256(json.dumps([rule.kind, rule.config.to_dict(), response]).encode())
    for name, param in rule.named_parameters():
        digest.update(name.encode() + param.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def _load(rules: str | Path | UpdateRule | Sequence[str | Path | UpdateRule]) -> dict[str, UpdateRule]:
    """Label -> rule, with the nominal term at the end unless it is among them."""
    given = [rules] if isinstance(rules, (str, Path, UpdateRule)) else list(rules)
    learned: dict[str, UpdateRule] = {}
    for item in given:
        label = (item.kind or type(item).__name__) if isinstance(item, UpdateRule) else str(item).rstrip("/")
        if label in (*learned, *BASELINES, DEFAULT_ADAM):
            raise ValueError(f"The name {label!r} comes twice; give each rule once, or its directory another name.")
        learned[label] = item if isinstance(item, UpdateRule) else load_rule(item)
    if NOMINAL not in learned:
        learned[NOMINAL] = load_rule(NOMINAL)
    # In the tasks' precision, whatever that of their files, as RuleOptimizer has them.
    return {label: copy.deepcopy(rule).float() for label, rule in learned.items()}


class _Bench:
    """One case: what is run on it, or was before."""

    def __init__(self, case: Case, options: Options, progress: Progress | None) -> None:
        check_positive("steps", case.steps)
        self.case, self.options, self.progress = case, options, progress
        self.cache = Cache(options.cache_dir)
        self._task: Task | None = None
        if case.task not in catalog.REGISTRY:
            make_task(case.task)  # raises, with a hint
        dataset = catalog.dataset_of(case.task)
        if isinstance(dataset, str) and not datasets.is_available(dataset):
            datasets.load(dataset)  # downloads it or raises

    @property
    def task(self) -> Task:
        """Made when it is needed, so that a suite's data are not all in memory."""
        if self._task is None:
            self._task = make_task(self.case.task)
            self.initial = initial_losses(self._task, self.options.seeds)
        return self._task

    def tuned(self, name: str, baseline: Baseline) -> Entry:
        """A baseline at its best settings."""
        search, rule = baseline.search, baseline.make()
        if isinstance(search, RandomSearch):
            search = dataclasses.replace(search, num=self.options.samples)

        def measure(settings: list[dict[str, float]]) -> list[Runs]:
            return self._measure(name, rule, [_key(baseline, setting) for setting in settings], settings)

        tuned = search.search(measure)
        return self._entry(name, baseline.label, rule, _key(baseline, {}), tuned)

    def default_adam(self) -> Entry:
        """Adam as it comes."""
        baseline, setting = BASELINES["adam"], {"lr": 1e-3}
        rule, key = baseline.make(), _key(baseline, setting)
        trial = Trial(setting, self._measure("adam", rule, [key], [setting])[0])
        return self._entry(DEFAULT_ADAM, "Adam 1e-3", rule, key, Tuned(dict.fromkeys(MEASURES, trial), [trial]))

    def learned(self, label: str, rule: UpdateRule, mark: str) -> Entry:
        """A learned rule; `mark` is its fingerprint."""
        key = {"rule": rule.kind, "fingerprint": mark, "tell_length": self.options.tell_length}
        trial = Trial({}, self._measure(label, rule, [key], [{}])[0])
        text = "nominal term" if label == NOMINAL else label
        return self._entry(label, text, rule, key, Tuned(dict.fromkeys(MEASURES, trial), [trial]))

    def _entry(self, name: str, label: str, rule: UpdateRule, key: dict[str, Any], tuned: Tuned) -> Entry:
        key = {"what": "step seconds", "task": _describe(self.case.task), **key}
        found = self.cache.get(str(self.case), key)
        if found is None:
            seconds = step_seconds(rule, rule.meta_params(), self.task)
            found = self.cache.put(str(self.case), key, {"seconds": seconds})
        return Entry(self.case, name, label, tuned.best, len(tuned.trials), found["seconds"])

    def _measure(
        self, name: str, rule: UpdateRule, keys: list[dict[str, Any]], settings: list[dict[str, float]]
    ) -> list[Runs]:
        """Runs of several settings, those that are in the cache from there."""
        fixed: dict[str, Any] = {"what": "runs", "task": _describe(self.case.task)}
        fixed |= {"steps": self.case.steps, "seeds": self.options.seeds}
        keys = [{**fixed, **key} for key in keys]
        results = [self._recall(key) for key in keys]
        missing = [i for i, runs in enumerate(results) if runs is None]
        for some in _chunks(missing, self._chunk_size() if missing else 1):
            report = self._reporter(name, len(some))
            meta_params = [{**rule.meta_params(), **_tensors(settings[i])} for i in some]
            runs = run(
                rule,
                meta_params,
                self.task,
                steps=self.case.steps,
                seeds=self.options.seeds,
                tell_length=keys[0].get("tell_length", True),
                on_step=report,
            )
            for i, found in zip(some, runs, strict=True):
                results[i] = Runs(**self.cache.put(str(self.case), keys[i], dataclasses.asdict(found)))
        return [runs for runs in results if runs is not None]

    def _recall(self, key: dict[str, Any]) -> Runs | None:
        """A result from the cache, unless the task's start has changed since it was put there."""
        if (found := self.cache.get(str(self.case), key)) is None:
            return None
        runs = Runs(**found)
        same = self.task is not None and len(self.initial) == len(runs.initial)
        same = same and all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(self.initial, runs.initial, strict=True))
        return runs if same else None

    def _chunk_size(self) -> int:
        """Settings in one population."""
        members = min(self.options.max_population, MAX_ELEMENTS // max(self.task.num_params, 1))
        return max(members // self.options.seeds, 1)

    def _reporter(self, name: str, num: int) -> Callable[[int], None] | None:
        if self.progress is None:
            return None
        progress, total = self.progress, self.case.steps
        text = f"{self.case} {name}" + (f", {num} settings" if num > 1 else "")
        every = max(total // 100, 1)

        def report(done: int) -> None:
            if done % every == 0 or done == total:
                progress(text, done, total)

        return report


def _key(baseline: Baseline, setting: dict[str, float]) -> dict[str, Any]:
    hyperparameters = baseline.rule.with_defaults(setting)
    return {"rule": baseline.rule.__name__, "schedule": baseline.schedule, "hyperparameters": hyperparameters}


def _describe(task: str) -> dict[str, Any]:
    """A task as part of a key: what it is registered with."""
    builder, options = catalog.REGISTRY[task]
    return {"name": task, "builder": builder.__qualname__, "options": {k: repr(v) for k, v in options.items()}}


def _tensors(setting: dict[str, float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in setting.items()}


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
