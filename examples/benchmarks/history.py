"""Time of a step of the normalized-history rules and Multiscale Adam, divided by that of AdamW (foreach).

One matrix of a million parameters; the optimizers take turns, CPU time of the process, one thread. Beside the ratio
stands the state in bytes per parameter, counted from the optimizer's own tensors. Most of the time goes into the
networks: 750 multiply-adds of each parameter for k_timesteps, 800 for k_momentums, 550 for mlp, 3,050 for rnn2. A core
that does 16 in a cycle of 0.3 ns needs 14, 15, 10 and 57 ns for these alone, where all of AdamW takes 2 to 3.

Run: python examples/benchmarks/history.py [--rounds 9] [--params 1000000] [--out FILE.json]
Half a minute on one core.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import lightning_lopt as lopt

RULES = {
    "mng, k = 5": ("mng", {}),
    "k_timesteps, k = 5": ("k_timesteps", {}),
    "k_momentums, k = 6": ("k_momentums", {}),
    "multiscale_adam la_b, k = 6": ("multiscale_adam", {"mixer": "la_b"}),
    "multiscale_adam mlp, k = 6": ("multiscale_adam", {"mixer": "mlp"}),
    "multiscale_adam rnn2, k = 6": ("multiscale_adam", {"mixer": "rnn2"}),
}


def warmed_up(make, shape: tuple[int, ...]) -> torch.optim.Optimizer:
    """An optimizer of one parameter that has taken three steps."""
    param = nn.Parameter(torch.randn(shape))
    param.grad = torch.randn(shape)
    optimizer = make([param])
    for _ in range(3):
        optimizer.step()
    return optimizer


def bytes_of_state(optimizer: torch.optim.Optimizer) -> float:
    """Per parameter."""
    (param,) = optimizer.param_groups[0]["params"]
    tensors = [value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / param.numel()


def measure(rounds: int, num_params: int) -> dict[str, dict[str, float]]:
    """Name -> milliseconds of a step, the ratio to AdamW's (median over rounds), bytes of state per parameter."""
    shape = (num_params // 1000, 1000)
    optimizers = {"AdamW foreach": warmed_up(lambda params: torch.optim.AdamW(params, foreach=True), shape)}
    for name, (kind, options) in RULES.items():
        torch.manual_seed(0)
        rule = lopt.rules.make(kind, **options)
        optimizers[name] = warmed_up(lambda params, rule=rule: lopt.RuleOptimizer(params, rule), shape)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            start = time.process_time()
            optimizer.step()
            times[name].append(time.process_time() - start)
    ratios = {name: [a / b for a, b in zip(row, times["AdamW foreach"], strict=True)] for name, row in times.items()}
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(times[name]),
            "ratio": statistics.median(ratios[name]),
            "bytes": bytes_of_state(optimizer),
        }
        for name, optimizer in optimizers.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--params", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.rounds, arguments.params)
    for name, row in found.items():
        print(f"{name:<30}{row['milliseconds']:8.1f} ms{row['ratio']:8.1f} x AdamW{row['bytes']:8.0f} bytes/parameter")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
