"""Dynamic Mode Decomposition (DMD): eigenvalues of the linear map that best continues a trajectory.

Source: Simanek, Vasata, Kordik 2022 (L2O-DMD, arXiv 2211.16268), sections 3.2 and 4. Snapshots x_0 ... x_m are
columns; X = [x_0 ... x_{m-1}], Y = [x_1 ... x_m]. With the R largest singular triplets of X = U S V^T, the eigenvalues
are those of

    U^T Y V S^-1                                                                        (their eq. 6, at rank R)

Nothing here needs the n x m decomposition. By the method of snapshots, everything follows from the inner products of
the snapshots, their Gram matrix G with m + 1 rows: it contains X^T X = V S^2 V^T and X^T Y, and U^T Y V S^-1 =
S^-1 V^T (X^T Y) V S^-1. A new snapshot changes one row and one column of G, with new inner products, so nothing drifts.
Inner products are sums over coordinates, so G is a sum over tensors and shards.

Where the paper is silent: eigenvalues are sorted by descending (modulus, imaginary part, real part); where X has fewer
than R directions, or anything is not finite, the rest is 0; no gradient flows through any of it, since the derivatives
of eigenvalues do not exist where two of them meet. Sums run in float64 (for R = 1, which is insensitive to rounding, in
blocks of the parameters' own dtype), as does the small eigenvalue problem.

The sketch is for large nets, and only for R = 1: 1,024 numbers for 6,370 coordinates leave an error of 1e-4 to 2e-3 in
a raw eigenvalue, a tenth to a quarter of how much it moves, and lose the directions beyond the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_lopt.rules import features as feats
from lightning_lopt.rules.constants import constant
from lightning_lopt.rules.shards import dtensor, whole

METHODS = ("gram", "svd", "sketch")
SNAPSHOTS = ("raw", "increments", "shifted")
SKETCH_SIZE = 1024

# Directions whose squared singular value, relative to the largest, is below this are rounding errors: for a Gram matrix
# in float64, and for a singular value decomposition in float64.
_GRAM_NOISE, _SVD_NOISE = 1e-13, 1e-26


def eigenvalues(snapshots: Tensor, rank: int, *, method: str = "gram") -> Tensor:
    """The DMD eigenvalues of a trajectory: complex128 (rank,), sorted by falling modulus, 0 where there are fewer.

    Args:
        snapshots: (n, m + 1) real, columns oldest first.
        rank: R, at most m.
        method: "gram", exact, from inner products, with a projection that makes it as accurate as "svd"; "svd", the
            definition, for reference; "sketch", approximate, from 1,024 random combinations of the coordinates if
            there are more.

    Raises:
        ValueError: for snapshots of another shape, a rank out of range or an unknown method.

    Example:
        >>> import torch
        >>> trajectory = torch.stack([torch.tensor([0.5, 0.9]) ** k for k in range(6)], dim=1)
        >>> eigenvalues(trajectory, 2).real
        tensor([0.9000, 0.5000], dtype=torch.float64)
    """
    if snapshots.dim() != 2 or snapshots.shape[1] < 2 or not snapshots.is_floating_point():
        raise ValueError(
            f"snapshots of shape {tuple(snapshots.shape)} and {snapshots.dtype} are not allowed: they must be a real "
            "matrix (n, m + 1), columns oldest first, m >= 1."
        )
    if not 1 <= rank < snapshots.shape[1]:
        raise ValueError(f"rank={rank!r} is not allowed: it must be an integer from 1 to m = {snapshots.shape[1] - 1}.")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not allowed: use one of {list(METHODS)}.")
    points = _finite_or_zero(snapshots.detach().double())
    if method == "sketch" and len(points) > SKETCH_SIZE:
        points = sketch(points, _signs(len(points), points.device), SKETCH_SIZE)
    reduced = _reduced_by_svd(points, rank) if method == "svd" else _reduced_by_projection(points, rank)
    return _sorted_eigenvalues(reduced)


def eigenvalues_from_gram(gram: Tensor, rank: int) -> Tensor:
    """The DMD eigenvalues from the inner products (m + 1, m + 1) of the snapshots, oldest first: complex128 (rank,).

    The error is about (s_1 / s_R)^2 times the precision of `gram`, s being the singular values of X.
    """
    gram = _finite_or_zero(gram.detach().double())
    basis = _whitening(gram[:-1, :-1], rank)
    return _sorted_eigenvalues(basis.mT @ gram[:-1, 1:] @ basis)


def features(values: Tensor, scale: float = 0.0) -> Tensor:
    """Eigenvalues as real inputs of a network: the real part of a single one, else (real, |imaginary|) of each.

    Args:
        values: (R,) complex.
        scale: s > 0 gives s (value - 1) instead, which separates values near 1; 0 (padding) stays 0.
    """
    parts = torch.stack([values.real, values.imag.abs()], dim=-1)
    if scale:
        one = constant((1.0, 0.0), parts.dtype, parts.device)
        parts = torch.where((values != 0).unsqueeze(-1), scale * (parts - one), 0.0)
    return parts[:, 0] if len(values) == 1 else parts.flatten()


class Window(NamedTuple):
    """The last m + 1 values of one tensor: k = m + 1 rows of raw snapshots, or k = m rows of increments."""

    snapshots: Tensor  # (k, *shape) ring buffer; (k, sketch_size) with a sketch
    last: Tensor  # (*shape) the last value, or its sketch, to subtract from the next; (0,) for raw snapshots
    gram: Tensor  # (2, k, k) inner products, oldest first, each as a sum of two numbers for precision
    losses: Tensor  # (m + 1,) oldest first; (0,) without the loss
    signs: Tensor  # (n,) int8 of the sketch; (0,) without one
    seen: Tensor  # () int64 values so far


@dataclasses.dataclass(frozen=True)
class OnlineDMD:
    """The eigenvalues of the last m + 1 values of a set of tensors, from one matrix-vector product per tensor and step.

    A pure function of one `Window` per tensor, also under `torch.func.vmap`. Memory: m + 1 copies of the tensors, 44 to
    404 bytes per float32 parameter for m = 10 to 100; the method "sketch" keeps (m + 1) `sketch_size` numbers per
    tensor and a byte per parameter. Snapshots of sharded tensors (DTensor) are sharded; for a sketch, tensors are
    gathered one at a time.
    """

    rank: int = 1
    """R: number of eigenvalues."""
    num_snapshots: int = 100
    """m: a window has m + 1 values; eigenvalues are 0 until it is full."""
    snapshots: str = "raw"
    """"raw" values; their m "increments"; or "shifted": their differences from the oldest of the window."""
    method: str = "gram"
    """"gram", "sketch", or for reference "svd", which decomposes all snapshots at each step."""
    sketch_size: int = SKETCH_SIZE
    """Size of the snapshots of a larger tensor with the method "sketch"."""
    loss_scale: float = 0.0
    """The loss times this is another coordinate of a snapshot; 0 leaves it out."""

    def init(self, param: Tensor) -> Window:
        """An empty window in the dtype and on the device of `param`."""
        rows = self.num_snapshots + (self.snapshots == "raw")
        none = torch.zeros(0, dtype=param.dtype, device=param.device)  # not of `param`, which may be sharded
        buffer, signs = param.new_zeros((rows, *param.shape)), none.to(torch.int8)
        if self._sketches(param):
            buffer, signs = none.new_zeros((rows, self.sketch_size)), _signs(param.numel(), param.device)
        last = none if self.snapshots == "raw" else torch.zeros_like(buffer[0])
        losses = none.new_zeros(self.num_snapshots + 1 if self.loss_scale else 0)
        seen = torch.zeros((), dtype=torch.int64, device=param.device)
        return Window(buffer, last, none.new_zeros((2, rows, rows)), losses, signs, seen)

    def num_bytes(self, param: Tensor) -> int:
        """Bytes that the snapshots of a tensor take on this device."""
        rows, size = self.num_snapshots + 1, torch.finfo(torch.promote_types(param.dtype, torch.float32)).bits // 8
        if self._sketches(param):
            return rows * self.sketch_size * size + param.numel()
        return rows * _local(param).numel() * size

    def push(
        self,
        windows: Sequence[Window],
        values: Sequence[Tensor],
        loss: Tensor | None = None,
        *,
        in_place: bool = False,
    ) -> list[Window]:
        """Add a value of each tensor, and drop the oldest.

        Args:
            windows: one per tensor.
            values: of the shapes and dtypes that the windows were made for.
            loss: () at these values; needed if `loss_scale` is not 0.
            in_place: write into the ring buffers of `windows` instead of copying them. Everything else is new, so the
                same values can be pushed to `windows` again.
        """
        if self.loss_scale and loss is None:
            raise ValueError(f"loss_scale={self.loss_scale} puts the loss into the snapshots: pass a loss.")
        # Small tensors are stacked: a few operations per tensor instead of some thirty.
        device = windows[0].gram.device
        seen = torch.stack([window.seen.to(device) for window in windows])
        age = torch.arange(windows[0].gram.shape[-1], device=device)
        slots = seen % len(age)
        buffers, lasts, products = [], [], []
        for window, value, slot in zip(windows, values, slots, strict=True):
            row, last = self._row(window, value.detach())
            buffers.append(_write(window.snapshots, slot.to(row.device), row, in_place))
            products.append(_own_products(buffers[-1], row, precise=self.rank > 1))
            lasts.append(last)
        products = [product.to(device) for product in _summed_over_shards(products, buffers)]
        newest = torch.stack(products).gather(1, (slots.unsqueeze(1) + 1 + age) % len(age))
        grams = _shifted(torch.stack([window.gram.to(device) for window in windows]), newest)
        losses = torch.stack([window.losses.to(device) for window in windows])
        if loss is not None and self.loss_scale:
            losses = torch.cat([losses[:, 1:], loss.detach().to(losses).expand(len(windows), 1)], dim=1)
        return [
            Window(buffer, last, gram.to(w.gram), past.to(w.losses), w.signs, w.seen + 1)
            for buffer, last, gram, past, w in zip(buffers, lasts, grams, losses, windows, strict=True)
        ]

    def eigenvalues(self, windows: Sequence[Window]) -> Tensor:
        """Eigenvalues of all full windows together: complex128 (rank,); zeros if no window is full."""
        device = windows[0].gram.device
        full = torch.stack([window.seen.to(device) for window in windows]) > self.num_snapshots
        if self.method == "svd":
            points = [torch.where(f, self._points(w).to(device), 0.0) for f, w in zip(full, windows, strict=True)]
            points += [self._loss_rows(full, windows)] if self.loss_scale else []
            return eigenvalues(torch.cat(points), self.rank, method="svd")
        grams = torch.stack([window.gram.to(device) for window in windows]).double().sum(1)
        gram = torch.where(full[:, None, None], grams, 0.0).sum(0)
        if self.snapshots == "shifted":  # a difference from the oldest value is a sum of increments
            gram = pad(gram.cumsum(0).cumsum(1), (1, 0, 1, 0))
        if self.loss_scale:
            loss_rows = self._loss_rows(full, windows)
            gram = gram + loss_rows.mT @ loss_rows
        return eigenvalues_from_gram(gram, self.rank)

    def _row(self, window: Window, value: Tensor) -> tuple[Tensor, Tensor]:
        """The snapshot of a value, and the value to subtract from the next one."""
        if self._sketches(value):
            value = sketch(whole(value).reshape(-1), window.signs, self.sketch_size)
        # A copy: `value` may be a parameter, which is about to move.
        return (value, window.last) if self.snapshots == "raw" else (value - window.last, value.clone())

    def _sketches(self, param: Tensor) -> bool:
        return self.method == "sketch" and param.numel() > self.sketch_size

    def _points(self, window: Window) -> Tensor:
        """(n, columns) float64: the snapshots, oldest first."""
        rows = whole(window.snapshots)
        order = (window.seen + torch.arange(len(rows), device=rows.device)) % len(rows)
        points = rows.reshape(len(rows), -1)[order].double().mT
        return pad(points.cumsum(1), (1, 0)) if self.snapshots == "shifted" else points

    def _loss_rows(self, full: Tensor, windows: Sequence[Window]) -> Tensor:
        """(len(windows), columns) float64: rows whose Gram matrix is that of the loss, averaged over the full windows.

        Unless a tensor skipped a step, all tensors have seen the same losses, which must count once, not per tensor.
        """
        rows = torch.stack([window.losses.to(full.device).double() for window in windows])
        weights = full.double()
        rows = self.loss_scale * (weights / weights.sum().clamp(min=1)).sqrt().unsqueeze(1) * rows
        if self.snapshots == "increments":
            return rows.diff(dim=1)
        return rows - rows[:, :1] if self.snapshots == "shifted" else rows


def _own_products(rows: Tensor, value: Tensor, *, precise: bool) -> Tensor:
    """Inner products of each row (k, *shape) with a tensor (*shape), of this process's shards: (k,) float64.

    If not precise, multiply in the dtype of the rows, and sum blocks in float64. For a million float32 numbers the
    error of the eigenvalue (R = 1) is then 1e-7; with one long sum it would be 5e-6.
    """
    vector = _local(value).reshape(-1)
    matrix = _local(rows).reshape(len(rows), vector.numel())
    # On a CPU, blocks that fit the cache while they are converted; elsewhere as few blocks as memory allows.
    block = 2**15 if precise else 2**18
    block = block if matrix.device.type == "cpu" else max(block, 2**24 // len(matrix))
    blocks = [(matrix, vector)]
    if vector.numel() > block:  # splitting a small tensor takes longer than the products
        blocks = list(zip(torch.split(matrix, block, dim=1), torch.split(vector, block), strict=True))
    products = [a.double() @ b.double() if precise else _product(a, b).double() for a, b in blocks]
    return sum(products[1:], products[0])


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector; on accelerators as a sum, which does not use TF32."""
    return matrix @ vector if matrix.device.type == "cpu" else (matrix * vector).sum(1)


