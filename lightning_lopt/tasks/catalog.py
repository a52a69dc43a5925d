"""The registry of named tasks, and `make`, which builds them.

Short names are tasks of this package and of the papers that it implements. Names like
`ImageMLP_Cifar10_128x128x128_Relu` are those of the STAR reference (the released code of Metz et al. 2022, arXiv
2203.11860, which defines the tasks that Harrison et al. 2022 evaluate on). Where its data (ImageNet, LM1B, Cifar100)
are not available here, a stand-in has the reference's network and batch size on other data, which its name says.
`GENERALIZATION` maps each stand-in to the reference task.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_lopt.tasks import real, unseen
from lightning_lopt.tasks.analytic import (
    LeastSquares,
    LogUniformQuadratic,
    NoisyQuadratic,
    RandomSlopes,
    Rosenbrock,
    SumOfSquares,
)
from lightning_lopt.tasks.base import Task
from lightning_lopt.tasks.games import PolicyGradient
from lightning_lopt.tasks.supervised import build
from lightning_lopt.tasks.transforms import FlipCrop
from lightning_lopt.tasks.wrappers import ESGradient, Reparametrized


class Entry(NamedTuple):
    """A registered task, which is built by `builder(name=..., **options)`."""

    builder: Callable[..., Task]
    options: dict[str, Any]


REGISTRY: dict[str, Entry] = {}


def register(name: str, builder: Callable[..., Task], **options: Any) -> None:
    """Register a task under a name, for `make` and the command line.

    Args:
        name: a name that is not taken yet.
        builder: a Task subclass or a function, called as `builder(name=name, **options)`.
        options: options for the builder; callers of `make` may override them.

    Raises:
        ValueError: if the name is taken.
    """
    if name in REGISTRY:
        raise ValueError(f"name={name!r} is taken by another task; choose another name.")
    REGISTRY[name] = Entry(builder, options)


def make(name: str, **options: Any) -> Task:
    """Make a task by name.

    Args:
        name: one of `list_tasks()`.
        options: options that differ from the registered ones, such as `batch_size=32`, `hidden=(64, 64)` or
            `dataset="synthetic"`.

    Raises:
        ValueError: for an unknown name or option, or a value that is not allowed.
        FileNotFoundError: if the task's data are missing; the message says what to do.

    Example:
        >>> make("digits-mlp").num_params, make("digits-mlp", hidden=(64, 64)).num_params
        (2410, 8970)
    """
    if name not in REGISTRY:
        close = difflib.get_close_matches(name, REGISTRY, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(repr(match) for match in close)}?" if close else "none is close."
        raise ValueError(f"Unknown task {name!r}: {hint} tasks.list_tasks() has all {len(REGISTRY)} names.")
    entry = REGISTRY[name]
    parameters = inspect.signature(entry.builder).parameters
    # A builder that takes **options checks them itself.
    if inspect.Parameter.VAR_KEYWORD not in {parameter.kind for parameter in parameters.values()}:
        known = sorted(set(parameters) - {"name"})
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"Unknown option {unknown[0]!r} of task {name!r}; allowed are {known}.")
    return entry.builder(**{"name": name, **entry.options, **options})


def list_tasks() -> list[str]:
    """Return the names of all registered tasks.

    Example:
        >>> "digits-mlp" in list_tasks()
        True
    """
    return sorted(REGISTRY)


def dataset_of(name: str) -> str | None:
    """Return the name of the data set that a task loads, or None; a ValueError for an unknown name."""
    if name not in REGISTRY:
        raise ValueError(f"Unknown task {name!r}; tasks.list_tasks() has the names.")
    entry = REGISTRY[name]
    return dataset_of(entry.options["base"]) if "base" in entry.options else entry.options.get("dataset")


def by_evolution_strategies(name: str, base: str, pairs: int = 1, std: float = 0.01, **options: Any) -> Task:
    """Make the task `base` with gradients estimated from antithetic pairs (`wrappers.ESGradient`)."""
    return ESGradient(name=name, task=make(base, **options), pairs=pairs, std=std)


def rescaled(
    name: str, base: str, level: str = "global", scale_range: tuple[float, float] = (1e-3, 1e3), **options: Any
) -> Task:
    """Make the task `base` in other units (`wrappers.Reparametrized`); for Adam this changes the step sizes."""
    return Reparametrized(name=name, task=make(base, **options), level=level, scale_range=scale_range)


def _mlp(name: str, dataset: str, hidden: tuple[int, ...], **options: Any) -> None:
    register(name, build, network="mlp", dataset=dataset, hidden=hidden, **options)


def _register_small() -> None:
    """Register small tasks that need no data files: on scikit-learn's data, or without data."""
    small: dict[str, Any] = {"dataset": "digits", "batch_size": 64}
    mlps: dict[str, dict[str, Any]] = {
        "digits-logreg": {},
        "digits-mlp": {"hidden": (32,)},
        "digits-deep-mlp": {"hidden": (32, 32, 32, 32)},
        "digits-tanh-mlp": {"hidden": (64, 64), "activation": "tanh"},
        "digits-sigmoid-mlp": {"hidden": (32,), "activation": "sigmoid", "scheme": "torch"},
        "digits-layernorm-mlp": {"hidden": (32, 32), "norm": "layer"},
        "digits-batchnorm-mlp": {"hidden": (32, 32), "norm": "batch"},
        "digits-dropout-mlp": {"hidden": (64, 64), "dropout": 0.2},
        "digits-mse-mlp": {"hidden": (32,), "objective": "mse"},
        "digits-autoencoder": {"hidden": (32, 8, 32), "objective": "reconstruction"},
    }
    for name, options in mlps.items():
        register(name, build, network="mlp", **{**small, **options})
    register("digits-conv", build, network="conv", channels=(8, 16), strides=(2, 1), **small)
    register("digits-resnet", build, network="resnet", channels=(8, 16), blocks=(1, 1), stem_channels=8, **small)
    register("digits-vit", build, network="vit", patch=2, width=32, depth=2, heads=4, **small)
    register("digits-es", by_evolution_strategies, base="digits-mlp", pairs=8)
    register("synthetic-mlp", build, network="mlp", hidden=(32,), dataset="synthetic", batch_size=64)
    register("breast-cancer-logreg", build, network="mlp", dataset="breast_cancer", batch_size=64)
    _mlp("wine-mlp", "wine", (16,), batch_size=32)
    _mlp("wine-deep-mlp", "wine", (16, 16, 16, 16), batch_size=32)
    _mlp("diabetes-mlp", "diabetes", (32,), activation="tanh", objective="regression", batch_size=64)
    register("quadratic", LeastSquares)
    register("quadratic-deepmind", LeastSquares, coefficients="uniform", init_std=0.01)
    register("quadratic-thesis", LeastSquares, dim=16, init_std=1.0)
    register("quadratic-thesis-code", LeastSquares, dim=16, init_std=0.05, squared=False)
    register("linear-regression", LogUniformQuadratic)
    register("rosenbrock", Rosenbrock)
    register("rosenbrock-thesis", Rosenbrock, x_range=(-10.0, 10.0), y_range=(-10.0, 10.0))
    register("sum-of-squares", SumOfSquares)
    register("random-slopes", RandomSlopes)
    register("noisy-quadratic", NoisyQuadratic)
    register(
        "noisy-quadratic-code",
        NoisyQuadratic,
        hessian=((1.11499, 0.59389), (0.59389, 0.48372)),
        init_std=10.0,
        factor=1.0,
    )
    moons = {"activation": "tanh", "objective": "logistic", "l2": 5e-3, "batch_size": None, "train_fraction": 1.0}
    _mlp("two-moons", "two_moons", (64, 64, 64), **moons)


