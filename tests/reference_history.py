"""MNG, k Timesteps and k Momentums in NumPy float64, one coordinate at a time, from algorithms 1 to 3 of the thesis.

Slow and plain on purpose, and sharing nothing with the package: histories are Python lists, oldest first.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class ReferenceHistory:
    """The optimizer of one tensor. `theta` has `w0 b0 w1 b1`, and is empty for MNG."""

    def __init__(self, theta: dict[str, np.ndarray], **options: Any) -> None:
        self.theta, self.options = theta, options
        self.iteration = 0
        self.histories: dict[tuple[int, ...], dict[str, list[float]]] = {}

    def step(self, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """The parameter after one update."""
        new = np.empty_like(x)
        for i in np.ndindex(*x.shape):
            if i not in self.histories:
                self.histories[i] = self.populate(float(x[i]), float(gradient[i]))
            else:
                self.update_history(self.histories[i], float(x[i]), float(gradient[i]))
            new[i] = self.move(float(x[i]), self.histories[i])
        self.iteration += 1
        return new

    def populate(self, x: float, g: float) -> dict[str, list[float]]:
        k = len(self.options["timescales"]) or self.options["k"]
        return {"x": [x] * k, "g": [g] * k, "gg": [g * g] * k}

    def update_history(self, history: dict[str, list[float]], x: float, g: float) -> None:
        for name, value in (("x", x), ("g", g), ("gg", g * g)):
            if self.options["timescales"]:  # algorithm 3
                old = history[name]
                history[name] = [m * h + (1 - m) * value for m, h in zip(self.options["timescales"], old, strict=True)]
            else:  # algorithm 1
                history[name].pop(0)
                history[name].append(value)

    def move(self, x: float, history: dict[str, list[float]]) -> float:
        x_max, x_min = max(history["x"]), min(history["x"])
        x_ref = x if self.options["reference"] == "current" else (x_max + x_min) / 2
        return x_ref - self.delta(history) * ((x_max - x_min) + self.eta_min())

    def eta_min(self) -> float:
        eta, schedule = self.options["eta_min"], self.options["eta_min_schedule"]
        if schedule == "exponential":
            return eta * 0.5 ** (self.iteration / self.options["eta_min_half_life"])
        if schedule == "cosine" and self.options["num_steps"] is not None:
            done = min(self.iteration / self.options["num_steps"], 1.0)
            return eta * (1 + np.cos(np.pi * done)) / 2
        return eta

    def delta(self, history: dict[str, list[float]]) -> float:
        gradients = self.normalize(history)
        if self.options["step"] == "mean":
            return sum(gradients) / len(gradients)
        inputs = divide_by_largest(history["x"]) + gradients if self.options["parameter_inputs"] else gradients
        hidden = [max(0.0, z) for z in np.array(inputs) @ self.theta["w0"] + self.theta["b0"]]
        outputs = np.array(hidden) @ self.theta["w1"] + self.theta["b1"]
        if self.options["step"] == "tanh":
            return float(np.tanh(outputs[0]))
        magnitudes = [j / 9 for j in range(10)]
        magnitude = sum(p * m for p, m in zip(softmax(outputs[:10]), magnitudes, strict=True))
        minus, plus = softmax(outputs[10:])
        return magnitude * (plus - minus)

    def normalize(self, history: dict[str, list[float]]) -> list[float]:
        g = history["g"]
        if self.options["sign_only"]:
            return [float(np.sign(value)) for value in g]
        if self.options["normalization"] == "max":
            return divide_by_largest(g)
        squares = history["gg"] if self.options["timescales"] else [sum(history["gg"]) / len(g)] * len(g)
        return [value / square**0.5 if square > 0 else value for value, square in zip(g, squares, strict=True)]


def divide_by_largest(values: list[float]) -> list[float]:
    largest = max(abs(value) for value in values)
    return [value / largest if largest > 0 else 0.0 for value in values]


def softmax(logits: np.ndarray) -> list[float]:
    weights = [np.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]
