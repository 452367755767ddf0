"""GMAX: density of goodput, groups of like length, frames, the size of the group, room and dropping."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.plan import StepPlan
from slos_serve.perf.batch_time import BatchShape
from slos_serve.policies.jitserve import JitServe
from slos_serve.policies.registry import POLICIES
from slos_serve.sim.limits import EngineLimits
from tests.builders import EngineBuilder
from tests.sim_builders import PLAIN, run, workload


def carried_out(policy: JitServe, engine: EngineBuilder, step_s: float = 0.02) -> StepPlan:
    """A plan that ran; every step takes ``step_s``."""
    view = engine.view()
    plan = policy.plan(engine.now_s, view)
    policy.commit(plan, view, plan.slots)
    policy.on_step_done(BatchShape(max(plan.num_tokens, 1)), step_s)
    return plan


def density(policy: JitServe, engine: EngineBuilder, slot: int) -> float:
    return float(policy.density(engine.now_s, engine.table.rows, np.array([slot]))[0])


def small_group(policy: JitServe, engine: EngineBuilder, frames: int = 60) -> None:
    """Let steps be too slow for the pace until the group is as small as it gets."""
    for _ in range(frames):
        carried_out(policy, engine, step_s=1.0)


def test_density_is_goodput_over_service() -> None:
    engine = EngineBuilder()
    slot = engine.wait(500, due_in_s=10.0, tpot_s=1.0)
    engine.table.rows["expected_tokens"][slot] = 50
    # One prompt step and 50 answer steps of 20 ms; 500 + 8 * 50 tokens.
    assert density(JitServe(1), engine, slot) == pytest.approx(900 / (51 * 0.02))


def test_goodput_that_would_be_late_counts_in_proportion_and_by_the_power() -> None:
    engine = EngineBuilder()
    slot = engine.wait(500, due_in_s=0.01, tpot_s=1.0)
    engine.table.rows["expected_tokens"][slot] = 50
    assert density(JitServe(1), engine, slot) == pytest.approx((250 + 400) / (51 * 0.02))
    assert density(JitServe(1, lateness_power=2.0), engine, slot) == pytest.approx((125 + 400) / (51 * 0.02))


def test_what_was_gained_counts_while_the_promise_holds() -> None:
    engine = EngineBuilder()
    slot = engine.decode(prompt_tokens=200, output_tokens=10, tpot_s=1.0)
    engine.table.rows["expected_tokens"][slot] = 20
    held = density(JitServe(1), engine, slot)
    assert held == pytest.approx((200 + 8 * 10 + 8 * 10) / (10 * 0.02))
    engine.table.rows["missed"][slot] = 1
    assert density(JitServe(1), engine, slot) < held


def test_nothing_promised_comes_last() -> None:
    engine = EngineBuilder()
    free, late = engine.best_effort(10), engine.wait(2000, due_in_s=-3.0)
    plan = JitServe(1).plan(engine.now_s, engine.view())
    assert plan.slots.tolist() == [late]
    assert density(JitServe(1), engine, free) < density(JitServe(1), engine, late)


def test_prompts_run_in_order_of_density() -> None:
    engine = EngineBuilder()
    long_answer, short_answer = engine.wait(400, max_tokens=2000), engine.wait(400, max_tokens=5)
    plan = JitServe(1).plan(engine.now_s, engine.view())
    assert plan.slots.tolist() == [short_answer, long_answer]
    assert plan.tokens.tolist() == [400, 112]


def lengths_of_groups(policy: JitServe) -> tuple[EngineBuilder, list[int], list[int]]:
    """Six decodes, three short and three long, and a group that has become small."""
    engine = EngineBuilder()
    short = [engine.decode(prompt_tokens=100, tpot_s=0.05) for _ in range(3)]
    long = [engine.decode(prompt_tokens=1500, tpot_s=0.05) for _ in range(3)]
    policy._batch = 3.0
    policy._steps_left = 0
    return engine, short, long


def test_a_group_is_of_like_length_even_if_single_others_are_denser() -> None:
    policy = JitServe(1, frame_steps=1)
    engine, short, long = lengths_of_groups(policy)
    engine.table.rows["max_tokens"][short] = [200, 200, 11]  # one short one is about to end: the densest of all
    engine.table.rows["max_tokens"][long] = 20
    plan = policy.plan(engine.now_s, engine.view())
    assert sorted(plan.slots.tolist()) in ([*short[1:], long[0]], long)
    dense = policy.density(engine.now_s, engine.table.rows, np.array([*short, *long]))
    assert int(np.argmax(dense)) == 2


def test_the_group_is_the_window_with_the_largest_sum() -> None:
    policy = JitServe(1, frame_steps=1)
    engine, _, long = lengths_of_groups(policy)
    engine.table.rows["max_tokens"][long] = 15
    assert sorted(policy.plan(engine.now_s, engine.view()).slots.tolist()) == long


@pytest.mark.parametrize(("top_k", "is_densest"), [(1, True), (2, False)])
def test_top_k_limits_who_is_looked_at(top_k: int, is_densest: bool) -> None:
    policy = JitServe(1, frame_steps=1, top_k=top_k)
    engine, short, long = lengths_of_groups(policy)
    engine.table.rows["max_tokens"][short] = [12, 12, 40]
    engine.table.rows["max_tokens"][long] = [2000, 2000, 12]
    plan = policy.plan(engine.now_s, engine.view())
    everyone = np.array([*short, *long])
    densest = everyone[np.argsort(-policy.density(engine.now_s, engine.table.rows, everyone))][:3]
    assert (sorted(plan.slots.tolist()) == sorted(densest.tolist())) == is_densest


def test_a_group_stays_for_a_frame_and_ends_with_it() -> None:
    policy = JitServe(1, frame_steps=4)
    engine, short, long = lengths_of_groups(policy)
    rows = engine.table.rows
    rows["max_tokens"][long] = 15
    assert sorted(carried_out(policy, engine).slots.tolist()) == long
    rows["missed"][long] = 1  # by density they would lose their place now
    rows["max_tokens"][long], rows["max_tokens"][short] = 10_000, 11
    for _ in range(3):
        policy._batch = 3.0
        assert sorted(carried_out(policy, engine).slots.tolist()) == long
    policy._batch = 3.0
    assert sorted(carried_out(policy, engine).slots.tolist()) == short


def test_a_plan_that_does_not_run_chooses_nobody() -> None:
    policy = JitServe(1, frame_steps=4)
    engine, short, long = lengths_of_groups(policy)
    engine.table.rows["max_tokens"][long] = 15
    policy.plan(engine.now_s, engine.view())
    engine.table.rows["max_tokens"][long] = 10_000
    engine.table.rows["max_tokens"][short] = 11
    assert sorted(policy.plan(engine.now_s, engine.view()).slots.tolist()) == short


def test_free_places_go_to_those_of_the_groups_lengths() -> None:
    policy = JitServe(1, frame_steps=10)
    engine = EngineBuilder()
    for _ in range(2):
        engine.decode(prompt_tokens=100)
    carried_out(policy, engine)
    policy._batch = 3.0
    unlike, like = engine.wait(400, max_tokens=5), engine.wait(110, max_tokens=90)
    plan = carried_out(policy, engine)
    assert like in plan.slots
    assert unlike not in plan.slots
    engine.waiting.remove(like)
    assert unlike in carried_out(policy, engine).slots


def test_the_group_shrinks_while_steps_are_too_slow_and_grows_again() -> None:
    engine = EngineBuilder()
    for _ in range(20):
        engine.decode(tpot_s=0.05)
    policy = JitServe(1, frame_steps=1)
    assert len(carried_out(policy, engine).slots) == 20
    small_group(policy, engine)
    assert len(carried_out(policy, engine, step_s=0.01).slots) == 1
    for _ in range(200):
        plan = carried_out(policy, engine, step_s=0.01)
    assert len(plan.slots) == 20


def test_a_denser_prompt_of_the_group_takes_the_room_of_one_outside_it() -> None:
    engine = EngineBuilder(total_blocks=100)
    outside = engine.decode(prompt_tokens=80 * 16, tpot_s=0.05)
    engine.table.rows["missed"][outside] = 1
    inside = engine.wait(50 * 16, max_tokens=5)
    policy = JitServe(1, frame_steps=1)
    policy._batch = 1.0
    plan = policy.plan(engine.now_s, engine.view())
    assert plan.preempt.tolist() == [outside]
    assert plan.slots.tolist() == [inside]


def test_without_room_and_without_a_victim_the_running_ones_go_on() -> None:
    engine = EngineBuilder(total_blocks=100)
    outside = engine.decode(prompt_tokens=80 * 16, output_tokens=10, max_tokens=12, tpot_s=0.05)
    engine.wait(50 * 16, max_tokens=5)
    policy = JitServe(1, frame_steps=1)
    policy._batch = 1.0
    plan = policy.plan(engine.now_s, engine.view())
    assert len(plan.preempt) == 0
    assert plan.slots.tolist() == [outside]


def test_a_late_request_is_dropped_only_after_it_has_waited_long() -> None:
    engine = EngineBuilder()
    dropped = engine.wait(100, due_in_s=-1.0, waited_s=6.0)
    engine.wait(100, due_in_s=-1.0, waited_s=2.0)
    engine.wait(100, due_in_s=1.0, waited_s=6.0)
    again = engine.wait(100, due_in_s=-1.0, waited_s=6.0)
    engine.table.rows["output_tokens"][again] = 3
    plan = JitServe(1).plan(engine.now_s, engine.view())
    assert plan.rejected.tolist() == [dropped]
    assert dropped not in plan.slots


def test_answers_are_taken_for_as_long_as_a_high_quantile_of_those_seen() -> None:
    engine = EngineBuilder()
    slot = engine.wait(max_tokens=10_000)
    policy = JitServe(1)
    for _ in range(20):
        for tokens in range(100, 1100, 100):
            policy.on_request_done(0, 200, tokens)
    policy.plan(engine.now_s, engine.view())
    assert 850 <= engine.table.rows["expected_tokens"][slot] <= 1050


def test_the_oracle_is_told_true_lengths_and_the_other_is_not() -> None:
    load = workload([0.0, 0.0], [400, 400], [300, 3])
    limits = EngineLimits(kv_capacity_tokens=16_000, max_num_batched_tokens=8192)
    small = {"token_budget": 512}
    first = {name: run(load, name, PLAIN, limits, parameters=small).token_s for name in ("jitserve", "jitserve-oracle")}
    start = run(load, "jitserve", PLAIN, limits, parameters=small).token_start
    assert first["jitserve-oracle"][start[1]] < first["jitserve-oracle"][start[0]]
    assert first["jitserve"][start[1]] >= first["jitserve"][start[0]]
    assert POLICIES["jitserve-oracle"].true_lengths
    assert not POLICIES["jitserve"].true_lengths
