"""Routing decisions from what replicas publish, as the request router makes them, without Ray."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from slos_serve.core.verdict import Verdict, Why
from slos_serve.ray_serve.dispatch import Dispatcher
from slos_serve.ray_serve.ticket import Ticket
from slos_serve.ray_serve.wire import Envelope, Notes
from slos_serve.routing.headroom import Room
from slos_serve.vllm_plugin.front.load_report import load_of
from tests.unit.ray_serve.routers import AHEAD_S, Clock, Postman, ticket, two_routers
from tests.unit.routing.fleet import NOW_S, loaded


def test_routes_by_mirrors_on_the_routers_clock(dispatcher: Dispatcher, postman: Postman) -> None:
    postman.bring("a", loaded(600, total_blocks=40_000))
    postman.bring("b", loaded(3))
    asked = ticket()
    decision = dispatcher.decide(asked)
    assert (decision.replica, decision.verdict) == ("b", Verdict.ADMITTED)
    assert asked.decision is decision and asked.attempts == 1
    assert dispatcher.decisions[Verdict.ADMITTED, Why.FITS] == 1


def test_until_a_replica_publishes_it_counts_as_full(dispatcher: Dispatcher, postman: Postman) -> None:
    assert dispatcher.decide(ticket()).reason is Why.NO_STATE
    postman.bring("b", loaded(0))
    assert dispatcher.decide(ticket()).replica == "b"


async def test_the_first_request_waits_for_the_first_publication(dispatcher: Dispatcher, postman: Postman) -> None:
    """An endpoint that nobody asked for its health makes its router with its first request."""
    waiting = asyncio.create_task(dispatcher.heard_somebody())
    await asyncio.sleep(0)
    assert not waiting.done()
    postman.bring("b", loaded(0))
    await waiting
    assert dispatcher.decide(ticket()).verdict is Verdict.ADMITTED


async def test_it_does_not_wait_for_silent_replicas_twice(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    async def counted(_: float) -> None:
        looks.append(1)

    monkeypatch.setattr("slos_serve.ray_serve.dispatch.asyncio.sleep", counted)
    await dispatcher.heard_somebody()
    assert 1 < len(looks) < 1000
    looks.clear()
    await dispatcher.heard_somebody()
    assert not looks
    assert dispatcher.decide(ticket()).reason is Why.NO_STATE


def test_a_resting_replica_stays_fresh_and_a_silent_one_does_not(
    dispatcher: Dispatcher, postman: Postman, clock: Clock
) -> None:
    postman.bring("a", loaded(0))
    postman.bring("b", loaded(0))
    assert dispatcher.decide(ticket()).verdict is Verdict.ADMITTED
    clock.now_s += 30.0
    postman.bring("b", loaded(0), at_s=30.0, unchanged=True)
    later = ticket(due_in_s=31.0)
    assert dispatcher.decide(later).replica == "b"
    clock.now_s += 2.0
    assert dispatcher.decide(ticket(due_in_s=33.0)).reason is Why.NO_STATE


def test_a_burst_between_two_publications_is_reserved(dispatcher: Dispatcher, postman: Postman) -> None:
    postman.bring("a", loaded(0))
    postman.bring("b", loaded(0))
    sent = [dispatcher.decide(ticket(3000, due_in_s=0.8)) for _ in range(6)]
    assert [decision.verdict for decision in sent].count(Verdict.ADMITTED) == 2
    assert {decision.replica for decision in sent[:2]} == {"a", "b"}


def test_a_session_returns_to_its_prefix_until_its_last_round(dispatcher: Dispatcher, postman: Postman) -> None:
    postman.bring("a", loaded(5))
    postman.bring("b", loaded(0))
    first = ticket(1000, session="s")
    assert dispatcher.decide(first).replica == "b"
    first.output_tokens = 101
    dispatcher.ended(first, "b")
    for _ in range(20):
        dispatcher.decide(ticket(600))  # whoever is less busy by now
    again = ticket(1200, session="s")
    decision = dispatcher.decide(again)
    assert (decision.replica, decision.reason) == ("b", Why.FITS_AT_PREFIX)


def test_what_is_lost_goes_elsewhere(dispatcher: Dispatcher, postman: Postman) -> None:
    postman.bring("a", loaded(1))
    postman.bring("b", loaded(0))
    asked = ticket(session="s")
    assert dispatcher.decide(asked).replica == "b"
    dispatcher.drop_replica("b")
    asked.again()
    assert dispatcher.decide(asked).replica == "a"
    assert asked.attempts == 2 and asked.tried == ["b"]
    assert postman.heard == {"a": "tcp://a"}
    dispatcher.ended(asked, "b")


def test_a_replica_whose_engine_is_dead_is_not_tried_again(dispatcher: Dispatcher, postman: Postman) -> None:
    """Ray has not noticed yet, and its relay repeats what an idle engine published last: it looks best of all."""
    postman.bring("a", loaded(5))
    postman.bring("b", loaded(0))
    promised, plain = ticket(), ticket(due_in_s=float("inf"), tpot_s=float("inf"))
    for asked in (promised, plain):
        asked.tried.append("b")
        assert dispatcher.decide(asked).replica == "a"
    dispatcher.drop_replica("a")
    assert dispatcher.decide(promised).replica == "b", "there is no other"


def test_replicas_come_and_go(dispatcher: Dispatcher, postman: Postman) -> None:
    dispatcher.set_replicas({"b": "tcp://b", "c": None})
    assert postman.heard == {"b": "tcp://b"}
    assert sorted(dispatcher.mirrors) == ["b", "c"]
    dispatcher.set_replicas({"b": "tcp://b", "c": "tcp://c"})
    assert postman.heard == {"b": "tcp://b", "c": "tcp://c"}


def test_a_refusal_says_when_to_ask_again(dispatcher: Dispatcher, postman: Postman) -> None:
    busy = loaded(0)
    busy.wait(3500, due_in_s=0.6)
    busy.prefilling(3500, 10, due_in_s=0.6)
    postman.bring("a", busy)
    postman.bring("b", busy)
    asked = ticket(9000, due_in_s=0.3, reject_when_full=True)
    decision = dispatcher.decide(asked)
    assert (decision.verdict, decision.replica) == (Verdict.REJECTED, None)
    assert 1.0 <= asked.retry_after_s <= 60.0


def test_rubbish_is_not_a_publication(dispatcher: Dispatcher, postman: Postman) -> None:
    postman.waiting["a"] = Envelope(NOW_S, False, b"[]", NOW_S + AHEAD_S)
    postman.waiting["b"] = Envelope(NOW_S, False, b"{", NOW_S + AHEAD_S)
    postman.waiting["stranger"] = Envelope(NOW_S, False, b"{}", NOW_S + AHEAD_S)
    assert dispatcher.decide(ticket()).reason is Why.NO_STATE


def test_a_retry_gives_back_what_the_first_try_held(dispatcher: Dispatcher, postman: Postman) -> None:
    postman.bring("a", loaded(0))
    postman.bring("b", loaded(0))
    asked = ticket(3000, due_in_s=0.8)
    for _ in range(5):
        assert dispatcher.decide(asked).verdict is Verdict.ADMITTED
        asked.again()
    assert sum(dispatcher.mirrors.in_flight(name) for name in "ab") == 1
    assert asked.attempts == 5


@pytest.mark.parametrize("binding", [True, False])
def test_a_told_promise_gives_its_place_to_nobody(dispatcher: Dispatcher, postman: Postman, binding: bool) -> None:
    dispatcher.set_replicas({"a": "tcp://a"})
    postman.bring("a", loaded(0), tickets=[])
    assert dispatcher.decide(ticket(3500, due_in_s=0.6, binding=binding, ticket=7)).verdict is Verdict.ADMITTED
    shorter = dispatcher.decide(ticket(1000, due_in_s=0.5, binding=binding, ticket=9))
    assert shorter.reason is (Why.ALL_FULL if binding else Why.FITS_INSTEAD)
    if binding:
        postman.bring("a", loaded(0), at_s=0.05, tickets=[9])
        assert dispatcher.decide(ticket(1000, due_in_s=0.5, binding=True, ticket=11)).verdict is Verdict.BEST_EFFORT
        postman.bring("a", loaded(0), at_s=0.1, tickets=[7])  # it came and has ended
        assert dispatcher.decide(ticket(1000, due_in_s=0.6, binding=True, ticket=13)).verdict is Verdict.ADMITTED


def test_who_served_is_told_where_ray_chose_another(dispatcher: Dispatcher, postman: Postman) -> None:
    postman.bring("a", loaded(600, total_blocks=40_000))
    postman.bring("b", loaded(3))
    asked = ticket()
    assert dispatcher.decide(asked).replica == "b"
    dispatcher.routed(asked, "b")
    assert asked.decision is not None and asked.decision.verdict is Verdict.ADMITTED
    dispatcher.routed(asked, "a")
    decision = asked.decision
    assert (decision.replica, decision.verdict, decision.reason) == ("a", Verdict.BEST_EFFORT, Why.OUT_OF_REACH)
    assert (dispatcher.mirrors.in_flight("b"), dispatcher.mirrors.in_flight("a")) == (0, 1)
    dispatcher.routed(asked, "gone")
    assert asked.decision is decision


def test_a_slow_hand_over_is_not_promised_twice(dispatcher: Dispatcher, postman: Postman, clock: Clock) -> None:
    """Publications of an engine that has not got the requests yet give nothing back; the end of a request does."""
    tickets: list[Ticket] = []
    for at_s in (0.0, 0.4, 0.8):
        clock.now_s += at_s
        for name in "ab":
            postman.bring(name, loaded(0), at_s=at_s, tickets=[])
        asked = ticket(3000, due_in_s=at_s + 0.8, ticket=len(tickets) + 1)
        tickets.append(asked)
        dispatcher.decide(asked)
    assert sum(dispatcher.mirrors.in_flight(name) for name in "ab") == 3
    first = tickets[0].reservation
    assert first is not None
    dispatcher.ended(tickets[0], "another")
    assert sum(dispatcher.mirrors.in_flight(name) for name in "ab") == 3
    dispatcher.ended(tickets[0], first[0])
    assert sum(dispatcher.mirrors.in_flight(name) for name in "ab") == 2
    for name in "ab":
        postman.bring(name, loaded(0), at_s=0.9, tickets=[2, 3])
    dispatcher.decide(ticket(10, due_in_s=3.0, ticket=9))
    assert sum(dispatcher.mirrors.in_flight(name) for name in "ab") == 1


def test_a_replica_gets_a_ticket_without_the_routers_reservation(dispatcher: Dispatcher, postman: Postman) -> None:
    postman.bring("b", loaded(0))
    asked = ticket(session="s")
    dispatcher.decide(asked)
    copied = pickle.loads(pickle.dumps(asked))
    assert asked.reservation is not None and copied.reservation is None
    assert (copied.decision, copied.session, copied.asked) == (asked.decision, "s", asked.asked)


# Several routers ------------------------------------------------------------------------------------------------------


def promised(routers: dict[str, Dispatcher]) -> list[tuple[str, str]]:
    """(router, replica) of each promise in a burst that reaches both routers in turn, between two publications."""
    made = []
    for _ in range(80 // len(routers)):
        for name, router in routers.items():
            decision = router.decide(ticket(400))
            if decision.verdict is Verdict.ADMITTED:
                made.append((name, str(decision.replica)))
    return made


def test_two_routers_promise_no_room_twice(clock: Clock) -> None:
    """Each promises on its own replica; the promises of both are what one router makes that sees everything."""
    alone = two_routers(clock, ())
    room = len(promised({"me": alone["me"]}))
    twice = promised(two_routers(clock, ()))
    assert len(twice) >= 1.8 * room, "without a word of each other both promise the same room"
    shared = promised(two_routers(clock, ("me", "you")))
    assert 0.8 * room <= len(shared) <= room < 80
    assert set(shared) == {("me", "a"), ("you", "b")}


@pytest.mark.parametrize("reject", [False, True])
def test_what_only_anothers_replica_attains_goes_there_without_a_promise(clock: Clock, reject: bool) -> None:
    router = two_routers(clock, ("me", "you"))["me"]
    made = [router.decide(ticket(400, reject_when_full=reject)) for _ in range(80)]
    promised_on = {decision.replica for decision in made if decision.verdict is Verdict.ADMITTED}
    elsewhere = [decision for decision in made if decision.reason is Why.FITS_ELSEWHERE]
    assert promised_on == {"a"} and len(elsewhere) > 5
    assert {(decision.replica, decision.verdict) for decision in elsewhere} == {("b", Verdict.BEST_EFFORT)}
    last = made[-1]
    assert (last.verdict, last.reason) == (Verdict.REJECTED if reject else Verdict.BEST_EFFORT, Why.ALL_FULL)


def test_more_routers_than_replicas_share_one(clock: Clock) -> None:
    room = len(promised({"me": two_routers(clock, (), "a")["me"]}))
    shared = promised(two_routers(clock, ("me", "you"), "a"))
    assert {name for name, _ in shared} == {"me", "you"} and 2 <= len(shared) <= room


def test_a_router_that_is_gone_leaves_its_share(clock: Clock) -> None:
    postman = Postman("me")
    router = Dispatcher(postman, clock_s=clock)
    router.set_replicas({"a": "tcp://a", "b": "tcp://b"})
    for replica in "ab":
        postman.bring(replica, loaded(0), notes=Notes(routers=("me", "you")))
    first = ticket()
    assert router.decide(first).replica == "a"
    for replica in "ab":
        postman.bring(replica, loaded(0), at_s=0.1, notes=Notes(routers=("me",)))
    clock.now_s += 0.1
    assert {router.decide(ticket()).replica for _ in range(4)} == {"a", "b"}


def test_the_load_of_all_replicas_goes_with_a_ticket_that_wants_it(dispatcher: Dispatcher, postman: Postman) -> None:
    postman.bring("a", loaded(0), notes=Notes(room=Room(3.0, 0.5, 0.04)))
    postman.bring("b", loaded(0), notes=Notes(room=Room(4.0, 0.2, 0.05)))
    silent, wanting = ticket(), ticket()
    wanting.wants_load = True
    for each in (silent, wanting):
        dispatcher.decide(each)
    assert silent.load == {}
    assert wanting.load == load_of(Room(7.0, 0.2, 0.04))
