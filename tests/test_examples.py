"""The examples run as a user would run them, from an empty folder; recipes reproduce the bundled rules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_lopt as lopt

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {
    "meta_train.py": ["--epochs", "2"],
    "nominal_rules.py": ["--out", "rules"],
    "quickstart.py": ["--epochs", "2", "--seeds", "2"],
}


def run(script: Path, folder: Path) -> str:
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(script), *ARGUMENTS.get(script.name, [])]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_runs_and_is_short(script, tmp_path):
    assert run(script, tmp_path).strip()
    assert len(script.read_text().splitlines()) <= 80


def test_quickstart_draws_both_curves(tmp_path):
    out = run(EXAMPLES / "quickstart.py", tmp_path)
    assert "star, untuned" in out
    assert "AdamW, default lr" in out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_nominal_rule_is_reproduced_bit_by_bit(tmp_path):
    run(EXAMPLES / "nominal_rules.py", tmp_path)
    made, bundled = lopt.load_rule(tmp_path / "rules" / "hyperparam"), lopt.load_rule("hyperparam")
    assert made.config == bundled.config
    for key, tensor in made.state_dict().items():
        assert torch.equal(tensor, bundled.state_dict()[key])


@pytest.mark.skipif("LIGHTNING_LOPT_DATA" not in os.environ, reason="needs MNIST from LIGHTNING_LOPT_DATA")
def test_the_recipe_of_the_robust_lstm_runs(tmp_path):
    recipe = EXAMPLES / "recipes" / "lstm_dmd_robust.py"
    ARGUMENTS[recipe.name] = ["--out", "robust", "--steps", "4", "--length", "2", "--validation", "20"]
    ARGUMENTS[recipe.name] += ["--tasks", "mnist-dmd"]
    assert "chosen: after" in run(recipe, tmp_path)
    made, bundled = lopt.load_rule(tmp_path / "robust" / "rule"), lopt.load_rule("lstm-dmd-robust")
    assert made.config == bundled.config


def test_the_recipe_of_star_runs_and_is_taken_up_again(tmp_path):
    recipe = EXAMPLES / "recipes" / "star_scheduler.py"
    ARGUMENTS[recipe.name] = ["--out", "star", "--points", "14", "12", "--tasks", "wine-mlp", "--shorter", "10"]
    first = run(recipe, tmp_path)
    made = lopt.load_rule(tmp_path / "star" / "rule")
    star = lopt.load_rule("star").config
    assert (made.kind, made.config.eps) == ("scheduled", star.eps)
    assert made.config.nominal_stepsize == star.nominal_stepsize
    assert 0.4 <= made.config.peak <= 1.4
    assert made.state_dict()["schedule_fraction"].abs().sum() > 0
    assert "wine-mlp" in first
    (tmp_path / "star" / "10-0.json").unlink()
    again = run(recipe, tmp_path)
    assert again.count("wine-mlp") == 1
    for key, tensor in lopt.load_rule(tmp_path / "star" / "rule").state_dict().items():
        torch.testing.assert_close(tensor, made.state_dict()[key])
