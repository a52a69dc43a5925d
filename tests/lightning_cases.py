"""Shared by the tests of LearnedOptimizer: a small module, its data, and a quiet Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from optimizer_cases import star
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

import lightning_lopt as lopt

# Lightning warns of folders that loggers and checkpoints use twice. Warnings of every run are in pyproject.toml.
KNOWN_WARNINGS = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
]


def adamw(module: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), **{"lr": 1e-2, **options})


class Module(L.LightningModule):
    """Two linear layers on a regression; `configure` is its configure_optimizers."""

    def __init__(self, configure: Callable[[Any], Any] = adamw) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.configure = configure
        self.losses: list[float] = []
        self.lrs: list[list[float]] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs).float(), targets.float())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.lrs.append([group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups])

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class ValidatedModule(Module):
    """The same, with a validation loss."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class ManualModule(Module):
    """Manual optimization: one optimizer per layer, each stepped on its own loss, and a scheduler."""

    def __init__(self, configure: Callable[[Any], Any] | None = None) -> None:
        super().__init__(configure or two_optimizers)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for number, optimizer in enumerate(self.optimizers()):
            loss = self.loss(batch) * (number + 1)
            self.losses.append(loss.item())
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.lr_schedulers().step()


def two_optimizers(module: Module) -> Any:
    first = torch.optim.AdamW(module.net[0].parameters(), lr=1e-2)
    second = torch.optim.SGD(module.net[2].parameters(), lr=1e-1)
    return [first, second], [torch.optim.lr_scheduler.StepLR(first, 2)]


def with_scheduler(make: Callable[[Any], Any], **config: Any) -> Callable[[Any], Any]:
    def configure(module: Any) -> Any:
        optimizer = adamw(module)
        scheduler = make(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **config} if config else scheduler}

    return configure


def in_lists(module: Any) -> Any:
    optimizer = adamw(module)
    return [optimizer], [schedulers.StepLR(optimizer, 2)]


def groups_and_cosine(module: Any) -> Any:
    groups = [
        {"params": module.net[0].parameters(), "lr": 0.1, "name": "first"},
        {"params": module.net[2].parameters(), "weight_decay": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    return {"optimizer": optimizer, "lr_scheduler": schedulers.CosineAnnealingLR(optimizer, 16)}


def sequential(optimizer: Any) -> Any:
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=3), schedulers.ExponentialLR(optimizer, 0.9)]
    return schedulers.SequentialLR(optimizer, parts, [3])


def chained(optimizer: Any) -> Any:
    return schedulers.ChainedScheduler([schedulers.ConstantLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)])


STEPWISE = {"interval": "step"}

# What configure_optimizers may return to Lightning.
FORMS: dict[str, Callable[[Any], Any]] = {
    "optimizer": adamw,
    "list of optimizers": lambda module: [adamw(module)],
    "tuple of optimizers": lambda module: (adamw(module),),
    "two lists": in_lists,
    "dict": lambda module: {"optimizer": adamw(module)},
    "dict with scheduler": with_scheduler(lambda o: schedulers.StepLR(o, 1)),
    "list of dicts": lambda module: [with_scheduler(lambda o: schedulers.StepLR(o, 1))(module)],
    "groups and cosine": groups_and_cosine,
    "plateau": with_scheduler(lambda o: schedulers.ReduceLROnPlateau(o, patience=0), monitor="loss"),
    "sequential": with_scheduler(sequential, **STEPWISE),
    "chained": with_scheduler(chained, **STEPWISE),
    "one cycle": with_scheduler(lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20), **STEPWISE),
    "cyclic": with_scheduler(
        lambda o: schedulers.CyclicLR(o, 0.01, 0.1, cycle_momentum=False), **STEPWISE, frequency=2
    ),
    "warmup from 0": with_scheduler(lambda o: schedulers.LambdaLR(o, lambda step: step / 8), **STEPWISE),
}


def data(batch_size: int = 4, size: int = 32, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(size, 4, generator=generator)
    targets = inputs.sum(1, keepdim=True) + 0.1 * torch.randn(size, 1, generator=generator)
    return DataLoader(TensorDataset(inputs.to(dtype), targets.to(dtype)), batch_size=batch_size)


def learned(**arguments: Any) -> lopt.LearnedOptimizer:
    return lopt.LearnedOptimizer(star(), **arguments)


def trainer(path: Path, *callbacks: Any, **arguments: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "log_every_n_steps": 1,
    }
    return L.Trainer(default_root_dir=path, callbacks=list(callbacks), **{**quiet, **arguments})


def fit(path: Path, *callbacks: Any, module: L.LightningModule | None = None, **arguments: Any) -> L.Trainer:
    """Train, with a learned optimizer unless callbacks are given; the module is the Trainer's `lightning_module`."""
    fit_arguments = {k: arguments.pop(k) for k in ("ckpt_path", "weights_only") if k in arguments}
    loaders = arguments.pop("train_dataloaders") if "train_dataloaders" in arguments else data()
    if "val_dataloaders" in arguments:
        fit_arguments["val_dataloaders"] = arguments.pop("val_dataloaders")
    runner = trainer(path, *(callbacks or (learned(),)), **arguments)
    runner.fit(module if module is not None else Module(), loaders, **fit_arguments)
    return runner


def weights(runner: L.Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in runner.lightning_module.parameters()]


def csv_logger(path: Path) -> CSVLogger:
    return CSVLogger(path, name="log", version=0, flush_logs_every_n_steps=1)


def metrics(path: Path) -> list[dict[str, float]]:
    """The rows that a `csv_logger` wrote, empty cells left out."""
    header, *rows = [line.split(",") for line in (path / "log" / "version_0" / "metrics.csv").read_text().splitlines()]
    return [{k: float(v) for k, v in zip(header, row, strict=True) if v} for row in rows]


class Sharded(Module):
    """Each process loads its part of the batches of eight that a single process would see."""

    def train_dataloader(self) -> DataLoader[Any]:
        return sharded_data(self.trainer.global_rank, self.trainer.world_size)


class ShardedManual(ManualModule):
    """The same in manual optimization; the steps must not change the loss tensor."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        assert loss.item() == self.losses[-1]

    def train_dataloader(self) -> DataLoader[Any]:
        return sharded_data(self.trainer.global_rank, self.trainer.world_size)


def sharded_data(rank: int, world_size: int) -> DataLoader[Any]:
    size = 8 // world_size
    batches = [range(8 * batch + rank * size, 8 * batch + (rank + 1) * size) for batch in range(4)]
    return DataLoader(data().dataset, batch_sampler=batches)


class Report(L.Callback):
    """Writes the final state of each process to `path`."""

    def __init__(self, path: Path, learned: lopt.LearnedOptimizer | None = None) -> None:
        self.path, self.learned = path, learned

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        report = {
            "weights": [whole(p) for p in pl_module.parameters()],
            "state": [whole(tensor) for state in states for tensor in state.values()],
            "losses": pl_module.losses,
            "seen": getattr(self.learned and self.learned.rule, "losses", None),
            "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
        }
        torch.save(report, self.path / f"rank{trainer.global_rank}.pt")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor; a copy of any other."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def reports(path: Path, world_size: int = 2) -> list[dict[str, Any]]:
    return [torch.load(path / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]
