"""`scheduled` for any number of tensors in three to five launches of Triton kernels, made for NVIDIA GPUs.

launch       | a program takes | and computes                                            | bytes per number (float32)
row_means    | a block of rows | what centering takes from the gradient, if anything     | 4 read: gradient
sums         | a tile          | the sums of squares that the scheduler reads            | 24 read: everything
schedule     | a tensor        | step size, weights, caution; whether the step is finite | 0
update CHECK | a tile          | with the safeguard: a look at what that left open       | 0 nearly always
update       | a tile          | parameters, state, counters                             | 24 read, 20 written

That is 72 bytes per parameter, where AdamW (fused) moves 28. Two readings of everything are the least: the step size of
a tensor depends on means over all of its new momenta, and nothing may be written before the safeguard knows all values.

Nothing waits for the device and the step counters are on the device, so that a CUDA graph can capture a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_lopt.kernels import WorkItem
from lightning_lopt.kernels.cuda import scheduled_step as step
from lightning_lopt.kernels.cuda import tables
from lightning_lopt.kernels.cuda.layout import DTYPES
from lightning_lopt.kernels.cuda.scheduled_step import Sizes
from lightning_lopt.kernels.cuda.tables import Plan, StateTensor, Table, TritonKernel, launch
from lightning_lopt.rules import Scheduled, UpdateRule, scheduler

REGISTERS = 128  # so that two programs fit on a multiprocessor


def supports(rule: UpdateRule, dtype: torch.dtype = torch.float32) -> str | None:
    """Why there is no kernel for this rule, None if there is one."""
    if not isinstance(rule, Scheduled):
        return f"{type(rule).__name__} is not Scheduled"
    if dtype is not torch.float32:
        return f"the Triton kernel computes in float32, and there are {dtype} parameters"
    return tables.outdated()


def make(rule: UpdateRule, dtype: torch.dtype = torch.float32) -> ScheduledKernel:
    """The kernel of a rule that `supports` accepts."""
    assert isinstance(rule, Scheduled)
    return ScheduledKernel(rule)


class _Plan(Plan):
    """Tables for one set of tensors."""

    def __init__(self, rule: Scheduled, items: Sequence[WorkItem], names: Sequence[tuple[str, ...]]) -> None:
        super().__init__(rule, items, names)
        sizes: list[Sizes] = []
        self.num_tiles = 0
        num_rows = 0
        for item in items:
            sizes.append(_sizes(item, self.num_tiles, num_rows))
            self.num_tiles += sizes[-1].tiles
            num_rows += sizes[-1].rows
        features = [scheduler.shape_features(tuple(item.param.shape))[:3] for item in items]
        many = step.ROWS_AT_ONCE.value
        blocks = [(number, row) for number, size in enumerate(sizes) for row in range(0, size.rows, many)]
        self.num_blocks = len(blocks)
        self.run = Table(torch.float32, self.device)
        self.arguments = {
            "sizes": self.integers(sizes, len(Sizes._fields)),
            "tiles": torch.cat([_tiles(number, size) for number, size in enumerate(sizes)]).to(self.device),
            "blocks": self.integers(blocks, 2, torch.int32),
            "shapes": torch.tensor(features, dtype=torch.float32, device="cpu").to(self.device),
            "row_means": self.zeros(num_rows),
            "tile_sums": self.zeros(self.num_tiles, step.SUMS.value),
            "multipliers": self.zeros(self.num_tensors, step.MULTIPLIERS.value),
            "verdicts": self.zeros(self.num_tensors, dtype=torch.int32),
        }


def _sizes(item: WorkItem, tile: int, row: int) -> Sizes:
    """A tensor's row of the table; `tile` and `row` are the first ones that are free."""
    param, numel = item.param, item.param.numel()
    rows, stride = 0, 1
    if param.dim() > 1:
        rows, order = param.shape[0], tables.order_of(param)
        stride = math.prod(param.shape[dim] for dim in order[order.index(0) + 1 :])
    # Granlund and Montgomery 1994, theorem 4.2, for numbers below 2^31.
    shift = 31 + (stride - 1).bit_length()
    return Sizes(
        numel=numel,
        tile=tile,
        tiles=-(-numel // step.TILE.value),
        param_dtype=DTYPES[param.dtype],
        grad_dtype=DTYPES[item.grad.dtype],
        rows=rows,
        fan_in=numel // max(rows, 1),
        stride=stride,
        magic=-(-(2**shift) // stride),
        shift=shift,
        row=row,
    )


def _tiles(number: int, size: Sizes) -> Tensor:
    """(tiles, 4) int32 on the CPU: tensor; tile in it; of the tile's first number its row, and its place in the row."""
    tile = torch.arange(size.tiles, dtype=torch.int64, device="cpu")
    start = tile * step.TILE.value
    row = start // size.stride % max(size.rows, 1)
    return torch.stack([torch.full_like(tile, number), tile, row, start % size.stride], 1).int()


class ScheduledKernel(TritonKernel[_Plan]):
    """The fused step of one rule of kind `scheduled`; see `kernels.Kernel`."""

    rule: Scheduled
    plan_type = _Plan

    def __init__(self, rule: Scheduled) -> None:
        super().__init__(rule, ["nominal"])

    def state_tensors(self, param: Tensor) -> dict[str, StateTensor]:
        """Momenta and second moment."""
        return tables.moments(param)

    def pack(self, meta_params: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
        """All numbers that the device code reads, in the order of `scheduled_step.PACKED`; whether to center.

        To know that waits for the device, once for each set of meta-parameters.
        """
        decays, like = self.rule.decays(meta_params), meta_params["centering"]
        parts = dict(meta_params) | {
            "decays": torch.cat([decays.momentum, decays.rms]),
            "eps": like.new_tensor([self.rule.config.eps]),
            "nominal_stepsize": like.new_tensor([self.rule.config.nominal_stepsize]),
            "fractions": like.new_tensor(scheduler.FRACTIONS),
            "log_steps": like.new_tensor(scheduler.LOG_STEPS),
        }
        flat = {name: parts[name].detach().reshape(-1).float() for name in step.PACKED}
        theta = torch.cat([pad(flat[name], (0, size - len(flat[name]))) for name, size in step.PACKED.items()])
        return theta, bool((like > 0).any())

    def launch(
        self,
        plan: _Plan,
        items: Sequence[WorkItem],
        packed: tuple[Tensor, bool],
        run: tuple[int | None, int | None],
        *,
        safeguard: bool,
        measure: bool,
    ) -> Tensor:
        """Take the step; see the table above."""
        theta, center = packed
        num_steps, num_tensors = run
        measured = plan.zeros(plan.num_tiles, step.MEASURED.value) if measure else plan.nothing
        arguments = {
            **plan.arguments,
            **plan.dtypes,
            "addresses": plan.addresses(items, step.ADDRESSES.value),
            "numbers": plan.numbers(items),
            "run": plan.run.update([(num_steps or 0, scheduler.shape_features((), num_tensors)[3])]),
            "theta": theta,
            "measured": measured,
            "CENTER": center and plan.num_blocks > 0,
            "SAFE": safeguard,
        }
        if arguments["CENTER"]:
            launch(step.row_means, plan.num_blocks, arguments, maxnreg=REGISTERS)
        launch(step.sums, plan.num_tiles, arguments, maxnreg=REGISTERS)
        launch(step.schedule, plan.num_tensors, arguments, maxnreg=REGISTERS)
        if safeguard:
            launch(step.update, plan.num_tiles, arguments, CHECK=True, MEASURE=False, maxnreg=REGISTERS)
        launch(step.update, plan.num_tiles, arguments, CHECK=False, MEASURE=measure, maxnreg=REGISTERS)
        return measured
