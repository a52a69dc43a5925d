"""lightning_lopt: learned optimizers for PyTorch Lightning."""

from lightning_lopt import rules
from lightning_lopt.optimizer import RuleOptimizer

__version__ = "0.1.0"
__all__ = ["RuleOptimizer", "__version__", "rules"]
