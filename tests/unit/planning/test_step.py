"""The batch being formed: room, victims, chunks and adapters."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.request import Status
from slos_serve.planning.planner import Planner
from slos_serve.planning.step import PREEMPTED, chunk_within, empty_step, make_room
from tests.builders import OPT_13B_A100, EngineBuilder


def best_effort_decode(engine: EngineBuilder, adapter: int = 0) -> int:
    slot = engine.decode(prompt_tokens=311, tpot_s=np.inf, status=Status.BEST_EFFORT)
    engine.table.rows["adapter"][slot] = adapter
    return slot


def test_nobody_is_preempted_where_all_victims_would_not_suffice() -> None:
    """Review, A8: three lost all their KV, and the prompt did not start."""
    engine = EngineBuilder(total_blocks=60)
    victims = np.array([best_effort_decode(engine) for _ in range(3)])
    slot = engine.wait(1600)
    step = empty_step(engine.state(), 4, victims)
    assert not make_room(step, slot, 1600)
    assert step.counts[PREEMPTED] == 0 and not step.gone.any()
    assert make_room(step, slot, 300)
    assert step.counts[PREEMPTED] == 1


@pytest.mark.parametrize(("done", "multiple", "expected"), [(0, 64, 960), (64, 64, 960), (100, 64, 988), (0, 1, 1000)])
def test_a_chunk_ends_at_a_multiple(done: int, multiple: int, expected: int) -> None:
    engine = EngineBuilder()
    slot = engine.prefilling(5000, done)
    state = engine.state()._replace(chunk_multiple=multiple, max_tokens=1000)
    assert chunk_within(empty_step(state, 1, np.empty(0, dtype=np.int64)), slot, np.inf) == (expected, True)


def test_the_last_chunk_of_a_prompt_needs_no_multiple() -> None:
    engine = EngineBuilder()
    slot = engine.prefilling(900, 128)
    state = engine.state()._replace(chunk_multiple=64)
    assert chunk_within(empty_step(state, 1, np.empty(0, dtype=np.int64)), slot, np.inf) == (772, False)


def test_no_request_gets_more_prefill_than_the_threshold() -> None:
    engine = EngineBuilder(total_blocks=20_000)
    for _ in range(3):
        engine.wait(3000, due_in_s=9.0)
    view = engine.view()
    view.prefill_threshold = 500
    assert Planner(OPT_13B_A100, 2).plan(engine.now_s, view).tokens.tolist() == [500, 500, 500]


def test_as_many_adapters_run_as_the_engine_can_hold() -> None:
    engine = EngineBuilder()
    engine.table.rows["adapter"][engine.decode(ahead_s=0.5)] = 1
    waits = [engine.wait(100, due_in_s=1.0 + 0.1 * k) for k in range(3)]
    engine.table.rows["adapter"][waits] = [2, 3, 1]
    view = engine.view()
    view.max_adapters = 2
    plan = Planner(OPT_13B_A100, 2).plan(engine.now_s, view)
    assert waits[1] not in plan.slots
    assert {waits[0], waits[2]} <= set(plan.slots.tolist())


def test_a_victim_frees_its_adapter_when_nobody_else_uses_it() -> None:
    engine = EngineBuilder()
    kept, victim = best_effort_decode(engine, 1), best_effort_decode(engine, 2)
    slot = engine.wait(100)
    engine.table.rows["adapter"][slot] = 3
    state = engine.state()._replace(max_adapters=2)
    step = empty_step(state, 4, np.array([victim, kept]))
    assert make_room(step, slot, 100)
    assert step.gone[victim] and not step.gone[kept]


def test_fixed_blocks_are_taken_at_the_start() -> None:
    engine = EngineBuilder(total_blocks=100)
    slot = engine.wait(160)
    engine.table.rows["fixed_blocks"][slot] = 5
    planner = Planner(OPT_13B_A100, 2)
    assert slot in planner.plan(engine.now_s, engine.view(free_blocks=15)).slots
    assert slot not in planner.plan(engine.now_s, engine.view(free_blocks=14)).slots
