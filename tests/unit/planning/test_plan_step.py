"""One plan as one kernel: what it leaves to the next, and what it says beside the step."""

from __future__ import annotations

import numpy as np

from slos_serve.core.request import NUM_SHARES, Status
from slos_serve.planning.arrivals import NO_ARRIVALS
from slos_serve.planning.best_effort import NO_TURN
from slos_serve.planning.drafting import no_drafts
from slos_serve.planning.plan_step import Memory, plan_step, starting_order
from slos_serve.planning.planner import Planner
from tests.builders import OPT_13B_A100, EngineBuilder

NOTHING = Memory(NO_ARRIVALS, NO_TURN, no_drafts(), np.zeros(NUM_SHARES))


def test_a_plan_writes_forecasts_and_nothing_else() -> None:
    engine = EngineBuilder()
    engine.decode(ahead_s=0.05)
    engine.wait(500)
    before = engine.table.rows.copy()
    plan_step(engine.state(), Planner(OPT_13B_A100, 2).known(), NOTHING)
    after = engine.table.rows
    changed = [
        name for name in after.dtype.names or () if not np.array_equal(before[name], after[name], equal_nan=True)
    ]
    assert changed in ([], ["expected_tokens"])


def test_admission_is_asked_only_where_a_promise_is_open() -> None:
    engine, known = EngineBuilder(), Planner(OPT_13B_A100, 2).known()
    engine.decode(ahead_s=0.05)
    assert plan_step(engine.state(), known, NOTHING).admission.status == -1
    engine.wait(500)
    engine.wait(20_000, due_in_s=60.0)
    admission = plan_step(engine.state(), known, NOTHING).admission
    assert (admission.asked, admission.taken) == (2, 2)


def test_the_next_plan_knows_of_the_arrivals_of_this_one() -> None:
    engine, known = EngineBuilder(), Planner(OPT_13B_A100, 2).known()
    engine.wait(500, due_in_s=1.5)
    memory = plan_step(engine.state(), known, NOTHING).memory
    assert memory.arrivals.tightest_s == 1.5
    assert NOTHING.arrivals.newest == -1


def test_running_requests_come_before_waiting_ones() -> None:
    engine = EngineBuilder()
    engine.wait(200, due_in_s=0.6)
    slots = [engine.decode(ahead_s=0.5) for _ in range(3)]
    planned = plan_step(engine.state(), Planner(OPT_13B_A100, 2).known(), NOTHING)
    running = engine.table.rows["running"][planned.slots]
    assert set(slots) <= set(planned.slots.tolist())
    assert (np.diff(running) <= 0).all()


def test_passed_over_requests_start_by_deadline_and_then_best_effort_in_order() -> None:
    engine = EngineBuilder()
    late, soon = engine.wait(due_in_s=9.0), engine.wait(due_in_s=1.0)
    first, second = engine.wait(), engine.wait()
    engine.table.rows["status"][[first, second]] = Status.BEST_EFFORT
    assert starting_order(engine.state(), np.zeros(NUM_SHARES)).tolist() == [soon, late, first, second]


def test_a_stream_that_lost_its_kv_starts_before_others_begin() -> None:
    engine = EngineBuilder()
    older, passed = engine.best_effort(), engine.wait(500)
    cut_off = [engine.best_effort(prompt_tokens) for prompt_tokens in (3000, 300)]
    for slot in (older, *cut_off):
        engine.table.rows["status"][slot] = Status.BEST_EFFORT
    engine.table.rows["output_tokens"][cut_off] = 5
    assert starting_order(engine.state(), np.zeros(NUM_SHARES)).tolist() == [passed, *cut_off, older]
