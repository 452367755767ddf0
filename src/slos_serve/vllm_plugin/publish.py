"""Publications out of vLLM's engine-core process, where the planner runs, to whoever serves that engine.

The transport is one ZeroMQ PUSH socket that keeps only the newest message. Sending never waits: a reader that is slow,
gone or not there yet costs the engine nothing and finds the newest publication when it comes. Whatever goes wrong here
is logged once and costs publications, never a step.

Between a step's tokens and the next step's batch the workers wait for the engine core. So a plan only leaves a snapshot
behind; it is summed up and sent once its batch is with the workers (:meth:`EnginePublisher.send`).

``SLOS_SERVE_PUBLISH`` holds the address that the reader listens on (:mod:`slos_serve.vllm_plugin.config`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import zmq

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import REQUEST_DTYPE
from slos_serve.policies.slos_serve import SLOsServePolicy
from slos_serve.routing.projection import carry_out
from slos_serve.routing.publication import Publication
from slos_serve.routing.publisher import Publisher, Snapshot, snapshot_of
from slos_serve.routing.settings import PUBLISH_EVERY_S
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.front.link import RECONNECT_MS, socket_path

_logger = logging.getLogger("vllm.slos_serve")
# A reader knows whose publications it reads; the engine core does not know what its replica is called.
_UNNAMED = ""
# The API process judges with what it heard last, so it hears more often than routers do. While the same requests only
# decode, all that changes is how far ahead they are: then it hears less often, because a publication costs both
# processes about as much time as planning a small step.
FRONT_EVERY_S = 0.03
DECODES_EVERY_S = 0.2
LOOK_EVERY_S = 1.0
# Beside a publication's own fields: steps that the engine has finished. Left out by an engine that does not count them.
STEPS_KEY = "steps_done"
# And the tickets of requests that came within the last seconds: a router keeps a request's room until it is named here.
# One that is never named holds it twice, beside the request itself, so a burst must not crowd out names.
TICKETS_KEY = "tickets"
NAMED_FOR_S, MOST_NAMED = 2.0, 1 << 15


class EnginePublisher:
    """Sends the publications of one engine.

    Args:
        address: ZeroMQ address of the reader, such as ``ipc:///run/slos-serve/engine``.
        policy: whose planner's state is published.
        every_s: age that a publication may reach while steps are shorter than that.
    """

    def __init__(self, address: str, policy: SLOsServePolicy, every_s: float = PUBLISH_EVERY_S) -> None:
        self._policy = policy
        self._publisher = Publisher(_UNNAMED, policy.planner, policy.model, every_s)
        self._unsent: Snapshot | None = None
        self._taken_s = -np.inf
        self._steps_done = 0
        self._tickets: deque[tuple[float, int]] = deque(maxlen=MOST_NAMED)
        self._failed = False
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.CONFLATE, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.connect(address)
        none = np.empty(0, dtype=np.int64)
        carry_out(np.zeros(1, dtype=REQUEST_DTYPE), none, none, none, 0.0)  # compiled before a step has to wait for it

    def due(self, now_s: float) -> bool:
        """Whether the last publication is as old as it may become."""
        return now_s - self._taken_s >= self._publisher.every_s

    def step_done(self) -> None:
        """A step has finished; its replica's health is judged by how many have."""
        self._steps_done += 1

    def entered(self, now_s: float, ticket: int) -> None:
        """A request that a router sent has come."""
        self._tickets.append((now_s, ticket))

    def after_plan(self, now_s: float, view: EngineView, plan: StepPlan, seen_until_s: float) -> None:
        """Take what is to be published of a step if the next plan would come too late for it."""
        if self.due(now_s + plan.predicted_s):
            self._take(now_s, view, plan, seen_until_s)

    def unplanned(self, now_s: float, view: EngineView) -> None:
        """Take the state as it is: a step that is not planned is about to run."""
        self._take(now_s, view)

    def idle(self, now_s: float, engine: EngineView) -> None:
        """Publish at once that no request is left in the engine; ``engine`` gives its sizes."""
        self.unplanned(now_s, engine.without_requests())
        self.send()

    def send(self) -> None:
        """Publish what was taken last, if it is not out yet."""
        snapshot, self._unsent = self._unsent, None
        if snapshot is None:
            return
        try:
            self.deliver(self._publisher.publish(snapshot))
        except Exception:
            self._log_once()

    def deliver(self, publication: Publication) -> None:
        """Hand it to the transport, which keeps the newest."""
        with suppress(zmq.Again):
            counted = {STEPS_KEY: self._steps_done} if self._steps_done else {}
            named = {TICKETS_KEY: [ticket for _, ticket in self._tickets]}
            self._socket.send(msgspec.json.encode(publication.as_dict() | counted | named), zmq.NOBLOCK)
            # Afterwards: each is named once at least, also after an engine that paused for long.
            while self._tickets and self._tickets[0][0] < publication.time_s - NAMED_FOR_S:
                self._tickets.popleft()

    def close(self) -> None:
        """Send no more."""
        self._socket.close()
        self._context.term()

    def _take(
        self, now_s: float, view: EngineView, plan: StepPlan | None = None, seen_until_s: float | None = None
    ) -> None:
        self._taken_s = now_s
        try:
            self._unsent = snapshot_of(view, now_s, plan, self._policy.correction.factor, seen_until_s)
        except Exception:
            self._log_once()

    def _log_once(self) -> None:
        """Log the exception that is being handled, if it is the first one."""
        if not self._failed:
            self._failed = True
            _logger.exception("slos-serve: a publication failed; routers count this replica as full meanwhile.")


