"""Kill training at random moments, resume it from its last complete checkpoint, and compare the results bit by bit.

    python examples/soak/interruption.py --kills 50

Inner training (a module under LearnedOptimizer) and meta-training (MetaTrainer) are each killed `--kills` times by
SIGTERM and by SIGKILL. Every step saves a checkpoint. Counts incomplete files, and results that differ from those of an
undisturbed run.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_lopt as lopt
from lightning_lopt.meta.estimators import PES
from lightning_lopt.meta.schedules import Horizon

STEPS = 60


class Batches:
    """A loader that saves its position, so a run can be resumed within its single epoch."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs, self.position = torch.randn(STEPS, 8, 4, generator=generator), 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < STEPS:
            self.position += 1
            yield self.inputs[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class End(Callback):
    """Writes what a run ended with."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        inner_runs = [t for t in tree_leaves(getattr(pl_module, "_states", [])) if isinstance(t, Tensor)]
        state = tree_leaves([optimizer.state_dict()["state"] for optimizer in trainer.optimizers])
        torch.save([*pl_module.state_dict().values(), *state, *inner_runs], self.path.with_suffix(".part"))
        os.replace(self.path.with_suffix(".part"), self.path)


def fit(folder: Path, module: L.LightningModule, loader: Any, *callbacks: Callback, resume: Path | None) -> None:
    saves = ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_last=True, enable_version_counter=False
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        max_epochs=1, callbacks=[*callbacks, saves, End(folder / "end.pt")], num_sanity_val_steps=0, **quiet
    )
    trainer.fit(module, loader, ckpt_path=resume)


def inner(folder: Path, resume: Path | None) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rule = lopt.rules.make("star", nominal_stepsize=1e-2, step_mult=1e-4)
    fit(folder, Module(), Batches(), lopt.LearnedOptimizer(rule), resume=resume)


def meta(folder: Path, resume: Path | None) -> None:
    rule = {"kind": "star", "nominal_stepsize": 1e-2, "step_mult": 1e-4}
    estimator = PES(num_pairs=2, truncation=2, horizon=Horizon(3, 6))
    module = lopt.MetaTrainer(rule, ["quadratic"], estimator, steps_per_epoch=STEPS)
    fit(folder, module, None, resume=resume)


def start(run: Callable[[Path, Path | None], None], folder: Path, resume: Path | None) -> int:
    """Fork a process that runs this; everything is imported already."""
    if child := os.fork():
        return child
    status, log = 1, os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        run(folder, resume)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def newest(folder: Path) -> tuple[Path | None, int]:
    """The last complete checkpoint, and how many files with a checkpoint's name are incomplete."""
    paths = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]), reverse=True)
    halves, found = 0, None
    for path in [*folder.glob("last.ckpt"), *paths[:3]]:
        try:
            torch.load(path, weights_only=True)
            found = path if found is None and path.stem != "last" else found
        except Exception as error:
            halves += 1
            print(f"{path.name} is incomplete: {error}", flush=True)
    return found, halves


def wait(child: int, seconds: float | None = None) -> bool:
    """Wait for a process; returns whether it ended within so many seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    return False


def soak(name: str, run: Callable[[Path, Path | None], None], sign: signal.Signals, kills: int, seed: int) -> int:
    """Kill runs so many times; returns the number of failures."""
    rng = random.Random(f"{seed} {name} {sign}")
    counts = {"kills": 0, "completed runs": 0, "resumed": 0, "from the start": 0, "incomplete files": 0, "differ": 0}
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed = Path(scratch, "undisturbed")
        undisturbed.mkdir()
        begun = time.monotonic()
        wait(start(run, undisturbed, None))
        if not (undisturbed / "end.pt").exists():
            log = (undisturbed / "log.txt").read_text()
            sys.exit(f"{name} fails even when it is not disturbed:\n{log[-2000:]}")
        duration = time.monotonic() - begun
        expected = torch.load(undisturbed / "end.pt", weights_only=True)
        number = 0
        while counts["kills"] < kills:
            folder = Path(scratch, str(number))
            folder.mkdir()
            number += 1
            while not (folder / "end.pt").exists():
                resume, halves = newest(folder)
                counts["incomplete files"] += halves
                counts["from the start" if resume is None else "resumed"] += 1
                child = start(run, folder, resume)
                if counts["kills"] == kills:
                    wait(child)
                elif not wait(child, rng.uniform(0, 0.5 * duration)):
                    os.kill(child, sign)
                    wait(child)
                    counts["kills"] += 1
            end = torch.load(folder / "end.pt", weights_only=True)
            same = len(end) == len(expected) and all(map(torch.equal, end, expected))
            counts["completed runs"] += 1
            counts["differ"] += not same
    print(f"{name}, {sign.name}: " + ", ".join(f"{count} {what}" for what, count in counts.items()), flush=True)
    return counts["incomplete files"] + counts["differ"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    failures = 0
    for name, run in {"inner training": inner, "meta-training": meta}.items():
        for sign in (signal.SIGTERM, signal.SIGKILL):
            failures += soak(name, run, sign, arguments.kills, arguments.seed)
    print(f"{4 * arguments.kills} kills, {failures} failures")
    sys.exit(int(failures > 0))


if __name__ == "__main__":
    main()
