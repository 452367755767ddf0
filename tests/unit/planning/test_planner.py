"""What the planner decides in small situations."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.plan import Reason
from slos_serve.core.request import Status
from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from tests.builders import OPT_13B_A100, EngineBuilder, carried_out, planned, reason_of


def test_an_idle_engine_runs_the_whole_prompt_and_promises() -> None:
    engine = EngineBuilder()
    slot = engine.wait(500)
    plan = planned(engine)
    assert plan.slots.tolist() == [slot]
    assert plan.tokens.tolist() == [500]
    assert plan.admitted.tolist() == [slot]
    assert engine.table.rows["status"][slot] == Status.ADMITTED


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
    assert planner.arrivals.tightest_s == np.inf
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
    before_s = planner.arrivals.tightest_s
    for _ in range(5):
        engine.wait(500, due_in_s=0.001)
    carried_out(planner, engine.now_s, engine.view())
    assert planner.arrivals.tightest_s == pytest.approx(before_s)


def test_a_class_that_was_declined_again_and_again_wins_against_one_that_was_not() -> None:
    """Both are due at once and only one can be in time: the shorter prompt, until its class has had its turn."""

    def contest(planner: Planner) -> int:
        engine = EngineBuilder()
        for class_index, prompt_tokens in ((0, 1500), (1, 1900)):
            engine.wait(prompt_tokens, due_in_s=0.35, class_index=class_index)
        won = carried_out(planner, engine.now_s, engine.view()).admitted
        later_s = engine.now_s + 0.3  # the other one is lost by then
        carried_out(planner, later_s, engine.view())
        return int(engine.table.rows["class_index"][won[0]])

    winners = {}
    for fairness in (0.0, 0.7):
        planner = Planner(OPT_13B_A100, 2, PlannerSettings(fairness=fairness))
        winners[fairness] = [contest(planner) for _ in range(20)]
    assert set(winners[0.0]) == {0}
    assert winners[0.7][0] == 0 and 5 <= sum(winners[0.7]) <= 10