def _register_papers() -> None:
    """Register the papers' tasks on MNIST, Fashion-MNIST and CIFAR-10."""
    # Learning to learn (arXiv 1606.04474), as in the PyTorch port, with the variations of its generalization tests, and
    # the task of L2O-DMD.
    l2l = {"activation": "sigmoid", "scheme": "torch"}
    _mlp("mnist-l2l", "mnist", (20,), **l2l)
    _mlp("mnist-l2l-2layer", "mnist", (20, 20), **l2l)
    _mlp("mnist-l2l-40", "mnist", (40,), **l2l)
    _mlp("mnist-l2l-relu", "mnist", (20,), activation="relu", scheme="torch")
    _mlp("mnist-l2l-batch16", "mnist", (20,), batch_size=16, **l2l)
    _mlp("fashion-l2l", "fashion_mnist", (20,), **l2l)
    _mlp("cifar-l2l", "cifar10", (20,), **l2l)
    _mlp("mnist-dmd", "mnist", (8,), **l2l)
    # DeepMind's initialization; this is MlpMnist of the multiscale-Adam thesis.
    _mlp("mnist-mlp", "mnist", (20,), activation="sigmoid", scheme="normal", std=0.01)
    register("mnist-mlp-rescaled", rescaled, base="mnist-mlp", scale_range=(5e-3, 1e1))
    # The other networks of that thesis: ConvMnist large and small, ConvCifar 0 and 1. For the latter, it prints layers
    # of 384 x 191, 576 x 96 and 96 x 46; but its number of parameters requires 192, and 32 channels of 6 x 6 are 1152.
    # Images are resized to 24 x 24, where TensorFlow's tutorial crops them; weight decay is that of the tutorial.
    register("mnist-convnet-large", build, network="pooled_conv", dataset="mnist")
    register("mnist-convnet-small", build, network="pooled_conv", dataset="mnist", channels=(16, 32), hidden=(512,))
    cifar = {"network": "pooled_conv", "dataset": "cifar10", "image_size": 24, "pool_size": 3, "local_norm": True}
    decay = {"weight_decay": 4e-3, "decayed": ("layers.0.weight", "layers.1.weight")}
    register("cifar-convnet-0", build, channels=(64, 64), hidden=(384, 192), **cifar, **decay)
    register("cifar-convnet-1", build, channels=(32, 32), hidden=(96, 48), **cifar, **decay)
    # The LSTM thesis, with a sigmoid on the output too.
    _mlp("mnist-mlp-thesis", "mnist", (32,), activation="sigmoid", objective="sigmoid_cross_entropy")
    # Reverse engineering (arXiv 2011.02159).
    convs = {"channels": (16, 16, 16), "strides": (1, 1, 1), "padding": "valid", "pool": "flatten", "batch_size": 100}
    register("mnist-conv", build, network="conv", dataset="mnist", **convs)
    # STAR (arXiv 2209.11208): the two tasks of its meta-training.
    _mlp("fashion-mlp-paper", "fashion_mnist", (128, 128))
    register("cifar-conv-paper", build, network="conv", dataset="cifar10")


