"""`make third-party` without its packages: the page, what is run again, what fails, and what a script reports."""

import ast
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "third_party"


def load(name):
    spec = importlib.util.spec_from_file_location(f"third_party_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


driver = load("run")
common = load("common")
COMMITTED = json.loads((ROOT / "docs" / "third_party.json").read_text())


def test_the_page_is_made_from_the_results():
    assert (ROOT / "docs" / "third_party.md").read_text() == driver.page(COMMITTED)


def test_the_page_names_the_steps_of_a_final_loss():
    assert f"the mean over the last {common.FINAL} steps" in driver.page(COMMITTED)


@pytest.mark.parametrize("package", driver.PACKAGES, ids=lambda package: package.name)
def test_every_run_has_finite_results(package):
    runs = [run for run in COMMITTED if run["package"] == package.name]
    grid = sorted((run["optimizer"], run["seed"]) for run in runs)
    assert grid == [(optimizer, seed) for optimizer in driver.OPTIMIZERS for seed in driver.SEEDS]
    assert len({run["steps"] for run in runs}) == 1
    assert all(run["steps"] >= 200 for run in runs)
    assert all(math.isfinite(run[measure]) for run in runs for measure in ("final", "mean", "validation"))
    assert {run["versions"][package.name] for run in runs} == {package.version}


def test_every_script_belongs_to_a_package():
    scripts = {path.name for path in FOLDER.glob("*.py")} - {"run.py", "common.py"}
    assert scripts == {package.script for package in driver.PACKAGES}


@pytest.mark.parametrize("package", driver.PACKAGES, ids=lambda package: package.name)
def test_a_script_has_only_the_callbacks_to_tell_the_optimizers_apart(package):
    text = (FOLDER / package.script).read_text()
    (train,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert [argument.arg for argument in train.args.args] == ["callbacks", "seed"]
    assert "main(train, L.Callback)" in text
    assert "lightning_lopt" not in text
    assert len(text.splitlines()) <= 60


def results_of(package, star):
    """Runs whose losses are 1 by the default optimizer and `star[seed]` by the flagship."""
    losses = [("default", seed, 1.0) for seed in driver.SEEDS] + [("star", seed, star[seed]) for seed in driver.SEEDS]
    versions = {"python": "3.11", "torch": "2.13.0", "lightning": "2.6.6", package.name: package.version}
    return [
        {"package": package.name, "optimizer": optimizer, "seed": seed, "steps": 300, "final": loss, "mean": 2 * loss,
         "validation": 3 * loss, "cpu_seconds": 30.0, "versions": versions, "code": "0"}
        for optimizer, seed, loss in losses
    ]  # fmt: skip


def test_a_ratio_is_the_geometric_mean_over_the_seeds_with_their_range():
    first, *others = driver.PACKAGES
    runs = results_of(first, [0.5, 0.125])
    for package in others:
        runs += results_of(package, [1.0, 1.0])
    cells = driver.table_row(runs, first)
    assert cells[4:8] == ["1, 2", "0.3125, 0.625", "0.25 (0.12 to 0.50)", "0.25 (0.12 to 0.50)"]
    assert cells[8].endswith(" 3 -> 0.9375")
    overall = 0.25 ** (1 / len(driver.PACKAGES))
    assert driver.table(runs).splitlines()[-1].endswith(f"| {overall:.2f} | {overall:.2f} |  |")


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The driver on one package whose runs are recorded instead of trained; seed 1 by the flagship may fail."""
    package = driver.PACKAGES[0]
    calls = []

    def train(python, script, optimizer, seed):
        calls.append((optimizer, seed))
        if getattr(train, "fails", None) == (optimizer, seed):
            raise RuntimeError("its last words")
        return {"steps": 300, "final": 1.0, "mean": 2.0, "validation": 3.0, "cpu_seconds": 1.0}

    monkeypatch.setattr(driver, "PACKAGES", [package])
    monkeypatch.setattr(driver, "NUM_RUNS", 4)
    monkeypatch.setattr(driver, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(driver, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(driver, "environment_of", lambda package: Path(sys.executable))
    versions = {"python": "3.11", "torch": "2.13.0", "lightning": "2.6.6", package.name: package.version}
    monkeypatch.setattr(driver, "versions_in", lambda python, package: dict(versions))
    monkeypatch.setattr(driver, "hash_of_code", lambda script, optimizer: f"code of {optimizer}")
    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    train.calls = calls
    train.versions = versions
    return train


EVERY_RUN = [("default", 0), ("default", 1), ("star", 0), ("star", 1)]


def test_a_kept_run_is_repeated_only_for_other_versions_or_code(trained, monkeypatch, capsys):
    driver.main()
    assert trained.calls == EVERY_RUN
    assert driver.PAGE.read_text() == driver.page(json.loads(driver.RESULTS.read_text()))
    assert "[ 4/4] chemprop, star, seed 1: 300 steps" in capsys.readouterr().out
    trained.calls.clear()
    driver.main()
    assert trained.calls == []
    monkeypatch.setattr(driver, "hash_of_code", lambda script, optimizer: f"code of {optimizer.replace('star', 'new')}")
    driver.main()
    assert trained.calls == EVERY_RUN[2:]
    trained.calls.clear()
    trained.versions["torch"] = "2.14.0"
    driver.main()
    assert trained.calls == EVERY_RUN
    assert len(json.loads(driver.RESULTS.read_text())) == 4


def test_a_failed_run_is_shown_and_taken_up_again(trained, capsys):
    trained.fails = ("default", 1)
    with pytest.raises(SystemExit, match="chemprop, default, seed 1"):
        driver.main()
    assert "its last words" in capsys.readouterr().out
    assert not driver.PAGE.exists()
    trained.calls.clear()
    del trained.fails
    driver.main()
    assert trained.calls == [("default", 1)]
    rows = json.loads(driver.RESULTS.read_text())
    assert [(row["optimizer"], row["seed"]) for row in rows] == EVERY_RUN


def test_the_page_needs_every_run(trained, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--page"])
    with pytest.raises(SystemExit, match="0 of 4 runs"):
        driver.main()


def test_the_code_of_the_flagship_concerns_its_runs_alone(monkeypatch, tmp_path):
    rule = tmp_path / "rules" / "rule.py"
    rule.parent.mkdir()
    (tmp_path / "script.py").write_text("pass")
    (tmp_path / "common.py").write_text("pass")
    for name, value in {"HERE": tmp_path, "ROOT": tmp_path, "STAR_CODE": [rule.parent]}.items():
        monkeypatch.setattr(driver, name, value)

    def hashes():
        return [driver.hash_of_code("script.py", optimizer) for optimizer in driver.OPTIMIZERS]

    rule.write_text("step = 1")
    first = hashes()
    rule.write_text("step = 2")
    second = hashes()
    (tmp_path / "script.py").write_text("steps = 400")
    third = hashes()
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False]
    assert [a == b for a, b in zip(second, third, strict=True)] == [False, False]


@pytest.mark.parametrize("path", driver.STAR_CODE, ids=lambda path: path.name)
def test_the_code_of_the_flagship_is_where_the_driver_looks(path):
    assert any(path.iterdir())


def test_a_script_runs_in_an_empty_folder_and_its_last_words_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(driver, "HERE", tmp_path)
    script = tmp_path / "script.py"
    script.write_text("""import os, sys; assert not os.listdir(); print('noise'); print('RESULT {"steps": 3}')""")
    result = driver.train(Path(sys.executable), "script.py", "default", 0)
    assert result["steps"] == 3
    assert result["cpu_seconds"] >= 0
    script.write_text("print('RESULT {}'); raise SystemExit('a loss is not finite')")
    with pytest.raises(RuntimeError, match="a loss is not finite"):
        driver.train(Path(sys.executable), "script.py", "default", 0)
    script.write_text("print('nothing')")
    with pytest.raises(RuntimeError, match="nothing"):
        driver.train(Path(sys.executable), "script.py", "default", 0)


def report(monkeypatch, losses, validation=0.5):
    """Let `common.main` run a model that has these training losses."""

    def train(callbacks, seed):
        for loss in losses:
            callbacks[0].on_train_batch_end(None, None, {"loss": torch.tensor(loss)}, None, 0)
        return validation

    monkeypatch.setattr(sys, "argv", ["script.py", "--optimizer", "default"])
    monkeypatch.setattr(common, "seed_everything", lambda seed, verbose: None)  # it writes to os.environ
    common.main(train, object)


def test_a_script_reports_the_mean_of_the_last_losses_and_of_all(monkeypatch, capsys):
    report(monkeypatch, [5.0] * common.FINAL + [1.0] * common.FINAL)
    printed = capsys.readouterr().out.removeprefix("RESULT ")
    assert json.loads(printed) == {"steps": 2 * common.FINAL, "final": 1.0, "mean": 3.0, "validation": 0.5}


@pytest.mark.parametrize(
    ("losses", "validation", "message"),
    [
        ([], 0.5, "No training loss"),
        ([1.0, math.nan], 0.5, "not finite"),
        ([math.inf, 1.0], 0.5, "not finite"),
        ([1.0], math.nan, "not finite"),
    ],
)
def test_a_script_fails_without_finite_losses(monkeypatch, capsys, losses, validation, message):
    with pytest.raises(SystemExit, match=message):
        report(monkeypatch, losses, validation)
    assert "RESULT" not in capsys.readouterr().out
