"""Hand-designed optimizers as update rules, for comparison: Adam, AdamW, SGD with momentum, RMSProp, NAdamW.

They are no learned rules and have no kind. Their hyper-parameters stand where a learned rule's meta-parameters do, so
that a whole grid of them times several seeds is one population of the same inner loop (`meta.unroll`) that runs the
learned rules. Each follows its class in `torch.optim`, to rounding; arithmetic on hyper-parameters is in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lopt.rules import RuleConfig, StepContext, UpdateRule

Hyperparameters = dict[str, float]
SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class BaselineConfig(RuleConfig):
    """What is static about a hand-designed optimizer."""

    schedule: str = "constant"
    """"constant", or "cosine": to zero over the run, whose length must then be known. Warm-up comes before either."""

    def __post_init__(self) -> None:
        self.check(self.schedule in SCHEDULES, "schedule", f"one of {list(SCHEDULES)}")


class HandDesigned(UpdateRule):
    """Base of the hand-designed rules.

    All have `lr`, `weight_decay` (decoupled: multiplied by the learning rate, as AdamW does) and `warmup`, the share of
    the run over which the learning rate rises linearly from 0.

    Args:
        config: the schedule.
        hyperparameters: values that differ from the class's `DEFAULTS`.
    """

    Config = BaselineConfig
    DEFAULTS: ClassVar[Hyperparameters] = {"lr": 1e-3, "weight_decay": 0.0, "warmup": 0.0}
    config: BaselineConfig

    def __init__(self, config: BaselineConfig | None = None, **hyperparameters: float) -> None:
        super().__init__(config)
        for name, value in self.with_defaults(hyperparameters).items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))

    @classmethod
    def with_defaults(cls, hyperparameters: Mapping[str, float]) -> Hyperparameters:
        """All hyper-parameters, those that are not given at their defaults.

        Raises:
            ValueError: for a name that the optimizer does not have.
        """
        if unknown := sorted(set(hyperparameters) - set(cls.DEFAULTS)):
            known = sorted(cls.DEFAULTS)
            raise ValueError(f"Unknown hyper-parameter {unknown[0]!r} of {cls.__name__}; allowed are {known}.")
        return {**cls.DEFAULTS, **hyperparameters}

    def learning_rate(self, hyper: Mapping[str, Tensor], context: StepContext) -> Tensor:
        """The step's learning rate: () float64.

        With T steps of which w = warmup T are warm-up, step t from 0: lr min(1, (t + 1) / w), and for "cosine" times
        (1 + cos(pi (t - w) / (T - w))) / 2 from w on, as torch's `CosineAnnealingLR` with T_max = T - w.
        """
        step = context.step.double()
        if context.num_steps is None:
            if self.config.schedule == "cosine":
                raise ValueError("schedule='cosine' needs the run's length (num_steps), which is not known here.")
            return hyper["lr"] * torch.ones_like(step)
        total = torch.as_tensor(context.num_steps, device=step.device).double()
        warmup = hyper["warmup"] * total
        rate = hyper["lr"] * ((step + 1) / warmup.clamp(min=1.0)).clamp(max=1.0)
        if self.config.schedule == "constant":
            return rate
        progress = ((step - warmup) / (total - warmup).clamp(min=1.0)).clamp(0.0, 1.0)
        return rate * 0.5 * (1 + torch.cos(math.pi * progress))


class SGDState(NamedTuple):
    """State of `SGDM`."""

    momentum_buffer: Tensor  # (*shape)


class SGDM(HandDesigned):
    """Stochastic gradient descent with momentum, `torch.optim.SGD` without dampening: b <- mu b + g, p <- p - lr b.

    Weight decay is decoupled here, where torch's is added to the gradient; it is 0 by default and in the search.
    """

    DEFAULTS = {**HandDesigned.DEFAULTS, "momentum": 0.9}

    def init_state(self, param: Tensor) -> SGDState:
        """A zero buffer."""
        return SGDState(torch.zeros_like(param))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: SGDState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, SGDState]:
        """One step."""
        rate = self.learning_rate(meta_params, context)
        buffer = meta_params["momentum"].to(grad) * state.momentum_buffer + grad
        delta = -rate.to(grad) * buffer - (rate * meta_params["weight_decay"]).to(grad) * param
        return delta, SGDState(buffer)


class AdamState(NamedTuple):
    """State of `Adam`."""

    exp_avg: Tensor  # (*shape)
    exp_avg_sq: Tensor  # (*shape)


class Adam(HandDesigned):
    """Adam (Kingma & Ba 2014, arXiv 1412.6980); with decay AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101)."""

    DEFAULTS = {**HandDesigned.DEFAULTS, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}

    def init_state(self, param: Tensor) -> AdamState:
        """Zero moments."""
        return AdamState(torch.zeros_like(param), torch.zeros_like(param))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: AdamState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, AdamState]:
        """One step."""
        rate, beta1 = self.learning_rate(meta_params, context), meta_params["beta1"]
        state, inverse = _moments(meta_params, grad, state, context)
        correction = 1 - beta1 ** (context.step.double() + 1)
        delta = -(rate / correction).to(grad) * state.exp_avg * inverse
        return delta - (rate * meta_params["weight_decay"]).to(grad) * param, state


class RMSPropState(NamedTuple):
    """State of `RMSProp`."""

    square_avg: Tensor  # (*shape)


class RMSProp(HandDesigned):
    """RMSProp (Tieleman & Hinton 2012): `torch.optim.RMSprop`, without bias correction."""

    DEFAULTS = {**HandDesigned.DEFAULTS, "alpha": 0.99, "eps": 1e-8}

    def init_state(self, param: Tensor) -> RMSPropState:
        """A zero average."""
        return RMSPropState(torch.zeros_like(param))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: RMSPropState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, RMSPropState]:
        """One step."""
        rate, of_sq = self.learning_rate(meta_params, context), (1 - meta_params["alpha"]).to(grad)
        square_avg = (1 - of_sq) * state.square_avg + of_sq * grad * grad
        delta = -rate.to(grad) * grad / (square_avg.sqrt() + meta_params["eps"].to(grad))
        return delta - (rate * meta_params["weight_decay"]).to(grad) * param, RMSPropState(square_avg)


class NAdamState(NamedTuple):
    """State of `NAdamW`."""

    exp_avg: Tensor  # (*shape)
    exp_avg_sq: Tensor  # (*shape)
    mu_product: Tensor  # () product of the momenta so far


class NAdamW(HandDesigned):
    """Adam with Nesterov momentum (Dozat 2016): `torch.optim.NAdam(decoupled_weight_decay=True)`."""

    DEFAULTS = {**Adam.DEFAULTS, "momentum_decay": 4e-3}

    def init_state(self, param: Tensor) -> NAdamState:
        """Zero moments."""
        return NAdamState(torch.zeros_like(param), torch.zeros_like(param), param.new_ones(()))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: NAdamState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, NAdamState]:
        """One step."""
        rate, step = self.learning_rate(meta_params, context), context.step.double() + 1
        moments, inverse = _moments(meta_params, grad, AdamState(state.exp_avg, state.exp_avg_sq), context)
        mu, mu_next = (
            meta_params["beta1"] * (1 - 0.5 * 0.96 ** (meta_params["momentum_decay"] * number))
            for number in (step, step + 1)
        )
        product = state.mu_product.double() * mu
        of_grad, of_avg = rate * (1 - mu) / (1 - product), rate * mu_next / (1 - product * mu_next)
        delta = -(of_grad.to(grad) * grad + of_avg.to(grad) * moments.exp_avg) * inverse
        delta = delta - (rate * meta_params["weight_decay"]).to(grad) * param
        return delta, NAdamState(*moments, product.to(state.mu_product))


def _moments(
    hyper: Mapping[str, Tensor], grad: Tensor, state: AdamState, context: StepContext
) -> tuple[AdamState, Tensor]:
    """The new moments, and 1 / (sqrt(bias-corrected second moment) + eps)."""
    of_avg, of_sq = ((1 - hyper[name]).to(grad) for name in ("beta1", "beta2"))
    exp_avg = state.exp_avg + of_avg * (grad - state.exp_avg)
    exp_avg_sq = (1 - of_sq) * state.exp_avg_sq + of_sq * grad * grad
    correction = 1 - hyper["beta2"] ** (context.step.double() + 1)
    inverse = 1 / (exp_avg_sq.sqrt() * correction.rsqrt().to(grad) + hyper["eps"].to(grad))
    return AdamState(exp_avg, exp_avg_sq), inverse
