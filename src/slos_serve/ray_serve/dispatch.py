"""Routing decisions from what replicas publish; everything of the request router that is not Ray.

One object a deployment handle. All calls come from the router's event loop. A replica's address is part of what Ray
tells about it; without one (another server class) it counts as full and gets only what nobody promises.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from slos_serve.core.told import known
from slos_serve.core.verdict import Verdict, Why
from slos_serve.ray_serve.ticket import Ticket
from slos_serve.ray_serve.wire import Envelope, Notes
from slos_serve.routing.clock_offset import ClockOffset
from slos_serve.routing.headroom import together
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.predicted import predicted
from slos_serve.routing.retry_after import RetryTimes
from slos_serve.routing.router import RouterSettings, RoutingDecision, RoutingRequest, unpromised
from slos_serve.routing.sessions import Sessions
from slos_serve.routing.settings import STALE_AFTER_S, Order
from slos_serve.routing.shards import Share, route_shared
from slos_serve.routing.starts import Starts
from slos_serve.vllm_plugin.front.load_report import load_of

TRANSIT_S = 0.05
# A router is made with the first request that comes. It has heard of nobody then, though replicas publish every 100 ms.
FIRST_PATIENCE_S, FIRST_LOOK_EVERY_S = 0.5, 0.01
_logger = logging.getLogger("slos_serve.ray_serve")


class Mailbox(Protocol):
    """What :class:`slos_serve.ray_serve.inbox.Inbox` does."""

    name: str

    def listen(self, replica: str, address: str) -> None:
        """Take in what a replica publishes from now on."""

    def ignore(self, replica: str) -> None:
        """A replica is gone."""

    def take(self) -> dict[str, Envelope]:
        """The newest of each replica that came since the last call."""


class Dispatcher:
    """Decides where requests go.

    Args:
        mailbox: where publications arrive.
        num_classes: SLO classes that requests may belong to.
        order: whom to ask first.
        stale_after_s: a replica that has not published for this long counts as full.
        transit_s: a request may take this long to reach its engine, where the engine does not name those that came.
        clock_s: the clock of tickets and of the mailbox.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        num_classes: int = 1,
        order: str = Order.PREFIX,
        stale_after_s: float = STALE_AFTER_S,
        transit_s: float = TRANSIT_S,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mailbox = mailbox
        self._clock_s = clock_s
        self._settings = RouterSettings(Order(order), stale_after_s)
        self._sessions = Sessions()
        self._offsets: dict[str, ClockOffset] = {}
        self._heard: dict[str, tuple[float, Notes]] = {}
        self._now_s = -float("inf")
        self._patient = True
        self.mirrors = Mirrors(num_classes=num_classes, transit_s=transit_s)
        self._starts = Starts(self.mirrors)
        self._retry = RetryTimes(self.mirrors)
        self.decisions: Counter[tuple[Verdict, Why]] = Counter()

    def set_replicas(self, addresses: Mapping[str, str | None]) -> None:
        """The replicas there are now, each with the address that it publishes at, if it does."""
        for name in [name for name in self.mirrors if name not in addresses]:
            self.drop_replica(name)
        for name, address in addresses.items():
            if name not in self.mirrors:
                self.mirrors.add(name)
            if address is not None and name not in self._offsets:
                self._offsets[name] = ClockOffset()
                self._mailbox.listen(name, address)

    def drop_replica(self, name: str) -> None:
        """A replica is gone, and its prefixes with it."""
        self.mirrors.remove(name)
        self._starts.forget(name)
        self._sessions.forget_replica(name)
        self._heard.pop(name, None)
        if self._offsets.pop(name, None) is not None:
            self._mailbox.ignore(name)

    async def heard_somebody(self) -> None:
        """Return when a publication has come; the first requests wait for it, for ``FIRST_PATIENCE_S`` at most."""
        for _ in range(round(FIRST_PATIENCE_S / FIRST_LOOK_EVERY_S)):
            if not (self._patient and self._offsets):
                break
            await asyncio.sleep(FIRST_LOOK_EVERY_S)
            self._receive()
        self._patient = False

    def decide(self, ticket: Ticket) -> RoutingDecision:
        """Decide and reserve; the decision is written into the ticket, and when to ask again if it is a no."""
        now_s = self._later()
        self._receive()
        self._withdraw(ticket)
        several = [replace(one, avoid=tuple(ticket.tried)) for one in (ticket.asked, *ticket.weaker)]
        if ticket.session is not None:
            cached = self._sessions.cached(ticket.session, ticket.asked.prompt_tokens)
            several = [replace(one, cached=cached) for one in several]
        ticket.rank, decision = self._route(now_s, several)
        asked = several[ticket.rank]
        if ticket.wants_load:
            ticket.load = self._load(now_s)
        ticket.decision = decision
        ticket.attempts += 1
        if decision.replica is not None:
            ticket.reservation = decision.replica, self.mirrors.newest(decision.replica)
        self._expect(now_s, ticket, asked)
        self.decisions[decision.verdict, decision.reason] += 1
        if decision.verdict is Verdict.REJECTED:
            ticket.retry_after_s = self._retry.next_s(now_s, asked, self._settings.stale_after_s)
        elif decision.replica is not None and ticket.session is not None and not ticket.last_round:
            self._sessions.sent(ticket.session, decision.replica, asked.prompt_tokens)
        return decision

    def routed(self, ticket: Ticket, replica: str) -> None:
        """A request got to a replica, which need not be the one decided on: that one may have been out of reach."""
        decision = ticket.decision
        if decision is None or decision.replica == replica or replica not in self.mirrors:
            return
        self._withdraw(ticket)
        ticket.rank = 0
        verdict = Verdict.BEST_EFFORT if ticket.asked.has_slo else decision.verdict
        ticket.decision = RoutingDecision(replica, verdict, Why.OUT_OF_REACH)
        now_s = self._later()
        self.mirrors.send(self.mirrors.position(replica), unpromised(now_s, ticket.asked))
        ticket.reservation = replica, self.mirrors.newest(replica)
        self._expect(now_s, ticket, ticket.asked)
        self.decisions[verdict, Why.OUT_OF_REACH] += 1

    def _route(self, now_s: float, several: Sequence[RoutingRequest]) -> tuple[int, RoutingDecision]:
        """The first of a request's promises that a replica attains, and where; where none does, what becomes of it."""
        share = self._share(now_s)
        if len(several) > 1 and several[0].has_slo:
            for rank, one in enumerate(several):
                tried = replace(one, reject_when_full=True)
                decision = route_shared(now_s, tried, self.mirrors, share, self._settings)
                if decision.verdict is Verdict.ADMITTED:
                    return rank, replace(decision, verdict=Verdict.SECOND_BEST) if rank else decision
                if decision.replica is not None:  # another router's may attain it; a weaker promise here is worth more
                    self.mirrors.withdraw(decision.replica, self.mirrors.newest(decision.replica))
        return 0, route_shared(now_s, several[0], self.mirrors, share, self._settings)

    def _expect(self, now_s: float, ticket: Ticket, asked: RoutingRequest) -> None:
        """:meth:`_predict`; a fault of it costs what the client would be told, not the request."""
        ticket.ttft_s = ticket.tpot_s = ticket.start_s = math.inf
        try:
            self._predict(now_s, ticket, asked)
        except Exception:
            _logger.exception("slos-serve: failed to forecast the times of a request")

    def _predict(self, now_s: float, ticket: Ticket, asked: RoutingRequest) -> None:
        """Write what to expect where it is sent: of a promise its times, without one when it begins."""
        decision = ticket.decision
        if decision is None or decision.replica is None:
            return
        promised = decision.verdict in (Verdict.ADMITTED, Verdict.SECOND_BEST)
        if not promised and decision.reason is not Why.FITS_ELSEWHERE:
            ticket.start_s = known(self._starts.start_s(decision.replica, now_s, asked))
            return
        expected = predicted(self.mirrors, decision.replica, now_s, asked, entered=True)
        if expected is not None and promised:
            ticket.ttft_s, ticket.tpot_s = expected.ttft_s, known(expected.tpot_s)
        elif expected is not None:
            ticket.start_s = expected.ttft_s

    def _share(self, now_s: float) -> Share:
        """This router's part; replicas tell in their publications which routers hear them."""
        since_s = now_s - self._settings.stale_after_s
        heard = (notes.routers for at_s, notes in self._heard.values() if at_s >= since_s)
        return Share.of(self.mirrors, tuple({self._mailbox.name}.union(*heard)), self._mailbox.name)

    def _load(self, now_s: float) -> dict[str, float]:
        """The room of all replicas that were heard lately, by name; empty while none has told it."""
        since_s = now_s - self._settings.stale_after_s
        rooms = [notes.room for at_s, notes in self._heard.values() if at_s >= since_s and notes.room is not None]
        return load_of(together(rooms)) if rooms else {}

    def _later(self) -> float:
        """The present time; never before an earlier one."""
        self._now_s = max(self._clock_s(), self._now_s)
        return self._now_s

    def _withdraw(self, ticket: Ticket) -> None:
        """Give back what an earlier decision on the same request holds."""
        held, ticket.reservation = ticket.reservation, None
        if held is not None:
            self.mirrors.withdraw(*held)

    def given_up(self, ticket: Ticket, waits: asyncio.Future[Any]) -> None:
        """Its ``waits`` for a replica is over; where its client has left meanwhile, it goes to none."""
        if waits.cancelled():
            self._withdraw(ticket)

    def ended(self, ticket: Ticket, replica: str) -> None:
        """A request is over at a replica: it holds no room there. Its session's next round finds its answer cached."""
        if ticket.reservation is not None and ticket.reservation[0] == replica:
            self._withdraw(ticket)
        decision = ticket.decision
        if ticket.session is None or ticket.last_round or decision is None or decision.replica not in self.mirrors:
            return
        assert decision.replica is not None
        # The last token of an answer is sampled but never computed.
        context = ticket.asked.prompt_tokens + max(ticket.output_tokens - 1, 0)
        self._sessions.sent(ticket.session, decision.replica, context)

    def _receive(self) -> None:
        for name, envelope in self._mailbox.take().items():
            offset = self._offsets.get(name)
            if offset is None:
                continue
            self._patient = False
            self._heard[name] = envelope.received_s, envelope.notes
            offset_s = offset.observe(envelope.sent_s, envelope.received_s)
            try:
                self._starts.update(envelope.publication(name), offset_s, envelope.tickets())
            except Exception:  # it comes from another process; the next one may be better
                _logger.exception("slos-serve: a publication of replica %s cannot be used", name)
                continue
            if envelope.unchanged:
                self.mirrors.renew(name, envelope.sent_s + offset_s)
