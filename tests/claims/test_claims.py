"""Claims: verdicts, cached results, files, the command, claims from a path, and all bundled claims are well-formed."""

import csv
import json
import math
import re
import shlex
import sys
import time
import types

import numpy
import pytest
import torch
from matplotlib.figure import Figure

from lightning_lopt import cli, rules, tasks
from lightning_lopt.claims import (
    Check,
    Claim,
    Experiment,
    Measurement,
    at_least,
    at_most,
    below,
    coverage,
    each_at_most,
    find,
    find_all,
    near,
    registry,
    report,
    training,
    verdict,
    wins,
)
from lightning_lopt.claims import cli as claims_cli
from lightning_lopt.claims.training import meta_train
from lightning_lopt.meta.estimators import PES
from lightning_lopt.meta.schedules import Horizon

# --- Verdicts ---


@pytest.mark.parametrize(
    ("check", "numbers", "holds"),
    [
        (below("a", "b"), {"a": [1.0, 1.1, 0.9], "b": [2.0, 2.1, 2.2]}, True),
        (below("a", "b"), {"a": [1.0, 1.1, 9.0], "b": [2.0, 2.1, 2.2]}, False),  # one bad seed: within the noise
        (
            below("a", "b"),
            {"a": [1.0, 5.0], "b": [1.1, 5.1]},
            True,
        ),  # paired: the seeds differ, the difference does not
        (below("a", "b", paired=False), {"a": [1.0, 5.0], "b": [1.1, 5.1]}, False),
        (below("a", "b"), {"a": [1.0, 1.0], "b": [1.0, 1.0]}, False),  # a tie is not below
        (below("a", "b"), {"a": [1.0], "b": [2.0]}, False),  # one seed proves nothing
        (below("a", "b", exact=True), {"a": [1.0], "b": [2.0]}, True),
        (below("a", "b"), {"a": [1.0, 1.2], "b": [2.0]}, True),
        (below("a", "b", factor=0.5), {"a": [0.9, 1.0], "b": [2.0, 2.2]}, True),
        (below("a", "b", factor=0.4), {"a": [0.9, 1.0], "b": [2.0, 2.2]}, False),
        (at_most("a", 3), {"a": [2.8, 2.9]}, True),
        (at_most("a", 3), {"a": [2.5, 3.4]}, False),  # the mean is below, not by its noise
        (at_most("a", 3), {"a": [3.0, 3.0]}, True),
        (at_most("a", 3, exact=True), {"a": [3.0]}, True),
        (at_most("a", 3, exact=True), {"a": [3.1]}, False),
        (at_least("a", 3, exact=True), {"a": [2.9]}, False),
        (at_least("a", 3), {"a": [3.1, 3.2]}, True),
        (at_least("a", 3), {"a": [2.9, 3.9]}, False),
        (each_at_most("a", 1), {"a": [0.1, 0.2, 1.0]}, True),
        (each_at_most("a", 1), {"a": [0.1, 0.2, 1.1]}, False),  # where the median would pass
        (near("a", 0.45, rtol=0.1), {"a": [0.46, 0.47]}, True),
        (near("a", 0.45, rtol=0.1), {"a": [0.40, 0.41]}, False),
        (near("a", 0.45, rtol=0.1), {"a": [0.41, 0.49]}, False),  # the noise is as large as the tolerance
        (near("a", -2.0, atol=0.5, exact=True), {"a": [-2.5]}, True),
        (at_least("a", 0), {"a": [1.0, math.nan, 1.0]}, False),  # never holds with a NaN
        (Check("", ("a", "b"), lambda a, b: len(a) > len(b)), {"a": [1, 2], "b": [1]}, True),
    ],
)
def test_checks(check, numbers, holds):
    assert check(numbers) is holds


def test_the_margin_is_twice_the_standard_error():
    """Outside truth: numpy's standard errors, of the differences where seeds are shared, else of independent means."""
    a, b = [1.0, 2.0, 4.0], [2.5, 2.0, 7.0]
    paired = below("a", "b").assess({"a": a, "b": b})
    difference = numpy.subtract(b, a)
    assert paired.margin == pytest.approx(2 * difference.std(ddof=1) / 3**0.5)
    assert (paired.value, paired.bound) == (pytest.approx(numpy.mean(a)), pytest.approx(numpy.mean(b)))
    assert paired.spread == pytest.approx(numpy.std(a, ddof=1))
    alone = below("a", "b", paired=False).assess({"a": a, "b": b})
    assert alone.margin == pytest.approx(2 * (numpy.var(a, ddof=1) / 3 + numpy.var(b, ddof=1) / 3) ** 0.5)
    assert at_most("a", 3).assess({"a": a}).margin == pytest.approx(2 * numpy.std(a, ddof=1) / 3**0.5)
    assert math.isnan(below("a", "b").assess({"a": [1.0], "b": [2.0]}).margin)


