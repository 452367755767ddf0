"""QoServe: steps sized by slack, the hybrid order, relegation, tiers with a deadline for the last token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.plan import StepPlan
from slos_serve.perf.batch_time import BatchShape
from slos_serve.policies.qoserve import QoServe, first_due_s, step_sizes
from tests.builders import EngineBuilder
from tests.sim_builders import PLAIN

BUDGET = 8192


def decode_due_in(engine: EngineBuilder, slack_s: float, tpot_s: float = 0.1) -> int:
    """A decode whose next token is due that much later."""
    slot = engine.decode(tpot_s=tpot_s)
    row = engine.table.rows[slot]
    row["stage_start_s"] = engine.now_s + slack_s - row["stage_tokens"] * tpot_s
    return slot


def policy(**given: object) -> QoServe:
    return QoServe(PLAIN, 2, **given)  # type: ignore[arg-type]  # by name


def plan_of(chosen: QoServe, engine: EngineBuilder) -> StepPlan:
    return chosen.plan(engine.now_s, engine.view(max_num_batched_tokens=BUDGET))


def test_the_grid_is_the_artifacts() -> None:
    assert step_sizes(2552).tolist() == [128, *range(256, 2049, 256), 2304, 2552]
    assert step_sizes(100).tolist() == [100]


@pytest.mark.parametrize(
    ("slack_s", "size"),
    # A step of n tokens takes 10 ms + 0.1 ms n; a fifth is added.
    [(0.001, 128), (0.04, 128), (0.05, 256), (0.1, 512), (0.25, 1792), (5.0, 2552)],
)
def test_the_step_grows_with_the_slack_of_the_tightest_decode(slack_s: float, size: int) -> None:
    engine = EngineBuilder()
    decode_due_in(engine, slack_s)
    decode_due_in(engine, 30.0)
    engine.wait(5000, due_in_s=60.0)
    assert plan_of(policy(), engine).num_tokens == size


def test_without_a_pace_to_keep_the_step_is_the_largest() -> None:
    engine = EngineBuilder()
    engine.decode(tpot_s=np.inf)
    engine.wait(5000)
    assert plan_of(policy(), engine).num_tokens == 2552
    assert plan_of(policy(max_tokens=4096), engine).num_tokens == 4096


def test_every_decode_runs_however_small_the_step() -> None:
    engine = EngineBuilder()
    decodes = [decode_due_in(engine, -0.5) for _ in range(150)]
    engine.wait(500)
    plan = plan_of(policy(), engine)
    assert plan.slots.tolist() == decodes


def test_a_decode_that_missed_does_not_bound_the_step() -> None:
    engine = EngineBuilder()
    slot = decode_due_in(engine, -0.5)
    engine.wait(5000)
    assert plan_of(policy(), engine).num_tokens == 128
    engine.table.rows["missed"][slot] = 1
    assert plan_of(policy(), engine).num_tokens == 2552


def test_context_counts_in_the_predicted_time() -> None:
    engine = EngineBuilder()
    decode_due_in(engine, 0.1)
    engine.prefilling(9000, 8000, due_in_s=60.0)
    dear = QoServe(replace(PLAIN, k_ctx_s=5e-6), 1)
    # 40 ms more for 8,209 tokens of context: 1.2 * (10 + 41 + 0.1 n) ms <= 100 ms up to n = 323.
    assert plan_of(dear, engine).num_tokens == 256


def test_alpha_moves_the_order_from_deadline_to_shortest_prompt() -> None:
    engine = EngineBuilder()
    long, short = engine.wait(2000, due_in_s=1.0), engine.wait(1000, due_in_s=5.0)
    fast = {"max_tokens": 512, "time_margin": 0.0}
    assert plan_of(policy(alpha_ms=0.0, **fast), engine).slots.tolist() == [long]
    assert plan_of(policy(alpha_ms=8.0, **fast), engine).slots.tolist() == [short]


def test_only_what_is_left_of_a_prompt_counts() -> None:
    engine = EngineBuilder()
    nearly = engine.prefilling(2000, 1900, due_in_s=5.0)
    whole = engine.wait(1000, due_in_s=3.0)
    assert plan_of(policy(max_tokens=128), engine).slots.tolist() == [nearly, whole]


def lost_and_safe() -> tuple[EngineBuilder, int, int]:
    """A prompt of 5,000 tokens due in 0.2 s, which takes half a second alone, and one that is in no hurry."""
    engine = EngineBuilder()
    return engine, engine.wait(5000, due_in_s=0.2), engine.wait(600, due_in_s=100.0)


def test_a_lost_prompt_is_relegated_behind_all_others_and_not_refused() -> None:
    engine, lost, safe = lost_and_safe()
    plan = plan_of(policy(max_tokens=512, alpha_ms=0.0), engine)
    assert plan.slots.tolist() == [safe]
    assert plan.demoted.tolist() == [lost]
    assert len(plan.rejected) == 0
    engine.waiting.remove(safe)
    assert plan_of(policy(max_tokens=512), engine).slots.tolist() == [lost]


def test_a_relegated_prompt_stays_so_once_the_plan_ran() -> None:
    engine, lost, safe = lost_and_safe()
    chosen = policy(max_tokens=512, alpha_ms=0.0)
    view = engine.view(max_num_batched_tokens=BUDGET)
    plan = chosen.plan(engine.now_s, view)
    engine.table.rows["ttft_due_s"][lost] += 50.0  # as if it could be in time again
    assert chosen.plan(engine.now_s, view).slots.tolist() == [lost]  # a plan that did not run leaves no trace
    chosen.commit(plan, view, plan.slots)
    again = chosen.plan(engine.now_s, view)
    assert again.slots.tolist() == [safe]
    assert len(again.demoted) == 0


def test_the_mark_goes_with_the_request_not_with_its_slot() -> None:
    engine, lost, safe = lost_and_safe()
    chosen = policy(max_tokens=512, alpha_ms=0.0)
    view = engine.view(max_num_batched_tokens=BUDGET)
    chosen.commit(chosen.plan(engine.now_s, view), view, np.array([safe]))
    engine.table.remove(lost)
    engine.waiting.remove(lost)
    assert engine.wait(1000, due_in_s=50.0) == lost
    assert plan_of(chosen, engine).slots.tolist() == [lost]


def test_relegation_follows_the_measured_prefill_throughput() -> None:
    engine = EngineBuilder()
    slot = engine.wait(1000, due_in_s=0.3)
    chosen = policy(max_tokens=512)
    view = engine.view(max_num_batched_tokens=BUDGET)
    for _ in range(60):  # 512 prompt tokens a second is what the engine is seen to compute
        plan = chosen.plan(engine.now_s, view)
        chosen.commit(plan, view, plan.slots)
        chosen.on_step_done(BatchShape(512), 1.0)
    engine.waiting.remove(slot)
    slower = engine.wait(1000, due_in_s=0.3)
    assert plan_of(chosen, engine).demoted.tolist() == [slower]
    assert plan_of(policy(), engine).demoted.tolist() == []


def test_a_tier_with_a_last_token_deadline_is_due_a_likely_answer_earlier() -> None:
    engine = EngineBuilder()
    batch, chat = engine.wait(1000, due_in_s=np.inf, max_tokens=10_000), engine.wait(1000, due_in_s=12.0)
    engine.table.rows["class_index"][batch] = 1
    engine.table.rows["answer_due_s"][batch] = engine.now_s + 20.0
    chosen = policy(max_tokens=512, alpha_ms=0.0)
    assert plan_of(chosen, engine).slots.tolist() == [batch]  # no answer seen: 256 tokens at 50 ms, due in 7.2 s
    for _ in range(100):
        chosen.on_request_done(1, 100, 40)
    # Mean 42, spread 21: 85 tokens at 50 ms, due in 15.7 s.
    assert plan_of(chosen, engine).slots.tolist() == [chat]


def test_the_spread_of_answers_counts_twice() -> None:
    engine = EngineBuilder()
    batch = engine.wait(1000, max_tokens=10_000)
    engine.table.rows["class_index"][batch] = 1
    engine.table.rows["answer_due_s"][batch] = engine.now_s + 100.0
    chosen = policy()
    for tokens in (100, 500) * 500:
        chosen.on_request_done(1, 100, tokens)
    engine.table.rows["ttft_due_s"][batch] = np.inf
    due_in_s = first_due_s(engine.table.rows, batch, chosen._likely) - engine.now_s
    assert due_in_s == pytest.approx(100.0 - 0.05 * (300 + 2 * 200), abs=0.1)


def test_a_decode_of_such_a_tier_bounds_steps_only_when_its_deadline_nears() -> None:
    engine = EngineBuilder()
    slot = engine.decode(tpot_s=np.inf, max_tokens=10_000)
    engine.table.rows["class_index"][slot] = 1
    engine.wait(5000, due_in_s=60.0)
    # It arrived 10 s ago and has 246 tokens left at 50 ms: 12.3 s.
    for within_s, tokens in ((100.0, 2552), (22.35, 256)):
        engine.table.rows["answer_due_s"][slot] = engine.now_s - 10.0 + within_s
        assert plan_of(policy(), engine).num_tokens == tokens


def test_drafts_are_charged() -> None:
    engine = EngineBuilder()
    for _ in range(50):
        decode_due_in(engine, 0.05)
    engine.wait(5000, due_in_s=60.0)
    plan = plan_of(policy(draft_tokens=4), engine)
    assert plan.tokens[:50].tolist() == [5] * 50
    assert plan.num_tokens == 256


def test_parameters_out_of_range_are_named() -> None:
    with pytest.raises(InvalidFieldError, match="alpha_ms"):
        policy(alpha_ms=-1.0)
