"""Estimators of the meta-gradient: how the loss of inner runs depends on the rule's meta-parameters.

Backpropagation through the unroll: `FullUnroll`, `TruncatedBackprop`, `OneStep`. Evolution strategies (ES), which need
losses alone and stand chaotic ones: `FullES`, `PES`, `ESSingle`. Each is a frozen configuration with two verbs: `init`
draws the inner runs, `estimate` advances them and returns meta-loss, meta-gradient and where the runs then stand. All
randomness is the generator's. What is not finite counts as zero: one bad run must not end a long meta-training.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from lightning_lopt.meta.backprop import backpropagated, in_segments, leaves_of
from lightning_lopt.meta.schedules import Horizon, Weights
from lightning_lopt.meta.unroll import Inner, MetaParams, Record, Unroll, choose, detach

Gradients = dict[str, Tensor]


class Estimate(NamedTuple):
    """What an estimator returns."""

    meta_loss: Tensor  # () mean objective over the runs and slots
    meta_grad: Gradients  # like the meta-parameters, always finite
    state: Any  # where the runs stand, for the next call
    finite: Tensor  # () bool: neither a loss nor a gradient had to be taken for zero


class Particles(NamedTuple):
    """N antithetic pairs of inner runs, and what each pair has been perturbed by."""

    inner: Inner  # P = 2 N runs, the + sides first
    perturbation: Gradients  # name -> (N, *shape): PES the sum since the reset, ES-Single the one of the episode


class Estimator(ABC):
    """What turns inner runs into a meta-gradient."""

    @abstractmethod
    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> Any:
        """The inner runs before the first estimate: a pytree of tensors, or None."""

    @abstractmethod
    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Advance the runs, and estimate the gradient of their meta-loss.

        Args:
            unroll: the rule on its task.
            meta_params: those that learn; `unroll.frozen` has the others.
            state: of `init`, or of the last estimate.
            generator: the only source of randomness.
        """


@dataclasses.dataclass(frozen=True)
class FullUnroll(Estimator):
    """The exact gradient of the mean loss over whole runs, by backpropagation through all their steps.

    The losses are those after each update, so that every update counts and the start does not. Memory grows with the
    horizon, or with `segment` where that is given.

    Args:
        num_runs: inner runs per estimate.
        horizon: their length in steps.
        weights: of the losses along a run.
        segment: steps between states that are kept; those between are run again for their gradient (activation
            checkpointing: a third more time). About the root of the horizon needs least memory. Default: keep all.
        carry: the largest norm of a run's gradient with respect to its parameters and states that goes from a segment
            into that before. A chaotic run's would drown all others; its estimate is then not exact. Default: any.
    """

    num_runs: int = 8
    horizon: int = 100
    weights: Weights = Weights()
    segment: int | None = None
    carry: float | None = None

    def __post_init__(self) -> None:
        if self.segment is not None and self.segment < 1:
            raise ValueError(f"segment={self.segment} is not allowed: it must be at least 1, or None to keep them all.")
        if self.carry is not None and not (self.carry > 0 and self.segment):
            raise ValueError(f"carry={self.carry} is not allowed: it must be above 0, and needs a segment.")

    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> None:
        """Nothing: every estimate starts afresh."""

    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Meta-loss and its gradient on fresh runs."""
        inner = unroll.start(generator, torch.full((self.num_runs,), self.horizon + 1))
        if self.segment is not None and self.segment < self.horizon:
            options = self.weights(self.horizon), self.segment, generator, self.carry
            loss, gradient, finite = in_segments(unroll, meta_params, inner, *options)
            return Estimate(loss, gradient, None, finite)
        episodes = TruncatedBackprop(truncation=self.horizon, horizon=Horizon(self.horizon + 1), weights=self.weights)
        estimate = _backpropagate(unroll, meta_params, inner, episodes, generator)
        return estimate._replace(state=None)


@dataclasses.dataclass(frozen=True)
class TruncatedBackprop(Estimator):
    """Backpropagation through `truncation` steps at a time; runs go on from estimate to estimate, their past cut off.

    Biased towards what pays within a truncation. First- or second-order as `Unroll.second_order` says.

    Args:
        num_runs: inner runs.
        truncation: steps per estimate.
        horizon: lengths of the episodes.
        stagger: set the clocks of the first episodes ahead at random, so that they do not all end at once.
        stride: steps that the runs get on by (default: `truncation`). With fewer, windows overlap, and 1 is the sliding
            window of Schroeter's thesis (section 5.5.3): the overlap is run again, with new weights on new batches.
        weights: of the losses along a truncation.

    Raises:
        ValueError: unless 1 <= stride <= truncation.
    """

    num_runs: int = 8
    truncation: int = 20
    horizon: Horizon = Horizon()
    stagger: bool = True
    stride: int | None = None
    weights: Weights = Weights()

    def __post_init__(self) -> None:
        if self.stride is not None and not 1 <= self.stride <= self.truncation:
            raise ValueError(f"stride={self.stride} is not allowed: it must be in [1, truncation={self.truncation}].")

    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> Inner:
        """Fresh runs."""
        return _start(unroll, self.num_runs, self.horizon, self.stagger, generator)

    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Advance the runs by a truncation, and backpropagate through it."""
        return _backpropagate(unroll, meta_params, state, self, generator)


