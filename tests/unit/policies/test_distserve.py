"""DistServe: whole prompts up to the saturating length on one side, decodes alone on the other."""

from __future__ import annotations

from dataclasses import replace

from slos_serve.policies.distserve import DistServeDecode, DistServePrefill, saturating_tokens
from tests.builders import OPT_13B_A100, EngineBuilder
from tests.sim_builders import PLAIN


def test_prompts_saturate_where_their_slope_is_twice_the_constant_work() -> None:
    assert saturating_tokens(OPT_13B_A100) == 512
    assert saturating_tokens(replace(PLAIN, b_m_s=0.1)) == 2000


def test_prompts_are_batched_whole_up_to_that_length() -> None:
    engine = EngineBuilder()
    first, second = engine.wait(300), engine.wait(200)
    engine.wait(100)
    plan = DistServePrefill(OPT_13B_A100).plan(engine.now_s, engine.view())
    assert (plan.slots.tolist(), plan.tokens.tolist()) == ([first, second], [300, 200])


def test_a_longer_prompt_runs_alone_and_goes_on() -> None:
    engine = EngineBuilder()
    long = engine.wait(3000)
    engine.wait(10)
    policy = DistServePrefill(OPT_13B_A100)
    assert policy.plan(engine.now_s, engine.view()).tokens.tolist() == [2048]
    engine = EngineBuilder()
    long = engine.prefilling(3000, 2048)
    engine.wait(10)
    plan = policy.plan(engine.now_s, engine.view())
    assert (plan.slots.tolist(), plan.tokens.tolist()) == ([long], [952])


def test_the_decode_side_runs_everything_and_starts_what_arrived_with_its_cache() -> None:
    engine = EngineBuilder()
    decode, arrived = engine.decode(), engine.wait(400)
    row = engine.table.rows[arrived]
    row["cached_tokens"], row["output_tokens"] = 400, 1
    plan = DistServeDecode(draft_tokens=2).plan(engine.now_s, engine.view())
    assert (plan.slots.tolist(), plan.tokens.tolist()) == ([decode, arrived], [3, 1])
