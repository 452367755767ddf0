"""What the front end adds to answers: headers with the verdict, the refusal, and measured times in the usage chunk."""

from __future__ import annotations

import json
import math

from slos_serve.core.tiers import DROPPED, DROPPED_HEADER
from slos_serve.core.told import tpot_between_s
from slos_serve.core.verdict import SENTENCES
from slos_serve.vllm_plugin.front.judged import Judged
from slos_serve.vllm_plugin.usage import with_usage

Headers = list[tuple[bytes, bytes]]


def verdict_headers(judged: Judged) -> Headers:
    """Verdict, reason, targets and predictions; nothing for a request that was not judged."""
    return [(name.encode("ascii"), value.encode("ascii")) for name, value in judged.told().headers().items()]


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
    """A part of a stream; the chunk with the final usage also gets what was promised and measured at this server."""
    ttft_s = math.inf if judged.first_s is None else judged.first_s - judged.arrival_s
    return with_usage(
        part, lambda tokens: judged.told().measured(ttft_s, tpot_between_s(judged.first_s, judged.last_s, tokens))
    )
