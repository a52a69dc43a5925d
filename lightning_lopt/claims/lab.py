"""Where claims are measured: how much is to be done, what has been done before, and who is told about it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightning_lopt.evaluation.cache import Cache
from lightning_lopt.evaluation.compare import Progress
from lightning_lopt.rules import UpdateRule

Value = TypeVar("Value")
SECONDS = "seconds"


class Lab:
    """What a claim's `measure` is given.

    Args:
        seeds: how many; a claim uses 0, 1, ... below it for whatever it repeats.
        quick: measure at a smaller scale: a check that everything runs, and a hint at the verdict.
        cache_dir: where pieces are kept, and found again; None keeps none.
        progress: told what is going on: text, done, total.

    Example:
        >>> lab = Lab(seeds=2, quick=True, cache_dir=None)
        >>> lab.pick(2000, 100), list(lab.seeds)
        (100, [0, 1])
        >>> lab.piece("squares", {"up to": 3}, lambda: {"values": [i * i for i in range(3)]})
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
        self.seeds, self.quick, self.cache_dir = range(seeds), quick, cache_dir
        self.progress: Progress = progress or (lambda text, done, total: None)
        self.seconds = 0.0
        """CPU seconds of all pieces so far, of those that were found too: what the claim costs without a cache."""
        self._cache = Cache(cache_dir)

    def pick(self, full: Value, quick: Value) -> Value:
        """One of two, by the scale."""
        return quick if self.quick else full

    def piece(self, name: str, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A piece of a measurement: computed once, kept as JSON, and found again after an interruption.

        Pieces of a minute or so make a claim resumable. What `compute` returns comes back with floats of six digits and
        NaN for whatever is not finite, the first time as later.

        Args:
            name: what it is, for the progress report; claims share pieces of the same name and key.
            key: everything that the result follows from: sizes, seeds, and the `compare.fingerprint` of rules.
            compute: computes it.
        """
        found = self._cache.get(name, key)
        if found is None:
            start = time.process_time()
            computed = compute()
            found = self._cache.put(name, key, {"value": computed, SECONDS: time.process_time() - start})
        self.seconds += found[SECONDS]
        value: dict[str, Any] = found["value"]
        return value

    @property
    def compiled(self) -> bool:
        """Whether torch.compile pays: not at the quick scale, nor without the compiler that it needs on CPUs."""
        return not self.quick and any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def weights(rule: UpdateRule) -> dict[str, Any]:
    """A rule's meta-parameters as lists, to be part of a piece."""
    return {name: param.detach().tolist() for name, param in rule.named_parameters()}


def load_weights(rule: UpdateRule, found: dict[str, Any]) -> UpdateRule:
    """The rule with the meta-parameters of `weights`."""
    rule.load_state_dict({name: torch.tensor(value) for name, value in found.items()})
    return rule
