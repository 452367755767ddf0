"""A publication's way from the engine core over the replica to its routers, over real sockets."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
import zmq

pytest.importorskip("zmq")

from slos_serve.core.errors import InvalidFieldError
from slos_serve.policies.slos_serve import SLOsServePolicy
from slos_serve.ray_serve.curve import CurveKeys, Doorkeeper
from slos_serve.ray_serve.inbox import Inbox
from slos_serve.ray_serve.pulse import Pulse
from slos_serve.ray_serve.relay import Relay
from slos_serve.ray_serve.wire import MOST_ROUTERS, Envelope, Notes
from slos_serve.routing.headroom import Room
from slos_serve.vllm_plugin.publish import NAMED_FOR_S, EnginePublisher
from tests.builders import OPT_13B_A100
from tests.unit.ray_serve.ports import PORTS
from tests.unit.routing.fleet import NOW_S, loaded

KEYS = CurveKeys.make()
PATIENCE = 200  # polls of 50 ms


@pytest.fixture
def relay() -> Iterator[Relay]:
    relay = Relay("127.0.0.1", Pulse(), KEYS, PORTS, every_s=0.01)
    yield relay
    relay.close()


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    inbox = Inbox(lambda: KEYS)
    yield inbox
    inbox.close()


@pytest.fixture
def publisher(relay: Relay) -> Iterator[EnginePublisher]:
    publisher = EnginePublisher(relay.engine_address, SLOsServePolicy(OPT_13B_A100, 1), every_s=0.1)
    yield publisher
    publisher.close()


def first_of(inbox: Inbox, replica: str) -> Envelope:
    for _ in range(PATIENCE):
        taken = inbox.take()
        if replica in taken:
            return taken[replica]
        threading.Event().wait(0.05)
    raise AssertionError("nothing came")


def test_a_router_that_comes_late_hears_of_a_resting_engine(
    relay: Relay, inbox: Inbox, publisher: EnginePublisher
) -> None:
    publisher.idle(NOW_S, loaded(3).view())
    for _ in range(PATIENCE):
        if relay.latest() is not None:
            break
        threading.Event().wait(0.05)
    inbox.listen("r1", relay.address)
    envelope = first_of(inbox, "r1")
    assert envelope.unchanged
    publication = envelope.publication("r1")
    assert (publication.replica, publication.num_requests, publication.sequence) == ("r1", 0, 1)
    inbox.ignore("r1")


def test_the_newest_publication_is_what_arrives(relay: Relay, inbox: Inbox, publisher: EnginePublisher) -> None:
    inbox.listen("r1", relay.address)
    assert publisher.due(NOW_S)
    publisher.unplanned(NOW_S, loaded(7).view())
    publisher.send()
    assert not publisher.due(NOW_S + 0.05) and publisher.due(NOW_S + 0.11)
    while relay.latest() is None:
        threading.Event().wait(0.01)
    publisher.idle(NOW_S + 1.0, loaded(7).view())
    while first_of(inbox, "r1").publication("r1").sequence != 2:
        pass


def test_an_inbox_that_listens_to_nobody_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    polls: list[int] = []

    def poll(*_: object) -> list[object]:
        polls.append(threading.get_ident())  # inboxes of other tests may be listening too
        return []

    monkeypatch.setattr(zmq.Poller, "poll", poll)
    inbox = Inbox(lambda: KEYS)
    threading.Event().wait(0.2)
    own = inbox._thread.ident
    inbox.close()
    assert own not in polls


BAD_ADDRESSES = ("tcp://", "nonsense", "tcp://no such host:x", "ipc://" + "x" * 500, "tcp://127.0.0.1:99999", b"x", 5)


def test_addresses_and_messages_that_are_none_end_nothing(
    inbox: Inbox, relay: Relay, publisher: EnginePublisher
) -> None:
    for number, address in enumerate(BAD_ADDRESSES):
        inbox.listen(f"bad{number}", address)  # type: ignore[arg-type]
    with zmq.Context() as context, context.socket(zmq.PUB) as garbage:
        doorkeeper = Doorkeeper(context, KEYS.router_public)
        threading.Thread(target=doorkeeper.answer, daemon=True).start()
        KEYS.guard_replica(garbage)
        port = garbage.bind_to_random_port("tcp://127.0.0.1")
        inbox.listen("garbage", f"tcp://127.0.0.1:{port}")
        inbox.listen("r1", relay.address)
        publisher.idle(NOW_S, loaded(7).view())  # repeated while the engine rests
        assert first_of(inbox, "r1").publication("r1").num_requests == 0
        good = [b"1.0", b"0", b"{}", b"{}"]
        bad = ([b""], [b"nan", b"0", b"{}", b"{}"], [b"1.0", b"0", b"{}", b"["], [b"\xff" * 100] * 50)
        for _ in range(PATIENCE):
            for parts in (*bad, good):
                garbage.send_multipart(parts)
            if "garbage" in inbox.take():
                break
            threading.Event().wait(0.05)
        else:
            raise AssertionError("the thread has ended")
        doorkeeper.socket.close(linger=0)
    assert inbox._thread.is_alive()


def test_the_relay_survives_any_publication(relay: Relay, publisher: EnginePublisher) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as garbage:
        garbage.connect(relay.engine_address)
        for payload in (b"", b"{", b"[" * 100_000, b'{"format": 1, "steps_done": "x"}'):
            garbage.send(payload)
            threading.Event().wait(0.02)
    publisher.unplanned(NOW_S, loaded(7).view())
    publisher.send()
    for _ in range(PATIENCE):
        if relay.latest() is not None:
            break
        threading.Event().wait(0.05)
    assert relay.latest() is not None and relay._thread.is_alive()


def test_an_engine_without_a_reader_is_not_held_up() -> None:
    publisher = EnginePublisher("ipc:///nonexistent/engine", SLOsServePolicy(OPT_13B_A100, 1), every_s=0.0)
    for _ in range(100):
        publisher.unplanned(NOW_S, loaded(1).view())
        publisher.send()
    publisher.close()


def test_a_failing_publication_costs_no_step(caplog: pytest.LogCaptureFixture, publisher: EnginePublisher) -> None:
    broken = loaded(1).view()
    broken.block_size = 0
    publisher.unplanned(NOW_S, broken)
    publisher.send()
    publisher.unplanned(NOW_S, broken)
    publisher.send()
    assert len([record for record in caplog.records if "publication failed" in record.message]) == 1


def test_an_engine_that_counts_its_steps_is_judged_by_them(publisher: EnginePublisher, relay: Relay) -> None:
    publisher.step_done()
    publisher.step_done()
    publisher.unplanned(NOW_S, loaded(7).view())
    publisher.send()
    for _ in range(PATIENCE):
        if relay._last is not None:
            break
        threading.Event().wait(0.05)
    assert relay._last is not None and Envelope(0.0, False, relay._last).steps_done() == 2


def test_requests_that_came_lately_are_named(publisher: EnginePublisher, relay: Relay) -> None:
    publisher.entered(NOW_S - NAMED_FOR_S - 1.0, 11)
    publisher.entered(NOW_S - 0.5, 22)
    assert named(publisher, relay) == {11, 22}, "one that came before a long pause too, once"
    assert named(publisher, relay) == {22}


def test_a_burst_crowds_out_no_name(publisher: EnginePublisher, relay: Relay) -> None:
    for ticket in range(10_000):
        publisher.entered(NOW_S, ticket)
    assert named(publisher, relay) == set(range(10_000))


def named(publisher: EnginePublisher, relay: Relay) -> set[int]:
    """Tickets in the next publication."""
    before = relay._last
    publisher.unplanned(NOW_S, loaded(7).view())
    publisher.send()
    for _ in range(PATIENCE):
        if relay._last is not before:
            break
        threading.Event().wait(0.05)
    assert relay._last is not None and relay._last is not before
    return set(Envelope(0.0, False, relay._last).tickets() or ())


@pytest.mark.parametrize("payload", [b'{"tickets": 5}', b'{"tickets": ["a"]}'])
def test_tickets_that_are_none_are_refused(payload: bytes) -> None:
    assert Envelope(0.0, False, b"{}").tickets() is None
    with pytest.raises(InvalidFieldError, match="tickets"):
        Envelope(0.0, False, payload).tickets()


@pytest.mark.parametrize(("payload", "steps"), [(b"{}", None), (b'{"steps_done": 12}', 12)])
def test_steps_are_read_where_they_are_told(payload: bytes, steps: int | None) -> None:
    assert Envelope(0.0, False, payload).steps_done() == steps


def test_an_envelope_is_read_back() -> None:
    envelope = Envelope(1.25, True, b"{}", 3.0, Notes(("a", "b"), Room(3.0, 0.25, 0.04)))
    assert Envelope.of_parts(envelope.parts(), 3.0) == envelope


@pytest.mark.parametrize(
    "parts",
    [[], [b"1.0", b"0", b"{}"], [b"x", b"0", b"{}", b"{}"], [b"nan", b"0", b"{}", b"{}"], [b"-inf", b"0", b"", b"{}"]],
)
def test_other_messages_are_refused(parts: list[bytes]) -> None:
    with pytest.raises(InvalidFieldError, match="publication message"):
        Envelope.of_parts(parts, 0.0)


@pytest.mark.parametrize("payload", [b"{", b"[]", b"{}", json.dumps({"format": "other"}).encode()])
def test_other_payloads_are_refused(payload: bytes) -> None:
    with pytest.raises(InvalidFieldError):
        Envelope(0.0, False, payload).publication("a")


@pytest.mark.parametrize(
    "notes",
    [
        b"",
        b"[]",
        b"{",
        b'{"other": 1}',
        b'{"routers": "ab"}',
        b'{"routers": [1]}',
        json.dumps({"routers": ["x" * 65]}).encode(),
        json.dumps({"routers": ["x"] * (MOST_ROUTERS + 1)}).encode(),
        b'{"room": [1, 2, 3]}',
        b'{"room": {"least_headroom": 1}}',
        b'{"room": {"least_headroom": -1, "standard_ttft_s": 1, "next_tpot_s": 1}}',
        b'{"room": {"least_headroom": 1, "standard_ttft_s": NaN, "next_tpot_s": 1}}',
        b'{"room": {"least_headroom": 1, "standard_ttft_s": 1, "next_tpot_s": "soon"}}',
    ],
)
def test_other_notes_are_refused(notes: bytes) -> None:
    with pytest.raises(InvalidFieldError):
        Envelope.of_parts([b"1.0", b"0", b"{}", notes], 0.0)


def test_replicas_tell_each_router_who_hears_them(relay: Relay, inbox: Inbox, publisher: EnginePublisher) -> None:
    publisher.idle(NOW_S, loaded(3).view())
    room = Room(5.0, 0.25, 0.04)
    relay.tell_room(room)
    other = Inbox(lambda: KEYS)
    try:
        for each in (inbox, other):
            each.listen("r1", relay.address)
        both = notes_with(inbox, 2)
        assert both == Notes(tuple(sorted((inbox.name, other.name))), room)
    finally:
        other.close()
    assert notes_with(inbox, 1).routers == (inbox.name,)


def notes_with(inbox: Inbox, routers: int) -> Notes:
    """The first notes of so many routers."""
    for _ in range(PATIENCE):
        notes = first_of(inbox, "r1").notes
        if len(notes.routers) == routers:
            return notes
    raise AssertionError(notes)
