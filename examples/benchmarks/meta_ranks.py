"""Measure the overhead of distributed meta-training: MetaTrainer on one process and under DDP, in turns.

    python examples/benchmarks/meta_ranks.py --ranks 2 --rounds 5

Each process has as many inner runs as the single process, so without overhead a step would take the same time. Prints a
process's CPU time per step, including its messages and Lightning's work for DDP, relative to that of the single
process: median, smallest and largest of the rounds. Wall time is meaningful only on a machine with as many free cores
as processes.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

import lightning_lopt as lopt
from lightning_lopt.meta.estimators import PES
from lightning_lopt.meta.schedules import Horizon

WARMUP = 3  # steps before the measurement


class Clock(Callback):
    """Measures CPU and wall seconds per step, after a warm-up."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARMUP:
            self.start = time.process_time(), time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = batch_idx + 1 - WARMUP
        if trainer.is_last_batch:
            cpu, wall = time.process_time() - self.start[0], time.perf_counter() - self.start[1]
            torch.save([cpu / steps, wall / steps], self.path / f"rank{trainer.global_rank}.pt")


def fit(path: Path, ranks: int, arguments: argparse.Namespace) -> None:
    rule = {"kind": "star", "nominal_stepsize": 1e-2, "step_mult": 1e-4}
    estimator = PES(num_pairs=arguments.pairs, truncation=arguments.truncation, horizon=Horizon(1000))
    module = lopt.MetaTrainer(rule, [arguments.task], estimator, steps_per_epoch=arguments.steps + WARMUP)
    strategy: Any = SingleDeviceStrategy("cpu") if ranks == 1 else DDPStrategy(process_group_backend="gloo")
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=ranks, strategy=strategy, callbacks=[Clock(path)], **off
    )
    trainer.fit(module)


def run(ranks: int, arguments: argparse.Namespace) -> list[list[float]]:
    """Train on so many processes; returns CPU and wall seconds per step of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        children = []
        for rank in range(ranks):
            if child := os.fork():
                children.append(child)
                continue
            status = 1
            try:
                os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                fit(Path(scratch), ranks, arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if any(statuses):
            sys.exit("A process failed.")
        return [torch.load(Path(scratch, f"rank{rank}.pt")) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--task", default="digits-mlp")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--truncation", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ratios: dict[str, list[float]] = {"CPU": [], "wall": []}
    for number in range(arguments.rounds):
        alone, together = run(1, arguments), run(arguments.ranks, arguments)
        for place, name in enumerate(ratios):
            ratios[name].append(statistics.mean(rank[place] for rank in together) / alone[0][place])
        print(
            f"round {number}: {alone[0][0]:.4f} s of CPU a step alone, {[round(r[0], 4) for r in together]}", flush=True
        )
    for name, values in ratios.items():
        spread = f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"
        print(f"{arguments.ranks} processes, {name} time of a step / alone: {spread}")


if __name__ == "__main__":
    main()
