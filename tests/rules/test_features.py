"""Accumulators and features, against the authors' recorded ones."""

import math

import goldens
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lopt.rules import features as feats
from lightning_lopt.rules import scheduled
from lightning_lopt.rules.shards import TensorShard, Unknown, means

PRECISIONS = ("f64", "f32")
RECORDED_STEPS = (0, 10)


def in_reference_order(features: feats.Features, shape: tuple[int, ...]) -> Tensor:
    """(28, *shape) from the three groups."""
    full = torch.full((feats.NUM_CHANNELS, *shape), math.nan, dtype=features.dense.dtype)
    for rows, channels in zip((feats.DENSE, feats.ROW, feats.COL), features, strict=True):
        full[list(rows)] = channels.expand(len(rows), *shape)
    return full


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), None),
        ((7,), None),
        ((5, 3), (1, 0)),
        ((4, 3, 2), (1, 0)),
        ((6, 6), (0, 1)),
        ((2, 2, 2), (1, 2)),
        ((3, 3, 64, 64), (2, 3)),
        ((3, 3, 4, 8), (2, 3)),
        ((64, 32, 3, 3), (1, 0)),
        ((64, 64, 3, 3), (0, 1)),
        ((1, 1, 64, 64), (2, 3)),
        ((3, 3, 1, 1), (0, 1)),  # the authors' unstable sort gives (1, 0) on some platforms
    ],
)
def test_factored_dims(shape, expected):
    assert feats.factored_dims(shape, "jax") == expected


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5).map(tuple))
def test_factored_dims_are_the_two_largest_by_a_stable_sort(shape):
    d1, d0 = feats.factored_dims(shape, "jax")
    assert [shape[d1], shape[d0]] == sorted(shape)[-2:]
    assert [d1, d0] == np.argsort(shape, kind="stable")[-2:].tolist()


@pytest.mark.parametrize("leaf", goldens.LEAVES)
def test_factored_dims_are_the_recorded_ones(leaf):
    recorded = goldens.INPUTS[f"mixed/factored_dims/{leaf}"].tolist()
    shape = goldens.INPUTS[f"mixed/params0/{leaf}"].shape
    assert list(feats.factored_dims(shape, "jax") or ()) == recorded
    assert feats.init_accumulators(torch.zeros(shape), "jax").factored_dims.tolist() == recorded


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", goldens.CONFIGS)
def test_effective_decays_are_the_recorded_ones(name, precision):
    golden = goldens.load(name, precision)
    rule = golden.rule()
    for which, decay in rule.decays(rule.meta_params())._asdict().items():
        torch.testing.assert_close(decay, golden.recorded("decay", which), rtol=0, atol=golden.tolerance)


