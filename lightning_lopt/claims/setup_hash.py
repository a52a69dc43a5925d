"""A hash of what a claim's numbers depend on, by which `lopt reproduce` knows whether a result is still that claim's.

It covers the code and constants of this folder that the claim's `measure` reaches, its seeds and scale, and the weights
of the bundled rules that it names. It leaves out checks, texts and plots, which can change without a new measurement,
and the rest of the package: rules, tasks and meta-training. Measure anew with `--fresh` after a change there.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import textwrap
import tokenize
import types
from collections.abc import Callable, Mapping
from typing import Any

from lightning_lopt import hub
from lightning_lopt.claims.claim import Claim
from lightning_lopt.hub.bundle import find_dir

PACKAGE = __name__.rpartition(".")[0]
FILES = ("config.json", "model.safetensors")


def setup_hash(claim: Claim, *, quick: bool = False) -> str:
    """The hash of a claim's setup at a scale; see the module's docstring.

    Example:
        >>> from lightning_lopt.claims import find
        >>> (claim,) = find(["nqm-theorem-1"])
        >>> setup_hash(claim) == setup_hash(claim), setup_hash(claim) == setup_hash(claim, quick=True)
        (True, False)
    """
    walk = _Walk(claim.measure)
    walk.visit(claim.measure)
    lines = sorted(walk.lines) + [f"seeds {claim.quick_seeds if quick else claim.seeds}", f"quick {quick}"]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


class _Walk:
    """Collects a line per function, class and constant that a function reaches."""

    def __init__(self, measure: Callable[..., Any]) -> None:
        while isinstance(measure, functools.partial):
            measure = measure.func
        self.modules = (PACKAGE, getattr(measure, "__module__", ""))
        self.rules = set(hub.list_pretrained())
        self.lines: set[str] = set()
        self.seen: set[int] = set()
        self.kept: list[Any] = []  # ids are unique only among objects that are alive

    def visit(self, found: Any) -> None:
        """Collect from an object, once."""
        if isinstance(found, str):
            self._string(found)
        if id(found) in self.seen:
            return
        self.seen.add(id(found))
        self.kept.append(found)
        if isinstance(found, functools.partial):
            self.visit(found.func)
            self._value(f"arguments of {found.func.__qualname__}", (found.args, sorted(found.keywords.items())))
        elif isinstance(found, types.MethodType):
            self.visit(found.__func__)
        elif isinstance(found, types.FunctionType):
            self._function(found)
        elif isinstance(found, type):
            self._class(found)
        elif isinstance(found, Mapping):
            for key, value in found.items():
                self.visit(key)
                self.visit(value)
        elif isinstance(found, (tuple, list, set, frozenset)):
            for value in found:
                self.visit(value)

    def _string(self, text: str) -> None:
        if text not in self.rules:
            return
        directory = find_dir(text)
        for name in FILES if directory else ():
            assert directory is not None
            self.lines.add(f"{text}/{name} {hashlib.sha256((directory / name).read_bytes()).hexdigest()}")

    def _ours(self, found: Any) -> bool:
        module = getattr(found, "__module__", None) or ""
        return module == self.modules[1] or module == PACKAGE or module.startswith(f"{PACKAGE}.")

    def _function(self, function: types.FunctionType) -> None:
        if not self._ours(function):
            return
        self.lines.add(f"{function.__module__}.{function.__qualname__}: {_source(function)}")
        for cell in function.__closure__ or ():
            self._value(f"cell of {function.__qualname__}", cell.cell_contents)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.visit(default)
        names, constants = _names(function.__code__)
        for constant in constants:
            self.visit(constant)
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            if isinstance(value, types.ModuleType):  # one of ours, used as module.name
                if value.__name__.startswith(f"{PACKAGE}."):
                    for inner in sorted(names & vars(value).keys()):
                        self._value(f"{value.__name__}.{inner}", vars(value)[inner])
            else:
                self._value(f"{function.__module__}.{name}", value)

    def _class(self, found: type) -> None:
        if not self._ours(found):
            return
        self.lines.add(f"{found.__module__}.{found.__qualname__}: {_source(found)}")
        for value in vars(found).values():
            if isinstance(value, types.FunctionType):
                self._function(value)

    def _value(self, name: str, value: Any) -> None:
        """A global or an enclosing function's variable: its value, if it is data."""
        self.visit(value)
        if not isinstance(value, (types.FunctionType, type, types.ModuleType)):
            text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
            self.lines.add(f"{name} = {text}")


def _names(code: types.CodeType) -> tuple[set[str], list[str]]:
    """The names and the string constants of a function and of those inside it."""
    names = set(code.co_names)
    constants = []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_names, inner_constants = _names(constant)
            names |= inner_names
            constants += inner_constants
        elif isinstance(constant, str):
            constants.append(constant)
    return names, constants


def _source(found: Any) -> str:
    """The code without comments, docstrings and blanks; of a lambda inside an expression, the names that it uses.

    Works by positions alone: what `ast.unparse` writes depends on Python's version.
    """
    try:
        source = textwrap.dedent(inspect.getsource(found))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        names, constants = _names(found.__code__) if hasattr(found, "__code__") else (set(), [])
        return f"{sorted(names)} {constants}"
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(iter(list(lines)).__next__):
        if token.type == tokenize.COMMENT:
            row = token.start[0] - 1
            lines[row] = lines[row][: token.start[1]] + "\n"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            first = node.body[0]
            assert first.end_lineno is not None
            lines[first.lineno - 1 : first.end_lineno] = ["\n"] * (first.end_lineno - first.lineno + 1)
    return "".join("".join(lines).split())
