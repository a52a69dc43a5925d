"""Multiscale Adam in NumPy float64, one coordinate and one Adam at a time, from chapter 4 of the thesis.

Slow and plain on purpose, and sharing nothing with the package.
"""

from __future__ import annotations

import numpy as np


class Adam:
    """One Adam of one coordinate, eq. 1.1, with eps^2 inside the root; its step for learning rate 1."""

    def __init__(self, beta_1: float, beta_2: float, eps: float) -> None:
        self.beta_1, self.beta_2, self.eps = beta_1, beta_2, eps
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, g: float) -> float:
        self.t += 1
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * g
        self.v = self.beta_2 * self.v + (1 - self.beta_2) * g**2
        m_hat = self.m / (1 - self.beta_1**self.t)
        v_hat = self.v / (1 - self.beta_2**self.t)
        return -m_hat / np.sqrt(v_hat + self.eps**2)


class ReferenceMultiscaleAdam:
    """The optimizer of one tensor, algorithm 4."""

    def __init__(self, theta: dict[str, np.ndarray], mixer: str, betas, eta: float, eps: float) -> None:
        self.theta, self.mixer, self.betas, self.eta, self.eps = theta, mixer, betas, eta, eps
        self.adams: dict[tuple[int, ...], list[Adam]] = {}
        self.hidden: dict[tuple[int, ...], np.ndarray] = {}

    def step(self, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """The parameter after one update."""
        new = np.empty_like(x)
        for i in np.ndindex(*x.shape):
            if i not in self.adams:
                self.adams[i] = [Adam(*pair, self.eps) for pair in self.betas]
            steps = np.array([adam(float(gradient[i])) for adam in self.adams[i]])
            weights = self.weights(steps, i)
            new[i] = x[i] + self.eta * sum(w * d for w, d in zip(weights, steps, strict=True))
        return new

    def weights(self, steps: np.ndarray, i: tuple[int, ...]) -> np.ndarray:
        if self.mixer in ("la_a", "la_b", "la_c"):
            w = self.theta["weights"]
            return {"la_a": w / sum(w), "la_b": abs(w) / sum(abs(w)), "la_c": w}[self.mixer]
        layers = {"mlp": 2, "rnn1": 2, "rnn2": 3, "gru": 1}[self.mixer]
        z = self.recur(steps, i) if self.mixer == "gru" else steps
        for layer in range(layers):
            z = z @ self.theta[f"w{layer}"] + self.theta[f"b{layer}"]
            if layer < layers - 1:
                z = np.maximum(z, 0)
        return np.exp(z - max(z)) / sum(np.exp(z - max(z)))

    def recur(self, steps: np.ndarray, i: tuple[int, ...]) -> np.ndarray:
        theta, size = self.theta, len(self.theta["w_hidden"])
        h = self.hidden.get(i, np.zeros(size))
        from_input = steps @ theta["w_input"] + theta["b_input"]
        from_hidden = h @ theta["w_hidden"] + theta["b_hidden"]
        r, z = (sigmoid(from_input[a : a + size] + from_hidden[a : a + size]) for a in (0, size))
        n = np.tanh(from_input[2 * size :] + r * from_hidden[2 * size :])
        self.hidden[i] = (1 - z) * n + z * h
        return self.hidden[i]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))  # 1 / (1 + exp(-x)), which does not overflow
