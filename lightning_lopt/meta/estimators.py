"""Estimators of the meta-gradient, the gradient of the inner runs' loss with respect to the meta-parameters.

`FullUnroll`, `TruncatedBackprop` and `OneStep` backpropagate through the unroll. `FullES`, `PES` and `ESSingle` are
evolution strategies (ES), which need only losses and tolerate chaotic ones. Each estimator is a frozen configuration
with two methods: `init` draws the inner runs; `estimate` advances them and returns the meta-loss, the meta-gradient and
the advanced runs. All randomness comes from the generator. Non-finite values count as zero, so that one bad run does
not end a long meta-training.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from lightning_lopt.meta.backprop import as_leaves, backpropagate, gradient_in_segments
from lightning_lopt.meta.schedules import Horizon, Weights
from lightning_lopt.meta.unroll import Inner, MetaParams, Record, Unroll, choose, detach

Gradients = dict[str, Tensor]


class Estimate(NamedTuple):
    """The result of an estimate."""

    meta_loss: Tensor  # () mean objective over the runs and slots
    meta_grad: Gradients  # like the meta-parameters, always finite
    state: Any  # the advanced runs, for the next call
    finite: Tensor  # () bool: no loss or gradient was replaced by zero


class Particles(NamedTuple):
    """N antithetic pairs of inner runs with their perturbations."""

    inner: Inner  # P = 2 N runs, the + sides first
    perturbation: Gradients  # name -> (N, *shape). PES: the sum since the reset; ES-Single: that of the episode


class Estimator(ABC):
    """The interface of gradient estimators."""

    @abstractmethod
    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> Any:
        """Draw the inner runs for the first estimate: a pytree of tensors, or None."""

    @abstractmethod
    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Advance the runs, and estimate the gradient of their meta-loss.

        Args:
            unroll: the rule on its task.
            meta_params: those that learn; `unroll.frozen` has the others.
            state: from `init` or from the last estimate.
            generator: the only source of randomness.
        """


@dataclasses.dataclass(frozen=True)
class FullUnroll(Estimator):
    """The exact gradient of the mean loss over whole runs, by backpropagation through all their steps.

    The losses are those after each update, so that every update counts and the initial loss does not. Memory grows with
    the horizon, or with `segment` if that is given.

    Args:
        num_runs: inner runs per estimate.
        horizon: their length in steps.
        weights: weights of the losses along a run.
        segment: use activation checkpointing with segments of so many steps, for about a third more time. The square
            root of the horizon needs the least memory (default: keep the whole graph).
        carry: clip the gradient of each run with respect to its parameters and states to this norm where it passes from
            a segment to the preceding one. Otherwise a chaotic run dominates the estimate; with clipping, the estimate
            is not exact (default: no clipping).
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
        """Return None: every estimate starts fresh runs."""

    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Compute the meta-loss and its gradient on fresh runs."""
        # One step more than is run: no episode may end within the unroll.
        inner = unroll.start(generator, torch.full((self.num_runs,), self.horizon + 1))
        if self.segment is not None and self.segment < self.horizon:
            weights = self.weights(self.horizon)
            found = gradient_in_segments(unroll, meta_params, inner, weights, self.segment, generator, self.carry)
            return Estimate(found.loss, found.gradient, None, found.finite)
        options = TruncatedBackprop(truncation=self.horizon, horizon=Horizon(self.horizon + 1), weights=self.weights)
        estimate = _truncated_gradient(unroll, meta_params, inner, options, generator)
        return estimate._replace(state=None)


