"""Kept evidence: resuming, the hash of a setup, verdicts from stored numbers, the page, and the cards' numbers."""

import dataclasses
import linecache
import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from lightning_lopt import cli
from lightning_lopt.claims import (
    Claim,
    Measurement,
    at_least,
    at_most,
    cards,
    coverage,
    find_all,
    folder,
    registry,
    report,
)
from lightning_lopt.claims import cli as claims_cli
from lightning_lopt.claims import setup_hash as hashing
from lightning_lopt.claims.setup_hash import setup_hash

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
CALLS = []
SHIFT = 0.0


def helper(value):
    return value + SHIFT


def measure(experiment, base=1.0):
    CALLS.append(experiment.quick)
    return Measurement({"loss": [helper(base + 0.1 * seed) for seed in experiment.seeds]})


def other_measure(experiment, base=1.0):
    CALLS.append(experiment.quick)
    return Measurement({"loss": [helper(base + 0.2 * seed) for seed in experiment.seeds]})


def made(name="toy", *, bound=1.5, run=measure, **options):
    checks = options.pop("checks", (at_most("loss", bound),))
    texts = {"title": "A toy", "in_paper": "A big toy."}
    return Claim(name, "Some paper", "It works.", "Small.", run, checks, 1, 0.1, **{**texts, **options})


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CALLS.clear()


@pytest.fixture
def claims(monkeypatch):
    """The claims that the command knows; tests replace them."""
    known = {"toy": made()}
    monkeypatch.setattr(claims_cli, "find_all", lambda: dict(known))
    monkeypatch.setattr(claims_cli, "find", lambda names: [known[name] for name in names])
    monkeypatch.setattr(
        coverage, "PAPERS", (coverage.Paper("A paper", (coverage.Item("Figure 1", "a toy", ("toy", "late")),)),)
    )
    for module in (cards, claims_cli.folder.page):
        monkeypatch.setattr(module, "PAPERS", coverage.PAPERS)
    return known


def run(*arguments):
    return cli.main(["reproduce", *map(str, arguments)])


# --- Resuming ---


def test_a_second_run_measures_only_what_changed(capsys, claims):
    assert run("toy", "--out", "out") == 0
    assert run("toy", "--out", "out") == 0
    assert len(CALLS) == 1
    assert "toy: kept, its setup has not changed" in capsys.readouterr().out
    claims["toy"] = made(bound=0.5)  # other checks judge the same numbers
    assert run("toy", "--out", "out") == 0
    assert len(CALLS) == 1
    assert "not reproduced, 0 of 1 checks" in capsys.readouterr().out
    claims["toy"] = made(run=other_measure)
    assert run("toy", "--out", "out") == 0
    assert len(CALLS) == 2
    assert run("toy", "--out", "out", "--fresh") == 0
    assert len(CALLS) == 3


def test_the_quick_scale_does_not_replace_the_full_one(claims):
    assert run("toy", "--out", "out") == 0
    assert run("toy", "--out", "out", "--quick") == 0
    assert CALLS == [False]
    assert report.read(Path("out"))["toy"]["scale"] == "full"
    assert run("toy", "--out", "other", "--quick") == 0
    assert run("toy", "--out", "other") == 0
    assert CALLS == [False, True, False]
    assert report.read(Path("other"))["toy"]["scale"] == "full"


def test_all_goes_from_the_cheapest_to_the_dearest_and_keeps_what_it_has(claims, monkeypatch):
    """The second claim is interrupted; the first one's rows are there already."""

    def interrupted(experiment):
        raise KeyboardInterrupt

    claims = {"dear": dataclasses.replace(made("dear", run=interrupted), minutes=100), "toy": made("toy")}
    monkeypatch.setattr(claims_cli, "find_all", lambda: dict(claims))
    with pytest.raises(KeyboardInterrupt):
        run("--all", "--out", "out")
    assert "toy,paper,loss <= 1.5" in Path("out/checks.csv").read_text()
    assert "**reproduced, 1 of 1 checks**" in Path("out.md").read_text()


# --- The hash of a setup ---


def test_the_hash_depends_on_what_the_numbers_depend_on(monkeypatch):
    first = setup_hash(made())
    assert setup_hash(made(bound=7.0, title="Other words")) == first
    assert setup_hash(made(run=partial(measure, base=1.0))) != first
    assert setup_hash(made(run=partial(measure, base=2.0))) != setup_hash(made(run=partial(measure, base=1.0)))
    assert setup_hash(made(seeds=5)) != first
    assert setup_hash(made(), quick=True) != first
    monkeypatch.setitem(globals(), "SHIFT", 1.0)  # read by a function that `measure` calls
    assert setup_hash(made()) != first


SOURCE = '''
from lightning_lopt.claims import Claim, Measurement, at_most

def measure(experiment):
    """Words."""
    # A comment.
    return Measurement({{"loss": [1.0 * {factor} for _ in experiment.seeds]}})

CLAIMS = (Claim("own", "S", "s", "s", measure, (at_most("loss", 9.0),), 1, 1),)
'''


def test_comments_docstrings_and_layout_do_not_change_the_hash(tmp_path):
    path = tmp_path / "own.py"

    def hash_of(text):
        path.write_text(text)
        linecache.clearcache()  # inspect reads sources through it
        (claim,) = registry.load(str(path))
        return setup_hash(claim)

    text = SOURCE.format(factor="2")
    first = hash_of(text)
    assert hash_of(text.replace("# A comment.", "# Another one.")) == first
    assert hash_of(text.replace("Words.", "Other words.\n\n    And more.")) == first
    assert hash_of(text.replace("[1.0 * 2", "[\n        1.0 * 2")) == first
    assert hash_of(SOURCE.format(factor="3")) != first


