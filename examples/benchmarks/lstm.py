"""CPU time of a step of the LSTM rule and of L2O-DMD's eigenvalues, relative to AdamW and to two torch LSTM cells.

    python examples/benchmarks/lstm.py                             # lstm.csv
    python examples/benchmarks/lstm.py --cases mlp118k --rounds 9

The contenders take turns. A time is the median over rounds, a ratio the median of the rounds' ratios; times are CPU
times on one thread. "two LSTMCells" are torch's own cells on inputs like the rule's, under no_grad and without readout.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from steps import CASES, new_params

import lightning_lopt as lopt
from lightning_lopt.rules.dmd import OnlineDMD


def cells(params):
    """A step of both LSTM layers over all coordinates at once."""
    size = sum(param.numel() for param in params)
    first, second = torch.nn.LSTMCell(2, 20), torch.nn.LSTMCell(20, 20)
    inputs = torch.cat([param.grad.reshape(-1, 1) for param in params]).repeat(1, 2)
    states = [torch.zeros(size, 20) for _ in range(4)]

    @torch.no_grad()
    def step():
        states[:2] = first(inputs, tuple(states[:2]))
        states[2:] = second(states[0], tuple(states[2:]))

    return step


def spectrum(params, num_snapshots, rank, snapshots="raw"):
    """A step that stores one more snapshot of all tensors and computes the eigenvalues."""
    online = OnlineDMD(rank=rank, num_snapshots=num_snapshots, snapshots=snapshots)
    held = [[online.init(param.detach()) for param in params]]

    @torch.no_grad()
    def step():
        held[0] = online.push(held[0], params, in_place=True)
        online.eigenvalues(held[0])

    for _ in range(num_snapshots + 1):
        step()
    return step


def contenders(shapes):
    """Name -> function that takes one step."""
    params = new_params(shapes)
    return {
        "AdamW foreach": torch.optim.AdamW(new_params(shapes), foreach=True).step,
        "two LSTMCells": cells(params),
        "lstm": lopt.RuleOptimizer(new_params(shapes), lopt.rules.make("lstm")).step,
        "eigenvalues m=5 R=1": spectrum(params, 5, 1),
        "eigenvalues m=5 R=3": spectrum(params, 5, 3),
        "eigenvalues m=10 R=1": spectrum(params, 10, 1),
    }


def measure(name, shapes, rounds, without=()):
    """Time all contenders on one case; returns a row for each."""
    steps = {label: step for label, step in contenders(shapes).items() if label not in without}
    seconds = {label: [] for label in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for label, step in steps.items():
            repeats = 1 if label in ("lstm", "two LSTMCells") else 5
            start = time.process_time()
            for _ in range(repeats):
                step()
            seconds[label].append((time.process_time() - start) / repeats)
    rows, size = [], sum(torch.Size(shape).numel() for shape in shapes)
    for label, times in seconds.items():
        row = {"case": name, "parameters": size, "what": label, "ns/parameter": 1e9 * statistics.median(times) / size}
        for other in ("AdamW foreach", "two LSTMCells"):
            if other in seconds:
                ratios = sorted(a / b for a, b in zip(times, seconds[other], strict=True))
                row |= {f"/ {other}": statistics.median(ratios), f"/ {other}, lowest": ratios[0]}
                row |= {f"/ {other}, highest": ratios[-1]}
        rows.append(row)
        print(", ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["mlp118k", "mlp1M"], choices=CASES)
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("lstm.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in options.cases for row in measure(name, CASES[name], options.rounds, options.without)]
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
