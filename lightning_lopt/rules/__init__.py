"""Update rules: the math of all optimizers of this package, in torch alone."""

from lightning_lopt.rules import dmd
from lightning_lopt.rules.base import (
    REGISTRY,
    RuleConfig,
    Source,
    StepContext,
    UpdateRule,
    WaitingTensor,
    compute_dtype,
    make,
    register,
)
from lightning_lopt.rules.gru import GRUConfig, GRURule
from lightning_lopt.rules.history import HistoryConfig, NormalizedHistory
from lightning_lopt.rules.lstm import LSTMConfig, LSTMRule
from lightning_lopt.rules.multiscale_adam import MultiscaleAdam, MultiscaleAdamConfig
from lightning_lopt.rules.scheduled import Scheduled, ScheduledConfig
from lightning_lopt.rules.star import STAR, STARConfig
from lightning_lopt.rules.velo import VeLO, VeLOConfig

__all__ = [
    "REGISTRY",
    "STAR",
    "GRUConfig",
    "GRURule",
    "HistoryConfig",
    "LSTMConfig",
    "LSTMRule",
    "MultiscaleAdam",
    "MultiscaleAdamConfig",
    "NormalizedHistory",
    "RuleConfig",
    "STARConfig",
    "Scheduled",
    "ScheduledConfig",
    "Source",
    "StepContext",
    "UpdateRule",
    "VeLO",
    "VeLOConfig",
    "WaitingTensor",
    "compute_dtype",
    "dmd",
    "make",
    "register",
]
