"""Many routers over one large fleet: each decides for its own part of the replicas, alone.

A replica belongs to one router, so no two of them can promise the same room, however old their pictures of each other
are. A request that its own router's replicas do not attain is offered to a few other routers, which take it only if
they can promise it; else it stays at home without a promise. Cost is bounded: a router looks at its own replicas, and
each request is seen by 1 + ``tries`` routers at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
