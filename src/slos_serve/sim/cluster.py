"""Replicas behind a router, driven by one event heap in virtual time.

Events are ``(time, priority, sequence, ...)``: a total order, so equal inputs give equal runs. At one instant steps end
first, then replicas die, then calls arrive, and only then replicas plan, so that a plan sees everything that happened.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from slos_serve.sim.parts import WHOLE, Part
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import IDLE_TICK_S, Replica
from slos_serve.sim.routers import Router
from slos_serve.sim.split import Links, Placement
from slos_serve.sim.step import COMPLETED, LOST, REJECTED

# Kinds of events; the value is the priority at equal times.
STEP_END, DEATH, ARRIVAL, HANDOVER, PLAN = range(5)


@dataclass(frozen=True, slots=True)
class Apart:
    """Prefill and decode are on different replicas.

    Attributes:
        placement: picks both for a call.
        links: between them.
    """

    placement: Placement
    links: Links

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """Told when a replica's last request left."""
        self.placement.on_idle(now_s, replica)


@dataclass(slots=True)
class Cluster:
    """What is simulated.

    Attributes:
        recording: of the workload that arrives.
        replicas: all of them.
        router: picks a replica for each arriving call, or two where prefill and decode are apart.
        deaths: (virtual seconds, replica index) at which replicas die.
        check_every_s: virtual seconds between calls of ``stop``.
        stop: tells whether to cut the run short.
        progress: told the virtual time now and then.
    """

    recording: Recording
    replicas: Sequence[Replica]
    router: Router | Apart
    deaths: Sequence[tuple[float, int]] = ()
    check_every_s: float = 5.0
    stop: Callable[[Recording, float], bool] | None = None
    progress: Callable[[float], None] | None = None
    _heap: list[tuple[float, int, int, int]] = field(default_factory=list)
    _sequence: int = 0
    _next_plan_s: dict[int, float] = field(default_factory=dict)
    _prompts: dict[int, int] = field(default_factory=dict)
    _coming: dict[int, tuple[Replica, float]] = field(default_factory=dict)

    def run(self) -> Recording:
        """Simulate until every call ended (or ``stop`` says so); returns the recording, filled."""
        recording = self.recording
        arrivals = recording.workload.calls["arrival_s"]
        order = np.argsort(arrivals, kind="stable")
        order = order[np.isfinite(arrivals[order])]
        for at_s, replica in self.deaths:
            self._push(at_s, DEATH, replica)
        next_first = 0
        if len(order):
            self._push(float(arrivals[order[0]]), ARRIVAL, int(order[0]))
        check_s = self.check_every_s
        while self._heap:
            now_s, kind, _, subject = heapq.heappop(self._heap)
            if kind == STEP_END:
                self._end_step(now_s, self.replicas[subject])
            elif kind == PLAN:
                self._plan(now_s, self.replicas[subject])
            elif kind == ARRIVAL:
                if next_first < len(order) and subject == order[next_first]:
                    next_first += 1
                    if next_first < len(order):
                        following = int(order[next_first])
                        self._push(float(arrivals[following]), ARRIVAL, following)
                self._arrive(now_s, subject)
            elif kind == HANDOVER:
                self._take_over(now_s, subject)
            else:
                self._kill(now_s, self.replicas[subject])
            recording.end_s = max(recording.end_s, now_s)
            if now_s >= check_s:
                check_s = now_s + self.check_every_s
                if self.progress is not None:
                    self.progress(now_s)
                if self.stop is not None and self.stop(recording, now_s):
                    recording.stopped_early = True
                    break
        return recording

    def _push(self, at_s: float, kind: int, subject: int) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (at_s, kind, self._sequence, subject))

    def _ask(self, at_s: float, replica: Replica) -> None:
        """Let a replica plan at ``at_s``, unless it will before."""
        if self._next_plan_s.get(replica.index, math.inf) > at_s:
            self._next_plan_s[replica.index] = at_s
            self._push(at_s, PLAN, replica.index)

    def _plan(self, now_s: float, replica: Replica) -> None:
        if self._next_plan_s.get(replica.index) != now_s:
            return  # overtaken by an earlier one
        del self._next_plan_s[replica.index]
        if replica.busy or not replica.alive:
            return
        end_s = replica.start_step(now_s)
        if end_s is not None:
            self._push(end_s, STEP_END, replica.index)
        elif replica.num_requests:
            self._ask(now_s + IDLE_TICK_S, replica)

    def _end_step(self, now_s: float, replica: Replica) -> None:
        if not replica.alive:
            return
        for call in replica.finish_step(now_s):
            self._call_left(now_s, replica, call)
        if replica.num_requests:
            self._ask(now_s, replica)
        else:
            self.router.on_idle(now_s, replica)

    def _call_left(self, now_s: float, replica: Replica, call: int) -> None:
        calls = self.recording.workload.calls
        if isinstance(self.router, Apart):
            if self._prompts.pop(call, None) is not None:
                self._hand_over(now_s, self.router, replica, call)
                return
            self._tell_length(self.router, replica, call)
        following = int(calls["next_call"][call])
        if following >= 0:
            self._push(now_s + float(calls["tool_s"][following]), ARRIVAL, following)

    def _arrive(self, now_s: float, call: int) -> None:
        sent_s = float(self.recording.calls["arrival_s"][call])
        arrival_s = now_s if math.isnan(sent_s) else sent_s  # a call that is routed again keeps its arrival
        alive = [replica for replica in self.replicas if replica.alive]
        if not alive:
            self.recording.calls["arrival_s"][call] = arrival_s
            self.recording.calls["outcome"][call] = LOST
            return
        if isinstance(self.router, Apart):
            replica, part = self._place_prompt(now_s, self.router, call, alive)
        else:
            replica, part = self.router.choose(now_s, call, self._session(call), alive), WHOLE
        if replica is None or not replica.fits(call):
            self.recording.calls["arrival_s"][call] = arrival_s
            self.recording.calls["outcome"][call] = REJECTED
            return
        if part.prompt_only:
            self._prompts[call] = replica.index
        replica.add(call, arrival_s, part)
        self._wake(now_s, replica)

    # ------------------------------------------------------------------------------------------------- apart

    def _place_prompt(
        self, now_s: float, apart: Apart, call: int, alive: Sequence[Replica]
    ) -> tuple[Replica | None, Part]:
        place = apart.placement.place_prompt(now_s, call, self._session(call), alive)
        if place is None:
            return None, WHOLE
        one_token = int(self.recording.workload.calls["output_tokens"][call]) == 1
        if one_token and not apart.placement.decode_begins:
            return place.replica, WHOLE
        return place.replica, Part(prompt_only=True, due_s=place.due_s, is_promise=place.promised)

    def _hand_over(self, now_s: float, apart: Apart, source: Replica, call: int) -> None:
        """A prompt is computed: its KV sets out for the replica that generates the answer."""
        placement, recording = apart.placement, self.recording
        alive = [replica for replica in self.replicas if replica.alive]
        target = placement.place_answer(now_s, call, alive) if alive else None
        if target is None:
            recording.calls["outcome"][call] = LOST
            return
        tokens = int(recording.workload.calls["prompt_tokens"][call])
        comes_s = apart.links.move(now_s, source.index, target.index, tokens)
        self._coming[call] = target, comes_s
        if placement.decode_begins:
            recording.token_s[recording.token_start[call]] = np.nan  # the client gets the decode side's
        if placement.shows_coming:
            target.add(call, float(recording.calls["arrival_s"][call]), Part(tokens_done=tokens - 1, comes_s=comes_s))
            self._wake(now_s, target)
        self._push(comes_s, HANDOVER, call)

    def _take_over(self, now_s: float, call: int) -> None:
        assert isinstance(self.router, Apart)
        target, comes_s = self._coming.get(call, (None, now_s))
        if target is None or comes_s != now_s:
            return  # its replica died, and it set out again
        del self._coming[call]
        placement = self.router.placement
        if placement.shows_coming:
            if target.alive:
                target.kv_came(call)
        elif target.alive:
            tokens = int(self.recording.workload.calls["prompt_tokens"][call])
            begun = 0 if placement.decode_begins else 1
            part = Part(tokens_done=tokens - 1 + begun, output_tokens=begun)
            target.add(call, float(self.recording.calls["arrival_s"][call]), part)
        elif placement.decode_begins:
            self._push(now_s, ARRIVAL, call)
        else:
            self.recording.calls["outcome"][call] = LOST
        self._wake(now_s, target)

    def _tell_length(self, apart: Apart, replica: Replica, call: int) -> None:
        """All replicas learn how long the answer was: those that compute prompts see none end."""
        if not apart.placement.shows_coming or self.recording.calls["outcome"][call] != COMPLETED:
            return
        row = self.recording.workload.calls[call]
        for other in self.replicas:
            if other is not replica:
                other.policy.on_request_done(
                    int(row["class_index"]), int(row["prompt_tokens"]), int(row["output_tokens"])
                )

    def _wake(self, now_s: float, replica: Replica) -> None:
        if not replica.busy and replica.alive:
            self._ask(now_s, replica)

    def _kill(self, now_s: float, replica: Replica) -> None:
        if not replica.alive:
            return
        again, _ = replica.die()
        for call in again:
            self._prompts.pop(call, None)
            self._push(now_s, ARRIVAL, call)

    def _session(self, call: int) -> int:
        return int(self.recording.workload.calls["session"][call])
