"""Maheswaranathan et al. 2021 (arXiv 2011.02159), sections 5.1 to 5.5 and App. A: what the learned GRUs do.

The bundled rules, which have other weights than the paper's, run on their own tasks and are analyzed as by
`lopt analyze`. Seeds are those of the runs that are analyzed; there is one set of weights per task.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from lightning_lopt import hub, tasks
from lightning_lopt.analysis.findings import Findings, analyze, tensor_learning_rates
from lightning_lopt.analysis.response import update_function
from lightning_lopt.claims.claim import Check, Claim, Measurement, at_least, at_most, below, each_at_most
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.gru import STEPS, TASKS
from lightning_lopt.evaluation.compare import fingerprint

QUADRATIC, ROSENBROCK, MOONS, MNIST = TASKS
RUNS = {QUADRATIC: 16, ROSENBROCK: 16, MOONS: 2, MNIST: 1}
FIXED = "fixed points"
ATTRACTING = "largest |eigenvalue| at the fixed point"
VARIANCE = "variance of the states at the end / at its peak"
BEYOND = "share of gradients beyond the clipping threshold"
SLOPE = "first update at ten times the largest gradient / its linear extrapolation"
FALLS = "larger gradients can give smaller updates"
WARM_UP = "peak / first effective learning rate without gradients"
DECAY = "peak / last effective learning rate without gradients"
ADAPTED = "effective learning rate under the largest constant gradient / under the smallest"
TENSORS = "highest / lowest median effective learning rate among tensors"


def of(quantity: str, name: str) -> str:
    """The name of a rule's quantity."""
    return f"{name}: {quantity}"


def measure_rule(findings: Findings) -> dict[str, float]:
    """The numbers of one analysis; NaN where the rule has no such thing."""
    variances = findings.recording.states.var(1).sum(-1)
    rates = findings.schedule.learning_rates
    sizes = findings.curve.gradients.abs()
    slopes = findings.curve.learning_rates
    enough = len(sizes) >= 3
    tensors = [float(row.median()) for row in tensor_learning_rates(findings).values()]
    return {
        FIXED: float(len(findings.fixed.states)),
        ATTRACTING: float(findings.modes.timescales.max()),
        VARIANCE: float(variances[-1] / variances.max()),
        BEYOND: findings.clipping.fraction,
        SLOPE: _saturation(findings),
        FALLS: float(not findings.clipping.monotonic),
        WARM_UP: float(rates.max() / rates[0]),
        DECAY: float(rates.max() / rates[-1]),
        ADAPTED: float(slopes[sizes.argmax()] / slopes[sizes.argmin()]) if enough else math.nan,
        TENSORS: max(tensors) / min(tensors) if min(tensors) > 0 else math.nan,
    }


def _saturation(findings: Findings) -> float:
    """How far the first update at large gradients is below its linear extrapolation: 1 for a linear rule."""
    initial = findings.schedule.states[0]
    large = 10 * findings.recording.grads.abs().max().double().reshape(1)
    update = float(update_function(findings.rule, initial, large).squeeze())
    return -update / (findings.clipping.learning_rate * float(large))


def _measure(experiment: Experiment, names: tuple[str, ...], quantities: tuple[str, ...]) -> Measurement:
    numbers: dict[str, list[float]] = {}
    for name in names:
        rule = hub.load_rule(name)
        for seed in experiment.seeds:
            steps = experiment.pick(STEPS, 40)

            def compute(name: str = name, seed: int = seed, steps: int = steps) -> dict[str, Any]:
                experiment.progress(f"analyze {name}, seed {seed}", seed, len(experiment.seeds))
                options: dict[str, Any] = {"name": name, "steps": steps, "runs": RUNS[name], "seed": seed}
                return measure_rule(analyze(hub.load_rule(name), tasks.make(TASKS[name]), **options))

            key = {"rule": fingerprint(rule), "steps": steps, "runs": RUNS[name], "seed": seed}
            found = experiment.cached(f"{name} analyzed", key, compute)
            for quantity in quantities:
                numbers.setdefault(of(quantity, name), []).append(found[quantity])
    return Measurement(numbers)


