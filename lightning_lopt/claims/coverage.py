"""The figures and tables of the papers: which claims measure them, and what was not run, with its cost.

The page of evidence is made from this list. A claim that belongs to no figure or table stands in a line of its own.
"""

from __future__ import annotations

from typing import NamedTuple


class Item(NamedTuple):
    """A figure or a table of a paper, or a result in its text."""

    label: str
    what: str
    """What it shows."""
    claims: tuple[str, ...] = ()
    """The ids of the claims that measure it, at whatever size."""
    missing: str = ""
    """What of it no claim measures, why, and what it would cost."""


class Paper(NamedTuple):
    """A paper with its figures and tables, in order."""

    title: str
    items: tuple[Item, ...]


def _nets(key: str, *nets: str) -> tuple[str, ...]:
    return tuple(f"star-{key}-{net}" for net in nets)


_FULL_STAR = "at the paper's size (118,282 parameters, 50,000 meta-steps): 23 core hours a run"
STAR = Paper(
    "STAR: stable learned optimizers (Harrison et al. 2022, arXiv 2209.11208)",
    (
        Item("Theorem 1", "bounds that make the dynamics stable", ("nqm-theorem-1",)),
        Item("Lemmas 2, 3", "the preconditioner; robustness to disturbances", ("nqm-lemmas",)),
        Item("Figure 1", "what the three interventions do to eigenvalues", ("nqm-figure-1",)),
        Item("Figure 2a", "variance of meta-gradients by nominal term and horizon", ("nqm-figure-2a",)),
        Item("Figure 2b", "eigenvalues in meta-training", ("nqm-figure-2b",)),
        Item("Figure 2c", "meta-loss for five nominal terms", ("nqm-figure-2c",)),
        Item("section 4.1", "gradients through unstable runs", ("estimators-variance",)),
        Item(
            "Figure 3 a, c",
            "MLP on Fashion-MNIST: meta-training, and runs beyond the horizon",
            _nets("fig3", "mlp", "fashion"),
            f"{_FULL_STAR}, 270 for four variants and three seeds",
        ),
        Item(
            "Figure 3 b, d",
            "conv net on CIFAR-10",
            _nets("fig3", "conv"),
            "at the paper's size (32-64-64): some 100 core hours a run, 1,200 for all; a GPU's work",
        ),
        Item(
            "Figure 4",
            "four unseen tasks: MLP with LayerNorm, residual net, LSTM, transformer",
            ("star-fig4",),
            "with the paper's meta-trained rule (23 core hours a run) on nets of its sizes: LM1B and ImageNet are not "
            "available, a transformer of 5 x 256 takes some 50 core hours a run",
        ),
        Item("Figure App.1", "single meta-seeds", _nets("app1", "mlp", "conv", "fashion"), f"{_FULL_STAR}"),
        Item("Figure App.2", "weight decay 0, 0.1, 0.5, 1", _nets("app2", "mlp", "conv", "fashion"), f"{_FULL_STAR}"),
        Item("Figure App.3", "without the preconditioner", _nets("app3", "mlp", "conv", "fashion"), f"{_FULL_STAR}"),
        Item("Figure App.4", "without the nominal term", _nets("app4", "mlp", "conv", "fashion"), f"{_FULL_STAR}"),
        Item(
            "Figures App.5, App.6",
            "sixteen tasks of learned_optimization, tuned Adam and NAdamW",
            ("star-app5",),
            "the sixteen tasks themselves (tasks.GENERALIZATION names them), NAdamW by 1,000 trials each: some 500 "
            "core hours, after the meta-training",
        ),
        Item(
            "Appendix B",
            "the meta-training recipe itself",
            (),
            "examples/configs/star_paper.yaml was not run: 4e7 steps of inner runs, 23 core hours on one core",
        ),
    ),
)
_FULL_DMD = "with the recipe to the letter (1,000 runs of 100 steps, 20 test runs every 20th, three meta-seeds)"
DMD = Paper(
    "L2O-DMD (Simanek, Vasata, Kordik 2022, arXiv 2211.16268)",
    (
        Item("Figures 1, 2", "drawings of the method", (), "nothing to measure"),
        Item(
            "Table 1",
            "last losses on six tasks",
            ("dmd-table1", "dmd-long"),
            f"30 runs, and {_FULL_DMD}: 24 core hours at most",
        ),
        Item(
            "Figure 3",
            "loss curves on the six tasks",
            (),
            f"{_FULL_DMD}: the meta-training of Table 1, and 1 core hour",
        ),
        Item(
            "Figure 4",
            "rank R and window m on MNIST-Batch",
            ("dmd-window",),
            f"at full size, {_FULL_DMD}: 2.6 core hours for each (R, m) and seed",
        ),
        Item("section 5.1", "(R, m) = (1, 100) with 100 inner steps", ("dmd-literal",)),
        Item("section 5", "the eigenvalues are what helps", ("dmd-eigenvalue",)),
        Item(
            "section 6",
            "an overhead of about 5 %",
            (),
            "examples/benchmarks/lstm.py times it, in a minute; not a claim",
        ),
        Item("appendices", "quadratics, longer horizons", (), "their text is not in the published version at hand"),
    ),
)
_NET = "on the net 784-32-10 of MNIST"
LSTM = Paper(
    "LSTMs that learn to learn (Andrychowicz et al. 2016, arXiv 1606.04474; Schroeter's thesis, 2022)",
    (
        Item("Andrychowicz, section 3.1", "quadratics, against tuned optimizers", ("l2l-quadratic",)),
        Item(
            "Andrychowicz, section 3.2",
            "MNIST, other nets than in meta-training",
            ("dmd-table1",),
            "the paper's own meta-training (10,000 runs or more): 30 core hours",
        ),
        Item("thesis, Figures 1 to 6, 9", "drawings of the method", (), "nothing to measure"),
        Item("thesis, Figures 7a, 8a", "super epochs of 320 and 3,200, quadratic", ("lstm-findings",)),
        Item("thesis, Figures 7b, 8b", f"the same {_NET}", (), "not written; 6 core hours for ten meta-seeds"),
        Item("thesis, Figures 10a, 11a", "preprocessing, normalized meta-gradients, quadratic", ("lstm-findings",)),
        Item("thesis, Figures 10b, 11b", f"the same {_NET}", (), "not written; 3 core hours for ten meta-seeds"),
        Item(
            "thesis, Figures 12, 13",
            "activations: sigmoid, tanh, ReLU, leaky ReLU, 100 meta-seeds",
            (),
            "not written; 60 core hours, 6 with ten meta-seeds",
        ),
        Item(
            "thesis, Figures 14, 15", "one optimizer a layer", (), "not written; 40 core hours, 4 with ten meta-seeds"
        ),
        Item("thesis, Figure 16", "a path without vanishing gradients", (), "not written; under 1 core hour"),
        Item(
            "thesis, Figure 17", "pretraining, 100 meta-seeds", (), "not written; 30 core hours, 3 with ten meta-seeds"
        ),
        Item("thesis, Figure 18a", "T = 8, 16, 32, quadratic", ("lstm-findings",)),
        Item("thesis, Figure 18b", f"the same {_NET}", (), "not written; 3 core hours for ten meta-seeds"),
        Item("thesis, Figure 19a", "growing weights, quadratic", ("lstm-findings",)),
        Item("thesis, Figure 19b", "one update per super epoch", (), "not written; under 1 core hour"),
    ),
)
_GRU_FULL = "from scratch at the paper's size (256 units, 5,000 meta-steps of 32 to 64 runs of 200 steps)"
GRU = Paper(
    "Reverse engineering learned optimizers (Maheswaranathan et al. 2021, arXiv 2011.02159)",
    (
        Item(
            "Figures 1, 17",
            "learned optimizers against tuned ones on four tasks",
            ("gru-quadratic-figure-17", "gru-rosenbrock-figure-17", "gru-two-moons-figure-17", "gru-mnist-figure-17"),
            f"{_GRU_FULL}: about 5 core hours each for the first two tasks, 100 for two moons, 1,000 for MNIST",
        ),
        Item(
            "Figure 2",
            "update functions of hand-designed rules",
            (),
            "drawings; analysis.update_function computes them",
        ),
        Item("Figures 3, 8, 9, 13", "fixed points, variance, modes", ("gru-fixed-points",)),
        Item("Figures 4, 10", "gradient clipping", ("gru-clipping",)),
        Item("Figures 5, 11", "learning-rate schedules", ("gru-schedule",)),
        Item("Figures 6, 12", "learning-rate adaptation", ("gru-adaptation",)),
        Item("Figure 7", "layers and parameter types", ("gru-tensors",)),
        Item("Figure 14", "linearized = full", ("gru-linearized", "gru-momentum-stage")),
        Item("Figure 15", "momentum appears in meta-training", ("gru-momentum-stage",), f"{_GRU_FULL}: 5 core hours"),
        Item("Figure 16", "a drawing", (), "nothing to measure"),
        Item(
            "Figures 18 to 21",
            "2,500 settings of each optimizer on each task",
            (),
            "the searches of the figure-17 claims are not drawn; on MNIST 150 settings of 2,500: 16 core hours",
        ),
    ),
)
HISTORIES = Paper(
    "Learning to optimize deep neural networks: histories and Multiscale Adam (Shahid's thesis, 2017)",
    (
        Item("Figures 2.1, 3.1, 3.2, 4.1, Table 4.1", "drawings and definitions", (), "nothing to measure"),
        Item("Figure 3.3", "MNG against Adam, sum of squares", ("history-squares",)),
        Item("Figure 3.4", "MNG against signs alone", ("history-signs",)),
        Item("Figure 3.5", "Rosenbrock", ("history-rosenbrock",)),
        Item("Figure 3.6", "MNG on MNIST", ("history-mnist",), "50 epochs: 1 core hour"),
        Item("Table 3.1", "steps of k Timesteps", ("history-step-map",), "200,000 meta-steps: 1 core hour"),
        Item(
            "Figure 3.7", "lengths of the history", ("history-sizes",), "50 epochs, full meta-training: 10 core hours"
        ),
        Item("Figure 3.8", "k Timesteps against Adam", ("history-timesteps",), "k = 100, 50 epochs: 3 core hours"),
        Item("Figure 3.9a", "ranges of timescales", ("history-ranges",), "50 epochs: 4 core hours"),
        Item("Figure 3.9b", "k Momentums against Adam and RMSProp", ("history-momentums",), "50 epochs: 1 core hour"),
        Item("Figure 3.10", "ConvCifar 0", ("history-cifar",), "ConvCifar 0 for 500 epochs: some 500 core hours"),
        Item(
            "section 3.5", "parameter inputs and Adam-like normalization bring nothing", (), "not written; 1 core hour"
        ),
        Item("Table 4.2", "weights of LA_a, LA_b, LA_c", ("multiscale-weights", "multiscale-weights-ac")),
        Item("Table 4.3", "weights for k = 5, 11", ("multiscale-weights",)),
        Item("Figure 4.2", "LA_a, LA_b, LA_c", ("multiscale-linear",), "50 epochs: 2 core hours"),
        Item("Figures 4.3, 4.4", "k = 5, 6, 11", ("multiscale-sizes",), "50 epochs: 3 core hours"),
        Item("Figures 4.5, 4.8, 4.10", "ten schedules, LA and RNN-2", ("multiscale-heat",), "50 epochs: 3 core hours"),
        Item("Figure 4.6", "LA against an MLP", (), "not written; under 1 core hour"),
        Item(
            "Figure 4.7", "ten schedules, RNN-1", ("multiscale-heat-rnn1",), "one RNN a schedule, 50 epochs: 20 hours"
        ),
        Item("Figure 4.9", "the network of the RNN", (), "nothing to measure"),
        Item("Figure 4.11", "ConvMnist", ("multiscale-convmnist",), "full net and length: 20 core hours"),
        Item("Figure 4.12", "meta-trained on ConvCifar", ("multiscale-cifar",), "500 epochs: some 500 core hours"),
        Item("Figure 4.13", "ConvCifar 0 at 5e-4", ("multiscale-convcifar",), "500 epochs: some 500 core hours"),
        Item("Figure 4.14", "1e-2 annealed to 0", ("multiscale-annealed",), "500 epochs: some 500 core hours"),
        Item("Figure 4.15", "5e-4 annealed to 5e-5", ("multiscale-floor",), "500 epochs: some 500 core hours"),
    ),
)
PAPERS = (STAR, DMD, LSTM, GRU, HISTORIES)
