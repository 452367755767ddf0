"""The OpenAI endpoint: Ray Serve LLM's own, with tickets for the router, second attempts and answers that say what was
promised.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi import Request
from ray.exceptions import RayActorError
from ray.serve import metrics
from ray.serve.llm.ingress import OpenAiIngress
from starlette.responses import JSONResponse, Response, StreamingResponse

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import NO_SLO_CLASS
from slos_serve.ray_serve import compat
from slos_serve.ray_serve.prompts import PromptCounter, context_tokens
from slos_serve.ray_serve.ticket import RequestRefusedError, Ticket
from slos_serve.ray_serve.ticket_office import TicketOffice, session_of
from slos_serve.routing.warm_up import warm_up_routing
from slos_serve.vllm_plugin.config import PluginConfig

MAX_ATTEMPTS = 3
HEALTH_TIMEOUT_S = 1.5
GENERATING = ("chat", "completions")
REJECTED = "rejected-saturated"
LOST = "replica_lost"
# Ray needs some seconds to notice and replace a replica; refused clients come back spread over half of their wait.
UNAVAILABLE_RETRY_S = 4.0
RETRY_SPREAD = 1.5
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
        self._routed = metrics.Counter(
            "slos_serve_routed", "Requests by class and what became of them.", tag_keys=("slo_class", "verdict")
        )

    async def health(self) -> Response:
        """200 when a replica answers, 503 while none does."""
        handle = next(iter(self._default_serve_handles.values()))
        try:
            await asyncio.wait_for(handle.check_health.remote(), HEALTH_TIMEOUT_S)
        except Exception as error:
            fault = f"no replica answers ({type(error).__name__})"
            return error_response(503, fault, "service_unavailable", headers=retry_after(UNAVAILABLE_RETRY_S))
        return Response()

    async def _process_llm_request(self, body: Any, call_method: str, raw_request: Request | None = None) -> Response:
        """Serve a chat or completion request; whatever else there is goes its usual way."""
        if call_method not in GENERATING or raw_request is None:
            answer: Response = await super()._process_llm_request(body, call_method, raw_request)
            return answer
        try:
            ticket = self._office.ticket(body, session_of(raw_request.headers))
        except InvalidFieldError as error:
            return error_response(400, str(error), "invalid_request_error", error.field)
        async with compat.router_request_timeout(compat.HTTP_TIMEOUT_S):
            try:
                first, rest = await self._first_part(body, call_method, raw_request, ticket)
            except RequestRefusedError as refused:
                self._count(ticket)
                return refusal(refused, ticket)
            except RayActorError as error:
                fault = type(error).__name__
                headers = {**answer_headers(ticket), **retry_after(UNAVAILABLE_RETRY_S)}
                return error_response(503, lost_message(ticket, fault), LOST, headers=headers)
        self._count(ticket)
        if isinstance(first, compat.ErrorResponse):
            kind = first.error
            return JSONResponse({"error": kind.model_dump()}, kind.code, headers=answer_headers(ticket))
        if isinstance(first, compat.NON_STREAMING_RESPONSE_TYPES):
            if first.usage is not None:
                ticket.output_tokens = first.usage.completion_tokens or 0
            return JSONResponse(first.model_dump(), headers=answer_headers(ticket))
        stream = events(first, rest, ticket)
        return StreamingResponse(stream, media_type="text/event-stream", headers=answer_headers(ticket))

    def _count(self, ticket: Ticket) -> None:
        verdict = answer_headers(ticket).get("x-slo-verdict", NO_SLO_CLASS)
        self._routed.inc(tags={"slo_class": ticket.slo_class or NO_SLO_CLASS, "verdict": verdict})

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
        call = getattr(handle, call_method).remote(compat.sent_form(body), info, ticket=ticket)
        async for part in call:
            yield part


async def events(first: Any, rest: AsyncIterator[Any], ticket: Ticket) -> AsyncGenerator[str, None]:
    """The answer as server-sent events; one that is cut off ends with an error event."""
    done = False
    part = first
    try:
        while not is_loss(part):
            text = compat.server_sent(part)
            ticket.output_tokens += text.count("data: {")
            done = text.rstrip().endswith("data: [DONE]")
            yield text
            part = await anext(rest)
        yield lost_event(ticket, "EngineDeadError")
    except StopAsyncIteration:
        pass
    except Exception as fault:
        if not is_lost_replica(fault):
            _logger.exception("slos-serve: a stream broke off")
        yield lost_event(ticket, type(fault).__name__)
    if not done:
        yield "data: [DONE]\n\n"


def answer_headers(ticket: Ticket) -> dict[str, str]:
    """What became of the request; the class and its numbers are added by the middleware."""
    decision = ticket.decision
    if decision is None:
        return {}
    verdict = str(decision.verdict) if ticket.asked.has_slo else NO_SLO_CLASS
    found = {"x-slo-verdict": verdict, "x-slo-reason": str(decision.reason), "x-slo-attempts": str(ticket.attempts)}
    return found if decision.replica is None else {**found, "x-slo-replica": decision.replica}


def refusal(refused: RequestRefusedError, ticket: Ticket) -> JSONResponse:
    """429 in the OpenAI shape, with when to ask again."""
    asked = ticket.asked
    told = retry_after(refused.retry_after_s)
    wait_s = told["retry-after"]
    due_ms = (asked.ttft_due_s - asked.arrival_s) * 1000.0
    promise = ", ".join(
        f"{name} {value:.0f} ms" for name, value in (("TTFT", due_ms), ("TPOT", asked.tpot_s * 1e3)) if value < math.inf
    )
    message = (
        f"class {ticket.slo_class or 'custom'!r} ({promise}; {asked.prompt_tokens} prompt tokens) cannot be attained "
        f"now: {refused.reason}. Retryable; ask again in {wait_s} s."
    )
    headers = {
        **told,
        "x-llm-d-request-dropped-reason": REJECTED,
        "x-slo-class": ticket.slo_class or "custom",
        "x-slo-verdict": "reject",
        "x-slo-reason": refused.reason,
    }
    return error_response(429, message, "rate_limit_error", "slo_class", headers)


def retry_after(least_s: float, uniform: Callable[[float, float], float] = random.uniform) -> dict[str, str]:
    """When to ask again: not before ``least_s``, and not all at the same moment."""
    least_s = least_s if math.isfinite(least_s) else 1.0
    return {"retry-after": str(max(math.ceil(uniform(least_s, RETRY_SPREAD * least_s)), 1))}


def error_response(
    status: int, message: str, kind: str, field: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error as the OpenAI API shapes it."""
    error = {"message": message, "type": kind, "param": field, "code": status}
    return JSONResponse({"error": error}, status, headers=headers)


def lost_event(ticket: Ticket, fault: str) -> str:
    """The last event but one of a stream that was cut off."""
    error = {"message": lost_message(ticket, fault), "type": LOST, "param": None, "code": 502}
    return f"data: {json.dumps({'error': error})}\n\n"


def lost_message(ticket: Ticket, fault: str) -> str:
    """What a client is told when its replica is lost and its request cannot be repeated."""
    where = "before the first token" if ticket.output_tokens == 0 else f"after {ticket.output_tokens} tokens"
    return f"the replica that served this request was lost {where} ({fault}); ask again"


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