def sketch(points: Tensor, signs: Tensor, size: int) -> Tensor:
    """A random linear map (n, *rest) -> (size, *rest) that preserves inner products up to noise of size sqrt(2 / size).

    Coordinate i is added to number i mod size with a random sign: a count sketch (Charikar et al. 2002), two operations
    per coordinate.
    """
    signed = points * signs.to(points.dtype).reshape(-1, *[1] * (points.dim() - 1))
    missing = -len(signed) % size
    signed = torch.cat([signed, signed.new_zeros((missing, *signed.shape[1:]))])
    return signed.reshape(-1, size, *signed.shape[1:]).sum(0)


def _signs(number: int, device: torch.device) -> Tensor:
    """(number,) int8 of +-1, always the same: the last bit of a hash of the index."""
    mixed = torch.arange(number, device=device)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):  # "lowbias32", C. Wellons' hash of 32 bits
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return (1 - 2 * (mixed & 1)).to(torch.int8)


def _write(buffer: Tensor, slot: Tensor, row: Tensor, in_place: bool) -> Tensor:
    if in_place:
        local, new = _local(buffer), _local(row)
        if slot.device.type == "cpu":  # no device to wait for, and three times as fast as an indexed copy
            local[int(slot)].copy_(new)
        else:
            local.index_copy_(0, slot.reshape(1), new.unsqueeze(0))
        return buffer
    chosen = (torch.arange(len(buffer), device=slot.device) == slot).reshape(-1, *[1] * row.dim())
    return feats.on_shards(lambda old, new: torch.where(chosen, new, old), buffer, row.unsqueeze(0))


