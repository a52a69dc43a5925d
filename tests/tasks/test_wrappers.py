"""Wrapped tasks, and the families that sample them."""

import itertools
import math

import pytest
import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from lightning_lopt import tasks
from lightning_lopt.tasks import datasets, families
from lightning_lopt.tasks.wrappers import LEVELS, ESGradient, Reparametrized, ScaledInit


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(actual, expected) -> None:
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_reparametrizing_changes_units_and_nothing_else(level):
    inner = tasks.make("digits-mlp")
    task = Reparametrized(task=inner, level=level, scale_range=(0.1, 10.0))
    start, plain = task.init(generator(), population=3), inner.init(generator(), population=3)
    batch = task.batch(generator(1), start.constants, population=3)
    assert {name: param.shape for name, param in start.params.items()} == {k: v.shape for k, v in plain.params.items()}
    theta = {name: param * start.constants.scale[name] for name, param in start.params.items()}
    close(theta, plain.params)
    grads, losses = vmap(task.grad_and_value)(start.params, batch)
    expected_grads, expected = vmap(inner.grad_and_value)(plain.params, batch.inner)
    close(losses, expected)
    close(vmap(task.loss)(start.params, batch), expected)
    close(grads, {name: grad * start.constants.scale[name] for name, grad in expected_grads.items()})
    close(vmap(torch.func.grad(task.loss))(start.params, batch), grads)
    held_out = task.eval_batch("test", start.constants, population=3, size=50)
    close(vmap(task.metrics)(start.params, held_out), vmap(inner.metrics)(plain.params, held_out.inner))


def test_what_has_a_scale_of_its_own():
    inner, num = tasks.make("digits-mlp"), 50
    distinct = {}
    for level in LEVELS:
        scale = Reparametrized(task=inner, level=level).init(generator(), population=num).constants.scale
        distinct[level] = len(torch.cat([value.flatten() for value in scale.values()]).unique())
    assert distinct["global"] == num
    assert distinct["tensor"] == 4 * num
    assert distinct["parameter"] > 0.9 * 2410 * num  # float32 has few numbers near 1e-3


def test_scales_are_log_uniform():
    task = Reparametrized(task=tasks.make("rosenbrock"), level="parameter", scale_range=(1e-2, 1e2))
    logs = task.init(generator(), population=20_000).constants.scale["x"].log10()
    assert -2 <= logs.min() < -1.99
    assert 1.99 < logs.max() <= 2.0001
    assert float(logs.mean()) == pytest.approx(0, abs=0.02)
    assert float(logs.std()) == pytest.approx(4 / math.sqrt(12), rel=0.01)


def test_scaled_starts():
    inner = tasks.make("digits-layernorm-mlp")
    start = ScaledInit(task=inner, scale_range=(0.5, 2.0)).init(generator(), population=5)
    plain = inner.init(generator(), population=5).params
    factors = (start.params["layers.0.weight"] / plain["layers.0.weight"])[:, 0, 0]
    assert len(factors.unique()) == 5
    assert ((factors >= 0.5) & (factors <= 2.0)).all()
    for name, param in start.params.items():
        expected = plain[name] * factors.reshape(5, 1, 1) if param.dim() == 3 else plain[name]
        torch.testing.assert_close(param, expected)


def test_the_evolution_strategies_estimate_is_the_formula():
    inner = tasks.make("digits-mlp")
    task = ESGradient(task=inner, pairs=3, std=0.01)
    start = task.init(generator())
    batch = task.batch(generator(1), start.constants)
    grads, loss = task.grad_and_value(start.params, batch)
    expected = {name: torch.zeros_like(param) for name, param in start.params.items()}
    for i in range(3):
        noise = {name: 0.01 * value[i] for name, value in batch.noise.items()}
        plus, minus = (
            inner.loss({k: v + sign * noise[k] for k, v in start.params.items()}, batch.inner) for sign in (1, -1)
        )
        for name, value in noise.items():
            expected[name] += value * (plus - minus) / (2 * 0.01**2) / 3
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-2, atol=1e-3 * float(expected[name].abs().max()))
    assert torch.equal(loss, inner.loss(start.params, batch.inner))
    assert task.loss_cap == inner.loss_cap


def test_the_estimate_is_unbiased():
    """On a quadratic an antithetic estimate is exactly e e^T g, whose mean is g."""
    inner = tasks.make("quadratic", init_std=1.0)
    task = ESGradient(task=inner, pairs=40_000)
    start = task.init(generator())
    batch = task.batch(generator(1), start.constants)
    double = pytree.tree_map(lambda leaf: leaf.double(), (start.params, batch))
    grads, _ = task.grad_and_value(*double)
    exact, _ = inner.grad_and_value(double[0], double[1].inner)
    error = (grads["x"] - exact["x"]).norm() / exact["x"].norm()
    assert error < 4 * math.sqrt(11 / 40_000)  # the estimate's standard deviation: sqrt((dim + 1) / pairs)


