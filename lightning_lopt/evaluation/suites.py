"""Named sets of tasks and run lengths on which optimizers are compared."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """A task and the length of a run on it."""

    task: str
    steps: int
    one_by_one: bool = False
    """Train the seeds one by one with `RuleOptimizer` and torch's optimizers, as is faster for large networks."""

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
"""The held-out cases that judge a rule. Never use them for meta-training, nor to choose a checkpoint.

They differ from the tasks of meta-training (small MLPs, conv nets and transformers on digits, 8 x 8 MNIST and
Fashion-MNIST, small tables, synthetic data) in data or resolution and in architecture: six and eight layers, LayerNorm
and BatchNorm, residual connections, attention, recurrence, reconstruction, batches of 8, and runs of 200 to 20,000
steps. `digits-mlp` is the one task that rules do see; its length is held out, ten times the longest of meta-training.
With three seeds, a learned rule takes about half an hour for all of them on one core.
"""

UNSEEN = tuple(case for case in HELDOUT if case.task != "digits-mlp")
"""The cases of `HELDOUT` whose tasks no rule has seen at any length."""

REAL_SUITES = ("real", "real-open", "real-judging")
SUITES = {"heldout": HELDOUT, "unseen": UNSEEN}
"""Suites by name, for `lopt evaluate --suite`."""
