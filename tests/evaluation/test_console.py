"""Progress on a terminal and in a file, and what is checked before a command runs."""

import io
import time

import pytest
from rich.console import Console

from lightning_lopt.evaluation import console as module
from lightning_lopt.evaluation.console import open_console, progress_bar


def test_a_file_gets_a_line_when_something_is_done_and_every_ten_seconds_until_then(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with progress_bar(Console(file=out, width=80)) as progress:
        for done in range(26):
            progress("star on digits", done, 25)
            clock[0] += 1.0
        progress("quick", 1, 1)
    assert out.getvalue().splitlines() == [
        "      11 s  star on digits, 11 of 25",
        "      22 s  star on digits, 22 of 25",
        "      25 s  star on digits",
        "      26 s  quick",
    ]


def test_a_terminal_gets_a_bar():
    out = io.StringIO()
    with progress_bar(Console(file=out, width=100, force_terminal=True)) as progress:
        progress("star on digits", 1_500, 20_000)
        time.sleep(0.15)  # the bar is redrawn ten times a second
    assert "starting" in out.getvalue()
    assert "star on digits" in out.getvalue()
    assert "1,500 of 20,000" in out.getvalue()


def test_a_missing_library_and_a_file_for_a_folder_are_reported(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file' is a file; name a directory, which is created if needed\."):
        open_console(tmp_path / "file")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(ModuleNotFoundError, match=r"Reports need matplotlib.*pip install 'lightning_lopt\[plot\]'"):
        open_console(tmp_path)
