"""The claims by name: those in the `CLAIMS` of this package's modules."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from lightning_lopt.claims.base import Claim


def find_all() -> dict[str, Claim]:
    """All claims, by their ids.

    Raises:
        ValueError: if two claims have the same id.
    """
    here = __name__.rpartition(".")[0]
    found: list[Claim] = []
    for module in sorted(pkgutil.iter_modules([str(Path(__file__).parent)]), key=lambda module: module.name):
        found += getattr(importlib.import_module(f"{here}.{module.name}"), "CLAIMS", ())
    claims = {claim.id: claim for claim in found}
    if len(claims) < len(found):
        raise ValueError(f"Several claims have the same id; the ids are {sorted(claim.id for claim in found)}.")
    return claims


def find(names: Sequence[str]) -> list[Claim]:
    """The claims of these names, each once.

    Raises:
        ValueError: for an unknown name.
    """
    claims = find_all()
    for name in names:
        if name not in claims:
            close = difflib.get_close_matches(name, claims, n=3)
            hint = f"Did you mean {' or '.join(close)}?" if close else f"There are {', '.join(claims)}."
            raise ValueError(f"Unknown claim {name!r}. {hint} `lopt reproduce --list` tells what each is.")
    return [claims[name] for name in dict.fromkeys(names)]
