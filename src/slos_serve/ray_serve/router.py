"""The request router that Ray Serve runs in every process that holds a handle to the engine deployment.

Ray pickles this module by value, so it holds nothing but the class; see :mod:`slos_serve.ray_serve.dispatch`.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from ray.serve import metrics
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from slos_serve.core.verdict import Verdict
from slos_serve.ray_serve.compat import ClusterStore
from slos_serve.ray_serve.curve import shared_keys
from slos_serve.ray_serve.dispatch import Dispatcher
from slos_serve.ray_serve.inbox import Inbox
from slos_serve.ray_serve.ticket import RequestRefusedError, Ticket
from slos_serve.ray_serve.wire import ADDRESS_KEY
from slos_serve.routing.router import RoutingRequest


class SLORequestRouter(RequestRouter):
    """Sends each request to the first replica whose mirror attains it; see docs/ray-serve.md."""

    def initialize_state(self, **settings: Any) -> None:
        """Take ``request_router_kwargs``: the arguments of :class:`Dispatcher` but the mailbox."""
        dropped = metrics.Counter(
            "slos_serve_publications_dropped", "Publications and peers not believed.", tag_keys=("reason",)
        )
        self._inbox = Inbox(
            lambda: shared_keys(ClusterStore()), dropped=lambda reason: dropped.inc(tags={"reason": reason})
        )
        self._dispatcher = Dispatcher(self._inbox, **settings)
        # A ticket lives as long as its request; one that is given up while it waits here leaves nothing behind.
        self._tickets: WeakValueDictionary[str, Ticket] = WeakValueDictionary()

    def close(self) -> None:
        """Hear publications no longer."""
        self._inbox.close()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The replicas that Ray knows of now."""
        super().update_replicas(replicas)
        found = {replica.replica_id.unique_id: replica.replica_metadata.get(ADDRESS_KEY) for replica in replicas}
        self._dispatcher.set_replicas(found)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A request found its replica dead before the controller did."""
        super().on_replica_actor_died(replica_id)
        self._dispatcher.drop_replica(replica_id.unique_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica decided on, and the others in case it cannot be reached; a refusal ends the request here."""
        if pending_request is None:
            return [candidate_replicas]
        ticket = pending_request.kwargs.get("ticket")
        if not isinstance(ticket, Ticket):
            # A call that is no generation, or an ingress other than ours: any replica serves it.
            ticket = Ticket(RoutingRequest(arrival_s=0.0, prompt_tokens=1, max_tokens=1))
        await self._dispatcher.heard_somebody()
        decision = self._dispatcher.decide(ticket)
        if decision.verdict is Verdict.REJECTED and decision.replica is None and len(self._dispatcher.mirrors):
            if not pending_request.future.done():
                pending_request.future.set_exception(RequestRefusedError(decision.reason, ticket.retry_after_s))
            self._remove_pending_request_from_indices(pending_request)
            return [candidate_replicas]
        name = pending_request.metadata.internal_request_id
        if name not in self._tickets:  # asked again and again while every replica is full
            pending_request.future.add_done_callback(lambda found: self._dispatcher.given_up(ticket, found))
        self._tickets[name] = ticket
        chosen = [replica for replica in candidate_replicas if replica.replica_id.unique_id == decision.replica]
        others = [replica for replica in candidate_replicas if replica.replica_id.unique_id != decision.replica]
        if chosen and self.replica_queue_len_cache.get(chosen[0].replica_id) is None:
            # Ray would ask a replica that it has not heard of for a while how long its queue is, and take another one
            # when the answer is late. The decision knows better.
            self.on_new_queue_len_info(chosen[0].replica_id, 0)
        return [chosen, others] if chosen else [others]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica took the request."""
        ticket = self._tickets.get(pending_request.metadata.internal_request_id)
        if ticket is not None:
            self._dispatcher.routed(ticket, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request is over, however it ended."""
        ticket = self._tickets.pop(internal_request_id, None)
        if ticket is not None:
            self._dispatcher.ended(ticket, replica_id.unique_id)
