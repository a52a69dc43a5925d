"""Parameters of parts of a network."""

from __future__ import annotations

from torch import Tensor

from lightning_lopt.tasks.base import Params
from lightning_lopt.tasks.layers import Spec

Masks = tuple[Tensor, ...]


def part(params: Params, name: str) -> Params:
    """The parameters of a part, without its name."""
    return {key[len(name) + 1 :]: value for key, value in params.items() if key.startswith(f"{name}.")}


def named(name: str, specs: dict[str, Spec]) -> dict[str, Spec]:
    """The specifications of a part, with its name."""
    return {f"{name}.{key}": spec for key, spec in specs.items()}
