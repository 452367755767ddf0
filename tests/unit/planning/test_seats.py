"""Seats given out over time."""

from __future__ import annotations

import numpy as np

from slos_serve.core.request import Status
from slos_serve.perf.lengths import LengthForecast
from slos_serve.planning.demand import SIZES, build_demand
from slos_serve.planning.memory import forecast
from slos_serve.planning.planner import Planner
from slos_serve.planning.seats import seats_by
from slos_serve.planning.supply import MOMENT_TOKENS
from slos_serve.planning.tiers import tier_paces
from tests.builders import OPT_13B_A100, EngineBuilder

PACE_S = 0.1
MOMENTS_S = MOMENT_TOKENS * PACE_S


def seats_of(engine: EngineBuilder) -> np.ndarray:
    state = engine.state()
    demand = build_demand(state, state.waiting, tier_paces(state, state.waiting), 30.0, 0.0, np.zeros((2, SIZES)))
    _, _, taken = forecast(state, demand, PACE_S, LengthForecast(1, 0.7).survival(), 0)
    return seats_by(state, demand, PACE_S, taken)


def full(engine: EngineBuilder, left_tokens: int, count: int) -> None:
    """``count`` promised decodes that end after ``left_tokens`` tokens."""
    for _ in range(count):
        slot = engine.decode(tpot_s=PACE_S, output_tokens=21, max_tokens=400)
        engine.table.rows["hint_tokens"][slot] = 21 + left_tokens


def test_a_seat_comes_free_when_its_answer_ends() -> None:
    engine = EngineBuilder(max_num_seqs=4)
    full(engine, 10, 4)
    seats = seats_of(engine)
    assert seats[MOMENTS_S < 1.0].tolist() == [0.0] * 4
    assert (seats[MOMENTS_S > 1.0] == 4.0).all()


def test_a_seat_is_given_on_once_the_answer_that_took_it_has_ended() -> None:
    """Answers of 50 tokens behind ones that end in a second: 4 starts by 1.6 s, 4 more every 5.1 s."""
    engine = EngineBuilder(max_num_seqs=4)
    full(engine, 10, 4)
    for _ in range(20):
        slot = engine.wait(300, due_in_s=30.0)
        engine.table.rows["hint_tokens"][slot] = engine.table.rows["expected_tokens"][slot] = 50
    seats = seats_of(engine)
    at = {float(round(moment, 1)): seats[k] for k, moment in enumerate(MOMENTS_S)}
    assert (at[0.8], at[1.6], at[3.2]) == (0.0, 4.0, 4.0)
    assert 4.0 < at[6.4] <= 8.0
    assert (at[12.8], at[25.6]) == (12.0, 20.0)


def test_best_effort_gives_its_seat_up_and_a_promised_prompt_keeps_its_own() -> None:
    engine = EngineBuilder(max_num_seqs=2)
    engine.decode(tpot_s=np.inf, status=Status.BEST_EFFORT)
    engine.prefilling(500, 100)
    engine.wait(300, due_in_s=0.5)
    assert seats_of(engine)[0] == 1.0


def test_whoever_is_due_later_is_promised_the_seat_that_comes_free_first() -> None:
    engine = EngineBuilder(max_num_seqs=4)
    full(engine, 3, 4)
    soon, later, last = engine.wait(300, due_in_s=0.2), engine.wait(300, due_in_s=2.0), engine.wait(300, due_in_s=2.1)
    state = engine.state()
    asked = Planner(OPT_13B_A100, 2).ask_now(state)
    taken = set(asked.demand.slots[asked.admitted.taken].tolist())
    assert soon not in taken
    assert {later, last} <= taken
