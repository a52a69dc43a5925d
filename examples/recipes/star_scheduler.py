"""How the bundled `star` was made: its scheduler's readable numbers, fitted to many small tasks at two horizons.

    python examples/recipes/star_scheduler.py --out runs/star --seed 5    # 80 minutes of a core; resumes

96 points in a box, then 72 and 56 in ever smaller ones about the best; then the best of nine candidates on other tasks
(VALIDATION); see `lightning_lopt.meta.surface`. The curve for runs of unknown length is fitted after that, and `growth`
last, with tasks of nothing but noise beside the others. Needs MNIST, Fashion-MNIST, CIFAR-10 and tiny Shakespeare,
from $LIGHTNING_LOPT_DATA. Of `evaluation.suites.HELDOUT`, which judges the result, `digits-mlp` alone is here, at 8,000
steps and fewer in place of 20,000.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lightning_lopt as lopt
from lightning_lopt import tasks
from lightning_lopt.meta.surface import Knob, fit, sample, score
from lightning_lopt.rules.scheduler import FRACTIONS, LOG_STEPS

KNOBS = {  # boxes about what was best in an earlier fit
    "peak": Knob(0.4, 1.4),  # log of the largest factor of the nominal step size 1e-2
    "start": Knob(-0.7, 0.1),  # log of the first factor relative to the peak
    "warmup": Knob(0.05, 0.35),  # fraction of the run until the peak
    "anneal": Knob(0.35, 0.9),  # power of the cosine after it
    "early": Knob(0.15, 0.7),  # 1: the second moment's bias correction; 0: none, which is the paper's form
    "length": Knob(-1.0, -0.4),  # what ten times the length adds to the log factor
    "start_length": Knob(0.0, 0.6),  # and to the first factor beyond that: a long run need not start as slowly
    "depth": Knob(-1.2, -0.5),  # exponent of the number of tensors
    "scale": Knob(0.3, 0.75),  # exponent of a matrix's root mean square
    "size": Knob(-0.5, 0.3),  # what ten times the size adds to a matrix's log factor
    "fan": Knob(-0.9, -0.2),  # and ten times the fan-in
    "vectors": Knob(-1.1, 0.1),  # log factor of vectors
    "strength_start": Knob(0.3, 0.9),  # exponents of the momenta's strength
    "strength_end": Knob(0.0, 0.6),
    "mix_start": Knob(-0.4, 0.8),  # the fastest momentum's logit; the slowest's is its negative
    "mix_end": Knob(0.0, 1.0),
    "centering_start": Knob(0.5, 0.95),  # how much of a gradient's mean over the fan-in is taken out of it
    "centering_end": Knob(0.2, 0.95),
    "caution_start": Knob(0.5, 1.0),  # how much of a step against the gradient is held back
    "caution_end": Knob(0.2, 1.0),
    "memory": Knob(0.04, 0.2),  # offset of the second moment's decay
    "fast": Knob(0.05, 0.13),  # offset of the fastest momentum's decay
    "slow": Knob(-0.05, 0.09),  # offset of the slowest's; the middle one's is half of it
}
WITHOUT_LENGTH = {  # fitted second: the curve over steps, for runs whose length is not known
    "level": Knob(-1.5, 1.0),  # log factor at 300 steps
    "early": Knob(-1.5, 1.0),  # what ten times fewer steps add to it
    "late": Knob(-1.5, 0.3),  # what ten times more do
}
GROWTH = {  # fitted last, with the tasks of NOISY
    "growth": Knob(-1.6, 0.0),  # exponent of how far a matrix that is moved by noise has grown
}
Run = tuple[str, int, dict[str, Any]]  # task, steps, options
SIZES = {"width": 16, "depth": 2, "heads": 2}
TASKS: list[Run] = [  # each is also run at a third of its steps
    *((f"digits-{name}-mlp", 600, {}) for name in ("deep", "sigmoid", "mse")),
    *((name, 600, {}) for name in ("digits-mlp", "digits-logreg", "digits-autoencoder", "diabetes-mlp", "wine-mlp")),
    ("fashion-autoencoder", 300, {"dataset": "mnist", "image_size": 10, "hidden": (48, 12, 48)}),
    ("fashion8-mlp", 300, {"dataset": "mnist", "hidden": (48, 48), "activation": "sigmoid"}),
    *((f"digits-{norm}-mlp", 300, {}) for norm in ("layernorm", "batchnorm")),
    *(("digits-mlp", 450, {"hidden": hidden}) for hidden in ((24,) * 6, (64, 64), (128,))),
    ("digits-mlp", 450, {"hidden": (96, 48), "activation": "tanh"}),
    ("fashion8-mlp", 900, {}),
    ("cifar8-mlp", 900, {"hidden": (64, 64, 64)}),
    ("mnist8-mlp", 1500, {"batch_size": 8}),
    ("digits-conv", 250, {}),
    ("digits-resnet", 120, {}),
    ("digits-vit", 240, {"batch_size": 32, **SIZES}),
    ("shakespeare-transformer", 240, {"batch_size": 8, "head_size": 8, **SIZES}),
    ("shakespeare-lstm", 180, {"batch_size": 8, "hidden": 24, "embed": 12}),
    ("wine-mlp", 400, {"hidden": ()}),
    ("diabetes-mlp", 400, {"hidden": ()}),
    ("cifar8-mlp", 500, {"hidden": (32,) * 6}),
    ("digits-conv", 150, {"dataset": "cifar10", "image_size": 8}),
    ("digits-vit", 150, {"dataset": "cifar10", "image_size": 8, "batch_size": 16, "width": 24, "depth": 3, "heads": 2}),
    ("shakespeare-transformer", 150, {"batch_size": 8, "head_size": 8, "width": 16, "depth": 4, "heads": 2}),
    ("synthetic-mlp", 400, {"hidden": ()}),
    ("wine-mlp", 250, {"hidden": (8,), "activation": "tanh"}),
    (
        "digits-conv",
        200,
        {"dataset": "fashion_mnist", "image_size": 10, "strides": (2, 2, 1), "channels": (16, 32, 32)},
    ),
    ("digits-vit", 120, {"dataset": "fashion_mnist", "image_size": 8, "batch_size": 16, "depth": 3}),
]
NOISY: list[Run] = [  # gradients of evolution strategies, which are nearly all noise
    ("digits-es", 450, {"pairs": 1}),
    ("digits-es", 450, {"pairs": 1, "hidden": (32, 32, 32)}),
    ("digits-es", 240, {}),
]
VALIDATION: list[Run] = [  # what the best is chosen by: other nets, other data, a longer run; three starts each
    ("digits-tanh-mlp", 600, {}),
    ("wine-deep-mlp", 800, {}),
    ("breast-cancer-logreg", 400, {}),
    ("digits-dropout-mlp", 500, {}),
    ("fashion8-mlp", 800, {"hidden": (32, 32, 32), "norm": "layer"}),
    ("fashion8-mlp", 1000, {"hidden": (32,) * 6}),
    ("fashion-autoencoder", 1000, {"image_size": 8, "hidden": (32, 8, 32)}),
    ("digits-conv", 250, {"dataset": "mnist", "image_size": 8}),
    ("digits-vit", 250, {}),
    ("shakespeare-transformer", 250, {"width": 24, "depth": 3, "heads": 4, "batch_size": 8}),
    ("digits-resnet", 150, {"channels": (12, 16)}),
    ("digits-mlp", 8000, {}),
]
NOISY_VALIDATION: list[Run] = [
    ("digits-es", 600, {"base": "fashion8-mlp", "pairs": 2, "hidden": (32, 32)}),
    ("digits-es", 600, {"base": "cifar8-mlp", "pairs": 1, "hidden": (64, 64)}),
    ("digits-es", 300, {"pairs": 1, "hidden": (128,)}),
]
Theta = dict[str, torch.Tensor]
WORST, SMALLEST = 2.0, 0.1  # a run counts as e^2 times the best at most; what is added to a task's unit
MEAN = 1.0  # weight of the mean loss beside the final one
SHRINK = 0.6  # of the box from round to round


def theta(rule: lopt.rules.UpdateRule, knob: dict[str, float]) -> Theta:
    """The rule's meta-parameters with the knobs set."""
    params = {name: torch.zeros_like(value) for name, value in rule.meta_params().items()}
    up = [min(1.0, fraction / knob["warmup"]) for fraction in FRACTIONS]
    down = [max(0.0, fraction - knob["warmup"]) / (1 - knob["warmup"]) for fraction in FRACTIONS]
    cosine = [max(0.5 + 0.5 * math.cos(math.pi * x), 1e-4) for x in down]
    curve = [knob["start"] * (1 - u) + knob["anneal"] * math.log(c) for u, c in zip(up, cosine, strict=True)]
    params["schedule_fraction"] += knob["peak"] + torch.tensor(curve)
    params["schedule_length"] += knob["length"] + knob["start_length"] * (1 - torch.tensor(up))
    powers = params["tensor_powers"]  # (vectors, matrices) x (start, end) x feature
    powers[0, :, 0], powers[1, :, 1], powers[1, :, 2], powers[1, :, 3], powers[:, :, 4] = (
        knob["vectors"], 2 * knob["scale"], knob["size"], knob["fan"], knob["depth"],
    )  # fmt: skip
    powers[:, 0, 5:], powers[:, 1, 5:] = 2 / 3 * knob["strength_start"], 2 / 3 * knob["strength_end"]
    for row, name in enumerate(("mix_start", "mix_end")):
        params["momentum_mix"][row] = torch.tensor([knob[name], 0.0, -knob[name]])
    for name in ("centering", "caution"):
        params[name] += torch.tensor([knob[f"{name}_start"], knob[f"{name}_end"]])
    params["rms_decays"] += knob["memory"]
    params["momentum_decays"] += torch.tensor([knob["fast"], knob["slow"] / 2, knob["slow"]])
    decay = 1 - 1e-3 * math.exp(10 * knob["memory"])
    bias = torch.tensor([math.log(1 - decay ** (10**x)) for x in LOG_STEPS])
    params["schedule_early"] += knob["early"] / 2 * bias
    return params


