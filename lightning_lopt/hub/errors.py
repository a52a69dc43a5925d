"""Error messages about bad files: one short, printable line, whatever bytes the file contains."""

from __future__ import annotations

import reprlib


def refusal(file: str, what: str, todo: str) -> ValueError:
    """Build the error for a bad file: which file, what is wrong with it (`what`), what to do (`todo`)."""
    place = file if len(file) <= 80 else "..." + file[-77:]
    return ValueError(f"{clip(place, 80)}: {clip(what, 140)}. {todo}")


def show(value: object) -> str:
    """Format a value for an error message, short and on one line."""
    return clip(reprlib.repr(value), 60)


def clip(text: str, limit: int) -> str:
    """Reduce text that may come from a file or a server to one printable line of at most `limit` characters."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line if len(line) <= limit else line[: limit - 3] + "..."
