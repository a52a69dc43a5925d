"""Find claims: those of this package by name, and a user's own by the path of a Python file or a folder."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import pkgutil
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from lightning_lopt.claims.claim import Claim

TEMPLATE = "CLAIMS = (Claim(...),), with Claim from lightning_lopt.claims"


def find_all() -> dict[str, Claim]:
    """All claims of this package, by their ids.

    Raises:
        ValueError: two claims have the same id.
    """
    package = __name__.rpartition(".")[0]
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    return _by_id([claim for module in modules for claim in getattr(module, "CLAIMS", ())])


def find(targets: Sequence[str]) -> list[Claim]:
    """The claims that the targets name, each once.

    Args:
        targets: ids of this package's claims, and paths of Python files, or folders of them, with claims of your own.

    Raises:
        ValueError: an id is unknown or taken, or a file has no claims or cannot be loaded.
    """
    known = find_all()
    found: list[Claim] = []
    for target in dict.fromkeys(targets):
        if target in known:  # also if a folder has this name; "./name" is the folder
            found.append(known[target])
        elif target.endswith(".py") or Path(target).exists():
            found += load(target)
        else:
            close = difflib.get_close_matches(target, known, n=3)
            hint = f"Did you mean {' or '.join(close)}?" if close else f"Known claims are {', '.join(known)}."
            raise ValueError(f"Unknown claim {target!r}; it is not the path of a file or folder either. {hint}")
    _by_id([*known.values(), *(claim for claim in found if claim.path)])  # ids must differ from the bundled ones too
    return found


def load(path: str) -> list[Claim]:
    """The claims of a Python file, or of all files in a folder that mention `CLAIMS`. Their code is run.

    Raises:
        ValueError: there are no claims, or a file cannot be loaded.
    """
    place = Path(path)
    files = [place]
    if place.is_dir():
        files = [file for file in sorted(place.glob("*.py")) if re.search(rb"\bCLAIMS\b", file.read_bytes())]
        if not files:
            raise ValueError(f"{path}: none of its Python files has CLAIMS; write {TEMPLATE}.")
    elif not place.is_file():
        raise ValueError(f"{path}: there is no such file; name an existing Python file or a folder.")
    elif place.suffix != ".py":
        raise ValueError(f"{path} is not a Python file; name a .py file or a folder with some.")
    return [dataclasses.replace(claim, path=path) for file in files for claim in _claims_of(file)]


def _claims_of(file: Path) -> Sequence[Claim]:
    claims = getattr(_run(file), "CLAIMS", None)
    if claims is None:
        raise ValueError(f"{file} has no CLAIMS; write {TEMPLATE}.")
    if not isinstance(claims, (tuple, list)) or not all(isinstance(claim, Claim) for claim in claims):
        raise ValueError(f"{file}: CLAIMS must be a tuple of claims, not {str(claims)[:60]}; write {TEMPLATE}.")
    if not claims:
        raise ValueError(f"{file}: CLAIMS is empty; write {TEMPLATE}.")
    return claims


def _run(file: Path) -> ModuleType:
    """Import a file, wherever it is. It can import its neighbors, which come after installed modules of their names."""
    name = str(file.resolve())
    spec = importlib.util.spec_from_file_location(name, name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    if str(file.resolve().parent) not in sys.path:
        sys.path.append(str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        where = file if error.filename == name else error.filename
        raise ValueError(f"{where}, line {error.lineno}: {error.msg}. Correct the file and try again.") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        where = f"{file}, line {lines[-1]}" if lines else str(file)
        about = f"{type(error).__name__}: {error}".rstrip(".")
        raise ValueError(f"{where}: {about}. Correct the file and try again.") from error
    return module


def _by_id(claims: Sequence[Claim]) -> dict[str, Claim]:
    by_id: dict[str, Claim] = {}
    for claim in claims:
        if claim.id in by_id:
            places = " and in ".join(each.path or "lightning_lopt" for each in (by_id[claim.id], claim))
            raise ValueError(f"The claim id {claim.id!r} is taken: it is in {places}. Choose another id.")
        by_id[claim.id] = claim
    return by_id
