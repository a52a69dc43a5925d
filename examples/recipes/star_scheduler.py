"""How the bundled `star` was made: its readable numbers, fitted to many small tasks.

    python examples/recipes/star_scheduler.py --out runs/star --seed 11    # an hour of one core; resumes

Fits 56 points in a box, then 40 and 32 in ever smaller boxes around the best, and takes the best of nine candidates on
other tasks (VALIDATION); see `lightning_lopt.meta.surface`. Then it fits the curve for runs of unknown length. A task
counts by its final and mean training losses and by its validation loss at the end (WEIGHTS). Needs MNIST,
Fashion-MNIST, CIFAR-10 and tiny Shakespeare in $LIGHTNING_LOPT_DATA. No task of `evaluation.suites.UNSEEN2` is used
here, nor any kind in `JUDGING_ONLY`.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

import lightning_lopt as lopt
from lightning_lopt import tasks
from lightning_lopt.meta.surface import Knob, fit, sample, score

# A thousandth above 1e-2, since the paper multiplies its nominal term by exp(1e-3) where no controller does.
STEPSIZE = 1e-2 * math.exp(1e-3)
# Boxes around the best of earlier fits. `lightning_lopt.rules.ScheduledConfig` says what each number means.
KNOBS = {
    "peak": Knob(0.4, 1.4),
    "start": Knob(-0.8, 0.1),
    "warmup": Knob(0.05, 0.3),
    "anneal": Knob(0.35, 0.9),
    "bias_correction": Knob(0.1, 0.6),
    "length": Knob(-1.0, -0.4),
    "depth": Knob(-1.1, -0.4),
    "scale": Knob(0.3, 0.7),
    "size": Knob(-0.5, 0.2),
    "fan_in": Knob(-0.9, -0.2),
    "vectors": Knob(-1.0, 0.2),
    "strength_start": Knob(0.3, 0.9),
    "strength_end": Knob(0.0, 0.7),
    "mix_start": Knob(-0.4, 0.7),
    "mix_end": Knob(-0.1, 0.9),
    "centering_start": Knob(0.3, 0.95),
    "centering_end": Knob(0.0, 0.95),
    "caution_start": Knob(0.0, 1.0),
    "caution_end": Knob(0.0, 1.0),
    "orthogonal_start": Knob(0.6, 1.0),
    "orthogonal_end": Knob(0.4, 1.0),
    "hidden": Knob(-0.4, 0.9),
    "hidden_fan_in": Knob(-0.3, 0.5),
    "embedding": Knob(-0.7, 0.7),
    "output": Knob(-0.8, 0.5),
    "first_scale": Knob(0.3, 1.0),
    "cap": Knob(-2.3, -0.3),
    "decay": Knob(0.0, 3.0),
}
FIXED = {  # of earlier fits
    "start_length": 0.260030465,
    "rms_offset": 0.13066414,
    "fast_offset": 0.08194125,
    "slow_offset": -0.010301658,
    "growth": -1.1211647,
}
WITHOUT_LENGTH = {"unknown_level": Knob(-1.0, 1.5), "unknown_early": Knob(-1.5, 1.0), "unknown_late": Knob(-1.5, 0.3)}
Numbers = dict[str, float]
Run = tuple[str, int, dict[str, Any]]  # task, steps, options
SIZES = {"width": 16, "depth": 2, "heads": 2}
NOISE, FEW = {"label_noise": (0.4, 0.4)}, {"subset": (0.1, 0.1)}
TASKS: list[Run] = [
    *((f"digits-{name}-mlp", 500, {}) for name in ("deep", "sigmoid", "mse")),
    *((name, 200, {}) for name in ("digits-mlp", "digits-logreg", "diabetes-mlp")),
    *((name, 600, {}) for name in ("digits-mlp", "digits-autoencoder", "wine-mlp")),
    ("fashion-autoencoder", 300, {"dataset": "mnist", "image_size": 10, "hidden": (48, 12, 48)}),
    ("fashion8-mlp", 300, {"dataset": "mnist", "hidden": (48, 48), "activation": "sigmoid"}),
    *((f"digits-{norm}-mlp", 200, {}) for norm in ("layernorm", "batchnorm", "dropout")),
    ("digits-mlp", 450, {"hidden": (24,) * 6, **FEW}),
    ("digits-mlp", 450, {"hidden": (96, 48), "activation": "tanh", **NOISE}),
    ("fashion8-mlp", 1200, {"hidden": (64, 64), "subset": (0.02, 0.02), **NOISE}),
    ("fashion8-mlp", 250, {"hidden": (64, 64), "scale": 0.1}),
    ("digits-mlp", 300, {"hidden": (48, 48), "activation": "tanh", "scale": 0.3}),
    ("cifar8-mlp", 700, {"hidden": (64, 64, 64), **NOISE}),
    ("cifar8-mlp", 400, {"hidden": (32,) * 6}),
    ("mnist8-mlp", 1200, {"batch_size": 8}),
    ("mnist8-mlp", 80, {"image_size": 14, "hidden": (256, 256, 256), "batch_size": 32}),
    ("digits-conv", 250, {"subset": (0.3, 0.3)}),
    ("digits-conv", 150, {"dataset": "cifar10", "image_size": 8}),
    (
        "digits-conv",
        200,
        {"dataset": "fashion_mnist", "image_size": 10, "strides": (2, 2, 1), "channels": (16, 32, 32)},
    ),
    ("digits-resnet", 100, {}),
    ("digits-resnet", 100, {"dataset": "cifar10", "image_size": 8, "subset": (0.2, 0.2)}),
    ("digits-vit", 200, {"batch_size": 32, **SIZES}),
    ("digits-vit", 100, {"dataset": "cifar10", "image_size": 8, "batch_size": 16, "width": 24, "depth": 3, "heads": 2}),
    ("shakespeare-transformer", 300, {"batch_size": 8, "head_size": 8, **SIZES}),
    ("shakespeare-transformer", 100, {"batch_size": 8, "head_size": 8, "width": 24, "depth": 4, "heads": 3}),
    ("shakespeare-transformer", 80, {"batch_size": 4, "head_size": 16, "width": 64, "depth": 2, "heads": 4}),
    ("shakespeare-lstm", 180, {"batch_size": 8, "hidden": 24, "embed": 12}),
    ("shakespeare-lstm", 100, {"batch_size": 8, "hidden": 48, "embed": 24, "length": 16, "subset": (0.02, 0.02)}),
    ("wine-mlp", 400, {"hidden": ()}),
    ("synthetic-mlp", 300, {"hidden": ()}),
    ("digits-es", 300, {"pairs": 1}),
    ("digits-es", 200, {}),
]
VALIDATION: list[Run] = [  # what the best is chosen by: other nets, other data, a longer run; two starts each
    ("digits-tanh-mlp", 500, {}),
    ("wine-deep-mlp", 600, {}),
    ("breast-cancer-logreg", 400, {}),
    ("fashion8-mlp", 600, {"hidden": (32, 32, 32), "norm": "layer", **NOISE}),
    ("fashion8-mlp", 800, {"hidden": (32,) * 6, "subset": (0.05, 0.05)}),
    ("fashion-autoencoder", 800, {"image_size": 8, "hidden": (32, 8, 32)}),
    ("digits-conv", 250, {"dataset": "mnist", "image_size": 8}),
    ("digits-conv", 300, {"dataset": "cifar10", "image_size": 12, "channels": (12, 24), "norm": "batch"}),
    ("digits-vit", 250, {}),
    ("shakespeare-transformer", 400, {"width": 24, "depth": 3, "heads": 4, "batch_size": 8}),
    ("shakespeare-lstm", 250, {"batch_size": 8, "hidden": 32, "embed": 16}),
    ("digits-resnet", 150, {"channels": (12, 16)}),
    ("digits-mlp", 4000, {}),
    ("digits-es", 400, {"base": "fashion8-mlp", "pairs": 2, "hidden": (32, 32)}),
]
Theta = dict[str, torch.Tensor]
WORST, SMALLEST = 2.0, 0.1  # a run counts as e^2 times the best at most; what is added to a task's unit
WEIGHTS = (0.5, 0.5, 1.0)  # of final and mean training loss, and of the validation loss at the end
SHRINK = 0.6  # of the box from round to round


def make_rule(eps: float, numbers: Numbers) -> lopt.rules.UpdateRule:
    """The rule with these readable numbers, and neutral ones for the others."""
    return lopt.rules.make("scheduled", nominal_stepsize=STEPSIZE, eps=eps, **numbers)


def make_task(name: str, options: dict[str, Any]) -> tasks.Task:
    """A task by name; the option `scale` multiplies its initial weights."""
    options = dict(options)
    scale = options.pop("scale", None)
    task = tasks.make(name, **options)
    return task if scale is None else tasks.wrappers.ScaledInit(task=task, scale_range=(scale, scale))


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
        relative = (rows - rows.amin(2, keepdim=True)).clamp(max=WORST)  # (runs, final, mean and valid, points)
        if self.units is None:
            self.units = relative.median(2, keepdim=True).values + SMALLEST
        return (relative / self.units).mean(0).T @ torch.tensor(WEIGHTS)

    def scores(self, thetas: list[Theta], seed: int, tell: bool) -> torch.Tensor:
        """(runs, 3, points) logarithms of final and mean training losses, and of validation losses."""
        rows = []
        for number, (name, steps, options) in enumerate(self.runs):
            file = self.out / f"{seed}-{number}.json"
            key = f"{name} {steps} {options} {seed} {tell} {digest(thetas)}"  # all that the scores follow from
            kept = json.loads(file.read_text()) if file.exists() else {}
            if kept.get("key") != key:
                task, seeds = make_task(name, options), range(seed, seed + self.starts)
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
    found: Numbers,
    counts: list[int],
    seed: int,
    tell: bool,
) -> Numbers:
    """Fit `knobs`, given the numbers `found` so far: rounds of points in shrinking boxes, then the judge's choice."""

    def theta(point: Numbers) -> Theta:
        return dict(make_rule(study.rule.config.eps, {**found, **point}).meta_params())

    points, worth, center = torch.zeros(0, len(knobs)), torch.zeros(0), None
    for number, count in enumerate(counts):
        new = sample(knobs, count, seed=seed + number, center=center, width=SHRINK**number)
        thetas = [theta(dict(zip(knobs, point, strict=True))) for point in new.tolist()]
        points, worth = torch.cat([points, new]), torch.cat([worth, study.values(thetas, seed + number, tell)])
        surface = fit(knobs, points, worth)
        center = surface.center()
    best = [dict(zip(knobs, point, strict=True)) for point in points[worth.argsort()[:4]].tolist()]
    last = [center, *(surface.minimum(pull=pull) for pull in (0.02, 0.05, 0.1, 0.3)), *best]
    chosen = last[int(judge.values([theta(point) for point in last], seed + 5, tell).argmin())]
    print("chosen", {name: round(value, 3) for name, value in chosen.items()}, flush=True)
    return {**found, **chosen}