class Steps(NamedTuple):
    """Inner runs, and how many steps they have been advanced in all."""

    inner: Inner
    number: Tensor  # () int64


@dataclasses.dataclass(frozen=True)
class OneStep(Estimator):
    """The gradient of log f(x') - log f(x), x' one update after x, on a batch that the update has not seen.

    Source: Shahid's thesis on normalized gradient histories and Multiscale Adam, its one-step objective: no past, no
    future. Needs positive losses. On the update's own batch the objective would reward fitting the noise of that batch.

    Args:
        num_runs: inner runs, which go on from estimate to estimate.
        horizon: lengths of the episodes.
        early: lengths of the episodes that begin in the first `num_early` estimates, while the rule does not know
            where to go and leads runs to where none comes back from (default: `horizon`).
        num_early: number of these estimates.
        stagger: set the clocks of the first episodes ahead at random.
    """

    num_runs: int = 8
    horizon: Horizon = Horizon()
    early: Horizon | None = None
    num_early: int = 0
    stagger: bool = True

    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> Steps:
        """Fresh runs."""
        horizon = self._horizon(number := torch.zeros((), dtype=torch.int64))
        return Steps(_start(unroll, self.num_runs, horizon, self.stagger, generator), number)

    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Advance the runs by one step, and differentiate it."""
        before, horizon = state.inner, self._horizon(state.number)
        with torch.enable_grad():
            leaves = leaves_of(meta_params)
            inner, record, _ = unroll.slot(leaves, before, generator, lambda n: horizon.draw(n, generator))
            batch = unroll.task.batch(generator, inner.constants, self.num_runs)
            old, new = (vmap(unroll.task.loss)(params, batch) for params in (before.params, inner.params))
            mask = record.mask.to(new.device)
            change = torch.log(new.clamp(min=1e-30)) - torch.log(old.detach().clamp(min=1e-30))
            loss = torch.where(mask, change, 0.0).sum() / mask.sum().clamp(min=1)
            gradient, finite = backpropagated(loss, leaves)
        finite = finite & change[mask].isfinite().all()
        return Estimate(loss.detach(), gradient, Steps(detach(inner), state.number + 1), finite)

    def _horizon(self, number: Tensor) -> Horizon:
        return self.early if self.early is not None and int(number) < self.num_early else self.horizon


@dataclasses.dataclass(frozen=True)
class FullES(Estimator):
    """Antithetic ES over whole runs: (L+ - L-) / (2 std^2) * perturbation. Unbiased for the smoothed meta-loss.

    Args:
        num_pairs: antithetic pairs per estimate; both sides see the same task, start and batches.
        horizon: length of the runs.
        std: standard deviation of the perturbations.
    """

    num_pairs: int = 8
    horizon: int = 100
    std: float = 0.01

    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> None:
        """Nothing: every estimate starts afresh."""

    @torch.no_grad()
    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Run both sides of every pair to the end."""
        perturbation = draw_perturbations(meta_params, self.std, self.num_pairs, generator)
        inner = unroll.start(generator, torch.full((self.num_pairs,), self.horizon), sides=2)
        _, record = _run_pairs(unroll, meta_params, perturbation, inner, self.horizon, Horizon(self.horizon), generator)
        weight = _side_difference(record).sum(0) / self.horizon
        return Estimate(_mean_loss(record), _es_gradient([(weight, perturbation)], self.std), None, _finite(record))


