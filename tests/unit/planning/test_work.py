"""What there is to run, and how long the step may last."""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import Reason
from slos_serve.core.request import Status
from slos_serve.planning.planner import Planner
from tests.builders import OPT_13B_A100, EngineBuilder, planned, reason_of


def test_the_step_ends_by_the_earliest_due_time() -> None:
    engine = EngineBuilder()
    engine.decode(ahead_s=0.08)
    engine.wait(5000, due_in_s=3.0)
    plan = planned(engine)
    assert 0.05 < plan.predicted_s <= 0.08


def test_a_decode_that_is_promised_no_pace_keeps_nobody_waiting() -> None:
    engine, planner = EngineBuilder(), Planner(OPT_13B_A100, 2)
    slot = engine.decode(tpot_s=np.inf)
    engine.table.rows["max_stall_s"][slot] = np.inf
    other = engine.best_effort(50)
    assert other in planner.plan(engine.now_s, engine.view()).slots


def test_a_blocked_request_keeps_its_place_and_is_not_run() -> None:
    engine = EngineBuilder()
    decode, prefill, waits = engine.decode(ahead_s=0.01), engine.prefilling(500, 100), engine.wait(100)
    other = engine.decode(tpot_s=np.inf, status=Status.BEST_EFFORT)
    for slot in (decode, prefill, waits, other):
        engine.table.rows["blocked"][slot] = 1
    runs = engine.decode(ahead_s=0.01)
    plan = planned(engine)
    assert plan.slots.tolist() == [runs]
    assert len(plan.held) == len(plan.preempt) == 0


def test_a_prompt_that_grew_is_a_prefill_again() -> None:
    engine = EngineBuilder()
    slot = engine.decode(ahead_s=0.5)
    engine.table.rows["prompt_tokens"][slot] += 300
    plan = planned(engine)
    assert reason_of(plan, slot) is Reason.PREFILL_DEADLINE
    assert plan.tokens.tolist() == [301]
