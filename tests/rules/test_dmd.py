"""Eigenvalues of Dynamic Mode Decomposition: against NumPy's singular value decomposition, and online against batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap

from lightning_lopt.rules import dmd
from lightning_lopt.rules.dmd import OnlineDMD, Window, eigenvalues

EXACT = ("gram", "svd")
FORMS = {
    "raw": lambda window: window,
    "increments": lambda window: np.diff(window, axis=1),
    "shifted": lambda window: window - window[:, :1],
}


def reference(snapshots: np.ndarray, rank: int) -> np.ndarray:
    """The definition: eigenvalues of U^T Y V S^-1 with the `rank` largest singular triplets of X."""
    past, future = snapshots[:, :-1], snapshots[:, 1:]
    left, values, right = np.linalg.svd(past, full_matrices=False)
    reduced = left[:, :rank].T @ future @ right[:rank].T / values[:rank]
    return in_order(np.linalg.eigvals(reduced))


def in_order(values: np.ndarray) -> np.ndarray:
    """By falling modulus, then imaginary part; moduli that differ by rounding alone are equal."""
    return np.array(sorted(values, key=lambda value: (-round(abs(value), 9), -value.imag, -value.real)))


def system(spectrum: list[complex], size: int, num_snapshots: int, seed: int = 0) -> np.ndarray:
    """(size, num_snapshots + 1) exact trajectory of a linear map with this spectrum, a pair for each complex number."""
    rng = np.random.default_rng(seed)
    blocks = [
        np.array([[v.real, v.imag], [-v.imag, v.real]]) if isinstance(v, complex) else np.array([[v]]) for v in spectrum
    ]
    dim = sum(len(block) for block in blocks)
    matrix, at = np.zeros((dim, dim)), 0
    for block in blocks:
        matrix[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    modes = [rng.normal(size=dim)]
    for _ in range(num_snapshots):
        modes.append(matrix @ modes[-1])
    return rng.normal(size=(size, dim)) @ np.stack(modes, axis=1)


def spectrum_of(spectrum: list[complex]) -> np.ndarray:
    pairs = [[v, v.conjugate()] if isinstance(v, complex) else [v] for v in spectrum]
    return in_order(np.array([value for pair in pairs for value in pair]))


def trained(name: str, num_steps: int) -> Tensor:
    """(6370, num_steps) float32: the parameters of a 784-8-10 net on synthetic data, under a torch optimizer."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(1000, 784, generator=generator) * torch.rand(784, generator=generator)
    targets = (inputs @ torch.randn(784, 10, generator=generator)).argmax(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(784, 8), nn.Sigmoid(), nn.Linear(8, 10))
    options = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {"lr": 1e-2}}[name]
    optimizer = getattr(torch.optim, name)(net.parameters(), **options)
    path = []
    for _ in range(num_steps):
        path.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        batch = torch.randint(0, 1000, (128,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    return torch.stack(path, dim=1)


@pytest.fixture(scope="module", params=["SGD", "Adam"])
def path(request) -> Tensor:
    return trained(request.param, 140)


def assert_near(values: Tensor, expected: np.ndarray, tolerance: float) -> None:
    assert values.dtype == torch.complex128
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=tolerance)


# --- a whole trajectory


SPECTRA = [
    [0.98],
    [0.95, 0.9 + 0.2j],
    [-0.9 + 0.3j, 0.5 - 0.5j],
    [1.05, 0.3, 0.9 + 0.1j],
    [0.99, 0.95, 0.9, 0.8, 0.5],
    [0.99, 0.98, 0.97, 0.96],
    [1.0, -0.999, 0.998j],
]


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("num_snapshots", [12, 40])
@pytest.mark.parametrize("spectrum", SPECTRA, ids=str)
def test_finds_the_spectrum_of_a_linear_system(spectrum, num_snapshots, method):
    expected = spectrum_of(spectrum)
    snapshots = system(spectrum, 300, num_snapshots)
    values = eigenvalues(torch.tensor(snapshots), len(expected), method=method)
    assert_near(values, expected, 1e-8)
    assert_near(values, reference(snapshots, len(expected)), 1e-8)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 60), num=st.integers(1, 12), share=st.floats(0, 1))
