"""LMetric: the product, the cache in it, and equals."""

from __future__ import annotations

from slos_serve.sim.rival_routers.lmetric import LMetric
from slos_serve.workload.calls import Workload
from tests.sim_builders import PLAIN
from tests.unit.sim.rival_routers.fleet import LOOSE, calls, fleet


def chosen(load: Workload, held: list[list[int]], call: int = 0, decoding: bool = False) -> int:
    recording, replicas = fleet(load, held, decoding=decoding)
    return LMetric(recording, PLAIN).choose(0.0, call, 0, replicas).index


def test_tokens_and_batch_size_are_multiplied() -> None:
    load = calls(*((tokens, LOOSE) for tokens in (1000, 3000, 100, 100, 100, 500)))
    assert chosen(load, [[1], [2, 3, 4]]) == 1  # 4,000 x 1 against 1,300 x 3
    assert chosen(load, [[2, 3, 4], [5]]) == 1  # 1,300 x 3 against 1,500 x 1


def test_decodes_count_in_the_batch_and_not_in_the_tokens() -> None:
    load = calls(*((tokens, LOOSE) for tokens in (1000, 3000, 100, 100)))
    assert chosen(load, [[1], [2, 3]], decoding=True) == 0  # 1,000 x 1 against 1,000 x 2


def test_a_cached_prefix_is_not_new() -> None:
    load = calls((400, LOOSE), (800, LOOSE), (100, LOOSE), (100, LOOSE), answer=1)
    load.calls["next_call"][0] = 1
    recording, replicas = fleet(load, [[], [0]])  # the session's first call ended on replica 1
    replicas[0].add(2, 0.0)
    replicas[1].add(3, 0.0)
    assert LMetric(recording, PLAIN).choose(0.0, 1, 0, replicas).index == 1
    load.calls["next_call"][0] = -1
    recording, replicas = fleet(load, [[], [0]])
    replicas[0].add(2, 0.0)
    replicas[1].add(3, 0.0)
    assert LMetric(recording, PLAIN).choose(0.0, 1, 1, replicas).index == 0


def test_empty_replicas_are_told_apart_by_their_caches() -> None:
    load = calls((400, LOOSE), (800, LOOSE), answer=1)
    load.calls["next_call"][0] = 1
    recording, replicas = fleet(load, [[], [0]])
    assert LMetric(recording, PLAIN).choose(0.0, 1, 0, replicas).index == 1
