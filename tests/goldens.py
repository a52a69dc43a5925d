"""The recorded trajectories in `fixtures/` (see its README.md), in this package's layout: channels first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_lopt.rules import STAR, StepContext

FIXTURES = Path(__file__).parent / "fixtures"
LEAVES = ("a_scalar", "b_vec", "c_mat", "d_rank3", "e_conv")
CONFIGS = ("star_paper", "star_hyperparam", "star_nom_adam", "star_wd_reg", "blackbox_default")
NUM_STEPS = 25
DTYPES = {"f64": torch.float64, "f32": torch.float32}
TOLERANCES = {"f64": 1e-9, "f32": 5e-5}

INPUTS = np.load(FIXTURES / "inputs.npz")
THETA = np.load(FIXTURES / "theta.npz")


class Golden(NamedTuple):
    """One recorded run."""

    data: Any  # the npz file
    kind: str  # "star" or "blackbox"
    theta: dict[str, np.ndarray]  # float32
    arguments: dict[str, Any]  # of the reference's constructor
    dtype: torch.dtype
    tolerance: float

    def rule(self) -> STAR:
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return STAR.from_jax({name: value.astype(dtype) for name, value in self.theta.items()}, **self.arguments)

    def initial(self, leaf: str) -> Tensor:
        return torch.tensor(INPUTS[f"mixed/params0/{leaf}"]).to(self.dtype)

    def gradients(self, leaf: str) -> Tensor:
        return torch.tensor(INPUTS[f"mixed/grads/{leaf}"]).to(self.dtype)

    def recorded(self, what: str, leaf: str) -> Tensor:
        return torch.tensor(self.data[f"mixed/{what}/{leaf}"])

    def channels(self, what: str, leaf: str, shape: tuple[int, ...]) -> Tensor:
        """A record with channels last, with them first."""
        recorded = self.recorded(what, leaf).movedim(-1, 0)
        return recorded.reshape(recorded.shape[0], *shape)


def to_torch(array: np.ndarray) -> Tensor:
    """An array in JAX's layout, (*spatial, in, out), as a tensor in torch's, (out, in, *spatial)."""
    array = np.asarray(array)
    dims = range(array.ndim)
    return torch.tensor(array.transpose(*reversed(dims[-2:]), *dims[:-2]))


def load(name: str, precision: str) -> Golden:
    data = np.load(FIXTURES / f"{name}_{precision}.npz")
    kind = name.split("_")[0]
    theta = {key.split("/")[1]: THETA[key] for key in THETA.files if key.startswith(f"{kind}/")}
    arguments = {key.removeprefix("config/"): _plain(data[key]) for key in data.files if key.startswith("config/")}
    return Golden(data, kind, theta, arguments, DTYPES[precision], TOLERANCES[precision])


def replay(golden: Golden, leaf: str, num_steps: int = NUM_STEPS) -> Iterator[tuple[int, Tensor, Tensor, Any, Tensor]]:
    """(step, gradient, parameter before, state after, parameter after) of our rule."""
    rule = golden.rule()
    meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
    param = golden.initial(leaf)
    state = rule.init_state(param)
    for step, grad in enumerate(golden.gradients(leaf)[:num_steps]):
        before = param
        delta, state = rule.update(meta_params, grad, state, param, StepContext(torch.tensor(float(step))))
        param = before + delta
        yield step, grad, before, state, param


def _plain(value: np.ndarray) -> Any:
    return tuple(value.tolist()) if value.ndim else value.item()
