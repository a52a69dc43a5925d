"""Data made by formulas: inputs and targets, the same at every call."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

Data = tuple[Tensor, Tensor]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _standard(y: Tensor) -> Tensor:
    return (y - y.mean()) / y.std()


def diameters(num: int = 4000, points: int = 12) -> Data:
    """Clouds of points (num, points, 2), each stretched at random, and their diameters (num,)."""
    generator = _generator(11)
    stretch = torch.randn(num, 2, 2, generator=generator)
    x = torch.randn(num, points, 2, generator=generator) @ stretch
    return x, _standard(torch.cdist(x, x).flatten(1).amax(1))


def clustering(num: int = 3000, nodes: int = 12) -> Data:
    """Random graphs as adjacency matrices (num, nodes, nodes), and the share of their paths that close (num,)."""
    generator = _generator(12)
    density = 0.2 + 0.5 * torch.rand(num, 1, 1, generator=generator)
    # Two groups with more edges inside than between, so that more than the density decides.
    group = torch.rand(num, nodes, generator=generator) < 0.5
    inside = group.unsqueeze(1) == group.unsqueeze(2)
    chance = torch.where(inside, density * 1.3, density * 0.6)
    upper = (torch.rand(num, nodes, nodes, generator=generator) < chance).float().triu(1)
    x = upper + upper.mT
    degrees = x.sum(-1)
    closed = (x @ x @ x).diagonal(dim1=1, dim2=2).sum(-1)
    return x, _standard(closed / (degrees * (degrees - 1)).sum(-1).clamp(min=1))


def waves(num: int = 4000, length: int = 64) -> Data:
    """Noisy signals (num, length) of six shapes (num,): sine, square, saw, chirp, pulses, and a beating sine."""
    generator = _generator(13)
    kind = torch.randint(6, (num,), generator=generator)
    pace, phase = torch.rand(2, num, 1, generator=generator)
    time = torch.linspace(0, 1, length)
    turns = (3 + 5 * pace) * time + phase
    sine = torch.sin(2 * math.pi * turns)
    shapes = torch.stack(
        [
            sine,
            sine.sign(),
            2 * (turns % 1) - 1,
            torch.sin(2 * math.pi * (turns * (0.5 + time))),
            ((turns % 1) < 0.15).float() * 2 - 0.3,
            sine * torch.sin(2 * math.pi * 2 * time + phase),
        ],
        1,
    )
    x = shapes[torch.arange(num), kind]
    return x + 0.5 * torch.randn(num, length, generator=generator), kind


def additions(num: int = 6000, length: int = 20) -> Data:
    """Sequences (num, length, 2) of numbers and marks, and the sum (num,) of the two numbers that are marked."""
    generator = _generator(14)
    values = torch.rand(num, length, generator=generator)
    half = length // 2
    places = torch.randint(half, (2, num), generator=generator) + torch.tensor([[0], [half]])
    marks = torch.zeros(num, length).scatter_(1, places.T, 1.0)
    return torch.stack([values, marks], -1), _standard((values * marks).sum(1))


def brackets(num: int = 6000, length: int = 16) -> Data:
    """Sequences (num, length) of two kinds of brackets, half of them with an error, and 1 for those that match."""
    chance = random.Random(15)
    rows, labels = [], []
    for _ in range(num):
        row: list[int] = []
        stack: list[int] = []
        for place in range(length):
            opens = not stack or (len(stack) < length - place and chance.random() < 0.5)
            if opens:
                stack.append(chance.randrange(2))
                row.append(stack[-1])
            else:
                row.append(2 + stack.pop())
        if chance.random() < 0.5:
            row[chance.randrange(length)] = chance.randrange(4)
            a, b = chance.randrange(length), chance.randrange(length)
            row[a], row[b] = row[b], row[a]
        rows.append(row)
        labels.append(float(_matches(row)))
    return torch.tensor(rows), torch.tensor(labels)


def _matches(row: list[int]) -> bool:
    stack: list[int] = []
    for token in row:
        if token < 2:
            stack.append(token)
        elif not stack or stack.pop() != token - 2:
            return False
    return not stack


def relations(things: int = 60, groups: int = 6, kinds: int = 8, wrong: float = 0.1) -> Data:
    """All pairs of things (things^2, 2), and how they relate: a kind per pair of hidden groups, and some wrong ones."""
    generator = _generator(16)
    group = torch.randint(groups, (things,), generator=generator)
    table = torch.randint(kinds, (groups, groups), generator=generator)
    pairs = torch.cartesian_prod(torch.arange(things), torch.arange(things))
    right = table[group[pairs[:, 0]], group[pairs[:, 1]]]
    is_wrong = torch.rand(len(pairs), generator=generator) < wrong
    return pairs, torch.where(is_wrong, torch.randint(kinds, (len(pairs),), generator=generator), right)


def picture(size: int = 48) -> Data:
    """Coordinates (size^2, 2) in [-1, 1] and the values of a picture: a turned checkerboard and three spots."""
    axis = torch.linspace(-1, 1, size)
    x = torch.cartesian_prod(axis, axis)
    turned = x @ torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    board = torch.tanh(6 * torch.sin(7 * turned[:, 0]) * torch.sin(7 * turned[:, 1]))
    spots = torch.tensor([[0.5, 0.4], [-0.4, 0.1], [0.1, -0.6]])
    light = torch.exp(-12 * torch.cdist(x, spots).square()).sum(1)
    return x, _standard(board + 2 * light)


def spirals(num: int = 3000) -> Data:
    """Points (num, 2) on three spirals (num,), with noise."""
    generator = _generator(18)
    arm = torch.randint(3, (num,), generator=generator)
    radius = 0.2 + 1.8 * torch.rand(num, generator=generator)
    angle = 3.2 * radius + 2 * math.pi / 3 * arm
    x = radius.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1)
    return x + 0.08 * torch.randn(num, 2, generator=generator), arm


def inverse(num: int = 4000) -> Data:
    """Bishop's inverse problem: inputs (num, 1) that follow from targets (num,) by a curve with three branches."""
    generator = _generator(19)
    y = torch.rand(num, generator=generator)
    x = y + 0.3 * torch.sin(2 * math.pi * y) + 0.1 * (torch.rand(num, generator=generator) - 0.5)
    return x.unsqueeze(1) * 2 - 1, 8 * y - 4  # so wide that log likelihoods per point stay below 0


