"""Thousands of damaged and hostile rule files, each of which must load or be refused.

examples/soak/fuzz_files.py tries more of them.
"""

import importlib.util
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_lopt as lopt

SCRIPT = Path(__file__).parents[2] / "examples" / "soak" / "fuzz_files.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_files", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(fuzz, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rule")
    for sound in (*fuzz.SOUND.values(), fuzz.CELO2, *({"theta.state": theta} for theta in fuzz.THETAS)):
        assert fuzz.attempt(folder, sound) == "loaded"  # and what the first load imports does not count below
    return folder


@given(seed=st.integers(0, 2**64))
@settings(max_examples=100)
def test_any_files_load_or_are_refused(seed, fuzz, folder):
    for number in range(20):
        _, contents = fuzz.case(random.Random(f"{seed} {number}"))
        assert fuzz.attempt(folder, contents) in ("loaded", "refused")


@pytest.mark.parametrize(
    "deed",
    [
        lambda folder: open(folder.parent / "elsewhere"),  # noqa: SIM115
        lambda folder: open(folder / "config.json", "a"),  # noqa: SIM115
        lambda folder: exec("1"),
        lambda folder: __import__("lightning_lopt.nothing"),
    ],
)
def test_the_watch_sees_what_is_forbidden(deed, fuzz, folder, monkeypatch):
    def load_rule(path):
        deed(path)

    monkeypatch.setattr(lopt, "load_rule", load_rule)
    with pytest.raises(AssertionError):
        fuzz.attempt(folder, fuzz.SOUND["star"])


def test_a_case_is_the_same_again(fuzz):
    assert [fuzz.case(random.Random(seed)) for seed in range(20)] == [fuzz.case(random.Random(s)) for s in range(20)]
    assert "fuzz_files" not in sys.modules
