"""What a replica shows of its load on Ray's metrics port: for dashboards, for scaling, for other routers."""

from __future__ import annotations

from collections.abc import Mapping

from ray.serve import metrics

from slos_serve.routing.demand import FULLNESS, HEADROOM, PREFILL_HEADROOM
from slos_serve.routing.headroom import MOST, Room


class ReplicaGauges:
    """The gauges of one replica."""

    def __init__(self) -> None:
        self._full = metrics.Gauge("slos_serve_fullness", "Share of its time or KV that promises take.")
        self._room = metrics.Gauge(
            "slos_serve_headroom", "Typical requests of a class that could still be promised.", tag_keys=("slo_class",)
        )
        self._prefill = metrics.Gauge(
            "slos_serve_headroom_prefill_tokens",
            "Tokens of the longest prompt of a class that could still be promised.",
            tag_keys=("slo_class",),
        )
        self._least = metrics.Gauge(
            "slos_serve_least_headroom_requests", "The smallest headroom of the classes asked for lately."
        )
        self._ttft = metrics.Gauge(
            "slos_serve_standard_ttft_seconds",
            "Predicted time to first token of a 512-token prompt that comes now.",
        )
        self._next = metrics.Gauge(
            "slos_serve_next_tpot_seconds", "Predicted time per output token of one more stream."
        )
        self._refused = metrics.Gauge(
            "slos_serve_refused_peers", "Connections to the port of publications that were refused."
        )

    def set(self, stats: Mapping[str, float], room: Room | None, refused_peers: int) -> None:
        """Show the present state.

        Args:
            stats: fullness, and headroom by class, as the replica reports them for scaling.
            room: ``None`` before the first publication.
            refused_peers: so far.
        """
        self._full.set(stats[FULLNESS])
        for gauge, prefix in ((self._room, HEADROOM), (self._prefill, PREFILL_HEADROOM)):
            for name, value in _by_class(stats, prefix).items():
                gauge.set(value, tags={"slo_class": name})
        self._refused.set(refused_peers)
        if room is not None:
            self._least.set(room.least_headroom)
            self._ttft.set(room.standard_ttft_s)
            self._next.set(room.next_tpot_s)


def least_headroom(stats: Mapping[str, float]) -> float:
    """The smallest headroom of the classes asked for lately, in what a replica reports for scaling."""
    return min(_by_class(stats, HEADROOM).values(), default=float(MOST))


def _by_class(stats: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in stats.items() if name.startswith(prefix)}
