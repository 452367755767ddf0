"""Bins of their own, the fullest that attains, tighter bins where the own one is full, and no further."""

from __future__ import annotations

from slos_serve.core.slo import SLOClass
from slos_serve.sim.replica import Replica
from slos_serve.sim.rival_routers.tpot_bins import TpotBins
from slos_serve.workload.calls import Workload
from tests.sim_builders import PLAIN
from tests.unit.sim.rival_routers.fleet import FREE, LOOSE, TIGHT, calls, fleet

# A decode step of n takes 10 ms + 0.1 ms n: the tight pace of 20 ms allows 100 requests, the loose one of 100 ms 900.


def warmed(load: Workload, held: list[list[int]], seen: list[int]) -> tuple[TpotBins, list[Replica]]:
    """A router that has routed the calls ``seen``, to share the replicas by."""
    recording, replicas = fleet(load, held)
    router = TpotBins(recording, PLAIN)
    for call in seen:
        router.choose(0.0, call, 0, replicas)
    return router, replicas


def mixed(tight: int, loose: int) -> Workload:
    return calls(*[(100, TIGHT)] * tight, *[(100, LOOSE)] * loose)


def test_each_pace_has_replicas_of_its_own_by_its_work() -> None:
    router, _ = warmed(mixed(4, 4), [[]] * 6, list(range(8)))
    assert router.shares(6) == {0.02: [0, 1, 2], 0.1: [3, 4, 5]}
    router, _ = warmed(mixed(8, 1), [[]] * 6, list(range(9)))
    assert router.shares(6) == {0.02: [0, 1, 2, 3, 4], 0.1: [5]}


def test_the_loosest_paces_share_the_last_replica_of_a_small_fleet() -> None:
    load = calls((100, TIGHT), (100, LOOSE), (100, FREE))
    router, _ = warmed(load, [[], []], [0, 1, 2])
    assert list(router.shares(2).values()) == [[0], [1], [1]]


def test_a_call_goes_to_the_fullest_replica_of_its_bin_that_attains() -> None:
    load = mixed(200, 2)
    seen = [199, 201, 199, 199, 199]
    for fill, place in ((50, 1), (105, 2)):
        router, replicas = warmed(load, [[0], list(range(1, 1 + fill)), [150, 151], [200]], seen)
        assert router.shares(4) == {0.02: [0, 1, 2], 0.1: [3]}
        assert router.choose(0.0, 199, 0, replicas).index == place


def overloaded(kind: SLOClass) -> tuple[TpotBins, list[Replica], int]:
    """Two replicas, one for each pace; that of ``kind`` has long prompts to compute first."""
    tight, loose = [(100, TIGHT)] * 3, [(100, LOOSE)] * 3
    load = calls(*tight, *loose, *[(9000, kind)] * 4)
    asked = 0 if kind is TIGHT else 3
    held = [[1], [4]]
    held[0 if kind is TIGHT else 1] += [6, 7, 8, 9]
    recording, replicas = fleet(load, held, decoding=False)
    router = TpotBins(recording, PLAIN)
    for call in (0, 3):
        router.choose(0.0, call, 0, replicas)
    return router, replicas, asked


def test_a_loose_call_may_use_a_tighter_bin_when_its_own_is_full() -> None:
    router, replicas, asked = overloaded(LOOSE)
    assert router.choose(0.0, asked, 0, replicas).index == 0


def test_a_tight_call_stays_in_its_own_bin_even_if_it_will_be_late() -> None:
    router, replicas, asked = overloaded(TIGHT)
    assert router.choose(0.0, asked, 0, replicas).index == 0
