"""The coordinatewise LSTM (kinds `lstm` and, given the eigenvalues, `lstm_dmd`) for any number of tensors at once.

A program moves a tile of coordinates: all layers, readouts, stabilisers and the new value, without anything in between
being written. What a step costs is its state, read and written once: 652 bytes a parameter for two layers of 20 units,
half of it with `state_dtype=torch.bfloat16` (stochastic rounding). Products run on tensor cores, units padded with
zeros to a power of two; "tf32x3" splits each float32 in two, and is exact to about 1e-6.

With the safeguard a first launch only looks, whether all new values and states are finite, and a second one moves.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: RET505 -- branches of a kernel are taken when it is compiled

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from lightning_lopt.kernels import Squares, WorkItem
from lightning_lopt.kernels.cuda import arithmetic as tm
from lightning_lopt.kernels.cuda import tables, tiling
from lightning_lopt.kernels.cuda.tables import Addresses, Table
from lightning_lopt.kernels.cuda.tiling import DTYPES, View
from lightning_lopt.rules import LSTMRule, UpdateRule, nominal
from lightning_lopt.rules.features import EPS
from lightning_lopt.rules.lstm import PREPROCESSING

COORDINATES, WARPS = 64, 8  # of a tile; four warps would not hold the units in registers
PRECISIONS = ("tf32x3", "tf32", "ieee")
PARAM, GRAD, HIDDEN, CELL, EXP_AVG, EXP_AVG_SQ, STEP = (tl.constexpr(n) for n in range(7))
ADDRESSES = tl.constexpr(10)  # with the counters beside the step, and the mark of alignment
SIGN, SCALE, DECAY, NUMBERS = (tl.constexpr(n) for n in range(4))
NUMEL, NETWORK, PARAM_DTYPE, GRAD_DTYPE, SIZES = (tl.constexpr(n) for n in range(5))
NONE, LOGSIGN, LOGSIGN1 = (tl.constexpr(n) for n in range(3))  # in the order of rules.lstm.PREPROCESSING
BLOCK = tl.constexpr(COORDINATES)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def _features(g, settings, FORM: tl.constexpr):
    """Of the gradient: rules.lstm.preprocess. The second is used by LOGSIGN alone."""
    small, p = tl.load(settings), tl.load(settings + 1)
    size = tl.abs(g)
    log = tl.log(tl.maximum(size, small, propagate_nan=tm.ALL)) / p
    if FORM == NONE:
        return g, g
    elif FORM == LOGSIGN1:
        return tl.where(size >= small, tl.where(g < 0, -log, log), -g / small), g
    else:
        within = tl.minimum(tl.maximum(g / small, -1.0, propagate_nan=tm.ALL), 1.0, propagate_nan=tm.ALL)
        return log, within


@triton.jit
def _gate(
    GATE: tl.constexpr, weights, biases, first, second, units, old, LAYER: tl.constexpr, FORM: tl.constexpr,
    UNITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A gate's inputs summed up, (units, coordinates); the first layer reads features, the others units."""
    unit = tl.arange(0, UNITS)
    at = weights + (GATE * 2 * UNITS + unit)[:, None] * UNITS + unit[None, :]
    total = tl.load(biases + GATE * UNITS + unit)[:, None]
    if LAYER == 0:
        columns = weights + (GATE * 2 * UNITS + unit) * UNITS
        total += tl.load(columns)[:, None] * first[None, :]
        if FORM == LOGSIGN:
            total += tl.load(columns + 1)[:, None] * second[None, :]
        return tl.dot(tl.load(at + UNITS * UNITS), old, acc=total, input_precision=PRECISION)
    else:
        total += tl.zeros([UNITS, BLOCK], tl.float32)
        total = tl.dot(tl.load(at), units, acc=total, input_precision=PRECISION)
        return tl.dot(tl.load(at + UNITS * UNITS), old, acc=total, input_precision=PRECISION)


