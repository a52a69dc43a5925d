"""`scheduled` for any number of tensors in three to eight launches of Triton kernels, made for NVIDIA GPUs.

launch       | a program takes | and computes                                            | bytes per number (float32)
row_means    | a block of rows | what centering takes from the gradient, if anything     | 4 read: gradient
sums         | a tile          | the sums that the scheduler reads                       | 24 read: everything
schedule     | a tensor        | step size, weights, caution; whether the step is finite | 0
update CHECK | a tile          | with the safeguard: a look at what that left open       | 0 nearly always
update       | a tile          | parameters, state, counters; of hidden matrices, state  | 24 read, 20 written
             |                 | and the direction of the step                           |
normalize    | a tile          | directions of norm 1                                    | 4 read, 2 or 4 written
compare      | a tile          | what is to be known of the orthogonalized directions    | 4 or 8 read
move         | a tile          | parameters of hidden matrices                           | 8 to 12 read, 4 written

The last three are launched where there are hidden matrices, with matrix products after the first of them (`products`).

Without those, that is 72 bytes per parameter, where AdamW (fused) moves 28. Two readings of everything are the least:
the step size of a tensor depends on means over all of its new momenta, and nothing may be written before the safeguard
knows all values.

Nothing waits for the device and the step counters are on the device, so that a CUDA graph can capture a step.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_lopt.kernels import WorkItem
from lightning_lopt.kernels.cuda import columns, matrices, products, schedule, tables
from lightning_lopt.kernels.cuda import scheduled_step as step
from lightning_lopt.kernels.cuda.columns import Matrix, Sizes, Tile
from lightning_lopt.kernels.cuda.layout import DTYPES
from lightning_lopt.kernels.cuda.tables import Plan, StateTensor, Table, TritonKernel, launch
from lightning_lopt.rules import Scheduled, UpdateRule, matrix, scheduled, scheduler

REGISTERS = 128  # so that two programs fit on a multiprocessor


def supports(rule: UpdateRule, dtype: torch.dtype = torch.float32) -> str | None:
    """Why there is no kernel for this rule, None if there is one."""
    if type(rule) is not Scheduled:
        return f"{type(rule).__name__} is not the class that the kernel was written for"
    if dtype is not torch.float32:
        return f"the Triton kernel computes in float32, and there are {dtype} parameters"
    return tables.outdated()


def make(rule: UpdateRule, dtype: torch.dtype = torch.float32) -> ScheduledKernel:
    """The kernel of a rule that `supports` accepts."""
    assert isinstance(rule, Scheduled)
    return ScheduledKernel(rule)


class _Packed(NamedTuple):
    """What `ScheduledKernel.pack` gives."""

    theta: Tensor  # all numbers that the device code reads, in the order of `columns.PACKED`
    centers: bool
    orthogonalizes: bool


class _Plan(Plan):
    """Tables for one set of tensors."""

    def __init__(self, rule: Scheduled, items: Sequence[WorkItem], num_states: int) -> None:
        super().__init__(rule, items, num_states)
        assert num_states == columns.ADDRESSES.value - 2
        places, self.stacks = products.stacked(items)
        sizes: list[Sizes] = []
        found: list[Matrix] = []
        tiles, of_matrices = [], []
        num_tiles = num_rows = 0
        for number, item in enumerate(items):
            size = _sizes(item, num_tiles, num_rows, places.get(number, -1))
            sizes.append(size)
            tiles.append(_tiles(number, size, _piece(item)))
            if number in places:
                count = item.param.numel() // _piece(item)
                each = size.tiles // count
                of_matrices.append(_tiles_of_matrices(num_tiles, len(found), count, each))
                found += [Matrix(num_tiles + index * each, each) for index in range(count)]
            num_tiles += size.tiles
            num_rows += size.rows
        many = step.ROWS_AT_ONCE.value
        blocks = [(number, row) for number, size in enumerate(sizes) for row in range(0, size.rows, many)]
        self.num_blocks, self.num_tiles, self.num_numbers = len(blocks), num_tiles, products.size_of(self.stacks)
        self.num_matrix_tiles = sum(map(len, of_matrices))
        self.run = Table(torch.float32, self.device, 2)
        features = [_features(item) for item in items]
        self.arguments = {
            "sizes": self.integers(sizes, len(Sizes._fields)),
            "tiles": torch.cat(tiles).to(self.device),
            "matrix_tiles": torch.cat(of_matrices).to(self.device) if of_matrices else self.nothing.long(),
            "matrices": self.integers(found, len(Matrix._fields)),
            "blocks": self.integers(blocks, 2, torch.int32),
            "shapes": torch.tensor(features, dtype=torch.float32, device="cpu").to(self.device),
            "row_means": self.zeros(num_rows),
            "tile_sums": self.zeros(num_tiles, columns.SUMS.value),
            "matrix_sums": self.zeros(num_tiles if found else 0, columns.MATRIX_SUMS.value),
            "norms": self.zeros(len(found)),
            "multipliers": self.zeros(self.num_tensors, columns.MULTIPLIERS.value),
            "verdicts": self.zeros(self.num_tensors, dtype=torch.int32),
        }


def _features(item: WorkItem) -> tuple[float, ...]:
    """What the schedule knows of a tensor's shape and role."""
    shape = tuple(item.param.shape)
    return (*scheduler.shape_features(shape)[:3], *scheduled.role_features(shape, item.role))


