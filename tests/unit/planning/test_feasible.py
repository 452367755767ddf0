"""When a set of requests fits."""

from __future__ import annotations

import numpy as np

from slos_serve.planning.feasible import first_missed, first_short, first_unseated, fits, lent_until
from tests.unit.planning.instances import demand, supply

BOTH = np.array([True, True])


def test_the_first_deadline_that_is_missed_is_named() -> None:
    asks = demand([1.0, 1.2], [900.0, 900.0])
    assert first_missed(BOTH, asks, supply())[0] == 1
    assert first_missed(np.array([True, False]), asks, supply())[0] == -1


def test_each_taken_request_costs_rate_from_its_deadline_on() -> None:
    """A decode that verifies a token every 0.1 s takes ten tokens a second."""
    asks = demand([1.0, 2.0], [1000.0, 991.0])
    assert first_missed(BOTH, asks, supply())[0] == 1
    assert first_missed(BOTH, demand([1.0, 2.0], [1000.0, 989.0]), supply())[0] == -1


def test_lent_tokens_count_until_each_deadline() -> None:
    asks = demand([1.0, 5.0], [1040.0, 1.0])
    assert lent_until(asks, supply(lent=(0.0, 500.0))).tolist() == [50.0, 250.0]
    assert first_missed(BOTH, asks, supply())[0] == 0
    assert first_missed(BOTH, asks, supply(lent=(0.0, 500.0)))[0] == -1


def test_memory_is_a_rule_of_its_own() -> None:
    asks = demand([1.0, 2.0], [10.0, 10.0], blocks=[60.0, 60.0])
    assert first_short(BOTH, asks, supply(blocks=100.0)) == 0
    assert not fits(BOTH, asks, supply(blocks=100.0))
    assert fits(BOTH, asks, supply(blocks=120.0))


def test_a_seat_must_be_free_when_a_prompt_must_start() -> None:
    """Two seats by 0 s and four by 10 s: one more each five seconds."""
    every, few = np.ones(4, dtype=np.bool_), supply(seats=(2.0, 4.0))
    asks = demand([1.0, 1.1, 1.2, 7.0], [10.0] * 4)
    assert first_unseated(every, asks, few) == 2
    assert not fits(every, asks, few)
    assert fits(np.array([True, True, False, True]), asks, few)
    assert fits(every, demand([1.0, 1.1, 1.2, 7.0], [10.0] * 4, needs_seat=[0.0, 1.0, 1.0, 1.0]), few)