def theta_with_growth(found: Theta, knob: dict[str, float]) -> Theta:
    """The rule's meta-parameters with growth set."""
    return {**found, "growth": torch.full((2,), knob["growth"])}


def theta_without_length(found: Theta, knob: dict[str, float]) -> Theta:
    """The rule's meta-parameters with the curve over steps set."""
    decades = torch.tensor(LOG_STEPS) - math.log10(300)
    curve = knob["level"] + knob["early"] * (-decades).clamp(min=0) + knob["late"] * decades.clamp(min=0)
    return {**found, "schedule_step": curve}


def digest(thetas: list[Theta]) -> str:
    """A hash of the points' meta-parameters."""
    found = hashlib.sha256()
    for each in thetas:
        for name, value in each.items():
            found.update(name.encode() + value.detach().numpy().tobytes())
    return found.hexdigest()[:16]


class Study:
    """What points are worth over all tasks, kept task by task, so that it can be taken up again."""

    def __init__(self, rule: lopt.rules.UpdateRule, out: Path, runs: list[Run], starts: int = 1) -> None:
        self.rule, self.out, self.runs, self.starts = rule, out, runs, starts
        self.units: torch.Tensor | None = None

    def values(self, thetas: list[Theta], seed: int, tell: bool) -> torch.Tensor:
        """(points,) losses relative to the best point's, averaged over tasks.

        Each in units of the median's over the first round, or nets that fit their few images to nothing would have all
        the say: their losses differ by factors of ten, those of nets that are too small for their data by percents.
        """
        rows = self.scores(thetas, seed, tell)
        relative = (rows - rows.amin(2, keepdim=True)).clamp(max=WORST)  # (runs, final and mean, points)
        if self.units is None:
            self.units = relative.median(2, keepdim=True).values + SMALLEST
        return (relative / self.units).mean(0).T @ torch.tensor([1.0, MEAN])

    def scores(self, thetas: list[Theta], seed: int, tell: bool) -> torch.Tensor:
        """(runs, 2, points) logarithms of final and mean losses."""
        rows = []
        for number, (name, steps, options) in enumerate(self.runs):
            file = self.out / f"{seed}-{number}.json"
            key = f"{name} {steps} {options} {seed} {tell} {digest(thetas)}"  # all that the scores follow from
            kept = json.loads(file.read_text()) if file.exists() else {}
            if kept.get("key") != key:
                task, seeds = tasks.make(name, **options), range(seed, seed + self.starts)
                found = [torch.stack(score(self.rule, thetas, task, steps, seed=start, tell=tell)) for start in seeds]
                kept = {"key": key, "scores": torch.stack(found).mean(0).tolist()}
                file.write_text(json.dumps(kept))
                print(f"{seed} {number + 1}/{len(self.runs)} {name} {steps} steps", flush=True)
            rows.append(torch.tensor(kept["scores"]))
        return torch.stack(rows)


