"""RuleOptimizer: an update rule behind torch's optimizer contract, and everything around one step of it."""

from lightning_lopt.optimizer.rule_optimizer import RuleOptimizer

__all__ = ["RuleOptimizer"]
