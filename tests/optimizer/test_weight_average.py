"""The running average against plain means, power functions and torch's AveragedModel."""

import pytest
import torch
from optimizer_cases import assert_close, assert_equal
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_lopt.optimizer.weight_average import WeightAverage, is_in_window, move_toward, sample_share


def samples(number, dtype=torch.float64):
    return torch.randn(number, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def averaged(weights, fraction, num_steps, steps=None):
    average = WeightAverage(fraction)
    for step, weight in zip(steps or range(1, len(weights) + 1), weights, strict=True):
        average.update({"w": weight}, step, num_steps)
    return average.values["w"]


@pytest.mark.parametrize(("fraction", "length"), [(0.1, 30), (0.25, 30), (0.5, 31), (0.99, 7), (1.0, 12), (0.01, 3)])
def test_a_known_length_gives_the_mean_of_the_last_part(fraction, length):
    weights = samples(length)
    window = max(1, int(fraction * length))
    assert_close([averaged(weights, fraction, length)], [weights[-window:].mean(0)], 1e-12)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_an_unknown_length_gives_the_power_function_of_karras(fraction):
    """Weights proportional to s^gamma, gamma + 1 = 1/fraction, up to 1/s; checked by the mean age at the end."""
    steps = torch.arange(1, 5001, dtype=torch.float64)
    powers = steps ** (1 / fraction - 1)
    expected = (powers * steps).sum() / powers.sum()
    assert averaged(steps[:, None], fraction, None).item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_run_that_goes_on_after_its_end_keeps_a_window_of_its_last_part():
    steps = torch.arange(1, 2001, dtype=torch.float64)
    mean = averaged(steps[:, None], 0.2, 100).item()
    assert mean == pytest.approx(averaged(steps[:, None], 0.2, None).item(), rel=1e-3)


def test_samples_that_stand_for_several_steps_count_so():
    weights = samples(10)
    whole = averaged(weights.repeat_interleave(4, 0), 0.5, 40)
    sampled = averaged(weights, 0.5, 40, steps=range(4, 44, 4))
    # The first sample stands for one step: nobody knows how many of its steps were in the window.
    expected = (weights[5] + 4 * weights[6:].sum(0)) / 17
    assert_close([whole], [weights[5:].mean(0)], 1e-12)
    assert_close([sampled], [expected], 1e-12)


def test_a_window_that_moves_away_forgets_its_samples():
    average, weights = WeightAverage(0.5), samples(20)
    for step in range(1, 7):
        average.update({"w": weights[step - 1]}, step, num_steps=8)
    average.update({"w": weights[6]}, 7, num_steps=20)
    assert not average.values
    for step in range(8, 21):
        average.update({"w": weights[step - 1]}, step, num_steps=20)
    assert_close([average.values["w"]], [weights[10:].mean(0)], 1e-12)


def test_it_is_torchs_averaged_model():
    net = nn.Linear(5, 3)
    theirs, ours = AveragedModel(net), WeightAverage(1.0)
    for step in range(1, 9):
        with torch.no_grad():
            for param in net.parameters():
                param.add_(torch.randn_like(param))
        theirs.update_parameters(net)
        ours.update({name: p.detach() for name, p in net.named_parameters()}, step, num_steps=8)
    assert_close(list(ours.values.values()), [p.detach() for p in theirs.module.parameters()], 1e-6)


def test_low_precision_is_averaged_in_float32():
    """In bfloat16 a share below 1/256 would be lost."""
    weights = samples(2000, torch.bfloat16)
    average = averaged(weights, 1.0, 2000)
    assert average.dtype == torch.float32
    assert_close([average.double()], [weights.double().mean(0)], 1e-5)


def test_tensors_of_several_dtypes_at_once():
    generator = torch.Generator().manual_seed(1)
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float32)
    weights = [torch.randn(4, generator=generator).to(kind) for kind in kinds]
    averages = [torch.randn(4, generator=generator).to(torch.promote_types(k, torch.float32)) for k in kinds]
    expected = [a + 0.25 * (w.to(a.dtype) - a) for a, w in zip(averages, weights, strict=True)]
    move_toward(averages, weights, 0.25)
    assert_close(averages, expected, 1e-6)


def test_new_and_reshaped_tensors_start_with_their_first_sample():
    average, weights = WeightAverage(1.0), samples(4)
    average.update({"old": weights[0], "shaped": weights[0]}, 1, 4)
    average.update({"old": weights[1], "shaped": weights[1, :2], "new": weights[1]}, 2, 4)
    assert_close([average.values["old"]], [weights[:2].mean(0)], 1e-12)
    assert_equal([average.values["shaped"], average.values["new"]], [weights[1, :2], weights[1]])


@pytest.mark.parametrize("num_steps", [None, 1, 2, 3, 10, 1000])
@pytest.mark.parametrize("fraction", [1e-6, 0.1, 0.5, 1.0])
def test_shares_are_in_their_interval(num_steps, fraction):
    first = None
    for step in range(1, 1500):
        if is_in_window(step, num_steps, fraction):
            first = step - 1 if first is None else first
            assert 0 < sample_share(step, step - 1, first, fraction) <= 1
    assert first is not None
    assert num_steps is None or first < num_steps
