"""Averaged weights in a fit: when they are in the module, and how checkpoints hold them.

The module trains with its own weights. While it is validated, wherever a checkpoint is made of it, and from the end of
the fit on, however that ends, it holds the averages. Its own weights are saved beside them, so that a resumed run goes
on with them. Everything is done in place, on this process's shards: no parameter is replaced.

What is averaged: the parameters that the Trainer's optimizers hold, and the running statistics of normalization layers
(`running_mean`, `running_var`), which are those of the activations under the weights of the same steps. Averages of
other buffers would be wrong as a rule (counters, masks, queues), so these stay as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lopt.optimizer import sharding
from lightning_lopt.optimizer.weight_average import WeightAverage, is_in_window
from lightning_lopt.rules import UpdateRule, compute_dtype
from lightning_lopt.rules.shards import dtensor

DEFAULT_FRACTION = 0.2  # of the run, where the user asks for averages and the rule does not say
KEY = "lopt_averaged_weights"  # in a Trainer's checkpoint
_STATISTICS = ("running_mean", "running_var")
_OTHERS = ("WeightAveraging", "StochasticWeightAveraging")  # Lightning's callbacks that do the same


def fraction_of(average: bool | str, rule: UpdateRule) -> float | None:
    """The fraction of the run that is averaged; None: no averages.

    Args:
        average: the callback's argument: True, False or "rule".
        rule: the rule that trains.
    """
    if average is False:
        return None
    return rule.average_fraction or (DEFAULT_FRACTION if average is True else None)


class AveragedWeights:
    """The averages of a module's weights in one fit, and the weights to train on with while the module holds them.

    Args:
        module: the module, in which averages and weights change places.
        fraction: of the run that is averaged; None: no averages, only loading what a checkpoint has.
    """

    def __init__(self, module: nn.Module, fraction: float | None) -> None:
        self.module = module
        self.fraction = fraction
        self.average = WeightAverage(fraction or 1.0)
        self.training: dict[str, Tensor] | None = None  # the weights to train on with, while the module holds averages
        self._sources: dict[str, Tensor] = {}  # what is averaged; found again in each epoch
        self._finished = False
        self._placed = True  # whether the averages are on the devices of the weights

    def check(self, trainer: Any) -> None:
        """Raise a MisconfigurationException if another callback averages weights, too."""
        if self.fraction is None:
            return
        for callback in trainer.callbacks:
            if _is_a(callback, *_OTHERS):
                raise MisconfigurationException(
                    f"LearnedOptimizer(average=...) and {type(callback).__name__} both average the weights: remove "
                    "the other callback, or pass average=False."
                )

    def update(self, trainer: Any, num_steps: int | None) -> None:
        """Add the weights to their averages, where a step has been taken and belongs to the window.

        Args:
            trainer: a Trainer at the end of a training batch.
            num_steps: the run's length in steps of one optimizer, None if unknown.
        """
        step = trainer.global_step  # of all optimizers together
        if self.fraction is None or step <= self.average.last:
            return
        if num_steps is not None:
            num_steps *= max(len(trainer.optimizers), 1)
        if any(_is_a(callback, "EarlyStopping") for callback in trainer.callbacks):
            num_steps = None  # the last part of the planned run may never come
        if is_in_window(step, num_steps, self.fraction):
            self._sources = self._sources or _averaged_tensors(self.module, trainer.optimizers)
            self._place()
        self.average.update(_locals(self._sources), step, num_steps)

    def look_again(self) -> None:
        """Find what is averaged anew at the next update: layers may have come, gone or thawed."""
        self._sources = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the averages into the module, where there are any and it does not hold them."""
        if not self.average.values or self.training is not None:
            return
        self._place()
        targets = _locals(self._targets())
        self.training = {name: target.clone() for name, target in targets.items()}
        for name, target in targets.items():
            target.copy_(self.average.values[name])

    @torch.inference_mode(False)
    @torch.no_grad()
    def swap_out(self) -> None:
        """Put the weights to train on with back into the module."""
        if self.training is None:
            return
        for name, target in _locals(self._targets()).items():
            target.copy_(self.training[name])
        self.training = None

    def finish(self) -> None:
        """Leave the averages in the module at the end of a fit; what is needed to resume it goes to the CPU."""
        self.swap_in()
        self._finished = True
        self._sources = {}
        self.average.values = {name: value.cpu() for name, value in self.average.values.items()}
        if self.training is not None:
            self.training = {name: value.cpu() for name, value in self.training.items()}
        self._placed = False

    def state_dict(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The module's state dict with the averages.

        Args:
            make: makes a state dict of the module as it is.
        """
        if not self.average.values or self.training is not None:
            return make()
        self.swap_in()
        try:
            state = make()
            storages = {_storage(tensor) for tensor in _locals(self._targets()).values()}
            for name, value in state.items():
                if isinstance(value, Tensor) and _storage(sharding.local_of(value)) in storages:
                    state[name] = value.detach().clone()
        finally:
            self.swap_out()
        return state

    @torch.no_grad()
    def save(self, checkpoint: dict[str, Any], *, in_shards: bool) -> None:
        """Add to a checkpoint, whose state dict has the averages, what resuming needs beside them.

        Args:
            checkpoint: the Trainer's.
            in_shards: whether the strategy saves a folder of shards. It saves shards of optimizer states alone, so the
                tensors go there, behind those of the optimizers.
        """
        values, targets = self.average.values, self._targets()
        if not targets or self._finished and not _hold(targets, values):
            return  # nothing is averaged yet, or the module has got other weights after the fit
        names = {"training": list(targets), "average": [n for n, t in targets.items() if t.dtype != values[n].dtype]}
        tensors = {"training": self.training or _locals(targets), "average": values}
        parts = {
            part: {name: _saved(targets[name], tensors[part][name], in_shards=in_shards) for name in names[part]}
            for part in names
        }
        record: dict[str, Any] = {"first": self.average.first, "last": self.average.last, "names": names}
        if in_shards:
            record["entry"] = f"optimizer_{len(checkpoint['optimizer_states'])}"  # as the strategy will name it
            checkpoint["optimizer_states"].append(parts)
        checkpoint[KEY] = record if in_shards else {**record, **parts}

    @torch.no_grad()
    def load(self, checkpoint: Mapping[str, Any], path: Any) -> None:
        """Take the averages of a checkpoint, whose state dict the module has loaded, and put its own weights back.

        Args:
            checkpoint: the Trainer's.
            path: where it came from, for a folder of shards.
        """
        self.average.clear()
        self.training = None
        if (saved := checkpoint.get(KEY)) is None:
            return
        targets = {name: tensor for name, tensor in _tensors(self.module).items() if name in saved["names"]["training"]}
        parts = saved if "entry" not in saved else _load_shards(path, saved, targets)
        for name, target in targets.items():
            local = sharding.local_of(target)
            precise = _part_of(parts["average"][name], target) if name in parts["average"] else local
            self.average.values[name] = precise.to(local.device, compute_dtype(precise.dtype), copy=True)
            local.copy_(_part_of(parts["training"][name], target))
        self.average.first, self.average.last = saved["first"], saved["last"]
        self._placed = False  # most strategies move the module later
        if self.fraction is None:
            self.average.clear()

    def _targets(self) -> dict[str, Tensor]:
        """The module's tensors that have an average; a layer that was replaced since has none."""
        found, values = _tensors(self.module), self.average.values
        return {n: t for n, t in found.items() if n in values and sharding.local_of(t).shape == values[n].shape}

    def _place(self) -> None:
        """Move averages to the devices of the weights, after they have been loaded."""
        if not self._placed:
            for name, target in self._targets().items():
                self.average.values[name] = self.average.values[name].to(target.device)
        self._placed = True


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and running statistics by name, each once."""
    for part in module.modules():
        if hasattr(part, "reshard") and hasattr(part, "unshard"):
            cast(Any, part).reshard()  # FSDP2 may keep whole copies after a forward pass, and would go on with them
    statistics = {n: b for n, b in module.named_buffers() if n.rpartition(".")[2] in _STATISTICS}
    return {name: p for name, p in module.named_parameters() if not is_lazy(p)} | statistics


def _averaged_tensors(module: nn.Module, optimizers: Iterable[Any]) -> dict[str, Tensor]:
    """Those of a module's tensors that are averaged."""
    held = {id(param) for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]}
    return {n: t for n, t in _tensors(module).items() if id(t) in held or not isinstance(t, nn.Parameter)}