def _register_images() -> None:
    """Register this package's own tasks on image and text data."""
    for dataset, short in (("mnist", "mnist8-mlp"), ("fashion_mnist", "fashion8-mlp"), ("cifar10", "cifar8-mlp")):
        _mlp(short, dataset, (32,), image_size=8, grayscale=True, batch_size=64)
    _mlp("fashion-mlp", "fashion_mnist", (64, 64), image_size=14)
    _mlp("cifar-mlp", "cifar10", (128, 128, 128))
    register(
        "cifar-conv", build, network="conv", dataset="cifar10", image_size=16, channels=(16, 32, 32), batch_size=64
    )
    register("cifar-resnet", build, network="resnet", dataset="cifar10", batch_size=64)
    register("cifar-vit", build, network="vit", dataset="cifar10", batch_size=64)
    _mlp("fashion-autoencoder", "fashion_mnist", (128, 32, 128), objective="reconstruction")
    text = {"dataset": "tinyshakespeare", "length": 32}
    register("shakespeare-lstm", build, network="lstm", embed=32, hidden=64, batch_size=32, **text)
    register("shakespeare-transformer", build, network="transformer", width=64, depth=2, heads=4, batch_size=32, **text)


def _register_heldout() -> None:
    """Register the tasks of `evaluation.suites.HELDOUT`, which are small and not for meta-training."""
    register("iris-logreg", build, network="mlp", dataset="iris", batch_size=32)
    fashion: dict[str, Any] = {"dataset": "fashion_mnist", "image_size": 14, "hidden": (64, 64)}
    _mlp("fashion14-sigmoid-mlp", batch_size=64, activation="sigmoid", scheme="torch", **fashion)
    _mlp("fashion14-batch8-mlp", batch_size=8, **fashion)
    _mlp("mnist14-deep-tanh-mlp", "mnist", (48,) * 6, image_size=14, activation="tanh", batch_size=64)
    cifar: dict[str, Any] = {"dataset": "cifar10", "image_size": 16}
    _mlp("cifar16-mlp", hidden=(64, 64, 64), grayscale=True, batch_size=64, **cifar)
    _mlp("cifar16-deep-mlp", hidden=(64,) * 8, grayscale=True, batch_size=64, **cifar)
    _mlp("cifar16-layernorm-mlp", hidden=(128, 128), norm="layer", batch_size=64, **cifar)
    conv: dict[str, Any] = {"network": "conv", "channels": (16, 32, 32), "strides": (2, 2, 1), **cifar}
    register("cifar16-conv", build, batch_size=64, **conv)
    register("cifar16-conv-batchnorm", build, batch_size=32, norm="batch", **conv)
    resnet = {"channels": (8, 16, 32), "stem_channels": 8, "batch_size": 32}
    register("cifar16-resnet", build, network="resnet", **resnet, **cifar)
    register("cifar16-vit", build, network="vit", width=32, depth=3, heads=4, batch_size=32, **cifar)
    text = {"dataset": "tinyshakespeare", "length": 32, "batch_size": 16}
    register("shakespeare-small-lstm", build, network="lstm", embed=16, hidden=48, **text)
    register("shakespeare-small-transformer", build, network="transformer", width=32, depth=4, heads=2, **text)


