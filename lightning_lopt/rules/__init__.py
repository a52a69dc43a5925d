"""Update rules: the maths of every optimizer of this package, in torch alone."""

from lightning_lopt.rules.base import (
    REGISTRY,
    RuleConfig,
    Source,
    StepContext,
    UpdateRule,
    compute_dtype,
    make,
    register,
)
from lightning_lopt.rules.star import STAR, STARConfig

__all__ = [
    "REGISTRY",
    "STAR",
    "RuleConfig",
    "STARConfig",
    "Source",
    "StepContext",
    "UpdateRule",
    "compute_dtype",
    "make",
    "register",
]
