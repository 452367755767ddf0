"""A feasible set found quickly."""

from __future__ import annotations

from slos_serve.planning.greedy import greedy
from tests.unit.planning.instances import demand, supply


def test_the_costliest_goes_where_a_deadline_is_missed() -> None:
    taken, feasible = greedy(demand([1.0, 1.1, 1.2], [300.0, 900.0, 300.0]), supply())
    assert feasible
    assert taken.tolist() == [True, False, True]


def test_weight_counts_against_cost() -> None:
    taken, _ = greedy(demand([1.0, 1.1], [300.0, 900.0], weight=[1.0, 10.0]), supply())
    assert taken.tolist() == [False, True]


def test_who_needs_most_memory_goes_first() -> None:
    taken, _ = greedy(demand([1.0, 2.0, 3.0], [10.0] * 3, blocks=[30.0, 80.0, 40.0]), supply(blocks=100.0))
    assert taken.tolist() == [True, False, True]


def test_promises_that_do_not_fit_are_said() -> None:
    taken, feasible = greedy(demand([1.0], [5000.0], promised=[True]), supply())
    assert not feasible
    assert not taken.any()


def test_the_costliest_goes_where_seats_are_missing() -> None:
    taken, feasible = greedy(demand([1.0, 1.1, 1.2, 9.0], [30.0, 90.0, 20.0, 99.0]), supply(seats=(2.0, 4.0)))
    assert feasible
    assert taken.tolist() == [True, False, True, True]
