"""What each module may import, that there are no import circles, and that importing the package has no side effects.

`ARROWS` is the design: a module may import the modules of the package and the libraries that stand in its line.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_lopt"


class Arrows(NamedTuple):
    """What a part of the package may import: parts of the package, and libraries beside Python's own."""

    inside: set[str]
    outside: set[str]
    except_for: frozenset[str] = frozenset()


ARROWS = {  # the longest prefix of a module's name counts
    "rules": Arrows({"rules"}, {"torch"}),
    "kernels": Arrows({"rules", "kernels"}, {"torch", "triton"}),
    "optimizer": Arrows({"rules", "kernels", "optimizer"}, {"torch"}),
    "hub": Arrows({"rules", "hub"}, {"torch", "huggingface_hub", "safetensors"}),
    "plugin": Arrows({"rules", "kernels", "optimizer", "hub", "plugin"}, {"torch", "lightning"}),
    "plugin.disk_errors": Arrows(set(), {"lightning"}),
    "tasks": Arrows({"tasks"}, {"torch", "numpy", "sklearn", "torchvision"}),
    "meta": Arrows({"rules", "tasks", "meta"}, {"torch"}, except_for=frozenset({"meta.trainer", "meta.cli"})),
    "meta.fused": Arrows({"rules", "kernels"}, {"torch"}),
    "meta.trainer": Arrows(
        {"rules", "tasks", "meta", "hub", "plugin.disk_errors"}, {"torch", "torchmetrics", "lightning"}
    ),
    "meta.cli": Arrows({"rules", "tasks", "meta", "hub"}, {"torch", "lightning", "jsonargparse", "omegaconf"}),
    "analysis": Arrows({"rules", "tasks", "meta.unroll", "analysis"}, {"torch", "numpy"}),
    "analysis.plots": Arrows({"rules", "tasks", "meta.unroll", "analysis"}, {"torch", "numpy", "matplotlib"}),
    "analysis.schedule": Arrows({"rules"}, {"torch", "matplotlib"}),
    "analysis.report": Arrows({"analysis"}, {"matplotlib"}),
    "analysis.cli": Arrows({"rules", "tasks", "hub", "analysis"}, {"torch", "matplotlib"}),
    "evaluation": Arrows(
        {"rules", "optimizer", "hub", "tasks", "meta.unroll", "evaluation"}, {"torch", "rich", "matplotlib"}
    ),
    "claims": Arrows(
        {"rules", "optimizer", "hub", "tasks", "meta", "analysis", "evaluation", "claims", "__version__"},
        {"torch", "lightning", "rich", "matplotlib"},
    ),
}
ANYTHING = {PACKAGE, "cli"}  # the package's __init__ and the command
ONLY_WHEN_NEEDED = {"matplotlib", "rich", "sklearn", "torchvision"}  # extras, which a plain installation lacks


class Import(NamedTuple):
    """One imported name, in full."""

    line: int
    name: str
    when_needed: bool  # inside a function, or for type checkers alone


def violations(root: Path) -> list[str]:
    """`file:line module -> imported name`, for every import against `ARROWS` in the package under `root`."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__") or PACKAGE
        for item in imports(path, root):
            if not allowed(module, item):
                found.append(f"{path.relative_to(root).as_posix()}:{item.line} {module} -> {item.name}")
    return found


def imports(path: Path, root: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    when_needed = {id(node) for block in ast.walk(tree) if runs_when_needed(block) for node in ast.walk(block)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, id(node) in when_needed) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = path.relative_to(root).with_suffix("").parts
            above = [*here[: len(here) - node.level]] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [Import(node.lineno, f"{base}.{alias.name}", id(node) in when_needed) for alias in node.names]
    return found


def runs_when_needed(node: ast.AST) -> bool:
    is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    return is_function or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))


def allowed(module: str, item: Import) -> bool:
    if any(within(module, name) for name in ANYTHING):
        return True
    if not (room := max((name for name in ARROWS if within(module, name)), key=len, default=None)):
        return False  # a new part of the package: it needs a line in ARROWS
    library, _, rest = item.name.partition(".")
    if library != PACKAGE:
        known = library in sys.stdlib_module_names or library in ARROWS[room].outside
        return known and (item.when_needed or library not in ONLY_WHEN_NEEDED)
    if any(within(rest, name) for name in ARROWS[room].except_for):
        return False
    return any(within(rest, name) for name in ARROWS[room].inside)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def circle(root: Path) -> list[str]:
    """A circle of modules under `root` that import each other; empty if there is none."""
    paths = {}
    for path in (root / PACKAGE).rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(part for part in parts if part != "__init__")] = path
    # Imports inside functions and those for type checkers count too: they tie two modules together just the same.
    graph = {
        name: {owner(item.name, paths) for item in imports(path, root)} - {name, ""} for name, path in paths.items()
    }
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def owner(name: str, modules: dict[str, Path]) -> str:
    """The module that an imported name is or belongs to; empty for other libraries."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def test_no_module_looks_the_wrong_way():
    assert violations(ROOT) == []


def test_no_modules_import_each_other():
    assert circle(ROOT) == []


@pytest.mark.parametrize(
    "sources",
    [
        {"a.py": "from lightning_lopt.b import f", "b.py": "from lightning_lopt import a"},
        {"a.py": "from .b import f", "b.py": "import lightning_lopt.c", "c.py": "def f():\n    from . import a"},
        {"rules/__init__.py": "from . import star", "rules/star.py": "from lightning_lopt.rules import make"},
        {"a.py": "if TYPE_CHECKING:\n    from lightning_lopt import b", "b.py": "import lightning_lopt.a"},
    ],
    ids=["two modules", "three modules, inside a function", "a package and its module", "for type checkers"],
)
def test_a_circle_is_found(tmp_path, sources):
    for name, source in {"__init__.py": "", **sources}.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    names = {f"{PACKAGE}/{name}".removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources}
    assert set(circle(tmp_path)) == names


