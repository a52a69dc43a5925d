"""Hand-designed optimizers as update rules, for comparison: Adam, AdamW, SGD with momentum, RMSProp, NAdamW.

Their hyper-parameters take the place of a learned rule's meta-parameters. So a grid of settings times several seeds
runs as one population of the inner loop that runs the learned rules (`meta.unroll`). Each optimizer matches its class
in `torch.optim` to rounding; arithmetic on hyper-parameters is in float64. Nothing here is learned, so these rules have
no kind and cannot be saved.
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
    """Configuration of a hand-designed optimizer."""

    schedule: str = "constant"
    """"constant", or "cosine" down to zero, which needs the run's length. Warm-up comes before either."""

    def __post_init__(self) -> None:
        self.check(self.schedule in SCHEDULES, "schedule", f"one of {list(SCHEDULES)}")


class HandDesigned(UpdateRule):
    """Base class of the hand-designed rules.

    All have `lr`, `weight_decay` (decoupled: multiplied by the learning rate, as in AdamW) and `warmup`, the fraction
    of the run over which the learning rate rises linearly from 0.

    Args:
        config: the schedule.
        hyperparameters: values that replace those of the class's `DEFAULTS`.
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
        """All hyper-parameters, with defaults for the missing ones.

        Raises:
            ValueError: the optimizer has no such hyper-parameter.
        """
        if unknown := sorted(set(hyperparameters) - set(cls.DEFAULTS)):
            known = sorted(cls.DEFAULTS)
            raise ValueError(f"Unknown hyper-parameter {unknown[0]!r} of {cls.__name__}; allowed are {known}.")
        return {**cls.DEFAULTS, **hyperparameters}

    def learning_rate(self, hyper: Mapping[str, Tensor], context: StepContext) -> Tensor:
        """The step's learning rate, () float64.

        A run has T steps, the first w = warmup T of them for warm-up. Step t, counted from 0, has the learning rate
        lr min(1, (t + 1) / w). From step w on, "cosine" multiplies it by (1 + cos(pi (t - w) / (T - w))) / 2, as
        torch's `CosineAnnealingLR` does with T_max = T - w.
        """
        step = context.step.double()
        if context.num_steps is None:
            if self.config.schedule == "cosine":
                raise ValueError(
                    "schedule='cosine' needs the run's length; pass num_steps, or use schedule='constant'."
                )
            return hyper["lr"] * torch.ones_like(step)
        total = torch.as_tensor(context.num_steps, device=step.device).double()
        return hyper["lr"] * schedule_factor(step, total, hyper["warmup"] * total, self.config.schedule)


def schedule_factor(step: Tensor, total: Tensor, warmup: Tensor, schedule: str) -> Tensor:
    """What multiplies the learning rate at a step, see `HandDesigned.learning_rate`.

    Args:
        step: () steps done, float64.
        total: () the run's length.
        warmup: () the length of the warm-up.
        schedule: one of `SCHEDULES`.

    Example:
        >>> total, warmup = torch.tensor(10.0), torch.tensor(2.0)
        >>> [round(float(schedule_factor(torch.tensor(t), total, warmup, "cosine")), 2) for t in (0.0, 1.0, 6.0)]
        [0.5, 1.0, 0.5]
    """
    rise = ((step + 1) / warmup.clamp(min=1.0)).clamp(max=1.0)
    if schedule == "constant":
        return rise
    progress = ((step - warmup) / (total - warmup).clamp(min=1.0)).clamp(0.0, 1.0)
    return rise * 0.5 * (1 + torch.cos(math.pi * progress))


class SGDState(NamedTuple):
    """State of `SGDM`."""

    momentum_buffer: Tensor  # (*shape)


class SGDM(HandDesigned):
    """Stochastic gradient descent with momentum, `torch.optim.SGD` without dampening: b <- mu b + g, p <- p - lr b.

    Weight decay is decoupled, where torch adds it to the gradient. It is 0 by default and in the search.
    """

    DEFAULTS = {**HandDesigned.DEFAULTS, "momentum": 0.9}

    def init_state(self, param: Tensor) -> SGDState:
        """A buffer of zeros."""
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
    """Adam (Kingma & Ba 2014, arXiv 1412.6980), and AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) with a decay."""

    DEFAULTS = {**HandDesigned.DEFAULTS, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}

    def init_state(self, param: Tensor) -> AdamState:
        """Zero moments."""
        return AdamState(torch.zeros_like(param), torch.zeros_like(param))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: AdamState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, AdamState]:
        """One step."""
        rate = self.learning_rate(meta_params, context)
        state, inverse = _moments(meta_params, grad, state, context)
        correction = 1 - meta_params["beta1"] ** (context.step.double() + 1)
        delta = -(rate / correction).to(grad) * state.exp_avg * inverse
        return delta - (rate * meta_params["weight_decay"]).to(grad) * param, state


class RMSPropState(NamedTuple):
    """State of `RMSProp`."""

    square_avg: Tensor  # (*shape)


class RMSProp(HandDesigned):
    """RMSProp (Tieleman & Hinton 2012): `torch.optim.RMSprop`, without bias correction."""

    DEFAULTS = {**HandDesigned.DEFAULTS, "alpha": 0.99, "eps": 1e-8}

    def init_state(self, param: Tensor) -> RMSPropState:
        """An average of zero."""
        return RMSPropState(torch.zeros_like(param))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: RMSPropState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, RMSPropState]:
        """One step."""
        rate = self.learning_rate(meta_params, context)
        square_weight = (1 - meta_params["alpha"]).to(grad)
        square_avg = (1 - square_weight) * state.square_avg + square_weight * grad * grad
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
        rate = self.learning_rate(meta_params, context)
        step = context.step.double() + 1
        moments, inverse = _moments(meta_params, grad, AdamState(state.exp_avg, state.exp_avg_sq), context)
        mu = _nadam_momentum(meta_params, step)
        mu_next = _nadam_momentum(meta_params, step + 1)
        product = state.mu_product.double() * mu
        grad_rate = rate * (1 - mu) / (1 - product)
        avg_rate = rate * mu_next / (1 - product * mu_next)
        delta = -(grad_rate.to(grad) * grad + avg_rate.to(grad) * moments.exp_avg) * inverse
        delta = delta - (rate * meta_params["weight_decay"]).to(grad) * param
        return delta, NAdamState(*moments, product.to(state.mu_product))


def _nadam_momentum(hyper: Mapping[str, Tensor], step: Tensor) -> Tensor:
    """NAdam's momentum, which rises to beta1; steps count from 1."""
    return hyper["beta1"] * (1 - 0.5 * 0.96 ** (hyper["momentum_decay"] * step))


def _moments(
    hyper: Mapping[str, Tensor], grad: Tensor, state: AdamState, context: StepContext
) -> tuple[AdamState, Tensor]:
    """The new moments, and 1 / (sqrt(bias-corrected second moment) + eps)."""
    grad_weight = (1 - hyper["beta1"]).to(grad)
    square_weight = (1 - hyper["beta2"]).to(grad)
    exp_avg = state.exp_avg + grad_weight * (grad - state.exp_avg)
    exp_avg_sq = (1 - square_weight) * state.exp_avg_sq + square_weight * grad * grad
    correction = 1 - hyper["beta2"] ** (context.step.double() + 1)
    inverse = 1 / (exp_avg_sq.sqrt() * correction.rsqrt().to(grad) + hyper["eps"].to(grad))
    return AdamState(exp_avg, exp_avg_sq), inverse