def test_wins_are_counted_beyond_the_noise():
    pairs = [("a1", "b1"), ("a2", "b2")]
    clear = {"a1": [1.0, 1.1], "b1": [2.0, 2.1]}
    noisy = {"a2": [1.0, 3.0], "b2": [3.0, 1.5]}
    lost = {"a2": [3.0, 3.1], "b2": [2.0, 2.1]}
    won = {"a2": [1.0, 1.1], "b2": [2.0, 2.1]}
    assert [wins("", pairs, least=1.0)({**clear, **other}) for other in (won, noisy, lost)] == [True, False, False]
    assert [wins("", pairs, least=0.2, most=0.8)({**clear, **other}) for other in (won, noisy, lost)] == [
        False,
        True,
        True,
    ]


def test_a_finding_counts_only_with_its_positive_control():
    control = at_most("trained", 0.5, exact=True, kind="control")
    check = at_least("loss", 1.0, exact=True, controls=(control,))
    assert check({"loss": [2.0], "trained": [0.4]})
    assert not check({"loss": [2.0], "trained": [0.6]})
    claim = made(checks=(check, at_least("loss", 0.5, exact=True, controls=(control,))))
    assert [row.text for row in claim.all_checks()] == ["loss >= 1", "trained <= 0.5", "loss >= 0.5"]


def test_a_check_of_a_missing_quantity_is_an_error():
    for numbers in ({"b": [1.0]}, {"a": [], "b": [1.0]}):
        with pytest.raises(ValueError, match=r"needs 'a'; its claim measured \['"):
            below("a", "b")(numbers)


def test_verdict_and_claims_without_checks():
    assert [verdict(held) for held in ([True], [True, False], [False, False], [])] == [
        "reproduced",
        "partly",
        "not reproduced",
        "no paper's claim",
    ]
    with pytest.raises(ValueError, match="has no checks"):
        made("empty", checks=())


# --- The experiment ---


def test_results_are_computed_once_and_come_back_alike(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"losses": [1 / 3, math.inf], "name": "x"}

    told = []
    first = Experiment(cache_dir=tmp_path, progress=lambda *what: told.append((what, len(calls))))
    found = first.cached("p", {"seed": 0}, compute)
    assert found["losses"][0] == 0.333333
    assert math.isnan(found["losses"][1])
    assert told == [(("p", 0, 1), 0)]  # before it is computed
    again = Experiment(cache_dir=tmp_path)
    assert again.cached("p", {"seed": 0}, compute)["losses"][0] == 0.333333
    assert len(calls) == 1
    assert first.saved_seconds == 0
    assert again.saved_seconds > 0  # what it took the first time
    again.cached("p", {"seed": 1}, compute)
    again.cached("q", {"seed": 0}, compute)
    assert len(calls) == 3


def test_meta_training_is_cached(tmp_path, monkeypatch):
    rule, task = rules.make("hyperparam"), tasks.make("synthetic-mlp", hidden=(4,), batch_size=8)
    options = {"num_steps": 4, "every": 2, "seed": 1, "objective": "raw", "lr": 1e-2}
    estimator, told = PES(num_pairs=1, truncation=3, horizon=Horizon(5)), []

    def train(**changes):
        experiment = Experiment(quick=True, cache_dir=tmp_path, progress=lambda *what: told.append(what))
        return meta_train(experiment, "some rule", rule, [task], estimator, **{**options, **changes})

    first = train()
    assert first.steps == [0, 2, 4]
    assert told[-1] == ("some rule", 4, 4)
    moved = [row["w0"] - first.meta_params[0]["w0"] for row in first.meta_params]
    assert [bool(difference.any()) for difference in moved] == [False, True, True]
    train(seed=2)  # overwrites the rule's weights
    monkeypatch.setattr(training.L.Trainer, "fit", lambda *_: pytest.fail("it should be cached"))
    again = train()
    for row, same in zip(first.meta_params, again.meta_params, strict=True):
        assert all(torch.equal(row[name], same[name]) for name in row)
    with pytest.raises(pytest.fail.Exception):
        train(lr=2e-2)


# --- The command ---


