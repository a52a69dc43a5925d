"""STAR for any number of tensors in six launches of Triton kernels, made for NVIDIA GPUs; seven with the safeguard.

A step reads every gradient three times and every parameter and state twice, 72 bytes a parameter (AdamW fused: 28), as
STAR's normalizers are means over tensors whose channels follow from other means over tensors:

launch            | a program takes | and computes
gradient_squares  | a tile          | sums of g^2 over rows and columns
vector_sums       | a block of rows | factored moments: their means and their channels' mean squares
vector_features   | or columns      | their factors, and their part of the network's first layer
channel_sums      | a tile          | mean squares of the other channels
effective_weights | a tensor        | the first layer with normalizers and time features in it
update CHECK      | a tile          | with the safeguard: is any new value not finite?
update            | a tile          | parameters, state, counters

The third to fifth serve the network and the safeguard, and are left out where there is neither.

Nothing waits for the device and the step counters are on the device, so that a CUDA graph can capture a step. Two runs
are equal to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_lopt.kernels import WorkItem
from lightning_lopt.kernels.cuda import star_factored as factored
from lightning_lopt.kernels.cuda import star_step as step
from lightning_lopt.kernels.cuda import tables, tiling
from lightning_lopt.kernels.cuda.arithmetic import ESTIMATORS
from lightning_lopt.kernels.cuda.tables import Plan, StateTensor, TritonKernel, launch
from lightning_lopt.rules import STAR, UpdateRule
from lightning_lopt.rules import features as feats

REGISTERS = 128  # so that two programs fit on a multiprocessor
AGGREGATES = ("aggregate_magnitude", "aggregate_nom_magnitude", "aggregate_reg_magnitude", "selfnormalize_blackbox")


def supports(rule: UpdateRule) -> str | None:
    """Why there is no kernel for this rule, None if there is one."""
    if not isinstance(rule, STAR):
        return f"{type(rule).__name__} is not STAR"
    c = rule.config
    if (c.hidden_size, c.hidden_layers) != (4, 2):
        return f"hidden_size={c.hidden_size}, hidden_layers={c.hidden_layers}: the Triton kernel has two layers of 4"
    if chosen := [name for name in AGGREGATES if getattr(c, name)]:
        return f"{chosen[0]}=True: the Triton kernel has no such mean over the tensor"
    return tables.outdated()


def make(rule: UpdateRule) -> StarKernel:
    """The kernel of a rule that `supports` accepts: of kind star, hyperparam or blackbox."""
    assert isinstance(rule, STAR)
    return StarKernel(rule)


class _Plan(Plan):
    """Tables and scratch memory for one set of tensors."""

    def __init__(self, rule: STAR, items: Sequence[WorkItem], names: Sequence[tuple[str, ...]]) -> None:
        super().__init__(rule, items, names)
        views = [tables.known_view(item.param) for item in items]
        tiles = tiling.tile([item.param for item in items], [item.grad for item in items], views)
        self.num_tiles = len(tiles.tiles)
        self.num_blocks = len(tiles.blocks)
        self.arguments = {
            **tiles._asdict(),
            "num_tiles": self.num_tiles,
            "num_blocks": self.num_blocks,
            "sums": self.zeros(tiles.num_sums),
            "means": self.zeros(tiles.num_entries),
            "entries": self.zeros(7, tiles.num_entries),
            "tile_sums": self.zeros(self.num_tiles, factored.TILE_SUMS.value),
            "block_sums": self.zeros(self.num_blocks, factored.BLOCK_SUMS.value),
            "effective": self.zeros(self.num_tensors, factored.EFFECTIVE.value),
            "bad": self.zeros(self.num_tensors, dtype=torch.int32),
        }


class StarKernel(TritonKernel[_Plan]):
    """The fused step of one STAR rule; see `kernels.Kernel`."""

    rule: STAR
    plan_type = _Plan

    def __init__(self, rule: STAR) -> None:
        c = rule.config
        sizes = {"blackbox": c.step_mult, "nominal": c.nominal_stepsize, "decay": c.weight_decay}
        super().__init__(rule, [name for name, size in sizes.items() if size])
        shrink = 2 if c.regularization_controller else 1
        self.settings = {
            "BLACKBOX": c.step_mult > 0,
            "NORMALIZE": c.normalize_blackbox,
            "ESTIMATOR": ESTIMATORS[c.nominal_grad_estimator] if c.nominal_stepsize else 0,
            "CONTROL": c.nominal_controller,
            "SHRINK": shrink if c.weight_decay else 0,
            "NETWORK": bool(c.step_mult or c.nominal_controller or (c.weight_decay and shrink == 2)),
        }
        self.measured = [0, *(1 + number for number, size in enumerate(sizes.values()) if size)]

    def state_tensors(self, param: Tensor) -> dict[str, StateTensor]:
        """Moments; then factored ones: over y, which belong to x, before those over x."""
        shape, lies = tuple(param.shape), tables.known_view(param)
        found = tables.moments(lies, shape)
        dims = feats.factored_dims(shape)
        if dims is None:
            return found | {"diag": found["exp_avg"], "row": StateTensor((3, 0), (0, 1))}
        vectors = {}
        for name, gone in zip(("col", "row"), dims, strict=True):
            order = (0, *(dim + 1 - (dim > gone) for dim in lies.order if dim != gone))
            vectors[name] = StateTensor((3, *shape[:gone], *shape[gone + 1 :]), order)
        names = ("row", "col") if lies.row_is_x else ("col", "row")
        return found | {name: vectors[name] for name in names}

    def pack(self, meta_params: Mapping[str, Tensor]) -> Tensor:
        """All numbers of a rule that the device code reads, one after the other; `star_factored` names their places."""
        c, decays = self.rule.config, self.rule.decays(meta_params)
        first, last = meta_params["w0"], len(meta_params["b2"])
        rows, cols = (first[list(channels)] for channels in (feats.ROW, feats.COL))
        dense = torch.cat([first[list(feats.DENSE)], rows + cols])  # the rows of a flat tensor are its columns
        control = 1.0 if c.nominal_controller else math.exp(c.exp_mult[1])
        parts = [
            pad(dense, (0, 0, 0, 10)),
            rows,
            cols,
            pad(first[feats.NUM_CHANNELS :], (0, 0, 0, 5)),
            pad(first.new_tensor(feats.TIMESCALES), (0, 5), value=1.0),
            meta_params["b0"],
            meta_params["w1"],
            meta_params["b1"],
            pad(meta_params["w2"], (0, 4 - last)),
            pad(meta_params["b2"], (0, 4 - last)),
            decays.momentum,
            decays.rms,
            decays.adafactor,
            first.new_tensor([c.step_mult, *c.exp_mult, c.nominal_stepsize, c.weight_decay, control, c.eps]),
        ]
        return torch.cat([part.detach().reshape(-1).float() for part in parts])

    def launch(
        self,
        plan: _Plan,
        items: Sequence[WorkItem],
        packed: Tensor,
        run: tuple[int | None, int | None],
        *,
        safeguard: bool,
        measure: bool,
    ) -> Tensor:
        """Take the step; see the table above."""
        measured = plan.zeros(plan.num_tiles, factored.MEASURED.value) if measure else plan.nothing
        arguments = {
            **plan.arguments,
            **plan.dtypes,
            **self.settings,
            "addresses": plan.addresses(items, factored.ADDRESSES.value),
            "numbers": plan.numbers(items),
            "theta": packed,
            "measured": measured,
            "SAFE": safeguard,
        }
        launch(factored.gradient_squares, plan.num_tiles, arguments, maxnreg=REGISTERS)
        launch(factored.vector_sums, plan.num_blocks, arguments, maxnreg=REGISTERS)
        if self.settings["NETWORK"] or safeguard:
            launch(factored.vector_features, plan.num_blocks, arguments, maxnreg=REGISTERS)
            launch(step.channel_sums, plan.num_tiles, arguments, maxnreg=REGISTERS)
            launch(step.effective_weights, plan.num_tensors, arguments, maxnreg=REGISTERS)
        if safeguard:
            launch(step.update, plan.num_tiles, arguments, CHECK=True, MEASURE=False, maxnreg=REGISTERS)
        programs = plan.num_tiles + plan.num_blocks + plan.num_tensors
        launch(step.update, programs, arguments, CHECK=False, MEASURE=measure, maxnreg=REGISTERS)
        return torch.stack([measured[:, column] for column in self.measured], 1) if measure else measured
