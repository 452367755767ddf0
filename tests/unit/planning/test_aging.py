"""Whoever holds no promise goes on, however long overload lasts."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.plan import Reason, StepPlan
from slos_serve.core.request import Status
from slos_serve.core.slo import SLO, single_stage
from slos_serve.planning.aging import NOBODY, Aging
from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from slos_serve.sim.limits import EngineLimits
from slos_serve.sim.recording import Recording
from slos_serve.workload.calls import Workload
from tests.builders import OPT_13B_A100, EngineBuilder
from tests.sim_builders import GPU, run, workload

FREE = single_stage("free", SLO())
LOW = single_stage("low", SLO(ttft_ms=4000.0, tpot_ms=100.0), weight=0.01)
CHAT = single_stage("chat", SLO(ttft_ms=1000.0, tpot_ms=100.0))
AGING_S = 5.0


def full_engine() -> EngineBuilder:
    """Promises leave no room in a step: decodes due at once, and a prompt that takes what is left."""
    engine = EngineBuilder()
    for _ in range(40):
        engine.decode(prompt_tokens=1000, tpot_s=0.1, ahead_s=0.01)
    engine.prefilling(3000, 100, due_in_s=5.0)
    return engine


def plan_at(planner: Planner, engine: EngineBuilder, after_s: float) -> StepPlan:
    """A plan that much later, everything promised as due as it was."""
    view = engine.view()
    for name in ("stage_start_s", "last_token_s", "ttft_due_s"):
        view.table.rows[name] += after_s
    plan = planner.plan(engine.now_s + after_s, view)
    for name in ("stage_start_s", "last_token_s", "ttft_due_s"):
        view.table.rows[name] -= after_s
    return plan


def test_the_oldest_gets_a_turn_when_its_time_is_up() -> None:
    engine = full_engine()
    old, young = engine.best_effort(500), engine.best_effort(500)
    planner = Planner(OPT_13B_A100, 2, PlannerSettings(aging_s=AGING_S))
    assert old not in plan_at(planner, engine, 0.0).slots
    assert old not in plan_at(planner, engine, 0.9 * AGING_S).slots
    plan = plan_at(planner, engine, AGING_S)
    assert plan.tokens[plan.slots == old].sum() >= 64
    assert young not in plan.slots


def test_a_turn_takes_no_decode_of_its_due_token() -> None:
    engine = full_engine()
    engine.best_effort(500)
    planner = Planner(OPT_13B_A100, 2, PlannerSettings(aging_s=AGING_S))
    first = plan_at(planner, engine, 0.0)
    turn = plan_at(planner, engine, AGING_S)
    due = set(first.slots[first.reasons == Reason.DECODE_DUE].tolist())
    assert due
    assert due <= set(turn.slots.tolist())


def test_one_that_has_had_a_turn_is_preempted_for_nobody() -> None:
    engine = EngineBuilder(total_blocks=60)
    old = engine.decode(prompt_tokens=320, tpot_s=np.inf, status=Status.BEST_EFFORT)
    engine.decode(prompt_tokens=320, tpot_s=np.inf, status=Status.BEST_EFFORT)
    engine.wait(700, due_in_s=100.0, max_tokens=20)
    planner = Planner(OPT_13B_A100, 2, PlannerSettings(aging_s=AGING_S))
    assert old in plan_at(Planner(OPT_13B_A100, 2), engine, 0.0).preempt
    engine.table.rows["status"][engine.waiting[0]] = Status.UNDECIDED
    planner._aging.look(engine.table.rows, engine.view().running, engine.view().waiting, engine.now_s - AGING_S)
    plan = plan_at(planner, engine, 0.0)
    assert planner._aging.kept == old
    assert old not in plan.preempt


def test_progress_puts_the_turn_off() -> None:
    engine = EngineBuilder()
    slot = engine.decode(tpot_s=np.inf, status=Status.BEST_EFFORT)
    rows, view, aging = engine.table.rows, engine.view(), Aging(AGING_S)
    for after_s in (0.0, 4.0, 8.0, 12.0):
        aging.look(rows, view.running, view.waiting, engine.now_s + after_s)
        assert not aging.due
        rows["output_tokens"][slot] += 1
        rows["computed_tokens"][slot] += 1
    aging.look(rows, view.running, view.waiting, engine.now_s + 13.0)
    aging.look(rows, view.running, view.waiting, engine.now_s + 13.0 + AGING_S)
    assert aging.due
    assert aging.kept == slot


def test_the_rule_can_be_switched_off() -> None:
    engine = full_engine()
    engine.best_effort(500)
    aging, view = Aging(0.0), engine.view()
    aging.look(engine.table.rows, view.running, view.waiting, 0.0)
    aging.look(engine.table.rows, view.running, view.waiting, 1e9)
    assert (aging.kept, aging.due) == (NOBODY, False)


OVERLOAD_S = 90.0
LIMITS = EngineLimits(kv_capacity_tokens=16 * 1000, max_num_batched_tokens=8192)


def overload() -> Workload:
    """Far more promised work than the engine can do, for a minute and a half; early on, one of each kind that loses."""
    arrivals = np.sort(np.random.default_rng(0).uniform(0.0, OVERLOAD_S, 1100)).tolist()
    count = len(arrivals)
    kinds = [0] * count
    kinds[20], kinds[30] = 1, 2
    return workload(arrivals, [700] * count, [60] * count, (CHAT, FREE, LOW), kinds)


def longest_gap_s(recording: Recording, call: int) -> float:
    """Longest time a call went without a token while overload lasted, from its arrival on."""
    first = int(recording.token_start[call])
    own = recording.token_s[first : first + int(recording.workload.calls["output_tokens"][call])]
    arrival_s = float(recording.calls["arrival_s"][call])
    times = np.concatenate(([0.0], np.minimum(own, OVERLOAD_S - arrival_s)))
    return float(np.diff(times).max())


@pytest.mark.parametrize("aging_s", [3.0, 0.0])
def test_everyone_ends_while_overload_lasts(aging_s: float) -> None:
    load = overload()
    parameters = {"aging_s": aging_s}
    recording = run(load, "slos-serve", GPU, LIMITS, parameters=parameters)
    calls = [int(np.flatnonzero(load.calls["class_index"] == kind)[0]) for kind in (1, 2)]
    gaps = [longest_gap_s(recording, call) for call in calls]
    done_s = [float(recording.calls["done_s"][call]) for call in calls]
    if aging_s > 0.0:
        assert max(done_s) < OVERLOAD_S
    else:
        assert max(done_s) > OVERLOAD_S  # else this test could not fail
        assert max(gaps) > 30.0


def test_what_a_preemption_takes_is_no_progress() -> None:
    engine = EngineBuilder()
    slot = engine.decode(tpot_s=np.inf, status=Status.BEST_EFFORT)
    rows, view, aging = engine.table.rows, engine.view(), Aging(AGING_S)
    computed = int(rows["computed_tokens"][slot])
    for after_s, tokens in ((0.0, computed), (2.0, 0), (4.0, computed), (AGING_S, computed)):
        rows["computed_tokens"][slot] = tokens
        aging.look(rows, view.running, view.waiting, engine.now_s + after_s)
    assert aging.due
