"""CPU time of whole training steps (forward, backward, optimizer) with the bundled `star`, relative to AdamW (foreach).

    python examples/benchmarks/training.py                                # MLP, ResNet-18 at 32 px, a 3.7M transformer
    python examples/benchmarks/training.py --models resnet50 gpt2 vit --batch 1 --rounds 5    # ten minutes, 12 GB

The networks are defined here, and their data are random numbers. Copies of a network take turns, step by step; the
figure is the median of the rounds' ratios. Times are CPU times of the process, or wall times with --threads above 1. A
small batch makes the optimizer's fraction of a step larger, and so the ratios.
"""

import argparse
import csv
import re
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lightning_lopt as lopt


class Residual(nn.Module):
    """A residual block, plain (ResNet-18) or with a bottleneck (ResNet-50)."""

    def __init__(self, inside, width, stride, bottleneck):
        super().__init__()
        outside = 4 * width if bottleneck else width
        kernels = [(inside, width, 1, 1), (width, width, 3, stride), (width, outside, 1, 1)]
        plain = [(inside, width, 3, stride), (width, width, 3, 1)]
        layers = []
        for a, b, size, step in kernels if bottleneck else plain:
            layers += [nn.Conv2d(a, b, size, step, size // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        change = [nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)]
        self.skip = nn.Sequential(*change) if inside != outside or stride > 1 else nn.Identity()

    def forward(self, x):
        return torch.relu(self.body(x) + self.skip(x))


def resnet(blocks, bottleneck, classes, small):
    first = nn.Conv2d(3, 64, 3, 1, 1, bias=False) if small else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    layers = [first, nn.BatchNorm2d(64), nn.ReLU(), *([] if small else [nn.MaxPool2d(3, 2, 1)])]
    inside = 64
    for stage, count in enumerate(blocks):
        for index in range(count):
            layers.append(Residual(inside, 64 * 2**stage, 2 if stage and not index else 1, bottleneck))
            inside = 64 * 2**stage * (4 if bottleneck else 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


class Transformer(nn.Module):
    """Tokens or image patches, learned positions, pre-norm blocks."""

    def __init__(self, embed, width, layers, heads, length, outputs, causal):
        super().__init__()
        self.embed, self.positions = embed, nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head, self.causal = nn.Linear(width, outputs), causal

    def forward(self, x):
        x = self.embed(x)
        x = x + self.positions[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        x = self.blocks(x, mask=mask, is_causal=self.causal)
        return self.head(x).flatten(0, 1) if self.causal else self.head(x.mean(1))


class Patches(nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self.project = nn.Conv2d(3, width, size, size)

    def forward(self, x):
        return self.project(x).flatten(2).mT


def images(batch, side, classes):
    return torch.randn(batch, 3, side, side), torch.randint(classes, (batch,))


def tokens(batch, length, vocabulary):
    text = torch.randint(vocabulary, (batch, length + 1))
    return text[:, :-1], text[:, 1:].flatten()


MODELS = {  # name -> (network, batch -> data, usual batch)
    "mlp": (
        lambda: nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)),
        lambda batch: (torch.randn(batch, 784), torch.randint(10, (batch,))),
        128,
    ),
    "resnet18": (lambda: resnet((2, 2, 2, 2), False, 10, True), lambda batch: images(batch, 32, 10), 64),
    "transformer": (
        lambda: Transformer(nn.Embedding(1024, 256), 256, 4, 8, 128, 1024, True),
        lambda batch: tokens(batch, 128, 1024),
        16,
    ),
    "resnet50": (lambda: resnet((3, 4, 6, 3), True, 1000, False), lambda batch: images(batch, 224, 1000), 128),
    "gpt2": (
        lambda: Transformer(nn.Embedding(50257, 768), 768, 12, 12, 1024, 50257, True),
        lambda batch: tokens(batch, 1024, 50257),
        8,
    ),
    "vit": (
        lambda: Transformer(Patches(16, 768), 768, 12, 12, 196, 1000, False),
        lambda batch: images(batch, 224, 1000),
        64,
    ),
}


def measure(name, batch, rounds, repeats, clock):
    make, data, usual = MODELS[name]
    inputs, targets = data(batch or usual)
    rules = {"star": lopt.load_rule("star")}
    runs = {}
    for label in ("AdamW", *rules):
        torch.manual_seed(0)
        network = make()
        parameters = list(network.parameters())
        if label == "AdamW":
            runs[label] = network, torch.optim.AdamW(parameters, foreach=True)
        else:
            optimizer = lopt.RuleOptimizer(parameters, rules[label], safeguard=True, num_steps=1000)
            optimizer.set_roles(network)
            runs[label] = network, optimizer

    def step(network, optimizer):
        start = clock()
        for _ in range(repeats):
            cross_entropy(network(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        return (clock() - start) / repeats

    seconds = {label: [] for label in runs}
    for number in range(rounds + 1):  # the first round creates the state
        for label, run in runs.items():
            seconds[label] += [step(*run)] if number else [step(*run)][:0]
    count = sum(p.numel() for p in runs["star"][0].parameters())
    row = {"model": name, "parameters": count, "batch": batch or usual, "backend": runs["star"][1].backend}
    row |= {f"{label} ms": 1e3 * statistics.median(values) for label, values in seconds.items()}
    for label in rules:
        ratios = sorted(a / b for a, b in zip(seconds[label], seconds["AdamW"], strict=True))
        row[f"{label} ratio"] = statistics.median(ratios)
        row |= {f"{label} lowest": ratios[0], f"{label} highest": ratios[-1]}
    print(
        "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()),
        flush=True,
    )
    return row


def table(rows):
    """Of the README."""
    lines = ["| | parameters | batch | `star` |", "|---|---|---|---|"]
    for row in rows:
        ratio = f"{row['star ratio']:.2f} ({row['star lowest']:.2f} to {row['star highest']:.2f})"
        lines.append(f"| {row['model']} | {row['parameters'] / 1e6:.2g}M | {row['batch']} | {ratio} |")
    return lines


def insert(path, lines):
    """Replace what stands in the file's block of this benchmark."""
    text = path.read_text(encoding="utf-8")
    block = re.compile(r"(<!-- benchmark: training -->\n).*?(<!-- /benchmark -->)", re.DOTALL)
    if not block.search(text):
        raise SystemExit(f"{path} has no block '<!-- benchmark: training -->' ... '<!-- /benchmark -->'; add it.")
    path.write_text(block.sub(lambda found: "\n".join([found[1].rstrip("\n"), *lines, found[2]]), text), "utf-8")


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(max(4, 1.4 * len(rows)), 3.5), layout="constrained")
    for shift, label in ((0, "star"),):
        low, middle, high = ([row[f"{label} {key}"] for row in rows] for key in ("lowest", "ratio", "highest"))
        spread = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        axes.errorbar([i + shift for i in range(len(rows))], middle, spread, fmt="o", label=label)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row["model"] for row in rows])
    axes.set_ylabel("time of a training step / AdamW foreach")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["mlp", "resnet18", "transformer"])
    parser.add_argument("--batch", type=int, help="default: the usual one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, help="steps of one optimizer in a round; default 20 for the MLP, else 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="training", help="of .csv and .png")
    parser.add_argument("--insert", type=Path, metavar="FILE", help="fill this file's block 'training' with the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    rows = []
    for name in options.models:
        repeats = options.repeats or (20 if name == "mlp" else 1)
        rows.append(measure(name, options.batch, options.rounds, repeats, clock))
        with Path(f"{options.out}.csv").open("w", newline="") as file:  # after every model
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    draw(rows, f"{options.out}.png")
    if options.insert:
        insert(options.insert, [*table(rows), "", f"Medians (and ranges) of {options.rounds} rounds."])


if __name__ == "__main__":
    main()