def visits(num: int = 6000, fields: int = 4, each: int = 15) -> Data:
    """Categories (num, fields), numbered over all fields, and Poisson counts (num,) that depend on pairs of them."""
    generator = _generator(20)
    popular = (torch.arange(each) + 1.0) ** -0.5
    x = torch.stack([torch.multinomial(popular, num, True, generator=generator) for _ in range(fields)], 1)
    x = x + each * torch.arange(fields)
    vectors = 0.45 * torch.randn(fields * each, 3, generator=generator)
    total = vectors[x].sum(1)
    logs = 0.5 * (total.square() - vectors[x].square().sum(1)).sum(-1)
    return x, torch.poisson((0.7 + logs).clamp(max=3.5).exp(), generator=generator)


def widening(num: int = 5000, features: int = 8) -> Data:
    """Features (num, features) and targets (num,) whose spread grows along one of them and is skewed."""
    generator = _generator(21)
    x = torch.randn(num, features, generator=generator)
    spread = torch.nn.functional.softplus(1.5 * x[:, 0])
    skewed = torch.randn(num, generator=generator).exp() - math.exp(0.5)
    return x, x[:, 1] * x[:, 2] + torch.sin(2 * x[:, 3]) + 0.5 * spread * skewed


def roll(num: int = 5000) -> Data:
    """Points (num, 2) on a rolled-up curve; the targets are not used."""
    generator = _generator(22)
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(num, generator=generator))
    x = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 8
    return x + 0.03 * torch.randn(num, 2, generator=generator), torch.zeros(num)


def lessons(num: int = 5000, features: int = 20, classes: int = 8) -> Data:
    """Features (num, features) and the probabilities (num, classes) that a fixed random network gives."""
    generator = _generator(23)
    x = torch.randn(num, features, generator=generator)
    first = torch.randn(features, 64, generator=generator) / math.sqrt(features)
    last = torch.randn(64, classes, generator=generator)
    return x, (0.8 * torch.tanh(2 * x @ first) @ last).softmax(-1)


def friedman(num: int = 4000, features: int = 10) -> Data:
    """Friedman's first problem (1991): features (num, features) in [0, 1] and targets (num,) from five of them."""
    generator = _generator(24)
    x = torch.rand(num, features, generator=generator)
    waves = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1])
    clean = waves + 20 * (x[:, 2] - 0.5).square() + 10 * x[:, 3] + 5 * x[:, 4]
    return 2 * x - 1, _standard(clean + torch.randn(num, generator=generator))