@dataclasses.dataclass(frozen=True)
class PES(Estimator):
    """Persistent evolution strategies (Vicol et al. 2021, arXiv 2112.13835), as the authors of STAR have them.

    Each truncation draws a fresh perturbation; a pair's difference of losses is credited to the sum of all
    perturbations since its reset, which makes short truncations unbiased. Where an episode ends within a truncation,
    losses after its last step are credited to this truncation's perturbation alone. The reference counts that last loss
    to the new part already, and restarts the sum even where the reset itself falls into the next truncation; so do we.

    Args:
        num_pairs: antithetic pairs of runs; both sides see the same tasks, starts and batches.
        truncation: slots per estimate. The paper has 50.
        std: standard deviation of the perturbations. The paper has 0.01.
        horizon: lengths of the episodes.
        stagger: set the clocks of the first episodes ahead at random, so that they do not all end at once.
    """

    num_pairs: int = 8
    truncation: int = 50
    std: float = 0.01
    horizon: Horizon = Horizon()
    stagger: bool = True

    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> Particles:
        """Fresh pairs, nothing accumulated."""
        inner = _start(unroll, self.num_pairs, self.horizon, self.stagger, generator, sides=2)
        return Particles(inner, {k: p.new_zeros((self.num_pairs, *p.shape)) for k, p in meta_params.items()})

    @torch.no_grad()
    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Advance every pair by a truncation."""
        fresh = draw_perturbations(meta_params, self.std, self.num_pairs, generator)
        inner, record = _run_pairs(unroll, meta_params, fresh, state.inner, self.truncation, self.horizon, generator)
        total = {name: state.perturbation[name] + fresh[name] for name in fresh}
        done, mask = record.done[:, : self.num_pairs], record.mask[:, : self.num_pairs]
        ended = done.cumsum(0).bool()  # from the last step of an episode on
        slots = mask.sum(0).clamp(min=1).to(record.losses.device)
        difference = _side_difference(record)
        old, new = (torch.where(part.to(difference.device), difference, 0.0).sum(0) / slots for part in (~ended, ended))
        gradient = _es_gradient([(old, total), (new, fresh)], self.std)
        kept = {name: _rows(ended[-1], fresh[name], total[name]) for name in fresh}
        return Estimate(_mean_loss(record), gradient, Particles(inner, kept), _finite(record))


@dataclasses.dataclass(frozen=True)
class ESSingle(Estimator):
    """ES-Single (Vicol 2023, arXiv 2304.11153): one perturbation per pair and episode.

    The variance does not grow with the number of truncations, as that of PES does. A pair whose episode has ended waits
    for the next truncation, at whose start it gets a fresh run and a fresh perturbation.

    Args:
        num_pairs: antithetic pairs of runs.
        truncation: slots per estimate.
        std: standard deviation of the perturbations.
        horizon: lengths of the episodes.
        stagger: set the clocks of the first episodes ahead at random.
    """

    num_pairs: int = 8
    truncation: int = 50
    std: float = 0.01
    horizon: Horizon = Horizon()
    stagger: bool = True

    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> Particles:
        """Fresh pairs and their perturbations."""
        inner = _start(unroll, self.num_pairs, self.horizon, self.stagger, generator, sides=2)
        return Particles(inner, draw_perturbations(meta_params, self.std, self.num_pairs, generator))

    @torch.no_grad()
    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Advance every pair by a truncation."""
        inner, perturbation = state
        ended = inner.done[: self.num_pairs]
        if bool(ended.any()):
            horizon = self.horizon.draw(self.num_pairs, generator)
            inner = choose(inner.done, unroll.start(generator, horizon, sides=2), inner)
            drawn = draw_perturbations(meta_params, self.std, self.num_pairs, generator)
            perturbation = {name: _rows(ended, drawn[name], perturbation[name]) for name in drawn}
        waiting = dataclasses.replace(unroll, idle=True)
        inner, record = _run_pairs(waiting, meta_params, perturbation, inner, self.truncation, self.horizon, generator)
        # Divided by the truncation, not by the slots that a run took part in: an episode's steps weigh alike.
        weight = _side_difference(record).sum(0) / self.truncation
        gradient = _es_gradient([(weight, perturbation)], self.std)
        return Estimate(_mean_loss(record), gradient, Particles(inner, perturbation), _finite(record))


