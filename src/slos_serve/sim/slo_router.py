"""The routing of :mod:`slos_serve.routing` in virtual time: replicas publish as real ones would, with staleness.

A replica publishes right after a plan when its last publication would grow older than ``publish_every_s`` before the
next one; an idle replica publishes that it is idle, at the same pace. The router sees nothing else of a replica, except
that a dead one is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import SlotArray
from slos_serve.core.verdict import Verdict
from slos_serve.perf.batch_time import BatchShape
from slos_serve.policies.base import IntArray, Policy
from slos_serve.policies.slos_serve import SLOsServePolicy
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.publication import Publication
from slos_serve.routing.publisher import Publisher, snapshot_of
from slos_serve.routing.router import RouterSettings, RoutingDecision, RoutingRequest
from slos_serve.routing.sessions import Sessions
from slos_serve.routing.settings import PUBLISH_EVERY_S, Order
from slos_serve.routing.shards import route_sharded
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.step import COMPLETED
from slos_serve.sim.tasks import SimTasks


@dataclass(frozen=True, slots=True)
class SloRouting:
    """How replicas publish and the router decides.

    Attributes:
        order: whom to ask first.
        publish_every_s: age that a publication reaches.
        publish_delay_s: time from its making until the router has it.
        stale_after_s: a replica that has not published for this long counts as full.
        reject_classes: classes whose requests are refused where no replica attains them.
        oracle_lengths: the router knows answers' true lengths too.
        plan_ahead: replicas plan one step ahead, so a plan lacks what came during the step before it.
        prefix_cache: replicas keep the KV of ended calls.
        block_size: of their KV caches.
        shards: routers that each decide for their own part of the replicas; a session stays with one of them.
        tries: other routers that are asked when a router's own replicas do not attain a request.
    """

    order: Order = Order.PREFIX
    publish_every_s: float = PUBLISH_EVERY_S
    publish_delay_s: float = 0.0
    stale_after_s: float = 1.0
    reject_classes: Sequence[str] = ()
    oracle_lengths: bool = False
    plan_ahead: bool = False
    prefix_cache: bool = True
    block_size: int = 16
    shards: int = 1
    tries: int = 1


class Published:
    """A replica's policy, and a publication after those plans that call for one."""

    def __init__(
        self, policy: SLOsServePolicy, publisher: Publisher, plan_ahead: bool, deliver: Callable[[Publication], None]
    ) -> None:
        self._policy = policy
        self._publisher = publisher
        self._plan_ahead = plan_ahead
        self._deliver = deliver
        self._planned_s: float | None = None

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """The policy's plan."""
        plan = self._policy.plan(now_s, view)
        # The first plan is made of an idle engine and sees everything.
        seen_s = self._planned_s if self._plan_ahead and self._planned_s is not None else now_s
        factor = self._policy.correction.factor
        if self._publisher.due(now_s + plan.predicted_s):
            self._deliver(self._publisher.publish(snapshot_of(view, now_s, plan, factor, seen_s)))
        self._planned_s = now_s
        return plan

    def commit(self, plan: StepPlan, view: EngineView, ran: SlotArray) -> None:
        """Passed on."""
        self._policy.commit(plan, view, ran)

    def idle(self, now_s: float, view: EngineView) -> None:
        """Publish that nothing is left."""
        factor = self._policy.correction.factor
        self._deliver(self._publisher.publish(snapshot_of(view.without_requests(), now_s, correction=factor)))

    def on_step_done(self, shape: BatchShape, duration_s: float) -> None:
        """Passed on."""
        self._policy.on_step_done(shape, duration_s)

    def on_verified(self, class_index: IntArray, drafted: IntArray, accepted: IntArray) -> None:
        """Passed on."""
        self._policy.on_verified(class_index, drafted, accepted)

    def on_request_done(self, class_index: int, prompt_tokens: int, output_tokens: int) -> None:
        """Passed on."""
        self._policy.on_request_done(class_index, prompt_tokens, output_tokens)


@dataclass(slots=True)
class _Idle:
    """A replica without requests."""

    since_s: float
    view: EngineView
    published: bool = False


