"""Earliest deadline first: the order, the domino effect and its remedy, the watermark."""

from __future__ import annotations

from slos_serve.policies.edf import EarliestDeadlineFirst
from slos_serve.sim.limits import EngineLimits
from tests.builders import EngineBuilder
from tests.sim_builders import GPU, run, workload


def test_prompts_run_in_order_of_deadline_not_of_arrival() -> None:
    engine = EngineBuilder()
    decode = engine.decode()
    late, early = engine.wait(400, due_in_s=3.0), engine.wait(400, due_in_s=1.0)
    plan = EarliestDeadlineFirst(512).plan(engine.now_s, engine.view())
    assert plan.slots.tolist() == [decode, early, late]
    assert plan.tokens.tolist() == [1, 400, 111]


def test_a_prompt_under_way_waits_for_an_earlier_deadline() -> None:
    engine = EngineBuilder()
    under_way = engine.prefilling(2000, 1000, due_in_s=5.0)
    urgent = engine.wait(500, due_in_s=1.0)
    plan = EarliestDeadlineFirst(512).plan(engine.now_s, engine.view())
    assert dict(zip(plan.slots.tolist(), plan.tokens.tolist(), strict=True)) == {under_way: 12, urgent: 500}


def test_late_requests_come_first_unless_they_are_dropped_behind() -> None:
    engine = EngineBuilder()
    late, in_time = engine.wait(600, due_in_s=-1.0), engine.wait(600, due_in_s=2.0)
    view = engine.view()
    assert EarliestDeadlineFirst(512).plan(engine.now_s, view).slots.tolist() == [late]
    assert EarliestDeadlineFirst(512, drop_late=True).plan(engine.now_s, view).slots.tolist() == [in_time]


def test_an_answer_that_is_computed_again_is_not_late() -> None:
    engine = EngineBuilder()
    again = engine.wait(600, due_in_s=-1.0)
    engine.table.rows["output_tokens"][again] = 5
    engine.wait(600, due_in_s=2.0)
    assert EarliestDeadlineFirst(512, drop_late=True).plan(engine.now_s, engine.view()).slots.tolist() == [again]


def test_prompts_side_by_side_do_not_preempt_each_other() -> None:
    limits = EngineLimits(kv_capacity_tokens=100 * 16, max_num_batched_tokens=8192)
    load = workload([0.0] * 6, [700] * 6, [20] * 6)
    recording = run(load, "edf", GPU, limits, parameters={"token_budget": 256})
    assert recording.completed.all()
    assert recording.calls["preemptions"].sum() == 0