@dataclasses.dataclass(frozen=True)
class TruncatedBackprop(Estimator):
    """Backpropagation through `truncation` steps at a time. Runs continue between estimates, without their graph.

    The estimate is biased towards short-term progress. `Unroll.second_order` selects first or second order.

    Args:
        num_runs: number of inner runs.
        truncation: steps per estimate.
        horizon: lengths of the episodes.
        stagger: set the clocks of the first episodes ahead at random, so that they do not all end together.
        stride: steps by which an estimate advances the runs (default: `truncation`). With fewer, truncations overlap;
            the overlap is run again with the new meta-parameters, on new batches. A stride of 1 is the sliding window
            of Schroeter's thesis (section 5.5.3).
        weights: weights of the losses along a truncation.

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
        """Start fresh runs."""
        return _start(unroll, self.num_runs, self.horizon, self.stagger, generator)

    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Advance the runs by a truncation, and backpropagate through it."""
        return _truncated_gradient(unroll, meta_params, state, self, generator)


class OneStepState(NamedTuple):
    """The inner runs of `OneStep`, and the number of estimates so far."""

    inner: Inner
    num_estimates: Tensor  # () int64


@dataclasses.dataclass(frozen=True)
class OneStep(Estimator):
    """The gradient of log f(x') - log f(x), where x' is one update after x, on a batch that the update has not seen.

    Source: the one-step objective of Shahid's thesis on normalized gradient histories and Multiscale Adam. It looks
    neither back nor ahead, and needs positive losses. On the batch of the update itself, it would reward fitting the
    noise of that batch.

    Args:
        num_runs: number of inner runs, which continue between estimates.
        horizon: lengths of the episodes.
        early: lengths of the episodes that begin in the first `num_early` estimates, when an untrained rule takes runs
            to points from which they do not recover (default: `horizon`).
        num_early: number of these estimates.
        stagger: set the clocks of the first episodes ahead at random.
    """

    num_runs: int = 8
    horizon: Horizon = Horizon()
    early: Horizon | None = None
    num_early: int = 0
    stagger: bool = True

    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> OneStepState:
        """Start fresh runs."""
        num_estimates = torch.zeros((), dtype=torch.int64)
        horizon = self._current_horizon(num_estimates)
        return OneStepState(_start(unroll, self.num_runs, horizon, self.stagger, generator), num_estimates)

    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Advance the runs by one step, and differentiate it."""
        before = state.inner
        horizon = self._current_horizon(state.num_estimates)
        with torch.enable_grad():
            leaves = as_leaves(meta_params)
            inner, record, _ = unroll.slot(leaves, before, generator, lambda n: horizon.draw(n, generator))
            batch = unroll.task.batch(generator, inner.constants, self.num_runs)
            old = vmap(unroll.task.loss)(before.params, batch)
            new = vmap(unroll.task.loss)(inner.params, batch)
            mask = record.mask.to(new.device)
            change = torch.log(new.clamp(min=1e-30)) - torch.log(old.detach().clamp(min=1e-30))
            loss = torch.where(mask, change, 0.0).sum() / mask.sum().clamp(min=1)
            gradient, finite = backpropagate(loss, leaves)
        finite = finite & change[mask].isfinite().all()
        return Estimate(loss.detach(), gradient, OneStepState(detach(inner), state.num_estimates + 1), finite)

    def _current_horizon(self, num_estimates: Tensor) -> Horizon:
        return self.early if self.early is not None and int(num_estimates) < self.num_early else self.horizon


@dataclasses.dataclass(frozen=True)
class FullES(Estimator):
    """Antithetic ES over whole runs: (L+ - L-) / (2 std^2) * perturbation, unbiased for the smoothed meta-loss.

    Args:
        num_pairs: antithetic pairs per estimate. Both sides of a pair see the same task, start and batches.
        horizon: length of the runs in steps.
        std: standard deviation of the perturbations.
    """

    num_pairs: int = 8
    horizon: int = 100
    std: float = 0.01

    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> None:
        """Return None: every estimate starts fresh runs."""

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
    """Persistent evolution strategies (Vicol et al. 2021, arXiv 2112.13835), as STAR's authors implement them.

    Each truncation draws a fresh perturbation. The loss difference of a pair is credited to the sum of all
    perturbations since its reset, which makes short truncations unbiased. When an episode ends within a truncation, the
    following losses are credited to the perturbation of this truncation only. As in the reference, that includes the
    last loss of the old episode, and the sum restarts even if the reset itself falls into the next truncation.

    Args:
        num_pairs: antithetic pairs of runs. Both sides of a pair see the same tasks, starts and batches.
        truncation: slots per estimate; 50 in the paper.
        std: standard deviation of the perturbations; 0.01 in the paper.
        horizon: lengths of the episodes.
        stagger: set the clocks of the first episodes ahead at random, so that they do not all end together.
    """

    num_pairs: int = 8
    truncation: int = 50
    std: float = 0.01
    horizon: Horizon = Horizon()
    stagger: bool = True

    def init(self, unroll: Unroll, meta_params: MetaParams, generator: torch.Generator) -> Particles:
        """Start fresh pairs, with zero perturbations."""
        inner = _start(unroll, self.num_pairs, self.horizon, self.stagger, generator, sides=2)
        return Particles(inner, {k: p.new_zeros((self.num_pairs, *p.shape)) for k, p in meta_params.items()})

    @torch.no_grad()
    def estimate(self, unroll: Unroll, meta_params: MetaParams, state: Any, generator: torch.Generator) -> Estimate:
        """Advance every pair by a truncation."""
        fresh = draw_perturbations(meta_params, self.std, self.num_pairs, generator)
        inner, record = _run_pairs(unroll, meta_params, fresh, state.inner, self.truncation, self.horizon, generator)
        total = {name: state.perturbation[name] + fresh[name] for name in fresh}
        # Both sides of a pair have the same clock.
        ended = record.done[:, : self.num_pairs].cumsum(0).bool()  # in and after the last step of an episode
        num_steps = record.mask[:, : self.num_pairs].sum(0).clamp(min=1).to(record.losses.device)
        difference = _side_difference(record)
        ended_there = ended.to(difference.device)
        old = torch.where(ended_there, 0.0, difference).sum(0) / num_steps
        new = torch.where(ended_there, difference, 0.0).sum(0) / num_steps
        gradient = _es_gradient([(old, total), (new, fresh)], self.std)
        kept = {name: _select_rows(ended[-1], fresh[name], total[name]) for name in fresh}
        return Estimate(_mean_loss(record), gradient, Particles(inner, kept), _finite(record))


@dataclasses.dataclass(frozen=True)
class ESSingle(Estimator):
    """ES-Single (Vicol 2023, arXiv 2304.11153): one perturbation per pair and episode.

    Unlike with PES, the variance does not grow with the number of truncations. A pair whose episode has ended idles
    until the next truncation, where it starts a fresh run with a fresh perturbation.

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
        """Start fresh pairs, and draw their perturbations."""
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
            perturbation = {name: _select_rows(ended, drawn[name], perturbation[name]) for name in drawn}
        idle = dataclasses.replace(unroll, idle=True)
        inner, record = _run_pairs(idle, meta_params, perturbation, inner, self.truncation, self.horizon, generator)
        # Divide by the truncation, not by the number of steps that a run took, so that all steps of an episode have the
        # same weight.
        weight = _side_difference(record).sum(0) / self.truncation
        gradient = _es_gradient([(weight, perturbation)], self.std)
        return Estimate(_mean_loss(record), gradient, Particles(inner, perturbation), _finite(record))


