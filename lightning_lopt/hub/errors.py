"""What is said of a file that is refused: one printable line, whatever the file holds."""

from __future__ import annotations

import reprlib


def refusal(file: str, what: str, todo: str) -> ValueError:
    """The error to raise: which file, what is wrong with it, what to do."""
    place = file if len(file) <= 80 else "..." + file[-77:]
    return ValueError(f"{clip(place, 80)}: {clip(what, 140)}. {todo}")


def show(value: object) -> str:
    """A value for an error message: short, on one line."""
    return clip(reprlib.repr(value), 60)


def clip(text: str, limit: int) -> str:
    """One printable line of at most `limit` characters: part of it may come from a file or a server."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line if len(line) <= limit else line[: limit - 3] + "..."
