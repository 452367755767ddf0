"""KV memory by sum of peaks and by forecast over time."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.request import Status
from slos_serve.planning.lengths import EDGES, LengthForecast
from slos_serve.planning.memory import forecast, reserve, still_runs
from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from tests.builders import OPT_13B_A100, EngineBuilder


def learnt(lengths: list[int]) -> LengthForecast:
    forecast_of = LengthForecast(1, 0.7)
    for length in lengths:
        forecast_of.observe(0, length)
    return forecast_of


def test_a_request_survives_as_often_as_answers_were_longer() -> None:
    engine = EngineBuilder()
    slot = engine.decode(output_tokens=100, max_tokens=10_000)
    rng = np.random.default_rng(0)
    lengths = rng.geometric(1 / 200, 3000).tolist()
    survival = learnt(lengths).survival()[0]
    recent = np.array(lengths)
    beyond = recent[recent > 100]
    for more in (1.0, 50.0, 200.0, 500.0):
        expected = float((beyond > 100 + more).mean())
        assert still_runs(engine.table.rows, slot, more, survival, EDGES) == pytest.approx(expected, abs=0.06)


def test_a_hint_and_the_cap_are_taken_at_their_word() -> None:
    engine = EngineBuilder()
    slot = engine.decode(output_tokens=10, max_tokens=50)
    survival = learnt([1000] * 500).survival()[0]
    rows = engine.table.rows
    assert still_runs(rows, slot, 39.0, survival, EDGES) == pytest.approx(1.0, abs=0.01)
    assert still_runs(rows, slot, 40.0, survival, EDGES) == 0.0
    rows["hint_tokens"][slot] = 30
    assert still_runs(rows, slot, 19.0, survival, EDGES) == 1.0
    assert still_runs(rows, slot, 20.0, survival, EDGES) == 0.0


def test_room_that_a_short_answer_gives_back_is_promised_again() -> None:
    """Sum of peaks: 60 + 60 of 100 blocks. Over time: the first has ended before the second grows."""
    engine = EngineBuilder(total_blocks=100)
    ending = engine.decode(prompt_tokens=640, output_tokens=190, max_tokens=400, ahead_s=0.05)
    growing = engine.wait(320, max_tokens=800, due_in_s=1.0)
    rows = engine.table.rows
    rows["hint_tokens"][ending], rows["hint_tokens"][growing] = 200, 800
    rows["expected_tokens"][ending], rows["expected_tokens"][growing] = 200, 800
    running, waiting = np.array([ending]), np.array([growing])
    peaks, room = reserve(rows, running, waiting, 100, 16)
    assert peaks[0, 0] > room[0]
    due_s, survival = np.array([engine.now_s + 1.0]), learnt([]).survival()
    memory, room = forecast(rows, running, waiting, due_s, engine.now_s, 0.1, survival, EDGES, 100, 16)
    assert (memory[0] <= room).all()


def test_requests_of_known_length_are_counted_until_just_before_they_end() -> None:
    """Ten answers end 40 tokens from now, between two moments: just before, they hold 40 tokens more each."""
    engine = EngineBuilder(total_blocks=1000)
    for _ in range(10):
        slot = engine.decode(prompt_tokens=311, output_tokens=10, max_tokens=400, ahead_s=0.05)
        engine.table.rows["hint_tokens"][slot] = 50
    asking = engine.wait(800, max_tokens=400, due_in_s=0.2)
    engine.table.rows["hint_tokens"][asking] = 400
    running, waiting, due_s = np.array(engine.running), np.array([asking]), np.array([engine.now_s + 0.2])
    survival = learnt([]).survival()
    memory, room = forecast(engine.table.rows, running, waiting, due_s, engine.now_s, 0.1, survival, EDGES, 280, 16)
    most = 10 * -(-(321 + 40) // 16)
    assert room.min() == 280 - most
    assert memory[0, np.argmin(room)] >= -(-(800 + 16 - 2) // 16)
    assert (memory[0] > room).any()


def test_best_effort_counts_for_nothing() -> None:
    engine = EngineBuilder(total_blocks=100)
    engine.decode(prompt_tokens=1000, tpot_s=np.inf, status=Status.BEST_EFFORT)
    none = np.empty(0, dtype=np.int64)
    survival = learnt([]).survival()
    running = np.array(engine.running)
    _, room = forecast(engine.table.rows, running, none, np.empty(0), engine.now_s, 0.1, survival, EDGES, 100, 16)
    assert (room == 100).all()


def test_what_runs_in_what_is_left_over_is_counted_once() -> None:
    engine = EngineBuilder(total_blocks=100)
    slot = engine.decode(prompt_tokens=900, output_tokens=10, max_tokens=40, ahead_s=0.05, status=Status.UNDECIDED)
    settings = PlannerSettings(forecast_memory=False)
    plan = Planner(OPT_13B_A100, 2, settings).plan(engine.now_s, engine.view())
    assert plan.admitted.tolist() == [slot]


def test_a_begun_stage_that_is_a_little_late_can_still_be_promised() -> None:
    engine = EngineBuilder()
    slot = engine.decode(output_tokens=10, max_tokens=300, ahead_s=-0.01, status=Status.UNDECIDED)
    plan = Planner(OPT_13B_A100, 2).plan(engine.now_s, engine.view())
    assert plan.admitted.tolist() == [slot]
