"""The OpenAI endpoint: Ray Serve LLM's own, with tickets for the router, second attempts and answers that say what was
promised.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastapi import Request
from ray.exceptions import RayActorError
from ray.serve import metrics
from ray.serve.llm.ingress import OpenAiIngress
from starlette.responses import JSONResponse, Response, StreamingResponse

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import NO_SLO_CLASS
from slos_serve.core.told import tpot_between_s
from slos_serve.core.verdict import Verdict
from slos_serve.ray_serve import compat
from slos_serve.ray_serve.answers import (
    LOST,
    answer_headers,
    error_response,
    lost_event,
    lost_message,
    refusal,
    retry_after,
)
from slos_serve.ray_serve.live import FleetLive
from slos_serve.ray_serve.plugin_metrics import FleetMetrics
from slos_serve.ray_serve.prompts import PromptCounter, context_tokens
from slos_serve.ray_serve.ticket import RequestRefusedError, Ticket
from slos_serve.ray_serve.ticket_office import TicketOffice, session_of
from slos_serve.routing.warm_up import warm_up_routing
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.front.load_report import wanted_format, with_load
from slos_serve.vllm_plugin.live.routes import page, page_headers
from slos_serve.vllm_plugin.slo_args import TICKET_KEY
from slos_serve.vllm_plugin.usage import with_usage

MAX_ATTEMPTS = 3
HEALTH_TIMEOUT_S = 1.5
LOOK_EVERY_S, LOOK_TIMEOUT_S = 0.5, 5.0
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GENERATING = ("chat", "completions")
# Ray needs some seconds to notice and replace a replica.
UNAVAILABLE_RETRY_S = 4.0
# Tokenizers compute outside Python's lock, so threads keep a long prompt from holding up every stream.
TOKENIZER_THREADS = 4
_logger = logging.getLogger("slos_serve.ray_serve")


class SLOIngress(OpenAiIngress):
    """See the module. ``tokenizer`` and ``max_model_len`` come from the builder (:mod:`slos_serve.ray_serve.app`)."""

    def __init__(
        self,
        llm_deployments: dict[str, Any],
        model_cards: dict[str, Any],
        *,
        tokenizer: str,
        max_model_len: int | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(llm_deployments, model_cards, **options)
        warm_up_routing()  # the router runs in this process
        settings = PluginConfig.from_environment(os.environ)
        prompts = PromptCounter.of_model(tokenizer, trust_remote_code)
        longest = max_model_len or context_tokens(tokenizer, trust_remote_code)
        self._office = TicketOffice(settings, prompts, longest)
        self._tokenizers = ThreadPoolExecutor(TOKENIZER_THREADS, "slos-serve tokenizer")
        classes = tuple(settings.classes)
        self._live = FleetLive(next(iter(llm_deployments)), classes) if settings.live_page else None
        self._looking = asyncio.Lock()
        self._shown: dict[str, Any] | None = None
        self._shown_s = 0.0
        self._fleet_metrics = FleetMetrics()
        self._routed = metrics.Counter(
            "slos_serve_routed", "Requests by class and what became of them.", tag_keys=("slo_class", "verdict")
        )
        said = "Whole tasks that ended, by whether all calls were promised their share, and in time."
        self._tasks = metrics.Counter("slos_serve_tasks", said, tag_keys=("slo_class", "verdict", "outcome"))

    async def slo(self) -> Response:
        """The live page."""
        if self._live is None:
            return Response(status_code=404)
        text = page()
        headers = {name.decode(): value.decode() for name, value in page_headers(text)}
        return Response(text, headers=headers)

    async def slo_state(self) -> Response:
        """What the live page shows: all replicas are asked, twice a second at most."""
        if self._live is None:
            return Response(status_code=404)
        async with self._looking:
            now_s = time.monotonic()
            if self._shown is None or now_s - self._shown_s >= LOOK_EVERY_S:
                handle = next(iter(self._default_serve_handles.values()))
                try:
                    answers, _ = await compat.answers_of(handle.broadcast("live_state"), LOOK_TIMEOUT_S)
                except Exception as error:
                    return _no_replica(error)
                self._shown = self._live.document([answer for answer in answers if answer is not None])
                self._shown_s = now_s
        return JSONResponse(self._shown, headers={"cache-control": "no-store"})

    async def plugin_metrics(self) -> Response:
        """What the plug-in counts in all replicas, for Prometheus."""
        try:
            page = await self._fleet_metrics.page(next(iter(self._default_serve_handles.values())))
        except Exception as error:
            return _no_replica(error)
        return Response(page, media_type=METRICS_TYPE)

    async def health(self) -> Response:
        """200 when a replica answers, 503 while none does."""
        handle = next(iter(self._default_serve_handles.values()))
        try:
            await asyncio.wait_for(handle.check_health.remote(), HEALTH_TIMEOUT_S)
        except Exception as error:
            return _no_replica(error)
        return Response()

    async def _process_llm_request(self, body: Any, call_method: str, raw_request: Request | None = None) -> Response:
        """Serve a chat or completion request; whatever else there is goes its usual way."""
        if call_method not in GENERATING or raw_request is None:
            other: Response = await super()._process_llm_request(body, call_method, raw_request)
            return other
        try:
            ticket = await self._ticket(body, session_of(raw_request.headers))
        except InvalidFieldError as error:
            return error_response(400, str(error), "invalid_request_error", error.field)
        wanted = wanted_format(raw_request.headers.raw)
        ticket.wants_load = wanted is not None
        answer = await self._answered(body, call_method, raw_request, ticket)
        if wanted is not None and ticket.load and answer.status_code < 400:
            answer.raw_headers = with_load(answer.raw_headers, wanted, ticket.load)
        return answer

    async def _answered(self, body: Any, call_method: str, raw_request: Request, ticket: Ticket) -> Response:
        """Serve a request that has its ticket."""
        async with compat.router_request_timeout(compat.HTTP_TIMEOUT_S):
            try:
                first, rest = await self._first_part(body, call_method, raw_request, ticket)
            except RequestRefusedError as refused:
                self._office.tasks.refused(ticket)
                self._count(ticket)
                return refusal(refused, ticket)
            except RayActorError as error:
                self._left(ticket)
                fault = type(error).__name__
                headers = {**answer_headers(ticket), **retry_after(UNAVAILABLE_RETRY_S)}
                return error_response(503, lost_message(ticket, fault), LOST, headers=headers)
            except BaseException:  # its client has left, or Ray failed it
                self._left(ticket)
                raise
        self._count(ticket)
        if isinstance(first, compat.ErrorResponse):
            self._left(ticket)
            kind = first.error
            return JSONResponse({"error": kind.model_dump()}, kind.code, headers=answer_headers(ticket))
        if isinstance(first, compat.NON_STREAMING_RESPONSE_TYPES):
            if first.usage is not None:
                ticket.output_tokens = first.usage.completion_tokens or 0
            ticket.whole = True
            self._left(ticket)
            return JSONResponse(first.model_dump(), headers=answer_headers(ticket))
        stream = self._streamed(events(first, rest, ticket), ticket)
        return StreamingResponse(stream, media_type="text/event-stream", headers=answer_headers(ticket))

    async def _streamed(self, parts: AsyncGenerator[str, None], ticket: Ticket) -> AsyncGenerator[str, None]:
        """An answer part by part; its call ends with it, or when its client leaves."""
        try:
            async for part in parts:
                yield part
        finally:
            await parts.aclose()
            self._left(ticket)

    def _left(self, ticket: Ticket) -> None:
        """A call ended: its task goes on, or is counted."""
        self._office.tasks.left(ticket, self._office.now_s(), finished=ticket.whole)
        for ended in self._office.tasks.take_ended():
            outcome = {True: "kept", False: "late", None: "aborted"}[ended.kept]
            verdict = Verdict.ADMITTED if ended.promised else Verdict.BEST_EFFORT
            name = self._office.class_name(ended.class_index)
            self._tasks.inc(tags={"slo_class": name, "verdict": str(verdict), "outcome": outcome})

    async def _ticket(self, body: Any, session: str | None) -> Ticket:
        """Made in a thread; the time that it takes counts against the request's promise."""
        arrival_s = self._office.now_s()
        making = self._tokenizers.submit(self._office.ticket, body, session, arrival_s)
        try:
            return await asyncio.wrap_future(making)
        except asyncio.CancelledError:  # its client has left; the thread may finish it all the same
            making.add_done_callback(self._given_up)
            raise

    def _given_up(self, making: Future[Ticket]) -> None:
        if not making.cancelled() and making.exception() is None:
            self._office.tasks.refused(making.result())

    def _count(self, ticket: Ticket) -> None:
        if self._live is not None:
            self._live.told(ticket)
        verdict = Verdict.NO_SLO if ticket.decision is None else ticket.decision.verdict
        self._routed.inc(tags={"slo_class": ticket.slo_class or NO_SLO_CLASS, "verdict": str(verdict)})

    async def _first_part(
        self, body: Any, call_method: str, raw_request: Request, ticket: Ticket
    ) -> tuple[Any, AsyncIterator[Any]]:
        """The first part of the answer and what gives the rest.

        As long as none has come, a request whose replica is lost is routed again; not for ever, because it may be what
        replicas die of.
        """
        for left in reversed(range(MAX_ATTEMPTS)):
            parts = self._parts(body, call_method, raw_request, ticket)
            try:
                first = await anext(parts)
                if not is_loss(first):
                    return first, parts
                error: Exception = RayActorError(error_msg=str(first)[:500])
            except Exception as fault:
                if not is_lost_replica(fault):
                    raise
                error = fault
            _logger.warning("slos-serve: a request lost its replica before its first token: %s", error)
            if left:
                ticket.again()
        raise error if isinstance(error, RayActorError) else RayActorError(error_msg=str(error)) from error

    async def _parts(
        self, body: Any, call_method: str, raw_request: Request, ticket: Ticket
    ) -> AsyncGenerator[Any, None]:
        handle = self._get_configured_serve_handle(await self._get_model_id(body.model))
        info = compat.RawRequestInfo.from_starlette_request(raw_request)
        body.vllm_xargs = {**(getattr(body, "vllm_xargs", None) or {}), TICKET_KEY: ticket.asked.ticket}
        call = getattr(handle, call_method).remote(compat.sent_form(body), info, ticket=ticket)
        async for part in call:
            yield part