def test_an_offset_shifts_log_one_minus_decay():
    offset = torch.tensor([0.1, -0.1], dtype=torch.float64)
    expected = [1 - 0.1 * math.e, 1 - 0.01 / math.e]
    torch.testing.assert_close(feats.effective_decay((0.9, 0.99), offset).tolist(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("leaf", goldens.LEAVES)
def test_features_are_the_recorded_ones(leaf, precision):
    golden = goldens.load("star_paper", precision)
    tolerance = {"rtol": golden.tolerance, "atol": golden.tolerance}
    for step, grad, param, state, _ in goldens.replay(golden, leaf, max(RECORDED_STEPS) + 1):
        if step in RECORDED_STEPS:
            raw = in_reference_order(feats.input_features(state, grad, param, layout="jax"), grad.shape)
            mean_squares = raw.square().reshape(len(raw), -1).mean(1).reshape(-1, *[1] * grad.dim())
            normalized = raw / (1e-5 + mean_squares).sqrt()
            torch.testing.assert_close(raw, golden.channels(f"feat_raw/{step}", leaf, grad.shape), **tolerance)
            torch.testing.assert_close(normalized, golden.channels(f"feat_norm/{step}", leaf, grad.shape), **tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("step", RECORDED_STEPS)
def test_time_features_are_the_recorded_ones(step, precision):
    golden = goldens.load("star_paper", precision)
    recorded = golden.recorded("time_embed", str(step))
    # The reference computes them in float32 whatever the rest is in.
    torch.testing.assert_close(feats.time_features(torch.tensor(step), golden.dtype), recorded, rtol=0, atol=1e-7)


def test_a_channel_constant_along_a_dim_is_normalized_without_being_spread_out():
    channels = torch.rand(6, 5, 1, dtype=torch.float64)
    (mean_squares,) = means(None, feats.mean_square_of(channels))
    torch.testing.assert_close(mean_squares, channels.expand(6, 5, 4).square().mean((1, 2)), rtol=0, atol=1e-15)


def test_features_of_a_factored_tensor_keep_their_rows_and_columns_small():
    param = torch.rand(5, 4, 3)
    state = feats.update_accumulators(
        feats.init_accumulators(param),
        param,
        feats.Decays(torch.tensor([0.9, 0.99, 0.999]), torch.tensor([0.999]), torch.tensor([0.9, 0.99, 0.999])),
    )
    features = feats.input_features(state, param, param)
    assert features.dense.shape == (16, 5, 4, 3)
    assert features.row.shape == (6, 1, 4, 3)
    assert features.col.shape == (6, 5, 1, 3)


def test_the_groups_of_channels_cover_the_reference_order_once():
    assert sorted((*feats.DENSE, *feats.ROW, *feats.COL)) == list(range(feats.NUM_CHANNELS))


# --- centered gradients ---


def test_a_centered_gradient_is_that_of_inputs_less_their_means():
    """The law behind it: a linear layer's gradient, centered, is that of every sample's inputs less their own mean."""
    inputs, back = torch.randn(50, 7) + 3, torch.randn(50, 4)
    grad = back.T @ inputs
    expected = back.T @ (inputs - inputs.mean(1, keepdim=True))
    torch.testing.assert_close(scheduled.centered(grad, torch.tensor(1.0)), expected, rtol=1e-4, atol=1e-4)
    half = scheduled.centered(grad, torch.tensor(0.5))
    torch.testing.assert_close(half, (grad + expected) / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (5,), (1, 1), (4, 1), (3, 6), (2, 3, 3, 3), (0, 3), (3, 0)], ids=str)
def test_centering_leaves_vectors_zeros_and_shares_of_0_alone(shape):
    grad = torch.randn(shape) + 1
    grad[torch.rand(shape) < 0.5] = 0.0
    assert torch.equal(scheduled.centered(grad, torch.tensor(0.0)), grad)
    found = scheduled.centered(grad, torch.tensor(0.75))
    assert torch.equal(found[grad == 0], grad[grad == 0])
    if len(shape) < 2:
        assert torch.equal(found, grad)
    elif grad.numel():
        rows = grad.flatten(1)
        expected = torch.where(rows == 0, rows, rows - 0.75 * rows.mean(1, keepdim=True)).reshape(shape)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("split", [0, 1])
def test_a_part_is_centered_by_the_means_of_whole_rows(split):
    grad, share = torch.randn(6, 4, 3) + 1, torch.tensor(0.6)
    expected, shape = scheduled.centered(grad, share), [6, 4, 3]
    halves = grad.chunk(2, split)
    parts = []
    for number, half in enumerate(halves):
        start = [0, 0, 0]
        start[split] = number * half.shape[split]
        parts.append(TensorShard(shape, start, half.shape, [split]))
    if split:  # each asks for what the others have
        shares = []
        for part, half in zip(parts, halves, strict=True):
            with pytest.raises(Unknown) as caught:
                scheduled.centered(half, share, part)
            shares.append(caught.value.sums[0])
        for part in parts:
            part.asked, part.known = 0, [[sum(shares)]]
    found = [scheduled.centered(half, share, part) for part, half in zip(parts, halves, strict=True)]
    torch.testing.assert_close(torch.cat(found, split), expected)
    assert all(bool(part.asked) == bool(split) for part in parts)
