"""What the tests of the CPU's kernels share: rules whose every part acts, and runs beside the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any

import torch
from optimizer_cases import set_gradients, snapshot, star
from torch import Tensor

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.rules import UpdateRule, matrix

# Fewer, equally many and more coordinates than lanes, chunks and blocks; inner dims that fit into lanes and do not;
# rows from one number to several blocks.
SHAPES = [(), (5,), (700,), (1, 1), (4, 3), (17, 33), (130, 257), (300, 200), (2, 3, 3, 3), (16, 3, 3, 3), (3, 40, 7)]
SHAPES += [
    (6, 5),
    (6, 5),
    (3, 9, 8),
    (20, 32, 3, 3),
    (7, 30, 2, 10),
    (9, 12, 5, 5),
    (30, 25, 20),
    (1, 70000),
    (70000, 1),
    (40000,),
]


def scheduled(seed: int = 0, **config: Any) -> UpdateRule:
    """The rule with random curves, decays off their defaults, and all mechanisms on."""
    rule = lopt.rules.make("scheduled", **{"eps": 1e-6, **config})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in rule.named_parameters():
            if name.endswith("decays"):
                value.add_(0.01)
            else:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        rule.centering.copy_(torch.tensor([0.9, 0.5]))
        rule.caution.copy_(torch.tensor([0.9, 0.3]))
        rule.growth.copy_(torch.tensor([-0.9, 0.5]))
        rule.orthogonal.copy_(torch.tensor([0.9, 0.4]))
        rule.first_scale.fill_(0.7)
        rule.cap.fill_(-1.0)  # which holds some tensors back, and others not
        rule.decay.fill_(0.5)
    return rule


def in_roles(params: Iterable[Any]) -> list[dict[str, Any]]:
    """A group for each parameter, in the roles in turn; groups as they are."""
    params = list(params)
    if isinstance(params[0], dict):
        return params
    return [{"params": [param], "role": role} for param, role in zip(params, cycle(matrix.ROLES), strict=False)]


RULES: dict[str, Callable[[], UpdateRule]] = {"scheduled": scheduled, "star": star}  # a new C++ kernel adds its rule


def both(
    make_params: Callable[[], Any],
    rule: UpdateRule,
    steps: int = 50,
    scale: float = 1.0,
    backends: tuple[str, str] = ("reference", "fused"),
    gradients: Callable[..., None] = set_gradients,
    **options: Any,
) -> list[RuleOptimizer]:
    """The reference's optimizer and the kernel's after the same steps."""
    pair = []
    for backend in backends:
        optimizer = RuleOptimizer(in_roles(make_params()), rule, backend=backend, **options)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for step in range(steps):
            gradients(params, step, scale)
            optimizer.step()
        pair.append(optimizer)
    return pair


def centered_gradients(params: list[Tensor], step: int, scale: float) -> None:
    """With means and with zeros; in quarters, as signs of what cancels to 1e-7 of itself are the rounding's."""
    set_gradients(params, step, scale)
    for param in params:
        there = torch.rand(param.shape, generator=torch.Generator().manual_seed(step)) > 0.3
        param.grad.mul_(4).round_().div_(4).add_(2).mul_(there)


def assert_same(reference: RuleOptimizer, other: RuleOptimizer, tolerance: float = 1e-5) -> None:
    """Parameters and states, relative to the largest number of each."""
    for a, b in zip(snapshot(reference), snapshot(other), strict=True):
        assert a.dtype == b.dtype
        size = a.double().abs().max().item() if a.numel() else 0.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * max(size, 1e-6))
