"""Optimizers that run as they are published: from torch and from their authors' packages, mostly untuned.

The settings are those of their sources, not ours. Schedule-Free AdamW, SOAP and Prodigy are in packages of the extra
`rivals`; torch has Muon from 2.9 on.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_lopt.evaluation.baselines import Hyperparameters, schedule_factor
from lightning_lopt.evaluation.one_by_one import Parameters
from lightning_lopt.evaluation.runs import Runs
from lightning_lopt.evaluation.tuning import SearchResult, Trial, best_by_measure
from lightning_lopt.tasks import Task

RECIPE_LR, RECIPE_DECAY, RECIPE_WARMUP = 1e-3, 1e-2, 0.05
ALGOPERF_DECAY, ALGOPERF_WARMUP = 0.0812, 0.02


class TorchStepper:
    """Torch optimizers that move the parameters of one run together, each under the same schedule.

    Args:
        params: the parameters of the run by name.
        optimizers: each moves some of the parameters, or flat views of them.
        views: parameter name -> what an optimizer moves in its place, of another shape and with the same memory.
        warmup: fraction of the run over which the learning rates rise linearly.
        schedule: "cosine" or "constant", see `baselines.schedule_factor`.
        steps: the run's length.
    """

    def __init__(
        self,
        params: Parameters,
        optimizers: list[Optimizer],
        steps: int,
        *,
        warmup: float = RECIPE_WARMUP,
        schedule: str = "cosine",
        views: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.moved = {**params, **(views or {})}
        self.optimizers = optimizers
        total = torch.tensor(steps, dtype=torch.float64)

        def factor(step: int) -> float:
            return float(schedule_factor(torch.tensor(step, dtype=torch.float64), total, warmup * total, schedule))

        self.schedulers = [LambdaLR(optimizer, factor) for optimizer in optimizers]

    def step(self, grads: Mapping[str, Tensor], loss: Tensor) -> None:
        """Take a step with every optimizer, then advance their schedules."""
        for name, param in self.moved.items():
            param.grad = grads[name].detach().reshape(param.shape)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()

    def evaluate(self, on: bool) -> None:
        """Swap the weights that train for those to evaluate, of optimizers with averaged weights, or back."""
        for optimizer in self.optimizers:
            swap = getattr(optimizer, "eval" if on else "train", None)
            if swap is not None:
                swap()


@dataclasses.dataclass(frozen=True)
class SmallGrid:
    """A small search over learning rate and weight decay, for runs that cost minutes.

    First the rates with the middle decay, further ones in half-decades until the best by validation loss is inside;
    then the other decays at the best rate.

    Example:
        >>> SmallGrid().rates, SmallGrid().decays
        ((0.0003, 0.001, 0.003, 0.01), (0.1, 0.01, 1.0))
    """

    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    decays: tuple[float, ...] = (0.1, 0.01, 1.0)
    """The first of them is that of the search for the rate."""
    limit: int = 6
    """The search gives up this many half-decades beyond `rates`."""

    def search(self, run: Callable[[Hyperparameters], Runs]) -> SearchResult:
        """Try the settings, each with `run`."""
        seen: dict[tuple[float, float], Trial] = {}

        def visit(rate: float, decay: float) -> None:
            setting = {"lr": rate, "weight_decay": decay}
            seen.setdefault((rate, decay), Trial(setting, run(setting)))

        def best_rate() -> float:
            return best_by_measure(seen)["valid"].hyperparameters["lr"]

        for rate in self.rates:
            visit(rate, self.decays[0])
        for _ in range(self.limit):
            rates = [rate for rate, _ in seen]
            if min(rates) < best_rate() < max(rates):
                break
            visit(_half_decade(best_rate(), up=best_rate() == max(rates)), self.decays[0])
        rate = best_rate()
        for decay in self.decays[1:]:
            visit(rate, decay)
        return SearchResult(best_by_measure(seen), len(seen))


def _half_decade(rate: float, *, up: bool) -> float:
    """The next of ..., 1e-3, 3e-3, 1e-2, ..."""
    power = round(2 * math.log10(rate)) + (1 if up else -1)
    return float(f"{3 if power % 2 else 1}e{power // 2}")


@dataclasses.dataclass(frozen=True)
class Rival:
    """An optimizer with its published setting, or with a small search for it.

    `make(params, task, steps, hyperparameters)` makes a run's optimizer.
    """

    label: str
    make: Callable[[Parameters, Task, int, Hyperparameters], TorchStepper]
    search: SmallGrid | None = None
    package: str | None = None
    """The package of the extra `rivals` that it needs."""
    version: int = 1
    """Raise it when a change here gives other numbers; it is part of the cache's keys."""

    def check(self) -> None:
        """Raise a ModuleNotFoundError that says what to install if the rival cannot run here."""
        if self.package is not None:
            _package(self.package)
        elif self.make is _muon:
            _muon_class()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ModuleNotFoundError(
            f"This baseline needs {name}, which is not installed: pip install 'lightning_lopt[rivals]'."
        ) from None


