"""What replicas make of the demand: fullness, and headroom by class."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from slos_serve.routing.demand import ASKED_OVER_S, FORGET_S, FULLNESS, HEADROOM, Demand
from slos_serve.routing.router import RoutingRequest
from tests.unit.routing.fleet import NOW_S, loaded, published, request


def began(demand: Demand, number: int, promised: bool = True) -> None:
    demand.began(number, request(), "chat", promised, NOW_S)


def test_headroom_follows_the_load_and_fullness_the_arrivals() -> None:
    demand = Demand()
    began(demand, 1)
    demand.began(2, RoutingRequest(NOW_S, 100, 10), "batch", False, NOW_S)
    publications = [published(loaded(n, total_blocks=2000)) for n in (0, 50, 200)]
    idle, half, full = (demand.stats(one, NOW_S) for one in publications)
    name = f"{HEADROOM}chat"
    assert idle[name] > half[name] > full[name] == 0.0
    assert idle[FULLNESS] < half[FULLNESS] < full[FULLNESS]
    for number in range(3, 23):
        began(demand, number)
    more = demand.stats(publications[0], NOW_S)[FULLNESS]
    assert more == pytest.approx(21 * idle[FULLNESS])
    later = demand.stats(publications[0], NOW_S + ASKED_OVER_S)[FULLNESS]
    assert later == pytest.approx(more * math.exp(-1.0))


def test_what_a_prefix_cache_holds_is_not_asked_for() -> None:
    cold, warm = Demand(), Demand()
    began(cold, 1)
    warm.began(1, replace(request(), cached={"a": request().prompt_tokens // 2}), "chat", True, NOW_S)
    found = [demand.stats(published(loaded(0)), NOW_S)[FULLNESS] for demand in (cold, warm)]
    assert found[1] == pytest.approx(found[0] / 2)


def test_those_that_wait_for_a_promise_make_a_replica_more_than_full() -> None:
    demand = Demand()
    for number in range(20):
        began(demand, number, promised=False)
    full = published(loaded(200, total_blocks=2000))
    asked = demand.stats(full, NOW_S)[FULLNESS]
    for number in range(20):
        demand.ended(number)
    assert asked == pytest.approx(1.1 * max(demand.stats(full, NOW_S)[FULLNESS], 1.0))


def test_a_class_that_nobody_asks_for_is_forgotten() -> None:
    demand = Demand()
    began(demand, 1)
    publication = published(loaded(1))
    assert f"{HEADROOM}chat" in demand.stats(publication, NOW_S + FORGET_S)
    assert list(demand.stats(publication, NOW_S + FORGET_S + 1.0)) == [FULLNESS]
    assert demand.stats(None, NOW_S) == {FULLNESS: 1.0}
