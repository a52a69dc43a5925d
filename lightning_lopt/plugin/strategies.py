"""`Trainer(strategy="lopt")` and `"lopt_ddp"`: the learned optimizer as a strategy, for those who configure by name.

They add a `LearnedOptimizer` callback to the Trainer that runs them, and nothing else: one seam, one behavior.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry

from lightning_lopt.plugin.callback import LearnedOptimizer


class _Learned:
    """What the two strategies share.

    Args:
        name_or_path: as for `LearnedOptimizer.from_pretrained`.
        lr: see `LearnedOptimizer`.
        weight_decay: see `LearnedOptimizer`.
        safeguard: see `LearnedOptimizer`.
        kwargs: arguments of the base strategy.
    """

    def __init__(
        self,
        name_or_path: str = "star",
        *,
        lr: str = "ignore",
        weight_decay: str = "ignore",
        safeguard: bool | Literal["fallback"] = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._arguments: dict[str, Any] = {
            "name_or_path": name_or_path,
            "lr": lr,
            "weight_decay": weight_decay,
            "safeguard": safeguard,
        }
        self._callback: LearnedOptimizer | None = None

    def connect(self, model: Any) -> None:
        """Take the module, and add the callback to its Trainer."""
        super().connect(model)  # type: ignore[misc]
        callbacks = model.trainer.callbacks
        if self._callback is None and any(isinstance(callback, LearnedOptimizer) for callback in callbacks):
            raise MisconfigurationException(
                "A LearnedOptimizer callback and strategy='lopt' are one too many; drop the callback or the strategy."
            )
        if self._callback is None:
            self._callback = LearnedOptimizer.from_pretrained(**self._arguments)
            callbacks.insert(0, self._callback)


class LearnedSingleDevice(_Learned, SingleDeviceStrategy):
    """One device, trained by a learned optimizer: `Trainer(strategy="lopt")`."""

    strategy_name = "lopt"

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


class LearnedDDP(_Learned, DDPStrategy):
    """Distributed data parallel, trained by a learned optimizer: `Trainer(strategy="lopt_ddp")`."""

    strategy_name = "lopt_ddp"

    def _configure_launcher(self) -> None:
        # By name it forks, which works in scripts, tests and notebooks; under torchrun or SLURM the processes exist.
        if self.cluster_environment is not None and self.cluster_environment.creates_processes_externally:
            self._start_method = "popen"
        super()._configure_launcher()


def register() -> None:
    """Make "lopt" and "lopt_ddp" known to `Trainer(strategy=...)`."""
    StrategyRegistry.register("lopt", LearnedSingleDevice, description="learned optimizer, one device", override=True)
    StrategyRegistry.register(
        "lopt_ddp", LearnedDDP, description="learned optimizer, DDP", override=True, start_method="fork"
    )
