"""Many routers over one large fleet: each decides for its own part of the replicas, alone.

A replica belongs to one router, so no two of them can promise the same room, however old their pictures of each other
are. A request that its own router's replicas do not attain is offered to a few other routers, which take it only if
they can promise it; else it stays at home without a promise. Cost is bounded: a router looks at its own replicas, and
each request is seen by 1 + ``tries`` routers at most.

Routers that all see every replica and cannot ask each other, as endpoints of Ray Serve, share them by
:func:`route_shared`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.verdict import Verdict, Why
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.router import DEFAULT, RouterSettings, RoutingDecision, RoutingRequest, route


def route_sharded(
    now_s: float,
    request: RoutingRequest,
    shards: Sequence[Mirrors],
    home: int,
    tries: int = 1,
    settings: RouterSettings = DEFAULT,
) -> RoutingDecision:
    """As :func:`slos_serve.routing.router.route`, over several routers' mirrors.

    Args:
        now_s: present time.
        request: what asks.
        shards: the mirrors of each router.
        home: which of them got the request.
        tries: how many others are asked when its own replicas do not attain it; those next to it in turn.
        settings: of every router.

    Raises:
        InvalidFieldError: no such shard.
    """
    if not 0 <= home < len(shards):
        raise InvalidFieldError("home", home, f"0 to {len(shards) - 1}")
    # A router all of whose replicas are gone passes on what it gets.
    home = next((at % len(shards) for at in range(home, home + len(shards)) if len(shards[at % len(shards)])), home)
    others = min(tries, len(shards) - 1) if request.has_slo else 0
    if not others:
        return route(now_s, request, shards[home], settings)
    # One that refuses what it cannot promise reserves no room for it.
    offered = replace(request, reject_when_full=True)
    refusal = route(now_s, offered, shards[home], settings)
    if refusal.verdict is Verdict.ADMITTED:
        return refusal
    for step in range(1, others + 1):
        decision = route(now_s, offered, shards[(home + step) % len(shards)], settings)
        if decision.verdict is Verdict.ADMITTED:
            return replace(decision, reason=Why.FITS_ELSEWHERE)
    if request.reject_when_full:
        return refusal
    unpromised = route(now_s, replace(request, missed=True), shards[home], settings)
    return replace(unpromised, reason=refusal.reason)


@dataclass(frozen=True, slots=True)
class Share:
    """A router's part of replicas that several routers see and cannot ask each other about.

    Attributes:
        own: replicas that it promises on.
        owners: routers that own each of them; more than 1 only where there are more routers than replicas.
        routers: all of them.
    """

    own: frozenset[str]
    owners: int = 1
    routers: int = 1

    @classmethod
    def of(cls, replicas: Collection[str], routers: Sequence[str], me: str) -> Share:
        """Deal replicas out in the order of their names to routers in the order of theirs.

        Routers that know the same names agree on who owns what.
        """
        names, order = sorted(replicas), sorted(routers)
        mine, count = order.index(me), len(order)
        if not names or count <= len(names):
            return cls(frozenset(name for at, name in enumerate(names) if at % count == mine), 1, count)
        place = mine % len(names)
        return cls(frozenset({names[place]}), len(range(place, count, len(names))), count)


def route_shared(
    now_s: float, request: RoutingRequest, mirrors: Mirrors, share: Share, settings: RouterSettings = DEFAULT
) -> RoutingDecision:
    """As :func:`slos_serve.routing.router.route`, where several routers see every replica and cannot ask each other.

    A router promises on its own replicas as if it were alone; those who share one ask for, and reserve until a
    publication shows the request, a prompt as long as that of all of them. So no room is promised twice. A request
    that only another router's replica attains is sent there without a promise: its engine may still make one.

    Args:
        now_s: present time.
        request: what asks.
        mirrors: of all replicas.
        share: of this router.
        settings: of every router.
    """
    if share.routers <= 1 or not request.has_slo:
        return route(now_s, request, mirrors, settings)
    others = frozenset(name for name in mirrors if name not in share.own)
    mine = replace(
        request,
        prompt_tokens=share.owners * request.prompt_tokens,
        reject_when_full=True,
        avoid=(*request.avoid, *others),
    )
    decision = route(now_s, mine, mirrors, settings)
    if decision.verdict is Verdict.ADMITTED or not others.difference(request.avoid):
        return _served(now_s, request, mirrors, settings, decision)
    offered = replace(request, reject_when_full=True, avoid=(*request.avoid, *share.own))
    elsewhere = route(now_s, offered, mirrors, settings)
    if elsewhere.verdict is Verdict.ADMITTED:
        return replace(elsewhere, verdict=Verdict.BEST_EFFORT, reason=Why.FITS_ELSEWHERE)
    return _served(now_s, request, mirrors, settings, decision)


def _served(
    now_s: float, request: RoutingRequest, mirrors: Mirrors, settings: RouterSettings, decision: RoutingDecision
) -> RoutingDecision:
    """The decision; for a request that nobody attains and that is not to be refused, where it goes instead."""
    if decision.verdict is Verdict.ADMITTED or request.reject_when_full:
        return decision
    return replace(route(now_s, replace(request, missed=True), mirrors, settings), reason=decision.reason)
