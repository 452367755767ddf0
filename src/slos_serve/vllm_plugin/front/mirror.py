"""What the API process knows of its engine's planner: the mirror that routers use, with one engine in it.

A request is judged when vLLM hands it to the engine, before the answer's head goes out, and counted in the mirror at
once; so a burst of a hundred requests sees what was promised to the ones before. The engine decides for itself a step
later; how often both agree is a metric.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slos_serve.core.verdict import Verdict, Why
from slos_serve.perf.class_shares import ClassShares
from slos_serve.routing.headroom import MOST
from slos_serve.routing.mirrors import Mirrors, Sent
from slos_serve.routing.predicted import Predicted, predicted
from slos_serve.routing.publication import Publication
from slos_serve.routing.retry_after import RetryTimes
from slos_serve.routing.router import RouterSettings, RoutingRequest, route, unpromised, verdicts
from slos_serve.routing.settings import STALE_AFTER_S, Order
from slos_serve.routing.starts import Starts

ENGINE = "engine"
# From the hand-over in the API process to the scheduler's queue.
TRANSIT_S = 0.01
_SETTINGS = RouterSettings(Order.SPREAD, STALE_AFTER_S)
_BEST_FIRST = (Verdict.NO_SLO, Verdict.ADMITTED, Verdict.SECOND_BEST, Verdict.BEST_EFFORT, Verdict.REJECTED)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the front end says of a request.

    Attributes:
        verdict, reason: see :mod:`slos_serve.core.verdict`.
        ttft_s, tpot_s: predicted; ``None`` where nothing is promised, because nothing is known then.
        rank: which promise was given: 0 for the one asked for, then the weaker ones in order.
        start_s: seconds from its arrival to its first token, forecast where nothing is promised; else ``None``.
    """

    verdict: Verdict
    reason: Why
    ttft_s: float | None = None
    tpot_s: float | None = None
    rank: int = 0
    start_s: float | None = None


def severity(answer: Answer) -> tuple[int, int]:
    """Of several answers the largest counts."""
    return _BEST_FIRST.index(answer.verdict), answer.rank


@dataclass(frozen=True, slots=True)
class Looked:
    """A request that was judged and not sent.

    Attributes:
        answer: what would be said of it.
        predicted: what that rests on, for the promise that is given, or the first one; ``None`` without a promise, and
            when its first token is lost already.
        room: requests like it, with that promise, that fit beside all that is promised now, itself counted.
        next_obstacle: what stops the one after those; ``None`` when none was found.
    """

    answer: Answer
    predicted: Predicted | None
    room: int
    next_obstacle: Why | None