def draw_perturbations(meta_params: MetaParams, std: float, number: int, generator: torch.Generator) -> Gradients:
    """Draw normal perturbations, name -> (number, *shape)."""

    def draw(param: Tensor) -> Tensor:
        shape = (number, *param.shape)
        noise = torch.randn(shape, generator=generator, device=generator.device, dtype=param.dtype)
        return std * noise.to(param.device)

    return {name: draw(param) for name, param in meta_params.items()}


def _start(
    unroll: Unroll, number: int, horizon: Horizon, stagger: bool, generator: torch.Generator, sides: int = 1
) -> Inner:
    inner = unroll.start(generator, horizon.draw(number, generator), sides=sides)
    if not stagger:
        return inner
    # Only the clock is set ahead, not the parameters or the rule's step: the first episode is just shorter.
    uniform = torch.rand(number, generator=generator, device=generator.device, dtype=torch.float64).cpu()
    return inner._replace(clock=(uniform.repeat(sides) * inner.horizon).long())


def _truncated_gradient(
    unroll: Unroll, meta_params: MetaParams, inner: Inner, options: TruncatedBackprop, generator: torch.Generator
) -> Estimate:
    """Advance the runs, and return the gradient of the weighted mean of the losses after each update."""
    length = options.truncation
    stride = options.stride or length

    def draw_horizon(number: int) -> Tensor:
        return options.horizon.draw(number, generator)

    with torch.enable_grad():
        leaves = as_leaves(meta_params)
        inner, record = unroll.run(leaves, inner, stride, generator, draw_horizon)
        kept = detach(inner)
        if stride < length:
            inner, rest = unroll.run(leaves, inner, length - stride, generator, draw_horizon)
            record = Record(*(torch.cat(rows) for rows in zip(record, rest, strict=True)))
        # The record has the loss before each update. Drop the first and append one after the last update.
        last = unroll.loss(inner, unroll.task.batch(generator, inner.constants, len(inner.done)))
        losses = torch.cat([record.losses[1:], last.unsqueeze(0)])
        mask = torch.cat([record.mask[1:], record.mask[-1:]]).to(losses.device)
        finite = losses.isfinite()
        weights = options.weights(length).to(losses).unsqueeze(1)
        losses = torch.where(mask & finite, weights * losses, 0.0)
        loss = (losses.sum(0) / (weights * mask).sum(0).clamp(min=1e-30)).mean()
        gradient, gradient_finite = backpropagate(loss, leaves)
    return Estimate(loss.detach(), gradient, kept, gradient_finite & (finite | ~mask).all())