async def events(
    first: Any, rest: AsyncIterator[Any], ticket: Ticket, now_s: Callable[[], float] = time.monotonic
) -> AsyncGenerator[str, None]:
    """The answer as server-sent events; one that is cut off ends with an error event.

    The chunk with the final usage also says what was promised and measured here.
    """
    done = False
    part = first
    try:
        while not is_loss(part):
            text = compat.server_sent(part)
            ticket.output_tokens += text.count("data: {")
            done = text.rstrip().endswith("data: [DONE]")
            yield _with_usage(text, ticket, now_s())
            part = await anext(rest)
        yield lost_event(ticket, "EngineDeadError")
    except StopAsyncIteration:
        ticket.whole = True
    except Exception as fault:
        if not is_lost_replica(fault):
            _logger.exception("slos-serve: a stream broke off")
        yield lost_event(ticket, type(fault).__name__)
    if not done:
        yield "data: [DONE]\n\n"


def _with_usage(text: str, ticket: Ticket, now_s: float) -> str:
    """A part of a stream, and its moment."""
    if ticket.first_s is None:
        ticket.first_s = now_s
    ttft_s = ticket.first_s - ticket.asked.arrival_s

    def measured(tokens: int) -> dict[str, object]:
        return ticket.told().measured(ttft_s, tpot_between_s(ticket.first_s, ticket.last_s, tokens))

    changed = with_usage(text.encode(), measured).decode()
    if changed == text and not text.startswith("data: [DONE]"):
        ticket.last_s = now_s
    return changed


def _no_replica(error: Exception) -> JSONResponse:
    fault = f"no replica answers ({type(error).__name__})"
    return error_response(503, fault, "service_unavailable", headers=retry_after(UNAVAILABLE_RETRY_S))


def is_lost_replica(error: BaseException) -> bool:
    """Whether the replica or its engine is gone, so that another one may serve the request."""
    faults = [error, getattr(error, "cause", None)]
    names = {kind.__name__ for fault in faults for kind in type(fault).__mro__}
    return any(isinstance(fault, RayActorError) for fault in faults) or "EngineDeadError" in names


def is_loss(first: Any) -> bool:
    """Whether the first part of an answer already says that the engine is dead."""
    if isinstance(first, compat.ErrorResponse):
        return first.error.code >= 500 and _says_dead(str(first.error.message), str(first.error.type))
    text = first[0] if isinstance(first, list) and first else first
    return isinstance(text, str) and text.startswith('data: {"error"') and _says_dead(text)


def _says_dead(*texts: str) -> bool:
    return any(word in text for word in compat.ENGINE_DEAD for text in texts)
