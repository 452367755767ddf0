"""Who hears publications and who is believed: over real sockets."""

from __future__ import annotations

import socket as sockets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

pytest.importorskip("zmq")

import zmq

from slos_serve.core.errors import InvalidFieldError
from slos_serve.policies.slos_serve import SLOsServePolicy
from slos_serve.ray_serve.curve import STORED_AS, CurveKeys, shared_keys
from slos_serve.ray_serve.inbox import Inbox
from slos_serve.ray_serve.ports import NoFreePortError, PortRange
from slos_serve.ray_serve.pulse import Pulse
from slos_serve.ray_serve.relay import Relay
from slos_serve.vllm_plugin.publish import EnginePublisher
from tests.builders import OPT_13B_A100
from tests.unit.ray_serve.ports import PORTS
from tests.unit.routing.fleet import NOW_S, loaded

KEYS = CurveKeys.make()
PATIENCE = 200  # looks of 50 ms


class Store:
    """A key-value store in memory."""

    def __init__(self, **stored: bytes) -> None:
        self.stored = {name.encode(): value for name, value in stored.items()}

    def get(self, key: bytes) -> bytes | None:
        return self.stored.get(key)

    def put_new(self, key: bytes, value: bytes) -> None:
        self.stored.setdefault(key, value)


@pytest.fixture
def relay() -> Iterator[Relay]:
    relay = Relay("127.0.0.1", Pulse(), KEYS, PORTS, every_s=0.01)
    publisher = EnginePublisher(relay.engine_address, SLOsServePolicy(OPT_13B_A100, 1), every_s=0.1)
    publisher.idle(NOW_S, loaded(3).view())  # repeated while the engine rests
    yield relay
    publisher.close()
    relay.close()


def eventually(holds: Callable[[], object]) -> bool:
    for _ in range(PATIENCE):
        if holds():
            return True
        threading.Event().wait(0.05)
    return False


@pytest.fixture
def inboxes() -> Iterator[list[Inbox]]:
    opened: list[Inbox] = []
    yield opened
    for inbox in opened:
        inbox.close()


Hears = Callable[[str, CurveKeys, Counter[str]], Callable[[], bool]]


@pytest.fixture
def hears(inboxes: list[Inbox]) -> Hears:
    """Makes an inbox with these keys; what it returns says whether it has heard the address."""

    def listening(address: str, keys: CurveKeys, dropped: Counter[str]) -> Callable[[], bool]:
        inbox = Inbox(lambda: keys, dropped=lambda reason: dropped.update([reason]))
        inboxes.append(inbox)
        inbox.listen("r1", address)
        return lambda: "r1" in inbox.take()

    return listening


def test_only_a_router_of_the_cluster_hears(relay: Relay, hears: Hears) -> None:
    other, dropped = CurveKeys.make(), Counter[str]()
    stranger = replace(KEYS, router_public=other.router_public, router_secret=other.router_secret)
    strange = hears(relay.address, stranger, dropped)
    assert eventually(lambda: relay.refused_peers)
    assert eventually(hears(relay.address, KEYS, dropped))
    assert not strange() and dropped["peer"]


def test_an_impostor_is_not_believed(hears: Hears) -> None:
    other, dropped = CurveKeys.make(), Counter[str]()
    impostor = Relay("127.0.0.1", Pulse(), replace(other, router_public=KEYS.router_public), PORTS, every_s=0.01)
    publisher = EnginePublisher(impostor.engine_address, SLOsServePolicy(OPT_13B_A100, 1), every_s=0.1)
    publisher.idle(NOW_S, loaded(3).view())
    believed = hears(impostor.address, KEYS, dropped)
    assert eventually(lambda: dropped["peer"])
    assert not believed()
    publisher.close()
    impostor.close()


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03"]
)
def test_bytes_that_are_no_peer_change_nothing(relay: Relay, hears: Hears, said: bytes) -> None:
    host, port = relay.address.removeprefix("tcp://").split(":")
    for _ in range(3):
        with sockets.create_connection((host, int(port))) as garbage:
            garbage.sendall(said)
    assert eventually(hears(relay.address, KEYS, Counter()))
    assert relay.latest() is not None


def test_a_peer_without_encryption_hears_nothing(relay: Relay) -> None:
    with zmq.Context() as context, context.socket(zmq.SUB) as plain:
        plain.setsockopt(zmq.SUBSCRIBE, b"")
        plain.connect(relay.address)
        assert eventually(lambda: relay.refused_peers)
        assert not plain.poll(200)


def test_all_processes_get_the_same_keys() -> None:
    store = Store()
    first = shared_keys(store)
    assert shared_keys(store) == first
    assert first.replica_secret not in repr(first) and first.router_secret not in repr(first)


@pytest.mark.parametrize("stored", [b"{}", b"[", b"\xff", b'{"replica_public": 1}', b"null"])
def test_other_contents_of_the_store_are_refused_and_not_shown(stored: bytes) -> None:
    with pytest.raises(InvalidFieldError) as raised:
        shared_keys(Store(**{STORED_AS.decode(): stored}))
    assert str(stored) not in str(raised.value)


def test_an_inbox_asks_again_for_keys(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slos_serve.ray_serve.inbox._KEYS_AGAIN_S", 0.01)
    asked = []

    def keys() -> CurveKeys:
        asked.append(1)
        if len(asked) < 3:
            raise ConnectionError("no store")
        return KEYS

    inbox = Inbox(keys)
    inbox.listen("r1", relay.address)
    assert eventually(lambda: "r1" in inbox.take())
    assert len(asked) == 3
    inbox.close()


@pytest.mark.parametrize("text", ["", "0", "80-", "90-80", "1-70000", "a-b", "-1"])
def test_what_is_no_range_of_ports_is_refused(text: str) -> None:
    with pytest.raises(InvalidFieldError, match="publish_ports"):
        PortRange.of_text(text)


def test_replicas_of_a_node_share_a_range_until_it_is_full() -> None:
    with zmq.Context() as context:
        open_ones = [context.socket(zmq.PUB) for _ in range(3)]
        first = open_ones[0].bind_to_random_port("tcp://127.0.0.1")
        assert PortRange.of_text(f"{first}") == PortRange(first, first)
        with pytest.raises(NoFreePortError, match=str(first)):
            PortRange(first, first).bind(open_ones[1], "127.0.0.1")
        assert PortRange(first, first + 50).bind(open_ones[2], "127.0.0.1") > first
        for one in open_ones:
            one.close(linger=0)