def test_wrappers_hand_on_the_estimate():
    """Wrappers around a task with estimated gradients return the inner estimate, not the true gradient."""
    estimated = ESGradient(task=tasks.make("digits-mlp"), pairs=2)
    task = Reparametrized(task=ScaledInit(task=estimated, scale_range=(2.0, 2.0)), level="tensor")
    start = task.init(generator(), population=2)
    batch = task.batch(generator(1), start.constants, population=2)
    grads, _ = vmap(task.grad_and_value)(start.params, batch)
    scale = start.constants.scale
    theta = {name: param * scale[name] for name, param in start.params.items()}
    expected, _ = vmap(estimated.grad_and_value)(theta, batch.inner)
    close(grads, {name: grad * scale[name] for name, grad in expected.items()})
    assert task.splits == estimated.splits
    assert task.name == "digits-mlp"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda task: Reparametrized(task=task, level="layer"), "level='layer' is not allowed: it must be one of"),
        (lambda task: Reparametrized(task=task, scale_range=(2.0, 1.0)), "scale_range=.* is not allowed"),
        (lambda task: ScaledInit(task=task, scale_range=(0.0, 1.0)), "scale_range=.* is not allowed"),
        (lambda task: ESGradient(task=task, std=0.0), "std.*is not allowed"),
    ],
)
def test_wrappers_check_their_options(make, message):
    with pytest.raises(ValueError, match=message):
        make(tasks.make("rosenbrock"))


def needs(family) -> set[str]:
    """The data sets of a family."""
    own = getattr(family, "datasets", (getattr(family, "dataset", None),))
    return {data for data in own if data}.union(*(needs(part) for part in getattr(family, "families", ())))


@pytest.mark.parametrize("name", families.list_families())
def test_tasks_of_a_family(name):
    family = families.make(name)
    if missing := [data for data in needs(family) if not datasets.is_available(data)]:
        pytest.skip(f"{missing} are not here: set {datasets.FOLDER_VARIABLE}")
    global_state = torch.get_rng_state()
    sampled = [family.sample(generator(seed)) for seed in range(8)]
    assert [task.name for task in sampled] == [family.sample(generator(seed)).name for seed in range(8)]
    for task in sampled:
        start = task.init(generator(), population=3)
        grads, losses = vmap(task.grad_and_value)(start.params, task.batch(generator(1), start.constants, population=3))
        assert losses.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads.values())
        assert vmap(task.loss)(start.params, task.eval_batch("test", start.constants, population=3, size=8)).shape == (
            3,
        )
    assert torch.equal(torch.get_rng_state(), global_state)


def test_a_family_varies_architectures_and_its_tasks_their_members():
    family = families.make("small-mlps", augmentations=(("global", (1e-3, 1e3)),))
    sampled = [family.sample(generator(seed)) for seed in range(20)]
    shapes = {tuple(task.param_shapes.values()) for task in sampled}
    assert len(shapes) > 10
    assert {sum("layers" in name for name in task.param_shapes) // 2 - 1 for task in sampled} == {1, 2, 3, 4}
    start = sampled[0].init(generator(), population=4)
    per_member = [start.constants.scale["layers.0.weight"], *start.constants.inner.values()]
    assert len(start.constants.inner) == 3
    assert all(len(value.unique()) > 1 for value in per_member)


def test_every_network_of_a_family_is_drawn():
    family = families.make("small-images", augmentations=(None,))
    kinds = {family.sample(generator(seed)).name.split("-")[1] for seed in range(40)}
    assert kinds == {"conv", "resnet", "vit", "autoencoder"}


def test_a_mixture_keeps_its_weights():
    quadratics, moons = families.make("quadratics"), families.make("small-mlps")
    mixture = families.Mixture(name="m", families=(quadratics, moons), weights=(3.0, 1.0))
    drawn = [mixture.sample(generator(seed)).name for seed in range(400)]
    assert sum("quadratic" in name for name in drawn) == pytest.approx(300, abs=35)
    with pytest.raises(ValueError, match="it must be one number >= 0 for each of the 2 families"):
        families.Mixture(name="m", families=(quadratics, moons), weights=(1.0,))


def test_families_check_their_options():
    with pytest.raises(ValueError, match="family='large' is not allowed: it must be one of"):
        families.make("large")
    with pytest.raises(ValueError, match="Unknown option 'hidden' of family 'small-mlps'; allowed are"):
        families.make("small-mlps", hidden=3)
    with pytest.raises(ValueError, match="network='kan' is not allowed"):
        families.NetworkFamily(name="n", networks=("kan",))


def test_the_augmentations_are_velos():
    """The levels are none, none, global, global, tensor, tensor, parameter; larger groups have wider ranges."""
    levels = [augmentation and augmentation[0] for augmentation in families.AUGMENTATIONS]
    assert levels == [None, None, "global", "global", "tensor", "tensor", "parameter"]
    ranges = dict(augmentation for augmentation in families.AUGMENTATIONS if augmentation)
    assert all(low * high == pytest.approx(1.0) for low, high in ranges.values())
    widths = [ranges[level][1] for level in ("global", "tensor", "parameter")]
    assert all(a > b for a, b in itertools.pairwise(widths))
