"""What the scripts in this folder share: arguments, the recording of losses, and one line of JSON at the end.

Each script trains one package's own model the way its users would, either with the package's default optimizer or with
the flagship, and knows nothing else of this project but the callback.
"""

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import seed_everything

FINAL = 50  # the final loss is the mean over this many training steps
# Settings of a Trainer that only trains; packages that build the Trainer themselves take them, too.
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


def make_series(count: int, length: int) -> np.ndarray:
    """(count, length) series: a weekly and a slow period with drawn weights, and noise that remembers its past."""
    draw = np.random.default_rng(0)
    time = np.arange(length)
    weekly = np.sin(2 * np.pi * (time / 7 + draw.random((count, 1)))) * draw.uniform(0.3, 1, (count, 1))
    slow = np.sin(2 * np.pi * (time / 45 + draw.random((count, 1)))) * draw.uniform(0.3, 1, (count, 1))
    noise = np.zeros((count, length))
    for step in range(1, length):
        noise[:, step] = 0.8 * noise[:, step - 1] + draw.normal(scale=0.15, size=count)
    return (weekly + slow + noise).astype(np.float32)


def loss_recorder(base: type) -> Any:
    """A callback that keeps the training losses.

    Args:
        base: the Callback class of the Lightning that the package imports (`lightning.pytorch` or
            `pytorch_lightning`), because each Trainer accepts only its own.
    """

    class LossRecorder(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []

        def __deepcopy__(self, memo: Any) -> "LossRecorder":
            return self  # neuralforecast trains with a copy of its callbacks, but the losses are wanted here

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            self.losses.append(float(outputs["loss"]))

    return LossRecorder()


def main(train: Callable[[list[Any], int], float], base: type) -> None:
    """Train once, as the command line says, and print the result as `RESULT {json}`.

    Args:
        train: trains the package's model with these callbacks and this seed; returns the validation measure.
        base: the Callback class of the Lightning that the package imports.

    Raises:
        SystemExit: if no loss was recorded, or if a loss or the validation measure is not finite.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["default", "star"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    recorder = loss_recorder(base)
    callbacks = [recorder]
    if arguments.optimizer == "star":
        from lightning_lopt import LearnedOptimizer

        callbacks.append(LearnedOptimizer.from_pretrained("star"))
    seed_everything(arguments.seed, verbose=False)  # last, so that both optimizers start from the same weights
    validation = float(train(callbacks, arguments.seed))
    losses = recorder.losses
    if not losses:
        raise SystemExit("No training loss was recorded.")
    if not all(map(math.isfinite, [*losses, validation])):
        raise SystemExit(f"A training loss or the validation measure ({validation}) is not finite.")
    result = {
        "steps": len(losses),
        "final": statistics.fmean(losses[-FINAL:]),
        "mean": statistics.fmean(losses),
        "validation": validation,
    }
    print("RESULT " + json.dumps(result))
