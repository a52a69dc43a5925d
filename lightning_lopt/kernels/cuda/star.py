"""STAR for any number of tensors in six launches, by Triton; made for NVIDIA GPUs. Those in brackets come on top.

A step reads every gradient three times and every parameter and state twice, 72 bytes a parameter (AdamW fused: 28), as
STAR's normalizers are means over tensors whose channels follow from other means over tensors:

launch            | a program is of | computes
(row_means)       | a few rows      | what centering takes from the gradient, if the rule has a scheduler
gradient_squares  | a tile          | sums of g^2 over rows and columns
(clip)            | all             | the gradient's norm, if it is to be clipped
vector_sums       | a block of rows | factored moments: their means and their channels' mean squares
vector_features   | or columns      | their factors, and their part of the network's first layer
channel_sums      | a tile          | mean squares of the other channels
effective_weights | a tensor        | the first layer with normalizers and time features in it
(scheduler)       | all             | each tensor's factor, by the rule's own torch code, if it has one
(update, checked) | a tile          | with the safeguard: is any new value not finite?
update            | a tile          | parameters, state, counters

Nothing waits for the device, so a step can be captured in a CUDA graph; step counters, gradient scale, the mark that
the gradient overflowed, and the norm to clip to are tensors on the device. Two runs are equal to the bit. State is that
of the rule; `state_dtype=torch.bfloat16` halves momenta and second moment, with stochastic rounding, as rounding to
nearest would leave the second moment a third too large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_lopt.kernels import Squares, WorkItem
from lightning_lopt.kernels.cuda import star_factored as factored
from lightning_lopt.kernels.cuda import star_step as step
from lightning_lopt.kernels.cuda import tables, tiling
from lightning_lopt.kernels.cuda.arithmetic import ESTIMATORS
from lightning_lopt.kernels.cuda.tables import Addresses, Table
from lightning_lopt.rules import STAR, UpdateRule, scheduler
from lightning_lopt.rules import features as feats

WARPS, REGISTERS = 8, 128  # so that two programs fit on a multiprocessor


def supports(rule: UpdateRule) -> str | None:
    """Why there is no kernel for this rule, None if there is one."""
    if not isinstance(rule, STAR):
        return f"{type(rule).__name__} is no STAR"
    if outdated := tables.outdated():
        return outdated
    c = rule.config
    if (c.hidden_size, c.hidden_layers) != (4, 2):
        return f"hidden_size={c.hidden_size}, hidden_layers={c.hidden_layers}: the Triton kernel has two layers of 4"
    names = ("aggregate_magnitude", "aggregate_nom_magnitude", "aggregate_reg_magnitude", "selfnormalize_blackbox")
    if chosen := [name for name in names if getattr(c, name)]:
        return f"{chosen[0]}=True: the Triton kernel has no such mean over the tensor"
    return None


def make(rule: UpdateRule, *, state_dtype: torch.dtype = torch.float32) -> StarKernel:
    """The kernel of a rule that `supports` has nothing against.

    Args:
        rule: of kind star, hyperparam or blackbox.
        state_dtype: of momenta and second moment: float32, or bfloat16 with stochastic rounding.
    """
    assert isinstance(rule, STAR)
    return StarKernel(rule, state_dtype)


def pack(rule: STAR, meta_params: Mapping[str, Tensor]) -> Tensor:
    """All that the kernels read of a rule, one number after the other; places are named in `triton_star_factored`."""
    c, decays = rule.config, rule.decays(meta_params)
    first, last = meta_params["w0"], len(meta_params["b2"])
    rows, cols = (first[list(channels)] for channels in (feats.ROW, feats.COL))
    timescales = first.new_tensor(feats.TIMESCALES)
    control = 1.0 if c.nominal_controller else math.exp(c.exp_mult[1])
    settings = (c.step_mult, *c.exp_mult, c.nominal_stepsize, c.weight_decay, control, c.eps)
    parts = [
        pad(torch.cat([first[list(feats.DENSE)], rows + cols]), (0, 0, 0, 10)),  # a flat tensor's rows are its columns
        *(rows, cols, pad(first[feats.NUM_CHANNELS :], (0, 0, 0, 5)), pad(timescales, (0, 5), value=1.0)),
        *(meta_params[name] for name in ("b0", "w1", "b1")),
        *(pad(meta_params[name], (0, 4 - last)) for name in ("w2", "b2")),
        *(decays.momentum, decays.rms, decays.adafactor, first.new_tensor(settings)),
        meta_params["centering"] if c.scheduler else first.new_zeros(2),
    ]
    return torch.cat([part.detach().reshape(-1).float() for part in parts])


class Control(NamedTuple):
    """What a step may be told beside its parts: tensors of one element on the device."""

    grad_scale: Tensor | None = None  # gradients are this times too large
    found_inf: Tensor | None = None  # other than 0: leave everything as it is
    max_norm: Tensor | None = None  # of all gradients together, beyond which they are scaled down to it


class _Plan:
    """Tables and scratch memory for one list of tensors."""

    def __init__(self, parts: Sequence[WorkItem], grads: Sequence[Tensor]) -> None:
        params, device = [part.param for part in parts], parts[0].param.device
        self.views = [tables.known_view(param) for param in params]
        self.tiling = tiles = tiling.tile(params, grads, self.views)
        self.num_tiles, self.num_blocks, self.num_tensors = len(tiles.tiles), len(tiles.blocks), len(parts)
        self.addresses, self.numbers = Addresses(len(parts), device), Table(torch.float32, device)

        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        self.sums, self.means = new(tiles.num_sums), new(tiles.num_entries)
        self.row_means = new(tiles.num_rows)
        self.entries = new(7, tiles.num_entries)
        self.tile_squares, self.tile_sums = new(self.num_tiles), new(self.num_tiles, factored.TILE_SUMS.value)
        self.block_sums = new(self.num_blocks, factored.BLOCK_SUMS.value)
        self.effective = new(self.num_tensors, factored.EFFECTIVE.value)
        self.bad = torch.zeros(self.num_tensors, dtype=torch.int32, device=device)
        self.gained = new(0, factored.GAINED.value)
        self.unclipped, self.clipping = torch.ones(2, device=device), torch.ones(2, device=device)
        self.zero, self.one = new(1), torch.ones(1, device=device)
        # The paper's form, and what a scheduler reads of shapes.
        self.multipliers = torch.tensor([1.0, *[1 / 3] * 3, 0.0], device=device).repeat(len(parts), 1)
        self.shapes, self.num_steps = Table(torch.float32, device), Table(torch.float32, device)

    def names(self, number: int, safeguard: bool) -> tuple[str, ...]:
        """A tensor's state, in the order of its addresses: what belongs to x before what belongs to y."""
        lies = self.views[number]
        moments = ("diag", "diag") if lies.flat else ("row", "col") if lies.row_is_x else ("col", "row")
        return ("exp_avg", "exp_avg_sq", *moments, "step", *(("skipped", "skipped_in_row") * safeguard))

    def lay_out(self, number: int, state: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        """Bring a tensor's state into its parameter's order in memory."""
        lies = self.views[number]
        whole = (0, *(dim + 1 for dim in lies.order))
        tables.bring(state, {"exp_avg": whole, "exp_avg_sq": lies.order}, dtype)
        if lies.flat:
            tables.bring(state, {"diag": whole}, torch.float32)
        for name, gone in zip(("col", "row"), feats.factored_dims(shape) or (), strict=False):
            order = (0, *(dim + 1 - (dim > gone) for dim in lies.order if dim != gone))
            tables.bring(state, {name: order}, torch.float32)


class StarKernel:
    """The fast path of one STAR rule; see `kernels.Kernel`."""

    def __init__(self, rule: STAR, state_dtype: torch.dtype = torch.float32) -> None:
        tables.check_state_dtype(state_dtype)
        self.rule, self.state_dtype = rule, state_dtype
        self.norm: Tensor | None = None  # () of the gradients of the last step with `max_norm`, before clipping
        self._plans: tables.Plans[_Plan] = tables.Plans()
        self._packed: tuple[Mapping[str, Tensor], Tensor] | None = None

    def refuses(self, param: Tensor) -> str | None:
        """Why this parameter is left to the rule itself."""
        return tables.refuses(param)

    def step(
        self,
        parts: Sequence[WorkItem],
        meta_params: Mapping[str, Tensor],
        num_steps: int | None,
        num_tensors: int | None = None,
        *,
        safeguard: bool,
        measure: bool,
        control: Control = Control(),  # noqa: B008  # immutable
    ) -> Squares | None:
        """Move all parts; see `kernels.Kernel.step`, and `Control` for what else there is."""
        parts = [part for part in parts if part.param.numel()]
        if not parts:
            return Squares(torch.zeros(()), dict.fromkeys(self._terms(), torch.zeros(()))) if measure else None
        device = parts[0].param.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._step(parts, meta_params, (num_steps, num_tensors), safeguard, measure, control)

    def _step(
        self,
        parts: Sequence[WorkItem],
        meta_params: Mapping[str, Tensor],
        lengths: tuple[int | None, int | None],
        safeguard: bool,
        measure: bool,
        control: Control,
    ) -> Squares | None:
        grads = [tables.like(part.grad, part.param) for part in parts]
        plan = self._plans.get([part.param for part in parts], grads, lambda: _Plan(parts, grads))
        t, s, theta = plan.tiling, self._settings(), self._theta(meta_params)
        addresses = plan.addresses.update(
            *(parts, grads, [plan.names(number, safeguard) for number in range(len(parts))]),
            lambda i: plan.lay_out(i, parts[i].state, parts[i].param.shape, self.state_dtype),
            width=factored.ADDRESSES.value,
        )
        numbers = tables.numbers(plan.numbers, parts)
        grad_scale = plan.one if control.grad_scale is None else control.grad_scale
        found_inf = plan.zero if control.found_inf is None else control.found_inf
        clipping = plan.unclipped if control.max_norm is None else plan.clipping
        center, length = self.rule.config.scheduler, lengths[0]
        num_steps = plan.num_steps.update([(0 if length is None else length,)])
        of_tensors = {"PARAMS": t.param_dtype, "GRADS": t.grad_dtype, "BF16": self.state_dtype == torch.bfloat16}
        of_tensors["CENTER"] = center
        arguments = (addresses, t.sizes, numbers, grad_scale)

        if center:
            launch(
                *(factored.row_means, len(t.rows), t.rows, addresses, t.sizes, theta, num_steps, plan.row_means),
                GRADS=t.grad_dtype,
            )
        launch(
            *(factored.gradient_squares, plan.num_tiles, t.tiles, *arguments),
            *(plan.row_means, plan.sums, plan.tile_squares, plan.bad),
            GRADS=t.grad_dtype,
            CENTER=center,
        )
        if control.max_norm is not None:
            launch(factored.clip, 1, plan.tile_squares, plan.num_tiles, control.max_norm, clipping)
            self.norm = clipping[1]
        of_vectors = (t.vectors, t.blocks, addresses)
        launch(
            *(factored.vector_sums, plan.num_blocks, *of_vectors, clipping, theta),
            *(plan.sums, plan.means, plan.block_sums),
        )
        launch(
            *(factored.vector_features, plan.num_blocks, *of_vectors, theta, plan.means, plan.block_sums),
            *(t.num_entries, plan.entries, plan.bad),
        )
        launch(
            *(step.channel_sums, plan.num_tiles, t.tiles, *arguments, clipping, plan.row_means, theta),
            *(plan.entries, t.num_entries, plan.tile_sums),
            **of_tensors,
            SAFE=safeguard,
        )
        launch(
            *(step.effective_weights, plan.num_tensors, addresses, t.sizes, theta, plan.tile_sums, plan.effective),
            plan.bad,
            SAFE=safeguard,
        )
        known = None if length is None else num_steps.reshape(())
        multipliers = self._multipliers(plan, parts, meta_params, known, lengths[1])
        if measure:
            plan.gained = torch.zeros(plan.num_tiles, factored.GAINED.value, device=t.tiles.device)
        for check in (True, False) if safeguard else (False,):
            programs = plan.num_tiles + (0 if check else plan.num_blocks + plan.num_tensors)
            launch(
                *(step.update, programs, t.tiles, plan.num_tiles, t.vectors, t.blocks, plan.num_blocks, *arguments),
                *(found_inf, clipping, plan.row_means, theta, plan.means, plan.entries, t.num_entries),
                plan.effective,
                *(multipliers, plan.bad, plan.gained),
                **of_tensors,
                **s,
                SAFE=safeguard,
                CHECK=check,
                MEASURE=measure and not check,
            )
        return self._squares(plan.gained.sum(0)) if measure else None

    def _theta(self, meta_params: Mapping[str, Tensor]) -> Tensor:
        if self._packed is None or self._packed[0] is not meta_params:
            self._packed = meta_params, pack(self.rule, meta_params)
        return self._packed[1]

    def _multipliers(
        self,
        plan: _Plan,
        parts: Sequence[WorkItem],
        meta_params: Mapping[str, Tensor],
        num_steps: Tensor | None,
        num_tensors: int | None,
    ) -> Tensor:
        """(tensors, 5): the factor of both terms, the weights of the momenta, the caution, by the rule's functions."""
        if not self.rule.config.scheduler:
            return plan.multipliers
        scheduler.keep_constants(torch.float32, plan.effective.device)
        shapes = plan.shapes.update([scheduler.shape_features(part.param.shape, num_tensors) for part in parts])
        step = plan.effective[:, factored.AT_STEP.value]
        read = plan.effective[:, factored.READ.value : factored.READ.value + 4]
        decays = self._theta(meta_params)[factored.DECAYS.value :]  # momenta's, then the second moment's
        noise = scheduler.noise_strength(decays[2], decays[3], step)
        factor, momenta = scheduler.multipliers(meta_params, read, shapes, step, num_steps, noise)
        caution = scheduler.ramp(meta_params, "caution", step, num_steps)
        return torch.cat([factor.unsqueeze(1), momenta.expand(len(parts), 3), caution.unsqueeze(1)], 1)

    def _settings(self) -> dict[str, int | bool]:
        c = self.rule.config
        shrink = 2 if c.regularization_controller else 1
        return {
            "BLACKBOX": c.step_mult > 0,
            "NORMALIZE": c.normalize_blackbox,
            "ESTIMATOR": ESTIMATORS[c.nominal_grad_estimator] if c.nominal_stepsize else 0,
            "CONTROL": c.nominal_controller,
            "SHRINK": shrink if c.weight_decay else 0,
            "NETWORK": bool(c.step_mult or c.nominal_controller or (c.weight_decay and shrink == 2)),
        }

    def _terms(self) -> list[str]:
        c = self.rule.config
        present = {"blackbox": c.step_mult, "nominal": c.nominal_stepsize, "decay": c.weight_decay}
        return [name for name, value in present.items() if value]

    def _squares(self, sums: Tensor) -> Squares:
        named = dict(zip(("blackbox", "nominal", "decay"), sums[1:], strict=True))
        return Squares(sums[0], {name: named[name] for name in self._terms()})


def launch(kernel: Any, programs: int, /, *arguments: Any, **constants: Any) -> None:
    """Run a kernel; nothing if it has nothing to do."""
    if programs:
        kernel[(programs,)](*arguments, **constants, num_warps=WARPS, maxnreg=REGISTERS)
