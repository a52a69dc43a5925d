"""Compare learned rules with tuned hand-designed optimizers.

All optimizers get the same initial parameters and the same batches, seed by seed. The baselines are tuned on the task
and seeds of the comparison, separately for the final and the mean training loss, which favors them; learned rules run
untuned. The nominal term alone (`hyperparam`) is among the rules unless it is left out: a rule's lead over it is what
was learned. Rivals (`rivals`) run at published settings.
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

from lightning_lopt.evaluation import one_by_one
from lightning_lopt.evaluation.baselines import Hyperparameters
from lightning_lopt.evaluation.cache import Cache
from lightning_lopt.evaluation.one_by_one import MakeStepper, RuleStepper
from lightning_lopt.evaluation.results import DEFAULT_ADAM, Entry, Results
from lightning_lopt.evaluation.rivals import DEFAULT_ADAM_RIVAL, RIVALS, Rival
from lightning_lopt.evaluation.runs import VALIDATIONS, VALIDATIONS_OF_LARGE, Runs, initial_losses, run, step_seconds
from lightning_lopt.evaluation.suites import Case
from lightning_lopt.evaluation.tuning import BASELINES, SELECTED_BY, Baseline, RandomSearch, SearchResult, Trial
from lightning_lopt.hub import load_rule
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import UpdateRule
from lightning_lopt.tasks import Task, catalog, datasets
from lightning_lopt.tasks import make as make_task
from lightning_lopt.tasks.base import check_choice, check_positive

NOMINAL = "hyperparam"
MAX_ELEMENTS = 4_000_000
Progress = Callable[[str, int, int], None]
"""Called with what is running, the steps done, and the total number of steps."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an evaluation."""

    seeds: int = 3
    """Runs per setting."""
    tell_length: bool = True
    """Tell the learned rules how long the run is. Baselines with a schedule always know it."""
    samples: int = 50
    """Number of settings that a random search tries (`nadamw`)."""
    max_population: int = 15
    """Most runs side by side; fewer if their parameters would take too much memory."""
    nominal: bool = True
    """Run the nominal term alone too."""
    cache_dir: str | Path | None = Path("runs/evaluate")
    """Folder of cached results; None disables the cache."""

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
        cases: task names with the number of steps of each; see `suites`.
        baselines: names from `tuning.BASELINES` and `rivals.RIVALS`.
        options: seeds, cache and the like (default: `Options()`).
        progress: called as the runs proceed.

    Raises:
        ValueError: a name of a rule, task or baseline is unknown, or a number is not allowed.
        ModuleNotFoundError: a rival's package is not installed.

    Example:
        >>> results = evaluate(
        ...     "star", [Case("synthetic-mlp", 20)], baselines=[], options=Options(seeds=2, cache_dir=None)
        ... )
        >>> [entry.optimizer for entry in results.entries]
        ['adam-1e-3', 'star', 'hyperparam']
    """
    options = options or Options()
    for name in baselines:
        check_choice("baseline", name, {**BASELINES, **RIVALS})
        if name in RIVALS:
            RIVALS[name].check()
    learned = _load(rules, options.nominal)
    # Check all arguments before the first run: runs may take hours.
    evaluators = [_CaseEvaluator(Case(*case), options, progress) for case in cases]
    if not evaluators:
        raise ValueError("cases is empty; give at least one task with its number of steps.")
    fingerprints = {label: fingerprint(rule) for label, rule in learned.items()}
    entries: list[Entry] = []
    for evaluator in evaluators:
        entries += [evaluator.hand_designed(name) for name in baselines]
        entries.append(evaluator.default_adam())
        entries += [evaluator.learned_rule(label, rule, fingerprints[label]) for label, rule in learned.items()]
    return Results(options.seeds, entries)


def fingerprint(rule: UpdateRule) -> str:
    """A hash of a rule: its kind, configuration, meta-parameters, and its first steps on a small task.

    The steps make the hash change when the rule's code changes its behavior.
    """
    unroll = Unroll(rule, make_task("synthetic-mlp", hidden=(8,)), "raw")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        inner = unroll.start(generator, torch.tensor([5]))
        for _ in range(5):
            inner, record, _ = unroll.slot(rule.meta_params(), inner, generator, lambda n: torch.full((n,), 5))
    # Three digits: later ones depend on the machine.
    response = [f"{float(param.double().norm()):.2e}" for param in (*inner.params.values(), record.losses)]
    digest = hashlib.sha256(json.dumps([rule.kind, rule.config.to_dict(), response]).encode())
    for name, param in rule.named_parameters():
        digest.update(name.encode() + param.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def _load(rules: str | Path | UpdateRule | Sequence[str | Path | UpdateRule], nominal: bool) -> dict[str, UpdateRule]:
    """Label -> rule, with the nominal term appended if it is wanted and not among them."""
    given = [rules] if isinstance(rules, (str, Path, UpdateRule)) else list(rules)
    learned: dict[str, UpdateRule] = {}
    for item in given:
        label = (item.kind or type(item).__name__) if isinstance(item, UpdateRule) else str(item).rstrip("/")
        if label in (*learned, *BASELINES, *RIVALS, DEFAULT_ADAM):
            raise ValueError(f"The name {label!r} is used twice; give each rule once, or rename its directory.")
        learned[label] = item if isinstance(item, UpdateRule) else load_rule(item)
    if nominal and NOMINAL not in learned:
        learned[NOMINAL] = load_rule(NOMINAL)
    # Tasks are float32; RuleOptimizer casts a rule to its parameters' precision likewise.
    return {label: copy.deepcopy(rule).float() for label, rule in learned.items()}


class _CaseEvaluator:
    """Evaluates optimizers on one case, or finds their results in the cache."""

    def __init__(self, case: Case, options: Options, progress: Progress | None) -> None:
        check_positive("steps", case.steps)
        self.case = case
        self.options = options
        self.progress = progress
        self.cache = Cache(options.cache_dir)
        self._task: Task | None = None
        if case.task not in catalog.REGISTRY:
            make_task(case.task)  # raises, and suggests similar names
        dataset = catalog.dataset_of(case.task)
        if isinstance(dataset, str) and not datasets.is_available(dataset):
            datasets.load(dataset)  # downloads it, or raises

    @property
    def task(self) -> Task:
        """The task, built on first use so that a suite does not hold all its data in memory at once."""
        if self._task is None:
            self._task = make_task(self.case.task)
            self.initial = initial_losses(self._task, self.options.seeds)
        return self._task

    def hand_designed(self, name: str) -> Entry:
        """A baseline at its best settings, or a rival."""
        return self.rival(name, RIVALS[name]) if name in RIVALS else self.baseline(name, BASELINES[name])

    def baseline(self, name: str, baseline: Baseline) -> Entry:
        """A baseline at its best settings."""
        search = baseline.search
        if isinstance(search, RandomSearch):
            search = dataclasses.replace(search, num=self.options.samples)
        rule = baseline.make()

        def run_settings(settings: list[Hyperparameters]) -> list[Runs]:
            return self._runs(name, rule, [_key(baseline, setting) for setting in settings], settings)

        return self._rule_entry(name, baseline.label, rule, _key(baseline, {}), search.search(run_settings))

    def rival(self, name: str, rival: Rival) -> Entry:
        """An optimizer at its published setting, or at the best of a small search."""
        base = {"rival": name, "version": rival.version}

        def make(setting: Hyperparameters) -> MakeStepper:
            return lambda params, task, steps: rival.make(params, task, steps, setting)

        def run_setting(setting: Hyperparameters) -> Runs:
            return self._one_by_one(name, {**base, "hyperparameters": setting}, make(setting))

        def seconds() -> float:
            # Beside rules that run side by side, on the reference path, torch's optimizers would look too fast.
            return one_by_one.step_seconds(make({}), self.task) if self.case.one_by_one else math.nan

        result = _untuned({}, run_setting({})) if rival.search is None else rival.search.search(run_setting)
        return self._entry(name, rival.label, base, result, seconds)

    def default_adam(self) -> Entry:
        """Adam at its default learning rate."""
        if self.case.one_by_one:
            return self.rival(DEFAULT_ADAM, DEFAULT_ADAM_RIVAL)
        adam, setting = BASELINES["adam"], {"lr": 1e-3}
        rule, key = adam.make(), _key(adam, setting)
        result = _untuned(setting, self._runs(DEFAULT_ADAM, rule, [key], [setting])[0])
        return self._rule_entry(DEFAULT_ADAM, "Adam 1e-3", rule, key, result)

    def learned_rule(self, label: str, rule: UpdateRule, mark: str) -> Entry:
        """A learned rule, untuned; `mark` is its fingerprint."""
        key = {"rule": rule.kind, "fingerprint": mark, "tell_length": self.options.tell_length}
        result = _untuned({}, self._runs(label, rule, [key], [{}])[0])
        return self._rule_entry(label, "nominal term" if label == NOMINAL else label, rule, key, result)

    def _rule_entry(self, name: str, label: str, rule: UpdateRule, key: dict[str, Any], result: SearchResult) -> Entry:
        def seconds() -> float:
            if self.case.one_by_one:
                return one_by_one.step_seconds(self._stepper(rule), self.task)
            return step_seconds(rule, rule.meta_params(), self.task)

        return self._entry(name, label, key, result, seconds)

    def _entry(
        self, name: str, label: str, key: dict[str, Any], result: SearchResult, seconds: Callable[[], float]
    ) -> Entry:
        key = {"what": "step seconds", "task": _describe(self.case.task), "one_by_one": self.case.one_by_one, **key}
        found = self.cache.get(str(self.case), key)
        if found is None:
            found = self.cache.put(str(self.case), key, {"seconds": seconds()})
        return Entry(self.case, name, label, result.best, result.num_trials, found["seconds"])

    def _runs(
        self, name: str, rule: UpdateRule, keys: list[dict[str, Any]], settings: list[Hyperparameters]
    ) -> list[Runs]:
        """The runs of several settings of a rule, from the cache where it has them."""
        if self.case.one_by_one:
            rules = [_with_setting(rule, setting) for setting in settings]
            pairs = zip(keys, rules, strict=True)
            return [self._one_by_one(name, key, self._stepper(own)) for key, own in pairs]
        keys = [{**self._fixed(one_by_one=False), **key} for key in keys]
        results = [self._recall(key) for key in keys]
        missing = [i for i, runs in enumerate(results) if runs is None]
        for chunk in _chunks(missing, self._chunk_size() if missing else 1):
            runs = run(
                rule,
                [{**rule.meta_params(), **_tensors(settings[i])} for i in chunk],
                self.task,
                steps=self.case.steps,
                seeds=self.options.seeds,
                tell_length=keys[0].get("tell_length", True),
                validations=VALIDATIONS,
                on_step=self._reporter(name, len(chunk)),
            )
            for i, found in zip(chunk, runs, strict=True):
                results[i] = self._keep(keys[i], found)
        return [runs for runs in results if runs is not None]

    def _one_by_one(self, name: str, key: dict[str, Any], make: MakeStepper) -> Runs:
        """The runs of an optimizer, seed by seed, from the cache if it has them."""
        key = {**self._fixed(one_by_one=True), **key}
        if (found := self._recall(key)) is not None:
            return found
        found = one_by_one.run(
            make,
            self.task,
            steps=self.case.steps,
            seeds=self.options.seeds,
            validations=VALIDATIONS_OF_LARGE if self.case.one_by_one else VALIDATIONS,
            on_step=self._reporter(name, 1),
        )
        return self._keep(key, found)

    def _stepper(self, rule: UpdateRule) -> MakeStepper:
        tell = self.options.tell_length or not rule.kind  # hand-designed rules have no kind, and know the length
        return lambda params, task, steps: RuleStepper(params, rule, steps if tell else None, task.roles)

    def _fixed(self, one_by_one: bool) -> dict[str, Any]:
        """What all keys of runs have."""
        fixed: dict[str, Any] = {"what": "runs", "task": _describe(self.case.task), "one_by_one": one_by_one}
        return fixed | {"steps": self.case.steps, "seeds": self.options.seeds}

    def _keep(self, key: dict[str, Any], found: Runs) -> Runs:
        return Runs(**self.cache.put(str(self.case), key, dataclasses.asdict(found)))

    def _recall(self, key: dict[str, Any]) -> Runs | None:
        """A result from the cache, unless the task's initial losses have changed since it was stored."""
        if (found := self.cache.get(str(self.case), key)) is None:
            return None
        runs = Runs(**found)
        same = self.task is not None and len(self.initial) == len(runs.initial)
        same = same and all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(self.initial, runs.initial, strict=True))
        return runs if same else None

    def _chunk_size(self) -> int:
        """Number of settings in one population."""
        members = min(self.options.max_population, MAX_ELEMENTS // max(self.task.num_params, 1))
        return max(members // self.options.seeds, 1)

    def _reporter(self, name: str, num: int) -> Callable[[int], None] | None:
        if self.progress is None:
            return None
        progress = self.progress
        total = self.case.steps
        text = f"{self.case} {name}" + (f", {num} settings" if num > 1 else "")
        every = max(total // 100, 1)

        def report(done: int) -> None:
            if done % every == 0 or done == total:
                progress(text, done, total)

        return report


def _untuned(setting: Hyperparameters, runs: Runs) -> SearchResult:
    """The result of an optimizer at a single setting, the best by all measures."""
    return SearchResult(dict.fromkeys(SELECTED_BY, Trial(setting, runs)), num_trials=1)


def _with_setting(rule: UpdateRule, setting: Hyperparameters) -> UpdateRule:
    """A copy of the rule with these hyper-parameters."""
    rule = copy.deepcopy(rule)
    with torch.no_grad():
        for name, value in _tensors(setting).items():
            rule.get_parameter(name).copy_(value)
    return rule


def _key(baseline: Baseline, setting: dict[str, float]) -> dict[str, Any]:
    hyperparameters = baseline.rule.with_defaults(setting)
    return {"rule": baseline.rule.__name__, "schedule": baseline.schedule, "hyperparameters": hyperparameters}


def _describe(task: str) -> dict[str, Any]:
    """A task's part of a cache key: its builder and options in the catalog."""
    builder, options = catalog.REGISTRY[task]
    # The repr of a function has its address, which differs from process to process.
    texts = {name: getattr(value, "__qualname__", None) or repr(value) for name, value in options.items()}
    return {"name": task, "builder": builder.__qualname__, "options": texts}


def _tensors(setting: dict[str, float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in setting.items()}


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