def test_equals_the_definition_on_any_trajectory(seed, size, num, share):
    """A random walk, whose singular values differ: with equal ones the rank-R eigenvalues are not defined."""
    rng = np.random.default_rng(seed)
    snapshots = np.cumsum(rng.normal(size=(size, num + 1)), axis=1) + share * rng.normal(size=(size, 1))
    rank = 1 + int(share * (min(num, size) - 1))
    singular = np.linalg.svd(snapshots[:, :-1], compute_uv=False)
    gap = singular[rank - 1] - singular[rank] if rank < len(singular) else singular[rank - 1]
    if gap < 1e-3 * singular[0]:
        return
    expected = reference(snapshots, rank)
    for method in EXACT:
        values = in_order(eigenvalues(torch.tensor(snapshots), rank, method=method).numpy())
        np.testing.assert_allclose(values, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("num_snapshots", [6, 20])
@pytest.mark.parametrize("spectrum", [[0.99, 0.9, 0.7, 0.3, 0.1], [0.99, 0.95, 0.9, 0.8, 0.5]], ids=str)
def test_ill_conditioned_trajectories_cost_no_more_digits_than_the_definition(spectrum, num_snapshots):
    """Where a Gram matrix alone has an error of cond^2 times the precision: 1e-6 at cond 1e5."""
    snapshots = system(spectrum, 500, num_snapshots)
    singular = np.linalg.svd(snapshots[:, :-1], compute_uv=False)
    cond, tensor = singular[0] / singular[4], torch.tensor(snapshots)
    for method in EXACT:
        assert_near(eigenvalues(tensor, 5, method=method), np.array(spectrum), 1e-15 * cond)
    alone = dmd.eigenvalues_from_gram(tensor.mT @ tensor, 5)
    assert_near(alone, np.array(spectrum), 1e-15 * cond**2)


@pytest.mark.parametrize("num_snapshots", [10, 50])
def test_float32_trajectories_stay_within_measured_bounds(path, num_snapshots):
    """Bounds that a float32 Gram matrix was measured to keep on such paths (systems.md, F2); ours sums in float64."""
    bounds = {1: 9e-9, 3: 2e-4 if num_snapshots == 10 else 9e-6, 5: 2e-2 if num_snapshots == 10 else 5e-5}
    for rank, bound in bounds.items():
        for end in (num_snapshots + 1, 100, 140):
            window = path[:, end - num_snapshots - 1 : end]
            expected = reference(window.double().numpy(), rank)
            assert_near(eigenvalues(window, rank), expected, min(bound, 1e-8))


def test_the_sketch_is_near_where_the_first_direction_stands_out(path):
    """Measured: 2e-3 for one raw eigenvalue of 6,370 coordinates; small ones are lost (see the module's docstring)."""
    for end in (60, 100, 140):
        window = path[:, end - 51 : end]
        assert_near(eigenvalues(window, 1, method="sketch"), reference(window.double().numpy(), 1), 5e-3)


def test_the_sketch_of_a_small_trajectory_is_exact():
    snapshots = torch.tensor(system([0.9, 0.5], 1024, 6))
    assert torch.equal(eigenvalues(snapshots, 2, method="sketch"), eigenvalues(snapshots, 2))


def test_sketched_inner_products_are_unbiased_and_as_noisy_as_they_should_be():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 40_000, generator=generator).T.double()
    points = points / points.norm(dim=0)
    signs = dmd._signs(40_000, points.device)
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(signs.double().mean()) < 3 / math.sqrt(40_000)
    error = dmd.sketch(points, signs, 256).square().sum(0) - 1
    assert error.mean().abs() < 3 * math.sqrt(2 / 256) / math.sqrt(200)
    assert error.std() == pytest.approx(math.sqrt(2 / 256), rel=0.2)


# --- conventions


def test_order_is_by_modulus_then_imaginary_part():
    spectrum = [0.2, -0.9, 0.5 + 0.5j, 0.1 - 0.6j]
    values = eigenvalues(torch.tensor(system(spectrum, 50, 20)), 6)
    expected = [-0.9, 0.5 + 0.5j, 0.5 - 0.5j, 0.1 + 0.6j, 0.1 - 0.6j, 0.2]
    assert_near(values, np.array(expected), 1e-9)


def test_conjugates_stay_together_whatever_their_number():
    """torch.abs of a complex vector rounds its last elements otherwise than the others, which once tore pairs apart."""
    for seed in range(40):
        values = eigenvalues(torch.tensor(np.random.default_rng(seed).normal(size=(30, 10))), 9)
        upper = values.imag > 0
        assert torch.equal(values[upper].conj(), values[values.imag < 0])
        assert torch.equal(upper.nonzero() + 1, (values.imag < 0).nonzero())


def test_one_eigenvalue_needs_no_eigensolver(monkeypatch):
    snapshots = torch.tensor(np.random.default_rng(0).normal(size=(30, 6)))
    expected = reference(snapshots.numpy(), 1)
    monkeypatch.setattr(torch.linalg, "eigvals", None)
    for method in EXACT:
        values = eigenvalues(snapshots, 1, method=method)
        assert_near(values, expected, 1e-12)
        assert values.imag == 0


