"""Analytic tasks: random quadratics, Rosenbrock, a sum of squares and the noisy quadratic model.

Each has one parameter, `x`. The random quantities of a problem, such as a matrix, are constants of the run and reach
the loss through the batch, a dict of tensors. Each task names its source, and notes where text and code disagree.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.tasks import draws
from lightning_lopt.tasks.base import Params, Start, Task, check_choice, check_positive, check_range


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LeastSquares(Task):
    """f(x) = ||W x - y||^2 with a random square matrix W and vector y.

    Source: Andrychowicz et al. 2016 (arXiv 1606.04474), section 3.1. The defaults are the paper's distribution, with
    the start at 0 of the PyTorch port that we compare with. DeepMind's code has W, y ~ U(0, 1) and x0 ~ N(0, 0.01^2).
    The text of the LSTM thesis has 16 dimensions and x0 ~ N(0, 1); its code minimizes the norm, not its square, from
    x0 ~ N(0, 0.05^2).

    Constants: `matrix (dim, dim)`, `target (dim,)`.
    """

    name: str = "quadratic"
    dim: int = 10
    coefficients: str = "normal"
    """"normal", N(0, 1), or "uniform", U(0, 1)."""
    init_std: float = 0.0
    """Standard deviation of the normal start."""
    squared: bool = True
    """If False, the loss is the norm, not its square."""

    def __post_init__(self) -> None:
        check_positive("dim", self.dim)
        check_choice("coefficients", self.coefficients, ("normal", "uniform"))

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw W, y and x0."""
        draw = draws.normal if self.coefficients == "normal" else draws.uniform
        matrix = draw(generator, (self.dim, self.dim), population)
        target = draw(generator, (self.dim,), population)
        x = draws.normal(generator, (self.dim,), population, self.init_std)
        return Start({"x": x}, {"matrix": matrix, "target": target})

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Compute ||W x - y||^2, or its square root."""
        square: Tensor = (batch["matrix"] @ params["x"] - batch["target"]).square().sum()
        return square if self.squared else square.sqrt()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LogUniformQuadratic(Task):
    """f(x) = 1/2 (x - m)^T H (x - m); H has log-uniform eigenvalues in a random basis; x0 ~ N(0, I), -H m ~ N(0, I).

    Source: the linear regression of Maheswaranathan et al. 2021 (arXiv 2011.02159), as in their released code: 5
    dimensions and eigenvalues 10^U(-3, 0). They write 1/2 x^T H x + v^T x plus the offset that makes the minimum 0. It
    is the same function with m = -H^-1 v, in a form that does not become negative in float32.

    Constants: `hessian (dim, dim)`, `minimum (dim,)`.
    """

    name: str = "linear-regression"
    dim: int = 5
    log10_range: tuple[float, float] = (-3.0, 0.0)
    """Range of the decimal logarithm of the eigenvalues."""

    def __post_init__(self) -> None:
        check_positive("dim", self.dim)
        check_range("log10_range", self.log10_range, -30.0, 30.0)

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw H, v and x0."""
        eigenvalues = 10.0 ** draws.uniform(generator, (self.dim,), population, *self.log10_range)
        # QR gives a uniform basis up to the signs of its columns, which cancel in H.
        basis, _ = torch.linalg.qr(draws.normal(generator, (self.dim, self.dim), population))
        linear = draws.normal(generator, (self.dim, 1), population)
        x = draws.normal(generator, (self.dim,), population)
        hessian = (basis * eigenvalues.unsqueeze(-2)) @ basis.mT
        minimum = -(basis @ ((basis.mT @ linear) / eigenvalues.unsqueeze(-1))).squeeze(-1)
        return Start({"x": x}, {"hessian": hessian, "minimum": minimum})

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Compute 1/2 (x - m)^T H (x - m)."""
        offset: Tensor = params["x"] - batch["minimum"]
        form: Tensor = offset @ (batch["hessian"] @ offset)
        return 0.5 * form


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rosenbrock(Task):
    """f(x, y) = (a - x)^2 + b (y - x^2)^2, with a start uniform over a rectangle.

    Source of the defaults: Maheswaranathan et al. 2021 (arXiv 2011.02159), section 3.2. The code of the multiscale-Adam
    thesis starts in [-10, 10]^2; its equation 2.2 has y - x for y - x^2, a misprint.
    """

    name: str = "rosenbrock"
    a: float = 1.0
    b: float = 100.0
    x_range: tuple[float, float] = (-2.0, 2.0)
    y_range: tuple[float, float] = (-1.0, 3.0)

    def __post_init__(self) -> None:
        check_range("x_range", self.x_range, -1e6, 1e6)
        check_range("y_range", self.y_range, -1e6, 1e6)

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw the starting point: `x` holds both coordinates."""
        ranges = (self.x_range, self.y_range)
        return Start({"x": torch.stack([draws.uniform(generator, (), population, *r) for r in ranges], -1)}, {})

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Compute (a - x)^2 + b (y - x^2)^2."""
        x, y = params["x"].unbind()
        return (self.a - x) ** 2 + self.b * (y - x**2) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SumOfSquares(Task):
    """f(x) = sum x_i^2 from x0 ~ U(-10, 10) in 1,000 dimensions (the multiscale-Adam thesis, section 2.3.1)."""

    name: str = "sum-of-squares"
    dim: int = 1000
    start_range: tuple[float, float] = (-10.0, 10.0)

    def __post_init__(self) -> None:
        check_positive("dim", self.dim)
        check_range("start_range", self.start_range, -1e6, 1e6)

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw x0."""
        return Start({"x": draws.uniform(generator, (self.dim,), population, *self.start_range)}, {})

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Compute the sum of squares."""
        return params["x"].square().sum()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RandomSlopes(Task):
    """f(x) = s . x with a new s ~ N(0, std^2 I) at each step, so that gradients are pure noise.

    Schroeter's thesis (section 5.4.4) pre-trains its LSTM on 128 such numbers with std 0.001, where it learns its
    response to single gradients. The evaluation batch has s = 0.

    Constants: `slope (dim,)`, which is 0 and to which a batch adds s.
    """

    name: str = "random-slopes"
    dim: int = 128
    std: float = 1e-3

    def __post_init__(self) -> None:
        check_positive("dim", self.dim)
        check_range("(std, std)", (self.std, self.std), 1e-30, 1e30)

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Start at 0."""
        x = draws.normal(generator, (self.dim,), population, 0.0)
        return Start({"x": x}, {"slope": torch.zeros_like(x)})

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Any:
        """Draw the slopes of a step."""
        slope = draws.normal(generator, (self.dim,), population, self.std)
        return {"slope": constants["slope"] + slope.to(constants["slope"].device)}

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Compute s . x."""
        product: Tensor = batch["slope"] @ params["x"]
        return product


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NoisyQuadratic(Task):
    """f(x) = 1/2 (x - xi)^T H (x - xi) with a new xi ~ N(0, noise_std^2 I) at each step; x0 ~ N(0, init_std^2 I).

    Source: the noisy quadratic model of the STAR paper (arXiv 2209.11208, eq. 4) with the values of its App. B.1: H as
    printed there, xi of variance 1, x0 of variance 10. The authors' code differs: H = [[1.11499, .59389], [.59389,
    .48372]], no 1/2 (`factor=1.0`), and x0 of standard deviation 10. The evaluation batch has xi = 0, the noise-free
    loss.

    Constants: `hessian (dim, dim)`, and `center (dim,)`, which is 0 and to which a batch adds xi.
    """

    name: str = "noisy-quadratic"
    hessian: tuple[tuple[float, ...], ...] = ((1.11, 0.596), (0.596, 0.486))
    noise_std: float = 1.0
    init_std: float = 10.0**0.5
    factor: float = 0.5
    """Multiplies the quadratic form."""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.hessian) for row in self.hessian) or not self.hessian:
            raise ValueError(
                f"hessian={self.hessian!r} is not allowed: it must be a square matrix, as a tuple of rows."
            )

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw x0."""
        dim = len(self.hessian)
        hessian = torch.tensor(self.hessian, device=generator.device).expand(*draws.lead(population), dim, dim)
        x = draws.normal(generator, (dim,), population, self.init_std)
        return Start({"x": x}, {"hessian": hessian, "center": torch.zeros_like(x)})

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Any:
        """Draw xi, and return the constants with xi as the center."""
        noise = draws.normal(generator, (len(self.hessian),), population, self.noise_std)
        return {**constants, "center": constants["center"] + noise.to(constants["center"].device)}

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Compute the quadratic form around xi."""
        offset: Tensor = params["x"] - batch["center"]
        form: Tensor = offset @ (batch["hessian"] @ offset)
        return self.factor * form
