"""Compare learned rules with tuned hand-designed optimizers: `lopt evaluate`."""

from lightning_lopt.evaluation.compare import Options, evaluate, fingerprint
from lightning_lopt.evaluation.results import Entry, Results
from lightning_lopt.evaluation.runs import Runs
from lightning_lopt.evaluation.suites import HELDOUT, SUITES, Case
from lightning_lopt.evaluation.tuning import BASELINES

__all__ = [
    "BASELINES",
    "HELDOUT",
    "SUITES",
    "Case",
    "Entry",
    "Options",
    "Results",
    "Runs",
    "evaluate",
    "fingerprint",
]
