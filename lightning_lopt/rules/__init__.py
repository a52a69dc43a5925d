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
from lightning_lopt.rules.celo2 import Celo2, Celo2Config
from lightning_lopt.rules.gru import GRUConfig, GRURule
from lightning_lopt.rules.history import HistoryConfig, NormalizedHistory
from lightning_lopt.rules.lstm import LSTMConfig, LSTMRule
from lightning_lopt.rules.multiscale_adam import MultiscaleAdam, MultiscaleAdamConfig
from lightning_lopt.rules.muon import Muon, MuonConfig
from lightning_lopt.rules.scheduled import Scheduled, ScheduledConfig
from lightning_lopt.rules.soap import SOAP, SOAPConfig
from lightning_lopt.rules.star import STAR, STARConfig
from lightning_lopt.rules.velo import VeLO, VeLOConfig

__all__ = [
    "REGISTRY",
    "SOAP",
    "STAR",
    "Celo2",
    "Celo2Config",
    "GRUConfig",
    "GRURule",
    "HistoryConfig",
    "LSTMConfig",
    "LSTMRule",
    "MultiscaleAdam",
    "MultiscaleAdamConfig",
    "Muon",
    "MuonConfig",
    "NormalizedHistory",
    "RuleConfig",
    "SOAPConfig",
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
