"""The recorded trajectories of small_fc_lopt and Celo2 in `fixtures/` (see its README.md), in either layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import goldens
import numpy as np
import torch
from torch import Tensor

from lightning_lopt import hub
from lightning_lopt.rules import StepContext, UpdateRule

INPUTS = {**np.load(goldens.FIXTURES / "inputs.npz"), **np.load(goldens.FIXTURES / "field_inputs.npz")}
LEAVES = tuple(sorted(key.replace("/params0/", "/") for key in INPUTS if "/params0/" in key))
NEVER = "hard/a_never"  # the tensor whose gradient is always zero
TOLERANCE = {"rtol": 0, "atol": 1e-9}


def theta(name: str) -> dict[str, Tensor]:
    """The meta-parameters of `{name}_theta.state` in float64."""
    arrays = hub.read_theta(goldens.FIXTURES / f"{name}_theta.state")
    return {key: value.double() for key, value in arrays.items()}


def record(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(goldens.FIXTURES / f"{name}_f64.npz"))


def inputs(what: str, leaf: str) -> np.ndarray:
    """`params0` or `grads` of a leaf such as "edges/b_square", as recorded."""
    tree, name = leaf.split("/")
    return INPUTS[f"{tree}/{what}/{name}"]


def recorded(data: dict[str, np.ndarray], what: str, leaf: str) -> np.ndarray:
    tree, name = leaf.split("/")
    return data[f"{tree}/{what}/{name}"]


def laid(rule: UpdateRule, array: np.ndarray) -> Tensor:
    """A recorded array as the layout of our rule has it: as it lies, or transposed."""
    return torch.tensor(array) if rule.config.layout == "jax" else goldens.to_torch(array)


def replay(rule: UpdateRule, leaf: str, dtype: torch.dtype = torch.float64) -> Iterator[tuple[int, Tensor, Any]]:
    """(step, parameter after it, state after it) of our rule on a leaf; those named "g_wide" are embeddings."""
    meta_params = {name: value.detach().to(dtype) for name, value in rule.meta_params().items()}
    param = laid(rule, inputs("params0", leaf)).to(dtype)
    role = "embedding" if leaf.endswith("/g_wide") else "hidden"
    state = rule.init_state(param)
    for step, array in enumerate(inputs("grads", leaf)):
        context = StepContext(torch.tensor(float(step), dtype=dtype), role=role)
        delta, state = rule.update(meta_params, laid(rule, array).to(dtype), state, param, context)
        param = param + delta
        yield step, param, state


def assert_replays(rule: UpdateRule, data: dict[str, np.ndarray], leaf: str) -> None:
    """Require the recorded parameters at each recorded step."""
    expected = dict(zip(data["steps"].tolist(), recorded(data, "params", leaf), strict=True))
    for step, param, _ in replay(rule, leaf):
        if step in expected:
            torch.testing.assert_close(param, laid(rule, expected.pop(step)), **TOLERANCE)
    assert not expected
