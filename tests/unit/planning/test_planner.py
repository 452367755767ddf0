"""What the planner decides in small situations."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.plan import Reason, StepPlan
from slos_serve.core.request import Status
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from tests.builders import OPT_13B_A100, EngineBuilder, carried_out


def planned(
    engine: EngineBuilder, settings: PlannerSettings | None = None, *, free_blocks: int | None = None
) -> StepPlan:
    return carried_out(Planner(OPT_13B_A100, 2, settings), engine.now_s, engine.view(free_blocks=free_blocks))


def reason_of(plan: StepPlan, slot: int) -> Reason | None:
    where = np.flatnonzero(plan.slots == slot)
    return Reason(int(plan.reasons[where[0]])) if len(where) else None


def test_an_idle_engine_runs_the_whole_prompt_and_promises() -> None:
    engine = EngineBuilder()
    slot = engine.wait(500)
    plan = planned(engine)
    assert plan.slots.tolist() == [slot]
    assert plan.tokens.tolist() == [500]
    assert plan.admitted.tolist() == [slot]
    assert engine.table.rows["status"][slot] == Status.ADMITTED


def test_prefill_runs_in_deadline_order_not_in_arrival_order() -> None:
    engine = EngineBuilder()
    engine.decode(ahead_s=0.09)
    late = engine.wait(600, due_in_s=2.0)
    soon = engine.wait(600, due_in_s=1.0)
    plan = planned(engine)
    assert reason_of(plan, soon) is Reason.PREFILL_DEADLINE
    assert late not in plan.slots[:-1]


def test_a_decode_ahead_of_its_deadlines_is_held_while_there_is_prefill() -> None:
    engine = EngineBuilder()
    due = engine.decode(ahead_s=0.06)
    ahead = engine.decode(ahead_s=1.5)
    engine.wait(3000, due_in_s=2.0)
    plan = planned(engine)
    assert reason_of(plan, due) is Reason.DECODE_DUE
    assert ahead in plan.held
    assert plan.held_reasons[plan.held == ahead].tolist() == [Reason.HELD_AHEAD]


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


def test_two_prompts_are_chunked_to_the_decodes_pace() -> None:
    engine = EngineBuilder()
    engine.decode(ahead_s=0.08, max_tokens=100)
    engine.wait(1000, due_in_s=3.0)
    engine.wait(1000, due_in_s=3.0)
    assert planned(engine).predicted_s <= 0.08


def test_the_step_ends_by_the_earliest_due_time() -> None:
    engine = EngineBuilder()
    engine.decode(ahead_s=0.08)
    engine.wait(5000, due_in_s=3.0)
    plan = planned(engine)
    assert 0.05 < plan.predicted_s <= 0.08


def test_what_cannot_be_attained_even_alone_becomes_best_effort() -> None:
    engine = EngineBuilder()
    lost = engine.wait(4000, due_in_s=0.1)
    plan = planned(engine)
    assert plan.demoted.tolist() == [lost]
    assert engine.table.rows["status"][lost] == Status.BEST_EFFORT
    assert reason_of(plan, lost) is Reason.BEST_EFFORT


def test_a_decode_beyond_recovery_is_demoted() -> None:
    engine = EngineBuilder()
    slot = engine.decode(output_tokens=90, ahead_s=-20.0, max_tokens=100)
    assert planned(engine).demoted.tolist() == [slot]


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


def test_when_everyone_is_short_of_memory_the_cheapest_promise_is_lost() -> None:
    engine = EngineBuilder(total_blocks=60)
    cheap = engine.decode(prompt_tokens=311, output_tokens=10, ahead_s=0.02)  # 320 computed: the next needs a block
    dear = engine.decode(prompt_tokens=631, output_tokens=10, ahead_s=0.02)
    plan = planned(engine)
    assert plan.preempt.tolist() == [cheap]
    assert plan.demoted.tolist() == [cheap]
    assert plan.slots.tolist() == [dear]


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


@pytest.mark.parametrize("seed", range(30))
def test_any_plan_can_be_followed_by_order_and_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    engine = EngineBuilder(total_blocks=int(rng.integers(100, 2000)), max_num_seqs=40)
    for _ in range(int(rng.integers(0, 20))):
        status = Status.BEST_EFFORT if rng.random() < 0.3 else Status.ADMITTED
        engine.decode(tpot_s=float(rng.choice([0.05, 0.1])), ahead_s=float(rng.random()) - 0.1, status=status)
    for _ in range(int(rng.integers(0, 4))):
        engine.prefilling(1000, int(rng.integers(1, 900)), due_in_s=float(rng.random()))
    for _ in range(int(rng.integers(0, 30))):
        engine.wait(int(rng.integers(1, 3000)), due_in_s=float(rng.random() * 3))
    for _ in range(int(rng.integers(0, 5))):
        engine.best_effort(int(rng.integers(1, 1000)))
    view = engine.view()
    plan = Planner(OPT_13B_A100, 2).plan(engine.now_s, view)
    rows = engine.table.rows
    todo = rows["prompt_tokens"] + rows["output_tokens"] - rows["computed_tokens"]
    partial = [k for k, slot in enumerate(plan.slots) if plan.tokens[k] < todo[slot]]
    assert len(partial) <= 1
    running = rows["running"][plan.slots]
    assert (np.diff(running) <= 0).all()
    if partial:
        # Whoever walks the same order with the same budget gives the same tokens.
        assert partial[0] == len(plan.slots) - 1
    assert len(set(plan.slots.tolist())) == len(plan.slots)
    assert (plan.tokens > 0).all()
    assert plan.num_tokens <= view.max_num_batched_tokens
    new = [slot for slot in plan.slots if rows["running"][slot] == 0]
    assert len(engine.running) - len(plan.preempt) + len(new) <= view.max_num_seqs
    assert not set(plan.preempt.tolist()) & set(plan.slots.tolist())


# A small model on a CPU, slow for a while: a step's fixed cost is more than half of the tightest pace.
SLOW_CPU = BatchTimeModel(0.0036, 0.0, 0.0035, 0.119, 1.4e-5, 5.9e-7, 1.8e-3)


@pytest.mark.parametrize(("ahead_s", "promised"), [(1.6, True), (0.21, False)])
def test_admission_knows_that_steps_beside_decodes_ahead_last_longer(ahead_s: float, promised: bool) -> None:
    engine = EngineBuilder()
    for _ in range(2):
        engine.decode(tpot_s=0.215, ahead_s=ahead_s, max_tokens=400)
    slot = engine.wait(180, due_in_s=1.3, tpot_s=0.36)
    plan = Planner(SLOW_CPU, 2).plan(engine.now_s, engine.view())
    assert (slot in plan.admitted) is promised


def test_a_decode_that_is_promised_no_pace_keeps_nobody_waiting() -> None:
    engine, planner = EngineBuilder(), Planner(OPT_13B_A100, 2)
    slot = engine.decode(tpot_s=np.inf)
    engine.table.rows["max_stall_s"][slot] = np.inf
    other = engine.best_effort(50)
    assert other in planner.plan(engine.now_s, engine.view()).slots


def test_kv_held_by_others_than_promised_decodes_makes_no_prompt_wait() -> None:
    engine = EngineBuilder(total_blocks=300)
    engine.best_effort(prompt_tokens=4000)
    prompt = engine.prefilling(900, 100)
    assert prompt in planned(engine).slots


def test_a_plan_that_is_dropped_leaves_no_trace() -> None:
    engine, planner = EngineBuilder(), Planner(OPT_13B_A100, 2)
    engine.wait(300)
    engine.wait(4000, due_in_s=0.01)  # lost
    engine.best_effort(50)
    engine.decode(ahead_s=0.1)
    before = {name: engine.table.rows[name].copy() for name in engine.table.rows.dtype.names or ()}
    first = planner.plan(engine.now_s, engine.view())
    assert len(first.admitted) == len(first.demoted) == 1
    for name, column in before.items():
        if name != "expected_tokens":
            np.testing.assert_array_equal(engine.table.rows[name], column, name)
    assert planner.longest_step_s() == Planner(OPT_13B_A100, 2).longest_step_s()
    assert planner.counters.plans == 0
    second = planner.plan(engine.now_s, engine.view())
    assert second.slots.tolist() == first.slots.tolist() and second.admitted.tolist() == first.admitted.tolist()


def test_only_requests_that_ran_are_promised() -> None:
    engine, planner = EngineBuilder(), Planner(OPT_13B_A100, 2)
    first, second = engine.wait(300), engine.wait(300)
    view = engine.view()
    plan = planner.plan(engine.now_s, view)
    assert sorted(plan.admitted.tolist()) == [first, second]
    planner.commit(plan, view, np.array([first]))
    assert engine.table.rows["status"][[first, second]].tolist() == [Status.ADMITTED, Status.UNDECIDED]


@pytest.mark.parametrize("waits", [False, True])
def test_promises_whose_last_token_is_in_flight_are_kept(waits: bool) -> None:
    """Review, A1: they were taken for requests short of KV and demoted, or preempted for a prompt."""
    engine = EngineBuilder(total_blocks=60 if waits else 4000)
    for _ in range(3):
        engine.decode(output_tokens=100, max_tokens=100, ahead_s=0.05)
    slot = engine.wait(600, due_in_s=1.0) if waits else -1
    plan = planned(engine)
    assert len(plan.demoted) == len(plan.preempt) == len(plan.slots) == 0
    assert slot not in plan.slots


def test_hopeless_requests_change_nothing_for_the_others() -> None:
    """Review, A7: their TTFT made every step short, and they counted as declined."""
    engine, planner = EngineBuilder(), Planner(OPT_13B_A100, 2)
    engine.wait(500, due_in_s=1.0)
    carried_out(planner, engine.now_s, engine.view())
    before_s = planner.longest_step_s()
    for _ in range(5):
        engine.wait(500, due_in_s=0.001)
    carried_out(planner, engine.now_s, engine.view())
    assert planner.longest_step_s() == pytest.approx(before_s)


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


def test_nobody_is_sacrificed_while_the_others_are_only_blocked() -> None:
    engine = EngineBuilder()
    for _ in range(3):
        engine.table.rows["blocked"][engine.decode(ahead_s=0.01)] = 1
    plan = planned(engine)
    assert len(plan.demoted) == len(plan.preempt) == len(plan.slots) == 0


def test_a_backlog_without_promises_fills_every_step() -> None:
    """Nobody is due, so the token budget is the only limit: as full as a stock engine's step."""
    engine = EngineBuilder(total_blocks=20_000)
    for _ in range(3):
        engine.decode(tpot_s=np.inf, status=Status.BEST_EFFORT)
    for _ in range(5):
        engine.best_effort(3000)
    assert planned(engine).num_tokens == 2048


def test_a_prompt_that_grew_is_a_prefill_again() -> None:
    engine = EngineBuilder()
    slot = engine.decode(ahead_s=0.5)
    engine.table.rows["prompt_tokens"][slot] += 300
    plan = planned(engine)
    assert reason_of(plan, slot) is Reason.PREFILL_DEADLINE
    assert plan.tokens.tolist() == [301]
