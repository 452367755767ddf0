"""The plug-in on vLLM's real scheduler and KV-cache manager, the device imaginary, time virtual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState

from slos_serve.core.errors import (
    InvalidFieldError,
    ProfileMismatchError,
    UnsupportedEngineError,
)
from slos_serve.metrics.attainment import stage_starts_of
from slos_serve.planning.state import next_due_s
from slos_serve.routing.publication import Publication
from slos_serve.vllm_plugin.class_versions import VERSION_KEY, ClassVersion, ClassVersions, digest_of, keep_copy
from slos_serve.vllm_plugin.config import PROFILE_ENV, PUBLISH_ENV
from slos_serve.vllm_plugin.publish import EnginePublisher
from slos_serve.vllm_plugin.scheduler import SLOScheduler
from tests.vllm.dry_load import (
    Start,
    assert_all_served,
    assert_answers,
    events,
    lengths,
    mixed_load,
    prompt,
    write_profile,
)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_blocks", [600, 4000])
def test_answers_are_those_of_the_stock_scheduler(start: Start, tmp_path: Path, depth: int, num_blocks: int) -> None:
    engine = start(depth=depth, num_blocks=num_blocks)
    mixed_load(engine)
    assert_all_served(engine, tmp_path, preempts=num_blocks == 600)


def test_more_promises_are_kept_than_on_stock(start: Start) -> None:
    targets = {"chat": (1.0, 0.1), "code": (0.8, 0.05)}
    kept = []
    for cls in (AsyncScheduler, SLOScheduler):
        engine = start(cls)
        arrivals = mixed_load(engine, rate=9.0)
        attained = 0
        for number in range(80):
            name = (None, "chat", "code")[number % 3]
            times = engine.token_times_s[f"r{number}"]
            if name is None:
                continue
            ttft_s, tpot_s = targets[name]
            fast = len(times) < 2 or (times[-1] - times[0]) / (len(times) - 1) <= tpot_s
            attained += times[0] - arrivals[number] <= ttft_s and fast
        kept.append(attained)
    assert kept[1] >= 1.3 * kept[0], kept


def test_what_was_admitted_attains(start: Start, tmp_path: Path) -> None:
    for seed in range(4):
        mixed_load(start(), rate=9.0, seed=seed)  # events go to one file
    admitted = [event for event in events(tmp_path, "request") if event["verdict"] == "admitted"]
    assert len(admitted) > 150
    assert sum(event["ttft_ok"] and event["tpot_ok"] for event in admitted) >= 0.99 * len(admitted)


def test_without_promises_every_step_is_stock(start: Start, tmp_path: Path) -> None:
    made: list[list[tuple[tuple[str, int], ...]]] = []
    for cls in (AsyncScheduler, SLOScheduler):
        engine = start(cls, num_blocks=600)
        steps: list[tuple[tuple[str, int], ...]] = []
        stock_schedule = engine.scheduler.schedule

        def recorded(
            steps: list[tuple[tuple[str, int], ...]] = steps,
            schedule: Callable[[], Any] = stock_schedule,
        ) -> Any:
            output = schedule()
            steps.append(tuple(output.num_scheduled_tokens.items()))
            return output

        engine.scheduler.schedule = recorded
        mixed_load(engine, slo=False)
        made.append(steps)
    assert made[0] == made[1]
    assert events(tmp_path, "step") == []


def test_a_planner_that_throws_costs_order_not_service(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    scheduler = engine.scheduler
    calls = {"count": 0}
    plan = scheduler._slo.policy.plan

    def sometimes(now_s: float, view: Any) -> Any:
        calls["count"] += 1
        if calls["count"] % 3 == 0:
            raise RuntimeError("broken planner")
        return plan(now_s, view)

    monkeypatch.setattr(scheduler._slo.policy, "plan", sometimes)
    mixed_load(engine, count=40)
    assert_answers(engine)
    assert scheduler._slo.guard.counts == {"propose": calls["count"] // 3}
    assert sum(step["fallback"] == "propose" for step in events(tmp_path, "step")) == calls["count"] // 3


def test_plans_over_their_limit_are_used_and_then_planning_rests(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_SERVE_PLAN_LIMIT_MS", "0")
    monkeypatch.setattr("slos_serve.vllm_plugin.controller.PLAN_SHARE_OF_STEP", 0.0)
    engine = start()
    mixed_load(engine, count=20)
    assert_answers(engine)
    counts = engine.scheduler._slo.guard.counts
    assert set(counts) == {"overrun", "resting"}
    assert counts["resting"] > 20 * counts["overrun"]  # 64 steps of rest for each overrun in the end


def test_a_plan_may_take_a_tenth_of_the_step_it_plans(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_SERVE_PLAN_LIMIT_MS", "0")
    engine = start()
    policy = engine.scheduler._slo.policy
    plan = policy.plan

    def of_a_long_step(now_s: float, view: Any) -> Any:
        return replace(plan(now_s, view), predicted_s=1000.0)

    monkeypatch.setattr(policy, "plan", of_a_long_step)
    mixed_load(engine, count=20)
    assert_answers(engine)
    assert "overrun" not in engine.scheduler._slo.guard.counts


def test_aborts_at_any_time_free_everything(start: Start) -> None:
    engine = start(num_blocks=600)
    rng = np.random.default_rng(5)
    for number in range(40):
        engine.add(f"a{number}", prompt(rng, 300), 200, {"slo_class": "chat"})
    for number in range(40):
        engine.step()
        engine.abort(f"a{(number * 7) % 40}")
    engine.run()
    assert engine.scheduler.kv_cache_manager.usage == 0.0
    assert not engine.scheduler._slo.book.by_id
    assert not engine.scheduler.running
    assert len(engine.scheduler.waiting) == 0


def test_pausing_and_resuming_loses_nothing(start: Start) -> None:
    engine = start()
    rng = np.random.default_rng(6)
    for number in range(10):
        lengths[f"p{number}"] = (prompt(rng, 100), 30)
        engine.add(f"p{number}", *lengths[f"p{number}"], {"slo_class": "chat"})
    for _ in range(5):
        engine.step()
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert [engine.step() for _ in range(3)] == [0, 0, 0]
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    assert_answers(engine)


def test_prefix_cache_hits_count_as_work_done(start: Start) -> None:
    engine = start()
    rng = np.random.default_rng(7)
    shared = prompt(rng, 1600)
    engine.add("first", [*shared, 7], 2, {"slo_class": "chat"})
    engine.run()
    engine.add("blocker", prompt(rng, 4000), 2, {"slo_class": "chat"})
    engine.add("second", [*shared, 9], 2, {"slo_class": "chat"})
    tracked = engine.scheduler._slo.book.by_id["second"]
    engine.step()
    rows = engine.scheduler._slo.book.table.rows
    assert rows["cached_tokens"][tracked.slot] == 1600
    engine.run()


def test_a_stage_boundary_changes_the_target(start: Start, tmp_path: Path) -> None:
    engine = start()
    engine.add("t", prompt(np.random.default_rng(8), 50), 60, {"slo_class": "think"})
    book = engine.scheduler._slo.book
    slot = book.by_id["t"].slot
    targets = []
    while engine.scheduler.has_unfinished_requests():
        engine.step()
        if "t" in book.by_id:
            targets.append(float(book.table.rows["tpot_s"][slot]))
    assert targets[0] == 0.05
    assert targets[-1] == 0.1
    assert events(tmp_path, "request")[0]["tpot_ok"] is True


def test_a_new_stage_begins_with_the_token_after_the_one_that_ended_the_last(start: Start) -> None:
    engine = start()
    engine.add("t", prompt(np.random.default_rng(8), 50), 60, {"slo_class": "think"})
    book = engine.scheduler._slo.book
    tracked = book.by_id["t"]
    slo_class = tracked.promise.slo_class
    assert slo_class is not None
    begins = set()
    while engine.scheduler.has_unfinished_requests():
        engine.step()
        if "t" not in book.by_id or tracked.stage == 0:
            continue
        assert book.table.rows["stage_tokens"][tracked.slot] >= 0
        # Due at the pace of its own stage, before that begins as well: not when the prompt was.
        if book.table.rows["stage_tokens"][tracked.slot] <= 1:
            due_s = next_due_s(book.table.rows, tracked.slot, 0.0)
            assert 0.0 < due_s - engine.token_times_s["t"][19] < 0.2
        if tracked.stage_start_s is not None:
            begins.add(tracked.stage_start_s)
    second = stage_starts_of(slo_class.stages, 60)[1]
    assert begins == {engine.token_times_s["t"][second]}


@pytest.mark.parametrize(("ttft_ms", "missed"), [(10, True), (1000, False)])
def test_a_late_first_token_is_a_missed_promise_from_then_on(start: Start, ttft_ms: int, missed: bool) -> None:
    engine = start()
    engine.add("t", prompt(np.random.default_rng(8), 500), 20, {"slo_class": "chat", "slo_ttft_ms": ttft_ms})
    book = engine.scheduler._slo.book
    seen = []
    while "t" in book.by_id:
        seen.append((len(engine.token_times_s["t"]) > 0, bool(book.table.rows["missed"][book.by_id["t"].slot])))
        engine.step()
    assert (True, missed) in seen
    assert all(row_missed == missed for came, row_missed in seen if came), seen


def test_bad_fields_that_reach_the_engine_leave_stock_service(start: Start) -> None:
    engine = start()
    engine.add("bad", [5, 6, 7], 4, {"slo_ttft_ms": "soon"})
    engine.add("typo", [5, 6, 7], 4, {"slo_clas": "chat"})
    engine.run()
    assert len(engine.answers["bad"]) == len(engine.answers["typo"]) == 4
    assert engine.scheduler._slo.guard.counts == {"field slo_ttft_ms": 1, "field vllm_xargs": 1}


def test_requests_are_judged_by_the_version_of_the_class_file_that_they_name(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "versions"
    folder.mkdir()
    named = "slos_serve.vllm_plugin.class_versions.socket_path"
    monkeypatch.setattr(named, lambda kind, process: folder / f"{process}.{kind}")
    text = "classes: {newer: {ttft_ms: 4321, tpot_ms: 99}}\n"
    assert keep_copy(text, 77)
    engine = start()
    desk = engine.scheduler._slo_desk
    desk._versions = ClassVersions(ClassVersion(desk._settings.classes), 77)
    engine.add("new", [5, 6, 7], 4, {"slo_class": "newer", VERSION_KEY: digest_of(text)})
    engine.add("unknown", [5, 6, 7], 4, {"slo_class": "newer", VERSION_KEY: "0" * 16})
    promised = engine.scheduler._slo.book.by_id
    assert promised["new"].promise.slo_class.slo.ttft_ms == 4321
    assert promised["unknown"].promise.slo_class is None
    engine.run()
    assert len(engine.answers["new"]) == len(engine.answers["unknown"]) == 4
    assert engine.scheduler._slo.guard.counts == {f"field {VERSION_KEY}": 1}


def test_priority_scheduling_is_refused_at_start(start: Start) -> None:
    with pytest.raises(UnsupportedEngineError, match="--scheduling-policy"):
        start(scheduling_policy="priority")


def test_a_profile_of_another_engine_is_refused_at_start(start: Start, tmp_path: Path) -> None:
    write_profile(tmp_path / "profile.json", "0.1.0")
    with pytest.raises(ProfileMismatchError, match="engine_version"):
        start()


def test_a_bad_class_file_is_refused_at_start(start: Start, tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text("classes:\n  chat: {tpot_ms: -1}\n", encoding="utf-8")
    with pytest.raises(InvalidFieldError, match=r"classes\.yaml:2"):
        start()


# Publications ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[Publication]:
    """What an engine publishes from now on."""
    found: list[Publication] = []
    monkeypatch.setenv(PUBLISH_ENV, "ipc:///nonexistent/engine")
    monkeypatch.setattr(EnginePublisher, "deliver", lambda _, publication: found.append(publication))
    monkeypatch.setattr("slos_serve.vllm_plugin.scheduler.end_with_parent", lambda: None)
    monkeypatch.setattr(SLOScheduler, "slo_clock_s", staticmethod(lambda: -1.0))  # before the engine sets its own
    return found


@pytest.mark.parametrize("slo", [True, False])
def test_an_engine_publishes_while_it_works_and_when_it_rests(
    start: Start, published: list[Publication], slo: bool
) -> None:
    engine = start(num_blocks=4000)
    (first,) = published
    assert (first.num_requests, first.replica, first.total_blocks) == (0, "", 3999)
    published.clear()
    mixed_load(engine, count=40, slo=slo)
    assert_answers(engine)
    assert [one.sequence for one in published] == list(range(2, 2 + len(published)))
    working = [one for one in published if one.num_requests]
    assert len(working) > 20
    assert published[-1].num_requests == 0, "the last request's end is published though no step follows"
    ages = np.diff([one.time_s for one in working])
    assert np.median(ages) < 0.2
    assert any(one.counts.sum() > 0 for one in working) is slo
    for one in published:
        one.check()


def test_nothing_is_published_without_a_reader_or_a_planner(
    start: Start, published: list[Publication], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PROFILE_ENV)
    monkeypatch.delenv(PUBLISH_ENV)
    engine = start()
    mixed_load(engine, count=5)
    assert not published
