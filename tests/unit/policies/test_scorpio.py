"""SCORPIO: rejection, the virtual batch size, credits, and what drafts change."""

from __future__ import annotations

from collections import Counter

import numpy as np

from slos_serve.core.plan import StepPlan
from slos_serve.policies.scorpio import Scorpio
from tests.builders import EngineBuilder
from tests.sim_builders import PLAIN


def run_steps(policy: Scorpio, engine: EngineBuilder, steps: int) -> Counter[int]:
    """How often each slot ran in plans of an engine that does not change."""
    counted: Counter[int] = Counter()
    for _ in range(steps):
        counted.update(policy.plan(engine.now_s, engine.view()).slots.tolist())
    return counted


def test_a_prompt_that_those_before_it_make_late_is_rejected() -> None:
    engine = EngineBuilder()
    first = engine.wait(2000, due_in_s=0.3)  # 210 ms
    second = engine.wait(2000, due_in_s=0.4)  # 410 ms with the first
    third = engine.wait(500, due_in_s=0.5)  # 260 ms without the second
    plan = Scorpio(PLAIN, 1).plan(engine.now_s, engine.view())
    assert plan.rejected.tolist() == [second]
    assert plan.slots.tolist() == [first]  # 2,048 tokens a step
    assert third not in plan.rejected


def test_an_answer_that_is_computed_again_is_not_rejected() -> None:
    engine = EngineBuilder()
    slot = engine.wait(200, due_in_s=-5.0)
    engine.table.rows["output_tokens"][slot] = 3
    assert len(Scorpio(PLAIN, 1).plan(engine.now_s, engine.view()).rejected) == 0


def loose_and_tight(loose: int, tight: int) -> EngineBuilder:
    """Decodes of 100 ms beside decodes of 25 ms; a decode step of n takes 10 ms + 0.1 ms n."""
    engine = EngineBuilder()
    for count, tpot_s in ((loose, 0.1), (tight, 0.025)):
        for _ in range(count):
            engine.decode(tpot_s=tpot_s)
    return engine


def test_loose_requests_count_only_a_part_of_the_virtual_batch() -> None:
    # The tightest pace, 25 ms, allows 147 decodes.
    for loose, admits in ((0, False), (100, True)):
        engine = loose_and_tight(loose, 150 - loose)
        engine.wait(100, tpot_s=0.1)
        plan = Scorpio(PLAIN, 1).plan(engine.now_s, engine.view())
        assert (engine.waiting[0] in plan.slots) == admits


def test_credits_let_a_loose_request_decode_as_often_as_it_was_promised() -> None:
    engine = loose_and_tight(1, 1)
    loose, tight = engine.running
    counted = run_steps(Scorpio(PLAIN, 1), engine, 40)
    assert counted[tight] == 40
    assert counted[loose] == 10


def test_equal_paces_all_decode_in_every_step() -> None:
    engine = loose_and_tight(3, 0)
    assert set(run_steps(Scorpio(PLAIN, 1), engine, 7).values()) == {7}


def test_the_chunked_variant_decodes_beside_prompts() -> None:
    engine = loose_and_tight(0, 2)
    engine.wait(1000)
    mixed = Scorpio(PLAIN, 1, chunk_tokens=256).plan(engine.now_s, engine.view())
    assert mixed.tokens.tolist() == [1, 1, 254]
    apart = Scorpio(PLAIN, 1).plan(engine.now_s, engine.view())
    assert apart.tokens.tolist() == [1000]


def test_answers_seen_make_later_ones_weigh_as_much() -> None:
    engine = loose_and_tight(0, 100)
    engine.wait(100, tpot_s=0.025)
    dear = type(PLAIN)(1e-4, 0.01, 1e-4, 0.01, k_ctx_s=2e-7)
    short, long = Scorpio(dear, 1), Scorpio(dear, 1)
    for _ in range(50):
        short.on_request_done(0, 200, 10)
        long.on_request_done(0, 200, 2000)
    assert len(short.plan(engine.now_s, engine.view()).slots) == 1  # the prompt
    assert len(long.plan(engine.now_s, engine.view()).slots) == 100  # the decodes


def drafting_plan(policy: Scorpio, accepted: int) -> StepPlan:
    """A plan beside 60 tight decodes with 4 drafts each: 40 ms a step, after that many were right each time."""
    engine = loose_and_tight(0, 60)
    engine.wait(100, tpot_s=0.025)
    if accepted:
        for _ in range(10):
            policy.on_verified(np.zeros(1000, dtype=np.int64), np.full(1000, 4), np.full(1000, accepted))
    return policy.plan(engine.now_s, engine.view())


def test_drafts_are_charged_to_the_guard_and_what_they_yield_is_learnt() -> None:
    held_back = drafting_plan(Scorpio(PLAIN, 1, draft_tokens=4), 0)
    assert held_back.tokens.tolist() == [5] * 60
    assert held_back.draft_tokens.tolist() == [4] * 60
    admitted = drafting_plan(Scorpio(PLAIN, 1, draft_tokens=4), 2)
    assert admitted.tokens.tolist() == [100]
