"""The configurations of normalized histories and Multiscale Adam run, on a small task in place of their own."""

from pathlib import Path

import pytest
from lightning_cases import KNOWN_WARNINGS

import lightning_lopt as lopt
from lightning_lopt.cli import main

pytestmark = KNOWN_WARNINGS

FOLDER = Path(__file__).parents[2] / "examples" / "configs" / "history"
KINDS = {
    "k_momentums": "k_momentums",
    "k_timesteps": "k_timesteps",
    "multiscale_adam": "multiscale_adam",
    "multiscale_adam_linear": "multiscale_adam",
    "multiscale_adam_unrolled": "multiscale_adam",
}


def test_there_is_a_kind_for_every_configuration():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_the_configurations_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--model.tasks=[breast-cancer-logreg]", "--model.validation_tasks=[breast-cancer-logreg]"]
    small += ["--model.validation_horizon=2", "--model.validation_seeds=1", "--model.steps_per_epoch=1"]
    small += ["--model.estimator.num_runs=1", "--trainer.max_steps=1"]
    if name == "multiscale_adam_unrolled":  # from the rule that another one leaves
        small += ["--model.rule=multiscale-adam", "--model.tasks_per_step=1", "--model.estimator.truncation=2"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    assert main(["meta-train", "fit", "--config", str(FOLDER / f"{name}.yaml"), *small, *quiet]) == 0
    assert lopt.load_rule(tmp_path / "runs" / name / "rule").kind == KINDS[name]