class EngineMirror:
    """The mirror of one engine. Times are on the monotonic clock of this machine.

    Args:
        num_classes: SLO classes that requests may belong to, custom numbers and none counted.
        fairness: see :class:`slos_serve.perf.class_shares.ClassShares`.
    """

    def __init__(self, num_classes: int, fairness: float = 0.0) -> None:
        self._mirrors = Mirrors([ENGINE], num_classes=num_classes, transit_s=TRANSIT_S)
        self._newest: Publication | None = None
        self._now_s = -math.inf
        self._retry = RetryTimes(self._mirrors)
        self._starts = Starts(self._mirrors)
        # Of requests that are refused where they do not fit: the engine never sees those that are.
        self._refusable = ClassShares(num_classes, fairness)

    def update(self, publication: Publication, tickets: Container[int] = ()) -> None:
        """Take over what the engine published, ``tickets`` of requests that have come to it with it."""
        self._newest = publication
        self._starts.update(publication, tickets=tickets)

    def withdraw(self, ticket: int) -> None:
        """A request has ended: where its engine never had it, its room is free again."""
        for sent in self._mirrors.sent_with(ENGINE, ticket):
            self._mirrors.withdraw(ENGINE, sent)

    @property
    def newest(self) -> Publication | None:
        """The newest publication, ``None`` before the first."""
        return self._newest

    def answer(
        self, now_s: float, asked: RoutingRequest, weaker: Sequence[RoutingRequest] = (), *, counted: bool = True
    ) -> Answer:
        """Judge a request and count it from here on, unless it is to be rejected.

        Args:
            now_s: present time.
            asked: with the promise that it asks for.
            weaker: with those asked for in its place, in order; the first that fits is given.
            counted: what becomes of it counts for its tenant; off for a request that is only looked at.
        """
        found = self._answer(now_s, (asked, *weaker))
        if asked.reject_when_full and asked.has_slo and counted:
            share, taken = np.array([asked.own_share]), np.array([found.verdict is not Verdict.REJECTED])
            self._refusable.decided(share, taken, np.array([asked.weight]))
        return found

    def _answer(self, now_s: float, several: Sequence[RoutingRequest]) -> Answer:
        now_s = self._now_s = max(now_s, self._now_s)
        self._keep_fresh(now_s)
        rank = self._rank(now_s, several)
        asked = several[rank or 0]
        expected = self._predicted(now_s, asked) if asked.has_slo else None
        if rank is None:
            why = Why.TTFT_TOO_LATE if expected is None else expected.obstacle
            if asked.reject_when_full:
                return Answer(Verdict.REJECTED, why)
            self._mirrors.send(self._mirrors.position(ENGINE), unpromised(now_s, asked))
            return Answer(Verdict.BEST_EFFORT, why, start_s=self._starts.start_s(ENGINE, now_s, asked))
        decision = route(now_s, asked, self._mirrors, _SETTINGS)
        if not asked.has_slo:
            return Answer(Verdict.NO_SLO, Why.NO_SLO, start_s=self._starts.start_s(ENGINE, now_s, asked))
        if decision.verdict is Verdict.ADMITTED:
            assert expected is not None
            word = Verdict.SECOND_BEST if rank else decision.verdict
            return Answer(word, decision.reason, expected.ttft_s, expected.tpot_s, rank)
        reason = decision.reason
        if reason is Why.ALL_FULL:  # of one engine it is known what binds
            reason = Why.TTFT_TOO_LATE if expected is None else expected.obstacle
        start_s = self._starts.start_s(ENGINE, now_s, asked) if decision.verdict is Verdict.BEST_EFFORT else None
        return Answer(decision.verdict, reason, start_s=start_s)

    def _rank(self, now_s: float, several: Sequence[RoutingRequest]) -> int | None:
        """The first of a request's promises that fits, 0 where none does; ``None`` where it is to be told none."""
        yields = self._yields(several[0])
        if len(several) == 1 and not yields:
            return 0
        fitting = [replace(one, prompt_tokens=2 * one.prompt_tokens) for one in several] if yields else several
        return next((rank for rank, one in enumerate(fitting) if self._fits(now_s, one)), None if yields else 0)

    def _yields(self, asked: RoutingRequest) -> bool:
        """Whether another tenant of its class is promised less of what it is due.

        A promise that is told binds, so that weights count no more. Such a request is told one only where there is
        room for a second one like it, which the other tenant finds when it asks.
        """
        newest = self._newest
        if newest is None or asked.share is None or not (asked.has_slo and asked.binding):
            return False
        num_classes = len(newest.forecast_tokens)
        if asked.reject_when_full:
            boost = self._refusable.boost
            return bool(boost[asked.share % num_classes :: num_classes].max() > boost[asked.share])
        if not len(newest.boosted):
            return False
        own = newest.boost[newest.boosted == asked.share].max(initial=1.0)
        others = newest.boost[newest.boosted % num_classes == asked.share % num_classes]
        return bool(others.max(initial=1.0) > own)

    def _fits(self, now_s: float, asked: RoutingRequest) -> bool:
        return verdicts(now_s, asked, self._mirrors, _SETTINGS).get(ENGINE, False)

    def look(
        self, now_s: float, asked: RoutingRequest, weaker: Sequence[RoutingRequest] = (), most: int = MOST
    ) -> Looked:
        """Judge a request as :meth:`answer` does, without counting it, and find how many like it there is room for.

        Args:
            most: of these; they are given the same promise.
        """
        now_s = max(now_s, self._now_s)
        self._keep_fresh(now_s)
        given = (asked, *weaker)[self._rank(now_s, (asked, *weaker)) or 0]
        rests_on = self._predicted(now_s, given) if given.has_slo else None
        sent: list[Sent] = []
        obstacle: Why | None = None
        first: Answer | None = None
        room = 0
        try:
            for _ in range(most):
                expected = self._predicted(now_s, given) if given.has_slo else None
                before = self._mirrors.in_flight(ENGINE)
                several = (given,) if first else (asked, *weaker)
                answer = self.answer(now_s, several[0], several[1:], counted=False)
                first = first or answer
                if self._mirrors.in_flight(ENGINE) > before:
                    sent.append(self._mirrors.newest(ENGINE))
                if answer.reason is not Why.FITS:
                    if given.has_slo:
                        obstacle = Why.TTFT_TOO_LATE if expected is None else expected.obstacle
                    break
                room += 1
        finally:
            for one in reversed(sent):
                self._mirrors.withdraw(ENGINE, one)
        assert first is not None
        return Looked(first, rests_on, room, obstacle)

    def retry_after_s(self, now_s: float, asked: RoutingRequest) -> float:
        """When a refused request is to ask again, in [1, 60] s; each is told a later time than the one before."""
        return self._retry.next_s(max(now_s, self._now_s), asked, STALE_AFTER_S)

    def _keep_fresh(self, now_s: float) -> None:
        """An engine without requests publishes nothing: its last word holds until a request has been sent to it."""
        newest = self._newest
        if newest is not None and newest.num_requests == 0 and not self._mirrors.in_flight(ENGINE):
            self._mirrors.renew(ENGINE, now_s)

    def _predicted(self, now_s: float, asked: RoutingRequest) -> Predicted | None:
        return predicted(self._mirrors, ENGINE, now_s, asked)
