"""A rule whose learning rate is a meta-parameter, so that several learning rates run as one population."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lopt.evaluation.baselines import Adam, BaselineConfig
from lightning_lopt.rules import StepContext, UpdateRule


def at_rate(rule: UpdateRule, lr: float) -> dict[str, Tensor]:
    """The meta-parameters of a rule that has a learning rate among them, at this rate."""
    return {**rule.meta_params(), "lr": torch.tensor(lr, dtype=torch.float64)}


class WithLearningRate(UpdateRule):
    """A rule under a learning-rate schedule, as `RuleOptimizer` would run it with one of torch's schedulers.

    Args:
        rule: the rule, whose updates are those of learning rate 1.
        schedule: "constant", or "cosine" over the run.
        floor: the fraction of the learning rate at which a cosine ends.
    """

    def __init__(self, rule: UpdateRule, schedule: str, floor: float = 0.0) -> None:
        super().__init__(rule.config, kind=rule.kind)
        self.rule = rule
        self.scheduler = Adam(BaselineConfig(schedule=schedule))  # for its learning rate alone
        self.floor = floor
        self.lr = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def meta_params(self) -> dict[str, Tensor]:
        """The rule's meta-parameters, and the learning rate."""
        return {**self.rule.meta_params(), "lr": self.lr}

    def init_state(self, param: Tensor) -> Any:
        """The rule's state."""
        return self.rule.init_state(param)

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Any]:
        """The rule's update, times the learning rate of this step."""
        own = {name: value for name, value in meta_params.items() if name != "lr"}
        delta, state = self.rule.update(own, grad, state, param, context)
        warmup = torch.zeros((), dtype=torch.float64)
        rate = self.scheduler.learning_rate({"lr": meta_params["lr"], "warmup": warmup}, context)
        rate = torch.lerp(rate, meta_params["lr"], self.floor)
        return rate.to(delta) * delta, state
