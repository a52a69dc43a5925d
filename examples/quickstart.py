"""Train a LightningModule with `star` and with AdamW, both untuned; print both results and save the curves, demo.png.

Run: python examples/quickstart.py [--epochs 20] [--seeds 3]. Under a minute on two cores; needs the extra [demo].
"""

import argparse

import lightning as L
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_lopt import LearnedOptimizer


class DigitClassifier(L.LightningModule):
    """An ordinary module; nothing in it refers to learned optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def train(learned: bool, seed: int, epochs: int) -> tuple[list[float], float]:
    L.seed_everything(seed, verbose=False)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    data = TensorDataset(images.float() / 16, labels)
    train_set, val_set = random_split(data, [0.8, 0.2], generator=torch.Generator().manual_seed(0))
    callbacks = [LearnedOptimizer.from_pretrained("star")] if learned else []
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, accelerator="cpu", logger=False,
                        enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    model = DigitClassifier()
    trainer.fit(model, DataLoader(train_set, 64, shuffle=True, drop_last=True), DataLoader(val_set, 360))
    return model.losses, trainer.callback_metrics["val_accuracy"].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for such small matrices a second thread gains nothing, and loses much on a busy machine
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    rows = [f"{'mean ± std of ' + str(arguments.seeds) + ' seeds':<24}{'training loss':>20}{'validation accuracy':>22}"]
    for name, color in (("star, untuned", "tab:blue"), ("AdamW, default lr", "tab:orange")):
        runs = [train(name.startswith("star"), seed, arguments.epochs) for seed in range(arguments.seeds)]
        losses = torch.tensor([run[0] for run in runs])
        accuracy = torch.tensor([run[1] for run in runs])
        final = losses[:, -(losses.shape[1] // 10) :].mean(1)  # each seed's mean over the last tenth of its steps
        spread = [f"{x.mean():.4f} ± {x.std(correction=0):.4f}" for x in (final, accuracy)]
        rows.append(f"{name:<24}{spread[0]:>20}{spread[1]:>22}")
        smooth = losses.unfold(1, 10, 1).mean(-1)
        axis.plot(smooth.T, color=color, alpha=0.3, linewidth=0.8)
        axis.plot(smooth.mean(0), color=color, label=name)
    axis.set(yscale="log", xlabel="step", ylabel="training loss (mean of 10 steps)", title="Digits, 64-128-128-10")
    axis.legend()
    figure.savefig("demo.png", dpi=120)
    print("\n".join(["", *rows, "Curves: demo.png"]))


if __name__ == "__main__":
    main()
