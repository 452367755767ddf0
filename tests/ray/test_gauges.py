"""What a replica shows of its load."""

from __future__ import annotations

import pytest

pytest.importorskip("ray")
pytest.importorskip("vllm")

from slos_serve.ray_serve.replica_gauges import ReplicaGauges, least_headroom
from slos_serve.routing.demand import FULLNESS, HEADROOM, PREFILL_HEADROOM
from slos_serve.routing.headroom import Room

pytestmark = pytest.mark.ray


def test_gauges_show_the_class_with_least_room(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[tuple[str, str], float] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...] = ()) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            shown[self.name, "".join((tags or {}).values())] = value

    monkeypatch.setattr("slos_serve.ray_serve.replica_gauges.metrics.Gauge", Gauge)
    gauges = ReplicaGauges()
    gauges.set({FULLNESS: 1.0}, None, 0)
    assert shown == {("slos_serve_fullness", ""): 1.0, ("slos_serve_refused_peers", ""): 0}
    stats = {f"{HEADROOM}chat": 7.0, f"{HEADROOM}code": 3.0, f"{PREFILL_HEADROOM}code": 900.0}
    gauges.set({FULLNESS: 0.5, **stats}, Room(least_headroom(stats), 0.25, 0.04), 2)
    assert shown["slos_serve_headroom", "code"] == shown["slos_serve_least_headroom_requests", ""] == 3.0
    assert shown["slos_serve_headroom", "chat"] == 7.0
    assert shown["slos_serve_headroom_prefill_tokens", "code"] == 900.0
    assert (shown["slos_serve_standard_ttft_seconds", ""], shown["slos_serve_refused_peers", ""]) == (0.25, 2)
    assert shown["slos_serve_next_tpot_seconds", ""] == 0.04
