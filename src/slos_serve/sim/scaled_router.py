"""A fleet that grows and shrinks by headroom while it serves, as Ray Serve's does with our policy.

Every ten seconds each serving replica's fullness is read off its newest publication, by the objects that replicas use
(:mod:`slos_serve.routing.demand`). More replicas are wanted where the mean is above its target for as long as
``up_delay_s``, fewer where it is below for ``down_delay_s``; one that starts serves after ``start_s``, and one that
goes ends its requests first. The delays are Ray Serve's defaults.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from slos_serve.core.verdict import Verdict
from slos_serve.routing.demand import FULLNESS, TARGET_FULLNESS, Demand
from slos_serve.routing.publication import Publication
from slos_serve.routing.router import RoutingDecision, RoutingRequest
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.slo_router import SloRouter, SloRouting
from slos_serve.sim.step import PENDING
from slos_serve.sim.tasks import SimTasks

LOOKS = 3  # Ray Serve takes the mean of half a minute


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a fleet is scaled.

    Attributes:
        first: replicas that serve at the start.
        settle_s: until then replicas come and go at once, and nothing is counted.
        start_s: from the decision until a new replica serves.
        up_delay_s, down_delay_s: how long more or fewer must be wanted.
        every_s: between decisions.
    """

    first: int
    settle_s: float
    start_s: float = 120.0
    up_delay_s: float = 30.0
    down_delay_s: float = 600.0
    every_s: float = 10.0


class ScaledRouter(SloRouter):
    """Routes to the replicas that serve, and decides how many that are.

    Attributes:
        server_s: replica-seconds after ``settle_s``: serving, starting, and ending their requests.
        counted_s: seconds after ``settle_s``.
    """

    def __init__(self, recording: Recording, routing: SloRouting, tasks: SimTasks | None, scaling: Scaling) -> None:
        super().__init__(recording, routing, tasks)
        self._scaling = scaling
        self._serving = list(range(scaling.first))
        self._starting: dict[int, float] = {}
        self._demands: dict[int, Demand] = {}
        self._open: list[tuple[int, int]] = []
        self._newest: dict[int, Publication] = {}
        self._means: deque[float] = deque(maxlen=LOOKS)
        self._since_s = {True: math.inf, False: math.inf}  # more, fewer wanted without a break
        self._looked_s = -math.inf
        self._counted_to_s = scaling.settle_s
        self._decided: tuple[RoutingRequest, RoutingDecision] | None = None
        self.server_s = self.counted_s = 0.0

    def choose(self, now_s: float, call: int, session: int, replicas: Sequence[Replica]) -> Replica | None:
        """As the router's own, among those that serve."""
        if now_s - self._looked_s >= self._scaling.every_s:
            self._looked_s = now_s
            self._count(now_s, replicas)
            self._scale(now_s, replicas)
        chosen = super().choose(now_s, call, session, [replicas[index] for index in self._serving])
        if chosen is not None and self._decided is not None:
            request, decision = self._decided
            name = str(request.class_index)
            promised = decision.verdict is not Verdict.BEST_EFFORT
            self._demands.setdefault(chosen.index, Demand()).began(call, request, name, promised, now_s)
            self._open.append((chosen.index, call))
        return chosen

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """As the router's own; one that has gone tells nothing."""
        if replica.index in self._serving:
            super().on_idle(now_s, replica)

    def _decide(self, now_s: float, call: int, request: RoutingRequest, home: int) -> RoutingDecision:
        decision = super()._decide(now_s, call, request, home)
        self._decided = request, decision
        return decision

    def _receive(self, now_s: float, replicas: Sequence[Replica]) -> None:
        for visible_s, publication in self._pending:
            if visible_s <= now_s:
                self._newest[int(publication.replica)] = publication
        super()._receive(now_s, replicas)

    def _count(self, now_s: float, replicas: Sequence[Replica]) -> None:
        """Replicas that are paid for since the last look."""
        outcomes = self._recording.calls["outcome"]
        for index, call in self._open:
            if outcomes[call] != PENDING and index in self._demands:
                self._demands[index].ended(call)
        self._open = [(index, call) for index, call in self._open if outcomes[call] == PENDING]
        passed_s = now_s - self._counted_to_s
        if passed_s <= 0.0:
            return
        ending = sum(each.num_requests > 0 for each in replicas if each.index not in self._serving)
        self.server_s += passed_s * (len(self._serving) + len(self._starting) + ending)
        self.counted_s += passed_s
        self._counted_to_s = now_s

    def _scale(self, now_s: float, replicas: Sequence[Replica]) -> None:
        for index in [index for index, ready_s in self._starting.items() if ready_s <= now_s]:
            del self._starting[index]
            self._serve(now_s, replicas[index])
        told = {index: self._newest[index] for index in self._serving if index in self._newest}
        if not told:
            return
        demands = [self._demands.setdefault(index, Demand()) for index in told]
        fullness = [demand.stats(told[index], now_s)[FULLNESS] for index, demand in zip(told, demands, strict=True)]
        self._means.append(sum(fullness) / len(fullness))
        mean = sum(self._means) / len(self._means)
        wanted = max(math.ceil(len(self._serving) * mean / TARGET_FULLNESS - 1e-9), 1)
        wanted = min(wanted, len(replicas))
        there, settling = len(self._serving) + len(self._starting), now_s < self._scaling.settle_s
        for more, delay_s in ((True, self._scaling.up_delay_s), (False, self._scaling.down_delay_s)):
            if wanted == there or (wanted > there) is not more:
                self._since_s[more] = math.inf
                continue
            self._since_s[more] = min(self._since_s[more], now_s)
            if settling or now_s - self._since_s[more] >= delay_s:
                self._since_s[more] = math.inf
                self._means.clear()
                self._go_to(now_s, wanted, replicas, settling)

    def _go_to(self, now_s: float, wanted: int, replicas: Sequence[Replica], at_once: bool) -> None:
        while len(self._serving) + len(self._starting) > wanted:
            if self._starting:
                self._starting.popitem()
            else:
                self._stop(self._serving[-1])
        free = [each.index for each in replicas if each.index not in self._serving and each.index not in self._starting]
        for index in free[: wanted - len(self._serving) - len(self._starting)]:
            if at_once:
                self._serve(now_s, replicas[index])
            else:
                self._starting[index] = now_s + self._scaling.start_s

    def _serve(self, now_s: float, replica: Replica) -> None:
        name = str(replica.index)
        self._serving.append(replica.index)
        self.mirrors_of(replica.index).add(name)
        if replica.num_requests == 0:
            self.on_idle(now_s, replica)

    def _stop(self, index: int) -> None:
        self._serving.remove(index)
        self.mirrors_of(index).remove(str(index))
        self._sessions.forget_replica(str(index))
        self._idle.pop(index, None)
        self._newest.pop(index, None)
        self._demands.pop(index, None)
