"""What can be known of the Triton kernels without a GPU: Triton's own compiler makes them for one that is not there."""

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from triton_cases import DEVICE

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "gpu.py"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="it would measure, which takes minutes")
def test_the_benchmark_gives_no_figures_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().out
    assert "nothing was timed" in said
    assert not any(character.isdigit() for character in said)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_kernels_of_scheduled_neither_spill_nor_divide_64_bits(tmp_path, architecture):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), "--compile", architecture, "--kinds", "scheduled"]
    subprocess.run([*command, "--csv", str(tmp_path / "table")], env=environment, check=True, capture_output=True)
    with (tmp_path / "table").open() as file:
        rows = list(csv.DictReader(file))
    of_matrices = {"normalize", "compare", "move"}
    assert {row["kernel"] for row in rows} == {"row_means", "sums", "schedule", "update", *of_matrices}
    assert len(rows) == 29
    for row in rows:
        assert (row["spills"], row["stack"], row["64-bit divisions"]) == ("0", "0", "0"), row
        assert int(row["registers"]) <= 128, row  # two programs of 256 threads on a multiprocessor
        if row["kernel"] in ("sums", "update"):
            assert int(row["wide loads"]) >= 4, row  # of the moments
        if row["kernel"] == "update" and "CHECK=False" in row["variant"]:
            assert int(row["wide stores"]) >= 4 + ("MATRICES=True" in row["variant"]), row  # and of the direction
        if row["kernel"] in of_matrices and "BITS=False" in row["variant"]:  # bfloat16 comes in eight bytes
            assert int(row["wide loads"]) >= 1, row
