"""Faults of the plug-in and around it: everything is answered as on stock, and what failed is counted.

Injected: a planner that throws or overruns at every k-th step, a plan that names a wrong slot, faults in each call that
vLLM makes into the plug-in, a full disk, a dead publication socket, a class file that vanished.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from slos_serve.routing.publication import Publication
from slos_serve.testing.dry_engine import DryEngine
from slos_serve.vllm_plugin.config import EVENTS_ENV, FAULT_LIMIT_ENV, PUBLISH_ENV
from slos_serve.vllm_plugin.publish import EnginePublisher
from slos_serve.vllm_plugin.scheduler import SLOScheduler
from tests.vllm.dry_load import Start, assert_answers, mixed_load

COUNT = 24
Broken = Callable[..., Any]


class InjectedError(RuntimeError):
    """Raised on purpose."""


def fail_every(k: int, whole: Broken) -> Broken:
    """``whole``, which fails at every ``k``-th call before it does anything."""
    calls = {"count": 0}

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls["count"] += 1
        if calls["count"] % k == 0:
            raise InjectedError("broken on purpose")
        return whole(*args, **kwargs)

    return broken


def assert_served(engine: DryEngine) -> None:
    """Every answer is the stock answer, and nothing is left behind."""
    assert_answers(engine)
    assert len(engine.finished) == COUNT
    assert engine.faults == []
    assert engine.scheduler.kv_cache_manager.usage == 0.0
    assert not engine.scheduler._slo.book.by_id


@pytest.mark.parametrize("num_blocks", [500, 4000])
@pytest.mark.parametrize("k", [2, 3, 7])
def test_a_planner_that_throws_at_every_kth_step(
    start: Start, monkeypatch: pytest.MonkeyPatch, k: int, num_blocks: int
) -> None:
    engine = start(num_blocks=num_blocks)
    control = engine.scheduler._slo
    monkeypatch.setattr(control.policy, "plan", fail_every(k, control.policy.plan))
    mixed_load(engine, count=COUNT)
    assert_served(engine)
    assert control.guard.armed
    assert control.guard.counts["propose"] > 5


def test_a_planner_that_overruns_at_every_kth_step(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_SERVE_PLAN_LIMIT_MS", "10")
    engine = start()
    control = engine.scheduler._slo
    plan, calls = control.policy.plan, {"count": 0}

    def slow(now_s: float, view: Any) -> Any:
        calls["count"] += 1
        if calls["count"] % 5 == 0:
            end_s = time.thread_time() + 0.012
            while time.thread_time() < end_s:
                pass
        return plan(now_s, view)

    monkeypatch.setattr(control.policy, "plan", slow)
    mixed_load(engine, count=COUNT)
    assert_served(engine)
    assert control.guard.armed
    assert control.guard.counts["overrun"] >= 5
    assert control.guard.counts["resting"] >= control.guard.counts["overrun"] - 1


@pytest.mark.parametrize("wrong", ["unknown slot", "slot of nobody", "twice", "starts what runs"])
def test_a_plan_with_a_wrong_slot(start: Start, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    engine = start()
    control = engine.scheduler._slo
    plan, calls = control.policy.plan, {"count": 0}

    def spoilt(now_s: float, view: Any) -> Any:
        found = plan(now_s, view)
        calls["count"] += 1
        if calls["count"] % 4 or not len(found.slots):
            return found
        free = next(slot for slot in range(10_000) if slot not in control.book.by_slot)
        slots = {
            "unknown slot": np.append(found.slots[:-1], 10**6),
            "slot of nobody": np.append(found.slots[:-1], free),
            "twice": np.append(found.slots[:-1], found.slots[0]),
            "starts what runs": found.slots[::-1].copy(),
        }[wrong]
        found.slots = slots.astype(found.slots.dtype)
        return found

    monkeypatch.setattr(control.policy, "plan", spoilt)
    mixed_load(engine, count=COUNT)
    assert_served(engine)
    assert control.guard.armed


CALLS = {
    "learning from drafts": ("learner", "verified"),
    "learning from a step": ("learner", "done"),
    "noting a step": ("learner", "scheduled"),
    "committing": ("book", "note"),
    "looking": ("queues", "look"),
    "limits": ("limits", "view"),
    "posting telemetry": ("telemetry", "post"),
    "prefix hits": ("hits", "refresh"),
    "running rows": ("book", "sync_running"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_fault_in_any_part(start: Start, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    engine = start(num_blocks=500)
    owner, method = CALLS[name]
    part = getattr(engine.scheduler._slo, owner)
    monkeypatch.setattr(part, method, fail_every(3, getattr(part, method)))
    mixed_load(engine, count=COUNT)
    assert_served(engine)
    assert sum(engine.scheduler._slo.guard.counts.values()) > 0


@pytest.mark.parametrize("method", ["entered", "leaving", "turns_begun", "learn_found"])
def test_a_fault_where_requests_come_and_go(start: Start, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    engine = start(num_blocks=500)
    desk = engine.scheduler._slo_desk
    monkeypatch.setattr(desk, method, fail_every(3, getattr(desk, method)))
    mixed_load(engine, count=COUNT)
    assert_answers(engine)
    assert len(engine.finished) == COUNT
    assert engine.scheduler.kv_cache_manager.usage == 0.0


@pytest.mark.parametrize(
    "name",
    [
        "preempt",
        "drop_placeholders",
        "first_queue_name",
        "is_paused",
        "note_waiting",
        "queue_of",
        "loads_kv",
    ],
)
def test_a_fault_while_vllms_lists_are_changed_leaves_them_whole(
    start: Start, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from slos_serve.vllm_plugin import compat  # noqa: PLC0415 - after vLLM is known to be there

    engine = start(num_blocks=500)
    monkeypatch.setattr(compat, name, fail_every(3, getattr(compat, name)))
    mixed_load(engine, count=COUNT)
    assert_answers(engine)
    assert len(engine.finished) == COUNT
    assert engine.scheduler.kv_cache_manager.usage == 0.0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("owner", "name"), [("steering", "_loads_that_fit"), ("compat", "queue_of")])
def test_a_fault_after_drafts_were_limited_leaves_the_stock_step_all_drafts(
    start: Start, monkeypatch: pytest.MonkeyPatch, owner: str, name: str, depth: int
) -> None:
    from slos_serve.vllm_plugin import compat, steering  # noqa: PLC0415 - after vLLM is known to be there

    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    engine = start(depth=depth, speculative_config=ngram)
    control, schedule = engine.scheduler._slo, engine.scheduler.schedule
    plan, planned = control.policy.plan, []

    def one_draft_each(now_s: float, view: Any) -> Any:
        found = plan(now_s, view)
        short = np.minimum(found.draft_tokens, 1)
        found.tokens, found.draft_tokens = found.tokens - found.draft_tokens + short, short
        planned.append(now_s)
        return found

    monkeypatch.setattr(control.policy, "plan", one_draft_each)
    place = {"steering": steering, "compat": compat}[owner]
    monkeypatch.setattr(place, name, fail_every(3, getattr(place, name)))
    compared = {"stock": 0, "planned": 0}

    def checked() -> Any:
        had = {one.request_id: len(one.spec_token_ids) for one in engine.scheduler.running}
        plans = len(planned)
        output = schedule()
        drafts = {key: len(tokens) for key, tokens in output.scheduled_spec_decode_tokens.items()}
        kind = "planned" if len(planned) > plans and control._fallback is None else "stock"
        assert drafts == {key: had[key] if kind == "stock" else 1 for key in drafts}
        compared[kind] += len(drafts)
        return output

    monkeypatch.setattr(engine.scheduler, "schedule", checked)
    mixed_load(engine, count=COUNT)
    assert_served(engine)
    assert min(compared.values()) > 50, compared


def test_after_faults_in_a_row_the_scheduler_disarms_itself(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT_LIMIT_ENV, "5")
    engine = start()
    control = engine.scheduler._slo
    calls = {"count": 0}

    def always(*_: Any) -> Any:
        calls["count"] += 1
        raise InjectedError("broken on purpose")

    monkeypatch.setattr(control.policy, "plan", always)
    mixed_load(engine, count=COUNT)
    assert_served(engine)
    assert not control.guard.armed
    assert calls["count"] == 5
    control.post_gauges()
    control.telemetry.flush()
    families = control.recorder.metrics.registry.collect()
    armed = [sample.value for one in families for sample in one.samples if sample.name == "slos_serve:armed"]
    assert armed == [0.0]


def test_faults_with_planned_steps_between_them_do_not_disarm(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT_LIMIT_ENV, "2")
    engine = start()
    control = engine.scheduler._slo
    monkeypatch.setattr(control.policy, "plan", fail_every(3, control.policy.plan))
    mixed_load(engine, count=COUNT)
    assert_served(engine)
    assert control.guard.armed


def test_a_full_disk_costs_events_not_service(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVENTS_ENV, "/dev/full")
    engine = start()
    mixed_load(engine, count=COUNT)
    assert_served(engine)
    control = engine.scheduler._slo
    control.telemetry.flush()
    assert control.telemetry.failed > 0
    assert control.guard.armed


@pytest.fixture
def publishing(monkeypatch: pytest.MonkeyPatch) -> list[Publication]:
    """What an engine publishes from now on."""
    found: list[Publication] = []
    monkeypatch.setenv(PUBLISH_ENV, "ipc:///nonexistent/engine")
    monkeypatch.setattr(EnginePublisher, "deliver", lambda _, publication: found.append(publication))
    monkeypatch.setattr("slos_serve.vllm_plugin.scheduler.end_with_parent", lambda: None)
    monkeypatch.setattr(SLOScheduler, "slo_clock_s", staticmethod(lambda: -1.0))  # before the engine sets its own
    return found


def test_publications_go_on_while_the_planner_throws(
    start: Start, publishing: list[Publication], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    control = engine.scheduler._slo
    monkeypatch.setattr(control.policy, "plan", fail_every(1, control.policy.plan))
    publishing.clear()
    mixed_load(engine, count=COUNT)
    assert_served(engine)
    working = [one.time_s for one in publishing if one.num_requests]
    assert len(working) > 10
    assert np.percentile(np.diff(working), 90) < 0.5
    assert publishing[-1].num_requests == 0


def test_a_dead_publication_socket(
    start: Start, publishing: list[Publication], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()

    def dead(*_: Any) -> None:
        raise OSError("no such peer")

    monkeypatch.setattr(EnginePublisher, "deliver", dead)
    mixed_load(engine, count=COUNT)
    assert_served(engine)


def test_a_class_file_that_vanished(start: Start, tmp_path: Path) -> None:
    engine = start()
    (tmp_path / "classes.yaml").unlink()
    (tmp_path / "profile.json").unlink()
    mixed_load(engine, count=COUNT)
    assert_served(engine)
    assert engine.scheduler._slo.guard.counts == {}
