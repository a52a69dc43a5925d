"""What the tests of the history rules share: every branch of them, table 3.1, and how to run them."""

import torch
from torch import Tensor

from lightning_lopt.rules import NormalizedHistory, StepContext, make

VARIANTS = {  # name -> kind and options; every branch of the rule
    "mng": ("mng", {}),
    "mng, signs": ("mng", {"sign_only": True}),
    "mng, adam": ("mng", {"normalization": "adam"}),
    "k_timesteps": ("k_timesteps", {}),
    "k_timesteps, tanh": ("k_timesteps", {"step": "tanh", "parameter_inputs": True}),
    "k_timesteps, adam": ("k_timesteps", {"normalization": "adam", "reference": "current"}),
    "k_momentums": ("k_momentums", {}),
    "k_momentums, adam": ("k_momentums", {"normalization": "adam", "parameter_inputs": True}),
    "k_momentums, mid-range": ("k_momentums", {"reference": "mid-range", "eta_min_schedule": "cosine"}),
}
TABLE_3_1 = [  # oldest gradient first
    [1.0, 1.0, 1.0, 1.0, 1.0],
    [1.0, 1.0, 1.0, 1.0, -1.0],
    [1.0, 1.0, 1.0, -1.0, -1.0],
    [1.0, 1.0, -1.0, -1.0, -1.0],
    [1.0, -1.0, -1.0, -1.0, -1.0],
    [-1.0, -1.0, -1.0, -1.0, -1.0],
    [-0.1, -0.1, -0.1, -0.1, 1.0],
    [-0.1, -0.1, -0.1, -0.5, 1.0],
    [-0.1, -0.1, -0.25, -0.25, 1.0],
    [-0.1, -0.25, 0.0, 0.25, 1.0],
    [1.0, 0.25, 0.0, -0.25, -1.0],
    [0.0, 0.0, 0.0, -0.0, 0.0],
]


def randomized(rule: NormalizedHistory, seed: int, std: float = 1.0) -> NormalizedHistory:
    """The rule in float64 with meta-parameters that make large steps of either sign."""
    generator = torch.Generator().manual_seed(seed)
    rule = rule.double()
    with torch.no_grad():
        for value in rule.parameters():
            value.copy_(std * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return rule


def context(step: int, num_steps: int | None = None) -> StepContext:
    return StepContext(torch.tensor(float(step)), num_steps=num_steps)


def trajectory(rule, param: Tensor, grads, num_steps: int | None = None):
    """Yields the parameter and the state after each gradient."""
    meta_params, state = {k: v.detach() for k, v in rule.meta_params().items()}, rule.init_state(param)
    for step, grad in enumerate(grads):
        delta, state = rule.update(meta_params, grad, state, param, context(step, num_steps))
        param = param + delta
        yield param, state


def by_name(name: str, seed: int = 0, **more) -> NormalizedHistory:
    kind, options = VARIANTS[name]
    return randomized(make(kind, **{**options, **more}), seed)