@pytest.mark.parametrize(
    ("path", "source", "imported"),
    [
        ("rules/bad.py", "import lightning", "lightning"),
        ("rules/bad.py", "import numpy as np", "numpy"),
        ("rules/bad.py", "from lightning_lopt.hub import load", "lightning_lopt.hub.load"),
        ("rules/bad.py", "from lightning_lopt import rules, hub", "lightning_lopt.hub"),
        ("rules/bad.py", "import lightning_lopt as lopt", "lightning_lopt"),
        (
            "rules/bad.py",
            "from ..plugin.callback import LearnedOptimizer",
            "lightning_lopt.plugin.callback.LearnedOptimizer",
        ),
        ("rules/__init__.py", "from .. import optimizer", "lightning_lopt.optimizer"),
        ("rules/bad.py", "def f():\n    import lightning.pytorch", "lightning.pytorch"),
        (
            "kernels/bad.py",
            "from lightning_lopt.optimizer import RuleOptimizer",
            "lightning_lopt.optimizer.RuleOptimizer",
        ),
        ("tasks/bad.py", "from lightning_lopt.rules import make", "lightning_lopt.rules.make"),
        ("tasks/bad.py", "import sklearn.datasets", "sklearn.datasets"),
        (
            "meta/unroll.py",
            "from lightning_lopt.meta.trainer import MetaTrainer",
            "lightning_lopt.meta.trainer.MetaTrainer",
        ),
        ("meta/unroll.py", "from .trainer import MetaTrainer", "lightning_lopt.meta.trainer.MetaTrainer"),
        ("meta/estimators.py", "from lightning.pytorch import LightningModule", "lightning.pytorch.LightningModule"),
        ("analysis/dynamics.py", "def f():\n    import matplotlib", "matplotlib"),
        ("analysis/plots.py", "import matplotlib.pyplot as plt", "matplotlib.pyplot"),
        ("hub.py", "from lightning_lopt.optimizer import RuleOptimizer", "lightning_lopt.optimizer.RuleOptimizer"),
        ("optimizer/bad.py", "import lightning", "lightning"),
        ("evaluation/bad.py", "from lightning_lopt import claims", "lightning_lopt.claims"),
        ("evaluation/bad.py", "def f():\n    import lightning_lopt.claims.cli", "lightning_lopt.claims.cli"),
        ("utils.py", "import os", "os"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path, path, source, imported):
    file = tmp_path / PACKAGE / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert violations(tmp_path) == [f"{PACKAGE}/{path}:{source.count(chr(10)) + 1} {module} -> {imported}"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from lightning_lopt import plugin, rules"),
        ("cli.py", "import anything"),
        (
            "rules/good.py",
            "from __future__ import annotations\nimport math, torch\nfrom torch import nn\nfrom .base import make",
        ),
        ("rules/__init__.py", "from . import base\nfrom .base import make"),
        ("kernels/good.py", "import triton\nfrom lightning_lopt.rules import features as feats"),
        ("tasks/good.py", "def f():\n    import sklearn.datasets"),
        ("meta/unroll.py", "from lightning_lopt.meta.schedules import Schedule\nfrom .. import rules, tasks"),
        ("meta/trainer.py", "import lightning.pytorch as pl\nfrom . import estimators, unroll"),
        ("analysis/plots.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import matplotlib"),
        ("analysis/dynamics.py", "from lightning_lopt.meta.unroll import unroll"),
    ],
)
def test_a_right_arrow_is_not_reported(tmp_path, path, source):
    file = tmp_path / PACKAGE / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == []


# Looks before and after the import. The libraries that the package stands on are in already: all that shows is its own.
GLOBAL_STATE = """
import logging, os, random, signal, sys, warnings
import lightning.pytorch, numpy, pytorch_lightning.strategies, torch, torchmetrics, safetensors.torch, huggingface_hub

happened = []

def audit(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.system", "urllib.")):
        happened.append(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        happened.append(f"open {arguments}")

def state():
    return {
        "torch generator": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy generator": hash(str(numpy.random.get_state())),
        "random generator": hash(random.getstate()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "dtype": str(torch.get_default_dtype()),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "warnings": str(warnings.filters),
        "logging": [logging.root.level, str(logging.root.handlers), logging.root.manager.disable],
        "hooks": str([sys.excepthook, sys.stdout, signal.getsignal(signal.SIGTERM)]),
    }

before = state()
sys.addaudithook(audit)
import lightning_lopt
happened = list(happened)
after = state()
assert {k: v for k, v in after.items() if before[k] != v} == {}
assert happened == [], happened
"""


def run_python(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{source}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_importing_the_package_does_nothing_else(tmp_path):
    result = run_python(GLOBAL_STATE, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


ASKED_FOR = """
import builtins
import_module, asked = builtins.__import__, set()

def record(name, globals=None, *rest):
    if globals and globals.get("__name__", "").partition(".")[0] == "lightning_lopt":
        asked.add(name.partition(".")[0])
    return import_module(name, globals, *rest)

builtins.__import__ = record
import lightning_lopt
assert "torch" in asked
assert not asked & {"matplotlib", "sklearn", "torchvision", "jsonargparse", "triton"}, asked
"""


def test_importing_the_package_asks_for_no_extra(tmp_path):
    """Libraries that a plain installation lacks, or that are slow to load, are imported when they are used."""
    result = run_python(ASKED_FOR, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