def _register_reference_mlps() -> None:
    """Register ImageMLP_*, ImageMLPAE_* and ESWrapped_* of the reference, with batch size 128 if the name has none."""
    deep = (128, 128, 128)
    _mlp("ImageMLP_FashionMnist_Relu128x128", "fashion_mnist", (128, 128))
    _mlp("ImageMLP_FashionMnist8_Relu32", "fashion_mnist", (32,), image_size=8)
    _mlp("ImageMLP_Cifar10BW8_Relu32", "cifar10", (32,), image_size=8, grayscale=True)
    _mlp("ImageMLP_Mnist_128x128x128_Relu", "mnist", deep)
    _mlp("ImageMLP_Cifar10_128x128x128_Relu", "cifar10", deep)
    _mlp("ImageMLP_Cifar10_128x128x128_Relu_MSE", "cifar10", deep, objective="mse")
    for width in (256, 1024, 4096):
        _mlp(f"ImageMLP_Cifar10_{width}x{width}_Relu", "cifar10", (width, width))
    for batch_size in (64, 128, 256):
        name = f"ImageMLP_Cifar10_128x128x128_Tanh_bs{batch_size}"
        _mlp(name, "cifar10", deep, activation="tanh", batch_size=batch_size)
    for norm in ("Layer", "Batch"):
        for activation in ("Relu", "Tanh"):
            name = f"ImageMLP_Cifar10_128x128x128_{norm}Norm_{activation}"
            _mlp(name, "cifar10", deep, norm=norm.lower(), activation=activation.lower())
    for rate in (2, 5, 8):
        _mlp(
            f"ImageMLP_Cifar10_128x128_Dropout0{rate}_Relu_MSE",
            "cifar10",
            (128, 128),
            dropout=rate / 10,
            objective="mse",
        )
    for data, size, batch_size in (
        ("Cifar10", "32x32x32", 128),
        ("Cifar10", "256x256x256", 128),
        ("Cifar10", "256x256x256", 1024),
        ("Cifar10", "128x32x128", 256),
        ("Mnist", "128x32x128", 128),
        ("FashionMnist", "128x32x128", 128),
    ):
        dataset = {"Cifar10": "cifar10", "Mnist": "mnist", "FashionMnist": "fashion_mnist"}[data]
        hidden = tuple(int(width) for width in size.split("x"))
        name = f"ImageMLPAE_{data}_{size}_bs{batch_size}"
        _mlp(name, dataset, hidden, objective="reconstruction", batch_size=batch_size)
    for pairs in (1, 8):
        for base in ("ImageMLP_Cifar10_128x128x128_Relu", "ImageMLP_Mnist_128x128x128_Relu"):
            register(f"ESWrapped_{pairs}pair_{base}", by_evolution_strategies, base=base, pairs=pairs)
    for base in ("ImageMLP_FashionMnist8_Relu32", "ImageMLP_Cifar10BW8_Relu32"):
        register(f"ESWrapped_1pair_{base}", by_evolution_strategies, base=base, pairs=1)


