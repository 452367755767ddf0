"""Who is admitted of those that ask, in small situations."""

from __future__ import annotations

import pytest

from slos_serve.core.request import Status
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.planning.planner import Planner
from tests.builders import OPT_13B_A100, EngineBuilder, carried_out, planned

# A small model on a CPU, slow for a while: a step's fixed cost is more than half of the tightest pace.
SLOW_CPU = BatchTimeModel(0.0036, 0.0, 0.0035, 0.119, 1.4e-5, 5.9e-7, 1.8e-3)


def test_one_long_request_gives_way_to_two_short_ones() -> None:
    engine = EngineBuilder()
    long = engine.wait(4000, due_in_s=0.62)
    short = [engine.wait(1500, due_in_s=0.66), engine.wait(1500, due_in_s=0.7)]
    carried_out(Planner(OPT_13B_A100, 2), engine.now_s, engine.view())
    status = engine.table.rows["status"]
    assert status[short[0]] == Status.ADMITTED
    assert status[long] == Status.UNDECIDED


def test_weight_turns_the_choice() -> None:
    engine = EngineBuilder()
    long = engine.wait(4000, due_in_s=0.65, weight=5.0)
    engine.wait(1500, due_in_s=0.66)
    engine.wait(1500, due_in_s=0.7)
    carried_out(Planner(OPT_13B_A100, 2), engine.now_s, engine.view())
    assert engine.table.rows["status"][long] == Status.ADMITTED


def test_memory_that_promises_will_need_is_not_promised_twice() -> None:
    engine = EngineBuilder(total_blocks=100)
    for _ in range(3):
        engine.decode(prompt_tokens=320, output_tokens=10, max_tokens=160, ahead_s=0.05)
    slot = engine.wait(320, max_tokens=160)
    plan = planned(engine)
    assert slot not in plan.admitted


def test_a_hint_replaces_the_forecast() -> None:
    engine = EngineBuilder()
    slot = engine.wait(max_tokens=1000)
    engine.table.rows["hint_tokens"][slot] = 7
    planned(engine)
    assert engine.table.rows["expected_tokens"][slot] == 7


@pytest.mark.parametrize(("ahead_s", "promised"), [(1.6, True), (0.21, False)])
def test_admission_knows_that_steps_beside_decodes_ahead_last_longer(ahead_s: float, promised: bool) -> None:
    engine = EngineBuilder()
    for _ in range(2):
        engine.decode(tpot_s=0.215, ahead_s=ahead_s, max_tokens=400)
    slot = engine.wait(180, due_in_s=1.3, tpot_s=0.36)
    plan = Planner(SLOW_CPU, 2).plan(engine.now_s, engine.view())
    assert (slot in plan.admitted) is promised