def search(
    study: Study,
    judge: Study,
    knobs: dict[str, Knob],
    make: Callable[[dict[str, float]], Theta],
    counts: list[int],
    seed: int,
    tell: bool,
) -> Theta:
    """Rounds of so many points, each in a smaller box than the last; then the best of nine, by the judge."""
    points, worth, center = torch.zeros(0, len(knobs)), torch.zeros(0), None
    for number, count in enumerate(counts):
        new = sample(knobs, count, seed=seed + number, center=center, width=SHRINK**number)
        thetas = [make(dict(zip(knobs, point, strict=True))) for point in new.tolist()]
        points, worth = torch.cat([points, new]), torch.cat([worth, study.values(thetas, seed + number, tell)])
        surface = fit(knobs, points, worth)
        center = surface.center()
    best = [dict(zip(knobs, point, strict=True)) for point in points[worth.argsort()[:4]].tolist()]
    last = [center, *(surface.minimum(pull=pull) for pull in (0.02, 0.05, 0.1, 0.3)), *best]
    chosen = last[int(judge.values([make(knob) for knob in last], seed + 5, tell).argmin())]
    print("chosen", {name: round(value, 3) for name, value in chosen.items()}, flush=True)
    return make(chosen)


def compare(judge: Study, names: list[str], seed: int) -> None:
    """Print what rules of this recipe lose on the judge's tasks, final and mean, relative to the first of them."""
    rules = [lopt.load_rule(name) for name in names]
    if other := [name for name, rule in zip(names, rules, strict=True) if rule.config != judge.rule.config]:
        raise SystemExit(f"{other[0]} is not a rule of this recipe: {judge.rule.config} is what these are.")
    scores = judge.scores([dict(rule.meta_params()) for rule in rules], seed, True)
    ratios = (scores - scores[:, :, :1]).exp()
    for (task, steps, _), row in zip(judge.runs, ratios, strict=True):
        print(f"{task}@{steps}", *(f"{final:.3f}/{mean:.3f}" for final, mean in row.T.tolist()))
    for name, (final, mean) in zip(names, ratios.log().mean(0).exp().T.tolist(), strict=True):
        print(f"{name}: geometric means of final and mean losses over {names[0]}'s: {final:.3f} and {mean:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/star"))
    parser.add_argument("--points", type=int, nargs="+", default=[96, 72, 56], help="of each round")
    parser.add_argument("--tasks", nargs="+", help="only these, for a quick look")
    parser.add_argument("--shorter", type=int, default=1, help="runs this many times shorter, for a quick look")
    parser.add_argument("--eps", type=float, default=1e-10, help="added to the second moment before its root")
    parser.add_argument("--compare", nargs="+", metavar="RULE", help="no fit: these rules on the validation tasks")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if wrong := set(arguments.tasks or ()) - {name for name, _, _ in TASKS + NOISY + VALIDATION}:
        parser.error(f"--tasks: {sorted(wrong)[0]!r} is not a task of this recipe; TASKS, NOISY and VALIDATION are.")
    rule = lopt.rules.make(
        "star", nominal_stepsize=1e-2, step_mult=0.0, nominal_controller=False, scheduler=True, eps=arguments.eps
    )

    def study(folder: str, runs: list[Run], starts: int = 1) -> Study:
        (arguments.out / folder).mkdir(parents=True, exist_ok=True)
        kept = [run for run in runs if arguments.tasks is None or run[0] in arguments.tasks] or runs[:1]
        short = [(name, max(steps // arguments.shorter, 10), options) for name, steps, options in kept]
        return Study(rule, arguments.out / folder, short, starts)

    def both(runs: list[Run]) -> list[Run]:
        return runs + [(name, steps // 3, options) for name, steps, options in runs]

    seed, few = 10 * arguments.seed, max(arguments.points[0] // 4, 8)
    judge = study("noisy-validation", VALIDATION + NOISY_VALIDATION, starts=3)
    if arguments.compare:
        compare(judge, arguments.compare, seed)
        return
    whole = study(".", both(TASKS))
    found = search(
        whole, study("validation", VALIDATION, 3), KNOBS, lambda knob: theta(rule, knob), arguments.points, seed, True
    )
    found = search(whole, whole, WITHOUT_LENGTH, lambda knob: theta_without_length(found, knob), [few], seed + 6, False)
    noisy = study("noisy", both(TASKS + NOISY))
    found = search(noisy, judge, GROWTH, lambda knob: theta_with_growth(found, knob), [few // 2], seed + 7, True)
    rule.load_state_dict(found)
    print(lopt.save_rule(rule, arguments.out / "rule"))


if __name__ == "__main__":
    main()
