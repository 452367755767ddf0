"""``slos-serve demo`` with the engine left out: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from slos_serve.bench import demo as demo_module
from slos_serve.bench.demo_events import SchedulerEvents
from slos_serve.bench.demo_plan import DemoPlan
from slos_serve.bench.demo_report import OURS, STOCK, SideRun
from slos_serve.cli.main import app
from slos_serve.core.errors import SlosServeError
from slos_serve.files.engine_identity import EngineIdentity
from slos_serve.files.profile_file import Profile, save_profile
from slos_serve.launch.cpu_engine import CPU_ENVIRONMENT
from slos_serve.sim.replay import read_record
from tests.unit.bench.builders import MODEL, agents_side, demo_side

IDENTITY = EngineIdentity(
    model="tiny", device="Some CPU, 2 cores", engine_version="0.32.0", dtype="bfloat16", tensor_parallel=1
)
PROFILE = Profile(
    model_name="tiny",
    device="Some CPU, 2 cores",
    engine="vllm",
    engine_version="0.32.0",
    created="2026-01-01T00:00:00+00:00",
    dtype="bfloat16",
    tensor_parallel=1,
    kv_capacity_tokens=40_000,
    block_size=128,
    max_num_batched_tokens=2048,
    model=MODEL,
)
Sides = Callable[..., dict[str, SideRun]]


def good_sides(_setup: object, plan: DemoPlan, _folder: Path, *, classes: Path, told: Any) -> dict[str, SideRun]:
    """Stock keeps the first five promises of the burst, ours twenty."""
    assert classes.is_file()
    told.starting(1.0)
    told.phase(STOCK, "burst", len(plan.burst))
    verdicts = {request.request_id: "admitted" for request in (*plan.calm, *plan.burst[:20])}
    return {
        STOCK: demo_side(plan, slow_from=5),
        OURS: demo_side(plan, slow_from=20, events=SchedulerEvents(verdicts)),
    }


def bad_sides(*_arguments: object, **_options: object) -> dict[str, SideRun]:
    raise SlosServeError("the server died [here]")


def demo_sides(json_file: Path) -> list[Any]:
    result = json.loads(json_file.read_text(encoding="utf-8"))
    return [result[OURS]["calm"], result[OURS]["burst"]]


def run_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sides: Sides, *arguments: str) -> Result:
    """The command with an engine that is known and never started."""
    engine = SimpleNamespace(profile_engine=lambda *_, **__: pytest.fail("a profile was given"))
    monkeypatch.setitem(sys.modules, "slos_serve.profiling.run", engine)
    monkeypatch.setattr("slos_serve.cli.demo._identity", lambda model: replace(IDENTITY, model=model))
    monkeypatch.setitem(sys.modules, "slos_serve.launch.cpu_model", SimpleNamespace(resolve_model=lambda name: name))
    monkeypatch.setattr(demo_module, "run_sides", sides)
    for name, value in CPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # the command sets them too; this way they are gone after the test
    path = tmp_path / "profile.json"
    save_profile(PROFILE, path)
    return CliRunner().invoke(
        app, ["demo", "--model", "tiny", "--profile", str(path), *arguments], env={"COLUMNS": "200"}
    )


def test_writes_what_it_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    json_file, png = tmp_path / "out" / "demo.json", tmp_path / "out" / "demo.png"
    records = tmp_path / "records"
    arguments = ("--json", str(json_file), "--png", str(png), "--record", str(records))
    ran = run_demo(monkeypatch, tmp_path, good_sides, *arguments)
    assert ran.exit_code == 0, ran.output
    rows = read_record(records / "slos_serve.jsonl")
    assert len(rows) == sum(side["requests"] + side["no_slo"]["requests"] for side in demo_sides(json_file))
    assert [row["sent_s"] for row in rows] == sorted(row["arrival_s"] for row in rows)
    result = json.loads(json_file.read_text(encoding="utf-8"))
    assert f"{result['ratio']:.2f} times as many" in ran.output
    assert result["setup"]["device"] == IDENTITY.device and result["setup"]["burst_load"] > 1.0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "no  " not in ran.output and "Each side gets" in ran.output


def test_phases_can_be_made_longer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    json_file = tmp_path / "demo.json"
    longer = ("--calm-seconds", "40", "--burst-seconds", "60", "--burst-load", "1.2")
    assert run_demo(monkeypatch, tmp_path, good_sides, "--json", str(json_file), *longer).exit_code == 0
    setup = json.loads(json_file.read_text(encoding="utf-8"))["setup"]
    assert (setup["calm_s"], setup["burst_s"], setup["burst_load"]) == (40.0, 60.0, 1.2)


def test_failure_says_where_the_logs_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = run_demo(monkeypatch, tmp_path, bad_sides)
    assert ran.exit_code == 1
    assert "the server died [here]" in ran.output and "logs are in" in ran.output
    assert "Traceback" not in ran.output


def test_a_profile_of_another_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = run_demo(monkeypatch, tmp_path, good_sides, "--model", "other")
    assert ran.exit_code == 2
    assert "measured on something else" in ran.output


def agents_sides(
    _setup: object, plan: DemoPlan, _folder: Path, *, classes: Path, told: Any
) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """Stock keeps the first twenty of the burst, ours forty."""
    assert "task_ms" in classes.read_text(encoding="utf-8")
    told.starting(1.0)
    return {STOCK: agents_side(plan, 20), OURS: agents_side(plan, 40)}, []


def test_the_story_of_agents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    json_file = tmp_path / "agents.json"
    monkeypatch.setattr(demo_module, "send_to_both", agents_sides)
    ran = run_demo(monkeypatch, tmp_path, bad_sides, "--story", "agents", "--json", str(json_file))
    assert ran.exit_code == 0, ran.output
    result = json.loads(json_file.read_text(encoding="utf-8"))
    assert f"{result['ratio']:.2f} times as many tasks and answers" in ran.output
    assert result["ratio"] > 1.3 and set(result["setup"]["classes"]) == {"chat", "answer", "task"}
    assert "What users wait for" in ran.output and "no  " not in ran.output


def test_a_chart_is_of_streams_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = run_demo(monkeypatch, tmp_path, bad_sides, "--story", "agents", "--png", str(tmp_path / "x.png"))
    assert ran.exit_code == 2
    assert "--png" in ran.output
