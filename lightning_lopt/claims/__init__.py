"""The papers' results as claims that measure themselves: `lopt reproduce`.

A module of this package that has a `CLAIMS` tuple adds its claims to the registry; nothing else has to be touched.
"""

from lightning_lopt.claims.base import Check, Claim, Measured, at_least, at_most, below, near, verdict
from lightning_lopt.claims.lab import Lab, load_weights, weights
from lightning_lopt.claims.registry import find, find_all

__all__ = [
    "Check",
    "Claim",
    "Lab",
    "Measured",
    "at_least",
    "at_most",
    "below",
    "find",
    "find_all",
    "load_weights",
    "near",
    "verdict",
    "weights",
]