def made(name="toy", *, checks=None, values=(1.0, 2.0), **options):
    """A claim that takes no time to measure."""

    def measure(experiment):
        rows = [
            experiment.cached(name, {"seed": seed}, lambda seed=seed: {"v": values[seed]}) for seed in experiment.seeds
        ]
        experiment.progress("measuring", 1, 1)
        return Measurement(
            {"loss": [row["v"] for row in rows], "scale": [float(experiment.pick(10, 1))]}, {"curve": [1.0]}
        )

    default = (each_at_most("loss", 2), at_least("scale", 5, exact=True, published="ten | more"))
    checks = default if checks is None else checks
    options = {"minutes": 1, "quick_minutes": 0.1, "seeds": 2, "quick_seeds": 1, **options}
    return Claim(name, "Some paper, figure 1", "It works.", "Smaller.", measure, checks, **options)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_LOPT_DATA", raising=False)
    return tmp_path


@pytest.fixture
def toys(monkeypatch):
    """A registry with these claims only."""
    claims = {claim.id: claim for claim in (made("toy"), made("toy-text", needs=("tinyshakespeare",)))}
    for module in (registry, claims_cli):
        monkeypatch.setattr(module, "find_all", lambda: dict(claims))
    return claims


def run(*arguments):
    try:
        return cli.main(["reproduce", *(str(argument) for argument in arguments)])
    except SystemExit as stop:
        return stop.code


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_reproduce_writes_the_verdict_everywhere(capsys, folder, toys):
    assert run("toy", "--out", "out") == 0
    assert "reproduced, 2 of 2 checks" in capsys.readouterr().out
    found = json.loads((folder / "out" / "toy.json").read_text())
    assert (found["scale"], found["seeds"], found["numbers"]["loss"]) == ("full", 2, [1.0, 2.0])
    assert found["data"] == {"curve": [1.0]}
    assert (folder / "out" / "toy.png").read_bytes().startswith(b"\x89PNG")
    first, second = rows_of(folder / "out" / "checks.csv")
    assert (first["claim"], first["check"], first["holds"]) == ("toy", "loss <= 2 with every seed", "True")
    assert [second[name] for name in ("value", "bound", "margin", "n", "seeds")] == ["10", "5", "0", "1", "2"]
    page = (folder / "out.md").read_text()
    assert "**reproduced, 2 of 2 checks**" in page
    assert "| scale >= 5 | ten \\| more | 10 | 5 | 0 | 1 | yes |" in page
    assert "lopt reproduce toy --out reproduction" in page
    assert "![toy](out/toy.png)" in page


def test_the_cost_counts_what_was_measured_now_and_what_was_cached(folder, monkeypatch):
    def work(seconds):
        start = time.process_time()
        while time.process_time() - start < seconds:
            pass
        return {}

    def measure(experiment):
        work(0.05)
        experiment.cached("work", {}, lambda: work(0.05))
        return Measurement({"loss": [1.0]})

    claim = Claim("busy", "S", "s", "s", measure, (at_least("loss", 0.0),), 1, 1)
    monkeypatch.setattr(registry, "find_all", lambda: {"busy": claim})
    monkeypatch.setattr(claims_cli, "find_all", lambda: {"busy": claim})
    for _ in range(2):  # the second time from the cache
        assert run("busy", "--fresh") == 0
        minutes = json.loads((folder / "reproduction" / "busy.json").read_text())["cpu_minutes"]
        assert 0.1 <= 60 * minutes < 1


def test_the_quick_scale_and_failed_checks_are_shown(capsys, folder, toys):
    assert run("toy", "--quick") == 0
    page = (folder / "reproduction.md").read_text()
    assert "**partly, 1 of 2 checks, at the quick scale**" in page
    assert "| scale >= 5 | ten \\| more | 1 | 5 | 0 | 1 | **no** |" in page
    assert "lopt reproduce toy --quick --out" in page
    assert "1 of 2 checks, at the quick scale" in re.sub(r"[│\s]+", " ", capsys.readouterr().out)


def test_claims_without_their_data_are_reported_as_not_run(capsys, folder, toys, monkeypatch):
    monkeypatch.setattr(claims_cli.datasets, "is_available", lambda name: False)
    assert run("--all", "--out", "out") == 0
    assert "toy-text: not run. Data set 'tinyshakespeare' is not available; set $LIGHTNING" in capsys.readouterr().out
    assert {row["claim"] for row in rows_of(folder / "out" / "checks.csv")} == {"toy"}


