"""Whatever headers and ``vllm_xargs`` a client sends, the middleware answers or passes on; it never raises."""

from __future__ import annotations

import asyncio
import contextlib
import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, ClassSet, single_stage
from slos_serve.vllm_plugin.asgi import Message, Receive, Scope, Send
from slos_serve.vllm_plugin.middleware import SLOMiddleware
from slos_serve.vllm_plugin.slo_args import HEADER_KEYS, SESSION_HEADER, SLO_KEYS, from_extra_args

CLASSES = ClassSet({"chat": single_stage("chat", SLO(ttft_ms=900.0, tpot_ms=50.0))}, default="chat")
NAMES = st.sampled_from([*HEADER_KEYS, SESSION_HEADER, "content-type", "x-slo-verdict"])
VALUES = st.one_of(
    st.sampled_from(["chat", "none", "1", "0", "-1", "1e9", "999999999", "nan", "", " 5 ", "٣", "1.0000001"]),
    st.text(st.characters(max_codepoint=255), max_size=80),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
XARGS = st.dictionaries(st.sampled_from([*SLO_KEYS, "slo_x", "session_id", "other"]), JSON, max_size=4) | JSON


async def _answer(headers: list[tuple[bytes, bytes]], body: bytes) -> int:
    """Status of the answer to one request; 200 where the application got it."""
    sent: list[Message] = []

    async def application(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    await SLOMiddleware(application, CLASSES, 100_000)(scope, receive, send)
    return int(sent[0]["status"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(NAMES, VALUES), max_size=4), XARGS, st.binary(max_size=20))
@example([("x-slo-class", "\xff")], {}, b"")
def test_every_request_gets_an_answer(pairs: list[tuple[str, str]], xargs: object, noise: bytes) -> None:
    headers = [(name.encode("ascii"), value.encode("latin-1", errors="ignore")) for name, value in pairs]
    body = json.dumps({"model": "m", "vllm_xargs": xargs}).encode()
    for data in (body, body + noise, noise):
        assert asyncio.run(_answer(headers, data)) in (200, 400, 413)


@settings(max_examples=300, deadline=None)
@given(XARGS)
def test_xargs_are_read_or_refused(xargs: object) -> None:
    if not isinstance(xargs, dict):
        return
    with contextlib.suppress(InvalidFieldError):
        from_extra_args(xargs).applied(CLASSES)
