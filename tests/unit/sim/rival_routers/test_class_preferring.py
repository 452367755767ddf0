"""Requests of one pace gather where every pace is kept; elsewhere load decides."""

from __future__ import annotations

from slos_serve.sim.rival_routers.class_preferring import ClassPreferring
from slos_serve.workload.calls import Workload
from tests.sim_builders import PLAIN
from tests.unit.sim.rival_routers.fleet import FREE, LOOSE, TIGHT, calls, fleet

# A decode step of n takes 10 ms + 0.1 ms n: 9/10 of the tight pace of 20 ms allow 80 requests, of the loose pace 800.


def chosen(load: Workload, held: list[list[int]], call: int) -> int:
    recording, replicas = fleet(load, held)
    return ClassPreferring(recording, PLAIN).choose(0.0, call, 0, replicas).index


def test_a_call_goes_where_its_pace_is_though_others_are_emptier() -> None:
    load = calls(*[(10, TIGHT)] * 30, *[(10, LOOSE)] * 31)
    tight, loose = list(range(29)), list(range(30, 60))
    assert chosen(load, [loose, tight, []], 29) == 1
    assert chosen(load, [tight, loose, []], 60) == 1


def test_a_pace_that_would_break_sends_the_call_elsewhere() -> None:
    load = calls(*[(10, TIGHT)] * 90)
    assert chosen(load, [list(range(70)), [70]], 89) == 0
    assert chosen(load, [list(range(82)), [82]], 89) == 1


def test_a_loose_call_must_not_break_a_tight_pace() -> None:
    load = calls(*[(10, TIGHT)] * 70, (10, LOOSE), (10, LOOSE), (4000, LOOSE))
    held = [list(range(71)), []]
    assert chosen(load, held, 71) == 0
    # The long prompt would make the steps there 4 ms longer in the mean.
    assert chosen(load, held, 72) == 1


def test_where_no_pace_can_be_kept_the_shortest_steps_win() -> None:
    load = calls(*[(10, TIGHT)] * 300)
    assert chosen(load, [list(range(150)), list(range(150, 250))], 299) == 1


def test_calls_without_a_pace_gather_too() -> None:
    load = calls((10, FREE), (10, FREE), (10, FREE))
    assert chosen(load, [[], [0, 1]], 2) == 1