def test_results_of_several_commands_are_merged(folder, toys, monkeypatch):
    monkeypatch.setattr(claims_cli.datasets, "is_available", lambda name: True)
    monkeypatch.setattr(claims_cli.datasets, "load", lambda name: None)
    assert run("toy", "--out", "out") == 0
    assert run("toy-text", "--out", "out") == 0
    assert [row["claim"] for row in rows_of(folder / "out" / "checks.csv")] == ["toy", "toy", "toy-text", "toy-text"]


def test_an_interrupted_claim_resumes(folder, monkeypatch):
    """The second seed fails the first time; the first seed is not computed again."""
    computed = []

    def measure(experiment):
        def compute(seed):
            computed.append(seed)
            if seed == 1 and computed.count(1) == 1:
                raise KeyboardInterrupt
            return {"v": float(seed)}

        return Measurement(
            {"v": [experiment.cached("p", {"seed": s}, lambda s=s: compute(s))["v"] for s in experiment.seeds]}
        )

    claim = Claim("slow", "S", "s", "s", measure, (at_least("v", 1.0),), 1, 1)
    monkeypatch.setattr(registry, "find_all", lambda: {"slow": claim})
    monkeypatch.setattr(claims_cli, "find_all", lambda: {"slow": claim})
    with pytest.raises(KeyboardInterrupt):
        run("slow")
    assert run("slow") == 0
    assert computed == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"Give either claims by name or path, or --all, or --list, --check.* Known claims are toy, toy-text"),
        (["toy", "--all"], "Give either claims"),
        (["toi"], r"Unknown claim 'toi'; .* Did you mean toy\?"),
        (["toy-text"], r"tinyshakespeare.*LIGHTNING_LOPT_DATA"),
        (["toy", "--out", "file"], "--out 'file' is a file"),
        (["toy", "--scale", "2"], "unrecognized arguments"),
    ],
    ids=str,
)
def test_mistakes(capsys, folder, toys, arguments, message, monkeypatch):
    (folder / "file").write_text("")
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("lopt")
    assert re.search(message, line)
    assert not (folder / "reproduction").exists()


# --- Claims of one's own ---

OWN = """
from __future__ import annotations

import dataclasses

from helper import VALUES
from lightning_lopt.claims import Claim, Measurement, at_most

@dataclasses.dataclass
class Options:
    bound: float = 1.0

def measure(experiment):
    return Measurement({"loss": VALUES[: len(experiment.seeds)]})

CHECKS = (at_most("loss", Options().bound),)
CLAIMS = (Claim("own", "Mine", "It works.", "Small.", measure, CHECKS, 1, 1),)
"""


