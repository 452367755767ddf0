"""``python -m benchmarks``: what runs by default, unknown names, a failure among several."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import __main__ as runner


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name, what in (("planner", "Plan times."), ("capacity", "Capacity table.\n\nTakes long."), ("_shared", "")):
        (tmp_path / f"{name}.py").write_text(f'"""{what}"""\n')
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    names: list[str] = []

    def record(name: str) -> int:
        names.append(name)
        return 1 if name == "capacity" else 0

    monkeypatch.setattr(runner, "run", record)
    return names


def test_lists_each_with_its_first_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--list"]) == 0
    assert capsys.readouterr().out.split("\n") == ["capacity     Capacity table.", "planner      Plan times.", ""]


def test_default_leaves_out_what_takes_long(ran: list[str]) -> None:
    assert runner.main([]) == 0
    assert ran == ["planner"]


def test_unknown_name_runs_nothing(ran: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["planner", "plannr"]) == 2
    assert ran == []
    assert "no benchmark plannr; there are: capacity, planner" in capsys.readouterr().err


def test_one_failure_does_not_hide_the_rest(ran: list[str]) -> None:
    assert runner.main(["capacity", "planner"]) == 1
    assert ran == ["capacity", "planner"]
