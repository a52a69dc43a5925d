"""Rules under a learning rate and its schedule, which are meta-parameters then: several rates run as one population."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lopt.evaluation.baselines import Adam, BaselineConfig
from lightning_lopt.rules import StepContext, UpdateRule


class Annealed(UpdateRule):
    """A rule under a learning-rate schedule, as `RuleOptimizer` and a scheduler of torch's would run it.

    Args:
        rule: with step size 1 at learning rate 1.
        schedule: "constant", or "cosine" over the run.
        floor: share of the learning rate where a cosine ends.
    """

    def __init__(self, rule: UpdateRule, schedule: str, floor: float = 0.0) -> None:
        super().__init__(rule.config, kind=rule.kind)
        self.floor = floor
        self.rule, self.rate = rule, Adam(BaselineConfig(schedule=schedule))
        self.lr = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def meta_params(self) -> dict[str, Tensor]:
        """The rule's, and the learning rate."""
        return {**self.rule.meta_params(), "lr": self.lr}

    def init_state(self, param: Tensor) -> Any:
        """The rule's."""
        return self.rule.init_state(param)

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Any]:
        """The rule's step times the schedule."""
        own = {name: value for name, value in meta_params.items() if name != "lr"}
        delta, state = self.rule.update(own, grad, state, param, context)
        warmup = torch.zeros((), dtype=torch.float64)
        rate = self.rate.learning_rate({"lr": meta_params["lr"], "warmup": warmup}, context)
        rate = torch.lerp(rate, meta_params["lr"], self.floor)
        return rate.to(delta) * delta, state
