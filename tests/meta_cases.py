"""Helpers for tests of meta-training: rules with one or two meta-parameters on parabolas with known gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_cases import trainer
from optimizer_cases import assert_equal
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_lopt as lopt
from lightning_lopt.meta.estimators import PES
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import StepContext, UpdateRule
from lightning_lopt.tasks import Start, Task

CURVATURES = (1.0, 0.3, 0.05)


class Velocity(NamedTuple):
    velocity: Tensor  # (*shape)


class Descent(UpdateRule):
    """SGD with momentum, whose learning rate and momentum are meta-parameters."""

    def __init__(self, log_lr: float = -2.0, momentum: float = 0.5, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(kind="test_descent")
        self.log_lr = nn.Parameter(torch.tensor(log_lr, dtype=dtype))
        self.momentum = nn.Parameter(torch.tensor(momentum, dtype=dtype))

    def init_state(self, param: Tensor) -> Velocity:
        return Velocity(torch.zeros_like(param))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Any]:
        velocity = meta_params["momentum"] * state.velocity + grad
        return -meta_params["log_lr"].exp() * velocity, Velocity(velocity)


class Nothing(NamedTuple):
    pass


class Jump(UpdateRule):
    """Sets every parameter to its only meta-parameter."""

    def __init__(self) -> None:
        super().__init__(kind="test_jump")
        self.where = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def init_state(self, param: Tensor) -> Nothing:
        return Nothing()

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Any]:
        return meta_params["where"] - param, state


class Spy(Jump):
    """Writes a field of the context into the parameter."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Any]:
        told = getattr(context, self.field)
        return (-1.0 if told is None else told) - param, state


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Parabola(Task):
    """0.5 sum h (x - xi)^2, or sum h x if `linear`, from x = `start`, with noise xi drawn at each step."""

    name: str = "parabola"
    start: float = 1.0
    noise: float = 0.0
    linear: bool = False
    random_start: bool = False
    dtype: torch.dtype = torch.float64

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        shape = (population, len(CURVATURES))
        x = torch.full(shape, self.start, dtype=self.dtype)
        if self.random_start:
            x = x * torch.randn(shape, generator=generator, dtype=self.dtype)
        return Start({"x": x}, {})

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Any:
        xi = torch.randn(population, len(CURVATURES), generator=generator, dtype=self.dtype)
        return {"xi": self.noise * xi}

    def loss(self, params: Any, batch: Any) -> Tensor:
        h = torch.tensor(CURVATURES, dtype=self.dtype)
        if self.linear:
            return (h * params["x"]).sum()
        return 0.5 * (h * (params["x"] - batch["xi"]).square()).sum()


def meta_params(rule: UpdateRule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in rule.named_parameters()}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def descent(task: Task | None = None, **options: Any) -> tuple[Unroll, dict[str, Tensor]]:
    """An unroll of SGD with momentum on the parabola, and its meta-parameters."""
    unroll = Unroll(Descent(), task or Parabola(), **{"objective": "raw", **options})
    return unroll, meta_params(unroll.rule)


def losses_by_hand(theta: Mapping[str, Tensor], num_steps: int, *, first_order: bool = False, cut: int = 0) -> Tensor:
    """(num_steps + 1,) losses of SGD with momentum on the noise-free parabola, written as a plain loop.

    Args:
        theta: log_lr and momentum, which may require gradients.
        num_steps: updates.
        first_order: treat the task's gradients as constants.
        cut: cut the graph every so many updates, as truncated backpropagation does.
    """
    h = torch.tensor(CURVATURES, dtype=torch.float64)
    x, velocity, losses = torch.ones_like(h), torch.zeros_like(h), []
    for step in range(num_steps + 1):
        losses.append(0.5 * (h * x * x).sum())
        if cut and step % cut == 0:
            x, velocity = x.detach(), velocity.detach()
        grad = h * (x.detach() if first_order else x)
        velocity = theta["momentum"] * velocity + grad
        x = x - theta["log_lr"].exp() * velocity
    return torch.stack(losses)


def gradient(function: Any, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of a scalar function of the meta-parameters, by autograd."""
    leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
    return dict(zip(leaves, torch.autograd.grad(function(leaves), list(leaves.values())), strict=True))


def star(**config: Any) -> UpdateRule:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return lopt.rules.make("star", **{"nominal_stepsize": 1e-2, "step_mult": 1e-4, **config})


def meta(rule: Any = None, *, kind: type[lopt.MetaTrainer] = lopt.MetaTrainer, **options: Any) -> lopt.MetaTrainer:
    """A small MetaTrainer: one parabola, four pairs, four steps per epoch."""
    defaults = {
        "tasks": [Parabola(noise=0.1)],
        "estimator": PES(num_pairs=4, truncation=3, horizon=Horizon(4, 9)),
        "steps_per_epoch": 4,
        "lr": 1e-2,
        "validation_horizon": 5,
        "validation_seeds": 2,
    }
    return kind(Descent() if rule is None else rule, **{**defaults, **options})


def fit(path: Path, module: lopt.MetaTrainer, *callbacks: Any, ckpt_path: Path | None = None, **more: Any) -> L.Trainer:
    """Meta-train for two epochs."""
    runner = trainer(path, *callbacks, **{"num_sanity_val_steps": 0, **more})
    runner.fit(module, ckpt_path=ckpt_path)
    return runner


def validate(path: Path, module: lopt.MetaTrainer) -> dict[str, Tensor]:
    runner = trainer(path)
    runner.validate(module, verbose=False)
    return dict(runner.callback_metrics)


TWO = {"strategy": "ddp_fork", "devices": 2}


class Report(Callback):
    """Saves the final state of each process."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        report = {
            "weights": meta_params(pl_module.rule),
            "optimizer": trainer.optimizers[0].state_dict()["state"],
            "states": tree_leaves(pl_module._states),
            "best": pl_module.best,
        }
        torch.save(report, self.path / f"rank{trainer.global_rank}.pt")


def run(path, folder, module, *, every=None, ranks=1, callbacks=(), **arguments):
    """Meta-train for four epochs with a checkpoint per epoch or every so many steps; return each process's report."""
    (path / folder).mkdir()
    saves = ModelCheckpoint(path, filename="{step}", save_top_k=-1, every_n_train_steps=every)
    report = Report(path / folder)
    runner = fit(path, module, saves, *callbacks, report, enable_checkpointing=True, max_epochs=4, **arguments)
    return [torch.load(path / folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)], runner


def assert_reports_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert a["best"] == b["best"]
        assert_equal(
            tree_leaves([a["weights"], a["optimizer"], a["states"]]),
            tree_leaves([b["weights"], b["optimizer"], b["states"]]),
        )
