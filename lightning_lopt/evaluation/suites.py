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

UNSEEN2 = (
    Case("clouds-deepsets", 1_000),
    Case("graphs-messages", 800),
    Case("waves-dilated", 600),
    Case("additions-gru", 1_500),
    Case("brackets-encoder", 1_000),
    Case("relations-pairs", 1_000),
    Case("picture-fourier", 2_000),
    Case("spirals-radial", 1_000),
    Case("inverse-density", 1_500),
    Case("visits-factors", 1_000),
    Case("widening-quantiles", 1_000),
    Case("roll-diffusion", 2_000),
    Case("lessons-maxout", 1_500),
    Case("friedman-experts", 2_000),
    Case("boundary-value", 2_000),
    Case("mnist14-vae", 1_000),
    Case("fashion14-views", 300),
    Case("cifar16-separable", 400),
    Case("mnist14-mixer", 500),
    Case("shakespeare-gated-conv", 500),
)
"""A second held-out suite, written before the rules that it judges, to be looked at once.

Its kinds are in no fit, and differ from `HELDOUT`'s and the catalog's in data, networks and losses: sets, graphs,
signals, brackets, recurrence with gates, radial bases, Fourier features, factorization machines, mixtures of experts,
maxout, gated convolutions, an MLP mixer, depthwise convolutions; counts, quantiles, densities, soft labels, contrastive
and variational losses, diffusion, a differential equation. All have training, validation and test data.
"""

REAL = (
    Case("real-resnet20", 500, one_by_one=True),
    Case("real-vit", 500, one_by_one=True),
    Case("real-gpt-0.8m", 700, one_by_one=True),
    Case("real-gpt-3m", 300, one_by_one=True),
    Case("real-lstm", 500, one_by_one=True),
    Case("real-layernorm-mlp", 1_500, one_by_one=True),
    Case("real-autoencoder", 1_500, one_by_one=True),
    Case("real-denoiser", 400, one_by_one=True),
    Case("real-siren", 1_500, one_by_one=True),
    Case("real-factorization", 2_000, one_by_one=True),
    Case("real-bag-of-words", 400, one_by_one=True),
    Case("real-noisy-labels", 1_500, one_by_one=True),
    Case("real-finetune-conv", 300, one_by_one=True),
    Case("real-finetune-gpt", 300, one_by_one=True),
    Case("real-lora", 300, one_by_one=True),
    Case("real-gan", 2_000, one_by_one=True),
    Case("real-policy-gradient", 150, one_by_one=True),
)
"""Real kinds of work at real sizes: what a user would bring, as far as hours on a CPU allow.

A learned rule takes about a quarter of an hour of one core per seed for all of them; with all rivals and three seeds it
is about half a day. Results are cached one by one, so a run may be stopped and taken up again, and two processes may
share a cache: `real-open` in one and `real-judging` in the other, then `real` for the whole table.
"""

JUDGING_ONLY = frozenset(
    {
        "real-denoiser",
        "real-siren",
        "real-factorization",
        "real-bag-of-words",
        "real-finetune-conv",
        "real-finetune-gpt",
        "real-lora",
        "real-gan",
        "real-policy-gradient",
    }
)
"""The kinds of `REAL` that only judge: never fit a rule to them, nor to tasks of the same kind, nor choose by them.

The others are larger versions of kinds that `star` was fitted to: residual nets, ViTs, transformers, LSTMs, MLPs with
LayerNorm, autoencoders, wrong labels.
"""

REAL_JUDGING = tuple(case for case in REAL if case.task in JUDGING_ONLY)
REAL_OPEN = tuple(case for case in REAL if case.task not in JUDGING_ONLY)
"""The kinds of `REAL` that a fit may use."""

REAL_SUITES = ("real", "real-open", "real-judging")
"""Suites that are compared with the rivals unless others are named."""
SUITES = {
    "heldout": HELDOUT,
    "unseen": UNSEEN,
    "unseen2": UNSEEN2,
    "real": REAL,
    "real-open": REAL_OPEN,
    "real-judging": REAL_JUDGING,
}
"""Suites by name, for `lopt evaluate --suite`."""
