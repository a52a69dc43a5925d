"""Blocks of evaluations in cards: filled from the files of `lopt evaluate`, and never out of date in the repository."""

from pathlib import Path

import pytest

from lightning_lopt import cli
from lightning_lopt.evaluation import cards

ROOT = Path(__file__).parents[2]
BLOCK = "before\n<!-- evaluation: small {} -->\nold\n<!-- /evaluation -->\nafter\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command writes for a rule, tuned Adam and two tasks."""
    made = tmp_path_factory.mktemp("docs")
    arguments = ["--task", "digits-logreg", "wine-mlp", "--steps", "20", "--seeds", "2", "--baseline", "adam"]
    command = ["evaluate", "--rule", "star", *arguments, "--no-nominal", "--out", str(made / "small")]
    assert cli.main([*command, "--cache", str(made / "cache")]) == 0
    return made


def rows(text):
    return [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]


def test_a_summary_has_each_optimizers_ratios_with_their_spread(folder):
    text = cards.insert(BLOCK.format("summary"), folder)
    head, _, *lines = rows(text)
    assert [cell.strip() for cell in head[1:3]] == ["**star**", "adam"]
    assert all(len(line) == len(head) for line in lines)
    own = next(line for line in lines if line[0].strip() == "final training loss / tuned Adam")
    assert own[2].strip().startswith("1.000")
    assert "±" in own[1]
    assert text.startswith("before\n")
    assert text.endswith("<!-- /evaluation -->\nafter\n")
    assert "old" not in text
    assert "over 2 tasks" in text


def test_tasks_has_a_row_for_each(folder):
    found = rows(cards.insert(BLOCK.format("tasks"), folder))
    assert [line[0].strip() for line in found[2:]] == ["digits-logreg, 20", "wine-mlp, 20"]


def test_filling_twice_changes_nothing(folder):
    once = cards.insert(BLOCK.format("summary"), folder)
    assert cards.insert(once, folder) == once


def test_what_was_not_run_is_said(tmp_path):
    assert "Not run yet" in cards.insert(BLOCK.format("summary"), tmp_path)


def test_blocks_that_cannot_be_filled_are_refused(tmp_path):
    (tmp_path / "small").mkdir()
    with pytest.raises(ValueError, match=r"asks for 'plot'; allowed are \['summary', 'tasks'\]"):
        cards.insert(BLOCK.format("plot"), tmp_path)
    with pytest.raises(ValueError, match="has no '<!-- /evaluation -->'"):
        cards.insert("<!-- evaluation: small summary -->\n", tmp_path)


def test_the_command_fills_files(folder, tmp_path):
    (tmp_path / "card.md").write_text(BLOCK.format("summary"))
    assert cli.main(["evaluate", "--insert", str(tmp_path / "card.md"), "--out", str(folder)]) == 0
    assert (tmp_path / "card.md").read_text() == cards.insert(BLOCK.format("summary"), folder)


def test_without_rules_or_tasks_the_command_says_what_it_needs(capsys):
    assert cli.main(["evaluate", "--rule", "star"]) == 2
    assert "--task or --suite" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["README.md", "pretrained/star/README.md"])
def test_no_block_in_the_repository_is_out_of_date(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert "<!-- evaluation:" in text
    assert cards.insert(text, ROOT / "docs" / "evaluation") == text
