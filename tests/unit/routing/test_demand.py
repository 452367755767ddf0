"""What replicas make of the demand: fullness, and headroom by class."""

from __future__ import annotations

import pytest

from slos_serve.routing.demand import FORGET_S, FULLNESS, HEADROOM, Demand
from slos_serve.routing.router import RoutingRequest
from tests.unit.routing.fleet import NOW_S, loaded, published, request


def began(demand: Demand, number: int, promised: bool = True) -> None:
    demand.began(number, request(), "chat", promised, NOW_S)


def test_fullness_and_headroom_follow_the_load() -> None:
    demand = Demand()
    began(demand, 1)
    demand.began(2, RoutingRequest(NOW_S, 100, 10), "batch", False, NOW_S)
    idle, half, full = (demand.stats(published(loaded(n, total_blocks=2000)), NOW_S) for n in (0, 50, 200))
    name = f"{HEADROOM}chat"
    assert idle[FULLNESS] < half[FULLNESS] < full[FULLNESS] == 1.0
    assert idle[name] > half[name] > full[name] == 0.0


def test_those_that_wait_for_a_promise_make_a_replica_more_than_full() -> None:
    demand = Demand()
    for number in range(20):
        began(demand, number, promised=False)
    full = published(loaded(200, total_blocks=2000))
    assert demand.stats(full, NOW_S)[FULLNESS] == pytest.approx(1.1)
    for number in range(20):
        demand.ended(number)
    assert demand.stats(full, NOW_S)[FULLNESS] == 1.0


def test_a_class_that_nobody_asks_for_is_forgotten() -> None:
    demand = Demand()
    began(demand, 1)
    publication = published(loaded(1))
    assert f"{HEADROOM}chat" in demand.stats(publication, NOW_S + FORGET_S)
    assert list(demand.stats(publication, NOW_S + FORGET_S + 1.0)) == [FULLNESS]
    assert demand.stats(None, NOW_S) == {FULLNESS: 1.0}