def _locals(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's parts."""
    return {name: sharding.local_of(tensor.detach()) for name, tensor in tensors.items()}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _hold(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> bool:
    """Whether a module's tensors have these values; shards are not compared, since all processes must say the same."""
    plain = {name: target for name, target in targets.items() if not hasattr(target, "placements")}
    return all(torch.equal(t.detach(), values[name].to(t.device, t.dtype)) for name, t in plain.items())


def _saved(target: Tensor, local: Tensor, *, in_shards: bool) -> Tensor:
    """What a checkpoint has of a tensor of which `local` is this process's part."""
    tensor: Tensor = sharding.with_local(target, local.to(target.device))
    if in_shards or not hasattr(tensor, "placements"):
        return tensor
    return sharding.whole(tensor).cpu()


def _part_of(tensor: Any, target: Any) -> Tensor:
    """This process's part of a tensor that a checkpoint had."""
    if hasattr(tensor, "placements") or not hasattr(target, "placements"):
        return sharding.local_of(tensor)
    if (shard := sharding.shard_of(target)) is not None:
        return shard.local(tensor)
    whole = tensor.to(target.device)
    return sharding.local_of(dtensor().distribute_tensor(whole, target.device_mesh, target.placements))


def _load_shards(path: Any, saved: Mapping[str, Any], targets: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Load tensors from a folder of shards, as shards of this run's."""
    dtypes = {"training": None, "average": torch.float32}  # only lower precision has averages of another dtype
    parts = {
        part: {name: torch.empty_like(targets[name].detach(), dtype=dtypes[part]) for name in names if name in targets}
        for part, names in saved["names"].items()
    }
    importlib.import_module("torch.distributed.checkpoint").load({saved["entry"]: parts}, checkpoint_id=path)
    return parts


def _is_a(callback: object, *names: str) -> bool:
    """Whether a callback is of a class of Lightning's; by name, because `pytorch_lightning` has classes of its own."""
    return any(base.__name__ in names for base in type(callback).__mro__)