def draw_perturbations(meta_params: MetaParams, std: float, number: int, generator: torch.Generator) -> Gradients:
    """Normal perturbations, name -> (number, *shape)."""

    def draw(param: Tensor) -> Tensor:
        shape = (number, *param.shape)
        return std * torch.randn(shape, generator=generator, device=generator.device, dtype=param.dtype).to(
            param.device
        )

    return {name: draw(param) for name, param in meta_params.items()}


def _start(
    unroll: Unroll, number: int, horizon: Horizon, stagger: bool, generator: torch.Generator, sides: int = 1
) -> Inner:
    inner = unroll.start(generator, horizon.draw(number, generator), sides=sides)
    if not stagger:
        return inner
    # The clock alone is set ahead, neither parameters nor the rule's step: a first episode is merely shorter.
    uniform = torch.rand(number, generator=generator, device=generator.device, dtype=torch.float64).cpu()
    return inner._replace(clock=(uniform.repeat(sides) * inner.horizon).long())


def _backpropagate(
    unroll: Unroll, meta_params: MetaParams, inner: Inner, options: TruncatedBackprop, generator: torch.Generator
) -> Estimate:
    """Gradient of the mean loss after each update: those in the unroll but the first, and a last one."""
    length, draw = options.truncation, lambda n: options.horizon.draw(n, generator)
    stride = options.stride or length
    with torch.enable_grad():
        leaves = leaves_of(meta_params)
        inner, record = unroll.run(leaves, inner, stride, generator, draw)
        kept = detach(inner)
        if stride < length:
            inner, rest = unroll.run(leaves, inner, length - stride, generator, draw)
            record = Record(*(torch.cat(rows) for rows in zip(record, rest, strict=True)))
        last = unroll.loss(inner, unroll.task.batch(generator, inner.constants, len(inner.done)))
        losses = torch.cat([record.losses[1:], last.unsqueeze(0)])
        mask = torch.cat([record.mask[1:], record.mask[-1:]]).to(losses.device)
        finite = losses.isfinite()
        weights = options.weights(length).to(losses).unsqueeze(1)
        losses = torch.where(mask & finite, weights * losses, 0.0)
        loss = (losses.sum(0) / (weights * mask).sum(0).clamp(min=1e-30)).mean()
        gradient, finite_gradient = backpropagated(loss, leaves)
    return Estimate(loss.detach(), gradient, kept, finite_gradient & (finite | ~mask).all())


def _run_pairs(
    unroll: Unroll,
    meta_params: MetaParams,
    perturbation: Gradients,
    inner: Inner,
    length: int,
    horizon: Horizon,
    generator: torch.Generator,
) -> tuple[Inner, Record]:
    both = {name: torch.cat([p + perturbation[name], p - perturbation[name]]) for name, p in meta_params.items()}
    draw = lambda n: horizon.draw(n, generator)  # noqa: E731
    return unroll.run(both, inner, length, generator, draw, sides=2, batched=True)


def _side_difference(record: Record) -> Tensor:
    """(K, N) loss of the + side minus that of the - side; 0 where either is not finite."""
    plus, minus = record.losses.chunk(2, dim=1)
    return torch.nan_to_num(plus - minus, 0.0, 0.0, 0.0)


def _mean_loss(record: Record) -> Tensor:
    """The mean over the runs of each run's mean objective."""
    slots = record.mask.sum(0).clamp(min=1).to(record.losses.device)
    return (record.losses.sum(0) / slots).mean()


def _finite(record: Record) -> Tensor:
    return record.losses.isfinite().all()


def _es_gradient(parts: list[tuple[Tensor, Gradients]], std: float) -> Gradients:
    """Mean over pairs of the sum of weight (N,) times perturbation (N, *shape), divided by 2 std^2."""
    return {
        name: sum((torch.tensordot(w.to(p[name].dtype), p[name], dims=1) for w, p in parts), start=torch.zeros(()))
        / (2 * std**2 * len(parts[0][0]))
        for name in parts[0][1]
    }


def _rows(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition.to(no.device).reshape(-1, *[1] * (no.dim() - 1)), yes, no)
