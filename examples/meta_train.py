"""Meta-train a rule in Python: it starts with steps that are far too small, and learns a schedule for them.

Prints the meta-loss of each epoch, log(loss / first loss), on two small tasks and on a held-out one. Then saves the
rule, loads it, and trains a net that it has not seen.
Run: python examples/meta_train.py [--epochs 10]. Half a minute; needs the extra [demo].
A longer run from a file: lopt meta-train fit --config examples/configs/tiny.yaml
"""

import argparse
import logging
import tempfile

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import lightning_lopt as lopt
from lightning_lopt import tasks
from lightning_lopt.meta.estimators import PES
from lightning_lopt.meta.schedules import Horizon


class Print(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        training, validation = float(pl_module.meta_loss.compute()), trainer.callback_metrics["val/meta_loss"]
        print(f"epoch {trainer.current_epoch}: meta-loss {training:.3f}, validation {validation:.3f}", flush=True)


def meta_train(epochs: int, folder: str) -> None:
    rule = lopt.rules.make("scheduled", nominal_stepsize=1e-3)
    module = lopt.MetaTrainer(
        rule,
        tasks=[("digits-mlp", {"hidden": (16,), "batch_size": 32}), "wine-mlp"],
        estimator=PES(num_pairs=8, truncation=10, std=0.03, horizon=Horizon(20, 80)),
        tasks_per_step=1,
        trainable=["schedule_*", "*_decays"],
        lr=5e-2,
        validation_tasks=[("digits-tanh-mlp", {"hidden": (16, 16)})],
        validation_horizon=50,
        steps_per_epoch=10,
        export=folder,
    )
    trainer = L.Trainer(max_epochs=epochs, gradient_clip_val=1.0, callbacks=[Print()], accelerator="cpu", logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                        num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(module)


def train(rule: lopt.UpdateRule, steps: int = 80) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = lopt.RuleOptimizer(model.named_parameters(), rule, num_steps=steps)
    digits = tasks.datasets.load("digits")
    for _ in range(steps):
        index = torch.randint(len(digits.train_x), (64,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(digits.train_x[index]), digits.train_y[index])
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # for such small tensors a second thread gains nothing
    with tempfile.TemporaryDirectory() as folder:
        meta_train(arguments.epochs, folder)
        learned = lopt.load_rule(folder)
    untrained = lopt.rules.make(learned.kind, **learned.config.to_dict())
    print(f"loss of an unseen net after 80 steps: {train(untrained):.3f} untrained, {train(learned):.3f} meta-trained")


if __name__ == "__main__":
    main()
