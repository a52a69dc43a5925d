"""What is done to examples when they are drawn: augmentation, added noise, views.

A transform maps inputs (*lead, *example) and targets (*lead, *target) to new ones, with everything random from the
generator. Those with `evaluated` are part of the problem, and are applied to evaluation batches too.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Transform(Protocol):
    """The interface of transforms."""

    @property
    def evaluated(self) -> bool:
        """Whether evaluation batches are transformed too."""
        ...

    def __call__(self, generator: torch.Generator, x: Tensor, y: Tensor, lead: int) -> tuple[Tensor, Tensor]:
        """Return new inputs and targets; the first `lead` axes count examples."""
        ...


@dataclasses.dataclass(frozen=True)
class FlipCrop:
    """Random horizontal flips, and crops of the image padded with zeros: the usual augmentation on CIFAR-10."""

    pad: int = 4
    flip: bool = True
    evaluated = False

    def __call__(self, generator: torch.Generator, x: Tensor, y: Tensor, lead: int) -> tuple[Tensor, Tensor]:
        """Augment images (*lead, c, h, w)."""
        images = x.flatten(0, lead - 1)
        return shifted(generator, images, self.pad, self.flip).reshape(x.shape), y


@dataclasses.dataclass(frozen=True)
class AddNoise:
    """Gaussian noise of a standard deviation on the inputs; the target is the clean input."""

    std: float = 0.5
    evaluated = True

    def __call__(self, generator: torch.Generator, x: Tensor, y: Tensor, lead: int) -> tuple[Tensor, Tensor]:
        """Return the noisy and the clean inputs."""
        return x + self.std * _normal(generator, x), x


@dataclasses.dataclass(frozen=True)
class NoiseLevels:
    """Noise of a log-uniform standard deviation on points; the target is the noise, as in diffusion models.

    Inputs (*lead, d) become (*lead, d + 1), with the logarithm of the level last.
    """

    low: float = 0.03
    high: float = 3.0
    evaluated = True

    def __call__(self, generator: torch.Generator, x: Tensor, y: Tensor, lead: int) -> tuple[Tensor, Tensor]:
        """Return the noisy points, scaled to about unit size, with their levels, and the noise."""
        unit = torch.rand(x.shape[:lead], generator=generator, device=generator.device).to(x)
        level = self.low * (self.high / self.low) ** unit.unsqueeze(-1)
        noise = _normal(generator, x)
        return torch.cat([(x + level * noise) / (1 + level.square()).sqrt(), level.log()], -1), noise


@dataclasses.dataclass(frozen=True)
class Code:
    """The noise of a variational autoencoder's code, appended to the flattened inputs; the target is the input."""

    latent: int = 8
    evaluated = True

    def __call__(self, generator: torch.Generator, x: Tensor, y: Tensor, lead: int) -> tuple[Tensor, Tensor]:
        """Return inputs (*lead, pixels + latent), and the inputs."""
        flat = x.flatten(lead)
        noise = torch.randn(*x.shape[:lead], self.latent, generator=generator, device=generator.device).to(x)
        return torch.cat([flat, noise], -1), x


@dataclasses.dataclass(frozen=True)
class Views:
    """Two views of each image, each shifted and with noise of its own: (*lead, c, h, w) -> (*lead, 2, c, h, w)."""

    pad: int = 2
    std: float = 0.1
    evaluated = True

    def __call__(self, generator: torch.Generator, x: Tensor, y: Tensor, lead: int) -> tuple[Tensor, Tensor]:
        """Return the views; targets stay."""
        twice = torch.stack([x, x], lead)
        views = shifted(generator, twice.flatten(0, lead), self.pad, flip=True).reshape(twice.shape)
        return views + self.std * _normal(generator, views), y


def shifted(generator: torch.Generator, images: Tensor, pad: int, flip: bool) -> Tensor:
    """Shift each image (n, c, h, w) by up to `pad` pixels in both directions, and flip every other at random.

    Example:
        >>> shifted(torch.Generator().manual_seed(0), torch.ones(2, 1, 4, 4), pad=1, flip=True).shape
        torch.Size([2, 1, 4, 4])
    """
    num, _, height, width = images.shape
    offsets = torch.randint(2 * pad + 1, (2, num), generator=generator, device=generator.device).to(images.device)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)  # (n, h)
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)
    if flip:
        turned = torch.rand(num, generator=generator, device=generator.device).to(images.device) < 0.5
        columns = torch.where(turned[:, None], columns.flip(1), columns)
    padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1)
    picked = padded[torch.arange(num, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def _normal(generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)
