"""Compare the flagship with the default optimizers of six packages built on Lightning, on models of theirs.

    make third-party

Each package gets a virtual environment of its own with pinned versions (.venv-third-party-NAME). The results go to
docs/third_party.json, one row per run, and the page made from them to docs/third_party.md. A run is not repeated while
its versions and its code stay the same, so an interrupted command continues where it stopped.

This file needs only the standard library.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "docs" / "third_party.json"
PAGE = ROOT / "docs" / "third_party.md"
PINNED = {"torch": "2.13.0", "lightning": "2.6.6", "pytorch-lightning": "2.6.6"}
OPTIMIZERS = ("default", "star")
SEEDS = (0, 1)
# What the flagship's training depends on besides the scripts: its runs are repeated when a file in here changes.
STAR_CODE = [ROOT / "lightning_lopt" / part for part in ("kernels", "optimizer", "plugin", "rules")]
STAR_CODE.append(ROOT / "pretrained" / "star")

Run = dict[str, Any]  # a row of docs/third_party.json


@dataclass(frozen=True)
class Package:
    """A package and the script in this folder that trains one of its models."""

    name: str  # of the distribution
    version: str
    script: str
    model: str
    default: str  # the optimizer that users of the package get if they choose none
    validation: str  # what the script returns
    undeclared: tuple[str, ...] = ()  # distributions that the package imports but does not require


PACKAGES = [
    Package("chemprop", "2.3.1", "chemprop_mpnn.py", "MPNN", "Adam, Noam-like, 1e-4 to 1e-3", "MSE"),
    Package("darts", "0.48.1", "darts_lstm.py", "LSTM", "Adam 1e-3", "MSE"),
    Package("neuralforecast", "3.3.0", "neuralforecast_nhits.py", "N-HiTS", "Adam 1e-3, halved every 100 steps", "MAE"),
    Package(
        "pytorch-forecasting",
        "1.8.0",
        "pytorch_forecasting_nbeats.py",
        "N-BEATS",
        "Adam 1e-2, weight decay 1e-2, clipping 0.1 (its tutorial)",
        "loss",
    ),
    Package(
        "pytorch-tabular",
        "1.2.0",
        "pytorch_tabular_mlp.py",
        "CategoryEmbedding",
        "Adam 1e-3",
        "accuracy",
        undeclared=("requests",),
    ),
    Package("scvi-tools", "1.4.2", "scvi_tools_scvi.py", "SCVI", "Adam 1e-3, weight decay 1e-6", "negative ELBO"),
]
NUM_RUNS = len(PACKAGES) * len(OPTIMIZERS) * len(SEEDS)

# ---------------------------------------------------------------------------------------------------------------------
# One run


def environment_of(package: Package) -> Path:
    """Create the package's environment, or complete it; return its Python."""
    folder = ROOT / f".venv-third-party-{package.name}"
    python = folder / "bin" / "python"
    requirements = [f"{name}=={version}" for name, version in {**PINNED, package.name: package.version}.items()]
    requirements += package.undeclared
    # The stamp says what was installed. It is written last, so that an interrupted installation is taken up again.
    stamp = folder / ".installed"
    wanted = "\n".join([*requirements, (ROOT / "pyproject.toml").read_text()])
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"{package.name}: installing into {folder.name}; this takes minutes", flush=True)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # One pip command, because a second one could replace what the first one pinned.
        subprocess.run([python, "-m", "pip", "install", "-q", *requirements, "-e", ROOT], check=True)
        stamp.write_text(wanted)
    return python


def versions_in(python: Path, package: Package) -> dict[str, str]:
    """The versions that a run in this environment depends on."""
    names = ["torch", "lightning", package.name]
    code = (
        "import json, platform; from importlib.metadata import version; "
        f"print(json.dumps({{'python': platform.python_version(), **{{name: version(name) for name in {names}}}}}))"
    )
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def hash_of_code(script: str, optimizer: str) -> str:
    """A hash of the code that a run executes, without that of the package."""
    files = [HERE / "common.py", HERE / script]
    if optimizer == "star":
        found = (path for folder in STAR_CODE for path in folder.rglob("*"))
        files += sorted(path for path in found if path.is_file() and path.suffix not in (".pyc", ".md"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def train(python: Path, script: str, optimizer: str, seed: int) -> Run:
    """Run a script and return the result that it prints.

    Raises:
        RuntimeError: with the end of the output, if the script fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, HERE / script, "--optimizer", optimizer, "--seed", str(seed)]
    before = os.times()
    with tempfile.TemporaryDirectory() as folder:  # some packages write logs to the current folder
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    after = os.times()
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode != 0 or not results:
        raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-20:]))
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return {**json.loads(results[-1].removeprefix("RESULT ")), "cpu_seconds": round(seconds, 1)}


# ---------------------------------------------------------------------------------------------------------------------
# The page


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def select(runs: list[Run], package: Package, optimizer: str) -> list[Run]:
    """The runs of a package by one optimizer, in the order of the seeds."""
    found = [run for run in runs if run["package"] == package.name and run["optimizer"] == optimizer]
    return sorted(found, key=lambda run: run["seed"])


def ratios(runs: list[Run], package: Package, measure: str) -> list[float]:
    """The flagship's loss divided by the default optimizer's, for each seed."""
    pairs = zip(select(runs, package, "default"), select(runs, package, "star"), strict=True)
    return [star[measure] / default[measure] for default, star in pairs]


def table_row(runs: list[Run], package: Package) -> list[str]:
    """The package's cells of the table."""
    default, star = (select(runs, package, optimizer) for optimizer in OPTIMIZERS)

    def mean(seeds: list[Run], measure: str) -> str:
        return f"{statistics.fmean(run[measure] for run in seeds):.4g}"

    def ratio(measure: str) -> str:
        values = ratios(runs, package, measure)
        return f"{geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    return [
        f"{package.name} {default[0]['versions'][package.name]}, {package.model}",
        mean(default, "steps"),
        f"{len(default)}",
        package.default,
        f"{mean(default, 'final')}, {mean(default, 'mean')}",
        f"{mean(star, 'final')}, {mean(star, 'mean')}",
        ratio("final"),
        ratio("mean"),
        f"{package.validation} {mean(default, 'validation')} -> {mean(star, 'validation')}",
    ]


COLUMNS = [
    "package, model",
    "steps",
    "seeds",
    "default optimizer",
    "default: final, mean loss",
    "star: final, mean loss",
    "final ratio",
    "mean ratio",
    "validation, default -> star",
]


def table(runs: list[Run]) -> str:
    """A row per package, and the geometric mean over the packages."""
    rows = [table_row(runs, package) for package in PACKAGES]
    overall = {
        measure: geometric_mean(ratio for package in PACKAGES for ratio in ratios(runs, package, measure))
        for measure in ("final", "mean")
    }
    rows.append(["all, geometric mean", *[""] * 5, f"{overall['final']:.2f}", f"{overall['mean']:.2f}", ""])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [COLUMNS, ["---"] * len(COLUMNS), *rows])


