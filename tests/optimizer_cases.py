"""What the tests of RuleOptimizer share: rules with a torch twin, parameters of every shape, and how to run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import lightning_lopt as lopt
from lightning_lopt.rules import StepContext, UpdateRule

SHAPES = {
    "zero_dim": (),
    "one_dim": (5,),
    "one_element": (1, 1),
    "matrix": (4, 3),
    "conv": (2, 3, 3, 3),
    "empty": (0, 3),
}


class NoState(NamedTuple):
    pass


class AdamState(NamedTuple):
    exp_avg: Tensor  # (*shape)
    exp_avg_sq: Tensor  # (*shape)


class SGDRule(UpdateRule):
    """Minus the gradient: with the optimizer's lr in front of it, torch.optim.SGD."""

    def __init__(self) -> None:
        super().__init__(kind="test_sgd")

    def init_state(self, param: Tensor) -> NoState:
        return NoState()

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Any]:
        return -grad, state


class AdamRule(UpdateRule):
    """Adam's direction, with bias correction by the context's step; one meta-parameter, log10 of eps."""

    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    def __init__(self) -> None:
        super().__init__(kind="test_adam")
        self.log_eps = nn.Parameter(torch.tensor(-8.0, dtype=torch.float64))

    def init_state(self, param: Tensor) -> AdamState:
        return AdamState(torch.zeros_like(param), torch.zeros_like(param))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Any]:
        beta1, beta2 = self.betas
        exp_avg = beta1 * state.exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * state.exp_avg_sq + (1 - beta2) * grad * grad
        number = context.step.to(grad.dtype) + 1
        root = (exp_avg_sq / (1 - beta2**number)).sqrt()
        delta = -(exp_avg / (1 - beta1**number)) / (root + 10 ** meta_params["log_eps"])
        return delta, AdamState(exp_avg, exp_avg_sq)


class LossRule(UpdateRule):
    """A step that grows with the loss, and keeps a record of the losses that it was given."""

    needs_loss: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(kind="test_loss")
        self.losses: list[float] = []

    def init_state(self, param: Tensor) -> NoState:
        return NoState()

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Any]:
        assert context.loss is not None
        self.losses.append(float(context.loss))
        return -1e-2 * grad * (1 + context.loss), state

    def terms(self, *arguments: Any) -> dict[str, Tensor]:
        return {"blackbox": -1e-2 * arguments[1]}  # as good as any, and leaves no record


def star(seed: int = 0, **config: Any) -> UpdateRule:
    """STAR with random meta-parameters, all of whose terms act."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return lopt.rules.make("star", **{"nominal_stepsize": 1e-2, "step_mult": 1e-3, **config})


def hidden(params: Iterable[Tensor]) -> list[dict[str, Any]]:
    """A group of weights of hidden layers, as far as they have two dims; some rules move these as matrices."""
    return [{"params": params, "role": "hidden"}]


def parameters(
    shapes: Iterable[tuple[int, ...]] = tuple(SHAPES.values()), dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: Iterable[Tensor], step: int, scale: float = 1.0) -> None:
    """Gradients that depend on the step's number alone."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)


def run(
    optimizer: torch.optim.Optimizer, steps: int, start: int = 0, scheduler: Any = None, **step_arguments: Any
) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(start, start + steps):
        set_gradients(params, step)
        optimizer.step(**step_arguments)
        if scheduler is not None:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(1.0) if plateau else scheduler.step()


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of everything that an optimizer may change: parameters, then state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [value for param in params for value in optimizer.state.get(param, {}).values()]
    return [tensor.detach().clone() for tensor in (*params, *state)]


def assert_equal(first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
    """Equal to the bit, dtypes included; NaN equals NaN."""
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_close(first: Iterable[Tensor], second: Iterable[Tensor], tolerance: float) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
