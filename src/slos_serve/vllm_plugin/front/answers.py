"""What the front end adds to answers: headers with the verdict, the refusal, and measured times in the usage chunk."""

from __future__ import annotations

import json
import math

from slos_serve.core.tiers import DROPPED, DROPPED_HEADER
from slos_serve.core.verdict import SENTENCES
from slos_serve.vllm_plugin.front.judged import Judged

Headers = list[tuple[bytes, bytes]]
_USAGE, _NO_CHOICES = b'"usage":{', b'"choices":[]'


def verdict_headers(judged: Judged) -> Headers:
    """Verdict, reason, targets and predictions; nothing for a request that was not judged."""
    answer = judged.answer
    if answer is None:
        return []
    found = [
        (b"x-slo-verdict", answer.verdict.encode("ascii")),
        (b"x-slo-reason", answer.reason.encode("ascii")),
        (b"x-slo-reason-text", SENTENCES[answer.reason].encode("ascii")),
    ]
    if answer.rank:
        found.append((b"x-slo-rank", str(answer.rank).encode("ascii")))
    seconds = {
        b"x-slo-target-ttft-ms": judged.ttft_target_s,
        b"x-slo-target-tpot-ms": None if judged.given is None else judged.given.slo.tpot_s,
        b"x-slo-target-e2e-ms": None if judged.call is None else judged.call.due_s - judged.arrival_s,
        b"x-slo-task-left-ms": None if judged.call is None else judged.call.task_due_s - judged.arrival_s,
        b"x-slo-predicted-ttft-ms": answer.ttft_s,
        b"x-slo-predicted-tpot-ms": answer.tpot_s,
        b"x-slo-predicted-start-ms": answer.start_s,
    }
    told = [(name, value) for name, value in seconds.items() if value is not None and math.isfinite(value)]
    return [*found, *((name, f"{value * 1e3:.0f}".encode("ascii")) for name, value in told)]


def refusal(judged: Judged) -> tuple[int, Headers, bytes]:
    """Status, headers and body of a refusal, in OpenAI's error shape."""
    assert judged.refusal is not None and judged.answer is not None and judged.slo_class is not None
    status, wait_s = judged.refusal
    said = SENTENCES[judged.answer.reason].removesuffix(".")
    message = f"class {judged.slo_class.name!r} is full now: {said[0].lower()}{said[1:]}. Ask again in {wait_s} s."
    kind = "rate_limit_error" if status == 429 else "service_unavailable"
    body = json.dumps({"error": {"message": message, "type": kind, "param": "slo_class", "code": status}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode("ascii")),
        (b"retry-after", str(wait_s).encode("ascii")),
        (DROPPED_HEADER.encode("ascii"), DROPPED.encode("ascii")),
        (b"x-slo-class", judged.slo_class.name.encode("ascii")),
        *verdict_headers(judged),
    ]
    return status, headers, body


def with_measured(part: bytes, judged: Judged) -> bytes:
    """A part of a stream; the chunk with the final usage also gets what was promised and measured."""
    if _USAGE not in part or _NO_CHOICES not in part:
        return part
    return b"\n\n".join(_measured(event, judged) for event in part.split(b"\n\n"))


def _measured(event: bytes, judged: Judged) -> bytes:
    if not event.startswith(b"data: {") or _USAGE not in event or _NO_CHOICES not in event:
        return event
    try:
        chunk = json.loads(event.removeprefix(b"data: "))
        tokens = int(chunk["usage"]["completion_tokens"])
        chunk["usage"]["slo"] = measured(judged, tokens)
    except (ValueError, KeyError, TypeError):
        return event
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode("ascii")


def measured(judged: Judged, output_tokens: int) -> dict[str, object]:
    """What was promised, predicted and measured at this server; times in milliseconds."""
    answer, slo_class = judged.answer, judged.slo_class
    found: dict[str, object] = {"class": None if slo_class is None else slo_class.name}
    if answer is not None:
        found |= {"verdict": answer.verdict, "reason": answer.reason, "rank": answer.rank}
    held_to = judged.given or slo_class
    target_tpot_s = math.inf if held_to is None else held_to.slo.tpot_s
    first_s, last_s = judged.first_s, judged.last_s
    ttft_s = None if first_s is None else first_s - judged.arrival_s
    tpot_s = None
    if first_s is not None and last_s is not None and output_tokens > 1:
        tpot_s = (last_s - first_s) / (output_tokens - 1)
    times = {
        "ttft_ms": ttft_s,
        "target_ttft_ms": judged.ttft_target_s,
        "predicted_ttft_ms": None if answer is None else answer.ttft_s,
        "tpot_ms": tpot_s,
        "target_tpot_ms": target_tpot_s,
        "predicted_tpot_ms": None if answer is None else answer.tpot_s,
        "predicted_start_ms": None if answer is None else answer.start_s,
    }
    return found | {
        name: round(value * 1e3, 1) for name, value in times.items() if value is not None and math.isfinite(value)
    }
