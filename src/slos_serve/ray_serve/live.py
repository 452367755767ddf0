"""The live page under Ray: each replica keeps what its engine says, the endpoint asks all of them and adds them up.

Nothing of it is on the way of a request. Replicas are asked when somebody looks, twice a second at most; their engines
send steps and streams only then.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import zmq

from slos_serve.core.slo import SLOClass
from slos_serve.ray_serve.ticket import Ticket
from slos_serve.routing.publication import Publication
from slos_serve.vllm_plugin.front.link import FrontSockets, socket_path
from slos_serve.vllm_plugin.live.feed import LIVE_KEY, MOST_STEPS, WATCHED
from slos_serve.vllm_plugin.live.state import LiveState, Watch
from slos_serve.vllm_plugin.live.streams import MOST_STREAMS

POLL_MS = 500
_logger = logging.getLogger("slos_serve.ray_serve")


class ReplicaLive:
    """What the engine of one replica says, in the replica's process. Listens in a thread from the start."""

    def __init__(self) -> None:
        self._message: dict[str, Any] | None = None
        self._watch = Watch(socket_path(WATCHED, os.getpid()))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slos-serve live", daemon=True)
        self._thread.start()

    def told(self, name: str, latest: Publication | None) -> dict[str, Any]:
        """The engine's newest message and a row about the replica; its engine hears that somebody looks.

        Args:
            name: the replica's.
            latest: what it published last.
        """
        self._watch.looked()
        return {"engine": self._message, "row": replica_row(name, latest)}

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            sockets = FrontSockets(os.getpid())
        except (OSError, zmq.ZMQError):
            _logger.exception(
                "slos-serve: the live page shows nothing of this replica: failed to listen to its engine."
            )
            return
        try:
            while not self._ended.is_set():
                if sockets.outcomes.poll(POLL_MS):
                    self.heard(sockets.outcomes.recv())
                self._watch.rest()
        finally:
            self._watch.close()
            sockets.close()

    def heard(self, payload: bytes) -> None:
        """Keep a message for the page; what became of single requests is not needed here."""
        found = json.loads(payload)
        if LIVE_KEY in found:
            self._message = found[LIVE_KEY]


def replica_row(name: str, latest: Publication | None) -> dict[str, Any]:
    """A replica in the page's table; numbers are ``None`` before its first publication."""
    if latest is None:
        return {"name": name} | dict.fromkeys(_COLUMNS)
    used = latest.total_blocks - latest.free_blocks
    numbers = (
        latest.num_requests,
        latest.num_unpromised,
        len(latest.due_s),
        round(float(latest.cost_tokens.sum())),
        round(100.0 * used / latest.total_blocks, 1) if latest.total_blocks else None,
        round(latest.correction, 3),
    )
    return {"name": name} | dict(zip(_COLUMNS, numbers, strict=True))


_COLUMNS = ("requests", "unpromised", "owed_prompts", "owed_tokens", "kv_used_percent", "correction")


class FleetLive:
    """What one endpoint shows of all replicas, and what it told clients itself.

    Args:
        model: the name that clients use.
        classes: of the class file.
    """

    def __init__(self, model: str, classes: Sequence[SLOClass]) -> None:
        self._state = LiveState(model, classes)
        self._rows: list[dict[str, Any]] = []
        self._state.replicas = lambda: self._rows

    def told(self, ticket: Ticket) -> None:
        """A client was told what becomes of its request."""
        told = ticket.told()
        if told.verdict is not None and told.reason is not None:
            name = told.slo_class if ticket.asked.has_slo else None
            predicted_s = told.predicted_ttft_s if math.isfinite(told.predicted_ttft_s) else None
            self._state.told(name, told.verdict, told.reason, predicted_s, told.target_ttft_s)

    def document(self, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The page's document, from what the replicas answered."""
        self._rows = sorted((dict(answer["row"]) for answer in answers), key=lambda row: str(row["name"]))
        messages = [answer["engine"] for answer in answers if answer["engine"] is not None]
        if messages:
            self._state.heard(added_up(messages))
        return self._state.document()


def added_up(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several engines as one: counts and queues added, the newest steps and the tightest streams of all."""
    steps = sorted((step for one in messages for step in one.get("steps", ())), key=lambda step: float(step["time_s"]))
    streams = [stream for one in messages for stream in one.get("streams", ())]
    streams.sort(
        key=lambda one: (one["verdict"] in ("best-effort", "no-slo"), one["slack_ms"] is None, one["slack_ms"])
    )
    return {
        "requests": _added(messages, "requests"),
        "attained": _added(messages, "attained"),
        "queue": {
            place: [sum(counts) for counts in zip(*(one["queue"][place] for one in messages), strict=True)]
            for place in ("running", "waiting")
        },
        "armed": all(one["armed"] for one in messages),
        "correction": round(sum(one["correction"] for one in messages) / len(messages), 3),
        "steps": steps[-MOST_STEPS:],
        "streams": streams[:MOST_STREAMS],
    }


def _added(messages: Sequence[Mapping[str, Any]], what: str) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for message in messages:
        for name, counts in message[what].items():
            into = total.setdefault(name, {})
            for verdict, number in counts.items():
                into[verdict] = into.get(verdict, 0) + number
    return total
