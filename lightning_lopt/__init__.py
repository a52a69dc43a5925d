"""lightning_lopt: learned optimizers for PyTorch Lightning."""

__version__ = "0.1.0"

from lightning_lopt import analysis, rules
from lightning_lopt.hub import list_pretrained, load_rule, push_to_hub, save_rule
from lightning_lopt.meta.trainer import MetaTrainer
from lightning_lopt.optimizer import RuleOptimizer
from lightning_lopt.plugin import strategies
from lightning_lopt.plugin.callback import LearnedOptimizer
from lightning_lopt.plugin.stability_monitor import StabilityMonitor
from lightning_lopt.rules import UpdateRule

strategies.register()

__all__ = [
    "LearnedOptimizer",
    "MetaTrainer",
    "RuleOptimizer",
    "StabilityMonitor",
    "UpdateRule",
    "__version__",
    "analysis",
    "list_pretrained",
    "load_rule",
    "push_to_hub",
    "rules",
    "save_rule",
]
