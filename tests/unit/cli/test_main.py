"""The command itself: its version, and what it says where an extra is not installed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slos_serve.cli.main import EXTRAS, app
from slos_serve.version import VERSION

ROOT = Path(__file__).parents[3]


def test_the_version() -> None:
    said = CliRunner().invoke(app, ["--version"])
    assert (said.exit_code, said.stdout) == (0, f"slos-serve {VERSION}\n")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "slos_serve.cli.bench", None)
    monkeypatch.setattr("slos_serve.cli.main.EXTRAS", {"slos_serve": "bench"})
    said = CliRunner().invoke(app, ["bench"])
    assert said.exit_code == 2 and "pip install 'slos-serve[bench]'" in said.stderr


def test_other_missing_modules_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "slos_serve.cli.bench", None)
    assert isinstance(CliRunner().invoke(app, ["bench"]).exception, ModuleNotFoundError)


def test_every_extra_that_is_named_exists() -> None:
    table = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    declared = set(re.findall(r"^(\w+) = \[", table.partition("\n[")[0], re.MULTILINE))
    assert set(EXTRAS.values()) == declared


@pytest.mark.parametrize(
    ("words", "at", "found"), [("slos-serve ex", 1, "explain"), ("slos-serve bench --dat", 2, "--dataset")]
)
def test_shells_complete_commands_and_options(words: str, at: int, found: str) -> None:
    asked = {"_SLOS_SERVE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
    said = CliRunner().invoke(app, [], prog_name="slos-serve", env=asked)
    assert said.stdout.split() == [found]


@pytest.mark.parametrize(
    "words",
    [
        "capacity --json",
        "simulate --scenario chat --rate 1 --json",
        "size --mix examples/mix.yaml --classes examples/classes.yaml --plot",
        "explain --prompt-tokens 5 --json",
        "bench --base-url http://s:1 --classes examples/classes.yaml --workload chat --rate 1 --duration 1 --csv",
        "bench --base-url http://s:1 --classes examples/classes.yaml --workload chat --rate 1 --duration 1 --record",
        "compare http://s:1 http://s:2 --classes examples/classes.yaml --workload chat --rate 1 --duration 1 --json",
        "serve tiny --json",
        "profile tiny --output",
        "demo --png",
        "report x.json --output",
    ],
)
def test_a_result_that_cannot_be_written_is_refused_before_anything_runs(words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for given in (tmp_path / "file" / "result", tmp_path):
        said = CliRunner().invoke(app, [*words.split(), str(given)])
        assert said.exit_code == 2 and "cannot be written" in " ".join(re.sub("[│\n]", " ", said.stderr).split())


def test_completing_a_line_makes_no_folders(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    words = f"slos-serve simulate --json {folder}/result.json --sc"
    given = {"_SLOS_SERVE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "4"}
    said = CliRunner().invoke(app, [], prog_name="slos-serve", env=given)
    assert "--scenario" in said.output
    assert not folder.exists()