def _register_reference_rest() -> None:
    """Register Conv_* of the reference, and stand-ins for its ResNets, language models and vision transformers."""
    conv = {"network": "conv", "dataset": "cifar10"}
    register("Conv_Cifar10_32x64x64", build, **conv)
    register("Conv_Cifar10_16_32x64x64", build, image_size=16, **conv)
    register("Conv_Cifar10_32x64x64_Tanh", build, activation="tanh", **conv)
    register("Conv_Cifar10_32x64x64_batchnorm", build, norm="batch", **conv)
    register("Conv_Cifar10_32x64x64_layernorm", build, norm="layer", **conv)
    resnet = {"network": "resnet", "dataset": "cifar10", "blocks": (1, 1, 1, 1), "bottleneck": True, "zero_head": True}
    stem = {"stem_channels": 64, "stem_stride": 2, "max_pool": True}
    for number, size, batch_size, channels, kernel_size in (
        (0, 16, 64, (8, 16, 16, 16), 3),
        (1, 16, 64, (8, 16, 16, 32), 3),
        (2, 16, 64, (64, 128, 128, 128), 3),
        (5, 32, 128, (128, 256, 512, 512), 5),
        (6, 32, 256, (128, 256, 512, 512), 3),
        (7, 32, 256, (256, 512, 512, 1024), 5),
    ):
        sizes = {"image_size": size, "batch_size": batch_size, "channels": channels, "stem_kernel_size": kernel_size}
        register(f"Resnet_Cifar10_MultiRuntime_{number}", build, **resnet, **stem, **sizes)
    text = {"dataset": "tinyshakespeare"}
    for length, hidden, embed in ((32, 128, 64), (128, 128, 64), (32, 256, 128)):
        sizes = {"length": length, "hidden": hidden, "embed": embed, "batch_size": 128}
        register(
            f"RNNLM_tinyshakespeare_Patch{length}_LSTM{hidden}_Embed{embed}", build, network="lstm", **text, **sizes
        )
    # As in the reference, heads have size 32 whatever the width, and there is no position embedding.
    transformer = {"network": "transformer", "positions": False, "head_size": 32, **text}
    for width in (32, 128, 256, 512):
        sizes = {"width": width, "depth": 5, "heads": 8, "length": 128, "batch_size": 32, "dropout": 0.1}
        register(f"TransformerLM_tinyshakespeare_5layer_{width}width", build, **transformer, **sizes)
    for number, (heads, width, depth, batch_size, length, dropout) in enumerate(
        ((5, 20, 1, 4, 8, 0.1), (6, 24, 1, 4, 8, 0.1), (4, 32, 2, 8, 8, 0.0), (4, 32, 1, 8, 16, 0.0))
    ):
        sizes = {
            "heads": heads,
            "width": width,
            "depth": depth,
            "batch_size": batch_size,
            "length": length,
            "dropout": dropout,
        }
        register(f"TransformerLM_tinyshakespeare_MultiRuntime_{number}", build, **transformer, **sizes)
    vit = {"network": "vit", "dataset": "cifar10", "patch": 16, "batch_size": 128}
    register("VIT_Cifar10_wideshallow", build, width=384, depth=6, heads=6, **vit)
    register("VIT_Cifar10_skinnydeep", build, width=128, depth=10, heads=4, **vit)


