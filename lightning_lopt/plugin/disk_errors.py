"""Finds checkpoint folders that cannot be written before training starts, and explains write errors that come later."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def check_writable(trainer: Any) -> None:
    """Raise if a local checkpoint directory is read-only: Lightning would silently write no checkpoints there.

    Raises:
        MisconfigurationException: naming the directory.
    """
    for saves in trainer.checkpoint_callbacks if trainer.is_global_zero else ():
        directory = getattr(saves, "dirpath", None)
        if directory is None or "://" in str(directory):
            continue
        places = (Path(directory).absolute(), *Path(directory).absolute().parents)
        nearest = next(path for path in places if path.exists())
        if not os.access(nearest, os.W_OK):
            raise MisconfigurationException(
                f"Checkpoints cannot be written to {directory}: {nearest} is read-only. Pass another directory, as "
                "ModelCheckpoint(dirpath=...) or Trainer(default_root_dir=...), or enable_checkpointing=False."
            )


def explain(trainer: Any, exception: BaseException) -> None:
    """If the exception means that a file could not be written, say which checkpoint the run can resume from."""
    if isinstance(exception, OSError) and exception.errno in _UNWRITABLE:
        kept = [path for saves in trainer.checkpoint_callbacks for path in Path(saves.dirpath or "").glob("*.ckpt")]
        newest = max(kept, key=lambda path: path.stat().st_mtime, default=None)
        resume = f"resumes from {newest}, which is complete" if newest else "must start over: there is no checkpoint"
        rank_zero_warn(
            f"Training stopped because a file could not be written ({exception}). Free some space, or pass a writable "
            f"directory. With ckpt_path= the run {resume}."
        )


class ExplainDiskErrors(Callback):
    """Calls `explain` for a LightningModule, which has no `on_exception` hook of its own."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Explain write errors."""
        explain(trainer, exception)
