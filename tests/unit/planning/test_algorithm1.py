"""Algorithm 1 in cases that one can do in the head; ``tests/property`` has brute force."""

from __future__ import annotations

import pytest

from slos_serve.planning.algorithm1 import EXACT, INFEASIBLE, MOST_WORK, STOPPED, admit
from tests.unit.planning.instances import demand, supply


def test_it_beats_the_greedy_set_where_weights_differ() -> None:
    """The greedy set drops the costliest for its weight; two middling ones are worth more together."""
    asks = demand([1.0, 1.0, 1.0], [510.0, 480.0, 500.0], weight=[1.05, 0.9, 1.0])
    found = admit(asks, supply(), MOST_WORK)
    assert found.status == EXACT
    assert found.value == pytest.approx(1.95)
    assert found.taken.tolist() == [True, True, False]


def test_among_equal_values_the_larger_budget_is_left() -> None:
    found = admit(demand([1.0, 1.0], [900.0, 800.0]), supply(), MOST_WORK)
    assert found.taken.tolist() == [False, True]
    assert found.budget == pytest.approx(200.0)


def test_promised_requests_are_always_taken() -> None:
    asks = demand([1.0, 1.0], [900.0, 800.0], promised=[True, False], weight=[0.1, 5.0])
    assert admit(asks, supply(), MOST_WORK).taken.tolist() == [True, False]


def test_without_a_budget_of_work_the_greedy_set_is_the_answer() -> None:
    asks = demand([1.0, 1.0], [900.0, 800.0])
    assert admit(asks, supply(), 0).status == STOPPED


def test_promises_that_do_not_fit_are_said() -> None:
    found = admit(demand([1.0, 2.0], [5000.0, 1.0], promised=[True, False]), supply(), MOST_WORK)
    assert found.status == INFEASIBLE
    assert found.taken.tolist() == [True, False]
