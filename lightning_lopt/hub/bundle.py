"""The bundled rules and their names."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_lopt.hub.errors import show
from lightning_lopt.hub.files import CONFIG


def bundled_dir() -> Path:
    """Return the folder of the bundled rules: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    # pyproject.toml marks a checkout. Without one, a folder "pretrained" beside the package (in site-packages) belongs
    # to someone else.
    in_checkout = not (package / "pretrained").is_dir() and (package.parent / "pyproject.toml").is_file()
    return (package.parent if in_checkout else package) / "pretrained"


def list_pretrained() -> list[str]:
    """Return the names of the bundled rules, sorted.

    Example:
        >>> import lightning_lopt as lopt
        >>> all(lopt.load_rule(name).source.name == name for name in lopt.list_pretrained())
        True
    """
    return sorted(path.parent.name for path in bundled_dir().glob(f"*/{CONFIG}"))


def find_dir(name_or_path: str | Path) -> Path | None:
    """Return the directory that a name or path refers to, or None for a Hub repo id.

    A bundled name wins over a directory of the same name, so that a folder that happens to be called "star" in the
    working directory does not change what `load_rule("star")` loads. "./star" and `Path("star")` mean the directory.

    Raises:
        ValueError: if it is neither a bundled name, nor a directory, nor something like a Hub repo id.
    """
    name = os.fspath(name_or_path)
    bundled = list_pretrained()
    is_path = isinstance(name_or_path, Path)
    if name in bundled and not is_path:
        return bundled_dir() / name
    if os.path.isdir(name):
        return Path(name)
    if is_path:
        raise ValueError(
            f"{show(name)} is not a directory. Pass one that save_rule wrote, or a name as str: {bundled}."
        )
    if "/" in name:
        return None
    raise ValueError(
        f"Unknown rule {show(name)}: it is neither a bundled rule nor a directory. Pass one of {bundled}, a directory "
        "that save_rule wrote, such as './my-rule', or a Hub repo 'owner/name'."
    )
