"""C++ kernels are built once, into the cache alone, by one process or several; without a compiler the rule runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optimizer_cases import parameters, run, snapshot, star

from lightning_lopt import RuleOptimizer, kernels
from lightning_lopt.kernels.cpu import build

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="no C++ compiler")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "five.cpp"
    path.write_text('extern "C" int five() { return FIVE; }\n')
    return path


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@needs_compiler
def test_a_library_is_built_once_and_in_the_cache_alone(source, tmp_path):
    assert build.library(source, "FIVE=5").five() == 5
    (built,) = set(files(tmp_path)) - {"five.cpp"}
    assert built.startswith("cache/lightning_lopt/five-")
    written = (tmp_path / built).stat().st_mtime_ns
    build._library.cache_clear()  # as a new process
    assert build.library(source, "FIVE=5").five() == 5
    assert (tmp_path / built).stat().st_mtime_ns == written
    assert build.library(source, "FIVE=6").five() == 6
    source.write_text('extern "C" int five() { return FIVE + 10; }\n')
    build._library.cache_clear()
    assert build.library(source, "FIVE=5").five() == 15
    assert len(files(tmp_path)) == 4


@needs_compiler
def test_a_damaged_library_is_built_anew(source, tmp_path, monkeypatch):
    build.library(source, "FIVE=5")
    (built,) = (tmp_path / "cache").rglob("*.so")
    damaged = tmp_path / "other" / "lightning_lopt" / built.name  # elsewhere: what is loaded is not read again
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"\x7fELF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert build.library(source, "FIVE=5").five() == 5
    assert damaged.stat().st_size > 1000


@needs_compiler
def test_processes_that_build_at_once(source, tmp_path):
    script = (
        "import runpy, sys, pathlib\n"
        "print(runpy.run_path(sys.argv[1])['library'](pathlib.Path(sys.argv[2]), 'FIVE=5').five())"
    )
    command = [sys.executable, "-c", script, build.__file__, str(source)]  # without torch: they start at once
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in started] == ["5"] * 3
    assert len(files(tmp_path)) == 2


WITHOUT = {
    "no compiler": (
        {"PATH": "", "CXX": ""},
        r"no C\+\+ compiler was found \(looked for c\+\+, g\+\+, clang\+\+\); install",
    ),
    "another one that is missing": ({"CXX": "nowhere-c++ -O1"}, r"looked for nowhere-c\+\+"),
    "one that fails": ({"CXX": "false"}, "could not compile five.cpp .*set CXX"),
    "a cache that is a file": ({"XDG_CACHE_HOME": __file__}, "could not be built in .*set XDG_CACHE_HOME"),
}


@pytest.mark.parametrize(("environment", "why"), WITHOUT.values(), ids=WITHOUT)
def test_why_there_is_no_library(source, monkeypatch, environment, why):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = build.library(source, "FIVE=5")
    assert isinstance(found, str)
    assert re.search(why, found)


def test_without_a_compiler_the_torch_path_is_taken_and_this_is_said_once(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernels, "_WARNED", set())
    reference, auto = (RuleOptimizer(parameters(), star(), backend=b, safeguard=True) for b in ("reference", "auto"))
    with pytest.warns(UserWarning, match=r"torch path.*no C\+\+ compiler.*backend='reference'") as caught:
        run(auto, 3)
    assert len(caught) == 1
    assert auto.backend == "reference"
    run(reference, 3)
    for a, b in zip(snapshot(reference), snapshot(auto), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"'fused' is missing.*no C\+\+ compiler.*install one"):
        RuleOptimizer(parameters(), star(), backend="fused")


def test_the_cache_is_the_users_own():
    folder = build.cache_folder()
    assert folder.parent == Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
