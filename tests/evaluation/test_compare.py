"""Comparing rules with tuned baselines: common random numbers, arithmetic, the cache, files, the command."""

import argparse
import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import lightning_lopt as lopt
from lightning_lopt import tasks
from lightning_lopt.evaluation import (
    HELDOUT,
    SUITES,
    Case,
    Entry,
    Options,
    Results,
    Runs,
    cli,
    compare,
    evaluate,
    fingerprint,
    report,
)
from lightning_lopt.evaluation import runs as runs_module
from lightning_lopt.evaluation.cache import Cache
from lightning_lopt.evaluation.results import DEFAULT_ADAM
from lightning_lopt.evaluation.rivals import RIVALS
from lightning_lopt.evaluation.tuning import BASELINES, SELECTED_BY, Trial
from lightning_lopt.rules import UpdateRule

SMALL = Case("synthetic-mlp", 12)


@pytest.fixture
def options(tmp_path):
    return Options(seeds=2, samples=3, cache_dir=tmp_path / "cache")


def settings(name, *rates):
    """The baseline's rule, and its meta-parameters at several learning rates."""
    made = [BASELINES[name].make(lr=rate) for rate in rates]
    return made[0], [rule.meta_params() for rule in made]


class Empty(NamedTuple):
    """No state."""


class Probe(UpdateRule):
    """Moves by the run's length if it is known, else not at all."""

    def init_state(self, param):
        return Empty()

    def update(self, meta_params, grad, state, param, context):
        return torch.zeros_like(param) + (context.num_steps if context.num_steps is not None else 0.0), state


# --- Runs ---


def test_a_run_is_torchs_training_loop():
    """Outside truth: the same starts and batches, trained with torch.optim member by member."""
    task, steps, seeds = tasks.make("synthetic-mlp"), 15, 3
    rule, meta_params = settings("adam", 3e-3, 3e-2)
    found = runs_module.run(rule, meta_params, task, steps=steps, seeds=seeds)
    generator = torch.Generator().manual_seed(runs_module.SEED)
    start = task.init(generator, seeds)
    batches = [task.batch(generator, start.constants, seeds) for _ in range(steps)]
    for rate, runs in zip((3e-3, 3e-2), found, strict=True):
        for member in range(seeds):
            params = {name: torch.nn.Parameter(value[member].clone()) for name, value in start.params.items()}
            optimizer, losses = torch.optim.Adam(params.values(), lr=rate), []
            for batch in batches:
                loss = task.loss(params, batch._replace(x=batch.x[member], y=batch.y[member]))
                losses.append(loss.item())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            assert runs.initial[member] == pytest.approx(losses[0], rel=1e-5)
            assert runs.mean[member] == pytest.approx(sum(losses) / steps, rel=1e-4)
            assert runs.curve[member] == pytest.approx(losses, rel=1e-3)
            test_loss = task.loss(params, task.eval_batch("test", {})).item()
            assert runs.test_loss[member] == pytest.approx(test_loss, rel=1e-3)


def test_all_optimizers_and_chunks_get_the_same_starts_and_batches():
    """At a learning rate of 0, losses differ only by the batches."""
    task = tasks.make("synthetic-mlp")
    curves = []
    for name in ("adam", "sgdm", "nadamw"):
        for rates in ([0.0], [0.0, 1e-2, 0.0]):
            found = runs_module.run(*settings(name, *rates), task, steps=10, seeds=2)
            curves += [runs.curve for runs, rate in zip(found, rates, strict=True) if rate == 0]
    assert len(curves) == 9
    for curve in curves[1:]:
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(curves[0]), rtol=1e-5, atol=1e-6)
    assert len({round(loss, 4) for seed in curves[0] for loss in seed}) == 20  # and they differ by seed and step
    assert runs_module.initial_losses(task, 2) == pytest.approx([seed[0] for seed in curves[0]], rel=1e-5)


def test_windows_of_a_run():
    losses = torch.arange(2000.0, 0.0, -1.0, dtype=torch.float64).repeat(2, 1).T
    verdicts = [runs_module.Verdict(0.5, {"accuracy": 0.9}, [], math.nan)] * 2
    runs = runs_module.summarize(losses, verdicts)
    assert (runs.initial[0], runs.mean[0]) == (2000, 1000.5)
    assert runs.final[0] == 50.5  # the last 5 %
    assert runs.tail[0] == 100.5  # the last tenth
    assert (len(runs.curve), len(runs.curve[0]), runs.curve[0][0]) == (2, 100, 1990.5)
    short = runs_module.summarize(losses[:30], verdicts)
    assert short.final == short.tail == short.mean  # less than 50 steps
    assert len(short.curve[0]) == 30


