"""The CPU time of an optimizer's step beside AdamW's, its memory, and how both grow with parameters and tensors.

    python examples/benchmarks/steps.py                                   # networks' shapes: steps.csv, steps.png
    python examples/benchmarks/steps.py --cases mlp1M resnet20 --rounds 9
    python examples/benchmarks/steps.py --cases grow                      # 1e4 to 1e7 parameters in 8 tensors
    python examples/benchmarks/steps.py --cases "grow 1e+08" --rounds 5 --without "STAR (paper), reference"    # 20 GB
    python examples/benchmarks/steps.py --cases split                     # 1e6 parameters in 1 to 1000 tensors

All optimizers of a case take turns; a figure is the median over rounds, a ratio the median of the rounds' ratios to
AdamW (foreach). Times are of the process, so that other programs hardly matter; with --threads above 1 they are wall
times. Memory is what the process gains: by state, per parameter, and at the peak of one step above what it holds, per
parameter of the largest tensor.
"""

import argparse
import csv
import ctypes
import gc
import statistics
import time
from pathlib import Path

import torch

import lightning_lopt as lopt
from lightning_lopt import kernels


def dense(*widths):
    return [shape for a, b in zip(widths[:-1], widths[1:], strict=True) for shape in ((b, a), (b,))]


def resnet20():
    shapes, before = [(16, 3, 3, 3), (16,), (16,)], 16
    for width in (16, 32, 64):
        for _ in range(3):
            shapes += [(width, before, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            before = width
    return [*shapes, *dense(64, 10)]


def transformer(width, layers, vocabulary, context):
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    return [
        (vocabulary, width),
        (context, width),
        *layers * [*block, *dense(width, 4 * width, width)],
        (width,),
        (width,),
    ]


CASES = {
    "mlp26k": dense(784, 32, 32, 10),
    "mlp118k": dense(784, 128, 128, 10),
    "resnet20": resnet20(),
    "mlp1M": dense(1024, 512, 512, 512, 10),
    "transformer3.7M": transformer(256, 4, 1024, 512),
    "mlp10M": dense(2048, 2048, 2048, 1024, 10),
    **{f"grow {n:g}": 8 * [(round((n / 8) ** 0.5),) * 2] for n in (1e4, 1e5, 1e6, 1e7)},
    **{f"split {t}": t * [(round(1e6 / t / 32), 32)] for t in (1, 10, 100, 1000)},
}
SLOW = ("star, eager", "STAR (paper), reference")  # a step a round
LARGE = {"grow 1e+08": 8 * [(3536, 3536)]}  # 2 GB of memory for each optimizer


def contenders(params):
    """name -> a function that makes the optimizer. For star, every matrix is a hidden layer: what costs most."""
    groups = [{"params": [param], "role": "hidden"} for param in params]
    paper = lopt.rules.make("star", nominal_stepsize=1e-2)
    star = lopt.load_rule("star")

    def in_eager(rule):  # as where there is no compiler
        optimizer = lopt.RuleOptimizer(groups, rule, safeguard=True, num_steps=1000)
        optimizer._runtime._kernels["cpu"] = kernels.find_fallback(rule, "cpu")
        return optimizer

    torch_optimizers = {
        "AdamW foreach": lambda: torch.optim.AdamW(params, foreach=True),
        "AdamW for-loop": lambda: torch.optim.AdamW(params, foreach=False),
        "AdamW fused": lambda: torch.optim.AdamW(params, fused=True),
        "SGD momentum": lambda: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
        "Adafactor": lambda: torch.optim.Adafactor(params),
        "star": lambda: lopt.RuleOptimizer(groups, star, safeguard=True, num_steps=1000),
        "star, eager": lambda: in_eager(star),
        "STAR (paper)": lambda: lopt.RuleOptimizer(params, paper, safeguard=True),
        "STAR (paper), reference": lambda: lopt.RuleOptimizer(params, paper, safeguard=True, backend="reference"),
    }
    if hasattr(torch.optim, "Muon") and all(p.dim() == 2 for p in params):  # Muon takes matrices alone
        torch_optimizers["Muon"] = lambda: torch.optim.Muon(params)
    return torch_optimizers


def new_params(shapes):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = 0.01 * torch.randn(param.shape, generator=generator)
    return params


def memory(key):
    """A figure of this process in bytes, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def peak_of(step):
    """Bytes that a step needs for a while."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what has been freed is still the process's, and would hide what a step takes
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    before = memory("VmRSS")
    step()
    return max(0, memory("VmHWM") - before)


def measure(name, shapes, rounds, clock, without):
    sizes = [torch.Size(shape).numel() for shape in shapes]
    size, largest, rows, optimizers = sum(sizes), max(sizes), [], {}
    for label in contenders(new_params(shapes)):
        if label in without:
            continue
        optimizer = contenders(new_params(shapes))[label]()
        optimizer.step()
        optimizers[label] = optimizer
    repeats = max(1, min(50, int(5e5 / size)))
    seconds = {label: [] for label in optimizers}
    for _ in range(rounds):
        for label, optimizer in optimizers.items():
            start = clock()
            times = 1 if label in SLOW else repeats
            for _ in range(times):
                optimizer.step()
            seconds[label].append((clock() - start) / times)
    for label, optimizer in optimizers.items():
        state = {t.data_ptr(): t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values()}
        ratios = sorted(a / b for a, b in zip(seconds[label], seconds["AdamW foreach"], strict=True))
        rows.append({
            "case": name, "parameters": size, "tensors": len(shapes), "optimizer": label,
            "milliseconds": 1e3 * statistics.median(seconds[label]), "ratio": statistics.median(ratios),
            "lowest ratio": ratios[0], "highest ratio": ratios[-1], "state bytes/parameter": sum(state.values()) / size,
            "peak bytes/parameter of the largest tensor": peak_of(optimizer.step) / largest,
        })  # fmt: skip
        print("{case:16s} {optimizer:21s} {milliseconds:9.3f} ms {ratio:7.2f}x ({lowest ratio:.2f} to "
              "{highest ratio:.2f}), {state bytes/parameter:5.1f} B state, {peak bytes/parameter of the largest tensor:6.1f} B peak".format(**rows[-1]), flush=True)  # fmt: skip # noqa: E501
    return rows


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases, labels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "optimizer"))
    figure, axes = plt.subplots(figsize=(max(5, 1.6 * len(cases)), 4), layout="constrained")
    for index, label in enumerate(labels):
        own = {row["case"]: row for row in rows if row["optimizer"] == label}
        at = [cases.index(case) + (index - len(labels) / 2) * 0.08 for case in own]
        values = [row["ratio"] for row in own.values()]
        spread = [[row["ratio"] - row["lowest ratio"] for row in own.values()],
                  [row["highest ratio"] - row["ratio"] for row in own.values()]]  # fmt: skip
        axes.errorbar(at, values, spread, fmt="o", markersize=5, linewidth=1, label=label)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_yscale("log")
    axes.set_ylabel("time of a step / AdamW foreach")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [name for name in CASES if not name.startswith(("grow", "split"))]
    parser.add_argument("--cases", nargs="+", default=default, help=f"of {[*CASES, *LARGE]}, or 'grow', 'split'")
    parser.add_argument("--without", nargs="*", default=[], help="optimizers to leave out, e.g. 'star, eager'")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="steps", help="of .csv and .png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = [name for name in CASES if name in options.cases or name.split()[0] in options.cases]
    rows = []
    for name in [*chosen, *(name for name in LARGE if name in options.cases)]:
        clock = time.process_time if options.threads == 1 else time.perf_counter
        rows += measure(name, {**CASES, **LARGE}[name], options.rounds, clock, options.without)
    if not rows:
        parser.error(f"no such case: {options.cases}")
    with Path(f"{options.out}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, f"{options.out}.png")


if __name__ == "__main__":
    main()