PAPER = "Maheswaranathan et al. 2021 (arXiv 2011.02159)"
ALL = (QUADRATIC, ROSENBROCK, MOONS, MNIST)
FIRST_THREE = ALL[:3]
SCHEDULED = (QUADRATIC, MNIST)
CLEAR = 1.1
"""A peak of the learning rate is a clear one if it is this many times the other rate."""
_SETUP = (
    "The bundled rules, one set of weights a task, whose meta-training began as tuned momentum; runs of 200 steps of "
    "16 problems (two-moons 2, MNIST 1), a number per seed of the runs. "
)
_IN_PAPER = (
    "One GRU of 256 units a task, meta-trained from scratch for 5,000 steps; 64 problems; figures without numbers."
)


def _claim(
    key: str, section: str, statement: str, how: str, quantities: tuple[str, ...], checks: tuple[Check, ...]
) -> Claim:
    used = tuple(name for name in ALL if any(q.startswith(f"{name}: ") for check in checks for q in check.quantities))
    return Claim(
        id=f"gru-{key}",
        source=f"{PAPER}, {section}",
        title=f"{section}, for the bundled rules of {len(used)} tasks",
        in_paper=_IN_PAPER,
        statement=statement,
        setup=_SETUP + how,
        measure=partial(_measure, names=used, quantities=quantities),
        checks=checks,
        minutes=2.6 if MNIST in used else 0.8,
        quick_minutes=0.6 if MNIST in used else 0.2,
        needs=("mnist",) if MNIST in used else (),
    )


CLAIMS = (
    _claim(
        "fixed-points",
        "section 5.1, figures 3, 8, 9 and 13",
        "On the first three tasks all states converge to one attracting fixed point; on MNIST to a line of them.",
        "Fixed points are searched from 60 visited states; distinct ones are counted.",
        (FIXED, ATTRACTING, VARIANCE),
        (
            *(each_at_most(of(FIXED, name), 1, published="a single fixed point") for name in FIRST_THREE),
            *(at_least(of(FIXED, name), 1, published="a single fixed point") for name in FIRST_THREE),
            *(each_at_most(of(ATTRACTING, name), 0.9999, published="attractor") for name in FIRST_THREE),
            *(at_most(of(VARIANCE, name), 0.1, published="goes to zero") for name in FIRST_THREE),
            at_least(of(FIXED, MNIST), 2, published="any number along a 1D manifold"),
            at_least(of(VARIANCE, MNIST), 0.1, published="remains elevated"),
        ),
    ),
    _claim(
        "clipping",
        "section 5.2, figures 4 and 10",
        "Updates saturate for large gradients: softly clipped gradients, used little in linear regression and more on "
        "Rosenbrock's function; on MNIST the update even falls.",
        "The update at the initial state; the threshold is where it is half of its linear extrapolation.",
        (BEYOND, SLOPE, FALLS),
        (
            *(at_most(of(SLOPE, name), 0.5, published="saturates") for name in ALL),
            below(of(BEYOND, QUADRATIC), of(BEYOND, ROSENBROCK), published="largely stays within the linear region"),
            at_most(of(BEYOND, QUADRATIC), 0.05, published="largely stays within the linear region"),
            at_least(of(FALLS, MNIST), 1, published="slopes backwards"),
        ),
    ),
    _claim(
        "schedule",
        "section 5.3, figures 5 and 11",
        "Without gradients the learning rate of the rules for linear regression and MNIST warms up and decays; the "
        "other two have no clear schedule.",
        f"The effective learning rate along 200 steps with gradient 0; clear is a factor of {CLEAR:g}.",
        (WARM_UP, DECAY),
        (
            *(at_least(of(WARM_UP, name), CLEAR, published="warm-up") for name in SCHEDULED),
            *(at_least(of(DECAY, name), CLEAR, published="decay") for name in SCHEDULED),
            *(
                at_most(of(quantity, name), CLEAR, published="no clear schedule")
                for name in (ROSENBROCK, MOONS)
                for quantity in (WARM_UP, DECAY)
            ),
        ),
    ),
    _claim(
        "adaptation",
        "section 5.4, figures 6 and 12",
        "On the first three tasks large persistent gradients lower the learning rate.",
        "Fixed points of the state under constant gradients, from a ten-thousandth of the largest one seen to it.",
        (ADAPTED,),
        tuple(at_most(of(ADAPTED, name), 0.9, published="reduce learning rates") for name in FIRST_THREE),
    ),
    _claim(
        "tensors",
        "section 5.5, figure 7",
        "The rule for MNIST has different learning rates for different layers and for weights and biases.",
        "The effective learning rate at the mean state of each tensor, median over the run.",
        (TENSORS,),
        (at_least(of(TENSORS, MNIST), 1.25, published="different trajectories"),),
    ),
)