def test_the_rule_is_told_the_length_unless_it_is_hidden():
    task = tasks.make("synthetic-mlp")
    told, hidden = (
        runs_module.run(Probe(), [{}], task, steps=3, seeds=2, tell_length=flag)[0] for flag in (True, False)
    )
    assert hidden.final == pytest.approx(hidden.initial, rel=0.2)
    assert told.final != pytest.approx(told.initial, rel=0.2)


# --- Arithmetic ---


def made(final, mean=None, initial=2.0):
    """Runs with these final losses."""
    ones = [1.0] * len(final)
    losses = {"final": final, "tail": final, "mean": mean or final}
    return Runs(100, [initial] * len(final), **losses, test_loss=ones, accuracy=ones, curve=[[1.0]] * len(final))


def entry(case, name, final, mean=None, seconds=1.0, initial=2.0):
    trial = Trial({}, made(final, initial=initial))
    by = {**dict.fromkeys(SELECTED_BY, trial), "mean": Trial({}, made(mean or final, initial=initial))}
    return Entry(Case(case, 100), name, name, by, 1, seconds)


def test_diverged_and_clamped_losses():
    runs = made([4.1, 4.0, 1e-9, math.nan, math.inf, 0.5])
    assert runs.diverged == [True, False, False, True, True, False]
    assert runs.clamped("final") == [4.0, 4.0, 0.002, 4.0, 4.0, 0.5]
    assert runs.tuning_loss("tail") == math.inf
    assert made([1.0, 3.0]).tuning_loss("tail") == 2.0
    assert made([1.0], mean=[math.nan]).diverged == [True]


def test_ratios_and_their_summary_by_hand():
    results = Results(
        2,
        [
            entry("a", "adam", [0.1, 0.3], [0.5, 0.5]),
            entry("a", "adamw", [0.2, 0.4], [0.2, 0.2]),
            entry("a", DEFAULT_ADAM, [0.4, 0.4], seconds=2.0),
            entry("a", "rule", [0.2, 0.2], seconds=6.0),
            entry("b", "adam", [1e-5, 1e-7]),  # both below a thousandth of 2
            entry("b", "adamw", [1e-9, 1e-9]),
            entry("b", DEFAULT_ADAM, [0.008, 0.008], seconds=1.0),
            entry("b", "rule", [math.nan, 0.002], seconds=3.0),
        ],
    )
    a, b = results.cases
    assert results.references == ["adam", "best", DEFAULT_ADAM]
    assert results.ratio(a, "rule", "adam", "final").value == pytest.approx(1.0)
    spread = abs(math.log(2.0) - math.log(2 / 3)) / 2  # of two numbers, over the root of two
    assert results.ratio(a, "rule", "adam", "final").spread == pytest.approx(spread)
    assert results.reference(a, "best", "final").optimizer == "adam"
    assert results.reference(a, "best", "mean").optimizer == "adamw"
    assert results.ratio(a, "rule", "best", "mean").value == pytest.approx(1.0)
    assert results.ratio(b, "adam", "adamw", "final").value == pytest.approx(1.0)  # both at the floor
    assert results.ratio(b, "rule", "adam", "final").value == pytest.approx((4.0 + 0.002) / 0.004)
    summary = {row.optimizer: row for row in results.summary()}
    assert summary["rule"].ratios["final", "adam"].value == pytest.approx(math.sqrt(1.0 * 4.002 / 0.004))
    assert summary["rule"].ratios["final", DEFAULT_ADAM].value == pytest.approx(math.sqrt(0.5 * 4.002 / 0.016))
    not_worse = {measure: summary["rule"].not_worse[measure] for measure in ("final", "mean", "test")}
    assert (not_worse, summary["rule"].diverged) == ({"final": 1, "mean": 1, "test": 2}, 1)
    assert (summary["rule"].num_cases, summary["rule"].num_runs) == (2, 4)
    assert summary["rule"].step_time == pytest.approx(3.0)
    assert summary["adam"].ratios["test", "adam"] == (pytest.approx(1.0), pytest.approx(0.0))
    of_tasks = [results.ratio(case, "rule", "adam", "final").spread for case in (a, b)]
    assert summary["rule"].ratios["final", "adam"].spread == pytest.approx(math.hypot(*of_tasks) / 2)
    assert summary["adam"].ratios["final", "best"].value == pytest.approx(1.0)
    assert summary["adamw"].ratios["final", "best"].value == pytest.approx(math.sqrt(1.5))


