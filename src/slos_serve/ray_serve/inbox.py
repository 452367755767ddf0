"""Where a router receives what its replicas publish.

One thread reads all replicas' sockets and keeps each one's newest message; decoding is left to the moment of a routing
decision, so a router that has nothing to route spends nothing on it. Only a replica that proves its key is believed
(:mod:`slos_serve.ray_serve.curve`); what else comes is dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from slos_serve.core.errors import InvalidFieldError
from slos_serve.ray_serve.curve import CurveKeys, RefusalCount
from slos_serve.ray_serve.wire import ADDRESS_KEY, ROUTER_TOPIC, Envelope

_logger = logging.getLogger("slos_serve.ray_serve")
_POLL_MS = 50
_RECONNECT_MS, _RECONNECT_MAX_MS = 100, 5000
_KEYS_AGAIN_S = 1.0
# A publication of a thousand owed prompts has some 200 KiB.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Line:
    """The socket that hears one replica, and what watches it."""

    socket: zmq.Socket[bytes]
    refusals: RefusalCount


class Inbox:
    """The newest message of each replica.

    Args:
        keys: gives the keys of this cluster; asked once, and again while it fails.
        clock_s: the router's clock.
        dropped: told why, for every message and every peer that is not believed.

    Attributes:
        name: of this router, which replicas tell the others.
    """

    def __init__(
        self,
        keys: Callable[[], CurveKeys],
        clock_s: Callable[[], float] = time.monotonic,
        dropped: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.name = secrets.token_hex(8)
        self._ask_keys = keys
        self._keys: CurveKeys | None = None
        self._clock_s = clock_s
        self._dropped = dropped
        self._wishes: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
        self._newest: dict[str, Envelope] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lines: dict[str, _Line] = {}
        self._thread = threading.Thread(target=self._run, name="slos-serve inbox", daemon=True)
        self._thread.start()

    def listen(self, replica: str, address: str) -> None:
        """Take in what a replica publishes from now on."""
        self._wishes.put((replica, address))

    def ignore(self, replica: str) -> None:
        """A replica is gone."""
        self._wishes.put((replica, None))

    def take(self) -> dict[str, Envelope]:
        """What came since the last call, the newest of each replica."""
        with self._lock:
            taken, self._newest = self._newest, {}
        return taken

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        context = zmq.Context(io_threads=1)
        poller = zmq.Poller()
        while not self._ended.is_set():
            try:
                self._grant_wishes(context, poller)
                if not self._lines:  # a poll of nothing does not wait
                    self._ended.wait(_POLL_MS / 1000.0)
                    continue
                ready = dict(poller.poll(_POLL_MS))
                for replica, line in self._lines.items() if ready else ():
                    if line.refusals.socket in ready:
                        line.refusals.take_in()
                    if line.socket in ready:
                        self._read(line.socket, replica)
            except Exception:  # one replica's trouble must not end the hearing of all
                _logger.exception("slos-serve: failed to read publications")
                self._ended.wait(_POLL_MS / 1000.0)
        context.destroy(linger=0)

    def _grant_wishes(self, context: zmq.Context[zmq.Socket[bytes]], poller: zmq.Poller) -> None:
        if self._wishes.empty() or not self._have_keys():
            return
        while not self._wishes.empty():
            replica, address = self._wishes.get()
            old = self._lines.pop(replica, None)
            if old is not None:
                for socket in (old.socket, old.refusals.socket):
                    poller.unregister(socket)
                old.refusals.close()
                old.socket.close(linger=0)
            line = None if address is None else self._line(context, replica, address)
            if line is not None:
                self._lines[replica] = line
                for socket in (line.socket, line.refusals.socket):
                    poller.register(socket, zmq.POLLIN)

    def _have_keys(self) -> bool:
        """Whether they are there; a store that does not answer is asked again."""
        if self._keys is None:
            try:
                self._keys = self._ask_keys()
            except Exception:
                _logger.exception("slos-serve: no keys for publications yet; every replica counts as full until then")
                self._ended.wait(_KEYS_AGAIN_S)
        return self._keys is not None

    def _line(self, context: zmq.Context[zmq.Socket[bytes]], replica: str, address: object) -> _Line | None:
        """To the replica; ``None`` where its address is none, so that it counts as full."""
        assert self._keys is not None
        try:
            socket = _subscribed(context, address, self._keys, self.name)
        except Exception:
            self._dropped("address")
            _logger.exception("slos-serve: failed to listen to replica %s at %r", replica, address)
            return None
        return _Line(socket, RefusalCount(socket, lambda: self._dropped("peer")))

    def _read(self, socket: zmq.Socket[bytes], replica: str) -> None:
        """Everything that lies in the socket; the newest is kept."""
        while True:
            try:
                envelope = Envelope.of_parts(socket.recv_multipart(zmq.NOBLOCK), self._clock_s())
            except zmq.Again:
                return
            except InvalidFieldError:
                self._dropped("message")
                _logger.exception("slos-serve: replica %s sent something else than a publication", replica)
                continue
            with self._lock:
                self._newest[replica] = envelope


def _subscribed(
    context: zmq.Context[zmq.Socket[bytes]], address: object, keys: CurveKeys, name: str
) -> zmq.Socket[bytes]:
    """A socket that hears ``address``, which comes from another process and may be anything."""
    if not isinstance(address, str) or not address.startswith("tcp://"):
        raise InvalidFieldError(ADDRESS_KEY, address, "tcp://HOST:PORT")
    socket = context.socket(zmq.SUB)
    try:
        socket.setsockopt(zmq.RCVHWM, 16)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        keys.guard_router(socket)
        if "[" in address:
            socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.setsockopt(zmq.SUBSCRIBE, ROUTER_TOPIC + name.encode("ascii"))
        socket.connect(address)
    except BaseException:
        socket.close(linger=0)
        raise
    return socket
