"""Results on disk, one small JSON file each, so that an interrupted sweep resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

PROTOCOL = 2
"""Part of every key. Raise it when a change of the code makes the same settings give other numbers."""


class Cache:
    """A folder of results, found by their keys.

    Args:
        directory: created with the first result; None stores nothing.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Cache(folder).put("some task", {"lr": 0.1}, {"loss": [0.5, math.nan]})
        ...     Cache(folder).get("some task", {"lr": 0.1}), Cache(folder).get("some task", {"lr": 0.2})
        ({'loss': [0.5, nan]}, None)
    """

    def __init__(self, directory: str | Path | None) -> None:
        self.directory = None if directory is None else Path(directory)

    def get(self, group: str, key: dict[str, Any]) -> dict[str, Any] | None:
        """The stored result, or None if there is none or its file cannot be read."""
        if self.directory is None:
            return None
        try:
            content = json.loads(self._path(group, key).read_text(encoding="utf-8"))
            found: dict[str, Any] | None = decode(content["value"]) if content["key"] == _plain(key) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found

    def put(self, group: str, key: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
        """Store a result and return it as `get` will: rounded. An interrupted write leaves no file."""
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
    """The value as JSON: dicts, lists, floats of six digits, and None for floats that are not finite."""
    return _map(value, _encode_leaf)


def decode(value: Any) -> Any:
    """The inverse of `encode`, with NaN for None."""
    return _map(value, lambda leaf: math.nan if leaf is None else leaf)


def _plain(key: dict[str, Any]) -> Any:
    """The key as it comes back from JSON."""
    return json.loads(json.dumps({"protocol": PROTOCOL, **key}, sort_keys=True))


def _encode_leaf(leaf: Any) -> Any:
    # Tables show fewer than six digits, and treat all losses that are not finite alike.
    if isinstance(leaf, float):
        return float(f"{leaf:.6g}") if math.isfinite(leaf) else None
    return leaf


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, dict):
        return {name: _map(item, function) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map(item, function) for item in value]
    return function(value)
