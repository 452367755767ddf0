"""Keys that publications are encrypted and authenticated with (ZeroMQ CURVE), shared through Ray.

One pair for all replicas and one for all routers of a cluster, made by the first process that asks and kept in Ray's
own key-value store. Ray neither logs nor shows that store, and a process that can read it can run code in the cluster
anyway. Keys never enter a file, an environment or a deployment's settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Protocol

import zmq
from zmq.utils import z85

from slos_serve.core.errors import InvalidFieldError

STORED_AS = b"slos-serve/publication-keys/1"
_Z85_LENGTH = 40
# ZeroMQ asks this address of the same context whether it may let a peer in (ZeroMQ RFC 27).
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class KeyValueStore(Protocol):
    """What of Ray's store is used."""

    def get(self, key: bytes) -> bytes | None:
        """The value, ``None`` without one."""

    def put_new(self, key: bytes, value: bytes) -> None:
        """Store a value where there is none yet."""


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """Both pairs, in ZeroMQ's text form (Z85)."""

    replica_public: str
    router_public: str
    replica_secret: str = field(repr=False)
    router_secret: str = field(repr=False)

    @classmethod
    def make(cls) -> CurveKeys:
        """New ones."""
        replica, router = zmq.curve_keypair(), zmq.curve_keypair()
        public, secret = (tuple(key.decode("ascii") for key in keys) for keys in zip(replica, router, strict=True))
        return cls(public[0], public[1], secret[0], secret[1])

    def as_bytes(self) -> bytes:
        """For the store."""
        return json.dumps(asdict(self)).encode("ascii")

    @classmethod
    def of_bytes(cls, stored: bytes) -> CurveKeys:
        """The inverse of :meth:`as_bytes`.

        Raises:
            InvalidFieldError: not such keys; what is stored is not shown.
        """
        try:
            found = cls(**json.loads(stored))
            whole = all(len(key) == _Z85_LENGTH for key in asdict(found).values())
        except (ValueError, TypeError):
            whole = False
        if not whole:
            raise InvalidFieldError("publication keys", "other contents", "four keys of 40 characters")
        return found

    def guard_replica(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket that publishes accept only routers; its context needs a :class:`Doorkeeper`."""
        socket.curve_server = True
        socket.curve_publickey = self.replica_public.encode("ascii")
        socket.curve_secretkey = self.replica_secret.encode("ascii")
        socket.setsockopt_string(zmq.ZAP_DOMAIN, "publications")

    def guard_router(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket that listens believe only replicas."""
        socket.curve_serverkey = self.replica_public.encode("ascii")
        socket.curve_publickey = self.router_public.encode("ascii")
        socket.curve_secretkey = self.router_secret.encode("ascii")


def shared_keys(store: KeyValueStore) -> CurveKeys:
    """The keys of this cluster, made if there are none.

    Raises:
        InvalidFieldError: something else is stored in their place.
    """
    stored = store.get(STORED_AS)
    if stored is None:
        store.put_new(STORED_AS, CurveKeys.make().as_bytes())
        stored = store.get(STORED_AS)  # of two processes at once the first one's count
    return CurveKeys.of_bytes(stored or b"")


class Doorkeeper:
    """Answers ZeroMQ's question whether a peer may connect: only one that proves the routers' key may.

    Args:
        context: of the sockets that are guarded; the caller polls :attr:`socket` and calls :meth:`answer`.
        router_public: the key.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], router_public: str) -> None:
        self._allowed = router_public
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_ZAP_ADDRESS)

    def answer(self) -> None:
        """One question, which is there."""
        version, request_id, _, _, _, mechanism, *credentials = self.socket.recv_multipart()
        may = mechanism == b"CURVE" and len(credentials) == 1 and _z85(credentials[0]) == self._allowed
        said = (b"200", b"OK") if may else (b"400", b"unknown key")
        self.socket.send_multipart([version, request_id, *said, b"", b""])


class RefusalCount:
    """Counts handshakes that failed at a socket: peers without the key, impostors, bytes that are no ZeroMQ.

    Args:
        guarded: the socket that is watched.
        refused: called for each failure.
    """

    def __init__(self, guarded: zmq.Socket[bytes], refused: Callable[[], None]) -> None:
        self._guarded = guarded
        self._refused = refused
        self.socket = guarded.get_monitor_socket(_FAILED)

    def take_in(self) -> None:
        """All events that are there."""
        while True:
            try:
                self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._refused()

    def close(self) -> None:
        """Watch no longer."""
        self._guarded.disable_monitor()
        self.socket.close(linger=0)


def _z85(key: bytes) -> str:
    encoded: bytes = z85.encode(key)
    return encoded.decode("ascii")
