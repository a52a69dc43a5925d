"""Properties that every registered task must have, and special properties of some."""

import math
import pickle

import pytest
import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from lightning_lopt import tasks
from lightning_lopt.tasks import datasets

# Tasks that are too large for a quick test are tested at another size.
SMALLER = {
    "ImageMLP_Cifar10_4096x4096_Relu": {"hidden": (64, 64)},
    "ImageMLP_Cifar10_1024x1024_Relu": {"hidden": (64, 64)},
    "Resnet_Cifar10_MultiRuntime_5": {"channels": (16, 16, 32, 32)},
    "Resnet_Cifar10_MultiRuntime_6": {"channels": (16, 16, 32, 32)},
    "Resnet_Cifar10_MultiRuntime_7": {"channels": (16, 32, 32, 64)},
    "TransformerLM_tinyshakespeare_5layer_128width": {"depth": 1},
    "TransformerLM_tinyshakespeare_5layer_256width": {"depth": 1, "width": 64},
    "TransformerLM_tinyshakespeare_5layer_512width": {"depth": 1, "width": 64},
    "VIT_Cifar10_skinnydeep": {"depth": 2},
    "VIT_Cifar10_wideshallow": {"depth": 1, "width": 96},
    "real-resnet20": {"channels": (8, 8, 8), "blocks": (2, 1, 1)},
    "real-vit": {"depth": 1, "width": 32, "patch": 8},
    "real-gpt-0.8m": {"depth": 1, "width": 32},
    "real-gpt-3m": {"depth": 1, "width": 32},
    "real-lstm": {"hidden": 32},
    "real-layernorm-mlp": {"hidden": (32, 32)},
    "real-denoiser": {"channels": 4, "depth": 3},
    "real-siren": {"size": 12, "width": 32},
    "real-factorization": {"users": 50, "items": 30, "num": 600, "batch_size": 20},
    "real-noisy-labels": {"num": 300, "hidden": (16,)},
    "real-finetune-conv": {"channels": (4, 4, 4), "image_size": 8, "num": 300, "pretrain_steps": 3},
    "real-finetune-gpt": {"depth": 1, "width": 16, "pretrain_steps": 3, "length": 5},
    "real-lora": {"depth": 1, "width": 16, "pretrain_steps": 3, "length": 5},
    "real-gan": {"width": 16, "image_size": 8},
    "real-policy-gradient": {"horizon": 40, "episodes": 4, "hidden": (8,)},
}
FIXED_START = {"real-finetune-gpt"}  # all members start from the same pretrained weights
OF_PAPERS = {  # name -> parameters, as the papers or the notes on the authors' code count them
    "fashion-mlp-paper": 118_282,
    "ImageMLP_FashionMnist_Relu128x128": 118_282,
    "cifar-conv-paper": 56_970,
    "Conv_Cifar10_32x64x64": 56_970,
    "digits-mlp": 2_410,
    "two-moons": 8_577,
    "mnist-conv": 82_250,
    "mnist-mlp": 15_910,
    "mnist-l2l": 15_910,
    "mnist-dmd": 6_370,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(name: str) -> tasks.Task:
    """The task with a small batch; skips the test if its data are missing."""
    data = tasks.dataset_of(name)
    if data is not None and not datasets.is_available(data):
        pytest.skip(f"{data} is not here: set {datasets.FOLDER_VARIABLE}")
    options = dict(SMALLER.get(name, {}))
    if data is not None and name != "two-moons":
        options |= {"batch_size": 3, **({"length": 5} if data == "tinyshakespeare" else {})}
    return tasks.make(name, **options)


def leaves(tree) -> list[torch.Tensor]:
    return pytree.tree_leaves(tree)


def member(tree, index: int):
    return pytree.tree_map(lambda leaf: leaf[index], tree)


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def double(tree):
    return pytree.tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


@pytest.fixture(params=tasks.list_tasks())
def task(request) -> tasks.Task:
    return small(request.param)


def test_init_follows_its_generator_and_has_the_shapes(task):
    global_state = torch.get_rng_state()
    start = task.init(generator(0), population=2)
    assert equal(start, task.init(generator(0), population=2))
    if any(leaf.any() for leaf in leaves(start)) and task.name not in FIXED_START:  # else it always starts at zero
        assert not equal(start, task.init(generator(1), population=2))
        assert not equal(member(start, 0), member(start, 1))
    assert {name: param.shape[1:] for name, param in start.params.items()} == task.param_shapes
    assert {name: param.shape for name, param in task.init(generator()).params.items()} == task.param_shapes
    assert all(leaf.shape[0] == 2 for leaf in leaves(start))
    assert all(param.dtype == torch.float32 for param in start.params.values())
    assert task.num_params == sum(param[0].numel() for param in start.params.values())
    batch = task.batch(generator(3), start.constants, population=2)
    assert equal(batch, task.batch(generator(3), start.constants, population=2))
    assert torch.equal(torch.get_rng_state(), global_state)


def test_a_population_is_its_members(task):
    start = task.init(generator(), population=2)
    batch = task.batch(generator(1), start.constants, population=2)
    losses = vmap(task.loss)(start.params, batch)
    assert losses.shape == (2,)
    assert losses.isfinite().all()
    for i in range(2):
        own = task.loss(member(start.params, i), member(batch, i))
        torch.testing.assert_close(own, losses[i], rtol=1e-5, atol=1e-6)
    # In float64, because some gradients are 0 up to rounding: biases of keys, weights before a batch norm.
    params, batch = double((start.params, batch))
    grads, values = vmap(task.grad_and_value)(params, batch)
    torch.testing.assert_close(values, losses.double(), rtol=1e-4, atol=1e-6)
    for i in range(2):
        expected, _ = task.grad_and_value(member(params, i), member(batch, i))
        scale = max(float(grad.abs().max()) for grad in expected.values())
        for name, grad in expected.items():
            torch.testing.assert_close(grads[name][i], grad, rtol=1e-8, atol=1e-10 * scale)


def test_one_member_needs_no_population(task):
    start = task.init(generator())
    loss = task.loss(start.params, task.batch(generator(1), start.constants))
    assert loss.shape == ()
    assert loss.isfinite()


def test_held_out_batches(task):
    start = task.init(generator(), population=2)
    assert {"train", "test"} <= set(task.splits)
    for split in task.splits:
        batch = task.eval_batch(split, start.constants, population=2, size=4)
        assert equal(batch, task.eval_batch(split, start.constants, population=2, size=4))
        assert vmap(task.loss)(start.params, batch).isfinite().all()
        assert vmap(task.eval_loss)(start.params, batch).isfinite().all()
        for name, value in vmap(task.metrics)(start.params, batch).items():
            assert value.shape == (2,)
            assert value.isfinite().all() if name == "forgotten" else ((value >= 0) & (value <= 1)).all()
    drawn = task.eval_batch("test", member(start.constants, 0), size=4, generator=generator())
    assert task.loss(member(start.params, 0), drawn).isfinite()
    with pytest.raises(ValueError, match="split='exam' is not allowed"):
        task.eval_batch("exam", start.constants)


def test_twenty_steps_on_a_batch_lower_its_loss(task):
    start = task.init(generator())
    batch, params = task.batch(generator(1), start.constants), start.params
    # Adam does not descend along the few directions that evolution strategies sample; normalized steps do.
    estimated = isinstance(task, tasks.ESGradient)
    if isinstance(task, tasks.Adversarial):
        pytest.skip("a game does not descend a loss; see test_games")
    optimizer = (torch.optim.SGD if estimated else torch.optim.Adam)(list(params.values()), lr=3e-3)
    first = task.loss(params, batch)
    for _ in range(20):
        grads, _ = task.grad_and_value(params, batch)
        norm = torch.cat([grad.flatten() for grad in grads.values()]).norm() if estimated else 1.0
        for name, grad in grads.items():
            params[name].grad = grad / norm
        optimizer.step()
    assert task.loss(params, batch) < first


@pytest.mark.parametrize(("name", "count"), OF_PAPERS.items())
def test_parameter_counts_of_the_papers(name, count):
    small(name)
    assert tasks.make(name).num_params == count


@pytest.mark.parametrize("name", ["digits-mlp", "quadratic", "digits-es"])
def test_a_task_survives_pickling(name):
    task = tasks.make(name)
    copy = pickle.loads(pickle.dumps(task))
    start = task.init(generator())
    batch = task.batch(generator(1), start.constants)
    assert torch.equal(copy.loss(start.params, batch), task.loss(start.params, batch))


@pytest.mark.parametrize("name", ["digits-mlp", "digits-conv", "linear-regression", "digits-es"])
def test_a_population_compiles_in_one_graph(name):
    task = tasks.make(name)
    start = task.init(generator(), population=2)
    batch = task.batch(generator(1), start.constants, population=2)
    expected, _ = vmap(task.grad_and_value)(start.params, batch)
    grads, _ = torch.compile(vmap(task.grad_and_value), fullgraph=True, backend="eager")(start.params, batch)
    assert equal(grads, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["digits-mlp", "digits-dropout-mlp", "digits-conv", "digits-es", "noisy-quadratic"])
def test_a_cpu_generator_gives_the_same_run_on_the_gpu(name):
    losses = []
    for device in ("cpu", "cuda"):
        task = tasks.make(name).to(device)
        start = task.init(generator(), population=2)
        batch = task.batch(generator(1), start.constants, population=2)
        losses.append(vmap(task.grad_and_value)(start.params, batch)[1].cpu())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_the_meta_loss_is_clipped():
    task = tasks.make("digits-mlp")
    cap = 1.5 * math.log(10)
    losses = torch.tensor([1.0, 50.0, float("nan"), float("inf")])
    torch.testing.assert_close(task.normalize(losses), torch.tensor([1.0, cap, cap, cap]))
    assert torch.equal(tasks.make("quadratic").normalize(losses[:2]), losses[:2])
    assert tasks.make("digits-es").loss_cap == task.loss_cap


def mean_loss_at_the_start(task, population):
    random = generator()
    start = task.init(random, population)
    return float(vmap(task.loss)(start.params, task.batch(random, start.constants, population)).mean())


def test_losses_before_training():
    # The head of the vision transformer starts at zero, so its logits are uniform.
    assert mean_loss_at_the_start(tasks.make("digits-vit"), 8) == pytest.approx(math.log(10), rel=1e-6)
    # E ||y||^2 = 10 with the start at 0.
    assert mean_loss_at_the_start(tasks.make("quadratic"), 20_000) == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit-mlp", {}, "Unknown task 'digit-mlp': did you mean 'digits-mlp'"),
        ("@", {}, "none is close"),
        ("digits-mlp", {"widths": (3,)}, "Unknown option 'widths' of task 'digits-mlp'; allowed are .*'hidden'"),
        ("quadratic", {"hidden": 3}, "Unknown option 'hidden' of task 'quadratic'; allowed are .*'dim'"),
        ("digits-mlp", {"hidden": (0,)}, "size of a layer=0 is not allowed"),
        ("digits-mlp", {"activation": "swish"}, "activation='swish' is not allowed: it must be one of .*'relu'"),
        ("digits-mlp", {"norm": "group"}, "norm='group' is not allowed"),
        ("digits-mlp", {"dropout": 1.0}, "dropout=1.0 is not allowed"),
        ("digits-mlp", {"batch_size": 0}, "batch_size=0 is not allowed"),
        ("digits-mlp", {"scheme": "glorot"}, "scheme='glorot' is not allowed"),
        ("digits-mlp", {"objective": "hinge"}, "objective='hinge' is not allowed"),
        ("digits-mlp", {"dataset": "svhn"}, "Unknown dataset 'svhn'"),
        ("digits-mlp", {"train_fraction": 0.0}, "train_fraction=0.0 is not allowed"),
        ("digits-mlp", {"network": "kan"}, "network='kan' is not allowed"),
        ("digits-mlp", {"network": "lstm"}, "Unknown option 'hidden'|a language model needs a text"),
        ("digits-mlp", {"subset": (0.5, 2.0)}, "subset=.* is not allowed"),
        ("digits-autoencoder", {"label_noise": (0.1, 0.2)}, "label_noise is not allowed"),
        ("diabetes-mlp", {"objective": "cross_entropy"}, "use 'regression'"),
        ("wine-mlp", {"network": "vit"}, "it needs images"),
        ("digits-vit", {"patch": 3}, "patch=3 is not allowed: it must divide"),
        ("digits-vit", {"heads": 5}, "heads=5 is not allowed"),
        ("digits-conv", {"strides": (1,)}, "must be of equal length"),
        ("digits-es", {"pairs": 0}, "pairs=0 is not allowed"),
        ("quadratic", {"coefficients": "cauchy"}, "coefficients='cauchy' is not allowed"),
        ("rosenbrock", {"x_range": (1.0, 0.0)}, "x_range=.* is not allowed"),
        ("noisy-quadratic", {"hessian": ((1.0, 2.0),)}, "it must be a square matrix"),
    ],
)
def test_errors_say_what_came_and_what_is_allowed(name, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.make(name, **options)


def test_registering_a_task():
    with pytest.raises(ValueError, match="name='digits-mlp' is taken"):
        tasks.register("digits-mlp", tasks.build)
    with pytest.raises(ValueError, match="Unknown task"):
        tasks.dataset_of("digit-mlp")


def test_the_sixteen_of_the_generalization_study_exist():
    assert len(tasks.GENERALIZATION) == 16
    assert set(tasks.GENERALIZATION) <= set(tasks.list_tasks())
