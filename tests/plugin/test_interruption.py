"""Full and read-only disks, and truncated checkpoints; killed processes are in examples/soak/interruption.py."""

import errno
import pickle

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_cases import KNOWN_WARNINGS, fit, learned, weights
from meta_cases import fit as fit_meta
from meta_cases import meta
from optimizer_cases import assert_equal

pytestmark = [*KNOWN_WARNINGS, pytest.mark.filterwarnings("ignore:Training stopped because a file could not be")]


def run(path, **arguments):
    saves = ModelCheckpoint(path / "saved", filename="{epoch}", save_top_k=-1)
    return fit(path, learned(), saves, enable_checkpointing=True, max_epochs=3, **arguments)


def run_meta(path, **arguments):
    saves = ModelCheckpoint(path / "saved", filename="{epoch}", save_top_k=-1)
    return fit_meta(path, meta(), saves, enable_checkpointing=True, max_epochs=3, **arguments)


KINDS = pytest.mark.parametrize("run", [run, run_meta], ids=["inner training", "meta-training"])


def fill_the_disk(monkeypatch, after):
    """Cut every write short after `after` files."""
    files, write = [], LocalFileOpener.write

    def full(self, data):
        if self not in files:
            files.append(self)
        if len(files) <= after:
            return write(self, data)
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalFileOpener, "write", full)


@KINDS
def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(run, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        fill_the_disk(patch, after=2)
        told = r"No space left on device.*ckpt_path= the run resumes from .*epoch=1.ckpt, which is complete"
        with pytest.warns(UserWarning, match=told), pytest.raises(OSError, match="No space left"):
            run(tmp_path)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    resumed = run(tmp_path, ckpt_path=tmp_path / "saved" / "epoch=1.ckpt")
    assert_equal(weights(resumed), weights(whole))


@KINDS
def test_a_disk_that_was_full_from_the_start(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fill_the_disk(patch, after=0)
        with (
            pytest.warns(UserWarning, match="must start over: there is no checkpoint"),
            pytest.raises(OSError, match="space"),
        ):
            run(tmp_path)
    assert list((tmp_path / "saved").iterdir()) == []


@KINDS
@pytest.mark.parametrize("exists", [False, True])
def test_a_read_only_directory_is_refused_before_training(run, exists, tmp_path, monkeypatch):
    """Lightning itself silently writes no checkpoint there."""
    if exists:
        (tmp_path / "saved").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).startswith(str(tmp_path)))
    with pytest.raises(MisconfigurationException, match="saved: .* is read-only. Pass another directory"):
        run(tmp_path)


@KINDS
def test_a_truncated_checkpoint_does_not_load(run, tmp_path):
    run(tmp_path)
    data = (tmp_path / "saved" / "epoch=1.ckpt").read_bytes()
    torch.load(tmp_path / "saved" / "epoch=1.ckpt", weights_only=True)
    cut = tmp_path / "cut.ckpt"
    for length in [0, 1, 100, *range(len(data) // 40, len(data), len(data) // 40), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises((RuntimeError, EOFError, OSError, pickle.UnpicklingError)):
            torch.load(cut, weights_only=True)
    with pytest.raises((RuntimeError, OSError)):  # torch's own, which depends on where the file ends
        run(tmp_path, ckpt_path=cut)