def _shifted(grams: Tensor, newest: Tensor) -> Tensor:
    """Gram matrices (tensors, 2, k, k) without the oldest snapshot, with products (tensors, k) of the newest."""
    high = newest.to(grams.dtype)
    parts = torch.stack([high, (newest - high.double()).to(high.dtype)], dim=1).unsqueeze(3)
    kept = torch.cat([grams[:, :, 1:, 1:], parts[:, :, :-1]], dim=3)
    return torch.cat([kept, parts.mT], dim=2)


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor (DTensor); a plain tensor as it is."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def _summed_over_shards(partials: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Sums over this rank's shards of the tensors `like` -> sums over all ranks; one message for each layout.

    Ranks exchange nothing anywhere else.
    """
    sums, alike = list(partials), cast(dict[Any, list[int]], {})
    for number, tensor in enumerate(cast(Sequence[Any], like)):
        if hasattr(tensor, "placements"):
            shards = tuple(placement.is_shard() for placement in tensor.placements)
            alike.setdefault((tensor.device_mesh, shards, partials[number].shape), []).append(number)
    for (mesh, shards, _), numbers in alike.items():
        sharding = dtensor()
        stacked = torch.stack([partials[number] for number in numbers])
        placements = [sharding.Partial() if shard else sharding.Replicate() for shard in shards]
        total = whole(sharding.DTensor.from_local(stacked, mesh, placements, run_check=False))
        sums = [total[numbers.index(number)] if number in numbers else each for number, each in enumerate(sums)]
    return sums


def _finite_or_zero(tensor: Tensor) -> Tensor:
    """The tensor, or zeros if any of it is not finite, which eigenvalue solvers refuse."""
    return torch.where(tensor.isfinite().all(), tensor, 0.0)


def _whitening(square: Tensor, rank: int) -> Tensor:
    """V S^-1 (m, rank) of X^T X = V S^2 V^T, largest first; with a column of zeros for each direction that is noise."""
    squares, vectors = torch.linalg.eigh(square)
    squares, vectors = squares.flip(0)[:rank], vectors.flip(1)[:, :rank]
    kept = squares > _GRAM_NOISE * squares[:1]
    inverse = torch.where(kept, torch.where(kept, squares, 1.0).rsqrt(), 0.0)
    whitening: Tensor = vectors * inverse
    return whitening


def _reduced_by_projection(points: Tensor, rank: int) -> Tensor:
    """U^T Y V S^-1 in the basis X V S^-1, of float64 points.

    The Gram matrix gives V. Projecting on X V, instead of using S, leaves the error of a singular value decomposition,
    s_1 / s_R times the precision; the Gram matrix alone would leave (s_1 / s_R)^2 times it.
    """
    past, future = points[:, :-1], points[:, 1:]
    basis = _whitening(_finite_or_zero(past.mT @ past), rank)
    directions = past @ basis
    square = directions.mT @ directions
    empty = torch.diag((square.diagonal() == 0).to(square.dtype))
    reduced: Tensor = torch.linalg.solve(square + empty, directions.mT @ (future @ basis))
    return reduced


def _reduced_by_svd(points: Tensor, rank: int) -> Tensor:
    past, future = points[:, :-1], points[:, 1:]
    left, values, right = torch.linalg.svd(past, full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    kept = values**2 > _SVD_NOISE * values[:1] ** 2
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    reduced = kept.unsqueeze(1) * (left.mT @ future @ right.mT) * inverse
    missing = rank - len(values)  # fewer coordinates than eigenvalues
    return pad(reduced, (0, missing, 0, missing))


def _sorted_eigenvalues(reduced: Tensor) -> Tensor:
    reduced = _finite_or_zero(reduced)
    if len(reduced) == 1:  # a real number
        return torch.complex(reduced[0], torch.zeros_like(reduced[0]))
    values: Tensor = torch.linalg.eigvals(reduced)
    for key in (torch.real, torch.imag, _squared_modulus):  # stable sorts: the last key is the primary one
        values = values.gather(0, torch.argsort(key(values), descending=True, stable=True))
    return values


def _squared_modulus(values: Tensor) -> Tensor:
    # torch.abs rounds differently in a vector's last elements, which would separate conjugates.
    return values.real.square() + values.imag.square()
