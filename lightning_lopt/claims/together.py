"""Meta-training of many meta-seeds at once: success rates need ten, and of small inner runs one costs as much."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.claims.lab import Lab
from lightning_lopt.meta.estimators import TruncatedBackprop
from lightning_lopt.meta.unroll import Inner, MetaParams, Record, Unroll
from lightning_lopt.rules import UpdateRule, make
from lightning_lopt.tasks import Task


@dataclasses.dataclass(frozen=True)
class Together(Unroll):
    """Runs of which equal shares have meta-parameters of their own: leading axis S, run p has number p // (P / S)."""

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
        """As `Unroll.run`, whose `batched` it is."""
        population = {name: _spread(param, len(inner.done)) for name, param in meta_params.items()}
        return super().run(population, inner, length, generator, draw_horizon, sides=sides, batched=True)


def train_together(
    lab: Lab,
    label: str,
    rule: UpdateRule,
    task: Task,
    estimator: TruncatedBackprop,
    *,
    num_steps: int,
    looks: int = 1,
    lr: float,
    objective: str = "raw",
    normalize: bool | str = "tensor",
    schedule: str = "constant",
    second_order: bool = False,
    seeds: Sequence[int] | None = None,
) -> list[list[dict[str, Tensor]]]:
    """Meta-train a rule from several fresh starts with Adam, or find that it was done before.

    What `MetaTrainer` does for each of them; no number of one depends on those of another, but all share what is drawn.

    Args:
        lab: keeps the result.
        label: for the progress report.
        rule: of which kind and configuration; its own weights are not read.
        task: of the inner runs.
        estimator: of the meta-gradient; its `num_runs` is that of each meta-seed.
        num_steps: of meta-training.
        looks: how often the weights are kept, the last time at the end.
        lr: of Adam.
        objective: as for `Unroll`.
        normalize: False; True, the gradient to norm 1; "tensor", each part of it; "clip", only if it is above 1.
        schedule: "constant", or "cosine" down to zero.
        second_order: as for `Unroll`.
        seeds: meta-seeds (default: the lab's).

    Returns:
        For each look, for each meta-seed, meta-parameters.
    """
    seeds = list(lab.seeds if seeds is None else seeds)
    key: dict[str, Any] = {"kind": rule.kind, "config": rule.config.to_dict(), "estimator": repr(estimator)}
    key |= {"task": task.name, "size": task.num_params, "num_steps": num_steps, "looks": looks, "lr": lr}
    key |= {"objective": objective, "normalize": normalize, "schedule": schedule, "second_order": second_order}
    key |= {"seeds": seeds}

    def compute() -> dict[str, Any]:
        stacked = {name: torch.nn.Parameter(value) for name, value in fresh(rule, seeds).items()}
        optimizer = torch.optim.Adam(stacked.values(), lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps if schedule == "cosine" else 10**9)
        unroll = Together(rule, task, objective, second_order=second_order)
        together = dataclasses.replace(estimator, num_runs=estimator.num_runs * len(seeds))
        generator = torch.Generator().manual_seed(seeds[0])
        state, kept = together.init(unroll, stacked, generator), []
        for step in range(1, num_steps + 1):
            estimate = together.estimate(unroll, stacked, state, generator)
            state = estimate.state
            for name, grad in normalized(estimate.meta_grad, normalize, len(seeds)).items():
                stacked[name].grad = grad
            optimizer.step()
            scheduler.step()
            if step * looks % num_steps < looks:
                kept.append({name: value.detach().tolist() for name, value in stacked.items()})
            if step % 10 == 0:
                lab.progress(label, step, num_steps)
        return {"kept": kept}

    kept = lab.piece("trained together", key, compute)["kept"]
    looked = [{name: torch.tensor(value) for name, value in row.items()} for row in kept]
    return [[{name: value[number] for name, value in row.items()} for number in range(len(seeds))] for row in looked]


def normalized(grads: dict[str, Tensor], how: bool | str, seeds: int) -> dict[str, Tensor]:
    """Gradients (S, *shape) of the mean over all runs -> of that over the runs of each of S meta-seeds, normalized."""
    grads = {name: seeds * grad for name, grad in grads.items()}
    squares = {name: grad.flatten(1).square().sum(1) for name, grad in grads.items()}
    if how in (True, "clip"):
        squares = dict.fromkeys(squares, torch.stack(list(squares.values())).sum(0))
    if how is False:
        return grads
    norms = {name: square.sqrt().clamp(min=1.0 if how == "clip" else 1e-30) for name, square in squares.items()}
    return {name: grad / norms[name].reshape(-1, *[1] * (grad.dim() - 1)) for name, grad in grads.items()}


def fresh(rule: UpdateRule, seeds: Sequence[int]) -> dict[str, Tensor]:
    """The weights of `make` from each seed, stacked."""
    rows = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            rows.append(make(rule.kind, **rule.config.to_dict()).state_dict())
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _spread(param: Tensor, population: int) -> Tensor:
    """(S, *shape) -> (P, *shape)."""
    return param.repeat_interleave(population // len(param), 0)