def test_a_table_with_losses_that_are_not_finite(tmp_path):
    results = Results(2, [entry("a", DEFAULT_ADAM, [0.4, 0.5]), entry("a", "rule", [math.nan, 0.3])])
    report.write(results, tmp_path)
    with (tmp_path / "table.csv").open(newline="") as stream:
        row = list(csv.DictReader(stream))[1]
    assert (row["final_loss"], row["final_loss_std"], row["diverged_runs"]) == ("", "", "1")


@pytest.mark.parametrize(("loss", "count"), [(0.408, 1), (0.4081, 0)])
def test_at_most_two_percent_above_the_default(loss, count):
    results = Results(1, [entry("a", DEFAULT_ADAM, [0.4]), entry("a", "rule", [loss])])
    assert results.summary()[1].not_worse["final"] == count
    assert results.references == [DEFAULT_ADAM]


# --- Evaluation and cache ---


@pytest.fixture
def populations(monkeypatch):
    """Records the number of settings of each population that is run."""
    sizes, original = [], runs_module.run

    def counted(rule, meta_params, *rest, **options):
        sizes.append(len(meta_params))
        return original(rule, meta_params, *rest, **options)

    monkeypatch.setattr(compare, "run", counted)
    return sizes


def test_cached_results_are_not_run_again_and_are_equal(options, populations):
    first = evaluate("star", [SMALL], ["adam"], options=options)
    assert [e.optimizer for e in first.entries] == ["adam", DEFAULT_ADAM, "star", "hyperparam"]
    assert sum(populations) == first.entry(SMALL, "adam").num_settings + 2  # the default is one of the grid
    populations.clear()
    again = evaluate("star", [SMALL], ["adam"], options=options)
    assert again == first
    assert populations == []
    longer = evaluate("star", [Case(SMALL.task, 13)], [], options=options)
    assert populations == [1, 1, 1]
    assert longer != first


def test_chunks_do_not_change_the_numbers(options):
    whole = evaluate("star", [SMALL], ["adam"], options=options)
    some = dataclasses.replace(options, max_population=4, cache_dir=None)
    for a, b in zip(whole.entries, evaluate("star", [SMALL], ["adam"], options=some).entries, strict=True):
        assert a.best["final"].hyperparameters == b.best["final"].hyperparameters
        assert a.loss("final") == pytest.approx(b.loss("final"), rel=1e-4)


