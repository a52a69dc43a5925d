"""Objectives: losses of a network's outputs on a batch, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Batch(NamedTuple):
    """A minibatch."""

    x: Tensor  # (b, *example)
    y: Tensor  # (b, *target)
    masks: tuple[Tensor, ...] = ()  # dropout masks, of the shapes that `Network.mask_shapes` returns


def cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the softmax cross entropy of outputs (b, ..., classes), as a mean over examples and positions.

    Example:
        >>> cross_entropy(torch.zeros(2, 10), Batch(torch.zeros(2), torch.tensor([3, 4])))
        tensor(2.3026)
    """
    # For few classes on the CPU, this is several times faster than log_softmax.
    return (outputs.logsumexp(-1) - outputs.gather(-1, batch.y.unsqueeze(-1)).squeeze(-1)).mean()


def sigmoid_cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the cross entropy of normalized sigmoid outputs, as Keras does for a sigmoid layer (the LSTM thesis)."""
    return cross_entropy(F.logsigmoid(outputs), batch)


def mse(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the mean squared difference of outputs (b, classes) and one-hot classes, over examples and classes."""
    classes = torch.arange(outputs.shape[-1], device=outputs.device)
    return (outputs - (batch.y.unsqueeze(-1) == classes).to(outputs.dtype)).square().mean()


def regression(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the mean squared error of outputs (b, 1) and targets (b,)."""
    return (outputs.squeeze(-1) - batch.y).square().mean()


def reconstruction(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the mean squared difference of the sigmoid of the outputs (b, pixels) and the inputs."""
    return (torch.sigmoid(outputs) - batch.x.flatten(1)).square().mean()


def logistic(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the binary cross entropy of outputs (b, 1) and targets (b,) that are 0 or 1."""
    logits = outputs.squeeze(-1)
    return (F.softplus(logits) - batch.y * logits).mean()


def vector_regression(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the mean squared error of outputs (b, ...) and targets of as many numbers."""
    return (outputs.flatten(1) - batch.y.flatten(1)).square().mean()


def soft_cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the cross entropy of outputs (b, classes) relative to probabilities (b, classes), as in distillation."""
    return -(batch.y * outputs.log_softmax(-1)).sum(-1).mean()


def poisson(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the negative log likelihood of counts (b,) under Poisson rates exp(outputs (b, 1))."""
    logs = outputs.squeeze(-1)
    return (logs.exp() - batch.y * logs + torch.lgamma(batch.y + 1)).mean()


def quantiles(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the pinball loss of outputs (b, k) as the k equally spaced quantiles of targets (b,)."""
    num = outputs.shape[-1]
    levels = (torch.arange(num, device=outputs.device, dtype=outputs.dtype) + 1) / (num + 1)
    over = batch.y.unsqueeze(-1) - outputs
    return torch.maximum(levels * over, (levels - 1) * over).mean()


def mixture_density(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the negative log likelihood of targets (b,) under a mixture of Gaussians.

    Outputs (b, 3 k) are the logits, means and log standard deviations of k components (Bishop 1994).
    """
    logits, means, logs = outputs.chunk(3, -1)
    squares = ((batch.y.unsqueeze(-1) - means) * (-logs).exp()).square()
    densities = logits.log_softmax(-1) - 0.5 * squares - logs - 0.5 * math.log(2 * math.pi)
    return -densities.logsumexp(-1).mean()


def contrastive(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute the InfoNCE loss of two views of each example, embedded as outputs (b, 2, d), at temperature 0.2.

    Each view must find the other among the b of the batch (van den Oord et al. 2018, arXiv 1807.03748).
    """
    first, second = F.normalize(outputs, dim=-1).unbind(1)
    similarities = first @ second.T / 0.2
    both = similarities.log_softmax(-1).diagonal() + similarities.T.log_softmax(-1).diagonal()
    return -0.5 * both.mean()


def evidence(outputs: Tensor, batch: Batch) -> Tensor:
    """Compute a variational autoencoder's negative evidence lower bound per pixel (Kingma & Welling 2014).

    Outputs (b, pixels + 2 latent) are the logits of pixels in [0, 1], and the means and log variances of the code.
    """
    pixels = batch.y.flatten(1)
    logits, code = outputs[:, : pixels.shape[1]], outputs[:, pixels.shape[1] :]
    means, logs = code.chunk(2, -1)
    bits = (F.softplus(logits) - pixels * logits).sum(-1)
    divergence = 0.5 * (means.square() + logs.exp() - 1 - logs).sum(-1)
    return (bits + divergence).mean() / pixels.shape[1]


OBJECTIVES: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    function.__name__: function
    for function in (
        cross_entropy,
        sigmoid_cross_entropy,
        mse,
        regression,
        reconstruction,
        logistic,
        vector_regression,
        soft_cross_entropy,
        poisson,
        quantiles,
        mixture_density,
        contrastive,
        evidence,
    )
}
CLASSIFICATION = ("cross_entropy", "sigmoid_cross_entropy", "mse")
"""The objectives with classes as targets."""