DEGENERATE = {
    "constant": (torch.ones(30, 8), [1, 0, 0, 0]),
    "zero": (torch.zeros(30, 8), [0, 0, 0, 0]),
    "one coordinate": (0.5 ** torch.arange(8.0).reshape(1, 8), [0.5, 0, 0, 0]),
    "two directions": (torch.tensor(system([0.9, 0.4], 30, 7)), [0.9, 0.4, 0, 0]),
    "NaN": (torch.ones(30, 8).index_fill(1, torch.tensor([3]), math.nan), [0, 0, 0, 0]),
    "one NaN": (torch.ones(30, 8).index_put((torch.tensor(2), torch.tensor(7)), torch.tensor(math.nan)), [0] * 4),
    "infinite": (torch.full((30, 8), math.inf), [0, 0, 0, 0]),
    "no coordinate": (torch.zeros(0, 8), [0, 0, 0, 0]),
    "starts moving late": (torch.tensor([[1.0] * 7 + [2.0]]).repeat(5, 1), [8 / 7, 0, 0, 0]),
}


@pytest.mark.parametrize("method", dmd.METHODS)
@pytest.mark.parametrize(("snapshots", "expected"), DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_trajectories_are_padded_with_zeros(snapshots, expected, method):
    assert_near(eigenvalues(snapshots, 4, method=method), np.array(expected), 1e-6)


@pytest.mark.parametrize(("snapshots", "expected"), DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_trajectories_online(snapshots, expected):
    assert_near(last(OnlineDMD(4, 7), run(OnlineDMD(4, 7), snapshots)), np.array(expected), 1e-6)


@pytest.mark.parametrize("exponent", [-300, -150, -30, -15, 15, 30, 150, 300])
def test_extreme_scales_are_finite(exponent):
    snapshots = torch.tensor(system([0.9, 0.4], 30, 7)) * 10.0**exponent
    late = torch.cat([snapshots[:, :-1], torch.ones(30, 1)], dim=1)
    for method in dmd.METHODS:
        for points in (snapshots, snapshots.float(), late, late.float()):
            assert eigenvalues(points, 3, method=method).isfinite().all()
    for dtype in (torch.float32, torch.float64):
        assert last(OnlineDMD(3, 7), run(OnlineDMD(3, 7), snapshots.to(dtype))).isfinite().all()


def test_no_gradient_flows():
    snapshots = torch.ones(5, 4, requires_grad=True)  # repeated eigenvalues, where derivatives would be NaN
    assert not eigenvalues(snapshots, 2).requires_grad
    grad = torch.func.grad(lambda s: eigenvalues(s, 2).real.sum() + s.sum())(snapshots.detach())
    assert torch.equal(grad, torch.ones(5, 4))
    online = OnlineDMD(2, 3)

    def follow(start):
        window = online.init(start)
        for step in range(5):
            window = push(online, window, start * 0.9**step)
        return dmd.features(online.eigenvalues([window])).sum() + start.sum()

    assert torch.equal(torch.func.grad(follow)(torch.rand(3)), torch.ones(3))


def test_features_are_real_parts_or_real_and_absolute_imaginary_parts():
    values = torch.tensor([0.5 + 2j, 0.5 - 2j, 0.0])
    assert dmd.features(values).tolist() == [0.5, 2, 0.5, 2, 0, 0]
    assert dmd.features(values[:1].real + 0j).tolist() == [0.5]
    assert dmd.features(values, 10.0).tolist() == [-5, 20, -5, 20, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4), 1), r"snapshots of shape \(4,\) and torch.float32 are not allowed"),
        ((torch.zeros(4, 1), 1), "must be a real matrix"),
        ((torch.zeros(4, 3, dtype=torch.complex64), 1), "complex64"),
        ((torch.zeros(4, 3), 0), "rank=0 is not allowed: it must be an integer from 1 to m = 2"),
        ((torch.zeros(4, 3), 3), "rank=3"),
        ((torch.zeros(4, 3), 1, "SVD"), r"method='SVD' is not allowed: use one of \['gram', 'svd', 'sketch'\]"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        eigenvalues(*arguments[:2], **({"method": arguments[2]} if len(arguments) == 3 else {}))
    assert "\n" not in str(caught.value)


# --- online


def run(online: OnlineDMD, points: Tensor, losses: Tensor | None = None, **options) -> Window:
    """The window after the columns of `points`."""
    window = online.init(points[:, 0])
    for step in range(points.shape[1]):
        loss = None if losses is None else losses[step]
        window = push(online, window, points[:, step], loss, **options)
    return window


def push(online: OnlineDMD, window: Window, value: Tensor, loss: Tensor | None = None, **options) -> Window:
    (pushed,) = online.push([window], [value], loss, **options)
    return pushed


def last(online: OnlineDMD, window: Window) -> Tensor:
    return online.eigenvalues([window])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_online_equals_batch_over_many_turns_of_the_ring(form, dtype, tolerance, in_place):
    rng = np.random.default_rng(0)
    points = np.cumsum(rng.normal(size=(40, 301)) * np.linspace(1, 9, 40)[:, None], axis=1)
    points = torch.tensor(points).to(dtype)
    for rank in (1, 3):
        online = OnlineDMD(rank, 10, form)
        window = online.init(points[:, 0])
        for step in range(301):
            window = push(online, window, points[:, step], in_place=in_place)
            values = last(online, window)
            if step < 10:
                assert not values.any()
            elif step % 13 == 0 or step > 290:
                expected = reference(FORMS[form](points[:, step - 10 : step + 1].double().numpy()), rank)
                assert_near(values, expected, tolerance)
        assert window.seen == 301


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_online_on_a_real_path_in_float32(path, form, rank):
    """The inner products are kept to 48 bits: a float32 Gram matrix would lose the fifth direction altogether."""
    online = OnlineDMD(rank, 10, form)
    window = online.init(path[:, 0])
    for step in range(60):
        window = push(online, window, path[:, step], in_place=True)
    expected = reference(FORMS[form](path[:, 49:60].double().numpy()), rank)
    assert_near(last(online, window), expected, 2e-6 if rank == 1 else 1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_the_methods_agree_online(form):
    points = torch.tensor(system([0.95, 0.8 + 0.3j], 60, 30))
    values = [last(online, run(online, points)) for online in (OnlineDMD(2, 8, form, m) for m in dmd.METHODS)]
    for other in values[1:]:
        assert_near(other, values[0].numpy(), 1e-8)


def test_a_sketch_online_is_that_of_the_batch():
    points = torch.tensor(system([0.95, 0.8], 3000, 20))
    online = OnlineDMD(1, 8, "raw", "sketch")
    window = run(online, points)
    assert window.snapshots.shape == (9, 1024)
    assert_near(last(online, window), eigenvalues(points[:, -9:], 1, method="sketch").numpy(), 1e-10)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", EXACT)
def test_the_loss_is_one_more_coordinate(form, method, scale):
    rng = np.random.default_rng(0)
    points, losses = rng.normal(size=(20, 25)).cumsum(1), rng.normal(size=25).cumsum()
    online = OnlineDMD(2, 8, form, method, loss_scale=scale)
    values = last(online, run(online, torch.tensor(points), torch.tensor(losses)))
    whole = np.concatenate([points, scale * losses[None]])[:, -9:]
    assert_near(values, reference(FORMS[form](whole), 2), 1e-9)
    halves = [run(online, torch.tensor(part), torch.tensor(losses)) for part in (points[:5], points[5:])]
    assert_near(online.eigenvalues(halves), values.numpy(), 1e-9)


def test_a_loss_that_is_missing_is_an_error():
    online = OnlineDMD(1, 3, loss_scale=1.0)
    with pytest.raises(ValueError, match="puts the loss into the snapshots: pass a loss"):
        push(online, online.init(torch.ones(2)), torch.ones(2))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 40), max_size=4), form=st.sampled_from([*FORMS]))
