"""pyproject.toml declares what the package imports, and nothing that it does not."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "src" / "slos_serve"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {"yaml": "pyyaml", "zmq": "pyzmq"}
# vLLM's own requirements, without which it does not start.
WITH_VLLM = {"opentelemetry", "torch", "transformers"}
# What Ray Serve LLM imports and `ray[serve]` does not bring.
FOR_RAY_LLM = {"fsspec", "hf_transfer", "jsonref", "pandas", "pyarrow"}


def imported() -> set[str]:
    """Distributions that the package imports, anywhere."""
    names: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names.add(node.module.partition(".")[0])
    third_party = names - set(sys.stdlib_module_names) - {"slos_serve"}
    return {DISTRIBUTIONS.get(name, name) for name in third_party}


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~! ]", requirement, maxsplit=1)[0] for requirement in requirements}


def test_every_import_is_declared_and_every_declaration_imported() -> None:
    base = declared(PROJECT["project"]["dependencies"])
    extras = set().union(*(declared(names) for names in PROJECT["project"]["optional-dependencies"].values()))
    assert imported() - base - extras == WITH_VLLM
    assert base - imported() == set()
    assert extras - imported() == FOR_RAY_LLM


def test_every_pattern_of_package_data_matches_a_file() -> None:
    for pattern in PROJECT["tool"]["setuptools"]["package-data"]["slos_serve"]:
        assert any(SOURCE.glob(pattern)), pattern


def test_what_is_declared_is_pinned() -> None:
    pins = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8")
    for name in declared(PROJECT["project"]["dependencies"]):
        assert re.search(rf"^{re.escape(name).replace('_', '[-_]')}==", pins, re.MULTILINE | re.IGNORECASE), name
