"""Named sets of runs to compare optimizers on."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """A task and the length of a run on it."""

    task: str
    steps: int

    def __str__(self) -> str:
        return f"{self.task}@{self.steps}"


HELDOUT = (
    Case("iris-logreg", 500),
    Case("fashion14-sigmoid-mlp", 1_000),
    Case("fashion14-batch8-mlp", 2_000),
    Case("mnist14-deep-tanh-mlp", 1_000),
    Case("cifar16-deep-mlp", 1_500),
    Case("cifar16-layernorm-mlp", 1_000),
    Case("cifar16-mlp", 5_000),
    Case("fashion-autoencoder", 1_000),
    Case("cifar16-conv", 200),
    Case("cifar16-conv-batchnorm", 1_000),
    Case("cifar16-resnet", 600),
    Case("cifar16-vit", 500),
    Case("shakespeare-small-lstm", 500),
    Case("shakespeare-small-transformer", 500),
    Case("digits-mlp", 20_000),
)
"""Never to be used in meta-training, nor to choose a checkpoint: what a rule is judged by.

Fifteen tasks unlike those that rules are meta-trained on (small MLPs, conv nets and transformers on digits, 8 x 8 MNIST
and Fashion-MNIST, small tables, made-up data): other data or resolutions, eight-layer and six-layer nets, LayerNorm and
BatchNorm, residual connections, attention, recurrence, reconstruction, batches of 8, and runs of 200 to 20,000 steps.
`digits-mlp` alone is a task that rules see; what is held out there is the length, ten times the longest of a fit.
All of it with three seeds takes a learned rule about half an hour on one core.
"""

UNSEEN = tuple(case for case in HELDOUT if case.task != "digits-mlp")
"""Those of `HELDOUT` that no rule has seen at any length."""

SUITES = {"heldout": HELDOUT, "unseen": UNSEEN}
"""The sets by name."""