def test_an_interrupted_evaluation_resumes(options, populations):
    options = dataclasses.replace(options, max_population=4)
    done = []

    def interrupt(text, step, total):
        done.append(step == total)
        if sum(done) == 3 and not done[-1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate("star", [SMALL], ["adam"], options=options, progress=interrupt)
    assert populations == [2, 2, 2, 2]  # the fourth was cut short
    populations.clear()
    resumed = evaluate("star", [SMALL], ["adam"], options=options)
    assert sum(populations) == resumed.entry(SMALL, "adam").num_settings + 2 - 6
    fresh = evaluate("star", [SMALL], ["adam"], options=dataclasses.replace(options, cache_dir=None))
    assert [e.best for e in fresh.entries] == [e.best for e in resumed.entries]


def test_a_damaged_file_or_another_start_is_run_again(options, populations, monkeypatch):
    evaluate("star", [SMALL], [], options=options)
    for path in Path(options.cache_dir).rglob("*.json"):
        path.write_text(path.read_text()[:-20])
    populations.clear()
    evaluate("star", [SMALL], [], options=options)
    assert populations == [1, 1, 1]
    monkeypatch.setattr(compare, "initial_losses", lambda task, seeds: [9.0] * seeds)
    evaluate("star", [SMALL], [], options=options)
    assert populations == [1] * 6


def test_a_cache_file_is_complete_or_absent(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    cache.put("a/b", {"x": 1}, {"loss": [1.0, math.nan, math.inf]})
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]
    assert "NaN" not in next(tmp_path.rglob("*.json")).read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        cache.put("a/b", {"x": 2}, {"loss": [1.0]})
    assert len(list(tmp_path.rglob("*.*"))) == 1
    assert cache.get("a/b", {"x": 2}) is None


def test_a_fingerprint_depends_on_weights_settings_and_code(monkeypatch):
    rule = lopt.load_rule("star")
    mark = fingerprint(rule)
    assert mark == fingerprint(lopt.load_rule("star"))
    assert mark != fingerprint(lopt.load_rule("hyperparam"))
    with torch.no_grad():
        rule.growth[0] += 1e-3
    assert mark != fingerprint(rule)
    original, rule = lopt.rules.Scheduled.update, lopt.load_rule("star")

    def changed(self, *arguments):
        delta, state = original(self, *arguments)
        return 1.05 * delta, state

    monkeypatch.setattr(lopt.rules.Scheduled, "update", changed)
    assert mark != fingerprint(rule)


def test_rules_of_all_kinds_of_names_and_precisions(options, tmp_path):
    saved = lopt.save_rule(lopt.load_rule("star").double(), tmp_path / "mine")
    results = evaluate([saved, "star", "hyperparam"], [SMALL], [], options=options)
    assert results.optimizers == [DEFAULT_ADAM, str(saved), "star", "hyperparam"]
    assert results.entry(SMALL, str(saved)).best == results.entry(SMALL, "star").best
    assert next(e.num_settings for e in evaluate("star", [SMALL], ["nadamw"], options=options).entries) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("star", [("no-such-task", 5)]), "Unknown task 'no-such-task'"),
        (("no-such-rule", [SMALL]), "Unknown rule 'no-such-rule'"),
        (("star", [SMALL], ["lion"]), "baseline='lion' is not allowed"),
        (("star", [("synthetic-mlp", 0)]), "steps=0 is not allowed"),
        (("star", []), "cases is empty"),
        ((["star", "star"], [SMALL]), "'star' is used twice"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(*arguments)
    assert "\n" not in str(caught.value)


def test_missing_data_are_reported_before_anything_runs(monkeypatch, options, populations):
    monkeypatch.delenv("LIGHTNING_LOPT_DATA", raising=False)
    monkeypatch.setattr(tasks.datasets, "is_available", lambda name: name == "synthetic")
    monkeypatch.setattr(tasks.datasets, "load", lambda name: (_ for _ in ()).throw(FileNotFoundError(name)))
    with pytest.raises(FileNotFoundError, match="cifar10"):
        evaluate("star", [SMALL, ("cifar16-vit", 10)], options=options)
    assert populations == []


def test_the_heldout_suite_is_in_the_catalog():
    assert len(HELDOUT) >= 12
    assert set(HELDOUT) - set(SUITES["unseen"]) == {Case("digits-mlp", 20_000)}
    assert len(set(HELDOUT)) == len(HELDOUT)
    assert {case.task for case in HELDOUT} <= set(tasks.list_tasks())
    assert max(case.steps for case in HELDOUT) == 20_000


# --- Files and the command ---


def parse(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(words)


def test_the_command_writes_tables_and_plots(tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    words = ["--rule", "star", "--baseline", "adam", "--task", "synthetic-mlp", "digits-mlp", "--steps", "12"]
    cli.run(parse(*words, "--seeds", "2", "--out", str(out), "--cache", str(tmp_path / "cache")))
    names = ["curves.csv", "curves.png", "ratios.png", "summary.csv", "table.csv", "validation.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    with (out / "table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["optimizer"] for row in rows] == 2 * ["adam", DEFAULT_ADAM, "star", "hyperparam"]
    star = rows[2]
    assert float(star["final_vs_adam"]) == pytest.approx(
        float(star["final_loss"]) / float(rows[0]["final_loss"]), rel=1e-3
    )
    assert 0.0 <= float(star["test_accuracy"]) <= 1.0
    assert json.loads(rows[0]["setting_for_final"])["lr"] > 0
    with (out / "summary.csv").open(newline="") as stream:
        summary = {row["optimizer"]: row for row in csv.DictReader(stream)}
    assert float(summary["adam"]["mean_vs_adam"]) == 1.0
    assert summary["star"]["runs"] == "4"
    with (out / "curves.csv").open(newline="") as stream:
        curves = [row for row in csv.DictReader(stream) if row["optimizer"] == "star"]
    assert {(row["task"], row["seed"], row["split"]) for row in curves} == {
        (task, seed, split)
        for task in ("synthetic-mlp", "digits-mlp")
        for seed in "01"
        for split in ("training", "validation")
    }
    for name in ("curves.png", "ratios.png", "validation.png"):
        data = (out / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 20_000
    printed = capsys.readouterr().out
    assert "geometric mean" in printed
    assert "12 adam" in printed or "synthetic-mlp@12 adam" in printed  # progress, line by line


def test_one_seed_one_task_and_no_tuned_adam(tmp_path):
    """The smallest table: no spread, ratios to Adam's default."""
    words = ["--rule", "star", "hyperparam", "--baseline", "nadamw", "--samples", "2", "--task", "synthetic-mlp"]
    cli.run(parse(*words, "--steps", "5", "--seeds", "1", "--out", str(tmp_path), "--cache", str(tmp_path / "c")))
    header, *rows = (tmp_path / "table.csv").read_text().splitlines()
    assert "final_vs_adam," not in header
    assert "final_vs_adam-1e-3" in header
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "star", "--task", "nope"], "Unknown task 'nope'"),
        (["--rule", "nope", "--task", "digits-mlp"], "Unknown rule 'nope'"),
        (["--rule", "star", "--task", "digits-mlp", "--baseline", "lion"], "baseline='lion' is not allowed"),
        (["--rule", "star", "--task", "digits-mlp", "--seeds", "0"], "seeds=0 is not allowed"),
        (["--rule", "star", "--task", "digits-mlp", "--steps", "-3"], "steps=-3 is not allowed"),
        (["--rule", "star", "--suite", "nope"], "--suite='nope' is not allowed"),
        (["--rule", "star", "--suite", "heldout", "--steps", "10"], "--steps is not allowed with --suite"),
        (["--rule", "star", "--task", "digits-mlp", "--out", __file__], "is a file; name a directory"),
    ],
)
def test_bad_arguments_are_one_line_errors(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        cli.run(parse(*words))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_suite_skips_tasks_whose_data_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cli.SUITES, "real", (Case("cifar16-vit", 3), Case("synthetic-mlp", 3, one_by_one=True)))
    words = ["--rule", "star", "--suite", "real", "--no-nominal", "--seeds", "1"]
    assert cli._baselines(parse(*words)) == list(RIVALS)  # the suite's own
    available = tasks.datasets.is_available
    monkeypatch.setattr(tasks.datasets, "is_available", lambda name: name != "cifar10" and available(name))
    load = tasks.datasets.load
    monkeypatch.setattr(tasks.datasets, "load", lambda name: load(name) if name != "cifar10" else missing())
    words += ["--baseline", "adamw-recipe", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    cli.run(parse(*words))
    assert "skipped cifar16-vit@3: put cifar10 there" in capsys.readouterr().out
    with (tmp_path / "out" / "table.csv").open(newline="") as stream:
        assert [row["optimizer"] for row in csv.DictReader(stream)] == ["adamw-recipe", DEFAULT_ADAM, "star"]


def missing():
    raise FileNotFoundError("put cifar10 there")


@pytest.mark.parametrize("words", [["--rule", "star"], ["--task", "digits-mlp"]])
def test_missing_arguments_are_bad_usage(words):
    with pytest.raises(ValueError, match="Name rules by --rule, and tasks by --task or --suite"):
        cli.run(parse(*words))


def test_a_task_and_a_suite_are_bad_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--rule", "a", "--task", "b", "--suite", "c")
    assert caught.value.code == 2


def test_a_missing_library_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rich" else object())
    with pytest.raises(ModuleNotFoundError, match="Reports need rich"):
        cli.run(parse("--rule", "star", "--task", "synthetic-mlp"))


def test_files_are_written_before_anything_is_printed(tmp_path, monkeypatch):
    """Output that is piped to `head` ends the command at a print."""
    monkeypatch.setattr(cli.report, "tables", lambda results: (_ for _ in ()).throw(BrokenPipeError))
    words = ["--rule", "hyperparam", "--baseline", "nadamw", "--samples", "1", "--task", "synthetic-mlp"]
    with pytest.raises(BrokenPipeError):
        cli.run(parse(*words, "--steps", "2", "--seeds", "1", "--out", str(tmp_path / "out"), "--cache", str(tmp_path)))
    assert (tmp_path / "out" / "table.csv").exists()
