"""KV that a connector loads: its time is learnt, and promises are planned while it is on its way."""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm")

from slos_serve.core.request import Status
from slos_serve.testing.dry_engine import DryEngine, Setup
from slos_serve.testing.request import KVLoad, RequestFeatures
from slos_serve.vllm_plugin.config import PLAN_LIMIT_ENV
from slos_serve.vllm_plugin.kv_loads import KVLoads, LoadTime
from tests.vllm.dry_load import Start, assert_answers, lengths, prompt

CONSUMER = Setup(kv_role="kv_consumer")
RNG_SEED = 11


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan is late, however busy the machine is."""
    monkeypatch.setenv(PLAN_LIMIT_ENV, "60000")


def load(tokens: int, steps: int, *, is_async: bool = True) -> RequestFeatures:
    return RequestFeatures(load=KVLoad(tokens, steps=steps, is_async=is_async))


def stream(engine: DryEngine, rng: np.random.Generator, count: int = 2) -> None:
    """Promised requests that decode when this returns."""
    for number in range(count):
        lengths[f"stream{number}"] = (prompt(rng, 50), 400)
        engine.add(f"stream{number}", *lengths[f"stream{number}"], {"slo_class": "chat"})
    while any(len(answer) < 3 for answer in engine.answers.values()):
        engine.step()


def add(
    engine: DryEngine, name: str, tokens: int, answer: int, slo_class: str | None, features: RequestFeatures
) -> None:
    lengths[name] = (prompt(np.random.default_rng(zlib.crc32(name.encode())), tokens), answer)
    engine.add(name, *lengths[name], {"slo_class": slo_class} if slo_class else None, features)


def test_load_times_are_fitted() -> None:
    time = LoadTime()
    assert time.predicted_s(1000) == 0.0
    time.observe(1000, 0.5)
    assert time.predicted_s(2000) == pytest.approx(1.0)  # one size tells no fixed part
    for tokens in (200, 800, 1500, 3000):
        time.observe(tokens, 0.1 + 0.0004 * tokens)
    assert time.predicted_s(2000) == pytest.approx(0.9, rel=0.02)
    for _ in range(200):
        for tokens in (500, 2500):
            time.observe(tokens, 0.02 + 0.0001 * tokens)
    assert time.predicted_s(1000) == pytest.approx(0.12, rel=0.02)  # follows what changes


def test_the_time_of_loads_is_learnt_and_shown_to_the_plan(start: Start) -> None:
    engine = start(setup=CONSUMER)
    control, rng = engine.scheduler._slo, np.random.default_rng(RNG_SEED)
    stream(engine, rng)
    for number in range(4):
        add(engine, f"first{number}", 800, 5, "chat", load(800, 10))
        while not engine.answers[f"first{number}"]:
            engine.step()
    step_s = float(np.diff(engine.token_times_s["stream0"][-20:]).mean())
    assert control.loads.time.predicted_s(800) == pytest.approx(10 * step_s, rel=0.25)

    add(engine, "loaded", 800, 5, "chat", load(800, 10))
    tracked, dues = control.book.by_id["loaded"], []
    while not engine.answers["loaded"]:
        engine.step()
        view = control.look(engine.now_s)
        row = view.table.rows[tracked.slot]
        if row["blocked"] == 1 and tracked.slot in view.waiting:
            assert (row["status"], row["running"]) == (Status.UNDECIDED, 0)
            dues.append(tracked.promise.planned_due_s - row["ttft_due_s"])
    assert len(dues) >= 8
    assert dues[0] == pytest.approx(9 * step_s, rel=0.25)  # what was left of the load, and less at each step
    assert all(before > after for before, after in itertools.pairwise(dues))
    engine.run()
    assert_answers(engine)
    assert control.guard.counts == {}


def test_the_time_of_loads_within_a_step_is_learnt(start: Start) -> None:
    engine = start(setup=Setup(kv_role="kv_both"))
    engine.load_s_each = 2e-4
    control, rng = engine.scheduler._slo, np.random.default_rng(RNG_SEED)
    stream(engine, rng)
    for number in range(6):
        add(engine, f"one{number}", 600, 5, "chat", load(500, 0, is_async=False))
        while not engine.answers[f"one{number}"]:
            engine.step()
    assert control.learner.loaded_s_each == pytest.approx(2e-4, rel=0.05)
    assert control.policy.correction.factor == pytest.approx(1.0, abs=0.02)  # not taken for slow batches

    add(engine, "late", 600, 5, "chat", load(500, 0, is_async=False))
    tracked = control.book.by_id["late"]
    view = control.look(engine.now_s)
    shift_s = tracked.promise.planned_due_s - view.table.rows["ttft_due_s"][tracked.slot]
    assert shift_s == pytest.approx(500 * 2e-4, rel=0.06)


def test_room_is_kept_for_a_promise_while_its_kv_is_loaded(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heavy class whose KV comes late, and a light one that takes the time it needs unless its load is planned."""
    classes = "classes:\n  gold: {ttft_ms: 700, tpot_ms: 100, weight: 5}\n  chat: {ttft_ms: 700, tpot_ms: 100}\n"
    (tmp_path / "classes.yaml").write_text(classes, encoding="utf-8")

    def first_s() -> float:
        engine = start(setup=CONSUMER)
        stream(engine, np.random.default_rng(RNG_SEED))
        begin_s = engine.now_s
        add(engine, "gold", 4000, 3, "gold", load(3000, 3))
        engine.step()
        engine.step()
        for number in range(3):
            add(engine, f"chat{number}", 3000, 3, "chat", RequestFeatures())
        engine.run()
        assert_answers(engine)
        return engine.token_times_s["gold"][0] - begin_s

    planned_s = first_s()
    monkeypatch.setattr(KVLoads, "show", lambda *_: np.empty(0, dtype=np.int64))
    assert planned_s < first_s() - 0.05
    assert planned_s <= 0.7


