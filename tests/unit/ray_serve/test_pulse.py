"""An engine that rests, one that works, one that hangs."""

from __future__ import annotations

from slos_serve.ray_serve.pulse import Pulse


def test_an_engine_without_calls_rests_however_long() -> None:
    pulse = Pulse()
    assert not pulse.resting(0.0), "it has not said that it is there"
    pulse.published(1.0, num_requests=0)
    assert pulse.resting(1000.0) and pulse.silent_s(1000.0) == 0.0


def test_an_engine_that_works_does_not_rest() -> None:
    pulse = Pulse()
    pulse.published(1.0, num_requests=3)
    assert not pulse.resting(1.1)


def test_steps_count_not_publications() -> None:
    pulse = Pulse()
    pulse.published(1.0, num_requests=2, steps_done=7)
    pulse.call_began(1.0)
    for now_s in (2.0, 3.0, 4.0):
        pulse.published(now_s, num_requests=2, steps_done=7)
    assert pulse.silent_s(5.0) == 4.0, "it publishes and finishes no step"
    pulse.published(6.0, num_requests=2, steps_done=8)
    assert pulse.silent_s(6.5) == 0.5


def test_silence_counts_from_the_oldest_call_or_the_last_sign() -> None:
    pulse = Pulse()
    pulse.published(1.0, num_requests=0)
    first = pulse.call_began(10.0)
    pulse.call_began(14.0)
    assert pulse.silent_s(15.0) == 5.0
    assert not pulse.resting(15.0), "a call waits and nothing is heard"
    pulse.published(15.0, num_requests=2)
    assert pulse.silent_s(16.0) == 1.0
    pulse.call_ended(first)
    assert pulse.num_calls == 1
    pulse.call_ended(first)
    assert pulse.num_calls == 1
