"""Results on disk, one small JSON file each, so that a sweep can be interrupted and taken up again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

PROTOCOL = 1
"""Part of every key: to be raised when the same settings would give other numbers."""


class Cache:
    """A folder of results by key.

    Args:
        directory: made when the first result is written; None keeps nothing.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Cache(folder).put("some task", {"lr": 0.1}, {"loss": [0.5, math.nan]})
        ...     Cache(folder).get("some task", {"lr": 0.1}), Cache(folder).get("some task", {"lr": 0.2})
        ({'loss': [0.5, nan]}, None)
    """

    def __init__(self, directory: str | Path | None) -> None:
        self.directory = None if directory is None else Path(directory)

    def get(self, group: str, key: dict[str, Any]) -> dict[str, Any] | None:
        """What was put there, or None; a file that cannot be read counts as none."""
        if self.directory is None:
            return None
        try:
            content = json.loads(self._path(group, key).read_text(encoding="utf-8"))
            found: dict[str, Any] | None = decode(content["value"]) if content["key"] == _plain(key) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found

    def put(self, group: str, key: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
        """Write a result, all of it or nothing, and return it as `get` will: rounded."""
        encoded = encode(value)
        if self.directory is not None:
            self._write(self._path(group, key), json.dumps({"key": _plain(key), "value": encoded}, allow_nan=False))
        decoded: dict[str, Any] = decode(encoded)
        return decoded

    def _write(self, path: Path, content: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(content)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _path(self, group: str, key: dict[str, Any]) -> Path:
        assert self.directory is not None
        digest = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()[:20]
        return self.directory / re.sub(r"[^A-Za-z0-9_.@-]", "_", group) / f"{digest}.json"


def encode(value: Any) -> Any:
    """As JSON has it: dicts, lists, floats of six digits, and None for floats that are not finite."""
    return _map(value, _encoded)


def decode(value: Any) -> Any:
    """What `encode` made, with NaN for None."""
    return _map(value, _decoded)


def _plain(key: dict[str, Any]) -> Any:
    """The key as JSON gives it back."""
    return json.loads(json.dumps({"protocol": PROTOCOL, **key}, sort_keys=True))


def _encoded(number: Any) -> Any:
    # Six digits are more than a table shows. Losses that are not finite are all alike to it.
    if isinstance(number, float):
        return float(f"{number:.6g}") if math.isfinite(number) else None
    return number


def _decoded(value: Any) -> Any:
    return math.nan if value is None else value


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, dict):
        return {name: _map(item, function) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map(item, function) for item in value]
    return function(value)
