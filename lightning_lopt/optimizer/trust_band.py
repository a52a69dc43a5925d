"""The trust band of safeguard="fallback": when the nominal term takes over from a rule, and when the rule returns.

A learned rule can fail with finite numbers. Its nominal term alone, a hand-designed optimizer, then continues until the
loss has recovered. (Other safeguarded learned optimizers, Heaton et al. 2023, arXiv 2003.01880, and Premont-Schwarz et
al. 2022, arXiv 2201.12426, use other tests.) The band does not depend on the scale of the loss:

    smooth <- smooth + (loss - smooth) / 10               the smoothed loss
    noise  <- noise + (|loss - smooth| - noise) / 10      the distance of losses from it; updated inside the band only
    bound  =  best + (start - best) / 10 + 6 noise        best: the lowest smoothed loss; start: the first loss

A loss above `bound`, or one that is not finite, is outside: more than a tenth of the progress is lost, beyond noise.
After `PATIENCE` losses in a row outside, the nominal term takes over; after as many in a row inside, the rule returns.
The first `PATIENCE` losses only set up the band, so a handover comes at step 2 `PATIENCE` at the earliest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PATIENCE = 10
RATE = 0.1
NOISE_WIDTH = 6.0
LOST_SHARE = 0.1


class TrustBand(NamedTuple):
    """Statistics of the losses; () each."""

    seen: Tensor  # number of losses
    start: Tensor
    smooth: Tensor
    best: Tensor
    noise: Tensor
    outside: Tensor  # losses in a row outside the band
    inside: Tensor  # losses in a row inside
    fallback: Tensor  # 1 while the nominal term runs alone, else 0
    handovers: Tensor  # to the nominal term, since the start

    @classmethod
    def new(cls) -> TrustBand:
        """The band before the first loss."""
        return cls(*torch.zeros(len(cls._fields), dtype=torch.float32, device="cpu"))

    @classmethod
    def unpacked(cls, packed: Tensor) -> TrustBand:
        """The inverse of `packed`."""
        return cls(*packed.to(torch.float32))

    def packed(self) -> Tensor:
        """All of it as one tensor, to be saved as state."""
        return torch.stack(self)

    def observe(self, loss: Tensor) -> TrustBand:
        """The band after a step's loss, before the step is taken; without device synchronization.

        Example:
            >>> trust = TrustBand.new()
            >>> for loss in [1.0] * 20 + [50.0] * 10:
            ...     trust = trust.observe(torch.tensor(loss))
            >>> int(trust.fallback), int(trust.handovers)
            (1, 1)
        """
        loss = loss.to(torch.float32)
        seen, start, smooth, best, noise, outside, inside, fallback, handovers = (t.to(loss.device) for t in self)
        first, finite, learning = seen == 0, loss.isfinite(), seen < PATIENCE
        # A rounding error must not end trust where the loss does not move at all.
        bound = best + LOST_SHARE * (start - best) + NOISE_WIDTH * noise + 1e-6 * best.abs()
        is_inside = finite & (learning | (loss <= bound))
        start = torch.where(first & finite, loss, start)
        best = torch.where(first, start, best)
        smooth = torch.where(first, start, smooth)
        smooth = torch.where(is_inside, smooth + RATE * (loss - smooth), smooth)
        noise = torch.where(is_inside, noise + RATE * ((loss - smooth).abs() - noise), noise)
        outside, inside = (outside + 1) * ~is_inside, (inside + 1) * is_inside
        leaves, returns = outside >= PATIENCE, inside >= PATIENCE
        handovers = handovers + (leaves & (fallback == 0))
        fallback = torch.where(leaves, 1.0, torch.where(returns, 0.0, fallback))
        return TrustBand(
            seen + finite, start, smooth, torch.minimum(best, smooth), noise, outside, inside, fallback, handovers
        )
