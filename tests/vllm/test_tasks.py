"""Deadlines of whole tasks, on vLLM's real scheduler in virtual time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from slos_serve.perf.tasks import TaskKey
from slos_serve.testing.dry_engine import DryEngine
from slos_serve.testing.request import PLAIN
from slos_serve.vllm_plugin.scheduler import SLOScheduler
from tests.vllm.dry_load import Start, assert_answers, events, lengths, prompt

CLASSES = """
classes:
  chat: {ttft_ms: 3000, tpot_ms: 150}
  coder: {task_ms: 12000, task_calls: 3, last_round: chat}
trust:
  custom_numbers: false
  tenant_header: x-tenant
"""


@pytest.fixture(autouse=True)
def with_tasks(start: Start, tmp_path: Path) -> None:
    """A class whose calls belong to tasks, beside a chat; nobody may bring numbers."""
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")


def add(engine: DryEngine, name: str, tokens: int, answer: int, slo: Mapping[str, Any] | None = None) -> None:
    lengths[name] = (prompt(np.random.default_rng(len(lengths)), tokens), answer)
    engine.add(name, *lengths[name], slo, PLAIN)


def run_task(engine: DryEngine, session: str, calls: int = 3, *, marks_last: bool = True) -> float:
    """Calls that follow each other; seconds from the first to the end of the last."""
    begun_s = engine.now_s
    for number in range(calls):
        name = f"{type(engine.scheduler).__name__} {session} {number}"
        last = marks_last and number == calls - 1
        add(engine, name, 400, 40, {"slo_class": "coder", "session_id": session, "slo_last_round": int(last)})
        while len(engine.answers[name]) < 40:
            engine.step()
    return engine.now_s - begun_s


def burst(engine: DryEngine, count: int) -> None:
    """Requests without a promise come at once."""
    for number in range(count):
        add(engine, f"{type(engine.scheduler).__name__} bulk {number}", 4000, 20)


def test_a_task_is_kept_beside_bulk_work_that_came_first(start: Start, tmp_path: Path) -> None:
    took_s = {}
    for cls in (AsyncScheduler, SLOScheduler):
        engine = start(cls)
        burst(engine, 30)
        took_s[cls] = run_task(engine, "t")
        engine.run()
        assert_answers(engine)
    assert took_s[SLOScheduler] <= 12.0 < took_s[AsyncScheduler], took_s
    (ended,) = events(tmp_path, "task")
    assert (ended["session"], ended["calls"], ended["kept"], ended["verdict"]) == ("t", 3, True, "admitted")
    assert ended["slo_class"] == "coder"
    calls = [event for event in events(tmp_path, "request") if event["verdict"] != "no-slo"]
    assert [event["slo_class"] for event in calls] == ["coder", "coder", "chat"]
    assert all(event["e2e_ok"] for event in calls)


def test_a_task_that_cannot_be_kept_is_served_and_counted_once(start: Start, tmp_path: Path) -> None:
    engine = start()
    run_task(engine, "long", 24)
    assert_answers(engine)
    (ended,) = events(tmp_path, "task")
    assert (ended["kept"], ended["calls"]) == (False, 24)
    metrics = engine.scheduler._slo.recorder.metrics
    assert metrics._violations["coder", ended["verdict"], "task"]._value.get() == 1.0
    assert metrics._tasks["coder", ended["verdict"]]._value.get() == 1.0
    assert metrics._tasks_attained["coder", ended["verdict"]]._value.get() == 0.0
    late = [event for event in events(tmp_path, "request") if event["e2e_ok"] is False]
    assert 0 < len(late) < 24


def test_a_call_without_a_session_or_with_forbidden_numbers_is_served_without_a_promise(
    start: Start, tmp_path: Path
) -> None:
    engine = start()
    add(engine, "no session", 100, 10, {"slo_class": "coder"})
    add(engine, "own numbers", 100, 10, {"slo_task_ms": 100, "session_id": "s"})
    engine.run()
    assert_answers(engine)
    assert {event["verdict"] for event in events(tmp_path, "request")} == {"no-slo"}
    assert len(engine.scheduler._slo_desk._tasks) == 0


def test_a_client_that_leaves_ends_its_call_and_not_yet_its_task(start: Start, tmp_path: Path) -> None:
    engine = start()
    add(engine, "gone", 400, 40, {"slo_class": "coder", "session_id": "s"})
    for _ in range(5):
        engine.step()
    engine.abort("gone")
    del engine.answers["gone"]
    book = engine.scheduler._slo_desk._tasks
    task = book._task(TaskKey("", "s"))
    assert task is not None
    assert (task.in_flight, task.begun) == (0, 1)
    run_task(engine, "s", 2)
    (ended,) = events(tmp_path, "task")
    assert (ended["calls"], ended["kept"]) == (3, True)
