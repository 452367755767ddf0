"""The front end of one server: judges each request as vLLM hands it to the engine, and says so in the answer's head.

One object in the API process. The mirror is used from the event loop; a thread reads the engine's sockets and keeps the
newest publication for it. Without a profile, with several engines or API processes, and until the engine has published,
requests are not judged: answers then have no verdict, and nothing is refused.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import zmq

from slos_serve.core.slo import SLOClass, WhenFull
from slos_serve.core.verdict import Verdict
from slos_serve.perf.tasks import CallDue
from slos_serve.routing.headroom import MOST, STANDARD_PROMPT_TOKENS, headroom, headroom_prefill_tokens, room_of
from slos_serve.routing.publication import Publication
from slos_serve.routing.router import RoutingRequest
from slos_serve.vllm_plugin.asgi import Scope
from slos_serve.vllm_plugin.class_versions import ClassVersion
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.front.asking import Asking
from slos_serve.vllm_plugin.front.judged import HandedOver, Judged, prompt_tokens
from slos_serve.vllm_plugin.front.kernels import load_kernels
from slos_serve.vllm_plugin.front.link import PROMISED_KEY, FrontSockets, socket_path
from slos_serve.vllm_plugin.front.load_report import load_of
from slos_serve.vllm_plugin.front.metrics import FrontMetrics
from slos_serve.vllm_plugin.front.mirror import ENGINE, Answer, EngineMirror, Looked, severity
from slos_serve.vllm_plugin.front.open_promises import PASSED_OVER, OpenPromises, give, may_wait, with_binding
from slos_serve.vllm_plugin.front.reload import ClassFileWatch
from slos_serve.vllm_plugin.front.tasks import FrontTasks
from slos_serve.vllm_plugin.front.tracing import RequestSpans
from slos_serve.vllm_plugin.live.feed import LIVE_KEY, WATCHED
from slos_serve.vllm_plugin.live.state import LiveState, Watch
from slos_serve.vllm_plugin.metrics import EngineLabels
from slos_serve.vllm_plugin.publish import TICKETS_KEY
from slos_serve.vllm_plugin.slo_args import SloArgs, from_extra_args

POLL_MS = 200
GAUGES_EVERY_S = 2.0
STANDARD_ANSWER_TOKENS = 256
MOST_REMEMBERED = 100_000
# Refused clients come back spread over this much more than they are told at least.
RETRY_SPREAD = 1.5
_logger = logging.getLogger("vllm.slos_serve")


class FrontDesk:
    """See the module.

    Args:
        config: classes, margins and profile, as the scheduler has them.
        labels: of every metric.
        max_model_len: longest context of the model.
        clock_s: the engine core's clock.
        uniform: spreads the times that refused clients are told.

    Attributes:
        max_model_len: see above.
        ready: True once the routing kernels are loaded; nothing is judged before.
        tells_at_once: every promise is told as soon as the mirror finds room, and binds the engine.
        spans: of requests, where vLLM traces.
        load: what balancers are told of this server, by name; empty until it is known.
        live, watch: what the live page shows, ``None`` without one, and whether somebody looks.
    """

    def __init__(
        self,
        config: PluginConfig,
        labels: EngineLabels,
        max_model_len: int,
        clock_s: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._config = config
        self._clock_s = clock_s
        self._uniform = uniform
        self.max_model_len = max_model_len
        self._indices = {slo_class.name: index for index, slo_class in enumerate(config.classes)}
        self._asking = Asking(config, max_model_len, self._indices, lambda: self.version.trust)
        self._mirror = EngineMirror(len(self._indices) + 2, config.planner.fairness)
        # Not taken over by the mirror yet, with the tickets that were named since.
        self._received: tuple[Publication, frozenset[int]] | None = None
        self._tickets = itertools.count(1)
        self._newest: Publication | None = None
        self._told: OrderedDict[str, Verdict] = OrderedDict()
        self._open = OpenPromises()
        self._tasks = FrontTasks(config)
        self._gauges_s = -math.inf
        self.load: dict[str, float] = {}
        self.ready = False
        self.tells_at_once = False
        self.spans: RequestSpans | None = None
        self._ended = threading.Event()
        self._failed = False
        self.metrics = FrontMetrics(self._indices, labels)
        self._watch_file = ClassFileWatch(config, self.metrics.class_file_read)
        self._typical = self._standard()
        self.live = LiveState(labels.model_name, config.classes) if config.live_page else None
        self.watch = Watch(socket_path(WATCHED, os.getpid()) if config.live_page else None)

    @property
    def version(self) -> ClassVersion:
        """The version of the class file that new requests are judged by."""
        return self._watch_file.current

    @property
    def config(self) -> PluginConfig:
        """Margins and profile, and the classes that the server started with."""
        return self._config

    def _standard(self) -> dict[str, RoutingRequest]:
        """A request of each class that promises something: what is typical until real ones have come."""
        if self._config.profile is None:
            return {}
        params = SimpleNamespace(max_tokens=STANDARD_ANSWER_TOKENS)
        return {
            slo_class.name: self._tasks.with_task(
                slo_class, SloArgs(), self._asking.of(slo_class, SloArgs(), None, STANDARD_PROMPT_TOKENS, params, 0.0)
            )[0]
            for slo_class in self.version.classes
            if not slo_class.best_effort
        }

    # Judging, on the event loop -------------------------------------------------------------------------------

    def begin(self, applied: SLOClass | None, version: ClassVersion | None = None) -> Judged:
        """An HTTP request came; ``applied`` is its class, of that ``version`` of the class file or of the newest."""
        return Judged(applied, self._clock_s(), version or self.version)

    def traced(self, judged: Judged, scope: Scope) -> AbstractContextManager[Scope]:
        """Where vLLM traces, a span around a request; gives the scope to serve it with."""
        return nullcontext(scope) if self.spans is None else self.spans.around(judged, scope)

    def entered(self, judged: Judged, prompt: object, params: Any, request_id: str) -> HandedOver | None:
        """vLLM is about to hand a request to its engine: judge it. Sets ``judged.refusal`` where it is refused.

        An exchange may go on asking of which its client hears nothing: streams of ``/v1/responses`` begin before the
        engine is asked, others end before; a tool's result is another prompt; beam search asks for each token. Such
        requests are counted in the mirror, and neither refused nor told.

        Returns:
            What the engine core is to know of it; ``None`` where it is refused or cannot be judged.
        """
        tokens = prompt_tokens(prompt)
        if tokens is None or not self.ready or not self._hear():
            return None
        args = from_extra_args(getattr(params, "extra_args", None))
        now_s = self._clock_s()
        promises = (None,) if judged.slo_class is None else judged.slo_class.promises
        ticket = next(self._tickets)
        asking = (self._asking.of(one, args, prompt, tokens, params, now_s) for one in promises)
        several = [replace(one, ticket=ticket) for one in asking]
        several[0], call = self._tasks.with_task(judged.slo_class, args, several[0], begins=True)
        if judged.late:
            unsaid = [replace(one, reject_when_full=False, binding=False) for one in several]
            self._mirror.answer(now_s, unsaid[0], unsaid[1:])
            return self._handed(judged, ticket, request_id, call, last=args.last_round)
        judged.call, judged.call_came_s = call, several[0].arrival_s
        margin_s = self._config.planner.ttft_margin_s
        judged.targets_s = [one.ttft_due_s + margin_s - one.arrival_s for one in several]
        count = max(int(getattr(params, "n", 1) or 1), 1)
        at_once = self.tells_at_once or count > 1 or not may_wait(params, judged.targets_s[0])
        several = with_binding(several, told_at_once=at_once)
        hoped = max((self._mirror.answer(now_s, several[0], several[1:]) for _ in range(count)), key=severity)
        asked, promised = several[hoped.rank], hoped.verdict in (Verdict.ADMITTED, Verdict.SECOND_BEST)
        answer = hoped if asked.binding or not promised else PASSED_OVER
        if judged.hoped is None or severity(hoped) > severity(judged.hoped):
            judged.hoped = hoped
        if judged.answer is None or severity(answer) > severity(judged.answer):
            give(judged, answer)
        judged.arrival_s = min(judged.arrival_s, asked.arrival_s)
        name = judged.slo_class.name if judged.slo_class is not None and asked.has_slo else None
        judged.late_rank = max(judged.late_rank, answer.rank)
        if name is not None and answer.verdict is Verdict.BEST_EFFORT and count == 1:
            self._open.add(judged, ticket, request_id)
            judged.uncounted += 1
        else:
            self._count(name, answer, judged.ttft_target_s)
        if answer.verdict is Verdict.REJECTED and judged.slo_class is not None:
            judged.refusal = self._refusal(judged.slo_class, asked, now_s)
            self._tasks.refused(judged.call)
            return None
        if name is not None:
            self._remember(request_id, answer.verdict, name, several[0])
        with suppress(RuntimeError):  # no event loop
            asyncio.get_running_loop().call_soon(judged.runs)
        told = answer.rank if answer is hoped and promised else None
        return self._handed(judged, ticket, request_id, call, last=args.last_round, told=told)

    def _handed(
        self, judged: Judged, ticket: int, name: str, call: CallDue | None, *, last: bool, told: int | None = None
    ) -> HandedOver:
        self._tasks.sent(name, call, last=last)
        judged.tickets[ticket] = name
        return HandedOver(ticket, told)

    async def settled(self, judged: Judged) -> None:
        """Until nothing better can be said to its client, see :mod:`slos_serve.vllm_plugin.front.open_promises`."""
        await self._open.wait(judged, self._clock_s())

    async def last_word(self, judged: Judged) -> None:
        """Before the head of an answer that begins goes out; returns soon."""
        await self._open.last_word(judged)

    def said(self, judged: Judged) -> None:
        """Its client is being told what became of it."""
        judged.late = True
        try:
            self._open.close(judged)
            count, judged.uncounted = judged.uncounted, 0
            for _ in range(count):
                assert judged.slo_class is not None and judged.answer is not None
                self._count(judged.slo_class.name, judged.answer, judged.ttft_target_s)
        except Exception:
            self._log_once("failed to count a verdict")

    def _count(self, name: str | None, answer: Answer, target_s: float) -> None:
        self.metrics.answered(name, answer.verdict, answer.reason)
        if self.live is not None:
            self.live.told(name, answer.verdict, answer.reason, answer.ttft_s, target_s)

    def ended(self, judged: Judged) -> None:
        """The exchange of an HTTP request is over; what its engine never had of it is reserved no more."""
        self.said(judged)
        try:
            for ticket in judged.tickets:
                self._mirror.withdraw(ticket)
            self._tasks.over(judged.tickets.values(), self._clock_s())
        except Exception:
            self._log_once("failed to give back the room of a request")

    def look(self, args: SloArgs, tokens: int, max_tokens: int | None) -> tuple[list[RoutingRequest], Looked] | None:
        """What would be said now of a request that is not there, and what it asks for, the first promise first.

        ``None`` while nothing can be judged.

        Raises:
            InvalidFieldError: its class is unknown.
        """
        params = SimpleNamespace(max_tokens=max_tokens)
        applied = self.applied(args)
        now_s, promises = self._clock_s(), (None,) if applied is None else applied.promises
        several = [self._asking.of(one, args, None, tokens, params, now_s) for one in promises]
        several[0], _ = self._tasks.with_task(applied, args, several[0])
        if not self.ready or not self._hear():
            return None
        target_s = several[0].ttft_due_s + self._config.planner.ttft_margin_s - several[0].arrival_s
        several = with_binding(several, told_at_once=self.tells_at_once or not may_wait(params, target_s))
        return several, self._mirror.look(now_s, several[0], several[1:])

    def applied(self, args: SloArgs) -> SLOClass | None:
        """The class of a request that is only asked about: without a session it is the first call of a task.

        Raises:
            InvalidFieldError: the class is unknown.
        """
        return replace(args, session_id=args.session_id or "").applied(self.version.classes)

    def now_s(self) -> float:
        """Time on the clock of what is measured."""
        return self._clock_s()

    def first_token(self, judged: Judged) -> None:
        """The first part of an answer is being sent."""
        judged.first_s = self._clock_s()
        answer = judged.answer
        if answer is not None and answer.ttft_s is not None:
            self.metrics.first_token(judged.first_s - judged.arrival_s, answer.ttft_s)

    def _hear(self) -> bool:
        """Take over the newest publication; False before the first."""
        received, self._received = self._received, None
        if received is not None:
            self._mirror.update(*received)
        return self._mirror.newest is not None

    def _refusal(self, slo_class: SLOClass, asked: RoutingRequest, now_s: float) -> tuple[int, int]:
        least_s = self._mirror.retry_after_s(now_s, asked)
        wait_s = math.ceil(self._uniform(least_s, RETRY_SPREAD * least_s))
        return (503 if slo_class.when_full is WhenFull.REJECT_503 else 429), max(wait_s, 1)

    def _remember(self, request_id: str, verdict: Verdict, name: str, asked: RoutingRequest) -> None:
        self._told[request_id] = verdict
        if len(self._told) > MOST_REMEMBERED:
            self._told.popitem(last=False)
        self._typical[name] = asked

    # The engine's messages, in a thread -----------------------------------------------------------------------

    def start(self) -> None:
        """Listen to the engine; returns at once. Nothing is judged until the routing kernels are loaded."""
        threading.Thread(target=self._run, name="slos-serve front", daemon=True).start()

    def close(self) -> None:
        """End the thread soon."""
        self._ended.set()

    def _run(self) -> None:
        try:
            sockets = FrontSockets(os.getpid())
        except (OSError, zmq.ZMQError):
            _logger.exception("slos-serve: answers have no verdict: failed to listen to the engine core.")
            return
        try:
            load_kernels()
            self.ready = True
            _logger.info("slos-serve: answers have verdicts from now on.")
            poller = zmq.Poller()
            poller.register(sockets.state, zmq.POLLIN)
            poller.register(sockets.outcomes, zmq.POLLIN)
            while not self._ended.is_set():
                for socket, _ in poller.poll(POLL_MS):
                    self.heard(socket.recv(), socket is sockets.state)
                self.turn(time.monotonic())
        finally:
            self.ready = False
            self.watch.close()
            sockets.close()

    def turn(self, now_s: float) -> None:
        """Gauges, class file and live page; a fault in one of them ends nothing."""
        for does in (self._post_gauges, lambda: self.look_at_file(now_s), self.watch.rest):
            try:
                does()
            except Exception:
                self._log_once("failed to show gauges, read the class file or serve the live page")

    def read_file_again(self) -> None:
        """Take the class file soon, whether it has changed or not; for a signal handler."""
        self._watch_file.read_again = True

    def look_at_file(self, now_s: float) -> None:
        """Take the class file if it has changed."""
        if not self._watch_file.look(now_s):
            return
        before, self._typical = self._typical, self._standard()
        for name in before.keys() - self._typical.keys():
            self.metrics.headroom(name, 0, 0)
        if self.live is not None:
            self.live.classes_changed(self.version.classes)

    def heard(self, payload: bytes, is_state: bool) -> None:
        """Take in a message of the engine."""
        try:
            if is_state:
                self._published(msgspec.json.decode(payload))
                return
            found = msgspec.json.decode(payload)
            if PROMISED_KEY in found:
                self._open.made(found[PROMISED_KEY], self._told.__setitem__)
            elif LIVE_KEY not in found:
                self._ended_with(found)
            elif self.live is not None:
                self.live.heard(found[LIVE_KEY])
        except Exception:
            self._log_once("failed to use a message of the engine core")

    def _log_once(self, what: str) -> None:
        """Log the exception that is being handled, if it is the first one of this process."""
        if not self._failed:
            self._failed = True
            _logger.exception("slos-serve: %s (said once).", what)

    def _published(self, found: dict[str, Any]) -> None:
        named = frozenset(found.get(TICKETS_KEY, ()))
        waiting = self._received
        self._newest = Publication.of_dict({**found, "replica": ENGINE})
        self._received = self._newest, named if waiting is None else named | waiting[1]

    def _ended_with(self, outcome: dict[str, Any]) -> None:
        """A request left the engine: compare what its client was told with what the engine did."""
        key = self._key_of(str(outcome["request_id"]))
        self._tasks.left(key, outcome, self._clock_s())
        told = self._told.pop(key, None)
        if told is not None and outcome["finished"] not in ("abort", "error"):
            self.metrics.compared(told, Verdict(outcome["verdict"]))

    def _key_of(self, request_id: str) -> str:
        """The id that vLLM's API gave: the engine's has a random suffix, and a prefix for one of several answers."""
        for key in (request_id, request_id.rpartition("-")[0], request_id.rpartition("-")[0].partition("_")[2]):
            if key in self._told:
                return key
        return request_id

    def _post_gauges(self) -> None:
        now_s, newest = self._clock_s(), self._newest
        if newest is None or now_s - self._gauges_s < GAUGES_EVERY_S:
            return
        self._gauges_s = now_s
        used = newest.total_blocks - newest.free_blocks
        peak = newest.total_blocks - int(newest.memory_left.min())
        self.metrics.kv(newest.total_blocks, used, peak)
        rooms: dict[str, int] = {}
        for name, asked in list(self._typical.items()):
            rooms[name] = headroom(newest, asked, newest.ready_s)
            self.metrics.headroom(name, rooms[name], headroom_prefill_tokens(newest, asked, newest.ready_s))
        if self.live is not None:
            self.live.gauges({"total": newest.total_blocks, "used": used, "forecast_peak": peak}, rooms)
        room = room_of(newest, min(rooms.values(), default=MOST), newest.ready_s)
        self.metrics.to_routers(room)
        self.load = load_of(room)
