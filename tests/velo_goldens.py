"""VeLO's recorded runs in `fixtures/` (see its README.md), and how to replay them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import goldens
import numpy as np
import torch
from torch import Tensor

from lightning_lopt.hub import read_theta
from lightning_lopt.rules import StepContext, VeLO

TREES = ("mixed", "edges", "hard")
INPUTS = {**np.load(goldens.FIXTURES / "inputs.npz"), **np.load(goldens.FIXTURES / "field_inputs.npz")}
INPUTS["losses"] = np.load(goldens.FIXTURES / "velo_f64.npz")["losses"]


def tensor(array: Any) -> Tensor:
    return torch.tensor(np.asarray(array)).double()


class VeLOGolden(NamedTuple):
    """One configuration's runs."""

    data: Any
    num_steps: int

    def rule(self, **config: Any) -> VeLO:
        """The rule in float64, for tensors that lie as the record has them: ties are decided on their own dims."""
        theta = {name: value.double() for name, value in read_theta(goldens.FIXTURES / "velo_params").items()}
        given = {k.split("/")[1]: v.item() for k, v in self.data.items() if k.startswith("config/")}
        return VeLO.from_jax(theta, **{**given, "layout": "jax", **config})

    def recorded(self, key: str) -> Tensor:
        return tensor(self.data[key])


def _load(name: str) -> VeLOGolden:
    data = dict(np.load(goldens.FIXTURES / f"{name}.npz"))
    return VeLOGolden(data, int(data["num_steps"]))


GOLDENS = {name: _load(name) for name in ("velo_f64", "velo_bugged_f64")}


def leaves(tree: str) -> list[str]:
    return sorted(key.split("/")[2] for key in INPUTS if key.startswith(f"{tree}/params0/"))


def length(tree: str) -> int:
    """How many steps are recorded."""
    return 25 if tree == "mixed" else 11


class Step(NamedTuple):
    """What a step of a tree did."""

    inputs: Tensor  # (T, 30) of the LSTM
    heads: list[tuple[Tensor, Tensor]]  # controls and step factor of each leaf
    params: dict[str, Tensor]  # after the step
    states: dict[str, Any]
    run: Any


def replay(rule: VeLO, golden: VeLOGolden, tree: str, num_steps: int) -> Iterator[Step]:
    """Our rule's steps on a tree's recorded gradients."""
    meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
    params = {leaf: tensor(INPUTS[f"{tree}/params0/{leaf}"]) for leaf in leaves(tree)}
    states = {leaf: rule.init_state(param) for leaf, param in params.items()}
    run = rule.init_run_state(torch.zeros((), dtype=torch.float64))
    for number in range(num_steps):
        grads = {leaf: tensor(INPUTS[f"{tree}/grads/{leaf}"][number]) for leaf in params}
        context = StepContext(tensor(number), tensor(INPUTS["losses"][number]), golden.num_steps)
        run = rule.update_run_state(meta_params, run, params, context)
        context = context._replace(run=run)
        inputs = rule.lstm_inputs(params.values(), states.values(), context)
        _, states = rule.shared_context(meta_params, grads, states, params, context)
        heads = [rule.heads(meta_params, states[leaf].hidden) for leaf in params]
        for leaf, param in params.items():
            delta, states[leaf] = rule.update(meta_params, grads[leaf], states[leaf], param, context)
            params[leaf] = param + delta
        yield Step(inputs, heads, dict(params), dict(states), run)
