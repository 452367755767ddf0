"""Which replica a call goes to: the interface, and routers that look at load alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from slos_serve.core.errors import InvalidFieldError
from slos_serve.routing.settings import Order
from slos_serve.sim.replica import Replica
from slos_serve.sim.rival_routers import RIVAL_ROUTERS

# vLLM's data-parallel coordinator weighs a waiting request like this many running ones.
WAITING_WEIGHT = 4


class Router(Protocol):
    """Picks among replicas that are alive."""

    def choose(self, now_s: float, call: int, session: int, replicas: Sequence[Replica]) -> Replica | None:
        """The replica that gets ``call``, ``None`` to reject it; ``replicas`` is never empty."""
        ...

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """Told when a replica's last request left."""
        ...


class LoadRouter(Protocol):
    """A router that rejects nothing."""

    def choose(self, now_s: float, call: int, session: int, replicas: Sequence[Replica]) -> Replica:
        """The replica that gets ``call``."""
        ...

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """Told when a replica's last request left."""
        ...


class RoundRobin:
    """In turn, whatever the load."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, now_s: float, call: int, session: int, replicas: Sequence[Replica]) -> Replica:
        """The next one."""
        self._next += 1
        return replicas[(self._next - 1) % len(replicas)]

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """Nothing to know."""


class LeastLoaded:
    """Fewest requests, waiting ones counting more; the first of equals."""

    def choose(self, now_s: float, call: int, session: int, replicas: Sequence[Replica]) -> Replica:
        """The least loaded."""
        return min(replicas, key=lambda replica: WAITING_WEIGHT * replica.num_waiting + replica.num_running)

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """Nothing to know."""


class StickySessions:
    """Later calls of a session go where its KV prefix is; first calls as another router says."""

    def __init__(self, first: LoadRouter) -> None:
        self._first = first
        self._home: dict[int, int] = {}

    def choose(self, now_s: float, call: int, session: int, replicas: Sequence[Replica]) -> Replica:
        """The session's replica while it lives."""
        home = self._home.get(session)
        for replica in replicas:
            if replica.index == home:
                return replica
        chosen = self._first.choose(now_s, call, session, replicas)
        self._home[session] = chosen.index
        return chosen

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """Nothing to know."""


ROUTERS: dict[str, type[RoundRobin | LeastLoaded]] = {"round-robin": RoundRobin, "least-loaded": LeastLoaded}
# Those that ask mirrors of the replicas' planners: see slos_serve.sim.slo_router.
SLO_ORDERS = {"slo": Order.PREFIX, "slo-pack": Order.PACK, "slo-spread": Order.SPREAD, "slo-prefix": Order.PREFIX}


def make_router(name: str, sticky: bool = True) -> LoadRouter:
    """Router by name, for those that need to know nothing but the replicas' load.

    Raises:
        InvalidFieldError: no router of that name.
    """
    if name not in ROUTERS:
        raise InvalidFieldError("router", name, f"one of {sorted([*ROUTERS, *SLO_ORDERS, *RIVAL_ROUTERS])}")
    router = ROUTERS[name]()
    return StickySessions(router) if sticky else router
