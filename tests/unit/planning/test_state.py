"""How kernels read a request's row."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.request import Status
from slos_serve.planning.state import (
    blocks_for,
    blocks_needed,
    held_blocks,
    is_decode,
    next_due_s,
    peak_blocks,
    tokens_left,
    without,
)
from tests.builders import EngineBuilder


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_are_whole(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 16) == blocks


def test_a_plan_changes_a_copy_of_the_statuses() -> None:
    engine = EngineBuilder()
    slot = engine.wait()
    state = engine.state()
    state.status[slot] = Status.BEST_EFFORT
    assert engine.table.rows["status"][slot] == Status.UNDECIDED


def test_cached_tokens_need_not_be_computed_by_a_request_that_waits() -> None:
    engine = EngineBuilder()
    slot = engine.wait(100)
    rows = engine.table.rows
    rows["cached_tokens"][slot] = 64
    assert tokens_left(rows, slot) == 36
    assert blocks_needed(rows, slot, 36, 16) == 7  # the cached ones are taken from the free ones too


def test_a_last_token_in_flight_leaves_nothing_to_compute() -> None:
    engine = EngineBuilder()
    slot = engine.decode(output_tokens=100, max_tokens=100)
    assert tokens_left(engine.table.rows, slot) == 0
    assert is_decode(engine.table.rows, slot)


def test_a_promise_without_any_token_is_due_by_its_ttft() -> None:
    engine = EngineBuilder()
    slot = engine.wait(due_in_s=1.5)
    assert next_due_s(engine.table.rows, slot, 0.05) == engine.now_s + 1.5


def test_a_stage_aims_at_a_lead_at_once_and_gains_the_margin_until_it_is_a_token_ahead() -> None:
    engine = EngineBuilder()
    rows = engine.table.rows
    slot = engine.decode(tpot_s=0.1)
    rows["max_stall_s"][slot], rows["last_token_s"][slot] = np.inf, 0.0
    for tokens, paces in ((1, 0.75), (2, 1.75), (5, 4.75), (10, 9.5), (20, 19.0), (40, 39.0)):
        rows["stage_tokens"][slot] = tokens
        assert next_due_s(rows, slot, 0.05) == pytest.approx(rows["stage_start_s"][slot] + 0.1 * paces)


def test_no_stream_waits_longer_than_its_stall_bound() -> None:
    engine = EngineBuilder()
    slot = engine.decode(tpot_s=0.1, ahead_s=50.0)
    rows = engine.table.rows
    assert next_due_s(rows, slot, 0.05) == rows["last_token_s"][slot] + rows["max_stall_s"][slot]


def test_a_preempted_request_gives_back_what_it_holds() -> None:
    engine = EngineBuilder()
    slot, other = engine.decode(prompt_tokens=311), engine.decode()
    state = engine.state()
    rest = without(state, slot)
    assert rest.running.tolist() == [other]
    assert rest.free_blocks - state.free_blocks == held_blocks(state.rows, slot, 16) == 20
    assert peak_blocks(state.rows, slot, 16) >= 20
