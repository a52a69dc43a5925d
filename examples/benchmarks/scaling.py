"""Simulate meta-training by evolution strategies on many workers: variance of the gradient, and bytes to send.

    python examples/benchmarks/scaling.py --workers 8 64 1000 --pairs 1

Draws each worker's estimate from its own seed, and compares means over so many workers with the mean over all others.
Also rebuilds the mean gradient from every worker's seed and losses alone, and prints the difference from the mean of
the gradients themselves.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import lightning_lopt as lopt
from lightning_lopt.meta.estimators import draw_perturbations
from lightning_lopt.meta.unroll import Unroll


def estimates(unroll: Unroll, theta: dict[str, Tensor], number: int, horizon: int, std: float) -> tuple[Tensor, Tensor]:
    """(number, P) gradients by one antithetic pair each (Full ES), and (number,) differences of the losses."""
    generator = torch.Generator().manual_seed(0)
    noise = draw_perturbations(theta, std, number, generator)
    both = {name: torch.cat([p + noise[name], p - noise[name]]) for name, p in theta.items()}
    inner = unroll.start(generator, torch.full((number,), horizon), sides=2)
    lengths = lambda n: torch.full((n,), horizon)  # noqa: E731
    _, record = unroll.run(both, inner, horizon, generator, lengths, sides=2, batched=True)
    plus, minus = record.losses.mean(0).chunk(2)
    flat = torch.cat([noise[name].flatten(1) for name in theta], 1)
    return (plus - minus).unsqueeze(1) * flat / (2 * std**2), plus - minus


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64, 1000])
    parser.add_argument("--pairs", type=int, default=1, help="antithetic pairs of each worker")
    parser.add_argument("--draws", type=int, default=8000, help="number of simulated pairs")
    parser.add_argument("--horizon", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rule = lopt.rules.make("star", nominal_stepsize=1e-2, step_mult=1e-3)
    unroll = Unroll(rule, lopt.tasks.make("quadratic"), objective="log")
    theta = {name: p.detach() for name, p in rule.named_parameters()}
    std = 0.01
    with torch.no_grad():
        drawn, differences = estimates(unroll, theta, arguments.draws, arguments.horizon, std)
        noise = draw_perturbations(theta, std, arguments.draws, torch.Generator().manual_seed(0))
    again = torch.cat([noise[name].flatten(1) for name in theta], 1)
    rebuilt = (differences.unsqueeze(1) * again / (2 * std**2)).mean(0)
    size = drawn.shape[1]
    print(f"{arguments.draws} pairs of {size} meta-parameters; finite: {bool(drawn.isfinite().all())}")
    print(f"from seeds and scalars alone: largest difference {float((rebuilt - drawn.mean(0)).abs().max()):.1e}")
    print(
        "workers  pairs  groups  variance/1 pair  cosine to the others' mean  bytes: all-reduce  seeds+scalars  drawn"
    )
    one = float(drawn.var(0).sum())
    for workers in arguments.workers:
        each = workers * arguments.pairs
        groups = [group for group in drawn.split(each) if len(group) == each]
        means = torch.stack([group.mean(0) for group in groups])
        total, count = drawn.sum(0), len(drawn)
        alike = [cosine(m, (total - m * each) / (count - each)) for m in means] if count > each else [float("nan")]
        variance = float(means.var(0).sum()) / one if len(means) > 1 else float("nan")
        ring = 2 * (workers - 1) / workers * 4 * size
        scalars = (workers - 1) * (8 + 4 * arguments.pairs)
        print(
            f"{workers:7d} {arguments.pairs:6d} {len(means):7d} {variance:16.5f} "
            f"{sum(alike) / len(alike):27.3f} {ring:18.0f} {scalars:14d} {each * size:8d}"
        )


if __name__ == "__main__":
    main()
