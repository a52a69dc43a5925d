"""Small tasks of kinds that no rule was fitted to, for `evaluation.suites.UNSEEN2`.

They were written before the rules that they judge, and are for judging once. Do not meta-train on them, do not choose a
rule by them, and do not put tasks of the same kind into a fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_lopt.tasks import sources
from lightning_lopt.tasks.layers import Network
from lightning_lopt.tasks.networks import MLP
from lightning_lopt.tasks.supervised import Supervised
from lightning_lopt.tasks.transforms import Code, FlipCrop, NoiseLevels, Transform, Views
from lightning_lopt.tasks.unseen import data
from lightning_lopt.tasks.unseen.images import AutoencodingMLPs, Mixer, SeparableConv, ViewEncoder
from lightning_lopt.tasks.unseen.physics import BoundaryValue
from lightning_lopt.tasks.unseen.sequences import GRU, DilatedConv, GatedConvLM, GatedEncoder, TokenPairs
from lightning_lopt.tasks.unseen.tables import (
    DeepSets,
    Experts,
    FactorizationMachine,
    FourierNet,
    GraphNet,
    Maxout,
    RadialBasis,
)

__all__ = ["TASKS", "BoundaryValue", "on_formula", "on_images", "on_text"]


def on_formula(
    name: str,
    make: Callable[[], tuple[Tensor, Tensor]],
    network: Network,
    objective: str,
    batch_size: int = 64,
    transform: Transform | None = None,
    scheme: str = "haiku",
) -> Supervised:
    """A task on data made by a formula of `data`."""
    inputs, targets = make()
    classes = int(targets.max()) + 1 if objective == "cross_entropy" else 0
    source = sources.shuffled(name, inputs, targets, classes)
    return Supervised(
        name=name,
        network=network,
        source=source,
        objective=objective,
        batch_size=batch_size,
        transform=transform,
        scheme=scheme,
    )


def on_images(
    name: str,
    dataset: str,
    network: str,
    image_size: int,
    objective: str = "cross_entropy",
    transform: Transform | None = None,
    batch_size: int = 64,
    eval_size: int = 2048,
    scheme: str = "haiku",
) -> Supervised:
    """A task on images, with a network of `images`."""
    source = sources.examples(dataset, image_size=image_size)
    channels, height, width = source.shape
    nets: dict[str, Network] = {
        "autoencoder": AutoencodingMLPs(pixels=math.prod(source.shape)),
        "separable": SeparableConv(in_channels=channels),
        "views": ViewEncoder(net=SeparableConv(in_channels=channels, channels=24, depth=3, outputs=32)),
        "mixer": Mixer(in_shape=(channels, height, width)),
    }
    return Supervised(
        name=name,
        network=nets[network],
        source=source,
        objective=objective,
        batch_size=batch_size,
        transform=transform,
        eval_size=eval_size,
        scheme=scheme,
    )


def on_text(name: str, dataset: str, length: int = 32, batch_size: int = 16, width: int = 32) -> Supervised:
    """A language model of causal gated convolutions."""
    source = sources.windows(dataset, length)
    network = GatedConvLM(vocab=source.num_classes, width=width)
    return Supervised(name=name, network=network, source=source, batch_size=batch_size)


def _formula(make: Callable[[], tuple[Tensor, Tensor]], network: Network, objective: str, **more: Any) -> Any:
    return on_formula, {"make": make, "network": network, "objective": objective, **more}


_density = MLP(inputs=1, hidden=(32, 32), outputs=15, activation="tanh")
_quantile = MLP(inputs=8, hidden=(48, 48), outputs=7, activation="elu", dropout=0.1)
_noise = MLP(inputs=3, hidden=(64, 64, 64), outputs=2, activation="silu")

TASKS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "clouds-deepsets": _formula(data.diameters, DeepSets(), "regression"),
    "graphs-messages": _formula(data.clustering, GraphNet(), "regression", scheme="torch", batch_size=32),
    "waves-dilated": _formula(data.waves, DilatedConv(), "cross_entropy", scheme="torch", batch_size=32),
    "additions-gru": _formula(data.additions, GRU(), "regression", scheme="torch", batch_size=32),
    "brackets-encoder": _formula(data.brackets, GatedEncoder(vocab=4, length=16), "logistic", batch_size=32),
    "relations-pairs": _formula(data.relations, TokenPairs(vocab=60, outputs=8), "cross_entropy"),
    "picture-fourier": _formula(data.picture, FourierNet(), "regression", batch_size=128),
    "spirals-radial": _formula(data.spirals, RadialBasis(), "cross_entropy"),
    "inverse-density": _formula(data.inverse, _density, "mixture_density"),
    "visits-factors": _formula(data.visits, FactorizationMachine(), "poisson"),
    "widening-quantiles": _formula(data.widening, _quantile, "quantiles"),
    "roll-diffusion": _formula(
        data.roll, _noise, "vector_regression", scheme="torch", transform=NoiseLevels(), batch_size=128
    ),
    "lessons-maxout": _formula(data.lessons, Maxout(), "soft_cross_entropy", scheme="torch", batch_size=32),
    "friedman-experts": _formula(data.friedman, Experts(), "regression", batch_size=32),
    "boundary-value": (BoundaryValue, {}),
    "mnist14-vae": (
        on_images,
        {
            "dataset": "mnist",
            "network": "autoencoder",
            "image_size": 14,
            "objective": "evidence",
            "transform": Code(),
            "scheme": "torch",
        },
    ),
    "fashion14-views": (
        on_images,
        {
            "dataset": "fashion_mnist",
            "network": "views",
            "image_size": 14,
            "objective": "contrastive",
            "transform": Views(),
            "eval_size": 512,
        },
    ),
    "cifar16-separable": (
        on_images,
        {"dataset": "cifar10", "network": "separable", "image_size": 16, "transform": FlipCrop(2), "batch_size": 32},
    ),
    "mnist14-mixer": (on_images, {"dataset": "mnist", "network": "mixer", "image_size": 14, "batch_size": 32}),
    "shakespeare-gated-conv": (on_text, {"dataset": "tinyshakespeare"}),
}
"""Name -> builder and options, for the catalog."""
