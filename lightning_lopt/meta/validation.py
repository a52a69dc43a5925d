"""Meta-validation: train a held-out task over the whole horizon, with the unperturbed rule."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.meta.unroll import OBJECTIVES, MetaParams, Unroll


class ValidationLosses(NamedTuple):
    """The losses of several runs on one task; lower is better."""

    meta_loss: Tensor  # () the objective "log", mean over runs and steps
    final: Tensor  # () training loss, mean over runs and over the last tenth of the steps


@torch.no_grad()
def meta_validate(
    unroll: Unroll, meta_params: MetaParams, *, horizon: int, num_runs: int, generator: torch.Generator
) -> ValidationLosses:
    """Run the rule on a task, several runs at once.

    Args:
        unroll: the rule on its task. The objective "log" is reported, whichever the unroll has.
        meta_params: those that learn; `unroll.frozen` has the others.
        horizon: length of the runs in steps.
        num_runs: number of runs, which differ in start and batches.
        generator: draws starts and batches; equal seeds give equal runs.
    """
    raw = dataclasses.replace(unroll, objective="raw")
    lengths = torch.full((num_runs,), horizon)
    inner = raw.start(generator, lengths)
    _, record = raw.run(meta_params, inner, horizon, generator, lambda number: lengths[:number])
    losses = record.losses
    last_tenth = losses[-max(horizon // 10, 1) :]
    return ValidationLosses(OBJECTIVES["log"](unroll.task, losses, losses[0]).mean(), last_tenth.mean())
