"""Fifty steps of the bundled `star` on fixed gradients, recorded when it was a configuration of the paper's rule."""

import numpy as np
import torch
from goldens import FIXTURES
from torch import Tensor, nn

import lightning_lopt as lopt

SHAPES = [(12, 20), (6, 3, 3, 3), (17,), (), (5, 1, 7), (33, 8)]
STEPS = 50
LENGTHS = {"known": STEPS, "unknown": None}


def gradient(param: Tensor, index: int, step: int) -> Tensor:
    """A pull to zero plus waves that look like noise, from sines alone: the same on every machine."""
    place = torch.arange(param.numel(), dtype=torch.float64).reshape(param.shape)
    noise = 0.1 * torch.sin(12.9898 * (place + 1) + 78.233 * (index + 1) + 3.7 * step) * (0.2 + 0.01 * index)
    return (0.05 * param.double() + noise + 0.02 * torch.sin(0.3 * place)).to(param.dtype)


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    found = []
    for index, shape in enumerate(SHAPES):
        place = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        found.append(nn.Parameter((torch.cos(place * 1.3 + index) * 0.1).reshape(shape).to(dtype)))
    return found


def trajectory(length: str, dtype: torch.dtype, backend: str, **options: object) -> dict[int, list[Tensor]]:
    """Step -> parameters, at the recorded steps."""
    params, found = parameters(dtype), {}
    optimizer = lopt.RuleOptimizer(
        params, lopt.load_rule("star"), num_steps=LENGTHS[length], backend=backend, **options
    )
    for step in range(STEPS):
        for index, param in enumerate(params):
            param.grad = gradient(param.detach(), index, step)
        optimizer.step()
        if step + 1 in (1, 10, STEPS):
            found[step + 1] = [param.detach().clone() for param in params]
    return found


def recorded(length: str, dtype: torch.dtype) -> dict[int, list[Tensor]]:
    name = str(dtype).removeprefix("torch.")
    with np.load(FIXTURES / "star_50_steps.npz") as file:
        steps = sorted({int(key.split("/")[2]) for key in file})
        return {
            step: [torch.from_numpy(file[f"{length}/{name}/{step}/{i}"]) for i in range(len(SHAPES))] for step in steps
        }