def _muon_class() -> Any:
    if not hasattr(torch.optim, "Muon"):
        raise ModuleNotFoundError(
            f"The baseline 'muon' needs torch.optim.Muon, from torch 2.9 on; this is torch {torch.__version__}."
        )
    return torch.optim.Muon


def _adamw(params: Parameters, task: Task, steps: int, hyper: Hyperparameters) -> TorchStepper:
    """AdamW with 5 % warm-up and cosine down to zero; untuned at lr 1e-3 and weight decay 0.01."""
    setting: dict[str, Any] = {"lr": RECIPE_LR, "weight_decay": RECIPE_DECAY, **hyper}
    return TorchStepper(params, [torch.optim.AdamW(params.values(), **setting)], steps)


def _default_adam(params: Parameters, task: Task, steps: int, hyper: Hyperparameters) -> TorchStepper:
    """Adam at its defaults, without a schedule."""
    adam = torch.optim.Adam(params.values(), lr=1e-3)
    return TorchStepper(params, [adam], steps, warmup=0.0, schedule="constant")


def _nadamw(params: Parameters, task: Task, steps: int, hyper: Hyperparameters) -> TorchStepper:
    """NAdamW at the point of AlgoPerf's self-tuning baseline (Dahl et al. 2023, arXiv 2306.07179)."""
    point: dict[str, Any] = {"lr": 1.749e-3, "betas": (0.9327, 0.9955), "weight_decay": ALGOPERF_DECAY}
    nadam = torch.optim.NAdam(params.values(), decoupled_weight_decay=True, **point)
    return TorchStepper(params, [nadam], steps, warmup=ALGOPERF_WARMUP)


def _schedule_free(params: Parameters, task: Task, steps: int, hyper: Hyperparameters) -> TorchStepper:
    """Schedule-Free AdamW (Defazio et al. 2024, arXiv 2405.15682) at the point that won AlgoPerf's self-tuning track.

    Its label smoothing of 0.2 is left out, since that changes the loss.
    """
    point: dict[str, Any] = {"lr": 2.5e-3, "betas": (0.9, 0.9955), "weight_decay": ALGOPERF_DECAY}
    warmup = round(ALGOPERF_WARMUP * steps)
    optimizer = _package("schedulefree").AdamWScheduleFree(params.values(), warmup_steps=warmup, **point)
    optimizer.train()
    return TorchStepper(params, [optimizer], steps, warmup=0.0, schedule="constant")


def _muon(params: Parameters, task: Task, steps: int, hyper: Hyperparameters) -> TorchStepper:
    """Muon (Jordan et al. 2024) for the hidden matrices, and AdamW's recipe for everything else.

    Muon's lr and decay are those of its author's example, 0.02 and 0.01, with torch's default scaling of a step by
    sqrt(max(1, rows / columns)), and 5 % warm-up and cosine. Kernels of convolutions are matrices out x (in h w).
    """
    hidden = {name: nn.Parameter(params[name].detach().flatten(1)) for name in task.hidden_matrices}
    rest = [param for name, param in params.items() if name not in hidden]
    optimizers: list[Optimizer] = []
    if hidden:
        optimizers.append(_muon_class()(hidden.values(), lr=0.02, weight_decay=RECIPE_DECAY))
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=RECIPE_LR, weight_decay=RECIPE_DECAY))
    return TorchStepper(params, optimizers, steps, views=hidden)


def _soap(params: Parameters, task: Task, steps: int, hyper: Hyperparameters) -> TorchStepper:
    """SOAP (Vyas et al. 2024, arXiv 2409.11321) at its defaults, with 5 % warm-up and cosine."""
    return TorchStepper(params, [_package("pytorch_optimizer").SOAP(params.values())], steps)


def _prodigy(params: Parameters, task: Task, steps: int, hyper: Hyperparameters) -> TorchStepper:
    """Prodigy (Mishchenko and Defazio 2023, arXiv 2306.06101) at its defaults, with its authors' cosine."""
    return TorchStepper(params, [_package("prodigyopt").Prodigy(params.values())], steps, warmup=0.0)


RIVALS = {
    "adamw-recipe": Rival("AdamW recipe", _adamw),
    "adamw-tuned": Rival("tuned AdamW", _adamw, SmallGrid()),
    "nadamw-algoperf": Rival("NAdamW (AlgoPerf)", _nadamw),
    "schedule-free": Rival("Schedule-Free AdamW", _schedule_free, package="schedulefree"),
    "muon": Rival("Muon", _muon),
    "soap": Rival("SOAP", _soap, package="pytorch_optimizer"),
    "prodigy": Rival("Prodigy", _prodigy, package="prodigyopt"),
}
"""The rivals by name."""
DEFAULT_ADAM_RIVAL = Rival("Adam 1e-3", _default_adam)