@pytest.fixture
def own(folder, monkeypatch):
    """A folder with a file of claims, a module that it imports, and a script that must not run."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    (folder / "mine").mkdir()
    (folder / "mine" / "my claims.py").write_text(OWN)
    (folder / "mine" / "helper.py").write_text("VALUES = [0.5, 0.25, 0.125]")
    (folder / "mine" / "script.py").write_text("raise SystemExit('this script must not run')")
    return folder / "mine"


@pytest.mark.parametrize("path", ["mine/my claims.py", "mine", "./mine"])
def test_claims_from_a_path(capsys, folder, own, path):
    before = sorted(find_all())
    assert run(path, "toy-like-nothing") == 2
    capsys.readouterr()
    assert run(path, "--quick") == 0
    assert "0.375" in capsys.readouterr().out
    found = json.loads((folder / "reproduction" / "own.json").read_text())
    assert found["numbers"] == {"loss": [0.5, 0.25]}
    assert "## Other claims" in (folder / "reproduction.md").read_text()
    assert shlex.split(found["command"]) == ["lopt", "reproduce", path, "--quick", "--out", "reproduction"]
    assert sorted(find_all()) == before  # the package's registry is as it was


def test_claims_from_a_path_beside_bundled_ones(folder, own, toys):
    assert run("toy", "mine") == 0
    assert {row["claim"] for row in rows_of(folder / "reproduction" / "checks.csv")} == {"own", "toy"}


def test_a_path_is_listed_without_measuring_it(capsys, folder, own):
    assert run("--list", "mine") == 0
    assert "It works." in capsys.readouterr().out
    assert not (folder / "reproduction").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", r"own\.py has no CLAIMS; write CLAIMS = \(Claim\(\.\.\.\),\)"),
        ("x = 1\ndef f(:", r"own\.py, line 2: .*\. Correct the file"),
        ("import neighbor", r"mine/neighbor\.py, line 1: .*\. Correct the file"),
        ("a = 1\nb = nothing", r"own\.py, line 2: NameError: name 'nothing' is not defined\. Correct the file"),
        ("import no_such_module", r"own\.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("CLAIMS = ()", r"own\.py: CLAIMS is empty"),
        ("CLAIMS = [1]", r"own\.py: CLAIMS must be a tuple of claims, not \[1\]"),
        (f"{OWN}\nCLAIMS = CLAIMS[0]", r"own\.py: CLAIMS must be a tuple of claims, not Claim\(id='own'"),
        (
            OWN.replace('"own"', '"toy"'),
            r"The claim id 'toy' is taken: it is in lightning_lopt and in mine/own\.py\. Choose another",
        ),
        (OWN.replace('"own"', '"a b"'), r"own\.py, line 17: ValueError: The claim id 'a b' is not allowed"),
        (f"{OWN}\nCLAIMS *= 2", r"The claim id 'own' is taken: it is in mine/own\.py and in mine/own\.py"),
        (OWN.replace("Measurement({", "dict({"), r"`measure` of the claim 'own' must return a Measurement, not dict"),
        (OWN.replace('at_most("loss"', 'at_most("los"'), r"needs 'los'; its claim measured \['loss'\]"),
    ],
    ids=lambda value: value[-40:],
)
def test_mistakes_in_a_file(capsys, folder, own, toys, source, message):
    (own / "own.py").write_text(source)
    (own / "neighbor.py").write_text("def f(:")
    assert run("mine/own.py") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lopt reproduce: error: ")
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.py", r"nowhere\.py: there is no such file"),
        ("empty", "empty: none of its Python files has CLAIMS"),
        ("notes.txt", r"notes\.txt is not a Python file"),
        ("./nowhere", r"Unknown claim '\./nowhere'; it is not the path of a file or folder either"),
    ],
)
def test_paths_without_claims(capsys, folder, own, toys, path, message):
    (folder / "empty").mkdir()
    (folder / "empty" / "script.py").write_text("raise SystemExit('this script must not run')")
    (folder / "notes.txt").write_text("CLAIMS")
    assert run(path) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_claims_id_comes_before_a_folder_of_its_name(folder, own, toys):
    own.rename(folder / "toy")
    assert [claim.path for claim in find(["toy"])] == [""]
    assert [claim.path for claim in find(["./toy"])] == ["./toy"]


# --- The claims there are ---


def test_list(capsys):
    assert run("--list") == 0
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert all(name in out for name in find_all())
    assert run("--list", "star-fig4") == 0
    out = capsys.readouterr().out
    assert "star-fig4" in out
    assert "star-app5" not in out


@pytest.mark.parametrize("claim", find_all().values(), ids=lambda claim: claim.id)
def test_claims_are_well_formed(claim):
    assert re.search(r"arXiv \d{4}\.\d{5}|thesis|Harrison", claim.source), claim.source
    assert claim.statement.endswith(".")
    assert claim.setup.endswith(".")
    assert "{" not in claim.setup
    assert 0 < claim.quick_minutes <= claim.minutes
    assert 1 <= claim.quick_seeds <= claim.seeds
    assert set(claim.needs) <= set(tasks.datasets.list_datasets())
    texts = [check.text for check in claim.checks]
    assert len(set(texts)) == len(texts)
    assert claim.title
    assert claim.in_paper.endswith(".")
    assert any(check.kind == "paper" for check in claim.checks) or claim.source.startswith("this package's own rule")
    assert find([claim.id, claim.id]) == [claim]


def test_two_claims_of_one_name_are_refused(monkeypatch):
    module = types.SimpleNamespace(CLAIMS=(made("twice"), made("twice")))
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: module)
    with pytest.raises(ValueError, match="The claim id 'twice' is taken: .* lightning_lopt and in lightning_lopt"):
        find_all()


@pytest.mark.parametrize("name", ["", "../up", "Upper", "a b", "a--b", "a/b"])
def test_an_id_that_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="is not allowed: use words of a-z and 0-9"):
        made(name)


def test_the_plot_of_a_claim_without_one():
    assert isinstance(claims_cli.draw_values(Measurement({"a": [1.0, math.nan], "b": [-1.0]})), Figure)


def test_records_of_other_files_are_left_out(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    assert report.read(tmp_path) == {}


def test_every_claim_belongs_to_a_figure_and_every_figure_to_a_claim_or_a_cost():
    items = [item for paper in coverage.PAPERS for item in paper.items]
    assert {name for item in items for name in item.claims} == set(find_all())
    for item in items:
        assert item.claims or item.missing, item.label
