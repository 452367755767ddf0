"""vLLM V1's order: one budget, running requests first, then first come, first served."""

from __future__ import annotations

from slos_serve.policies.vllm_order import VllmOrder
from tests.builders import EngineBuilder


def test_running_prompts_may_take_the_budget_of_later_decodes() -> None:
    engine = EngineBuilder()
    under_way = engine.prefilling(3000, 500)
    engine.decode()
    plan = VllmOrder(2048).plan(engine.now_s, engine.view())
    assert (plan.slots.tolist(), plan.tokens.tolist()) == ([under_way], [2048])


def test_waiting_requests_start_in_order_of_arrival_whatever_their_deadline() -> None:
    engine = EngineBuilder()
    first, second = engine.wait(1500, due_in_s=9.0), engine.wait(1500, due_in_s=0.1)
    plan = VllmOrder(2048).plan(engine.now_s, engine.view())
    assert (plan.slots.tolist(), plan.tokens.tolist()) == ([first, second], [1500, 548])


def test_the_engines_limit_bounds_the_budget() -> None:
    engine = EngineBuilder()
    engine.wait(5000)
    assert VllmOrder(8192).plan(engine.now_s, engine.view(max_num_batched_tokens=1024)).num_tokens == 1024


def test_no_more_requests_start_than_the_engine_holds() -> None:
    engine = EngineBuilder(max_num_seqs=2)
    engine.decode()
    first = engine.wait(10)
    engine.wait(10)
    assert VllmOrder().plan(engine.now_s, engine.view()).slots.tolist() == [0, first]
