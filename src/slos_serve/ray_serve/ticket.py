"""What an ingress tells the request router about a request, and what it hears back.

A ticket goes with the request through the deployment handle. The router runs in the ingress's own process, so that the
decision which it writes into the ticket is read there; the replica gets a copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from slos_serve.core.errors import SlosServeError
from slos_serve.core.told import Told
from slos_serve.core.verdict import Verdict
from slos_serve.perf.tasks import CallDue
from slos_serve.routing.mirrors import Sent
from slos_serve.routing.router import RoutingDecision, RoutingRequest


@dataclass(slots=True, weakref_slot=True, eq=False)
class Ticket:
    """One request on its way to a replica.

    Attributes:
        asked: what routing needs to know; times on the ingress's monotonic clock.
        weaker: the same with each weaker promise of its class, in the order in which they are asked for.
        rank: which promise the decision gives: 0 for ``asked``, then ``weaker``.
        slo_class: name of its class, ``None`` without one.
        session: conversation it belongs to.
        last_round: no further call of the session follows.
        decision: of the router, ``None`` before it.
        retry_after_s: for a rejected request, when to ask again.
        output_tokens: of the answer, as far as it has come.
        attempts: how often it was sent.
        tried: replicas that were lost under it.
        call: the call of a task that it is; ``None`` for none.
        whole: the whole answer has gone out.
        reservation: replica and room that its router holds for it there; stays with the router.
        refused_status: HTTP status of its refusal.
        ttft_margin_s: by which deadlines above are earlier than what is promised.
        ttft_s, tpot_s: predicted times of a request that is promised something; else ``inf``.
        start_s: seconds from its arrival to its first token, forecast where nothing is promised; else ``inf``.
        first_s, last_s: when the first and the newest part of its stream went out.
        wants_load: its client asks for a load report.
        load: the replicas' load when it was routed, where it is wanted.
    """

    asked: RoutingRequest
    weaker: tuple[RoutingRequest, ...] = ()
    rank: int = 0
    slo_class: str | None = None
    session: str | None = None
    last_round: bool = False
    decision: RoutingDecision | None = None
    retry_after_s: float = math.nan
    output_tokens: int = 0
    attempts: int = 0
    refused_status: int = 429
    ttft_margin_s: float = 0.0
    ttft_s: float = math.inf
    tpot_s: float = math.inf
    start_s: float = math.inf
    first_s: float | None = None
    last_s: float | None = None
    call: CallDue | None = None
    whole: bool = False
    tried: list[str] = field(default_factory=list)
    reservation: tuple[str, Sent] | None = None
    wants_load: bool = False
    load: dict[str, float] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """What a replica gets of it."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "reservation"}

    def __setstate__(self, given: dict[str, Any]) -> None:
        for name, value in given.items():
            setattr(self, name, value)
        self.reservation = None

    def again(self) -> None:
        """It has to be routed anew: its replica is lost."""
        if self.decision is not None and self.decision.replica is not None:
            self.tried.append(self.decision.replica)
        self.decision = None
        self.rank = self.output_tokens = 0

    @property
    def given(self) -> RoutingRequest:
        """With the promise that the decision gives, or the first one."""
        return (self.asked, *self.weaker)[self.rank]

    def told_at(self, replica: str) -> int | None:
        """Rank of the promise that the client was told this replica makes; ``None`` without one."""
        decision = self.decision
        if decision is None or decision.replica != replica:
            return None
        return self.rank if decision.verdict in (Verdict.ADMITTED, Verdict.SECOND_BEST) else None

    def told(self) -> Told:
        """What its client is told."""
        given, call, decision = self.given, self.call, self.decision
        return Told(
            self.slo_class,
            None if decision is None else decision.verdict,
            None if decision is None else decision.reason,
            rank=self.rank,
            target_ttft_s=given.ttft_due_s + self.ttft_margin_s - given.arrival_s,
            target_tpot_s=given.tpot_s,
            target_e2e_s=math.inf if call is None else call.due_s - given.arrival_s,
            task_left_s=math.inf if call is None else call.task_due_s - given.arrival_s,
            predicted_ttft_s=self.ttft_s,
            predicted_tpot_s=self.tpot_s,
            predicted_start_s=self.start_s,
        )

    @property
    def is_unpromised(self) -> bool:
        """Whether it asked for a promise and was sent without one."""
        decision = self.decision
        return self.asked.has_slo and decision is not None and decision.verdict is Verdict.BEST_EFFORT


class RequestRefusedError(SlosServeError):
    """No replica can promise the request, and its class is rejected then rather than served without a promise."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[RequestRefusedError], tuple[str, float]]:
        return type(self), (self.reason, self.retry_after_s)