def test_a_load_that_does_not_begin_gets_a_step_in_stock_order(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(setup=CONSUMER)
    control, rng = engine.scheduler._slo, np.random.default_rng(RNG_SEED)
    stream(engine, rng)
    asked, connector = {"count": 0}, engine.scheduler.connector
    answer = connector.get_num_new_matched_tokens

    def unsure_in_plans(request: object, num_computed_tokens: int) -> tuple[int | None, bool]:
        """The connector knows when the plug-in asks, and not when vLLM asks in a steered step."""
        asked["count"] += 1
        if control.hidden.waiting or control.hidden.running or engine.scheduler.max_num_scheduled_tokens < 64:
            return None, False
        found: tuple[int | None, bool] = answer(request, num_computed_tokens)
        return found

    monkeypatch.setattr(connector, "get_num_new_matched_tokens", unsure_in_plans)
    add(engine, "loaded", 800, 5, "chat", load(800, 3))
    for _ in range(40):
        engine.step()
    assert engine.answers["loaded"]
    assert control.guard.counts.get("unserved", 0) >= 1


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_load_that_would_take_reserved_blocks_costs_no_step(start: Start, steps: int) -> None:
    """Little KV: what is loaded starts in the step after its load, though the plan would rather begin another load."""
    engine = start(setup=CONSUMER, num_blocks=10)
    scheduler = engine.scheduler
    add(engine, "loaded", 128, 16, "chat", load(64, steps))
    request = scheduler.requests["loaded"]
    while request.status.name != "WAITING_FOR_REMOTE_KVS":
        engine.step()
    add(engine, "other", 80, 16, "chat", load(64, steps))
    while request.request_id not in scheduler.finished_recving_kv_req_ids:
        engine.step()
    engine.step()
    assert request.status.name == "RUNNING"
    assert scheduler.requests["other"].num_computed_tokens == 0
    engine.run()
    assert_answers(engine)