class SloRouter:
    """See :class:`slos_serve.sim.routers.Router`; :meth:`watch` every replica's policy before the run."""

    def __init__(self, recording: Recording, routing: SloRouting, tasks: SimTasks | None = None) -> None:
        self._recording = recording
        self._tasks = tasks
        self._routing = routing
        classes = recording.workload.classes
        unknown = sorted(set(routing.reject_classes) - {slo_class.name for slo_class in classes})
        if unknown:
            raise InvalidFieldError("reject_classes", unknown, f"some of {[slo_class.name for slo_class in classes]}")
        self._rejects = np.array([slo_class.name in routing.reject_classes for slo_class in classes], dtype=np.bool_)
        self._weights = [slo_class.weight for slo_class in classes]
        self._settings = RouterSettings(routing.order, routing.stale_after_s)
        self.shards = [Mirrors(num_classes=len(classes)) for _ in range(routing.shards)]
        self.decisions: dict[str, int] = {}
        self._sessions = Sessions(routing.block_size)
        self._last_call: dict[int, int] = {}
        self._published: dict[int, Published] = {}
        self._last_published_s: dict[int, float] = {}
        self._idle: dict[int, _Idle] = {}
        self._pending: list[tuple[float, Publication]] = []
        self._began = False

    def mirrors_of(self, index: int) -> Mirrors:
        """Those of the router that replica ``index`` belongs to."""
        return self.shards[index % len(self.shards)]

    def watch(self, index: int, policy: Policy) -> Policy:
        """The policy to give to replica ``index`` instead, so that it publishes.

        Raises:
            InvalidFieldError: the policy has no planner to publish.
        """
        if not isinstance(policy, SLOsServePolicy):
            raise InvalidFieldError("router", "slo", "policy slos-serve, whose planner can be mirrored")
        self.mirrors_of(index).add(str(index))
        publisher = Publisher(str(index), policy.planner, policy.model, self._routing.publish_every_s)

        def deliver(publication: Publication) -> None:
            self._last_published_s[index] = publication.time_s
            self._pending.append((publication.time_s + self._routing.publish_delay_s, publication))

        self._published[index] = Published(policy, publisher, self._routing.plan_ahead, deliver)
        return self._published[index]

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """A replica's last request left."""
        self._idle[replica.index] = _Idle(now_s, replica.view)

    def choose(self, now_s: float, call: int, session: int, replicas: Sequence[Replica]) -> Replica | None:
        """The replica that attains the call, or the one that serves it unpromised; ``None`` rejects it."""
        self._receive(now_s, replicas)
        request = self.request_of(now_s, call, session)
        decision = self._decide(now_s, call, request, session % len(self.shards))
        self.decisions[decision.reason] = self.decisions.get(decision.reason, 0) + 1
        if decision.verdict is Verdict.REJECTED or decision.replica is None:
            return None
        index = int(decision.replica)
        self._idle.pop(index, None)
        if self._recording.workload.calls["next_call"][call] >= 0:
            self._last_call[session] = call
            self._sessions.sent(session, decision.replica, request.prompt_tokens)
        return next(replica for replica in replicas if replica.index == index)

    def _decide(self, now_s: float, call: int, request: RoutingRequest, home: int) -> RoutingDecision:
        """One decision, reserved in the mirrors."""
        return route_sharded(now_s, request, self.shards, home, self._routing.tries, self._settings)

    def request_of(self, now_s: float, call: int, session: int) -> RoutingRequest:
        """What the router knows of a call when it arrives at ``now_s``."""
        row = self._recording.workload.calls[call]
        sent_s = float(self._recording.calls["arrival_s"][call])
        arrival_s = now_s if np.isnan(sent_s) else sent_s
        index = int(row["class_index"])
        due = None if self._tasks is None else self._tasks.begin(call, arrival_s)
        answer_due_s = arrival_s + float(row["e2e_s"])
        return RoutingRequest(
            arrival_s=arrival_s,
            prompt_tokens=int(row["prompt_tokens"]),
            max_tokens=int(row["max_tokens"]),
            ttft_due_s=arrival_s + float(row["ttft_s"]),
            tpot_s=float(row["tpot_s"]),
            answer_due_s=answer_due_s if due is None else min(answer_due_s, due.due_s),
            class_index=index,
            weight=self._weights[index] * (1.0 if due is None else due.weight),
            hint_tokens=int(row["output_tokens"]) if self._routing.oracle_lengths else 0,
            cached=self._cached(session, int(row["prompt_tokens"])),
            reject_when_full=bool(self._rejects[index]),
        )

    def _cached(self, session: int, prompt_tokens: int) -> dict[str, int]:
        """The session's prefix, its last answer counted in: the router saw that stream end."""
        last = self._last_call.get(session)
        if last is None or not self._routing.prefix_cache:
            return {}
        record, calls = self._recording.calls[last], self._recording.workload.calls
        if record["outcome"] == COMPLETED:
            context = int(calls["prompt_tokens"][last] + record["output_tokens"]) - 1
            self._sessions.sent(session, str(record["replica"]), context)
        return self._sessions.cached(session, prompt_tokens)

    def _forget(self, name: str) -> None:
        """A replica is dead."""
        self.mirrors_of(int(name)).remove(name)
        self._sessions.forget_replica(name)
        self._idle.pop(int(name), None)

    def _take(self, publication: Publication) -> None:
        """A publication has arrived."""
        self.mirrors_of(int(publication.replica)).update(publication)

    def _receive(self, now_s: float, replicas: Sequence[Replica]) -> None:
        """Take over what has arrived by now, and drop the dead."""
        if not self._began:
            self._began = True
            # Replicas published that they were there before the first call came.
            began_s = now_s - self._routing.publish_every_s - self._routing.publish_delay_s
            self._idle = {replica.index: _Idle(began_s, replica.view) for replica in replicas}
        if len(replicas) != sum(len(mirrors) for mirrors in self.shards):
            alive = {str(replica.index) for replica in replicas}
            for name in [name for mirrors in self.shards for name in mirrors if name not in alive]:
                self._forget(name)
        for index, idle in self._idle.items():
            if not idle.published:
                due_s = max(idle.since_s, self._last_published_s.get(index, -np.inf) + self._routing.publish_every_s)
                if due_s <= now_s:
                    self._published[index].idle(due_s, idle.view)
                    idle.published = True
        waiting = []
        for visible_s, publication in self._pending:
            if visible_s <= now_s:
                self._take(publication)
            else:
                waiting.append((visible_s, publication))
        self._pending = waiting
        for index, idle in self._idle.items():
            if idle.published:
                self.mirrors_of(index).renew(str(index), now_s)
