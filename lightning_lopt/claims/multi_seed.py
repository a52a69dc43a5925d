"""Meta-train several meta-seeds as one population: with small inner runs, ten seeds cost about as much as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.meta.estimators import TruncatedBackprop
from lightning_lopt.meta.unroll import Inner, MetaParams, Record, Unroll
from lightning_lopt.rules import UpdateRule, make
from lightning_lopt.tasks import Task


@dataclasses.dataclass(frozen=True)
class MultiSeedUnroll(Unroll):
    """An unroll whose meta-parameters have a leading axis of S meta-seeds: each gets an equal fraction of the runs."""

    def run(
        self,
        meta_params: MetaParams,
        inner: Inner,
        length: int,
        generator: torch.Generator,
        draw_horizon: Callable[[int], Tensor],
        *,
        sides: int = 1,
        batched: bool = False,
    ) -> tuple[Inner, Record]:
        """Like `Unroll.run` with one set of meta-parameters per run; of P runs, run p has meta-seed p // (P / S)."""
        runs_per_seed = len(inner.done) // len(next(iter(meta_params.values())))
        population = {name: param.repeat_interleave(runs_per_seed, 0) for name, param in meta_params.items()}
        return super().run(population, inner, length, generator, draw_horizon, sides=sides, batched=True)


def meta_train_seeds(
    experiment: Experiment,
    label: str,
    rule: UpdateRule,
    task: Task,
    estimator: TruncatedBackprop,
    *,
    num_steps: int,
    num_checkpoints: int = 1,
    lr: float,
    objective: str = "raw",
    normalize: bool | str = "tensor",
    schedule: str = "constant",
    second_order: bool = False,
) -> list[list[dict[str, Tensor]]]:
    """Meta-train a rule with Adam from several fresh starts, or read the result from the cache.

    Each meta-seed is trained as `MetaTrainer` would train it. Their numbers do not depend on each other, but all of
    them see the same random draws.

    Args:
        experiment: gives the meta-seeds, and caches the result.
        label: for the progress report.
        rule: gives the kind and configuration; its weights are not read.
        task: the task of the inner runs.
        estimator: the meta-gradient estimator; its `num_runs` is that of each meta-seed.
        num_steps: meta-training steps.
        num_checkpoints: number of evenly spaced steps at which to keep the weights; the last one is the end.
        lr: Adam's learning rate.
        objective: see `Unroll`.
        normalize: False; True, scale the gradient to norm 1; "tensor", scale that of each tensor to norm 1; "clip",
            scale the gradient to norm 1 if its norm is larger.
        schedule: "constant", or "cosine" down to zero.
        second_order: see `Unroll`.

    Returns:
        For each checkpoint and each meta-seed, the meta-parameters.
    """
    seeds = list(experiment.seeds)
    key: dict[str, Any] = {"kind": rule.kind, "config": rule.config.to_dict(), "estimator": repr(estimator)}
    key |= {"task": task.name, "size": task.num_params, "num_steps": num_steps, "num_checkpoints": num_checkpoints}
    key |= {"lr": lr, "objective": objective, "normalize": normalize, "schedule": schedule}
    key |= {"second_order": second_order, "seeds": seeds}

    def compute() -> dict[str, Any]:
        stacked = {name: torch.nn.Parameter(value) for name, value in initial_weights(rule, seeds).items()}
        optimizer = torch.optim.Adam(stacked.values(), lr=lr)
        # A cosine of 1e9 steps is constant.
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps if schedule == "cosine" else 10**9)
        unroll = MultiSeedUnroll(rule, task, objective, second_order=second_order)
        all_seeds = dataclasses.replace(estimator, num_runs=estimator.num_runs * len(seeds))
        generator = torch.Generator().manual_seed(seeds[0])
        state = all_seeds.init(unroll, stacked, generator)
        checkpoints = []
        for step in range(1, num_steps + 1):
            estimate = all_seeds.estimate(unroll, stacked, state, generator)
            state = estimate.state
            for name, grad in normalize_by_seed(estimate.meta_grad, normalize, len(seeds)).items():
                stacked[name].grad = grad
            optimizer.step()
            scheduler.step()
            if step * num_checkpoints % num_steps < num_checkpoints:
                checkpoints.append({name: value.detach().tolist() for name, value in stacked.items()})
            if step % 10 == 0 or step == num_steps:
                experiment.progress(label, step, num_steps)
        return {"checkpoints": checkpoints}

    rows = experiment.cached("meta-training of several seeds", key, compute)["checkpoints"]
    checkpoints = [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
    return [[{name: value[i] for name, value in row.items()} for i in range(len(seeds))] for row in checkpoints]


def normalize_by_seed(grads: dict[str, Tensor], how: bool | str, num_seeds: int) -> dict[str, Tensor]:
    """From the gradients of the mean over all runs, (S, *shape), those of each meta-seed's mean, normalized."""
    # The mean over all runs weighs each meta-seed's mean by 1 / S.
    grads = {name: num_seeds * grad for name, grad in grads.items()}
    if how is False:
        return grads
    squares = {name: grad.flatten(1).square().sum(1) for name, grad in grads.items()}
    if how in (True, "clip"):
        squares = dict.fromkeys(squares, torch.stack(list(squares.values())).sum(0))
    norms = {name: square.sqrt().clamp(min=1.0 if how == "clip" else 1e-30) for name, square in squares.items()}
    return {name: grad / norms[name].reshape(-1, *[1] * (grad.dim() - 1)) for name, grad in grads.items()}


def initial_weights(rule: UpdateRule, seeds: Sequence[int]) -> dict[str, Tensor]:
    """The initial weights of the rule's kind and configuration from each seed, stacked."""
    rows = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            rows.append(make(rule.kind, **rule.config.to_dict()).state_dict())
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
