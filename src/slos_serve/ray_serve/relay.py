"""From one engine to any number of routers: takes its publications in and hands them out over the network.

A thread of its own in the replica's process, so that a busy event loop does not make publications late. The newest
publication is sent again while the engine rests, because a router that connected later would know nothing, and as the
sign that it is still there. Only peers that prove the routers' key are let in; all others are counted.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import zmq

from slos_serve.ray_serve.curve import CurveKeys, Doorkeeper, RefusalCount
from slos_serve.ray_serve.ports import PortRange
from slos_serve.ray_serve.pulse import Pulse
from slos_serve.ray_serve.wire import MOST_NAME_CHARS, MOST_ROUTERS, ROUTER_TOPIC, Envelope, Notes
from slos_serve.routing.headroom import Room
from slos_serve.routing.publication import Publication

_logger = logging.getLogger("slos_serve.ray_serve")
# A router sends subscriptions only.
_MAX_SUBSCRIPTION_BYTES = 1024
# A router that answers nothing for so long is gone, as one that stands still is: others take over its share.
_HEARTBEAT_MS, _GONE_AFTER_MS = 1000, 3000


class Relay:
    """Listens for one engine, publishes to all routers.

    Args:
        host: address of this node that routers reach.
        pulse: told of every publication.
        keys: of this cluster.
        ports: that routers reach.
        every_s: how often a resting engine's state is sent again.
        clock_s: the clock of the engine's publications.
    """

    def __init__(
        self,
        host: str,
        pulse: Pulse,
        keys: CurveKeys,
        ports: PortRange,
        every_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pulse = pulse
        self._every_s = every_s
        self._clock_s = clock_s
        self._last: bytes | None = None
        self._last_sent_s = clock_s()
        self.refused_peers = 0
        self._notes = Notes()
        self._ended = threading.Event()
        self._folder = tempfile.TemporaryDirectory(prefix="slos-serve-")
        self.engine_address = f"ipc://{Path(self._folder.name) / 'engine'}"
        self._context = zmq.Context(io_threads=1)
        self._engine = self._context.socket(zmq.PULL)
        self._engine.setsockopt(zmq.CONFLATE, 1)
        self._engine.bind(self.engine_address)
        self._doorkeeper = Doorkeeper(self._context, keys.router_public)
        self._routers = self._context.socket(zmq.XPUB)
        self._routers.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        self._routers.setsockopt(zmq.HEARTBEAT_TIMEOUT, _GONE_AFTER_MS)
        self._routers.setsockopt(zmq.LINGER, 0)
        self._routers.setsockopt(zmq.MAXMSGSIZE, _MAX_SUBSCRIPTION_BYTES)
        keys.guard_replica(self._routers)
        self._refusals = RefusalCount(self._routers, self._count_refusal)
        if ":" in host:
            self._routers.setsockopt(zmq.IPV6, 1)
            host = f"[{host}]"
        try:
            self.address = f"tcp://{host}:{ports.bind(self._routers, host)}"
        except BaseException:
            self._context.destroy(linger=0)
            self._folder.cleanup()
            raise
        self._thread = threading.Thread(target=self._run, name="slos-serve relay", daemon=True)
        self._thread.start()

    def latest(self) -> Publication | None:
        """The newest publication, ``None`` before the first."""
        payload = self._last
        return None if payload is None else Envelope(0.0, False, payload).publication("")

    def tell_room(self, room: Room) -> None:
        """What every publication says of the replica's room from now on."""
        self._notes = replace(self._notes, room=room)

    def close(self) -> None:
        """End the thread and free the addresses."""
        self._ended.set()
        self._thread.join()
        self._context.destroy(linger=0)
        self._folder.cleanup()

    def _count_refusal(self) -> None:
        self.refused_peers += 1

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._engine, self._doorkeeper.socket, self._refusals.socket, self._routers):
            poller.register(socket, zmq.POLLIN)
        while not self._ended.is_set():
            try:
                self._turn(dict(poller.poll(self._patience_ms())))
            except Exception:  # whatever came, the next publication is handed on
                _logger.exception("slos-serve: a publication could not be handed on")
                self._ended.wait(self._every_s)

    def _patience_ms(self) -> int:
        """Until the last publication is to be sent again."""
        left_s = self._last_sent_s + self._every_s - self._clock_s()
        return min(max(int(left_s * 1000.0), 1), max(int(self._every_s * 1000.0), 1))

    def _turn(self, ready: Mapping[zmq.Socket[bytes], int]) -> None:
        """What came: publications and peers; or the last publication again."""
        if self._doorkeeper.socket in ready:
            self._doorkeeper.answer()
        if self._refusals.socket in ready:
            self._refusals.take_in()
        if self._routers in ready:
            self._subscription(self._routers.recv())
        now_s = self._clock_s()
        if self._engine in ready:
            payload = self._engine.recv()
            received = Envelope(0.0, False, payload)
            self._pulse.published(now_s, received.publication("").num_requests, received.steps_done())
            self._last = payload
            self._send(Envelope(now_s, False, payload))
        elif now_s - self._last_sent_s >= self._every_s:
            self._last_sent_s = now_s
            if self._last is not None and self._pulse.resting(now_s):
                self._send(Envelope(now_s, True, self._last))

    def _subscription(self, message: bytes) -> None:
        """A router came or went: it says its name by what it subscribes to."""
        topic = message[1:]
        if not topic.startswith(ROUTER_TOPIC):
            return
        name = topic.removeprefix(ROUTER_TOPIC).decode("utf-8", "replace")[:MOST_NAME_CHARS]
        others = [known for known in self._notes.routers if known != name][: MOST_ROUTERS - 1]
        self._notes = replace(self._notes, routers=tuple(sorted([*others, name] if message[0] else others)))

    def _send(self, envelope: Envelope) -> None:
        self._last_sent_s = envelope.sent_s
        self._routers.send_multipart(replace(envelope, notes=self._notes).parts())
