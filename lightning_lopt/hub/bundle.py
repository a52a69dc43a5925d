"""The bundled rules and their names."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_lopt.hub.errors import show
from lightning_lopt.hub.files import CONFIG


def bundled_dir() -> Path:
    """The folder of the bundled rules: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    # The checkout is recognised by its pyproject.toml: a folder of that name in site-packages would be someone else's.
    in_checkout = not (package / "pretrained").is_dir() and (package.parent / "pyproject.toml").is_file()
    return (package.parent if in_checkout else package) / "pretrained"


def list_pretrained() -> list[str]:
    """The names of the bundled rules, sorted.

    Example:
        >>> import lightning_lopt as lopt
        >>> all(lopt.load_rule(name).source.name == name for name in lopt.list_pretrained())
        True
    """
    return sorted(path.parent.name for path in bundled_dir().glob(f"*/{CONFIG}"))


def find_dir(name_or_path: str | Path) -> Path | None:
    """The directory that is meant, or None for a Hub repo id."""
    name, bundled = os.fspath(name_or_path), list_pretrained()
    if os.path.isdir(name):
        if name in bundled and not Path(name, CONFIG).exists():
            raise ValueError(f"The directory {name!r} hides the bundled rule and has no {CONFIG}. Rename it.")
        return Path(name)
    if isinstance(name_or_path, Path):
        raise ValueError(f"{show(name)} is no directory. Pass one that save_rule wrote, or a name as str: {bundled}.")
    if "/" in name:
        return None
    if name in bundled:
        return bundled_dir() / name
    raise ValueError(
        f"Unknown rule {show(name)}: it is no directory, and bundled are {bundled}. Pass one of these, a directory "
        "that save_rule wrote, or a Hub repo 'owner/name'."
    )
