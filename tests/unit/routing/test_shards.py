"""Several routers over one fleet: own replicas first, others only where they can promise, at home without a promise."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.verdict import Verdict, Why
from slos_serve.routing.router import RoutingRequest, route
from slos_serve.routing.shards import route_sharded
from tests.unit.routing.fleet import NOW_S, loaded, mirrors_of, request

HOPELESS = request(9000, due_in_s=0.3)


def test_one_shard_decides_as_a_router_alone() -> None:
    alone, shard = mirrors_of(a=loaded(3), b=loaded(9)), mirrors_of(a=loaded(3), b=loaded(9))
    for asked in (request(), HOPELESS, request(2000, due_in_s=0.4)):
        assert route_sharded(NOW_S, asked, [shard], 0) == route(NOW_S, asked, alone)


def test_another_router_is_asked_only_when_its_own_replicas_do_not_attain() -> None:
    full = loaded(600, total_blocks=40_000)
    shards = [mirrors_of(a=full), mirrors_of(b=loaded(0)), mirrors_of(c=loaded(0))]
    assert route_sharded(NOW_S, request(), shards, 1).replica == "b"
    decision = route_sharded(NOW_S, request(), shards, 0)
    assert (decision.replica, decision.verdict, decision.reason) == ("b", Verdict.ADMITTED, Why.FITS_ELSEWHERE)
    assert route_sharded(NOW_S, request(), shards, 0, tries=0).verdict is Verdict.BEST_EFFORT
    assert [int(np.sum(shard.arrays.num_unpromised)) for shard in shards] == [1, 0, 0]


def test_what_nobody_attains_stays_at_home_and_reserves_nothing_elsewhere() -> None:
    shards = [mirrors_of(a=loaded(2)), mirrors_of(b=loaded(0))]
    decision = route_sharded(NOW_S, HOPELESS, shards, 0)
    assert (decision.replica, decision.verdict, decision.reason) == ("a", Verdict.BEST_EFFORT, Why.ALL_FULL)
    assert [int(shard.arrays.num_unpromised[0]) for shard in shards] == [1, 0]
    refused = route_sharded(NOW_S, request(9000, due_in_s=0.3, reject_when_full=True), shards, 0)
    assert (refused.replica, refused.verdict) == (None, Verdict.REJECTED)
    assert [int(shard.arrays.num_unpromised[0]) for shard in shards] == [1, 0]


@pytest.mark.parametrize("asked", [HOPELESS, request(due_in_s=np.inf, tpot_s=np.inf)])
def test_a_router_without_replicas_passes_on(asked: RoutingRequest) -> None:
    shards = [mirrors_of(), mirrors_of(b=loaded(0))]
    decision = route_sharded(NOW_S, asked, shards, 0)
    assert (decision.replica, decision.verdict) == ("b", Verdict.BEST_EFFORT if asked.has_slo else Verdict.NO_SLO)


def test_home_must_exist() -> None:
    with pytest.raises(InvalidFieldError, match="home"):
        route_sharded(NOW_S, request(), [mirrors_of(a=loaded(0))], 1)
