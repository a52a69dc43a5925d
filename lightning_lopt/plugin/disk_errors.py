"""Checkpoints that cannot be written: found before training where that is possible, and explained where it is not."""

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
    """Raise if a local directory of checkpoints is read-only: Lightning leaves such checkpoints out without a word."""
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
    """Where a file could not be written, tell from where the run goes on."""
    if isinstance(exception, OSError) and exception.errno in _UNWRITABLE:
        kept = [path for saves in trainer.checkpoint_callbacks for path in Path(saves.dirpath or "").glob("*.ckpt")]
        newest = max(kept, key=lambda path: path.stat().st_mtime, default=None)
        todo = f"goes on from {newest}, which is whole" if newest else "has to begin anew: no checkpoint is there"
        rank_zero_warn(
            f"Training stopped because a file could not be written ({exception}). Make room, or pass a directory "
            f"that can be written to. With ckpt_path= the run {todo}."
        )


class ExplainDiskErrors(Callback):
    """For modules, which are not told of exceptions themselves."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Explain it."""
        explain(trainer, exception)