@triton.jit
def _tile_update(
    program, tiles, addresses, sizes, numbers, weights, biases, readouts, settings, bad, gained, SIZE: tl.constexpr,
    UNITS: tl.constexpr, LAYERS: tl.constexpr, FORM: tl.constexpr, ESTIMATOR: tl.constexpr, CONTROL: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, PARAMS: tl.constexpr, GRADS: tl.constexpr, BF16: tl.constexpr,
    CHECK: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(tiles + program * 2).to(tl.int64)
    size, number, row = sizes + tensor * SIZES, numbers + tensor * NUMBERS, addresses + tensor * ADDRESSES
    numel, network = tl.load(size + NUMEL), tl.load(size + NETWORK)
    n, unit = tl.load(tiles + program * 2 + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, UNITS)
    mask = n < numel
    g = tm.load(tl.load(row + GRAD), n, mask, tl.load(size + GRAD_DTYPE), GRADS, 2) * tl.load(number + SIGN)
    p = tm.load(tl.load(row + PARAM), n, mask, tl.load(size + PARAM_DTYPE), PARAMS, 2)
    hiddens, cells = tl.load(row + HIDDEN), tl.load(row + CELL)
    step = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32)))
    first, second = _features(g, settings, FORM)
    units = tl.zeros([UNITS, BLOCK], tl.float32)
    wrong = tl.zeros([BLOCK], tl.float32)
    both = (unit < SIZE)[:, None] & mask[None, :]
    for layer in tl.static_range(LAYERS):
        offsets = (layer * SIZE + unit)[:, None] * numel + n[None, :]
        old = tm.load_state(hiddens, offsets, both, BF16, 2)
        memory = tm.load_state(cells, offsets, both, BF16, 2)
        w = weights + (network * LAYERS + layer) * 8 * UNITS * UNITS
        b = biases + (network * LAYERS + layer) * 4 * UNITS
        take = _sigmoid(_gate(0, w, b, first, second, units, old, layer, FORM, UNITS, PRECISION))
        keep = _sigmoid(_gate(1, w, b, first, second, units, old, layer, FORM, UNITS, PRECISION))
        candidate = _tanh(_gate(2, w, b, first, second, units, old, layer, FORM, UNITS, PRECISION))
        show = _sigmoid(_gate(3, w, b, first, second, units, old, layer, FORM, UNITS, PRECISION))
        memory = keep * memory + take * candidate
        units = tl.where((unit < SIZE)[:, None], show * _tanh(memory), 0.0)
        if CHECK:
            wrong += tl.sum(tl.where(both, (units + memory) * 0.0, 0.0), 0)  # 0, or NaN
        else:
            bits = 0
            if BF16:
                bits, _ = tm.random_bits(offsets, tensor, step)
            tm.store_state(hiddens, offsets, units, both, bits & 0xFFFF, BF16, 2)
            tm.store_state(cells, offsets, memory, both, (bits >> 16) & 0xFFFF, BF16, 2)
    readout = readouts + network * 2 * UNITS + unit
    blackbox = tl.load(settings + 2) * tl.sum(tl.load(readout)[:, None] * units, 0)
    term = blackbox * 0.0
    if ESTIMATOR or NORMALIZE:
        moments, squares = tl.load(row + EXP_AVG), tl.load(row + EXP_AVG_SQ)
        m0 = tm.average(tm.load_state(moments, n, mask, BF16, 2), g, tl.load(settings + 3))
        m1 = tm.average(tm.load_state(moments, numel + n, mask, BF16, 2), g, tl.load(settings + 4))
        m2 = tm.average(tm.load_state(moments, 2 * numel + n, mask, BF16, 2), g, tl.load(settings + 5))
        rms = tl.load(settings + 6)
        v = rms * tm.load_state(squares, n, mask, BF16, 2) + (1 - rms) * g * g
        q = tl.rsqrt(v + 1e-6)
        if NORMALIZE:
            blackbox *= q
        if ESTIMATOR:
            control = 1.0
            if CONTROL:
                control = tl.exp(tl.load(settings + 8) * tl.sum(tl.load(readout + UNITS)[:, None] * units, 0))
            term = -tl.load(settings + 7) * control * tm.direction(ESTIMATOR, g, m0, m1, m2, q, settings + 9)
        if CHECK:
            wrong += tl.where(mask, (m0 + m1 + m2 + v) * 0.0, 0.0)
        else:
            a, b = 0, 0
            if BF16:
                a, b = tm.random_bits(2 * LAYERS * SIZE * numel + n, tensor, step)
            tm.store_state(moments, n, m0, mask, a & 0xFFFF, BF16, 2)
            tm.store_state(moments, numel + n, m1, mask, (a >> 16) & 0xFFFF, BF16, 2)
            tm.store_state(moments, 2 * numel + n, m2, mask, b & 0xFFFF, BF16, 2)
            tm.store_state(squares, n, v, mask, (b >> 16) & 0xFFFF, BF16, 2)
    new = p + ((blackbox + term) * tl.load(number + SCALE) - tl.load(number + DECAY) * p)
    kept = tm.rounded(new, tl.load(size + PARAM_DTYPE), PARAMS)
    if CHECK:
        failed = (wrong != 0) | (tm.is_bad(kept) & mask)
        tl.store(bad + tensor, 1, mask=tl.max(failed.to(tl.int32), 0) > 0)
    else:
        tm.store(tl.load(row + PARAM), n, new, mask, tl.load(size + PARAM_DTYPE), PARAMS, 2)
    if MEASURE:
        change = tl.where(mask, kept - p, 0.0)
        tl.store(gained + program * 3, tl.sum(change * change, 0))
        tl.store(gained + program * 3 + 1, tl.sum(tl.where(mask, blackbox * blackbox, 0.0), 0))
        tl.store(gained + program * 3 + 2, tl.sum(tl.where(mask, term * term, 0.0), 0))


