"""The coordinatewise LSTM for any number of tensors in two launches of Triton kernels; three with the safeguard.

A program moves a tile of coordinates: all layers, readouts, stabilizers and the new value, with nothing written in
between. The cost of a step is its state, read and written once: 652 bytes a parameter for two layers of 20 units.
Matrix products run on tensor cores, with units padded by zeros to a power of two. They are exact to about 1e-6, since
"tf32x3" splits each float32 into two numbers of TF32.

With the safeguard a first launch only checks whether all new values and states are finite.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: RET505 -- branches of a kernel are taken when it is compiled

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from lightning_lopt.kernels import WorkItem
from lightning_lopt.kernels.cuda import arithmetic as tm
from lightning_lopt.kernels.cuda import tables
from lightning_lopt.kernels.cuda.tables import Plan, StateTensor, TritonKernel, launch
from lightning_lopt.kernels.cuda.tiling import DTYPES
from lightning_lopt.rules import LSTMRule, UpdateRule, nominal
from lightning_lopt.rules.features import EPS
from lightning_lopt.rules.lstm import PREPROCESSING

COORDINATES = 64  # of a tile; fewer than eight warps would not hold the units in registers
PRECISION = tl.constexpr("tf32x3")  # of matrix products
PARAM, GRAD, HIDDEN, CELL, EXP_AVG, EXP_AVG_SQ, STEP = (tl.constexpr(n) for n in range(7))
ADDRESSES = tl.constexpr(9)  # with the counters beside the step
SIGN, SCALE, DECAY, NUMBERS = (tl.constexpr(n) for n in range(4))
MEASURED = tl.constexpr(3)  # sums of squares per tile: change, blackbox, nominal
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
    UNITS: tl.constexpr,
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
    program, tiles, addresses, sizes, numbers, weights, biases, readouts, settings, bad, measured, SIZE: tl.constexpr,
    UNITS: tl.constexpr, LAYERS: tl.constexpr, FORM: tl.constexpr, ESTIMATOR: tl.constexpr, CONTROL: tl.constexpr,
    NORMALIZE: tl.constexpr, PARAMS: tl.constexpr, GRADS: tl.constexpr, CHECK: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(tiles + program * 2).to(tl.int64)
    size, number, row = sizes + tensor * SIZES, numbers + tensor * NUMBERS, addresses + tensor * ADDRESSES
    numel, network = tl.load(size + NUMEL), tl.load(size + NETWORK)
    n, unit = tl.load(tiles + program * 2 + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, UNITS)
    mask = n < numel
    g = tm.load(tl.load(row + GRAD), n, mask, tl.load(size + GRAD_DTYPE), GRADS, 2) * tl.load(number + SIGN)
    p = tm.load(tl.load(row + PARAM), n, mask, tl.load(size + PARAM_DTYPE), PARAMS, 2)
    hiddens, cells = tl.load(row + HIDDEN), tl.load(row + CELL)
    first, second = _features(g, settings, FORM)
    units = tl.zeros([UNITS, BLOCK], tl.float32)
    wrong = tl.zeros([BLOCK], tl.float32)
    both = (unit < SIZE)[:, None] & mask[None, :]
    for layer in tl.static_range(LAYERS):
        offsets = (layer * SIZE + unit)[:, None] * numel + n[None, :]
        old = tm.load_float32(hiddens, offsets, both, 2)
        memory = tm.load_float32(cells, offsets, both, 2)
        w = weights + (network * LAYERS + layer) * 8 * UNITS * UNITS
        b = biases + (network * LAYERS + layer) * 4 * UNITS
        take = _sigmoid(_gate(0, w, b, first, second, units, old, layer, FORM, UNITS))
        keep = _sigmoid(_gate(1, w, b, first, second, units, old, layer, FORM, UNITS))
        candidate = _tanh(_gate(2, w, b, first, second, units, old, layer, FORM, UNITS))
        show = _sigmoid(_gate(3, w, b, first, second, units, old, layer, FORM, UNITS))
        memory = keep * memory + take * candidate
        units = tl.where((unit < SIZE)[:, None], show * _tanh(memory), 0.0)
        if CHECK:
            wrong += tl.sum(tl.where(both, (units + memory) * 0.0, 0.0), 0)  # 0, or NaN
        else:
            tm.store_float32(hiddens, offsets, units, both, 2)
            tm.store_float32(cells, offsets, memory, both, 2)
    readout = readouts + network * 2 * UNITS + unit
    blackbox = tl.load(settings + 2) * tl.sum(tl.load(readout)[:, None] * units, 0)
    term = blackbox * 0.0
    if ESTIMATOR or NORMALIZE:
        moments, squares = tl.load(row + EXP_AVG), tl.load(row + EXP_AVG_SQ)
        m0, m1, m2, v = tm.new_moments(moments, squares, numel, n, mask, g, settings + 3, 2)
        q = tl.rsqrt(v + 1e-6)
        if NORMALIZE:
            blackbox *= q
        if ESTIMATOR:
            control = 1.0
            if CONTROL:
                control = tl.exp(tl.load(settings + 8) * tl.sum(tl.load(readout + UNITS)[:, None] * units, 0))
            term = -tl.load(settings + 7) * control * tm.direction(ESTIMATOR, g, m0, m1, m2, q)
        if CHECK:
            wrong += tl.where(mask, (m0 + m1 + m2 + v) * 0.0, 0.0)
        else:
            tm.store_moments(moments, squares, numel, n, mask, m0, m1, m2, v, 2)
    new = p + ((blackbox + term) * tl.load(number + SCALE) - tl.load(number + DECAY) * p)
    kept = tm.rounded(new, tl.load(size + PARAM_DTYPE), PARAMS)
    if CHECK:
        failed = (wrong != 0) | (tm.is_bad(kept) & mask)
        tl.store(bad + tensor, 1, mask=tl.max(failed.to(tl.int32), 0) > 0)
    else:
        tm.store(tl.load(row + PARAM), n, new, mask, tl.load(size + PARAM_DTYPE), PARAMS, 2)
    if MEASURE:
        change = tl.where(mask, kept - p, 0.0)
        tl.store(measured + program * MEASURED, tl.sum(change * change, 0))
        tl.store(measured + program * MEASURED + 1, tl.sum(tl.where(mask, blackbox * blackbox, 0.0), 0))
        tl.store(measured + program * MEASURED + 2, tl.sum(tl.where(mask, term * term, 0.0), 0))


@triton.jit(do_not_specialize=["num_tiles"])
def lstm(
    tiles, num_tiles, addresses, sizes, numbers, weights, biases, readouts, settings, bad, measured, SIZE: tl.constexpr,
    UNITS: tl.constexpr, LAYERS: tl.constexpr, FORM: tl.constexpr, ESTIMATOR: tl.constexpr, CONTROL: tl.constexpr,
    NORMALIZE: tl.constexpr, PARAMS: tl.constexpr, GRADS: tl.constexpr,
    SAFE: tl.constexpr, CHECK: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """One step, a tile of coordinates each; with CHECK only the mark of tensors whose step would not be finite."""
    program, good = tl.program_id(0), 1
    if program < num_tiles:
        if SAFE:  # the check itself marks tensors; tiles of one that is marked need not be looked at
            good = (tl.load(bad + tl.load(tiles + program * 2)) == 0).to(tl.int32)
        if good == 1:
            _tile_update(
                program, tiles, addresses, sizes, numbers, weights, biases, readouts, settings, bad, measured, SIZE,
                UNITS, LAYERS, FORM, ESTIMATOR, CONTROL, NORMALIZE, PARAMS, GRADS, CHECK, MEASURE,
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
        return f"{type(rule).__name__} is not LSTMRule"
    c = rule.config
    if c.hidden_size > 64:
        return f"hidden_size={c.hidden_size}: the Triton kernel holds at most 64 units of a coordinate"
    if c.rank:
        return f"rank={c.rank}: the Triton kernel has no eigenvalues"
    if c.scheduler or c.eps != EPS:
        return f"scheduler={c.scheduler}, eps={c.eps}: the Triton kernel has no scheduler, and an eps of {EPS}"
    return tables.outdated()


def make(rule: UpdateRule) -> LSTMKernel:
    """The kernel of a rule that `supports` accepts."""
    assert isinstance(rule, LSTMRule)
    return LSTMKernel(rule)


class _Plan(Plan):
    """Tables for one set of tensors."""

    def __init__(self, rule: LSTMRule, items: Sequence[WorkItem], names: Sequence[tuple[str, ...]]) -> None:
        super().__init__(rule, items, names)
        sizes, tiles = [], []
        for number, (param, grad) in enumerate((item.param, item.grad) for item in items):
            network = sum(param.dim() >= split for split in rule.config.ndim_splits)
            sizes.append((param.numel(), network, DTYPES[param.dtype], DTYPES[grad.dtype]))
            tiles += [(number, tile) for tile in range(-(-param.numel() // COORDINATES))]
        self.num_tiles = len(tiles)
        self.bad = self.zeros(self.num_tensors, dtype=torch.int32)
        self.arguments = {
            "num_tiles": self.num_tiles,
            "sizes": self.integers(sizes, SIZES.value),
            "tiles": self.integers(tiles, 2, torch.int32),
        }


class LSTMKernel(TritonKernel[_Plan]):
    """The fused step of one LSTM rule; see `kernels.Kernel`."""

    rule: LSTMRule
    plan_type = _Plan

    def __init__(self, rule: LSTMRule) -> None:
        super().__init__(rule, ["blackbox", *(["nominal"] if rule.config.nominal_stepsize else [])])

    def refuses(self, param: Tensor) -> str | None:
        """Why this parameter is left to the rule itself."""
        return "networks are chosen by name" if self.rule.config.name_splits else super().refuses(param)

    def state_tensors(self, param: Tensor) -> dict[str, StateTensor]:
        """Units and memory of every coordinate; moments where there is a stabilizer, which are empty otherwise."""
        c, lies, shape = self.rule.config, tables.known_view(param), tuple(param.shape)
        cells = StateTensor((c.num_layers, c.hidden_size, *shape), (0, 1, *(dim + 2 for dim in lies.order)))
        found = {"hidden": cells, "cell": cells}
        if nominal.stabilized(c):
            return found | tables.moments(lies, shape)
        nothing = StateTensor((0, *shape), tuple(range(1 + len(shape))))
        return found | {"exp_avg": nothing, "exp_avg_sq": StateTensor((0,), (0,))}

    def pack(self, meta_params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The networks with units padded to U, a power of two.

        Returns:
            weights (networks, layers, gate, input or hidden, U out, U in), biases (networks, layers, gate, U), readouts
            (networks, 2, U), and settings.
        """
        c, size = self.rule.config, self.rule.config.hidden_size
        units = max(16, triton.next_power_of_2(size))
        theta = {name: value.detach().float() for name, value in meta_params.items()}
        if not c.ndim_splits:
            theta = {name: value.unsqueeze(0) for name, value in theta.items()}

        def gates(matrix: Tensor) -> Tensor:
            """(networks, inputs, 4 size) -> (networks, gate, U out, U in)."""
            split = matrix.unflatten(-1, (4, size)).permute(0, 2, 3, 1)
            return pad(split, (0, units - split.shape[-1], 0, units - size))

        weights, biases = [], []
        for layer in range(c.num_layers):
            weights.append(torch.stack([gates(theta[f"w_input{layer}"]), gates(theta[f"w_hidden{layer}"])], 2))
            biases.append(pad(theta[f"b{layer}"].unflatten(-1, (4, size)), (0, units - size)))
        ones = torch.ones_like(theta["b0"][:, :size])
        readout = theta["readout"] if c.readout == "linear" else ones
        controller = theta["controller"] if c.nominal_controller else 0 * ones
        settings = [math.exp(-c.p), c.p, c.out_scale, *nominal.MOMENTUM_DECAYS, nominal.RMS_DECAY]
        settings += [c.nominal_stepsize, c.exp_mult]
        return {
            "weights": torch.stack(weights, 1).contiguous(),
            "biases": torch.stack(biases, 1).contiguous(),
            "readouts": pad(torch.stack([readout, controller], 1), (0, units - size)).contiguous(),
            "settings": ones.new_tensor(settings),
        }

    def launch(
        self,
        plan: _Plan,
        items: Sequence[WorkItem],
        packed: dict[str, Tensor],
        run: tuple[int | None, int | None],
        *,
        safeguard: bool,
        measure: bool,
    ) -> Tensor:
        """Take the step."""
        c = self.rule.config
        measured = plan.zeros(plan.num_tiles, MEASURED.value) if measure else plan.nothing
        arguments = {
            **plan.arguments,
            **plan.dtypes,
            **packed,
            "addresses": plan.addresses(items, ADDRESSES.value),
            "numbers": plan.numbers(items),
            "bad": plan.bad,
            "measured": measured,
            "SIZE": c.hidden_size,
            "UNITS": packed["weights"].shape[-1],
            "LAYERS": c.num_layers,
            "FORM": list(PREPROCESSING).index(c.preprocessing),
            "ESTIMATOR": tm.ESTIMATORS[c.nominal_grad_estimator] if c.nominal_stepsize else 0,
            "CONTROL": c.nominal_controller,
            "NORMALIZE": c.normalize_blackbox,
            "SAFE": safeguard,
        }
        if safeguard:
            plan.bad.zero_()
            launch(lstm, plan.num_tiles, arguments, CHECK=True, MEASURE=False)
        launch(lstm, plan.num_tiles, arguments, CHECK=False, MEASURE=measure)
        launch(count, plan.num_tensors, arguments)
        return measured[:, : 1 + len(self.terms)]
