"""The routing of :mod:`slos_serve.routing.pairs` in virtual time: mirrors of all replicas, roles that may move.

Publications are as :class:`slos_serve.sim.slo_router.SloRouter` has them. A session's prompt is cached where its last
prompt was computed; the answers in between lie with the decode side and are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slos_serve.core.verdict import Verdict
from slos_serve.routing.pairs import Roles, route_answer, route_pair
from slos_serve.routing.publication import Publication
from slos_serve.routing.router import RoutingRequest
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.slo_router import SloRouter, SloRouting
from slos_serve.sim.split import Links, PromptPlace
from slos_serve.sim.tasks import SimTasks


class _HandedOver:
    """Tickets of the requests that replicas had been given by a moment."""

    def __init__(self, given_s: dict[int, float], until_s: float) -> None:
        self._given_s = given_s
        self._until_s = until_s

    def __contains__(self, ticket: object) -> bool:
        given_s = self._given_s.get(ticket) if isinstance(ticket, int) else None
        return given_s is not None and given_s <= self._until_s


class PairRouter(SloRouter):
    """See :class:`slos_serve.sim.split.Placement`; :meth:`watch` every replica's policy before the run.

    Args:
        recording, routing, tasks: see :class:`SloRouter`; one router for all replicas.
        links: between replicas.
        replicas, prefill: how many there are, and how many of them begin as prefill replicas.
        moving: roles move with the mix.
    """

    decode_begins = shows_coming = True

    def __init__(
        self,
        recording: Recording,
        routing: SloRouting,
        tasks: SimTasks,
        links: Links,
        replicas: int,
        prefill: int,
        *,
        moving: bool,
    ) -> None:
        super().__init__(recording, replace(routing, shards=1), tasks)
        self.roles = Roles((str(index) for index in range(replicas)), prefill, moving=moving)
        self._links = links
        self._answers_at: dict[int, str] = {}
        self._requests: dict[int, RoutingRequest] = {}
        self._given_s: dict[int, float] = {}

    def place_prompt(self, now_s: float, call: int, session: int, alive: Sequence[Replica]) -> PromptPlace | None:
        """The prefill replica of the pair that attains the call, or the one that serves it unpromised."""
        self._receive(now_s, alive)
        request = replace(self.request_of(now_s, call, session), ticket=call + 1)
        transfer_s = self._links.transfer_s(request.prompt_tokens)
        decision = route_pair(now_s, request, self.shards[0], self.roles, transfer_s, self._settings)
        self.decisions[decision.reason] = self.decisions.get(decision.reason, 0) + 1
        if decision.verdict is Verdict.REJECTED or decision.prefill is None:
            return None
        self._requests[call] = request
        if decision.decode is not None:
            self._answers_at[call] = decision.decode
        index = int(decision.prefill)
        self._idle.pop(index, None)
        if self._recording.workload.calls["next_call"][call] >= 0:
            self._sessions.sent(session, decision.prefill, request.prompt_tokens)
        place = next(replica for replica in alive if replica.index == index)
        return PromptPlace(place, decision.prompt_due_s, decision.decode is not None)

    def place_answer(self, now_s: float, call: int, alive: Sequence[Replica]) -> Replica | None:
        """The decode replica that promised the pace, else one that is asked now."""
        self._receive(now_s, alive)
        request, name = self._requests.pop(call), self._answers_at.pop(call, None)
        found = {str(replica.index): replica for replica in alive}
        if name not in found:
            name = route_answer(now_s, request, self.shards[0], self.roles, self._settings)
        if name is None:
            return None
        self._given_s[request.ticket] = now_s
        self._idle.pop(int(name), None)
        return found[name]

    def _take(self, publication: Publication) -> None:
        handed_over = _HandedOver(self._given_s, publication.seen_until_s)
        self.shards[0].update(publication, tickets=handed_over)

    def _forget(self, name: str) -> None:
        super()._forget(name)
        self.roles.remove(name)

    def _cached(self, session: int, prompt_tokens: int) -> dict[str, int]:
        """The session's last prompt, where it was computed."""
        return self._sessions.cached(session, prompt_tokens) if self._routing.prefix_cache else {}
