"""Where a router receives what its replicas publish.

One thread reads all replicas' sockets and keeps each one's newest message; decoding is left to the moment of a routing
decision, so a router that has nothing to route spends nothing on it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import zmq

from slos_serve.core.errors import InvalidFieldError
from slos_serve.ray_serve.wire import ADDRESS_KEY, Envelope

_logger = logging.getLogger("slos_serve.ray_serve")
_POLL_MS = 50
# A publication of a thousand owed prompts has some 200 KiB.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024


class Inbox:
    """The newest message of each replica.

    Args:
        clock_s: the router's clock.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._wishes: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
        self._newest: dict[str, Envelope] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
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
        sockets: dict[str, zmq.Socket[bytes]] = {}
        names: dict[zmq.Socket[bytes], str] = {}
        while not self._ended.is_set():
            while not self._wishes.empty():
                replica, address = self._wishes.get()
                old = sockets.pop(replica, None)
                if old is not None:
                    poller.unregister(old)
                    names.pop(old)
                    old.close(linger=0)
                socket = None if address is None else self._subscribed(context, replica, address)
                if socket is not None:
                    sockets[replica], names[socket] = socket, replica
                    poller.register(socket, zmq.POLLIN)
            if not sockets:  # a poll of nothing does not wait
                self._ended.wait(_POLL_MS / 1000.0)
                continue
            try:
                for socket, _ in poller.poll(_POLL_MS):
                    self._read(socket, names[socket])
            except Exception:  # one replica's trouble must not end the hearing of all
                _logger.exception("slos-serve: failed to read publications")
                self._ended.wait(_POLL_MS / 1000.0)
        context.destroy(linger=0)

    def _subscribed(
        self, context: zmq.Context[zmq.Socket[bytes]], replica: str, address: object
    ) -> zmq.Socket[bytes] | None:
        """A socket that hears the replica; ``None`` where its address is none, so that it counts as full."""
        socket = None
        try:
            socket = _subscribed(context, address)
        except Exception:
            _logger.exception("slos-serve: failed to listen to replica %s at %r", replica, address)
        return socket

    def _read(self, socket: zmq.Socket[bytes], replica: str) -> None:
        """Everything that lies in the socket; the newest is kept."""
        while True:
            try:
                envelope = Envelope.of_parts(socket.recv_multipart(zmq.NOBLOCK), self._clock_s())
            except zmq.Again:
                return
            except InvalidFieldError:
                _logger.exception("slos-serve: replica %s sent something else than a publication", replica)
                continue
            with self._lock:
                self._newest[replica] = envelope


def _subscribed(context: zmq.Context[zmq.Socket[bytes]], address: object) -> zmq.Socket[bytes]:
    """A socket that hears ``address``, which comes from another process and may be anything."""
    if not isinstance(address, str) or not address.startswith("tcp://"):
        raise InvalidFieldError(ADDRESS_KEY, address, "tcp://HOST:PORT")
    socket = context.socket(zmq.SUB)
    try:
        socket.setsockopt(zmq.RCVHWM, 16)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        if "[" in address:
            socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(address)
    except BaseException:
        socket.close(linger=0)
        raise
    return socket
