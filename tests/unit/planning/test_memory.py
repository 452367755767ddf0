"""KV memory, forecast over time."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.request import Status
from slos_serve.perf.lengths import LengthForecast
from slos_serve.planning.demand import SIZES, Demand, build_demand
from slos_serve.planning.memory import forecast
from slos_serve.planning.planner import Planner
from slos_serve.planning.state import State, peak_blocks
from slos_serve.planning.supply import MOMENT_TOKENS, pace_of_moments_s
from slos_serve.planning.tiers import tier_paces
from tests.builders import OPT_13B_A100, EngineBuilder, carried_out

PACE_S = 0.1


def demand_of(engine: EngineBuilder) -> tuple[State, Demand]:
    state = engine.state()
    return state, build_demand(state, state.waiting, tier_paces(state, state.waiting), 30.0, 0.0, np.zeros((2, SIZES)))


def survival() -> np.ndarray:
    return LengthForecast(1, 0.7).survival()


def test_room_that_a_short_answer_gives_back_is_promised_again() -> None:
    """Sum of peaks: 60 + 60 of 100 blocks. Over time: the first has ended before the second grows."""
    engine = EngineBuilder(total_blocks=100)
    ending = engine.decode(prompt_tokens=640, output_tokens=190, max_tokens=400, ahead_s=0.05)
    growing = engine.wait(320, max_tokens=800, due_in_s=1.0)
    rows = engine.table.rows
    rows["hint_tokens"][ending], rows["hint_tokens"][growing] = 200, 800
    rows["expected_tokens"][ending], rows["expected_tokens"][growing] = 200, 800
    state, demand = demand_of(engine)
    assert peak_blocks(rows, ending, 16) + peak_blocks(rows, growing, 16) > 100
    blocks, room, _ = forecast(state, demand, PACE_S, survival(), 100)
    assert (blocks[0] <= room).all()


def test_requests_of_known_length_are_counted_until_just_before_they_end() -> None:
    """Ten answers end 40 tokens from now, between two moments: just before, they hold 40 tokens more each."""
    engine = EngineBuilder(total_blocks=1000)
    for _ in range(10):
        slot = engine.decode(prompt_tokens=311, output_tokens=10, max_tokens=400, ahead_s=0.05)
        engine.table.rows["hint_tokens"][slot] = 50
    asking = engine.wait(800, max_tokens=400, due_in_s=0.2)
    engine.table.rows["hint_tokens"][asking] = 400
    state, demand = demand_of(engine)
    blocks, room, _ = forecast(state, demand, PACE_S, survival(), 280)
    assert room.min() == 280 - 10 * -(-(321 + 40) // 16)
    assert (blocks[0] > room).any()


def test_a_prompt_that_can_start_later_holds_nothing_yet() -> None:
    """Due in 20 s, 0.4 s of prompt: of the moments up to 205 s it counts from that on whose next is past its start."""
    engine = EngineBuilder(total_blocks=1000)
    later, soon = engine.wait(1600, due_in_s=20.0), engine.wait(1600, due_in_s=0.3)
    begun = engine.wait(1600, due_in_s=20.0)
    engine.table.rows["computed_tokens"][begun] = 160
    state, demand = demand_of(engine)
    blocks, _, _ = forecast(state, demand, PACE_S, survival(), 0)  # no room at all: every moment binds
    of = {int(slot): blocks[j] for j, slot in enumerate(demand.slots)}
    moments_s = MOMENT_TOKENS * PACE_S
    assert moments_s[np.flatnonzero(of[later])[0]] == 12.8
    assert (of[soon][:3] >= 100).all() and (of[begun][:3] >= 100).all()


def test_best_effort_counts_for_nothing() -> None:
    engine = EngineBuilder(total_blocks=100)
    engine.decode(prompt_tokens=1000, tpot_s=np.inf, status=Status.BEST_EFFORT)
    _, room, _ = forecast(*demand_of(engine), PACE_S, survival(), 100)
    assert (room == 100).all()


def test_a_class_without_a_tpot_grows_in_the_forecast() -> None:
    """Review, A4: a pace of inf divided its growth by infinity, so that KV was promised twice."""
    engine = EngineBuilder()
    for _ in range(30):
        slot = engine.decode(prompt_tokens=200, output_tokens=10, max_tokens=2000, tpot_s=np.inf)
        engine.table.rows["hint_tokens"][slot] = 1500
    engine.wait(200, tpot_s=np.inf)
    state, demand = demand_of(engine)
    pace_s = pace_of_moments_s(state, tier_paces(state, state.waiting))
    assert 0.0 < pace_s < 0.1  # the length of a batch of all of them
    _, room, _ = forecast(state, demand, pace_s, survival(), 4000)
    assert room.min() < 4000 - 30 * 1000 / 16


def test_fixed_blocks_are_counted_where_a_request_waits_and_where_it_runs() -> None:
    engine = EngineBuilder()
    engine.decode(prompt_tokens=311, output_tokens=10)
    engine.wait(311)
    plain_blocks, plain_room, _ = forecast(*demand_of(engine), PACE_S, survival(), 1000)
    engine.table.rows["fixed_blocks"][[*engine.running, *engine.waiting]] = 7
    blocks, room, _ = forecast(*demand_of(engine), PACE_S, survival(), 1000)
    # As far as the two are expected to run still at that moment.
    assert 5.0 < blocks[0, 0] - plain_blocks[0, 0] <= 7.0
    assert 5.0 < plain_room[0] - room[0] <= 10.0


def test_what_runs_in_what_is_left_over_is_counted_once() -> None:
    engine = EngineBuilder(total_blocks=100)
    slot = engine.decode(prompt_tokens=900, output_tokens=10, max_tokens=40, ahead_s=0.05, status=Status.UNDECIDED)
    assert carried_out(Planner(OPT_13B_A100, 2), engine.now_s, engine.view()).admitted.tolist() == [slot]


@pytest.mark.parametrize(("held_tokens", "needed"), [(0, 20), (160, 10)])
def test_a_waiting_request_whose_kv_is_held_needs_only_the_rest(held_tokens: int, needed: int) -> None:
    engine = EngineBuilder(total_blocks=100)
    slot = engine.wait(320)
    engine.table.rows["computed_tokens"][slot] = held_tokens
    planner = Planner(OPT_13B_A100, 2)
    assert slot in planner.plan(engine.now_s, engine.view(free_blocks=needed)).slots
    assert slot not in planner.plan(engine.now_s, engine.view(free_blocks=needed - 1)).slots
