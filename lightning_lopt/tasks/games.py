"""Tasks that train by gradients of their own: a generative adversarial network, and a policy gradient.

Neither is the descent of one loss. Each returns the gradients of its training from `grad_and_value`, beside a `loss`
that says how good the parameters are. So curves, tuning and judging are those of every other task.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lopt.tasks import draws
from lightning_lopt.tasks.base import Params, Start, Task, check_choice, check_positive
from lightning_lopt.tasks.layers import init_params, roles_of
from lightning_lopt.tasks.networks import MLP
from lightning_lopt.tasks.sources import Examples

EVAL_SIZE = 2048


class Samples(NamedTuple):
    """A batch of `Adversarial`."""

    x: Tensor  # (b, *example) data
    z: Tensor  # (b, latent) what the generator maps to samples


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Adversarial(Task):
    """A generative adversarial network (Goodfellow et al. 2014, arXiv 1406.2661) with the non-saturating loss.

    Each step gives the discriminator the gradient of its cross entropy and the generator that of -log D(G(z)), both at
    the same parameters; the usual code alternates, so that the generator sees the new discriminator. The task's loss is
    the energy distance between samples and data (Szekely & Rizzo 2013), which falls when the samples get better and
    rises when modes are lost:

        2 E|x - g| - E|x - x'| - E|g - g'|

    Parameters: `generator.*` and `discriminator.*`, those of two MLPs.
    """

    source: Examples
    generator: MLP
    discriminator: MLP
    batch_size: int = 64
    sigmoid: bool = False
    """Samples are pixels in [0, 1]."""

    def __post_init__(self) -> None:
        check_positive("batch_size", self.batch_size)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the data."""
        return self.source.splits

    @property
    def device(self) -> torch.device:
        """The device of the data."""
        return self.source.device

    @property
    def roles(self) -> dict[str, str]:
        """Roles in each of the networks, which has an output of its own."""
        return _roles_of({"generator": self.generator, "discriminator": self.discriminator})

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw both networks, like nn.Linear does."""
        nets = {"generator": self.generator, "discriminator": self.discriminator}
        drawn = {part: init_params(net.specs(), generator, population, "torch") for part, net in nets.items()}
        params = {f"{part}.{name}": value for part, own in drawn.items() for name, value in own.items()}
        return Start({name: value.to(self.device) for name, value in params.items()}, {})

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Samples:
        """Draw data and the generator's inputs."""
        index = draws.integers(generator, self.source.size("train"), (self.batch_size,), population)
        x, _ = self.source.take("train", index.to(self.device))
        z = draws.normal(generator, (self.batch_size, self.generator.inputs), population)
        return Samples(x, z.to(self.device))

    def loss(self, params: Params, batch: Samples) -> Tensor:
        """Compute the energy distance between as many samples as there are data."""
        fake, real = self._samples(_part(params, "generator"), batch.z), batch.x.flatten(1)
        return 2 * _distances(real, fake).mean() - _distances(real, real).mean() - _distances(fake, fake).mean()

    def grad_and_value(self, params: Params, batch: Samples) -> tuple[Params, Tensor]:
        """Compute the gradients of both players, and the energy distance."""
        players = {part: _part(params, part) for part in ("generator", "discriminator")}
        real = batch.x.flatten(1)

        def discriminates(own: Params) -> Tensor:
            fake = self._samples(players["generator"], batch.z)
            judge = self.discriminator.apply
            return F.softplus(-judge(own, real)).mean() + F.softplus(judge(own, fake)).mean()

        def generates(own: Params) -> Tensor:
            fake = self._samples(own, batch.z)
            return F.softplus(-self.discriminator.apply(players["discriminator"], fake)).mean()

        losses = {"generator": generates, "discriminator": discriminates}
        found = {part: torch.func.grad(loss)(players[part]) for part, loss in losses.items()}
        grads = {f"{part}.{name}": value for part, own in found.items() for name, value in own.items()}
        return grads, self.loss(params, batch)

    def eval_batch(
        self,
        split: str,
        constants: Any,
        population: int | None = None,
        *,
        size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Return data of a split and the generator's inputs, the same at each call and for each member."""
        check_choice("split", split, self.splits)
        available = self.source.size(split)
        num = min(size or EVAL_SIZE, available)
        random = torch.Generator().manual_seed(self.splits.index(split)) if generator is None else generator
        x, _ = self.source.take(split, (torch.arange(num) * available // num).to(self.device))
        batch = Samples(x, draws.normal(random, (num, self.generator.inputs)).to(self.device))
        return batch if population is None else Samples(*(leaf.expand(population, *leaf.shape) for leaf in batch))

    def to(self, device: torch.device | str) -> Adversarial:
        """Return the same task with its data on a device."""
        return dataclasses.replace(self, source=self.source.to(device))

    def _samples(self, params: Params, z: Tensor) -> Tensor:
        fake = self.generator.apply(params, z)
        return torch.sigmoid(fake) if self.sigmoid else fake


class Episodes(NamedTuple):
    """A batch of `PolicyGradient`: everything random in its episodes."""

    start: Tensor  # (episodes, 4) first states
    unit: Tensor  # (horizon, episodes) in [0, 1), decides on the actions


class Rollout(NamedTuple):
    """What happened in the episodes."""

    states: Tensor  # (horizon, episodes, 4)
    right: Tensor  # (horizon, episodes) 1 where the cart was pushed to the right, else 0
    alive: Tensor  # (horizon, episodes) 1 while the pole stands, else 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PolicyGradient(Task):
    """REINFORCE (Williams 1992) with a learned baseline on the cart-pole of Barto, Sutton & Anderson 1983.

    A pole on a cart stands as long as the cart is pushed well. Every step it stands is a reward of 1. The constants of
    the environment are the usual ones: forces of 10 N, steps of 0.02 s, an end beyond 2.4 m or 12 degrees. The gradient
    is that of

        -A log pi(a|s) - 0.01 entropy + 0.5 (V(s) - G / scale)^2

    averaged over the steps of all episodes, with discounted returns G and the normalized advantage A = G / scale - V.
    The task's loss is the horizon divided by the mean length of the episodes, which is 1 at best.

    Parameters: `policy.*` and `value.*`, those of two MLPs.
    """

    hidden: tuple[int, ...] = (64, 64)
    episodes: int = 16
    horizon: int = 200
    discount: float = 0.99
    scale: float = 50.0
    """Divides returns, so that the value network's outputs are of unit size."""

    def __post_init__(self) -> None:
        check_positive("episodes", self.episodes)
        check_positive("horizon", self.horizon)

    @property
    def networks(self) -> dict[str, MLP]:
        """The policy, and the value network."""
        return {part: MLP(inputs=4, hidden=self.hidden, outputs=1, activation="tanh") for part in ("policy", "value")}

    @property
    def roles(self) -> dict[str, str]:
        """Roles in each of the networks, which has an output of its own."""
        return _roles_of(self.networks)

    def init(self, generator: torch.Generator, population: int | None = None) -> Start:
        """Draw both networks."""
        drawn = {part: init_params(net.specs(), generator, population) for part, net in self.networks.items()}
        return Start({f"{part}.{name}": value for part, own in drawn.items() for name, value in own.items()}, {})

    def batch(self, generator: torch.Generator, constants: Any, population: int | None = None) -> Episodes:
        """Draw everything random in the episodes."""
        return self._draw(generator, self.episodes, population)

    def rollout(self, params: Params, batch: Episodes) -> Rollout:
        """Play the episodes; those whose pole has fallen go on without reward."""
        policy, net = _part(params, "policy"), self.networks["policy"]
        state, alive = batch.start, torch.ones_like(batch.start[:, 0])
        rows = []
        for unit in batch.unit:
            right = (unit < torch.sigmoid(net.apply(policy, state).squeeze(-1))).to(state.dtype)
            rows.append(Rollout(state, right, alive))
            state = cart_pole(state, right)
            stands = (state[:, 0].abs() < 2.4) & (state[:, 2].abs() < math.radians(12))
            alive = alive * stands.to(state.dtype)
        return Rollout(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def loss(self, params: Params, batch: Episodes) -> Tensor:
        """Compute the horizon divided by the mean length of the episodes."""
        return batch.unit.shape[0] / self.rollout(params, batch).alive.sum(0).mean()

    def grad_and_value(self, params: Params, batch: Episodes) -> tuple[Params, Tensor]:
        """Compute the policy gradient, and the loss of the same episodes."""
        played = self.rollout({name: value.detach() for name, value in params.items()}, batch)
        length = played.alive.shape[0]
        time = torch.arange(length).to(played.alive)
        ahead = time - time.unsqueeze(1)  # (t, k): steps from t to k
        weights = torch.where(ahead >= 0, self.discount ** ahead.clamp(min=0), 0.0)
        returns = weights @ played.alive / self.scale
        grads = torch.func.grad(lambda own: self._surrogate(own, played, returns))(params)
        return grads, length / played.alive.sum(0).mean()

    def metrics(self, params: Params, batch: Episodes) -> dict[str, Tensor]:
        """Compute the share of the horizon for which the pole stands."""
        return {"standing": self.rollout(params, batch).alive.mean()}

    def eval_batch(
        self,
        split: str,
        constants: Any,
        population: int | None = None,
        *,
        size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Episodes:
        """Return episodes that are the same at each call (default: 64 of them) and differ between the splits."""
        check_choice("split", split, self.splits)
        random = torch.Generator().manual_seed(self.splits.index(split)) if generator is None else generator
        batch = self._draw(random, size or 64, None)
        return batch if population is None else Episodes(*(leaf.expand(population, *leaf.shape) for leaf in batch))

    def _draw(self, generator: torch.Generator, num: int, population: int | None) -> Episodes:
        start = draws.uniform(generator, (num, 4), population, -0.05, 0.05)
        return Episodes(start, draws.uniform(generator, (self.horizon, num), population))

    def _surrogate(self, params: Params, played: Rollout, returns: Tensor) -> Tensor:
        """What the gradient descends; `returns` (horizon, episodes) are in units of `scale`."""
        nets, alive = self.networks, played.alive
        states = played.states.flatten(0, 1)
        logits = nets["policy"].apply(_part(params, "policy"), states).reshape(alive.shape)
        values = nets["value"].apply(_part(params, "value"), states).reshape(alive.shape)
        steps = alive.sum()
        advantages = (returns - values).detach()
        mean = (advantages * alive).sum() / steps
        std = (((advantages - mean).square() * alive).sum() / steps).sqrt()
        advantages = (advantages - mean) / (std + 1e-6)
        log_probability = played.right * F.logsigmoid(logits) + (1 - played.right) * F.logsigmoid(-logits)
        chance = torch.sigmoid(logits)
        entropy = -(chance * F.logsigmoid(logits) + (1 - chance) * F.logsigmoid(-logits))
        each = -advantages * log_probability - 0.01 * entropy + 0.5 * (values - returns).square()
        return (each * alive).sum() / steps


def cart_pole(state: Tensor, right: Tensor) -> Tensor:
    """The next states of the cart-pole after 0.02 s, by Euler's method.

    Args:
        state: (n, 4) position of the cart, its velocity, angle of the pole, its velocity.
        right: (n,) 1 to push with 10 N to the right, 0 to the left.
    """
    x, speed, angle, turning = state.unbind(-1)
    sine, cosine = angle.sin(), angle.cos()
    # A cart of 1 kg and a pole of 0.1 kg, whose center is at 0.5 m.
    common = ((2 * right - 1) * 10 + 0.05 * turning.square() * sine) / 1.1
    twist = (9.8 * sine - cosine * common) / (0.5 * (4 / 3 - 0.1 * cosine.square() / 1.1))
    push = common - 0.05 * twist * cosine / 1.1
    change = torch.stack([speed, push, turning, twist], -1)
    return state + 0.02 * change


def _part(params: Params, part: str) -> Params:
    """The parameters of one of the networks, without its name."""
    return {name[len(part) + 1 :]: value for name, value in params.items() if name.startswith(f"{part}.")}


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, d), (m, d) -> (n, m) Euclidean distances; written out, since `cdist` does not batch under vmap."""
    squares = a.square().sum(-1).unsqueeze(1) + b.square().sum(-1) - 2 * a @ b.T
    return squares.clamp(min=1e-12).sqrt()


def _roles_of(nets: Mapping[str, MLP]) -> dict[str, str]:
    return {f"{part}.{name}": role for part, net in nets.items() for name, role in roles_of(net.specs()).items()}
