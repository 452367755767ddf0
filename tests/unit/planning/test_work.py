"""What there is to run, and how long the step may last."""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import Reason
from slos_serve.core.request import Status
from slos_serve.planning.planner import Planner
from slos_serve.planning.work import any_prefill, split_by_promise
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


def test_a_prompt_without_a_seat_is_not_in_the_step() -> None:
    """Else decodes would be held, and drafts be short, for a prompt that cannot start."""
    engine = EngineBuilder(max_num_seqs=2)
    for _ in range(2):
        engine.decode(ahead_s=1.5)
    waits = engine.wait(500, due_in_s=3.0)
    state = engine.state()
    none = np.empty(0, dtype=np.int64)
    work = split_by_promise(state, np.array([waits]), none, -1)
    assert len(work.prefills) == 0
    assert not any_prefill(state, work)
    state.status[engine.running[0]] = Status.BEST_EFFORT  # its seat can be taken
    assert split_by_promise(state, np.array([waits]), none, -1).prefills.tolist() == [waits]


def test_a_prompt_that_grew_is_a_prefill_again() -> None:
    engine = EngineBuilder()
    slot = engine.decode(ahead_s=0.5)
    engine.table.rows["prompt_tokens"][slot] += 300
    plan = planned(engine)
    assert reason_of(plan, slot) is Reason.PREFILL_DEADLINE
    assert plan.tokens.tolist() == [301]
