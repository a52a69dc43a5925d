"""Throughput of meta-training: inner steps per second, eager and with `compiled=True` (on the CPU, the rule's kernel).

Counted are *member-steps*: one training step of one inner run, including its batch, gradient and update. The two sides
of an antithetic pair are separate runs. PES estimates are timed as MetaTrainer calls them. The time includes drawing
batches and perturbations, resets and the estimate's arithmetic, but not compilation or the meta-optimizer.

  small      MLP 64-32-10 (2,410 parameters), batch 64, 32 runs (16 pairs), truncation 50, on digits
  reference  MLP 784-32-10 (25,450 parameters), batch 64, 4 tasks with a pair of runs each, truncation 50, on made-up
             images of 28 x 28. The JAX reference reaches 196 to 205 inner steps/s, on two busy cores; it is not
             recorded whether that counts pairs or both sides, so both counts are printed.

Run: python examples/benchmarks/meta_training.py [--rounds 5] [--threads 1] [--out FILE.json] [--without-compiled]
     python examples/benchmarks/meta_training.py --populations 1 4 16 64 256 1024 [--out NAME]     NAME.csv, NAME.png
Two minutes on one core. Eager and compiled take turns. Times are CPU times of the process, which other programs hardly
affect; with several threads they are wall times.
"""

import argparse
import csv
import json
import statistics
import time
from pathlib import Path

import torch

import lightning_lopt as lopt
from lightning_lopt import tasks
from lightning_lopt.meta.estimators import PES
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.tasks.datasets import synthetic

TRUNCATION = 50
CASES = {
    "small": (lambda: tasks.make("digits-mlp"), 16),
    "reference": (lambda: tasks.supervised.build("mlp", "mlp", synthetic((1, 28, 28)), hidden=(32,), batch_size=64), 4),
}


class Bench:
    """One case with one backend; each call advances it by a truncation."""

    def __init__(self, task: tasks.Task, pairs: int, compiled: bool) -> None:
        torch.manual_seed(0)
        rule = lopt.rules.make("star")
        self.unroll = Unroll(rule, task, "raw", compiled=compiled)
        self.estimator = PES(num_pairs=pairs, truncation=TRUNCATION, horizon=Horizon(2000))
        self.meta_params = {name: param.detach() for name, param in rule.named_parameters()}
        self.generator = torch.Generator().manual_seed(0)
        self.state = self.estimator.init(self.unroll, self.meta_params, self.generator)

    def seconds(self, clock) -> float:
        start = clock()
        estimate = self.estimator.estimate(self.unroll, self.meta_params, self.state, self.generator)
        self.state = estimate.state
        return clock() - start


def measure(case: str, rounds: int, clock, compiled: bool) -> dict[str, object]:
    make, pairs = CASES[case]
    task = make()
    benches = {name: Bench(task, pairs, name == "compiled") for name in ("eager", "compiled")[: 1 + compiled]}
    first = {name: bench.seconds(clock) for name, bench in benches.items()}  # compilation
    times = {name: [] for name in benches}
    for _ in range(rounds):
        for name, bench in benches.items():
            times[name].append(bench.seconds(clock))
    found = {"case": case, "parameters": task.num_params, "pairs": pairs, "truncation": TRUNCATION, "rounds": rounds}
    for name, seconds in times.items():
        rates = sorted(2 * pairs * TRUNCATION / second for second in seconds)
        found[name] = {"member_steps_per_s": statistics.median(rates), "lowest": rates[0], "highest": rates[-1]}
        found[name]["pair_steps_per_s"] = found[name]["member_steps_per_s"] / 2
        found[name]["first_s"] = first[name]
    if compiled:
        ratios = [slow / fast for slow, fast in zip(times["eager"], times["compiled"], strict=True)]
        found["compiled_over_eager"] = statistics.median(ratios)
    return found


def measure_populations(sizes: list[int], rounds: int, clock) -> list[dict[str, float]]:
    """Time the small case without an estimator, population sizes in turns; each run has its own meta-parameters."""
    torch.manual_seed(0)
    rule, generator = lopt.rules.make("star"), torch.Generator().manual_seed(0)
    unroll, rows, states = Unroll(rule, CASES["small"][0](), "raw"), [], {}
    rates = {size: [] for size in sizes}
    for size in sizes:
        meta = {name: p.detach().expand(size, *p.shape).contiguous() for name, p in rule.named_parameters()}
        states[size] = meta, unroll.start(generator, torch.full((size,), 10**6))
    for number in range(rounds + 1):
        for size, (meta, inner) in states.items():
            steps, start = max(2, 128 // size), clock()
            with torch.no_grad():
                inner, _ = unroll.run(meta, inner, steps, generator, lambda n: torch.full((n,), 10**6), batched=True)
            states[size] = meta, inner
            rates[size] += [size * steps / (clock() - start)] if number else []  # the first warms up
    for size, found in rates.items():
        rows.append({"runs": size, "member_steps_per_s": statistics.median(found), "lowest": min(found), "highest": max(found)})  # fmt: skip # noqa: E501
        print("{runs:5d} runs {member_steps_per_s:9,.0f} member-steps/s ({lowest:,.0f} to {highest:,.0f})".format(**rows[-1]))  # fmt: skip # noqa: E501
    return rows


def draw(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    low, middle, high = ([row[key] for row in rows] for key in ("lowest", "member_steps_per_s", "highest"))
    axes.fill_between([row["runs"] for row in rows], low, high, alpha=0.2)
    axes.loglog([row["runs"] for row in rows], middle, "o-")
    axes.set(xlabel="inner runs at once", ylabel="training steps of inner runs a second")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--populations", type=int, nargs="+", help="numbers of inner runs, instead of the cases")
    parser.add_argument("--without-compiled", action="store_true", help="compilation takes a minute or more")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    if arguments.populations:
        rows = measure_populations(arguments.populations, arguments.rounds, clock)
        if arguments.out:
            with arguments.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            draw(rows, arguments.out.with_suffix(".png"))
        return
    results = []
    for case in arguments.case:
        found = measure(case, arguments.rounds, clock, not arguments.without_compiled)
        results.append({**found, "threads": arguments.threads, "torch": torch.__version__})
        print(f"{case}: {found['parameters']:,} parameters, {2 * found['pairs']} runs of {found['pairs']} pairs")
        for name in ("eager", "compiled")[: 1 if arguments.without_compiled else 2]:
            row = found[name]
            print(
                f"  {name:<9}{row['member_steps_per_s']:9,.0f} member-steps/s "
                f"({row['lowest']:,.0f} to {row['highest']:,.0f}), {row['pair_steps_per_s']:,.0f} pair-steps/s; "
                f"the first truncation took {row['first_s']:.1f} s"
            )
        if not arguments.without_compiled:
            print(f"  compiled / eager {found['compiled_over_eager']:.2f}x, median of {arguments.rounds} paired rounds")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
