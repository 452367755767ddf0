"""When steps start and how long they took, whatever the engine made between them without a plan."""

from __future__ import annotations

import pytest

from slos_serve.perf.batch_time import BatchShape
from slos_serve.vllm_plugin.step_clock import MOST_BETWEEN_S, StepClock

SHAPE = BatchShape(new_tokens=7)


def taken_s(clock: StepClock, output: object, now_s: float) -> float:
    found = clock.done(output, now_s)
    assert found is not None and found[0] is SHAPE
    return found[1]


def test_the_next_step_starts_when_those_in_flight_end() -> None:
    clock = StepClock()
    assert clock.next_start_s(1.0) == 1.0
    clock.scheduled("first", SHAPE, 1.0, 0.2)
    clock.scheduled("second", SHAPE, 1.1, 0.3)
    assert clock.next_start_s(1.1) == pytest.approx(1.5)
    assert taken_s(clock, "first", 1.25) == pytest.approx(0.25)
    assert clock.next_start_s(1.25) == pytest.approx(1.55)
    assert taken_s(clock, "second", 1.5) == pytest.approx(0.25)


def test_a_step_that_was_not_timed_takes_nothing_from_those_that_were() -> None:
    clock = StepClock()
    clock.scheduled("timed", SHAPE, 1.1, 0.3)  # while a step without any promise runs
    assert clock.done("not timed", 1.2) is None
    assert clock.next_start_s(1.2) == pytest.approx(1.5)
    clock.scheduled("next", SHAPE, 1.2, 0.1)
    assert taken_s(clock, "timed", 1.5) == pytest.approx(0.3)
    assert taken_s(clock, "next", 1.6) == pytest.approx(0.1)


def test_a_step_that_the_engine_dropped_is_forgotten() -> None:
    clock = StepClock()
    clock.scheduled("dropped", SHAPE, 1.0, 0.3)
    clock.scheduled("next", SHAPE, 1.1, 0.1)
    assert taken_s(clock, "next", 1.4) == pytest.approx(0.3)
    assert clock.next_start_s(1.4) == 1.4


def test_what_an_engine_does_between_two_steps_is_part_of_the_second() -> None:
    clock = StepClock()
    clock.scheduled("first", SHAPE, 1.0, 0.1)
    assert taken_s(clock, "first", 1.1) == pytest.approx(0.1)
    # Handing tokens out and scheduling takes 4 ms: the next token comes that much later.
    assert clock.next_start_s(1.104) == pytest.approx(1.1)
    clock.scheduled("second", SHAPE, 1.104, 0.1)
    assert taken_s(clock, "second", 1.204) == pytest.approx(0.104)
    clock.rests()
    assert clock.next_start_s(1.209) == 1.209
    clock.scheduled("soon after a rest", SHAPE, 1.209, 0.1)
    assert taken_s(clock, "soon after a rest", 1.309) == pytest.approx(0.1)
    # Then nobody asks for anything for a while.
    assert clock.next_start_s(1.309 + MOST_BETWEEN_S) == pytest.approx(1.309 + MOST_BETWEEN_S)
    clock.scheduled("third", SHAPE, 1.5, 0.1)
    assert taken_s(clock, "third", 1.6) == pytest.approx(0.1)