class FrontPublisher(EnginePublisher):
    """Tells the API process of a single server; rests while that does not listen.

    Args:
        path: socket of the API process; it appears when the process listens.
        policy: whose planner's state is published.
    """

    def __init__(self, path: Path, policy: SLOsServePolicy) -> None:
        super().__init__(f"ipc://{path}", policy, FRONT_EVERY_S)
        self._path = path
        self._listens = False
        self._looked_s = -np.inf
        self._told_decodes = -1

    def due(self, now_s: float) -> bool:
        """Whether somebody listens and the last publication is as old as it may become."""
        return self._is_heard() and super().due(now_s)

    def after_plan(self, now_s: float, view: EngineView, plan: StepPlan, seen_until_s: float) -> None:
        """As :meth:`EnginePublisher.after_plan`, while somebody listens; less often while nothing but decodes runs."""
        if not self._is_heard():
            return
        only_decodes = len(view.waiting) == 0 and bool(view.table.rows["output_tokens"][view.running].all())
        decodes = len(view.running) if only_decodes else -1
        taken_s = self._taken_s
        if only_decodes and decodes == self._told_decodes and now_s - taken_s < DECODES_EVERY_S:
            return
        super().after_plan(now_s, view, plan, seen_until_s)
        if self._taken_s != taken_s:
            self._told_decodes = decodes

    def _is_heard(self) -> bool:
        if not self._listens and time.monotonic() - self._looked_s > LOOK_EVERY_S:
            self._looked_s = time.monotonic()
            self._listens = self._path.exists()
        return self._listens


def publisher_of(
    settings: PluginConfig, policy: SLOsServePolicy | None, front: int | None = None
) -> EnginePublisher | None:
    """The publisher that the environment asks for, or the one for the API process; ``None`` when nothing is planned.

    Args:
        settings: says where to publish, and whether the API process judges requests.
        policy: of the engine.
        front: the API process, where there is one.
    """
    if policy is None:
        return None
    if settings.publish_to is not None:
        return EnginePublisher(settings.publish_to, policy, settings.publish_every_s)
    path = socket_path("state", front) if front is not None and settings.front_end else None
    return None if path is None else FrontPublisher(path, policy)
