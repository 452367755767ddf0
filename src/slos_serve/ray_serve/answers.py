"""What clients are told besides tokens: headers, refusals, errors in the OpenAI shape."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace

from starlette.responses import JSONResponse

from slos_serve.core.tiers import DROPPED, DROPPED_HEADER
from slos_serve.core.verdict import SENTENCES, Verdict, Why
from slos_serve.ray_serve.ticket import RequestRefusedError, Ticket

LOST = "replica_lost"
# Refused clients come back spread over half of their wait, and over 2 s at least: the header holds whole seconds.
RETRY_SPREAD = 0.5
LEAST_SPREAD_S = 2.0


def answer_headers(ticket: Ticket) -> dict[str, str]:
    """What became of the request; the class and its numbers are added by the middleware."""
    decision = ticket.decision
    if decision is None:
        return {}
    found = {**ticket.told().headers(), "x-slo-attempts": str(ticket.attempts)}
    return found if decision.replica is None else {**found, "x-slo-replica": decision.replica}


def refusal(refused: RequestRefusedError, ticket: Ticket) -> JSONResponse:
    """429, or 503 where the class says so, in the OpenAI shape, with when to ask again."""
    asked, reason = ticket.asked, Why(refused.reason)
    told = retry_after(refused.retry_after_s)
    wait_s = told["retry-after"]
    due_ms = (asked.ttft_due_s - asked.arrival_s) * 1000.0
    promise = ", ".join(
        f"{name} {value:.0f} ms" for name, value in (("TTFT", due_ms), ("TPOT", asked.tpot_s * 1e3)) if value < math.inf
    )
    message = (
        f"class {ticket.slo_class or 'custom'!r} ({promise}; {asked.prompt_tokens} prompt tokens) cannot be attained "
        f"now. {SENTENCES[reason]} Retryable; ask again in {wait_s} s."
    )
    headers = {
        **told,
        DROPPED_HEADER: DROPPED,
        "x-slo-class": ticket.slo_class or "custom",
        **replace(ticket.told(), verdict=Verdict.REJECTED, reason=reason).headers(),
    }
    return error_response(ticket.refused_status, message, "rate_limit_error", "slo_class", headers)


def retry_after(least_s: float, uniform: Callable[[float, float], float] = random.uniform) -> dict[str, str]:
    """When to ask again: not before ``least_s``, and not all at the same moment."""
    least_s = least_s if math.isfinite(least_s) else 1.0
    latest_s = least_s + max(RETRY_SPREAD * least_s, LEAST_SPREAD_S)
    return {"retry-after": str(max(math.ceil(uniform(least_s, latest_s)), 1))}


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
