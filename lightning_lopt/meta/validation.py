"""Meta-validation: how well the rule as it is, not perturbed, trains a held-out task over the whole horizon."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.meta.unroll import OBJECTIVES, MetaParams, Unroll


class Score(NamedTuple):
    """What runs on one task came to; small is good."""

    meta_loss: Tensor  # () the objective "log", mean over runs and steps
    final: Tensor  # () training loss, mean over runs and over the last tenth of the steps


@torch.no_grad()
def score(unroll: Unroll, meta_params: MetaParams, horizon: int, num_runs: int, generator: torch.Generator) -> Score:
    """Run the rule on a task, several runs at once.

    Args:
        unroll: the rule on its task; whatever its objective is, "log" is what is reported.
        meta_params: those that learn; `unroll.frozen` has the others.
        horizon: length of the runs in steps.
        num_runs: how many, which differ in start and batches.
        generator: seeded alike, it gives the same runs.
    """
    raw, lengths = dataclasses.replace(unroll, objective="raw"), torch.full((num_runs,), horizon)
    inner = raw.start(generator, lengths)
    _, record = raw.run(meta_params, inner, horizon, generator, lambda number: lengths[:number])
    losses = record.losses
    return Score(
        OBJECTIVES["log"](unroll.task, losses, losses[0]).mean(),
        losses[-max(horizon // 10, 1) :].mean(),
    )