def page(runs: list[Run]) -> str:
    """docs/third_party.md, made from the rows of docs/third_party.json."""
    shared = ("python", "torch", "lightning")
    versions = {", ".join(f"{name} {run['versions'][name]}" for name in shared) for run in runs}
    minutes = sum(run["cpu_seconds"] for run in runs) / 60
    return f"""# Packages built on Lightning

Written by `make third-party`; do not edit. The data is in [third_party.json](third_party.json), one row per run; the
scripts are in [examples/third_party](../examples/third_party).

Each package trains a model of its own, on data that it or the script generates, with the optimizer that its users get
if they choose none, and with the flagship. The latter takes one line,
`callbacks=[LearnedOptimizer.from_pretrained("star")]`, which makes the module's learning rate, its schedule and its
weight decay ineffective. Nothing else differs, and both start from the same weights.

{table(runs)}

Losses are training losses, averaged over the seeds: *final* is the mean over the last 50 steps, *mean* is over the
whole run. A ratio is star / default, so below 1 star reaches the lower loss; it is the geometric mean over the seeds,
with the lowest and the highest in parentheses. Validation is measured on held-out data after training; accuracy should
be high, everything else low.

The default optimizers are not tuned, and a learning rate of 1e-3 is low for runs this short. The table therefore shows
what a user of such a package gets by adding the line, not how star compares with a tuned Adam. Models and data are
small: look at validation, too, because a much lower training loss can mean overfitting.

Data and sizes were chosen while the scripts were written. On the smaller data that was tried first, star overfitted
twice, with a lower training loss than the default's and a worse validation measure: N-HiTS on the one panel of series
that its package ships, and the LSTM on 8 series instead of the present number. Both were then given more data.

Run with {"; ".join(sorted(versions))} on one CPU thread; all runs together took {minutes:.0f} minutes of CPU time.
"""


# ---------------------------------------------------------------------------------------------------------------------
# The command


def write(runs: list[Run]) -> None:
    """Save the rows in the order of the table, one per line."""
    names = [package.name for package in PACKAGES]
    runs.sort(key=lambda run: (names.index(run["package"]), OPTIMIZERS.index(run["optimizer"]), run["seed"]))
    RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")


def update(runs: list[Run]) -> list[str]:
    """Train where a run is missing or out of date, saving each result at once; return the names of failed runs."""
    failed = []
    number = 0
    for package in PACKAGES:
        python = environment_of(package)
        versions = versions_in(python, package)
        for optimizer, seed in itertools.product(OPTIMIZERS, SEEDS):
            number += 1
            name = f"{package.name}, {optimizer}, seed {seed}"
            print(f"[{number:2d}/{NUM_RUNS}] {name}: ", end="", flush=True)
            run = {"package": package.name, "optimizer": optimizer, "seed": seed}
            made_by = {"versions": versions, "code": hash_of_code(package.script, optimizer)}
            before = [kept for kept in runs if run.items() <= kept.items()]
            if any(made_by.items() <= kept.items() for kept in before):
                print("kept")
                continue
            try:
                result = train(python, package.script, optimizer, seed)
            except RuntimeError as error:
                failed.append(name)
                print(f"FAILED\n{error}", flush=True)
                continue
            runs[:] = [kept for kept in runs if kept not in before] + [{**run, **result, **made_by}]
            write(runs)
            print("{steps} steps, final loss {final:.4g}, {cpu_seconds:.0f} s of CPU time".format(**result), flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="train nothing; only write the page from the results")
    arguments = parser.parse_args()
    known = {package.name for package in PACKAGES}
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    runs = [run for run in runs if run["package"] in known]
    failed = [] if arguments.page else update(runs)
    if failed:
        raise SystemExit(f"docs/third_party.md stays as it was, because these runs failed: {'; '.join(failed)}")
    if len(runs) < NUM_RUNS:
        raise SystemExit(f"docs/third_party.json has {len(runs)} of {NUM_RUNS} runs. Run this without --page.")
    PAGE.write_text(page(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