GENERALIZATION: dict[str, str] = {
    "ImageMLP_Cifar10_128x128x128_Relu": "ImageMLP_Cifar10_128x128x128_Relu",
    "ImageMLP_Cifar10_1024x1024_Relu": "ImageMLP_Cifar10_1024x1024_Relu",
    "ImageMLP_Cifar10_128x128x128_Tanh_bs128": "ImageMLP_Cifar10_128x128x128_Tanh_bs128",
    "ImageMLP_Cifar10_128x128x128_LayerNorm_Relu": "ImageMLP_Cifar10_128x128x128_LayerNorm_Relu",
    "ImageMLP_Cifar10_128x128x128_LayerNorm_Tanh": "ImageMLP_Cifar10_128x128x128_LayerNorm_Tanh",
    "ImageMLP_Cifar10_128x128x128_BatchNorm_Relu": "ImageMLP_Cifar10_128x128x128_BatchNorm_Relu",
    "ImageMLP_Cifar10_128x128_Dropout05_Relu_MSE": "ImageMLP_Cifar10_128x128_Dropout05_Relu_MSE",
    "ImageMLP_Mnist_128x128x128_Relu": "ImageMLP_Mnist_128x128x128_Relu",
    "ImageMLPAE_Cifar10_32x32x32_bs128": "ImageMLPAE_Cifar10_32x32x32_bs128",
    "ESWrapped_1pair_ImageMLP_Cifar10_128x128x128_Relu": "ESWrapped_1pair_ImageMLP_Cifar10_128x128x128_Relu",
    "ESWrapped_8pair_ImageMLP_Mnist_128x128x128_Relu": "ESWrapped_8pair_ImageMLP_Mnist_128x128x128_Relu",
    "Conv_Cifar10_32x64x64_batchnorm": "Conv_Cifar10_32x64x64_batchnorm",
    "Resnet_Cifar10_MultiRuntime_5": "Resnet_MultiRuntime_5",
    "RNNLM_tinyshakespeare_Patch32_LSTM256_Embed128": "RNNLM_lm1bbytes_Patch32_LSTM256_Embed128",
    "TransformerLM_tinyshakespeare_5layer_256width": "TransformerLM_LM1B_5layer_256width",
    "VIT_Cifar10_skinnydeep": "VIT_Cifar100_skinnydeep",
}
"""Sixteen tasks like those of the STAR paper's generalization study: name here -> the corresponding reference task.

The paper names its sixteen only in figures that we do not have. This selection follows the kinds that its text lists.
"""


def _register_real() -> None:
    """Register the tasks of `evaluation.suites.REAL`."""
    cifar: dict[str, Any] = {"dataset": "cifar10", "transform": FlipCrop(), "eval_size": 1024}
    resnet20 = {"network": "resnet", "channels": (16, 32, 64), "blocks": (3, 3, 3)}
    register("real-resnet20", build, batch_size=64, **resnet20, **cifar)
    register("real-vit", build, network="vit", width=128, depth=4, heads=4, batch_size=32, **cifar)
    text: dict[str, Any] = {"dataset": "tinyshakespeare", "length": 64, "eval_size": 512}
    gpt = {"network": "transformer", "depth": 4, "heads": 4, "batch_size": 16}
    register("real-gpt-0.8m", build, width=128, **gpt, **text)
    register("real-gpt-3m", build, width=256, **gpt, **text)
    register("real-lstm", build, network="lstm", embed=64, hidden=256, batch_size=32, **text)
    _mlp("real-layernorm-mlp", "fashion_mnist", (512, 512, 512), norm="layer")
    _mlp("real-autoencoder", "fashion_mnist", (256, 64, 256), objective="reconstruction")
    register("real-denoiser", real.denoiser, dataset="fashion_mnist")
    register("real-siren", real.siren)
    register("real-factorization", real.factorization)
    _mlp("real-bag-of-words", "speakers", (64,), batch_size=64)
    register("real-noisy-labels", real.noisy_labels, dataset="fashion_mnist")
    register("real-finetune-conv", real.new_classes, dataset="cifar10")
    register("real-finetune-gpt", real.new_text, dataset="tinyshakespeare_ascii")
    register("real-lora", real.adapters, dataset="tinyshakespeare_ascii")
    register("real-gan", real.adversarial, dataset="mnist")
    register("real-policy-gradient", PolicyGradient)


def _register_unseen() -> None:
    """Register the tasks of `evaluation.suites.UNSEEN2`."""
    for name, (builder, options) in unseen.TASKS.items():
        register(name, builder, **options)


_register_small()
_register_papers()
_register_images()
_register_heldout()
_register_reference_mlps()
_register_reference_rest()
_register_real()
_register_unseen()