def _run_pairs(
    unroll: Unroll,
    meta_params: MetaParams,
    perturbation: Gradients,
    inner: Inner,
    length: int,
    horizon: Horizon,
    generator: torch.Generator,
) -> tuple[Inner, Record]:
    """Run both sides of every pair, the + sides first."""
    both = {name: torch.cat([p + perturbation[name], p - perturbation[name]]) for name, p in meta_params.items()}

    def draw_horizon(number: int) -> Tensor:
        return horizon.draw(number, generator)

    return unroll.run(both, inner, length, generator, draw_horizon, sides=2, batched=True)


def _side_difference(record: Record) -> Tensor:
    """(K, N) loss of the + side minus loss of the - side; 0 where either is not finite."""
    plus, minus = record.losses.chunk(2, dim=1)
    return torch.nan_to_num(plus - minus, 0.0, 0.0, 0.0)


def _mean_loss(record: Record) -> Tensor:
    """() each run's mean objective, averaged over the runs."""
    num_steps = record.mask.sum(0).clamp(min=1).to(record.losses.device)
    return (record.losses.sum(0) / num_steps).mean()


def _finite(record: Record) -> Tensor:
    return record.losses.isfinite().all()


def _es_gradient(terms: list[tuple[Tensor, Gradients]], std: float) -> Gradients:
    """Average loss difference (N,) times perturbation (N, *shape) over the pairs, summed over the terms, by 2 std^2."""
    num_pairs = len(terms[0][0])
    gradient = {}
    for name in terms[0][1]:
        products = [torch.tensordot(w.to(noise[name].dtype), noise[name], dims=1) for w, noise in terms]
        gradient[name] = torch.stack(products).sum(0) / (2 * std**2 * num_pairs)
    return gradient


def _select_rows(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition.to(no.device).reshape(-1, *[1] * (no.dim() - 1)), yes, no)