def test_is_additive_over_shards(seed, cuts, form):
    points = torch.tensor(np.random.default_rng(seed).normal(size=(40, 12)).cumsum(1))
    online = OnlineDMD(2, 6, form)
    whole = run(online, points)
    edges = [0, *sorted(cuts), 40]
    shards = [run(online, points[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    grams = torch.stack([shard.gram.double().sum(0) for shard in shards]).sum(0)
    torch.testing.assert_close(grams, whole.gram.double().sum(0), rtol=1e-12, atol=1e-12)
    assert_near(online.eigenvalues(shards), last(online, whole).numpy(), 1e-7)


def test_a_window_that_is_not_full_is_left_out():
    points = torch.tensor(np.random.default_rng(0).normal(size=(20, 12)).cumsum(1))
    for method in EXACT:
        online = OnlineDMD(2, 6, method=method)
        old, young = run(online, points), run(online, points[:, -4:])
        assert_near(online.eigenvalues([young, old]), last(online, old).numpy(), 1e-12)
        assert not online.eigenvalues([young]).any()


def test_tensors_of_other_precision_count_together():
    points = torch.tensor(np.random.default_rng(0).normal(size=(20, 12)).cumsum(1)).float().double()
    online = OnlineDMD(2, 6)
    windows = [online.init(part[:, 0]) for part in (points[:9], points[9:].float())]
    for step in range(12):
        windows = online.push(windows, [points[:9, step], points[9:, step].float()])
    assert [window.gram.dtype for window in windows] == [torch.float64, torch.float32]
    assert_near(online.eigenvalues(windows), last(online, run(online, points)).numpy(), 1e-6)


def test_in_place_pushes_can_be_taken_back():
    """What the safeguard relies on: an old window takes the same value again, its oldest snapshot being overwritten."""
    points = torch.tensor(np.random.default_rng(0).normal(size=(20, 12)).cumsum(1))
    for form in FORMS:
        online = OnlineDMD(2, 6, form)
        expected = run(online, points)
        window = online.init(points[:, 0])
        for step in range(12):
            push(online, window, points[:, step], in_place=True)
            window = push(online, window, points[:, step], in_place=True)
        for ours, theirs in zip(window, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_a_push_is_pure_unless_it_is_in_place():
    points = torch.tensor(np.random.default_rng(0).normal(size=(4, 12)))
    online = OnlineDMD(2, 6, "increments")
    window = run(online, points)
    before = [tensor.clone() for tensor in window]
    value = torch.ones(4, dtype=torch.float64)
    after = push(online, window, value)
    assert all(torch.equal(a, b) for a, b in zip(before, window, strict=True))
    value.zero_()
    assert after.last.all()  # no alias of a parameter that moves
    assert push(online, window, value, in_place=True).snapshots is window.snapshots


@pytest.mark.parametrize("form", FORMS)
def test_a_population_in_different_stages_equals_a_loop(form):
    points = torch.tensor(np.random.default_rng(0).normal(size=(3, 10, 20)).cumsum(2))
    online = OnlineDMD(2, 5, form)
    windows = [run(online, points[member, :, : 4 + 3 * member]) for member in range(3)]
    together = Window(*(torch.stack(tensors) for tensors in zip(*windows, strict=True)))
    for step in range(4):
        together = vmap(lambda w, p: push(online, w, p))(together, points[:, :, step])
        values = vmap(lambda *window: online.eigenvalues([Window(*window)]))(*together)
        windows = [push(online, window, points[member, :, step]) for member, window in enumerate(windows)]
        assert_near(values, np.stack([last(online, window).numpy() for window in windows]), 1e-9)


def test_a_nan_leaves_the_window_in_the_end():
    points = torch.tensor(np.random.default_rng(0).normal(size=(4, 20)).cumsum(1))
    broken = points.index_fill(1, torch.tensor([9]), math.nan)
    online = OnlineDMD(2, 5)
    for end in range(6, 21):
        values = last(online, run(online, broken[:, :end]))
        assert values.isfinite().all()
        assert bool(values.any()) == (end < 10 or end > 15)
    assert_near(values, last(online, run(online, points)).numpy(), 0)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 2, 2), (0, 3)])
def test_any_shape_in_any_layout(shape):
    online, points = OnlineDMD(1, 2), torch.randn(3, *shape, dtype=torch.float64)
    window = online.init(points[0])
    for point in points:
        dims = tuple(reversed(range(point.dim())))
        window = push(online, window, point.permute(dims).contiguous().permute(dims))
    expected = eigenvalues(points.reshape(3, -1).T, 1) if points.numel() else torch.zeros(1)
    assert_near(last(online, window), expected.numpy(), 1e-9)


@pytest.mark.parametrize("rank", [1, 2])
def test_long_vectors_are_summed_block_by_block(rank):
    points = torch.randn(4, 600_001, generator=torch.Generator().manual_seed(0)).cumsum(0)
    online = OnlineDMD(rank, 3)
    window = online.init(points[0])
    for point in points:
        window = push(online, window, point)
    assert_near(last(online, window), eigenvalues(points.double().T, rank).numpy(), 1e-6)


def test_the_bytes_of_a_window():
    param = torch.zeros(50, 100)
    for online in (OnlineDMD(1, 9), OnlineDMD(1, 9, "increments"), OnlineDMD(1, 9, method="sketch")):
        window = online.init(param)
        kept = [window.snapshots, window.last, window.signs]
        assert sum(tensor.nbytes for tensor in kept) == online.num_bytes(param)
    assert OnlineDMD(1, 9).num_bytes(param.bfloat16()) == 10 * 5000 * 4
