"""The recipe of the bundled `lstm-dmd-robust`: the learned scheduler of `star`, and a small LSTM meta-trained on top.

    python examples/recipes/lstm_dmd_robust.py --out runs/lstm-dmd-robust    # minutes of a core

The rule starts with the scheduler of the bundled `star` and zero readouts (the bundled weights with that of the `star`
that their card names). The scheduler stays fixed. The network learns from the exact gradient of whole short runs on
small images, with second-order terms. Longer runs on whole images then choose the best of the weights after each epoch,
the initial ones included. Nets have 8 hidden units, as in L2O-DMD's meta-training; the six tasks of the evaluation,
with 20 hidden units, are not used. Needs MNIST, Fashion-MNIST and CIFAR-10 in $LIGHTNING_LOPT_DATA.
"""

import argparse
import copy
import logging
from pathlib import Path

import lightning as L
import torch

import lightning_lopt as lopt
from lightning_lopt.meta.estimators import FullUnroll
from lightning_lopt.meta.surface import score
from lightning_lopt.rules.lstm import SCHEDULE
from lightning_lopt.tasks import make

CONFIG = {
    "hidden_size": 8,
    "num_snapshots": 10,
    "snapshots": "increments",
    "nominal_stepsize": 1e-2,
    "nominal_controller": True,
    "exp_mult": 1.0,
    "normalize_blackbox": True,
    "out_scale": 1e-7,  # times 1 / v, at most 1e4: weights without gradients drift by at most a thousandth per step
    "eps": 1e-8,
    "scheduler": True,
}
KINDS = {
    "mnist-dmd": {},
    "mnist-l2l-2layer": {"hidden": (8, 8)},
    "mnist-l2l-batch16": {"hidden": (8,)},
    "mnist-l2l-relu": {"hidden": (8,)},
    "fashion-l2l": {"hidden": (8,)},
    "cifar-l2l": {"hidden": (8,), "image_size": 16},
}
SMALL, RUNS, STARTS = 10, 16, 2  # image side and runs of the unrolls; runs per validation task
READOUTS = ("readout", "controller")


class Keep(L.Callback):
    """Keeps the weights at the end of each epoch."""

    def __init__(self, rule):
        self.kept = [copy.deepcopy(rule.state_dict())]

    def on_train_epoch_end(self, trainer, module):
        self.kept.append(copy.deepcopy(module.rule.state_dict()))
        print(trainer.global_step, float(trainer.callback_metrics["meta_loss"]), flush=True)


def start(seed, star):
    """The rule with the scheduler of `star` and a network whose output is zero."""
    torch.manual_seed(seed)
    rule, star = lopt.rules.make("lstm_dmd", **CONFIG), lopt.load_rule(star).state_dict()
    fresh = rule.state_dict()
    zeros = {name: torch.zeros_like(fresh[name]) for name in READOUTS}
    rule.load_state_dict({**fresh, **zeros, **{name: star[name] for name in SCHEDULE}})
    return rule


def judge(rule, kept, kinds, steps):
    """Score each set of weights: (weights,) means over tasks of log final plus log mean loss."""
    total = torch.zeros(len(kept))
    for name, options in kinds.items():
        for seed in range(STARTS):
            found = score(rule, kept, make(name, **options), steps, seed=seed)
            total += (found.final + found.mean) / (STARTS * len(kinds))
        print(name, [round(value, 4) for value in total.tolist()], flush=True)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/lstm-dmd-robust"))
    parser.add_argument("--steps", type=int, default=48, help="meta-training steps")
    parser.add_argument("--length", type=int, default=80, help="length of the runs in meta-training")
    parser.add_argument("--validation", type=int, default=300, help="length of the runs that choose the weights")
    parser.add_argument("--tasks", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--star", default="star", help="the rule whose scheduler is used: a name or a directory")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    kinds = {name: KINDS[name] for name in arguments.tasks}
    rule = start(arguments.seed, arguments.star)
    keep = Keep(rule)
    meta = lopt.MetaTrainer(
        rule,
        [(name, {**options, "image_size": SMALL}) for name, options in kinds.items()],
        FullUnroll(RUNS, arguments.length, segment=20, carry=1.0),
        tasks_per_step=1,
        trainable=[name for name in rule.state_dict() if name not in SCHEDULE],
        lr=5e-3,
        steps_per_epoch=max(arguments.steps // 4, 1),
        seed=arguments.seed,
    )
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_steps=arguments.steps, gradient_clip_val=1.0, callbacks=[keep], **off)
    trainer.fit(meta)
    best = int(judge(rule, keep.kept, kinds, arguments.validation).argmin())
    print("chosen: after", best, "of", len(keep.kept) - 1, "epochs")  # of a quarter of the steps; 0: initial
    rule.load_state_dict(keep.kept[best])
    print(lopt.save_rule(rule, arguments.out / "rule"))


if __name__ == "__main__":
    main()
