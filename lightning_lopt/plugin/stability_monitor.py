"""StabilityMonitor: the leading eigenvalue of a training run as it goes, and a warning before it diverges.

Dynamic Mode Decomposition (DMD) of the parameters' trajectory, as in `rules.dmd`: if a step of theta is about A times
the two steps before it (an optimizer with momentum answers to both), the largest |eigenvalue| of A says how fast steps
grow. Well below 1 the run settles, near 1 it moves on steadily, above 1 for long it runs away. Parameters are sketched
first (random signed sums of them, Charikar et al. 2002), so that a snapshot is a few numbers whatever the model's size.
Minibatch noise makes eigenvalues of increments smaller than they are without it: in practice this is a lower bound.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_lopt.rules import dmd

_BLOCK = 1 << 20  # parameters sketched at a time: bounds the temporary memory, and fits a cache


class StabilityMonitor(L.Callback):
    """Logs `lopt/spectral_radius`, the largest |eigenvalue| of the training dynamics, and warns before divergence.

    Works with any optimizer. Under FSDP each process watches its own shard.

    What it costs: an estimate looks at the last `window + 1` steps, and each of these reads all parameters once, sums
    them on their device and copies `sketch_size` numbers to the host, which waits for the device. So with the default
    `every_n_steps=1` every step pays; with `every_n_steps=1000` and `window=20` only 21 steps in 1000 do, and the
    others cost nothing. It keeps one byte per trainable parameter on its device, needs some 8 MB there while it sums,
    and keeps `(window + 1) * sketch_size` numbers on the host.

    Args:
        rank: eigenvalues that are looked for. With 1 an oscillation, whose eigenvalues come in pairs, goes unseen.
        window: steps that an estimate looks back on.
        every_n_steps: how often to estimate, in steps since the start of the fit.
        sketch_size: numbers kept of all parameters at a step.
        threshold: the radius above which steps grow.
        patience: estimates above the threshold, one after the other, that make a warning.

    Raises:
        ValueError: for values that are not allowed.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[StabilityMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        *,
        rank: int = 2,
        window: int = 20,
        every_n_steps: int = 1,
        sketch_size: int = 256,
        threshold: float = 1.02,
        patience: int = 5,
    ) -> None:
        for name, value, least in (
            ("rank", rank, 1),
            ("window", window, rank + 3),
            ("every_n_steps", every_n_steps, 1),
            ("sketch_size", sketch_size, window),
            ("patience", patience, 1),
        ):
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r} is not allowed: it must be an integer of at least {least}.")
        if not threshold >= 1 or math.isinf(threshold):
            raise ValueError(f"threshold={threshold!r} is not allowed: it must be a number of at least 1.")
        self.rank = rank
        self.window = window
        self.every_n_steps = every_n_steps
        self.sketch_size = sketch_size
        self.threshold = threshold
        self.patience = patience
        self.spectral_radius = math.nan
        self._snapshots: list[Tensor] = []  # of successive steps, the newest last
        self._signs: list[Tensor] = []  # of each parameter
        self._steps = 0  # since the start of the fit
        self._last_global_step = -1
        self._above = 0  # estimates above the threshold, one after the other
        self._warned = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier run, and take the first snapshot."""
        self._snapshots = []
        self._signs = []
        self._steps = 0
        self._above = 0
        self._warned = False
        self._last_global_step = trainer.global_step
        self._snap(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot where an estimate needs one; estimate, log, warn."""
        if trainer.global_step == self._last_global_step:  # accumulation: nothing has moved
            return
        # Counted here: Lightning's global step counts the steps of all optimizers.
        self._last_global_step = trainer.global_step
        self._steps += 1
        self._snap(pl_module)
        if len(self._snapshots) <= self.window or self._steps % self.every_n_steps:
            return
        self.spectral_radius = radius(torch.stack(self._snapshots, 1), self.rank)
        pl_module.log("lopt/spectral_radius", self.spectral_radius)
        self._check_growth(trainer.global_step)

    def _snap(self, pl_module: L.LightningModule) -> None:
        """Add a snapshot if the next estimate looks at this step, and drop those that none will look at again."""
        if -self._steps % self.every_n_steps > self.window:
            self._snapshots = []
            return
        snapshot = self._sketch([param for param in pl_module.parameters() if param.requires_grad])
        self._snapshots = [*self._snapshots, snapshot][-self.window - 1 :]

    @torch.no_grad()
    def _sketch(self, params: list[torch.nn.Parameter]) -> Tensor:
        """(sketch_size,) CountSketch of all parameters, in float64, because differences of snapshots are small.

        Coordinate i of them all, counted through, is added with a random sign to number i mod sketch_size.
        """
        values = [_local(param).detach().reshape(-1) for param in params]
        if [len(signs) for signs in self._signs] != [len(value) for value in values]:
            self._signs = _random_signs(values)
        total = torch.zeros(self.sketch_size, dtype=torch.float64, device=values[0].device if values else "cpu")
        start = 0
        block = max(_BLOCK // self.sketch_size, 1) * self.sketch_size
        for value, signs in zip(values, self._signs, strict=True):
            sums = torch.zeros(self.sketch_size, dtype=torch.float64, device=value.device)
            for numbers, their_signs in zip(torch.split(value, block), torch.split(signs, block), strict=True):
                signed = numbers.to(torch.float32) * their_signs
                rest = len(signed) % self.sketch_size
                sums += signed[: len(signed) - rest].view(-1, self.sketch_size).sum(0, dtype=torch.float64)
                sums[:rest] += signed[len(signed) - rest :]
            total += sums.to(total.device).roll(start)
            start += len(value)
        return total.cpu()

    def _check_growth(self, step: int) -> None:
        growing = not self.spectral_radius <= self.threshold  # NaN, from non-finite snapshots, counts as growing
        self._above = self._above + 1 if growing else 0
        if self._above >= self.patience and not self._warned:
            self._warned = True
            doubling = math.log(2) / math.log(self.spectral_radius) if self.spectral_radius > 1 else 0.0
            rank_zero_warn(
                f"lopt/spectral_radius has been above {self.threshold} for {self._above} estimates and is "
                f"{self.spectral_radius:.3f} at step {step}: steps double every {doubling:.0f} steps, and training is "
                "about to diverge. Lower the learning rate, clip gradients, or go back to an earlier checkpoint."
            )


def radius(snapshots: Tensor, rank: int) -> float:
    """The largest |eigenvalue| of the linear map that best continues the increments of snapshots, two by two.

    Args:
        snapshots: (k, window + 1), columns oldest first.
        rank: directions in which the map is looked for, at most window - 2.

    Returns:
        NaN if a snapshot is not finite, 0 if nothing moves.

    Example:
        >>> import torch
        >>> steps = torch.arange(8.0, dtype=torch.float64)
        >>> round(radius(torch.stack([1.1**steps, 0.5**steps, steps * 0]), 2), 6)
        1.1
    """
    if not bool(snapshots.isfinite().all()):
        return math.nan
    increments = snapshots.diff(dim=1)
    scale = float(increments.abs().max())
    if scale == 0:
        return 0.0
    # A direction in which momentum swings is one row here, and has two eigenvalues: it takes two successive steps.
    pairs = torch.cat([increments[:, 1:], increments[:, :-1]]) / scale
    return float(dmd.eigenvalues(pairs, rank).abs().max())


def _random_signs(values: list[Tensor]) -> list[Tensor]:
    """int8 +-1 for each number of each tensor, the same in every run; torch's global random state is not touched."""
    generators = {device: torch.Generator(device).manual_seed(0) for device in {value.device for value in values}}
    return [
        torch.empty(len(value), dtype=torch.int8, device=value.device)
        .random_(0, 2, generator=generators[value.device])
        .mul_(2)
        .sub_(1)
        for value in values
    ]


def _local(param: Tensor) -> Tensor:
    """A sharded parameter's part on this process."""
    local: Tensor = param.to_local() if hasattr(param, "to_local") else param
    return local
