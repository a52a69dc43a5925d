"""Compare learned rules with tuned hand-designed optimizers: `lopt evaluate`."""

from lightning_lopt.evaluation.compare import Options, evaluate, fingerprint
from lightning_lopt.evaluation.results import Entry, Results
from lightning_lopt.evaluation.rivals import RIVALS
from lightning_lopt.evaluation.runs import Runs
from lightning_lopt.evaluation.suites import HELDOUT, JUDGING_ONLY, REAL, SUITES, UNSEEN2, Case
from lightning_lopt.evaluation.tuning import BASELINES

__all__ = [
    "BASELINES",
    "HELDOUT",
    "JUDGING_ONLY",
    "REAL",
    "RIVALS",
    "SUITES",
    "UNSEEN2",
    "Case",
    "Entry",
    "Options",
    "Results",
    "Runs",
    "evaluate",
    "fingerprint",
]
