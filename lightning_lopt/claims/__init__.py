"""The papers' results as claims that measure themselves: `lopt reproduce`.

A module of this package with a `CLAIMS` tuple adds its claims to the registry. Claims of your own live in a Python file
anywhere: `lopt reproduce my_claims.py` measures those in its `CLAIMS`.

Example:
    >>> import torch
    >>> def measure(experiment):
    ...     dims = experiment.pick(full=1000, quick=100)
    ...     norms = []
    ...     for seed in experiment.seeds:
    ...         experiment.progress("norms", seed, len(experiment.seeds))
    ...         norms.append(float(torch.randn(dims, generator=torch.Generator().manual_seed(seed)).norm()))
    ...     return Measurement({"norm": norms, "bound": [2.0 * dims**0.5]})
    >>> claim = Claim(
    ...     id="gaussian-norm",
    ...     source="A textbook",
    ...     statement="The norm of a Gaussian vector is about the square root of its dimension.",
    ...     setup="1,000 dimensions; quick: 100.",
    ...     measure=measure,
    ...     checks=(below("norm", "bound"), at_least("norm", 5.0)),
    ...     minutes=0.01,
    ...     quick_minutes=0.01,
    ... )
    >>> measurement = claim.measure(Experiment(seeds=2, quick=True))
    >>> verdict([check(measurement.numbers) for check in claim.checks])
    'reproduced'
"""

from lightning_lopt.claims.claim import (
    Assessment,
    Check,
    Claim,
    Measurement,
    at_least,
    at_most,
    below,
    each_at_most,
    near,
    verdict,
    wins,
)
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.registry import find, find_all

__all__ = [
    "Assessment",
    "Check",
    "Claim",
    "Experiment",
    "Measurement",
    "at_least",
    "at_most",
    "below",
    "each_at_most",
    "find",
    "find_all",
    "near",
    "verdict",
    "wins",
]
