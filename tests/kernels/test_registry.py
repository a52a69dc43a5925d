"""A kernel that cannot be had says why, in words that help."""

import sys

import pytest
from optimizer_cases import star

from lightning_lopt import kernels

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
    monkeypatch.setitem(kernels.MODULES, ("star", "cpu"), "a_kernel_that_fails")
    found = kernels.find(star(), "cpu")
    assert "a_kernel_that_fails" not in sys.modules
    assert found.startswith(f"the fused kernel for 'cpu' {why}")


def test_a_kind_without_a_kernel():
    assert kernels.exists(star())
    assert kernels.exists(star(), "cpu")
    assert not kernels.exists(star(), "mps")
    assert kernels.find(star(), "mps") == "there is no fused kernel for kind 'star' on 'mps'"
