"""Who runs in a step, in which order, and who gives way."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.plan import Reason
from slos_serve.core.request import Status
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from tests.builders import OPT_13B_A100, EngineBuilder, carried_out, planned, reason_of


def test_prefill_runs_in_deadline_order_not_in_arrival_order() -> None:
    engine = EngineBuilder()
    engine.decode(ahead_s=0.09)
    late = engine.wait(600, due_in_s=2.0)
    soon = engine.wait(600, due_in_s=1.0)
    plan = planned(engine)
    assert reason_of(plan, soon) is Reason.PREFILL_DEADLINE
    assert late not in plan.slots[:-1]


def test_nobody_due_later_takes_the_time_of_a_prompt_that_waits_for_the_next_step() -> None:
    """A running prompt that is to be cut cannot stand behind one that starts, and would be passed for ever."""
    engine = EngineBuilder()
    engine.decode(ahead_s=0.09)
    starts = engine.wait(100, due_in_s=0.3)
    passed = engine.prefilling(3000, 400, due_in_s=0.9)
    later = [engine.wait(300, due_in_s=2.0), engine.prefilling(400, 300, due_in_s=2.5)]
    plan = planned(engine)
    assert starts in plan.slots and not set(later) & set(plan.slots.tolist())
    assert {passed, later[1]} <= set(plan.held.tolist())
    engine.waiting.remove(starts)
    engine.running.append(starts)
    engine.table.rows["running"][starts], engine.table.rows["computed_tokens"][starts] = 1, 100
    engine.table.rows["output_tokens"][starts] = 1
    assert passed in planned(engine).slots, "in the next step it runs"


def test_a_decode_ahead_of_its_deadlines_is_held_for_a_prompt_that_needs_the_time() -> None:
    engine = EngineBuilder()
    due = engine.decode(ahead_s=0.06)
    ahead = engine.decode(ahead_s=1.5)
    engine.wait(3000, due_in_s=0.9)
    plan = planned(engine)
    assert reason_of(plan, due) is Reason.DECODE_DUE
    assert ahead in plan.held
    assert plan.held_reasons[plan.held == ahead].tolist() == [Reason.HELD_AHEAD]


def test_every_decode_runs_before_a_prompt_that_has_time() -> None:
    """Else answers take as long as they may, and their seats and KV with them."""
    engine = EngineBuilder()
    due = engine.decode(ahead_s=0.06)
    ahead = engine.decode(ahead_s=1.5)
    prompt = engine.wait(3000, due_in_s=2.0)
    plan = planned(engine)
    assert plan.slots.tolist() == [due, ahead, prompt]


def test_with_steps_planned_ahead_prompts_without_a_promise_lengthen_a_step_by_half_of_the_longest() -> None:
    """Whoever arrives waits for two of them. The tightest TTFT is that of a request that was passed over."""
    lengths = []
    for plan_ahead, tightest_s in ((True, 0.8), (False, 0.4)):  # the longest step lasts 0.2 s in both
        engine, planner = EngineBuilder(), Planner(OPT_13B_A100, 2)
        engine.best_effort(8000)
        engine.wait(40, due_in_s=tightest_s)
        view = engine.view()
        view.plan_ahead = plan_ahead
        lengths.append(planner.plan(engine.now_s, view).predicted_s)
    assert 0.07 < lengths[0] < 0.11 < 0.15 < lengths[1] < 0.21


SLOW_TOKENS = BatchTimeModel(2e-3, 1e-3, 0.0, 1e-3, 6.3e-7, 7.1e-9)  # no fixed cost that a chunk could be small beside


@pytest.mark.parametrize("plan_ahead", [False, True])
@pytest.mark.parametrize("model", [OPT_13B_A100, SLOW_TOKENS])
@pytest.mark.parametrize("done", [0, 4000, 97_000, 900_000])
@pytest.mark.parametrize("kind", ["best effort", "cached", "promised", "undecided"])
def test_a_prompt_runs_where_nothing_else_does(kind: str, done: int, model: BatchTimeModel, plan_ahead: bool) -> None:
    """However long its context, and however soon what arrived a moment ago is due."""
    engine, planner = EngineBuilder(total_blocks=100_000), Planner(model, 2, PlannerSettings(aging_s=0.0))
    rows = engine.table.rows
    engine.wait(4, due_in_s=0.06)
    carried_out(planner, engine.now_s, engine.view())
    assert planner.arrivals.tightest_s == pytest.approx(0.06)
    engine.waiting.clear()
    if kind == "cached":
        slot = engine.best_effort(done + 10_000)
        rows["cached_tokens"][slot] = done
    else:
        slot = engine.prefilling(done + 10_000, done, due_in_s=1e6)
        status = {"best effort": Status.BEST_EFFORT, "undecided": Status.UNDECIDED, "promised": Status.ADMITTED}
        rows["status"][slot] = status[kind]
    view = engine.view()
    view.plan_ahead = plan_ahead
    plan = planner.plan(engine.now_s, view)
    assert plan.slots.tolist() == [slot] and plan.tokens[0] >= 16


def test_without_prefill_every_decode_runs() -> None:
    engine = EngineBuilder()
    slots = [engine.decode(ahead_s=0.3 * k) for k in range(6)]
    plan = planned(engine)
    assert sorted(plan.slots.tolist()) == slots
    assert len(plan.held) == 0


def test_a_loose_tier_waits_when_all_decodes_overfill_the_step() -> None:
    engine = EngineBuilder()
    tight = [engine.decode(prompt_tokens=1000, tpot_s=0.05, ahead_s=0.0475) for _ in range(20)]
    loose = [engine.decode(prompt_tokens=1000, tpot_s=0.1, ahead_s=0.095) for _ in range(40)]
    plan = planned(engine)
    assert set(tight) <= set(plan.slots.tolist())
    assert 0 < len(set(loose) & set(plan.held.tolist())) < 40
    assert plan.predicted_s <= 0.0475


def test_a_stream_is_never_held_past_its_stall_bound() -> None:
    engine = EngineBuilder()
    slot = engine.decode(ahead_s=30.0)
    engine.table.rows["last_token_s"][slot] = engine.now_s - 1.95  # the bound is 2 s
    engine.wait(3000, due_in_s=2.0)
    assert reason_of(planned(engine), slot) is Reason.DECODE_DUE


@pytest.mark.parametrize("slower", [0.0, 0.25])
def test_a_first_token_is_in_time_in_a_slow_step_too(slower: float) -> None:
    """What fills the step behind a prompt that is due at its end leaves room for how slow one step may be."""
    engine = EngineBuilder()
    due = engine.wait(100, due_in_s=0.09, waited_s=0.2)
    engine.wait(6000, due_in_s=60.0)
    planner = Planner(OPT_13B_A100, 2, PlannerSettings(margin=0.0))
    planner.correct(1.0, 0.0, slower)
    plan = carried_out(planner, engine.now_s, engine.view())
    assert reason_of(plan, due) is Reason.PREFILL_DEADLINE
    assert 0.085 < plan.predicted_s * (1.0 + slower) <= 0.09


def test_steps_that_vary_wildly_are_filled_for_half_of_the_time() -> None:
    engine = EngineBuilder()
    engine.wait(100, due_in_s=0.18, waited_s=0.2)
    engine.wait(6000, due_in_s=60.0)
    planner = Planner(OPT_13B_A100, 2, PlannerSettings(margin=0.0))
    planner.correct(1.0, 0.0, 1e9)
    plan = carried_out(planner, engine.now_s, engine.view())
    assert 0.085 < plan.predicted_s <= 0.09


def test_two_prompts_are_chunked_to_the_decodes_pace() -> None:
    engine = EngineBuilder()
    engine.decode(ahead_s=0.08, max_tokens=100)
    engine.wait(1000, due_in_s=3.0)
    engine.wait(1000, due_in_s=3.0)
    assert planned(engine).predicted_s <= 0.08


def test_best_effort_is_preempted_youngest_first_for_memory() -> None:
    engine = EngineBuilder(total_blocks=60)
    old = engine.decode(prompt_tokens=320, tpot_s=np.inf, status=Status.BEST_EFFORT)
    young = engine.decode(prompt_tokens=320, tpot_s=np.inf, status=Status.BEST_EFFORT)
    slot = engine.wait(300, max_tokens=20, waited_s=2.0)
    plan = planned(engine)
    assert plan.preempt.tolist() == [young]
    assert slot in plan.slots
    assert old in plan.slots


def test_a_prompt_with_most_of_its_time_left_waits_for_memory() -> None:
    engine = EngineBuilder(total_blocks=60)
    running = [engine.decode(prompt_tokens=320, tpot_s=np.inf, status=Status.BEST_EFFORT) for _ in range(2)]
    engine.wait(300, max_tokens=20, due_in_s=3.0, waited_s=2.0)
    plan = planned(engine)
    assert len(plan.preempt) == 0
    assert plan.slots.tolist() == running


@pytest.mark.parametrize(
    ("waited_s", "running_blocks", "tpot_s", "starts"),
    [(10.0, 20, np.inf, True), (10.0, 62, np.inf, False), (50.0, 62, np.inf, True), (10.0, 62, 0.1, True)],
    ids=["KV is plenty", "KV would be short", "its time has come", "it is read as it comes"],
)
def test_an_answer_due_as_a_whole_leaves_kv_to_others_while_its_start_can_wait(
    waited_s: float, running_blocks: int, tpot_s: float, starts: bool
) -> None:
    engine = EngineBuilder(total_blocks=100)
    engine.decode(prompt_tokens=16 * running_blocks - 10, ahead_s=0.09)
    answer = engine.wait(160, max_tokens=20, tpot_s=tpot_s, due_in_s=60.0 - waited_s, waited_s=waited_s)
    rows = engine.table.rows
    rows["answer_due_s"][answer] = engine.now_s - waited_s + 300.0
    rows["promised_ttft_due_s"][answer] = engine.now_s - waited_s + 60.0
    assert (answer in planned(engine).slots) == starts


def test_when_everyone_is_short_of_memory_the_cheapest_promise_is_lost() -> None:
    engine = EngineBuilder(total_blocks=60)
    cheap = engine.decode(prompt_tokens=311, output_tokens=10, ahead_s=0.02)  # 320 computed: the next needs a block
    dear = engine.decode(prompt_tokens=631, output_tokens=10, ahead_s=0.02)
    plan = planned(engine)
    assert plan.preempt.tolist() == [cheap]
    assert plan.demoted.tolist() == [cheap]
    assert plan.slots.tolist() == [dear]


def test_nobody_is_sacrificed_while_the_others_are_only_blocked() -> None:
    engine = EngineBuilder()
    for _ in range(3):
        engine.table.rows["blocked"][engine.decode(ahead_s=0.01)] = 1
    plan = planned(engine)
    assert len(plan.demoted) == len(plan.preempt) == len(plan.slots) == 0


def test_no_more_requests_than_the_engine_has_seats() -> None:
    engine = EngineBuilder(max_num_seqs=3)
    engine.decode(ahead_s=0.2)
    for _ in range(5):
        engine.wait(50)
    plan = planned(engine)
    assert len(plan.slots) == 3


def test_chunks_before_the_last_are_not_tiny() -> None:
    engine = EngineBuilder()
    for _ in range(30):
        engine.decode(ahead_s=0.03)
    engine.wait(3000, due_in_s=3.0)
    plan = planned(engine)
    chunks = plan.tokens[plan.reasons == Reason.PREFILL_DEADLINE]
    assert all(chunk >= 16 for chunk in chunks)


def test_a_backlog_without_promises_fills_every_step() -> None:
    """Nobody is due, so the token budget is the only limit: as full as a stock engine's step."""
    engine = EngineBuilder(total_blocks=20_000)
    for _ in range(3):
        engine.decode(tpot_s=np.inf, status=Status.BEST_EFFORT)
    for _ in range(5):
        engine.best_effort(3000)
    assert planned(engine).num_tokens == 2048


def test_kv_held_by_others_than_promised_decodes_makes_no_prompt_wait() -> None:
    engine = EngineBuilder(total_blocks=300)
    engine.best_effort(prompt_tokens=4000)
    prompt = engine.prefilling(900, 100)
    assert prompt in planned(engine).slots
