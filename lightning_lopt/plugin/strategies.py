"""`Trainer(strategy="lopt")` and `"lopt_ddp"`: the learned optimizer as a strategy, for those who configure by name.

They add a `LearnedOptimizer` callback to the Trainer that runs them, and nothing else: one mechanism, one behavior.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, NoReturn

import torch
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry

from lightning_lopt.plugin.arguments import NumSteps, Selectors
from lightning_lopt.plugin.callback import LearnedOptimizer

# As Lightning names its DDP strategies: name -> how it starts processes. "popen" runs the script again, so that what a
# module keeps in Python survives the fit in the main process; notebooks cannot do that, and fork.
_DDP = {"lopt_ddp": "popen", "lopt_ddp_spawn": "spawn", "lopt_ddp_fork": "fork", "lopt_ddp_notebook": "fork"}


class _Learned:
    """Adds the callback to a strategy.

    Args:
        name_or_path: as for `LearnedOptimizer.from_pretrained`.
        lr: see `LearnedOptimizer`, as for all arguments up to `backend`.
        reference_lr: see `LearnedOptimizer`.
        weight_decay: see `LearnedOptimizer`.
        strength: see `LearnedOptimizer`.
        num_steps: see `LearnedOptimizer`.
        only: see `LearnedOptimizer`.
        skip: see `LearnedOptimizer`.
        average: see `LearnedOptimizer`.
        safeguard: see `LearnedOptimizer`.
        backend: see `LearnedOptimizer`.
        kwargs: arguments of the base strategy.
    """

    def __init__(
        self,
        name_or_path: str = "star",
        *,
        lr: str = "ignore",
        reference_lr: float | None = None,
        weight_decay: str = "rule",
        strength: float = 1.0,
        num_steps: NumSteps = "auto",
        only: Selectors | None = None,
        skip: Selectors | None = None,
        average: bool | Literal["rule"] = "rule",
        safeguard: bool | Literal["fallback"] = True,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._arguments: dict[str, Any] = {
            "name_or_path": name_or_path,
            "lr": lr,
            "reference_lr": reference_lr,
            "weight_decay": weight_decay,
            "strength": strength,
            "num_steps": num_steps,
            "only": only,
            "skip": skip,
            "average": average,
            "safeguard": safeguard,
            "backend": backend,
        }
        self._callback: LearnedOptimizer | None = None

    def connect(self, model: Any) -> None:
        """Take the module, and add the callback to its Trainer."""
        super().connect(model)  # type: ignore[misc]
        callbacks = model.trainer.callbacks
        if self._callback is None and any(isinstance(callback, LearnedOptimizer) for callback in callbacks):
            raise MisconfigurationException(
                "Use either the LearnedOptimizer callback or strategy='lopt', not both: drop one of them."
            )
        if self._callback is None:
            self._callback = LearnedOptimizer.from_pretrained(**self._arguments)
            callbacks.insert(0, self._callback)


class _OnOneDevice(_Learned):
    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """Always None. The Trainer sets it, and so gives a strategy that was made by name its device."""
        return None

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise MisconfigurationException(
                f"strategy='lopt' runs on one device, got {len(devices)}; use strategy='lopt_ddp'."
            )
        self._root_device = devices[0]


class LearnedSingleDevice(_OnOneDevice, SingleDeviceStrategy):
    """One device, trained by a learned optimizer: `Trainer(strategy="lopt")`."""

    strategy_name = "lopt"


class LearnedDDP(_Learned, DDPStrategy):
    """Distributed data parallel, trained by a learned optimizer: `Trainer(strategy="lopt_ddp")`."""

    strategy_name = "lopt_ddp"


def register() -> None:
    """Make the names known to the Trainers of `lightning` and `pytorch_lightning`; Fabric gets an error that helps."""
    _register(StrategyRegistry, LearnedSingleDevice, LearnedDDP)
    if (theirs := _pytorch_lightnings_strategies()) is not None:
        _register(
            theirs.StrategyRegistry,
            type("LearnedSingleDevice", (_OnOneDevice, theirs.SingleDeviceStrategy), {"strategy_name": "lopt"}),
            type("LearnedDDP", (_Learned, theirs.DDPStrategy), {"strategy_name": "lopt_ddp"}),
        )
    for name in ("lopt", *_DDP):
        STRATEGY_REGISTRY.register(name, _refuse_fabric, description="not for Fabric", override=True)


def _register(registry: Any, single_device: type, ddp: type) -> None:
    registry.register("lopt", single_device, description="learned optimizer, one device", override=True)
    for name, start_method in _DDP.items():
        description = f"learned optimizer, DDP with `start_method` '{start_method}'"
        registry.register(name, ddp, description=description, override=True, start_method=start_method)
        for flag in (False, True):
            registry.register(
                f"{name}_find_unused_parameters_{str(flag).lower()}",
                ddp,
                description=f"{description} and `find_unused_parameters` as {flag}",
                override=True,
                find_unused_parameters=flag,
                start_method=start_method,
            )


def _pytorch_lightnings_strategies() -> Any:
    """The module of `pytorch_lightning` that has its strategies; None where there is none that works."""
    try:
        return importlib.import_module("pytorch_lightning.strategies")
    except ImportError:  # not installed, or too old for this torch
        return None


def _refuse_fabric(**arguments: Any) -> NoReturn:
    raise MisconfigurationException(
        "strategy='lopt' is for a Trainer; with Fabric your code makes the optimizer. Use "
        "lightning_lopt.RuleOptimizer(model.parameters(), lightning_lopt.load_rule('star'), num_steps=...) and "
        "fabric.setup. In a Trainer, strategy='lopt' and the callback lightning_lopt.LearnedOptimizer do the same."
    )
