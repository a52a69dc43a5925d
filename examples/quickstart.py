"""Train a LightningModule by STAR, untuned, and by AdamW at its default; print both and save demo.png.

Run: python examples/quickstart.py [--epochs 20] [--seeds 3]. Needs the extra [demo]. Under a minute on two cores.
"""

import argparse

import lightning as L
import matplotlib
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_lopt import LearnedOptimizer

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


class DigitClassifier(L.LightningModule):
    """An ordinary module: it knows nothing of learned optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")
        self.train_losses: list[float] = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.train_losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.net(images)
        self.accuracy(logits, labels)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels))
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def train(name: str, seed: int, epochs: int) -> tuple[list[float], float, float]:
    L.seed_everything(seed, verbose=False)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    data = TensorDataset(images.float() / 16, labels)
    train_set, val_set = random_split(data, [0.8, 0.2], generator=torch.Generator().manual_seed(0))
    callbacks = [LearnedOptimizer.from_pretrained("star")] if name == "STAR" else []
    logger = CSVLogger("runs", name=f"quickstart-{name}")
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, logger=logger, accelerator="cpu", enable_checkpointing=False,
                        enable_model_summary=False)  # fmt: skip
    model = DigitClassifier()
    val_loader = DataLoader(val_set, batch_size=360)
    trainer.fit(model, DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True), val_loader)
    metrics = trainer.callback_metrics
    return model.train_losses, metrics["val_loss"].item(), metrics["val_accuracy"].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small: a second thread gains nothing, and loses much on a busy machine
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    rows = []
    for name, color in (("STAR", "tab:blue"), ("AdamW", "tab:orange")):
        runs = [train(name, seed, arguments.epochs) for seed in range(arguments.seeds)]
        losses = torch.tensor([run[0] for run in runs])
        last = losses[:, -losses.shape[1] // 10 :].mean(1)  # each seed's mean over the last tenth of the steps
        val = torch.tensor([run[1:] for run in runs])
        spread = [f"{x.mean():.4f} ± {x.std(correction=0):.4f}" for x in (last, val[:, 0], val[:, 1])]
        rows.append(f"{name:<24} {spread[0]:>18} {spread[1]:>18} {spread[2]:>18}")
        for run in losses:
            axis.plot(run.unfold(0, 10, 1).mean(-1), color=color, alpha=0.3, linewidth=0.8)
        axis.plot(losses.mean(0).unfold(0, 10, 1).mean(-1), color=color, label=f"{name}, {'untuned' if name == 'STAR' else 'default lr'}")
    axis.set(yscale="log", xlabel="step", ylabel="training loss (mean of 10 steps)", title="scikit-learn digits, 64-128-128-10")
    axis.legend()
    figure.savefig("demo.png", dpi=120)
    print(f"\n{arguments.seeds} seeds, mean ± standard deviation\n{'':<24} {'train loss':>18} {'val loss':>18} {'val accuracy':>18}")
    print("\n".join(rows) + "\nCurves: demo.png")


if __name__ == "__main__":
    main()
