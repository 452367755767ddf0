"""The pure packages do no I/O, read no clock and draw no random numbers of their own: checked on their syntax trees.

import-linter holds what they import; this holds what they call, and catches the same imports without installing it.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import slos_serve

SOURCES = Path(slos_serve.__file__).parent
PYPROJECT = SOURCES.parent.parent / "pyproject.toml"
FORBIDDEN_CALLS = frozenset({"open", "print", "input", "exec", "eval", "__import__", "breakpoint"})
# A generator comes in as an argument; `Generator` may be named for that, nothing else of numpy.random.
ALLOWED_OF_NUMPY_RANDOM = frozenset({"Generator"})
NUMPY_IO = frozenset({"load", "loadtxt", "save", "savetxt", "savez", "fromfile", "genfromtxt", "memmap"})


def purity_contract() -> dict[str, list[str]]:
    """import-linter's contract of the pure packages: one list of names serves both checks."""
    contracts = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    contract: dict[str, list[str]] = next(contract for contract in contracts if contract["type"] == "forbidden")
    return contract


PACKAGES = [name.removeprefix("slos_serve.") for name in purity_contract()["source_modules"]]
FORBIDDEN_IMPORTS = frozenset(purity_contract()["forbidden_modules"])


def dotted_name(node: ast.expr) -> str:
    """``a.b.c`` for an attribute chain that starts at a plain name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        prefix = dotted_name(node.value)
        return f"{prefix}.{node.attr}" if prefix else ""
    return ""


def top_level(module: str) -> str:
    return module.partition(".")[0]


def numpy_impurity(name: str) -> bool:
    """Whether a dotted name draws random numbers or reads and writes files through numpy."""
    root, *parts = name.split(".")
    if root not in {"np", "numpy"} or not parts:
        return False
    if parts[0] == "random":
        return len(parts) > 1 and parts[1] not in ALLOWED_OF_NUMPY_RANDOM
    return parts[0] in NUMPY_IO


def imported_impurities(node: ast.AST) -> Iterator[str]:
    """What an import statement brings in that a pure module may not have."""
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
        yield from (f"import {module}" for module in modules if top_level(module) in FORBIDDEN_IMPORTS)
        yield from (f"import {module}" for module in modules if module.startswith("numpy.random"))
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if top_level(module) in FORBIDDEN_IMPORTS:
            yield f"from {module} import"
        names = [f"{module}.{alias.name}" for alias in node.names]
        yield from (f"from {module} import" for name in names if numpy_impurity(name))


def impurities(source: str) -> list[str]:
    """Each impurity of a module's source, as ``line: what``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        found += [f"{line}: {what}" for what in imported_impurities(node)]
        if isinstance(node, ast.Call) and dotted_name(node.func) in FORBIDDEN_CALLS:
            found.append(f"{line}: {dotted_name(node.func)}()")
        if isinstance(node, ast.Attribute) and numpy_impurity(dotted_name(node)):
            found.append(f"{line}: {dotted_name(node)}")
    return found


def pure_modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (SOURCES / package).rglob("*.py"))


@pytest.mark.parametrize("path", pure_modules(), ids=lambda path: str(path.relative_to(SOURCES)))
def test_module_is_pure(path: Path) -> None:
    assert impurities(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "import os.path",
        "from random import choice",
        "from time import monotonic as now",
        "from numpy.random import default_rng",
        "import numpy.random as npr",
        "import numpy as np\nrng = np.random.default_rng(0)",
        "import numpy as np\nx = np.random.random()",
        "import numpy as np\nx = np.load('f')",
        "open('f')",
        "print(1)",
        "def f():\n    import logging",
    ],
)
def test_impurity_is_found(source: str) -> None:
    assert impurities(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\ndef f(rng: np.random.Generator) -> float:\n    return float(rng.random())",
        "from numpy.random import Generator",
        "import math\nx = math.exp(1.0)",
        "class Plan:\n    def open(self) -> None: ...\nPlan().open()",
    ],
)
def test_purity_is_not_mistaken(source: str) -> None:
    assert impurities(source) == []
