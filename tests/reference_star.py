"""STAR and small_fc_lopt in NumPy float64, one coordinate at a time: what the torch rule is compared with.

Slow and plain on purpose, and written from a description of the authors' code, not from this package's: it shares
nothing with it, not even the order of the arithmetic. test_star.py first checks it against the authors' trajectories.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TIMESCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)
START_DECAYS = {"momentum": (0.9, 0.99, 0.999), "rms": (0.999,), "adafactor": (0.9, 0.99, 0.999)}
DEFAULTS: dict[str, Any] = {  # the reference constructor's
    "exp_mult": (1e-3, 1e-3, 1e-3),
    "step_mult": 1e-3,
    "nominal_stepsize": 0.0,
    "nominal_grad_estimator": "AdamAggMo",
    "nominal_controller": False,
    "normalize_blackbox": False,
    "selfnormalize_blackbox": False,
    "weight_decay": 0.0,
    "regularization_controller": False,
    "aggregate_magnitude": False,
    "aggregate_nom_magnitude": False,
    "aggregate_reg_magnitude": False,
}


class ReferenceSTAR:
    """The optimizer of one tensor, with its accumulators."""

    def __init__(self, theta: dict[str, np.ndarray], shape: tuple[int, ...], **options: Any) -> None:
        assert not set(options) - set(DEFAULTS), options
        self.theta = {name: np.asarray(value, np.float64) for name, value in theta.items()}
        self.options = {**DEFAULTS, **options}
        self.shape = shape if shape else (1,)
        self.iteration = 0
        self.momentum = np.zeros((3, *self.shape))
        self.rms = np.zeros(self.shape)
        self.dims = None
        if len(self.shape) >= 2:
            order = np.argsort(self.shape, kind="stable")
            self.dims = int(order[-2]), int(order[-1])
            self.row = np.zeros((3, *np.delete(self.shape, self.dims[1])))
            self.col = np.zeros((3, *np.delete(self.shape, self.dims[0])))
        else:
            self.diag = np.zeros((3, *self.shape))

    def decays(self, name: str) -> np.ndarray:
        offsets = self.theta[f"{name}_decays"]
        decays = 1 - (1 - np.array(START_DECAYS[name])) * np.exp(10 * offsets)
        return decays if name == "momentum" else np.clip(decays, 0.0, 1.0)

    def step(self, param: np.ndarray, grad: np.ndarray) -> np.ndarray:
        """The parameter after one update."""
        p, g = param.reshape(self.shape), grad.reshape(self.shape)
        self.accumulate(g)
        normalized = self.normalize(self.raw_features(p, g))
        heads = np.zeros((4, *self.shape))
        for i in np.ndindex(*self.shape):
            outputs = self.network(np.concatenate([normalized[(slice(None), *i)], self.time_features()]))
            heads[(slice(len(outputs)), *i)] = outputs
        new = self.combine(p, g, heads)
        self.iteration += 1
        return new.reshape(param.shape)

    def accumulate(self, g: np.ndarray) -> None:
        for j, decay in enumerate(self.decays("momentum")):
            self.momentum[j] = decay * self.momentum[j] + (1 - decay) * g
        (decay,) = self.decays("rms")
        self.rms = decay * self.rms + (1 - decay) * g**2
        square = g**2 + 1e-30
        for j, decay in enumerate(self.decays("adafactor")):
            if self.dims is None:
                self.diag[j] = decay * self.diag[j] + (1 - decay) * square
            else:
                d1, d0 = self.dims
                self.row[j] = decay * self.row[j] + (1 - decay) * np.mean(square, axis=d0)
                self.col[j] = decay * self.col[j] + (1 - decay) * np.mean(square, axis=d1)

    def raw_features(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        features = np.zeros((28, *self.shape))
        for i in np.ndindex(*self.shape):
            m = [self.momentum[(j, *i)] for j in range(3)]
            inverse = 1 / np.sqrt(self.rms[i] + 1e-6)
            if self.dims is None:
                v = [self.diag[(j, *i)] for j in range(3)]
                row, col = v, v
                inverse_row, inverse_col = ([1 / np.sqrt(x + 1e-8) for x in v] for _ in range(2))
                scaled_g = [g[i] * safe_inverse_root(x + 1e-9) for x in v]
                scaled_m = [m[j] / np.sqrt(v[j] + 1e-6) for j in range(3)]
            else:
                row, col, scale = self.factored(i)
                inverse_row = [1 / np.sqrt(x + 1e-8) for x in row]
                inverse_col = [1 / np.sqrt(x + 1e-8) for x in col]
                scaled_g = [g[i] * s for s in scale]
                scaled_m = [m[j] * scale[j] for j in range(3)]
            one_coordinate = [g[i], p[i], *m, self.rms[i], *(x * inverse for x in m), inverse]
            one_coordinate += [*scaled_g, *row, *col, *inverse_row, *inverse_col, *scaled_m]
            features[(slice(None), *i)] = one_coordinate
        return features

    def factored(self, i: tuple[int, ...]) -> tuple[list[float], list[float], list[float]]:
        """Row and column moments of a coordinate, and the factors by which gradients are preconditioned."""
        d1, d0 = self.dims
        row, col, scale = [], [], []
        for j in range(3):
            row.append(self.row[(j, *i[:d0], *i[d0 + 1 :])])
            col.append(self.col[(j, *i[:d1], *i[d1 + 1 :])])
            along_d1 = [self.row[(j, *np.delete((*i[:d1], k, *i[d1 + 1 :]), d0))] for k in range(self.shape[d1])]
            scale.append(safe_inverse_root(row[j] / (np.mean(along_d1) + 1e-9)) * safe_inverse_root(col[j]))
        return row, col, scale

    @staticmethod
    def normalize(features: np.ndarray) -> np.ndarray:
        return np.stack([channel / np.sqrt(1e-5 + np.mean(channel**2)) for channel in features])

    def time_features(self) -> np.ndarray:
        return np.array([np.tanh(self.iteration / scale - 1) for scale in TIMESCALES])

    def network(self, x: np.ndarray) -> np.ndarray:
        for layer in range(2):
            x = np.maximum(x @ self.theta[f"w{layer}"] + self.theta[f"b{layer}"], 0)
        return x @ self.theta["w2"] + self.theta["b2"]

    def combine(self, p: np.ndarray, g: np.ndarray, heads: np.ndarray) -> np.ndarray:
        o = self.options
        direction, magnitude, nominal_magnitude, decay_magnitude = heads
        if o["aggregate_magnitude"]:
            magnitude = np.mean(magnitude)
        if o["aggregate_nom_magnitude"]:
            nominal_magnitude = np.mean(nominal_magnitude)
        if o["aggregate_reg_magnitude"]:
            decay_magnitude = np.mean(decay_magnitude)
        if not o["nominal_controller"]:
            nominal_magnitude = 1.0
        if not o["regularization_controller"]:
            decay_magnitude = 0.0
        inverse = 1 / np.sqrt(self.rms + 1e-6)
        blackbox = o["step_mult"] * direction * np.exp(o["exp_mult"][0] * magnitude)
        if o["normalize_blackbox"]:
            blackbox = blackbox * inverse
        if o["selfnormalize_blackbox"]:
            blackbox = blackbox * np.mean(g)
        descent = {
            "SGD": g,
            "SGDM": self.momentum[2],
            "AggMo": sum(self.momentum) / 3,
            "Adam": self.momentum[2] * inverse,
            "AdamAggMo": sum(m * inverse for m in self.momentum) / 3,
        }[o["nominal_grad_estimator"]]
        nominal = o["nominal_stepsize"] * np.exp(o["exp_mult"][1] * nominal_magnitude) * descent
        keep = 1 - o["weight_decay"] * np.exp(o["exp_mult"][2] * decay_magnitude)
        return keep * p - blackbox - nominal


def safe_inverse_root(x: float) -> float:
    return 1 / np.sqrt(np.maximum(x, 1e-9))