@triton.jit(do_not_specialize=["num_tiles"])
def lstm(
    tiles, num_tiles, addresses, sizes, numbers, weights, biases, readouts, settings, bad, gained, SIZE: tl.constexpr,
    UNITS: tl.constexpr, LAYERS: tl.constexpr, FORM: tl.constexpr, ESTIMATOR: tl.constexpr, CONTROL: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, PARAMS: tl.constexpr, GRADS: tl.constexpr, BF16: tl.constexpr,
    SAFE: tl.constexpr, CHECK: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """One step, a tile of coordinates each; with CHECK only the mark of tensors whose step would not be finite."""
    program, good = tl.program_id(0), 1
    if program < num_tiles:
        if SAFE:  # the check itself marks tensors; tiles of one that is marked need not be looked at
            good = (tl.load(bad + tl.load(tiles + program * 2)) == 0).to(tl.int32)
        if good == 1:
            _tile_update(
                program, tiles, addresses, sizes, numbers, weights, biases, readouts, settings, bad, gained, SIZE,
                UNITS, LAYERS, FORM, ESTIMATOR, CONTROL, NORMALIZE, PRECISION, PARAMS, GRADS, BF16, CHECK, MEASURE,
            )  # fmt: skip


@triton.jit
def count(addresses, bad, SAFE: tl.constexpr):
    """A tensor's counters, after its step."""
    tensor = tl.program_id(0)
    good = (tl.load(bad + tensor) == 0).to(tl.int32) if SAFE else 1
    tm.count(addresses + tensor * ADDRESSES + STEP, good, SAFE)


def supports(rule: UpdateRule) -> str | None:
    """Why there is no kernel for this rule, None if there is one."""
    if not isinstance(rule, LSTMRule):
        return f"{type(rule).__name__} is no LSTMRule"
    if outdated := tables.outdated():
        return outdated
    c = rule.config
    if c.hidden_size > 64:
        return f"hidden_size={c.hidden_size}: the Triton kernel holds at most 64 units of a coordinate"
    if c.rank and c.scope == "tensor":
        return "scope='tensor': the Triton kernel has one set of eigenvalues for all tensors"
    if c.scheduler or c.eps != EPS:
        return "scheduler=True or an eps of one's own: the Triton kernel has neither"
    return None


def make(rule: UpdateRule, *, state_dtype: torch.dtype = torch.float32, precision: str = "tf32x3") -> LSTMKernel:
    """The kernel of a rule that `supports` has nothing against.

    Args:
        rule: of kind lstm or lstm_dmd.
        state_dtype: float32, or bfloat16 with stochastic rounding.
        precision: of the products: "tf32x3", "tf32" (three times quicker, three digits), or "ieee" (no tensor cores).
    """
    assert isinstance(rule, LSTMRule)
    return LSTMKernel(rule, state_dtype, precision)


class _Plan:
    """Tables for one list of tensors."""

    def __init__(self, rule: LSTMRule, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        device, splits = params[0].device, rule.config.ndim_splits
        self.views = [tables.known_view(param) for param in params]
        self.addresses, self.numbers = Addresses(len(params), device), Table(torch.float32, device)
        networks = [sum(param.dim() >= split for split in splits) for param in params]
        codes = [(DTYPES[p.dtype], DTYPES[g.dtype]) for p, g in zip(params, grads, strict=True)]
        sizes = [(p.numel(), n, *c) for p, n, c in zip(params, networks, codes, strict=True)]
        tiles = [(i, j) for i, p in enumerate(params) for j in range(-(-p.numel() // COORDINATES))]
        self.sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self.tiles = torch.tensor(tiles, dtype=torch.int32, device=device)
        self.bad = torch.zeros(len(params), dtype=torch.int32, device=device)
        self.dtypes = [tiling.common(list(column)) for column in zip(*codes, strict=True)]


class LSTMKernel:
    """The fast path of one LSTM rule; see `kernels.Kernel`."""

    def __init__(self, rule: LSTMRule, state_dtype: torch.dtype, precision: str) -> None:
        tables.check_state_dtype(state_dtype)
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is not allowed: use one of {list(PRECISIONS)}.")
        self.rule, self.state_dtype, self.precision = rule, state_dtype, precision
        self._plans: tables.Plans[_Plan] = tables.Plans()
        self._packed: tuple[Mapping[str, Tensor], tuple[Tensor, ...]] | None = None

    def refuses(self, param: Tensor) -> str | None:
        """Why this parameter is left to the rule itself."""
        return "networks are chosen by name" if self.rule.config.name_splits else tables.refuses(param)

    def step(
        self,
        parts: Sequence[WorkItem],
        meta_params: Mapping[str, Tensor],
        num_steps: int | None,
        num_tensors: int | None = None,
        *,
        safeguard: bool,
        measure: bool,
        shared: Tensor | None = None,
    ) -> Squares | None:
        """Move all parts; see `kernels.Kernel.step`.

        Args:
            parts: as there; their windows of snapshots, if the rule has any, are left as they are.
            meta_params: as there.
            num_steps: not used.
            num_tensors: not used.
            safeguard: as there.
            measure: as there.
            shared: the eigenvalues' features, as `rule.share` gives them; they count as 0 where None.
        """
        parts = [part for part in parts if part.param.numel()]
        names = ["blackbox", *(["nominal"] if self.rule.config.nominal_stepsize else [])]
        if not parts:
            return Squares(torch.zeros(()), dict.fromkeys(names, torch.zeros(()))) if measure else None
        device = parts[0].param.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            sums = self._step(parts, meta_params, safeguard, measure, shared).sum(0)
        return Squares(sums[0], dict(zip(names, sums[1:], strict=False))) if measure else None

    def _step(
        self,
        parts: Sequence[WorkItem],
        meta_params: Mapping[str, Tensor],
        safeguard: bool,
        measure: bool,
        shared: Tensor | None,
    ) -> Tensor:
        c, params = self.rule.config, [part.param for part in parts]
        grads = [tables.like(part.grad, part.param) for part in parts]
        plan = self._plans.get(params, grads, lambda: _Plan(self.rule, params, grads))
        weights, biases, of_eigenvalues, readouts, settings = self._weights(meta_params)
        if shared is not None and c.rank:
            first = torch.einsum("f,nfgu->ngu", shared.to(biases), of_eigenvalues)
            biases = biases + pad(first.unsqueeze(1), (0, 0, 0, 0, 0, c.num_layers - 1))
        names = ("hidden", "cell", "exp_avg", "exp_avg_sq", "step", *(("skipped", "skipped_in_row") * safeguard))
        addresses = plan.addresses.update(
            *(parts, grads, [names] * len(parts)),
            lambda number: tables.bring(parts[number].state, self._orders(plan.views[number]), self.state_dtype),
            width=ADDRESSES.value,
        )
        numbers = tables.numbers(plan.numbers, parts)
        tiles = len(plan.tiles)
        gained = torch.zeros(tiles if measure else 0, 3, device=params[0].device)
        if safeguard:
            plan.bad.zero_()
        for check in (True, False) if safeguard else (False,):
            lstm[(tiles,)](
                *(plan.tiles, tiles, addresses, plan.sizes, numbers, weights, biases, readouts, settings),
                *(plan.bad, gained),
                SIZE=c.hidden_size,
                UNITS=weights.shape[-1],
                LAYERS=c.num_layers,
                FORM=list(PREPROCESSING).index(c.preprocessing),
                ESTIMATOR=tm.ESTIMATORS[c.nominal_grad_estimator] if c.nominal_stepsize else 0,
                CONTROL=c.nominal_controller,
                NORMALIZE=c.normalize_blackbox,
                PRECISION=self.precision,
                PARAMS=plan.dtypes[0],
                GRADS=plan.dtypes[1],
                BF16=self.state_dtype == torch.bfloat16,
                SAFE=safeguard,
                CHECK=check,
                MEASURE=measure and not check,
                num_warps=WARPS,
            )
        count[(len(parts),)](addresses, plan.bad, SAFE=safeguard)
        return gained

    def _orders(self, lies: View) -> dict[str, tuple[int, ...]]:
        cells = (0, 1, *(dim + 2 for dim in lies.order))
        orders: dict[str, tuple[int, ...]] = {"hidden": cells, "cell": cells}
        if nominal.stabilized(self.rule.config):
            orders |= {"exp_avg": (0, *(dim + 1 for dim in lies.order)), "exp_avg_sq": lies.order}
        return orders

    def _weights(self, meta_params: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if self._packed is None or self._packed[0] is not meta_params:
            self._packed = meta_params, pack(self.rule, meta_params)
        return self._packed[1]


def pack(rule: LSTMRule, meta_params: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The networks with units padded to U, a power of two.

    Returns:
        weights (networks, layers, gate, input or hidden, U out, U in), biases (networks, layers, gate, U), what
        eigenvalues add to the first biases (networks, features, gate, U), readouts (networks, 2, U), and settings.
    """
    c, axis = rule.config, bool(rule.config.ndim_splits)
    size, features = c.hidden_size, PREPROCESSING[c.preprocessing]
    units = max(16, triton.next_power_of_2(size))
    theta = {name: (value if axis else value.unsqueeze(0)).detach().float() for name, value in meta_params.items()}

    def gates(matrix: Tensor) -> Tensor:
        """(networks, inputs, 4 size) -> (networks, gate, U out, U in)."""
        split = matrix.unflatten(-1, (4, size)).permute(0, 2, 3, 1)
        return pad(split, (0, units - split.shape[-1], 0, units - size))

    weights, biases = [], []
    for layer in range(c.num_layers):
        of_input = theta[f"w_input{layer}"] if layer else theta["w_input0"][:, :features]
        weights.append(torch.stack([gates(of_input), gates(theta[f"w_hidden{layer}"])], 2))
        biases.append(pad(theta[f"b{layer}"].unflatten(-1, (4, size)), (0, units - size)))
    of_eigenvalues = pad(theta["w_input0"][:, features:].unflatten(-1, (4, size)), (0, units - size))
    ones = torch.ones_like(theta["b0"][:, :size])
    rows = [theta["readout"] if c.readout == "linear" else ones]
    rows.append(theta["controller"] if c.nominal_controller else 0 * ones)
    settings = [math.exp(-c.p), c.p, c.out_scale, *nominal.MOMENTUM_DECAYS, nominal.RMS_DECAY]
    settings += [c.nominal_stepsize, c.exp_mult, *[1 / 3] * 3]
    readouts = pad(torch.stack(rows, 1), (0, units - size))
    stacked = torch.stack(weights, 1).contiguous(), torch.stack(biases, 1).contiguous()
    return *stacked, of_eigenvalues, readouts.contiguous(), ones.new_tensor(settings)
