"""What the scripts of this folder share: arguments, the recording of losses, and one line of JSON at the end.

Each script trains one package's own model twice as its users would, by the package's default optimizer and by the
flagship, and knows nothing else of this project but the callback.
"""

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch

LAST = 50  # training steps whose mean loss is the final one


def recorder(base: type) -> Any:
    """A callback of the package's Lightning (`lightning.pytorch` or `pytorch_lightning`) that keeps training losses."""

    class Losses(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.values: list[float] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if loss is None:  # manual optimization returns nothing
                logged = trainer.callback_metrics
                loss = next(
                    (logged[name] for name in ("train_loss", "train_loss_step", "loss") if name in logged), None
                )
            if loss is not None:
                self.values.append(float(loss))

    return Losses()


def main(train: Callable[[list[Any], Any, int], float], base: type) -> None:
    """Run `train(callbacks, losses, seed) -> validation measure` by the default optimizer or the flagship.

    Args:
        train: trains the package's model with these callbacks.
        base: the Callback class of the package's Lightning.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["default", "star"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    losses, callbacks = recorder(base), []
    if arguments.optimizer == "star":
        from lightning_lopt import LearnedOptimizer

        callbacks = [LearnedOptimizer.from_pretrained("star")]
    validation = train([*callbacks, losses], losses, arguments.seed)
    values = losses.values
    if not values or not all(map(math.isfinite, values)):
        raise SystemExit(f"{len(values)} losses were recorded, or some are not finite")
    result = {"steps": len(values), "final": statistics.fmean(values[-LAST:]), "mean": statistics.fmean(values)}
    print("RESULT " + json.dumps({**result, "validation": float(validation)}))
