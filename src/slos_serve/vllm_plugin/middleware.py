"""ASGI middleware for ``--middleware slos_serve.vllm_plugin.SLOMiddleware``: SLO headers in, class applied out.

Headers do not reach vLLM's engine by themselves, so they are moved into ``vllm_xargs`` of the body. SLO fields of both
are checked here, where a client can still be told (HTTP 400 in the OpenAI error shape, naming the field); the response
says which class and numbers were applied, and in vLLM's own server what was decided
(:mod:`slos_serve.vllm_plugin.front.desk`). SLO headers on a route where they cannot act (audio, embeddings, batches)
are refused with 400. A request that gives no SLO header reaches vLLM byte for byte as it came, and bodies that cannot
be read (no JSON, no object, too large) are left to vLLM to judge. Responses are never buffered, and a client that
hangs up still reaches vLLM.

The classes are those of the file that ``SLOS_SERVE_CLASSES`` names, read again when it changes
(:mod:`slos_serve.vllm_plugin.front.reload`); without one only a request's own numbers count. vLLM runs this middleware
outside its own authentication, so nothing secret may go into its answers, and a body is looked into only up to a limit
and without being loaded (:mod:`slos_serve.vllm_plugin.body_fields`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import NO_SLO_CLASS, ClassSet, SLOClass
from slos_serve.core.tasks import task_of
from slos_serve.core.trust import Denied, DeniedError
from slos_serve.vllm_plugin.asgi import App, Message, RawHeaders, Receive, Scope, Send
from slos_serve.vllm_plugin.body_fields import body_fields
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.front.load_report import reporting, wanted_format
from slos_serve.vllm_plugin.gate import Gate, Granted
from slos_serve.vllm_plugin.hangup import on_hangup
from slos_serve.vllm_plugin.live.routes import LIVE_PATHS, LiveRoutes
from slos_serve.vllm_plugin.slo_args import HEADER_KEYS, SESSION_KEY

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.class_versions import ClassVersion
    from slos_serve.vllm_plugin.front.desk import FrontDesk
    from slos_serve.vllm_plugin.front.explain import ExplainRoute

EXPLAIN_PATH = "/slo/explain"
MESSAGES_PATH = "/v1/messages"
API_KEY_ENV = "VLLM_API_KEY"
SLO_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", MESSAGES_PATH)
# Routes that compute no output: an SLO on them means nothing, and a proxy may set its headers on every request.
PROMISELESS_SUFFIXES = ("/tokenize", "/detokenize", "/render", "/derender", "/count_tokens", "/cancel")
_SLO_HEADERS = frozenset(name.encode("ascii") for name in HEADER_KEYS)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Body:
    """A request body as read so far, and whether more of it is to come."""

    data: bytes
    more: bool = False


class SLOMiddleware:
    """Pure ASGI 3 application around ``app``; serves any number of requests at a time.

    Args:
        app: what it wraps.
        classes: classes served; by default those of the file named by ``SLOS_SERVE_CLASSES``.
        max_body_bytes: largest body that is looked into; by default as ``SLOS_SERVE_MAX_BODY_MIB`` says, else 4 MiB.

    Raises:
        InvalidFieldError: the class file or a variable cannot be used; the server does not start.
    """

    def __init__(
        self,
        app: App,
        classes: ClassSet | None = None,
        max_body_bytes: int | None = None,
    ) -> None:
        self._app = app
        config = PluginConfig.of_middleware(os.environ)
        self._max_body_bytes = config.max_body_bytes if max_body_bytes is None else max_body_bytes
        self._classes = config.classes if classes is None else classes
        self._gate = Gate(config, time.monotonic)
        self._front: FrontDesk | None = None
        self._live: LiveRoutes | None = None
        self._explained: ExplainRoute | None = None
        self._paths = frozenset(path for path in SLO_PATHS if path != MESSAGES_PATH or _messages_take_xargs())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; see the module's docstring."""
        if scope["type"] == "lifespan":
            _warn_without_scheduler(scope)
            self._front = _front_of(scope)
            self._live = _live_of(scope, self._front)
            self._explained = _explained_of(scope, self._front)
        if scope["type"] != "http" or scope["method"] != "POST":
            if not await self._answered_here(scope, send):
                await self._app(scope, receive, send)
            return
        if _path(scope) not in self._paths:
            await self._pass_promiseless(scope, receive, send)
            return
        body = await _read(receive, self._max_body_bytes)
        if body is None:
            return  # the client hung up before its request was whole: nobody is left to answer
        version = None if self._front is None else self._front.version
        classes = self._classes if version is None else version.classes
        try:
            if version is not None:
                self._gate.follow(version.trust, version.tiers)
            headers = self._gate.headers(scope["headers"])
            if len(body.data) > self._max_body_bytes:
                await self._pass_unread(scope, body, receive, send, asks=any(key != SESSION_KEY for key in headers))
                return
            wanted = self._gate.wants_body(headers, body.data, classes)
            fields = body_fields(body.data) if wanted else None
            granted = self._gate.granted(scope["headers"], fields, classes)
        except InvalidFieldError as error:
            await self._refuse(scope, send, 400, error.field, str(error))
            return
        except DeniedError as denied:
            status = 403 if denied.retry_after_s is None else 429
            await self._refuse(scope, send, status, denied.param, str(denied), denied.retry_after_s)
            return
        data = body.data if fields is None else fields.with_xargs(granted.added, granted.dropped)
        if data is not body.data:
            scope = {**scope, "headers": _with_length(scope["headers"], len(data))}
        await self._serve(scope, _replay(data, receive), self._refunding(send, granted), granted, version)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, granted: Granted, version: ClassVersion | None
    ) -> None:
        """Have vLLM answer; the head of its answer says what was applied and decided."""
        announced = [*applied_headers(granted.slo_class)]
        if granted.denied is not None:
            announced.append(denied_header(granted.denied))
        if self._front is None:
            await self._app(scope, receive, _announcing(send, announced))
            return
        from slos_serve.vllm_plugin.front.exchange import judged_exchange  # noqa: PLC0415 - loads the routing kernels

        send = reporting(send, wanted_format(scope["headers"]), self._front.load)
        judged = self._front.begin(granted.slo_class, version)
        with self._front.traced(judged, scope) as inner:
            await judged_exchange(self._front, judged, announced, lambda out: self._app(inner, receive, out), send)

    async def _answered_here(self, scope: Scope, send: Send) -> bool:
        """Answer the plug-in's own pages; False for any other request."""
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return False
        path = _path(scope)
        if self._explained is not None and path == EXPLAIN_PATH:
            await self._explained(scope, send)
        elif self._live is not None and path in LIVE_PATHS:
            await self._live(scope, path, send)
        else:
            return False
        return True

    def _refunding(self, send: Send, granted: Granted) -> Send:
        """A ``send`` that gives a tenant's budget back when the server refuses its request."""
        if granted.charged is None:
            return send

        async def refunding(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._gate.refund(granted)
            await send(message)

        return refunding

    async def _refuse(
        self, scope: Scope, send: Send, status: int, field: str, message: str, retry_after_s: float | None = None
    ) -> None:
        await _refuse(send, status, field, message, _path(scope) == MESSAGES_PATH, retry_after_s)

    async def _pass_promiseless(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A route that SLOs do not reach: refused when its headers ask for one and it computes output."""
        given = next((name.decode("ascii") for name, _ in scope["headers"] if name.lower() in _SLO_HEADERS), None)
        if given is None or _path(scope).endswith(PROMISELESS_SUFFIXES):
            await self._app(scope, receive, send)
            return
        message = (
            f"{given}: not applied on {_path(scope)}; allowed: no SLO header here, or one of {sorted(self._paths)}"
        )
        await self._refuse(scope, send, 400, given, message)

    async def _pass_unread(self, scope: Scope, body: _Body, receive: Receive, send: Send, *, asks: bool) -> None:
        """A body too large to look into: vLLM gets it whole, unless an SLO would be lost or might be forbidden."""
        if asks or self._gate.reads_all:
            what = "" if self._gate.reads_all else "with SLO headers "
            message = f"a request {what}may hold at most {self._max_body_bytes} bytes"
            await self._refuse(scope, send, 413, "body", message)
            return
        await self._app(scope, _replay(body.data, receive, more_body=body.more), send)


def _warn_without_scheduler(scope: Scope) -> None:
    """Say at start when SLOs would be accepted and then ignored, because vLLM runs another scheduler."""
    args = getattr(getattr(scope.get("app"), "state", None), "args", None)
    if args is not None and "slos_serve" not in str(getattr(args, "scheduler_cls", None)):
        _logger.warning(
            "SLOs are checked but not kept: vLLM runs its own scheduler; "
            "add --scheduler-cls slos_serve.vllm_plugin.SLOScheduler"
        )


def _front_of(scope: Scope) -> FrontDesk | None:
    """Judges requests in vLLM's own server; ``None`` elsewhere, as under Ray Serve, where the ingress does it."""
    app = scope.get("app")
    if not hasattr(getattr(app, "state", None), "engine_client"):
        return None
    from slos_serve.vllm_plugin.front.client import open_front  # noqa: PLC0415 - loads the routing kernels

    front = open_front(app)
    on_hangup(lambda: None if front is None else front.read_file_again())
    return front


def _explained_of(scope: Scope, front: FrontDesk | None) -> ExplainRoute | None:
    """The answer to ``GET /slo/explain``, behind the server's keys; ``None`` where nothing is judged."""
    if front is None:
        return None
    from slos_serve.vllm_plugin.front.explain import ExplainRoute  # noqa: PLC0415 - loads the routing kernels

    return ExplainRoute(front, _keys_of(scope))


def _keys_of(scope: Scope) -> list[str]:
    """API keys of vLLM's own server; empty for none."""
    given = getattr(scope["app"].state.args, "api_key", None) or [os.environ.get(API_KEY_ENV)]
    return [key for key in given if key]


def _live_of(scope: Scope, front: FrontDesk | None) -> LiveRoutes | None:
    """The live page of vLLM's own server, behind the server's keys; ``None`` where it is off or nothing is judged."""
    if front is None or front.live is None:
        return None
    return LiveRoutes(front.live, front.watch, _keys_of(scope))


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(str(scope.get("root_path", ""))).rstrip("/")


def _messages_take_xargs() -> bool:
    """Whether this vLLM reads ``vllm_xargs`` on ``/v1/messages``; where it does not, an SLO there would be lost."""
    module = sys.modules.get("vllm.entrypoints.anthropic.protocol")
    request = getattr(module, "AnthropicMessagesRequest", None)
    return request is None or "vllm_xargs" in request.model_fields


async def _read(receive: Receive, max_bytes: int) -> _Body | None:
    """The body, or as much of it as first passes ``max_bytes``; ``None`` when the client hangs up before its end."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        more = message.get("more_body", False)
        if not more or size > max_bytes:
            return _Body(b"".join(parts), more)


def _with_length(headers: RawHeaders, length: int) -> RawHeaders:
    kept = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode("ascii"))]


def _replay(data: bytes, receive: Receive, more_body: bool = False) -> Receive:
    """A ``receive`` that hands out ``data`` and then goes on with the original, so a hang-up reaches vLLM."""
    pending = True

    async def replayed() -> Message:
        nonlocal pending
        if pending:
            pending = False
            return {"type": "http.request", "body": data, "more_body": more_body}
        return await receive()

    return replayed


def _announcing(send: Send, announced: RawHeaders) -> Send:
    """A ``send`` that adds what was applied to the head of an answer (not to an error: nothing was applied then)."""

    async def announcing(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            message = {**message, "headers": [*message.get("headers", ()), *announced]}
        await send(message)

    return announcing


def denied_header(why: Denied) -> tuple[bytes, bytes]:
    """Response header that says why a request is served without the promise that it asked for."""
    return b"x-slo-denied", why.encode("ascii")


def applied_headers(applied: SLOClass | None) -> RawHeaders:
    """Response headers for the class a request got. A slowdown SLO depends on the prompt, so it is told as it is."""
    if applied is None:
        return [(b"x-slo-class", NO_SLO_CLASS.encode("ascii"))]
    slo, task = applied.slo, task_of(applied)
    numbers = {
        "x-slo-ttft-ms": slo.ttft_ms,
        "x-slo-ttft-slowdown": slo.ttft_slowdown if slo.ttft_ms is None else None,
        "x-slo-tpot-ms": slo.tpot_ms,
        "x-slo-e2e-ms": slo.e2e_ms,
        "x-slo-task-ms": None if task is None else task.task_ms,
    }
    told = [(name.encode("ascii"), _plain(value)) for name, value in numbers.items() if value is not None]
    return [(b"x-slo-class", applied.name.encode("ascii")), *told]


def _plain(value: float) -> bytes:
    return f"{value:.6f}".rstrip("0").rstrip(".").encode("ascii")


_KINDS = {403: "permission_error", 429: "rate_limit_error"}


async def _refuse(
    send: Send, status: int, field: str, message: str, anthropic: bool, retry_after_s: float | None
) -> None:
    error: dict[str, object] = {
        "message": message,
        "type": _KINDS.get(status, "invalid_request_error"),
        "param": field,
        "code": status,
    }
    body = json.dumps({"type": "error", "error": error} if anthropic else {"error": error}).encode("ascii")
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode("ascii")),
    ]
    if retry_after_s is not None:
        headers.append((b"retry-after", str(max(math.ceil(retry_after_s), 1)).encode("ascii")))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