def _piece(item: WorkItem) -> int:
    """How many numbers of a tensor go together: those of a matrix, or all."""
    shape = tuple(item.param.shape)
    return math.prod(matrix.sides(shape, item.role)) if matrix.is_matrix(shape, item.role) else item.param.numel()


def _sizes(item: WorkItem, tile: int, row: int, steps: int) -> Sizes:
    """A tensor's row of the table; `tile` and `row` are the first ones that are free."""
    param, numel, piece = item.param, item.param.numel(), _piece(item)
    rows, stride = 0, 1
    if param.dim() > 1:
        rows, order = param.shape[0], tables.order_of(param)
        stride = math.prod(param.shape[dim] for dim in order[order.index(0) + 1 :])
    # Granlund and Montgomery 1994, theorem 4.2, for numbers below 2^31.
    shift = 31 + (stride - 1).bit_length()
    return Sizes(
        numel=numel,
        tile=tile,
        tiles=numel // piece * -(-piece // columns.TILE.value),
        param_dtype=DTYPES[param.dtype],
        grad_dtype=DTYPES[item.grad.dtype],
        rows=rows,
        fan_in=numel // max(rows, 1),
        stride=stride,
        magic=-(-(2**shift) // stride),
        shift=shift,
        row=row,
        fours=int(piece % 4 == 0),
        is_table=int(scheduled.is_table(tuple(param.shape), item.role)),
        steps=steps,
    )


def _tiles(number: int, size: Sizes, piece: int) -> Tensor:
    """(tiles, columns of `Tile`) int64 on the CPU: the tiles of a tensor, none with numbers of two pieces."""
    index, each = torch.arange(size.tiles, dtype=torch.int64, device="cpu"), -(-piece // columns.TILE.value)
    start = index // each * piece + index % each * columns.TILE.value
    end = torch.minimum(start + columns.TILE.value, (index // each + 1) * piece)
    row = start // size.stride % max(size.rows, 1)
    columns_of_tile = {
        "tensor": torch.full_like(start, number),
        "start": start,
        "end": end,
        "row": row,
        "place": start % size.stride,
    }
    return torch.stack([columns_of_tile[name] for name in Tile._fields], 1)


def _tiles_of_matrices(tile: int, first: int, count: int, each: int) -> Tensor:
    """(tiles, 2) int64 on the CPU: tile and matrix of a tensor's `count` matrices, which begin with these numbers."""
    index = torch.arange(count * each, dtype=torch.int64, device="cpu")
    return torch.stack([tile + index, first + index // each], 1)


class ScheduledKernel(TritonKernel[_Plan]):
    """The fused step of one rule of kind `scheduled`; see `kernels.Kernel`."""

    rule: Scheduled
    plan_type = _Plan
    num_sized = 2
    product_dtype: torch.dtype | None = None
    """What matrix products are taken in: float32, bfloat16, or None for bfloat16 on GPUs and float32 elsewhere."""

    def __init__(self, rule: Scheduled) -> None:
        super().__init__(rule, ["nominal"])

    def state_tensors(self, param: Tensor) -> dict[str, StateTensor]:
        """Momenta and second moment, and the mean square before the first step."""
        return {**tables.moments(param), "first_square": StateTensor(())}

    def arranged(self, item: WorkItem) -> WorkItem:
        """The same with its gradient laid out as the parameter; a copy if a hidden matrix is scattered in memory."""
        param = item.param
        if item.role in ("hidden", "experts") and param.dim() > 2 and not param.is_contiguous():
            is_matrix = matrix.is_matrix(tuple(param.shape), item.role)
            if is_matrix and products.sides_in_memory(param, item.role) is None:
                item = item._replace(param=param.detach().contiguous())
        return super().arranged(item)

    def pack(self, meta_params: Mapping[str, Tensor]) -> _Packed:
        """The meta-parameters as the device code reads them.

        To know what is not to be done at all waits for the device, once for each set of meta-parameters.
        """
        decays, like = self.rule.decays(meta_params), meta_params["centering"]
        parts = dict(meta_params) | {
            "decays": torch.cat([decays.momentum, decays.rms]),
            "eps": like.new_tensor([self.rule.config.eps]),
            "nominal_stepsize": like.new_tensor([self.rule.config.nominal_stepsize]),
            "fractions": like.new_tensor(scheduler.FRACTIONS),
            "log_steps": like.new_tensor(scheduler.LOG_STEPS),
        }
        flat = {name: parts[name].detach().reshape(-1).float() for name in columns.PACKED}
        theta = torch.cat([pad(flat[name], (0, size - len(flat[name]))) for name, size in columns.PACKED.items()])
        does = torch.stack([(parts[name] > 0).any() for name in ("centering", "orthogonal")])
        return _Packed(theta, *does.tolist())

    def launch(
        self,
        plan: _Plan,
        tensors: Mapping[str, Tensor],
        packed: _Packed,
        run: tuple[int | None, int | None],
        *,
        safeguard: bool,
        measure: bool,
    ) -> Tensor:
        """Take the step; see the table above."""
        num_steps, num_tensors = run
        centers = packed.centers and plan.num_blocks > 0
        has_matrices = packed.orthogonalizes and plan.num_matrix_tiles > 0
        measured = plan.zeros(plan.num_tiles, columns.MEASURED.value) if measure else plan.nothing
        arguments: dict[str, Any] = {
            **plan.arguments,
            **plan.dtypes,
            **tensors,
            "run": plan.run.update(array("f", [num_steps or 0, scheduler.shape_features((), num_tensors)[3]])),
            "theta": packed.theta,
            "measured": measured,
            "directions": plan.nothing,
            "CENTER": centers,
            "SAFE": safeguard,
            "MATRICES": has_matrices,
        }
        if has_matrices:
            arguments |= self._memory(plan)
        if centers:
            launch(step.row_means, plan.num_blocks, arguments, maxnreg=REGISTERS)
        launch(step.sums, plan.num_tiles, arguments, maxnreg=REGISTERS)
        launch(schedule.schedule, plan.num_tensors, arguments, maxnreg=REGISTERS)
        if safeguard:
            launch(step.update, plan.num_tiles, arguments, CHECK=True, MEASURE=False, maxnreg=REGISTERS)
        launch(step.update, plan.num_tiles, arguments, CHECK=False, MEASURE=measure, maxnreg=REGISTERS)
        if has_matrices:
            self._move_matrices(plan, arguments, measure)
        return measured

    def _memory(self, plan: _Plan) -> dict[str, object]:
        """What the steps of hidden matrices need, taken before anything is written: there may be too little."""
        on_gpu, directions = plan.device.type == "cuda", plan.empty(plan.num_numbers)
        in_halves = (self.product_dtype or (torch.bfloat16 if on_gpu else torch.float32)) is torch.bfloat16
        steps = plan.empty(plan.num_numbers, torch.bfloat16) if in_halves else directions
        found = None if in_halves else plan.empty(plan.num_numbers)
        return {"directions": directions, "steps": steps, "found": found, "BITS": in_halves}

    def _move_matrices(self, plan: _Plan, arguments: dict[str, Any], measure: bool) -> None:
        """Make directions orthogonal and move hidden matrices by them.

        Directions of tensors that the safeguard skips were not written: whatever their memory holds is not used.
        """
        steps, found, in_halves = arguments["steps"], arguments["found"], arguments["BITS"]
        if in_halves:  # which the kernels read and write as int16, see `arithmetic`
            arguments["steps"] = steps.view(torch.int16)
        arguments["MEASURE"] = measure
        launch(matrices.normalize, plan.num_matrix_tiles, arguments, maxnreg=REGISTERS)
        if in_halves:
            del arguments["directions"]  # there is room for what follows where they were
            found = plan.empty(plan.num_numbers, torch.bfloat16)
            arguments["found"] = found.view(torch.int16)
        products.orthogonalize(plan.stacks, steps, found)
        launch(matrices.compare, plan.num_matrix_tiles, arguments, maxnreg=REGISTERS)
        launch(matrices.move, plan.num_matrix_tiles, arguments, maxnreg=REGISTERS)
