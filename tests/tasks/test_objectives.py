"""Objectives against torch's own losses and distributions."""

import math

import torch
import torch.nn.functional as F
from torch import distributions

from lightning_lopt.tasks import objectives
from lightning_lopt.tasks.objectives import Batch


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_vectors_and_soft_labels():
    outputs, targets = torch.randn(5, 2, 3), torch.randn(5, 6)
    close(objectives.vector_regression(outputs, Batch(outputs, targets)), F.mse_loss(outputs.flatten(1), targets))
    logits, soft = torch.randn(5, 4), torch.randn(5, 4).softmax(-1)
    close(objectives.soft_cross_entropy(logits, Batch(logits, soft)), F.cross_entropy(logits, soft))


def test_counts():
    logs, counts = torch.randn(7, 1), torch.tensor([0.0, 1, 2, 3, 10, 4, 0])
    expected = -distributions.Poisson(logs.squeeze(1).exp()).log_prob(counts).mean()
    close(objectives.poisson(logs, Batch(logs, counts)), expected)


def test_quantiles_are_what_the_pinball_loss_finds():
    y = torch.randn(4001, dtype=torch.float64)
    guess = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([guess], lr=0.05)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        optimizer.zero_grad()
        objectives.quantiles(guess.expand(len(y), 3), Batch(y, y)).backward()
        optimizer.step()
    torch.testing.assert_close(guess.detach(), y.quantile(torch.tensor([0.25, 0.5, 0.75]).double()), atol=0.02, rtol=0)


def test_a_mixture_of_gaussians():
    outputs, y = torch.randn(6, 12), torch.randn(6)
    logits, means, logs = outputs.chunk(3, -1)
    parts = distributions.Normal(means, logs.exp())
    mixture = distributions.MixtureSameFamily(distributions.Categorical(logits=logits), parts)
    close(objectives.mixture_density(outputs, Batch(y, y)), -mixture.log_prob(y).mean())


def test_views_find_each_other():
    outputs = torch.randn(6, 2, 5)
    a, b = F.normalize(outputs[:, 0], dim=-1), F.normalize(outputs[:, 1], dim=-1)
    labels = torch.arange(6)
    expected = 0.5 * (F.cross_entropy(a @ b.T / 0.2, labels) + F.cross_entropy(b @ a.T / 0.2, labels))
    close(objectives.contrastive(outputs, Batch(outputs, labels)), expected)
    same = torch.ones(6, 2, 5)
    close(objectives.contrastive(same, Batch(same, labels)), torch.tensor(math.log(6)))


def test_the_evidence_lower_bound():
    outputs, pixels = torch.randn(5, 10), torch.rand(5, 1, 2, 3)
    logits, means, logs = outputs[:, :6], outputs[:, 6:8], outputs[:, 8:]
    prior = distributions.Normal(torch.zeros(2), torch.ones(2))
    divergence = distributions.kl_divergence(distributions.Normal(means, (0.5 * logs).exp()), prior).sum(-1).mean()
    bits = F.binary_cross_entropy_with_logits(logits, pixels.flatten(1), reduction="none").sum(-1).mean()
    close(objectives.evidence(outputs, Batch(outputs, pixels)), (bits + divergence) / 6)
