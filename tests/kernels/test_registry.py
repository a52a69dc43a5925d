"""A kernel that cannot be had says why, in words that help."""

import sys

import pytest

from lightning_lopt import kernels
from lightning_lopt.rules import make

IMPORTS = {
    "missing": ("import no_such_library", "needs no_such_library, which is not installed"),
    "a part is missing": ("import json.no_such_part", r"cannot be imported: No module named 'json.no_such_part'"),
    "a symbol is missing": (
        "from json import nothing",
        r"cannot be imported: cannot import name 'nothing' from 'json'",
    ),
    "broken": ("raise ImportError('libcuda.so.1: cannot open')", "cannot be imported: libcuda.so.1: cannot open"),
    "without a name": ("raise ModuleNotFoundError('no driver')", "cannot be imported: no driver"),
}


@pytest.mark.parametrize(("code", "why"), IMPORTS.values(), ids=IMPORTS)
def test_only_a_missing_library_is_called_not_installed(tmp_path, monkeypatch, code, why):
    (tmp_path / "a_kernel_that_fails.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(kernels.MODULES, ("scheduled", "cpu"), "a_kernel_that_fails")
    found = kernels.find(make("scheduled"), "cpu")
    assert "a_kernel_that_fails" not in sys.modules
    assert found.startswith(f"the fused kernel for 'cpu' {why}")


def test_a_kind_without_a_kernel():
    rule, paper = make("scheduled"), make("star")
    assert kernels.exists(rule)
    assert kernels.exists(rule, "cpu")
    assert not kernels.exists(rule, "mps")
    assert not kernels.exists(paper, "cuda")
    assert kernels.find(rule, "mps") == "there is no fused kernel for kind 'scheduled' on 'mps'"
    assert kernels.find(paper, "cuda") == "there is no fused kernel for kind 'star' on 'cuda'"


def test_a_fallback_is_for_the_class_it_was_written_for():
    class Own(type(make("scheduled"))):
        pass

    assert kernels.find_fallback(make("scheduled"), "cpu") is not None
    assert kernels.find_fallback(Own(kind="scheduled"), "cpu") is None
    assert kernels.find_fallback(make("scheduled"), "cuda") is None
    assert kernels.find_fallback(make("star"), "cpu") is None
