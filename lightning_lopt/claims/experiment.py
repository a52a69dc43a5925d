"""What a claim's `measure` gets: seeds, scale, a cache of intermediate results, and a progress report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning_lopt.evaluation.cache import Cache
from lightning_lopt.evaluation.compare import Progress

Value = TypeVar("Value")
SECONDS = "seconds"


class Experiment:
    """The conditions under which a claim is measured.

    Args:
        seeds: the number of seeds; a claim repeats its runs with seeds 0, 1, ... below it.
        quick: measure at a smaller scale, to see that everything runs and get a hint at the verdict.
        cache_dir: folder of intermediate results; None disables the cache.
        progress: called with what is running, the number of steps done, and their total.

    Example:
        >>> experiment = Experiment(seeds=2, quick=True, cache_dir=None)
        >>> experiment.pick(2000, 100), list(experiment.seeds)
        (100, [0, 1])
        >>> experiment.cached("squares", {"stop": 3}, lambda: {"values": [i * i for i in range(3)]})
        {'values': [0, 1, 4]}
    """

    def __init__(
        self,
        *,
        seeds: int = 3,
        quick: bool = False,
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.seeds = range(seeds)
        self.quick = quick
        self.progress: Progress = progress or (lambda text, done, total: None)
        self.saved_seconds = 0.0
        """CPU seconds that the results found in the cache took when they were computed."""
        self._cache = Cache(cache_dir)

    def reporter(self, label: str, total: int) -> Callable[[int], None]:
        """A function that reports progress, called with the number of steps done out of `total`."""
        return lambda done: self.progress(label, done, total)

    def pick(self, full: Value, quick: Value) -> Value:
        """The value for this scale."""
        return quick if self.quick else full

    def cached(self, name: str, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """An intermediate result: computed once, stored as JSON, and read back after an interruption.

        A claim resumes from its cached results, so make them about a minute each. Floats come back with six digits, and
        as NaN if they are not finite, also the first time.

        Args:
            name: a name for the result; claims share results of the same name and key.
            key: everything the result depends on: sizes, seeds, and the `compare.fingerprint` of rules.
            compute: computes the result.
        """
        found = self._cache.get(name, key)
        if found is not None:
            self.saved_seconds += found[SECONDS]
        else:
            self.progress(name, 0, 1)  # until `compute` reports more
            start = time.process_time()
            computed = compute()
            found = self._cache.put(name, key, {"value": computed, SECONDS: time.process_time() - start})
        value: dict[str, Any] = found["value"]
        return value

    @property
    def compiled(self) -> bool:
        """Whether to use torch.compile: at the full scale, if the C++ compiler that it needs on CPUs is there."""
        return not self.quick and any(shutil.which(name) for name in ("c++", "g++", "clang++"))
