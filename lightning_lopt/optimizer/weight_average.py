"""The mean of the weights over the last part of a run.

Source: Polyak-Ruppert averaging, as in Izmailov et al. (2018), "Averaging Weights Leads to Wider Optima and Better
Generalization".

One formula serves runs of known and of unknown length. After step t, the average moves toward the weights by

    share = (t - last) / min(t - first, fraction * t), at most 1,

where `last` is the step of the sample before, and `first` the number of steps before the window.

* Known length N: the window is the last floor(fraction * N) steps, at least one. Up to N, t - first is the smaller one,
  and the result is the plain mean of the samples ("tail averaging": Jain et al., 2018, "Parallelizing Stochastic
  Gradient Descent for Least Squares Regression"). If the run goes on after N, its last `fraction` of the steps counts.
* Unknown length: samples begin at the first step. fraction * t is soon the smaller one, and the sample of step s has a
  weight proportional to s^(1/fraction - 1): the power function of Karras et al. (2024), "Analyzing and Improving the
  Training Dynamics of Diffusion Models", section 3.1, with gamma + 1 = 1/fraction. The window grows with the run, so
  that it needs no number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_lopt.rules import compute_dtype


def is_in_window(step: int, num_steps: int | None, fraction: float) -> bool:
    """Whether the weights after `step` steps belong to the average.

    Args:
        step: how many steps have been taken.
        num_steps: the run's length, None if unknown.
        fraction: of the run that is averaged, in (0, 1].

    Example:
        >>> [step for step in range(1, 11) if is_in_window(step, 10, 0.25)]
        [9, 10]
    """
    return num_steps is None or step > num_steps - max(1, math.floor(fraction * num_steps))


def sample_share(step: int, last: int, first: int, fraction: float) -> float:
    """The share of a new sample in the average, in (0, 1]; see the formula above.

    Args:
        step: how many steps have been taken.
        last: how many had been taken at the sample before.
        first: how many had been taken before the window, at most `last`.
        fraction: of the run that is averaged, in (0, 1].

    Example:
        >>> [sample_share(step, step - 1, 8, 0.25) for step in (9, 10, 16)]  # 1, 1/2; after the end 1/(0.25 * 16)
        [1.0, 0.5, 0.25]
    """
    return min(1.0, (step - last) / min(step - first, fraction * step))


@torch.no_grad()
def move_toward(averages: Sequence[Tensor], weights: Sequence[Tensor], share: float) -> None:
    """Move averages toward weights, in place: average += share * (weight - average).

    Args:
        averages: any shapes, in at least float32.
        weights: of the same shapes; lower precision is widened first.
        share: in [0, 1].
    """
    together: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for average, weight in zip(averages, weights, strict=True):
        if weight.dtype is not average.dtype:  # one by one: copies of all of them at once would take too much
            average.lerp_(weight.to(average.dtype), share)
        else:
            pair = together.setdefault((average.device, average.dtype), ([], []))
            pair[0].append(average)
            pair[1].append(weight)
    for same_averages, same_weights in together.values():
        torch._foreach_lerp_(same_averages, same_weights, share)


class WeightAverage:
    """A running average of named tensors.

    torch's `AveragedModel` is not used: it copies the whole module, frozen weights included, keeps bfloat16 averages in
    bfloat16, where a share below 1/256 is lost, and knows neither shards nor windows that grow.

    Args:
        fraction: of the run that is averaged, in (0, 1].

    Example:
        >>> average, weight = WeightAverage(0.5), torch.zeros(1)
        >>> for step in range(1, 5):
        ...     weight += 1
        ...     average.update({"w": weight}, step, num_steps=4)
        >>> average.values["w"]
        tensor([3.5000])
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.values: dict[str, Tensor] = {}
        self.first = self.last = 0

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int, num_steps: int | None) -> None:
        """Add a sample, if it belongs to the window; if not, forget those that did, as the run has become longer.

        A tensor that is new, or has another shape than before, starts its average with this sample.

        Args:
            weights: name -> tensor.
            step: how many steps have been taken, more than at the sample before.
            num_steps: the run's length, None if unknown.
        """
        if not is_in_window(step, num_steps, self.fraction):
            self.clear()
            return
        if not self.values:
            self.first = self.last = step - 1
        for name in self._changed(weights):
            self.values[name] = weights[name].to(compute_dtype(weights[name].dtype), copy=True)
        share = sample_share(step, self.last, self.first, self.fraction)
        move_toward([self.values[name] for name in weights], list(weights.values()), share)
        self.last = step

    def clear(self) -> None:
        """Forget all samples."""
        self.values = {}
        self.first = self.last = 0

    def _changed(self, weights: Mapping[str, Tensor]) -> Iterable[str]:
        values = self.values
        return [name for name, w in weights.items() if name not in values or values[name].shape != w.shape]