def compare(judge: Study, names: list[str], seed: int) -> None:
    """Print what rules of this recipe lose on the judge's tasks, relative to the first: final, mean and validation."""
    rules = [lopt.load_rule(name) for name in names]
    fixed = (judge.rule.config.nominal_stepsize, judge.rule.config.eps)
    for name, rule in zip(names, rules, strict=True):
        if rule.kind != "scheduled" or (rule.config.nominal_stepsize, rule.config.eps) != fixed:
            raise SystemExit(f"{name} is not a rule of this recipe: kind 'scheduled', step size and eps {fixed}.")
    scores = judge.scores([dict(rule.meta_params()) for rule in rules], seed, True)
    ratios = (scores - scores[:, :, :1]).exp()
    for (task, steps, _), row in zip(judge.runs, ratios, strict=True):
        print(f"{task}@{steps}", *("/".join(f"{ratio:.3f}" for ratio in ratios) for ratios in row.T.tolist()))
    for name, means in zip(names, ratios.log().mean(0).exp().T.tolist(), strict=True):
        final, mean, valid = (f"{ratio:.3f}" for ratio in means)
        print(f"{name}: geometric means over {names[0]}'s: final {final}, mean {mean}, validation {valid}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/star"))
    parser.add_argument("--points", type=int, nargs="+", default=[56, 40, 32], help="of each round")
    parser.add_argument("--tasks", nargs="+", help="only these, for a quick look")
    parser.add_argument("--shorter", type=int, default=1, help="runs this many times shorter, for a quick look")
    parser.add_argument("--eps", type=float, default=1e-10, help="added to the second moment before its root")
    parser.add_argument("--compare", nargs="+", metavar="RULE", help="no fit: these rules on the validation tasks")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if wrong := set(arguments.tasks or ()) - {name for name, _, _ in TASKS + VALIDATION}:
        parser.error(f"--tasks: {sorted(wrong)[0]!r} is not a task of this recipe; TASKS and VALIDATION are.")
    rule = make_rule(arguments.eps, {})

    def study(folder: str, runs: list[Run], starts: int = 1) -> Study:
        (arguments.out / folder).mkdir(parents=True, exist_ok=True)
        kept = [run for run in runs if arguments.tasks is None or run[0] in arguments.tasks] or runs[:1]
        short = [(name, max(steps // arguments.shorter, 10), options) for name, steps, options in kept]
        return Study(rule, arguments.out / folder, short, starts)

    seed, few = 10 * arguments.seed, max(arguments.points[0] // 4, 8)
    judge = study("validation", VALIDATION, starts=2)
    if arguments.compare:
        compare(judge, arguments.compare, seed)
        return
    whole = study(".", TASKS)
    found = search(whole, judge, KNOBS, dict(FIXED), arguments.points, seed, True)
    found = search(whole, whole, WITHOUT_LENGTH, found, [few], seed + 6, False)
    rule = make_rule(arguments.eps, found)
    print(lopt.save_rule(rule, arguments.out / "rule"))


if __name__ == "__main__":
    main()
