"""Fifty steps of the first flagship on fixed gradients, recorded when it was a configuration of the paper's rule."""

import numpy as np
import torch
from goldens import FIXTURES
from torch import Tensor, nn

import lightning_lopt as lopt

SHAPES = [(12, 20), (6, 3, 3, 3), (17,), (), (5, 1, 7), (33, 8)]
STEPS = 50
LENGTHS = {"known": STEPS, "unknown": None}
NUMBERS = {  # its readable numbers
    "anneal": 0.599051421,
    "bias_correction": 0.30657408,
    "caution_end": 0.8088591,
    "caution_start": 0.822545,
    "centering_end": 0.75474703,
    "centering_start": 0.86168396,
    "depth": -0.87216955,
    "eps": 1e-10,
    "fan_in": -0.5826365,
    "fast_offset": 0.08194125,
    "growth": -1.1211647,
    "length": -0.7000379,
    "mix_end": 0.41887796,
    "mix_start": 0.07362844,
    "nominal_stepsize": 0.010010005001667084,
    "peak": 0.83408046,
    "rms_offset": 0.13066414,
    "scale": 0.5180775,
    "size": -0.10905133,
    "slow_offset": -0.010301658,
    "start": -0.300605668,
    "start_length": 0.260030465,
    "strength_end": 0.47891632,
    "strength_start": 0.65650755,
    "unknown_early": -0.26206625,
    "unknown_late": -0.7166439,
    "unknown_level": 0.80298257,
    "vectors": -0.44296542,
    "warmup": 0.113935427,
}


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
    rule = lopt.rules.make("scheduled", **NUMBERS)
    groups = [{"params": params, "role": "other"}]
    optimizer = lopt.RuleOptimizer(groups, rule, num_steps=LENGTHS[length], backend=backend, **options)
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
