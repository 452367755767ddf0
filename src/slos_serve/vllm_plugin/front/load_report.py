"""The load report (ORCA) in the head of an answer, for balancers that send requests by it.

A balancer asks with ``endpoint-load-metrics-format: TEXT`` or ``JSON``. vLLM answers with its KV use and its queue, on
answers that are no streams. Ours says on streams too what a balancer would have to guess from those: how many more
requests could be promised, when a standard prompt would have its first token, and the pace of one more stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from slos_serve.vllm_plugin.asgi import Message, Send

if TYPE_CHECKING:
    from slos_serve.routing.headroom import Room

Headers = list[tuple[bytes, bytes]]
FORMAT_HEADER, HEADER = b"endpoint-load-metrics-format", b"endpoint-load-metrics"
TEXT, JSON = "TEXT", "JSON"
NAMED = "named_metrics"


def load_of(room: Room) -> dict[str, float]:
    """What a report says, by name."""
    return {
        "slos_serve_least_headroom_requests": room.least_headroom,
        "slos_serve_standard_ttft_seconds": room.standard_ttft_s,
        "slos_serve_next_tpot_seconds": room.next_tpot_s,
    }


def wanted_format(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """``TEXT`` or ``JSON``, as a request asks; ``None`` when it does not."""
    for name, value in headers:
        if name.lower() == FORMAT_HEADER:
            found = value.decode("latin-1").strip().upper()
            return found if found in (TEXT, JSON) else None
    return None


def reporting(send: Send, wanted: str | None, load: Mapping[str, float]) -> Send:
    """A ``send`` that adds ``load`` to the head of an answer that is no error."""
    if wanted is None or not load:
        return send

    async def with_report(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            message = {**message, "headers": with_load(list(message.get("headers", ())), wanted, load)}
        await send(message)

    return with_report


def with_load(headers: Headers, wanted: str, load: Mapping[str, float]) -> Headers:
    """Headers with one load report: vLLM's, where there is one, and ours in it."""
    given = next((value.decode("latin-1") for name, value in headers if name.lower() == HEADER), "")
    rest = given.partition(" ")[2].strip()
    if wanted == JSON:
        report = json.loads(rest) if rest else {}
        report[NAMED] = {**report.get(NAMED, {}), **load}
        text = json.dumps(report)
    else:
        ours = [f"{NAMED}.{name}={value}" for name, value in load.items()]
        text = ", ".join([rest, *ours] if rest else ours)
    kept = [(name, value) for name, value in headers if name.lower() != HEADER]
    return [*kept, (HEADER, f"{wanted} {text}".encode("latin-1"))]
