"""vLLM V0: a step of whole prompts when one can start, else a step of all decodes."""

from __future__ import annotations

from slos_serve.policies.vllm_v0 import VllmV0
from tests.builders import EngineBuilder


def test_prompts_have_precedence_over_decodes_and_are_not_cut() -> None:
    engine = EngineBuilder()
    engine.decode()
    prompts = [engine.wait(900), engine.wait(900)]
    engine.wait(900)
    plan = VllmV0(2000).plan(engine.now_s, engine.view())
    assert (plan.slots.tolist(), plan.tokens.tolist()) == (prompts, [900, 900])


def test_all_decodes_run_when_no_prompt_can_start() -> None:
    engine = EngineBuilder(total_blocks=100)
    decodes = [engine.decode(prompt_tokens=16 * 30) for _ in range(2)]
    engine.wait(16 * 45)
    plan = VllmV0(draft_tokens=3).plan(engine.now_s, engine.view())
    assert (plan.slots.tolist(), plan.tokens.tolist()) == (decodes, [4, 4])


def test_one_block_in_a_hundred_stays_free_when_a_prompt_starts_beside_others() -> None:
    for prompt_blocks, starts in ((66, True), (67, False)):
        engine = EngineBuilder(total_blocks=100)
        engine.decode(prompt_tokens=16 * 32, output_tokens=16)
        slot = engine.wait(16 * prompt_blocks)
        assert (slot in VllmV0().plan(engine.now_s, engine.view()).slots) == starts


def test_the_rest_of_a_prompt_longer_than_any_batch_comes_before_anything_else() -> None:
    engine = EngineBuilder()
    engine.decode()
    long = engine.prefilling(3000, 2048)
    engine.wait(10)
    plan = VllmV0().plan(engine.now_s, engine.view())
    assert (plan.slots.tolist(), plan.tokens.tolist()) == ([long], [952])
