"""What is done to examples when they are drawn."""

import dataclasses

import pytest
import torch

from lightning_lopt import tasks
from lightning_lopt.tasks.transforms import AddNoise, Code, FlipCrop, NoiseLevels, Views, shifted


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(num: int, size: int = 4) -> torch.Tensor:
    """Images whose pixels are all different, and none of them 0."""
    return torch.arange(1.0, num * size * size + 1).reshape(num, 1, size, size)


def test_every_shifted_image_is_a_crop_of_the_padded_one():
    images, pad = numbered(200), 2
    found = shifted(generator(), images, pad, flip=True)
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    kinds = set()
    for image, whole in zip(found, padded, strict=True):
        crops = {(y, x): whole[:, y : y + 4, x : x + 4] for y in range(5) for x in range(5)}
        # Ties are possible where a crop is all padding, which at 2 of 4 pixels it never is.
        matches = {
            (y, x, flip)
            for (y, x), crop in crops.items()
            for flip in (False, True)
            if torch.equal(image, crop.flip(2) if flip else crop)
        }
        assert len(matches) == 1
        kinds |= matches
    assert len(kinds) > 45  # of 50: all offsets, both ways round


def test_no_shift_and_no_flip_change_nothing():
    assert torch.equal(shifted(generator(), numbered(3), 0, flip=False), numbered(3))


@pytest.mark.parametrize("lead", [1, 2])
def test_shapes_and_targets(lead):
    shape = (3, 5)[-lead:]
    x, y = torch.rand(*shape, 1, 4, 4), torch.zeros(shape)
    assert FlipCrop(1)(generator(), x, y, lead)[0].shape == x.shape
    views, same = Views()(generator(), x, y, lead)
    assert views.shape == (*shape, 2, 1, 4, 4)
    assert torch.equal(same, y)
    noisy, clean = AddNoise()(generator(), x, y, lead)
    assert torch.equal(clean, x)
    assert noisy.shape == x.shape
    coded, pixels = Code(6)(generator(), x, y, lead)
    assert torch.equal(coded[..., :16], x.flatten(lead))
    assert coded.shape == (*shape, 22)
    assert torch.equal(pixels, x)


def test_added_noise_has_its_standard_deviation():
    x = torch.rand(2000, 10)
    noisy, _ = AddNoise(0.5)(generator(), x, x, 1)
    assert (noisy - x).std() == pytest.approx(0.5, rel=0.03)
    assert (noisy - x).mean() == pytest.approx(0.0, abs=0.02)


def test_noise_levels_are_log_uniform_and_the_noise_is_the_target():
    x = torch.randn(4000, 2)
    found, noise = NoiseLevels(0.1, 10.0)(generator(), x, x, 1)
    level = found[:, 2:].exp()
    assert ((level >= 0.1) & (level <= 10.0)).all()
    assert level.log10().mean() == pytest.approx(0.0, abs=0.03)
    torch.testing.assert_close(found[:, :2] * (1 + level.square()).sqrt() - level * noise, x, atol=1e-4, rtol=1e-4)
    assert noise.std() == pytest.approx(1.0, rel=0.03)


def test_augmentation_is_for_training_and_noise_for_evaluation_too():
    plain = tasks.make("digits-conv")
    first = plain.eval_batch("valid", {}, size=6)
    augmented = dataclasses.replace(plain, transform=FlipCrop(1))
    assert torch.equal(augmented.eval_batch("valid", {}, size=6).x, first.x)
    drawn = augmented.batch(generator(), {}).x
    assert not torch.equal(drawn, plain.batch(generator(), {}).x)
    noisy = dataclasses.replace(plain, transform=AddNoise(), objective="vector_regression")
    found = noisy.eval_batch("valid", {}, size=6)
    assert not torch.equal(found.x, first.x)
    assert torch.equal(found.y, first.x)
    again = noisy.eval_batch("valid", {}, population=2, size=6)
    assert torch.equal(again.x[1], found.x)  # the same for all members and at each call
