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


class StabilityMonitor(L.Callback):
    """Logs `lopt/spectral_radius`, the largest |eigenvalue| of the training dynamics, and warns before divergence.

    Works with any optimizer. Costs a pass over the parameters every `every_n_steps` steps, and little memory: `rank`,
    `window` and `sketch_size` numbers a snapshot. Under FSDP each process watches its own shard.

    Args:
        rank: eigenvalues that are looked for. With 1 an oscillation, whose eigenvalues come in pairs, goes unseen.
        window: steps that an estimate looks back on.
        every_n_steps: how often to estimate.
        sketch_size: numbers kept of all parameters at a step.
        threshold: the radius above which steps grow.
        patience: estimates above the threshold, one after the other, that make a warning.

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
        self.rank, self.window, self.every_n_steps = rank, window, every_n_steps
        self.sketch_size, self.threshold, self.patience = sketch_size, threshold, patience
        self.spectral_radius = math.nan
        self._snapshots: list[Tensor] = []
        self._buckets: list[tuple[Tensor, Tensor]] = []
        self._last_step, self._above, self._warned = -1, 0, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier run, and take the first snapshot."""
        self._snapshots, self._buckets = [], []
        self._above, self._warned = 0, False
        self._snap(trainer.global_step, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot where an optimizer has stepped; estimate, log, warn."""
        if trainer.global_step == self._last_step:  # accumulation: nothing has moved
            return
        self._snap(trainer.global_step, pl_module)
        if len(self._snapshots) <= self.window or trainer.global_step % self.every_n_steps:
            return
        self.spectral_radius = radius(torch.stack(self._snapshots, 1), self.rank)
        pl_module.log("lopt/spectral_radius", self.spectral_radius)
        self._watch(trainer.global_step)

    def _snap(self, step: int, pl_module: L.LightningModule) -> None:
        self._last_step = step
        sketch = self._sketch([param for param in pl_module.parameters() if param.requires_grad])
        self._snapshots = [*self._snapshots, sketch][-self.window - 1 :]

    @torch.no_grad()
    def _sketch(self, params: list[torch.nn.Parameter]) -> Tensor:
        """(sketch_size,) CountSketch of all parameters, in float64: differences of snapshots are small."""
        if not self._buckets:
            generator = torch.Generator().manual_seed(0)
            for param in params:
                bucket = torch.randint(self.sketch_size, (_local(param).numel(),), generator=generator)
                sign = torch.randint(2, (len(bucket),), generator=generator, dtype=torch.int8) * 2 - 1
                self._buckets.append((bucket.to(param.device), sign.to(param.device)))
        total = torch.zeros(self.sketch_size, dtype=torch.float64)
        for param, (bucket, sign) in zip(params, self._buckets, strict=True):
            values = _local(param).detach().reshape(-1).to(torch.float32) * sign
            sums = torch.zeros(self.sketch_size, dtype=torch.float64, device=bucket.device)
            total += sums.index_add_(0, bucket, values.double()).cpu()
        return total

    def _watch(self, step: int) -> None:
        growing = not self.spectral_radius <= self.threshold  # NaN, of what is not finite, counts as growing
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


def _local(param: Tensor) -> Tensor:
    """A sharded parameter's part on this process."""
    local: Tensor = param.to_local() if hasattr(param, "to_local") else param
    return local