def test_the_hash_covers_the_weights_of_the_rules_that_a_claim_names(tmp_path, monkeypatch):
    (claim,) = [claim for claim in find_all().values() if claim.id == "history-step-map"]
    before = setup_hash(claim)
    copy = tmp_path / "k-timesteps"
    shutil.copytree(ROOT / "pretrained" / "k-timesteps", copy)
    monkeypatch.setattr(hashing, "find_dir", lambda name: copy if name == "k-timesteps" else None)
    assert setup_hash(claim) == before
    (copy / "model.safetensors").write_bytes(b"other weights")
    assert setup_hash(claim) != before


# --- Verdicts from stored numbers ---


def test_check_passes_on_what_was_written_and_finds_every_change(capsys, claims):
    claims["toy"] = made(checks=(at_most("loss", 1.5), at_least("loss", 0.0, kind="own")))
    assert run("toy", "--out", "out") == 0
    assert run("--check", "out") == 0
    record = Path("out/toy.json")
    for path, old, new in (
        (record, "[1.0, 1.1, 1.2]", "[1.0, 1.1, 2.9]"),  # a number
        (Path("out.md"), "1 of 1 checks", "2 of 2 checks"),
        (Path("out/checks.csv"), "True", "False"),
    ):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        assert run("--check", "out") == 2
        assert "differ from the numbers" in capsys.readouterr().err
        path.write_text(text)
    assert run("--check", "out") == 0
    record.write_text("{")
    assert run("--check", "out") == 2
    assert "is not JSON" in capsys.readouterr().err
    assert run("--check", "nowhere") == 2
    assert "has no records of claims" in capsys.readouterr().err


def test_the_page_is_written_anew_without_measuring(claims):
    assert run("toy", "--out", "out") == 0
    page = Path("out.md").read_text()
    Path("out.md").unlink()
    assert run("--page", "--out", "out") == 0
    assert Path("out.md").read_text() == page
    assert len(CALLS) == 1


def test_the_page_says_what_was_not_run_and_what_is_out_of_date(claims):
    claims["late"] = made("late")
    assert run("toy", "--out", "out") == 0
    page = Path("out.md").read_text()
    assert (
        "| Figure 1 | a toy | [toy](#toy): **reproduced, 1 of 1 checks** | late: not run yet, 1 CPU minutes |" in page
    )
    assert "Measured before a change" not in page
    claims["toy"] = made(run=other_measure)
    assert run("--page", "--out", "out") == 0
    assert "Measured before a change of this claim's code" in Path("out.md").read_text()


# --- Cards ---


def test_blocks_of_evidence_are_filled(capsys, claims):
    claims["late"] = made("late")
    assert run("toy", "--out", "out") == 0
    card = Path("card.md")
    blocks = (
        "<!-- evidence: toy late -->\nhand-typed\n<!-- /evidence -->\n<!-- evidence: summary -->\n<!-- /evidence -->\n"
    )
    card.write_text(f"# A card\n\n{blocks}")
    assert run("--insert", "card.md", "--out", "out") == 0
    text = card.read_text()
    assert "`lopt reproduce toy` (A toy; 3 seeds): **reproduced, 1 of 1 checks**." in text
    assert "| loss <= 1.5 |  | 1.1 +- 0.1 | 1.5 |" in text
    assert "`lopt reproduce late` (A toy): not run yet" in text
    assert "| A paper | 1 of 2 | 1 of 1 |" in text
    assert "hand-typed" not in text
    assert text.startswith("# A card\n\n<!-- evidence: toy late -->\n")
    assert run("--insert", "card.md", "--out", "out") == 0
    assert card.read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- evidence: nothing -->\n<!-- /evidence -->", "Unknown claim 'nothing' in a block"),
        (
            "<!-- evidence: toy -->\n<!-- /evidence -->\n<!-- evidence: toy -->\n",
            "has no '<!-- /evidence -->' after it",
        ),
    ],
)
def test_faulty_blocks(capsys, claims, text, message):
    assert run("toy", "--out", "out") == 0
    Path("card.md").write_text(text)
    assert run("--insert", "card.md", "--out", "out") == 2
    assert message in capsys.readouterr().err


# --- The evidence of this repository ---


def test_the_page_of_evidence_is_that_of_its_numbers(capsys):
    assert run("--check", EVIDENCE) == 0


def test_the_page_covers_all_figures_and_tables():
    page = folder.page_of(EVIDENCE).read_text()
    for paper in coverage.PAPERS:
        assert f"## {paper.title}\n" in page
        for item in paper.items:
            assert re.search(rf"^\| {re.escape(item.label)} \|", page, re.MULTILINE), item.label
    for row in report.read(EVIDENCE).values():
        assert row["scale"] == "full", row["id"]


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in (ROOT / "README.md", *ROOT.glob("pretrained/*/README.md"))
        if cards.BLOCK.search(path.read_text())
    ],
    ids=lambda path: path.parent.name,
)
def test_cards_and_readme_have_the_numbers_of_the_evidence(path):
    text = path.read_text(encoding="utf-8")
    known = find_all()
    assert cards.insert(text, known, *folder.load(known, EVIDENCE)) == text
