"""What one endpoint holds at most: bytes of a body (413) and requests in progress (503 with ``Retry-After``).

Both bound memory. Without them one client could send a body of any size, and a burst would wait in Ray's queues, which
have no end, until its clients are gone.
"""

from __future__ import annotations

from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slos_serve.ray_serve.answers import error_response, retry_after
from slos_serve.vllm_plugin.middleware import SLO_PATHS

MAX_REQUEST_MIB = 64.0
MAX_REQUESTS = 4096
BUSY_RETRY_S = 2.0


class _TooLargeError(Exception):
    """A body went over its bound while it was read."""


class Bounds:
    """ASGI middleware.

    Args:
        app: what it guards.
        max_bytes: of a request's body.
        max_requests: in progress at a time on the paths that generate.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_requests: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_requests = max_requests
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        if _declared_length(scope) > self._max_bytes:
            await self._refuse_size(scope, receive, send)
            return
        if not scope["path"].rstrip("/").endswith(SLO_PATHS):
            await self._serve(scope, receive, send)
            return
        if self._num_requests >= self._max_requests:
            message = f"{self._num_requests} requests are in progress here, the most there may be; ask again later"
            refusal = error_response(503, message, "service_unavailable", headers=retry_after(BUSY_RETRY_S))
            await refusal(scope, receive, send)
            return
        self._num_requests += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self._num_requests -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and count the bytes: a body need not say how long it is."""
        size = 0
        begun = False

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise _TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            if size > self._max_bytes and not begun:
                return  # FastAPI answers 400 when a body cannot be read; the answer is 413
            begun = True
            await send(message)

        with suppress(_TooLargeError):
            await self._app(scope, counted, noted)
        if size > self._max_bytes and not begun:
            await self._refuse_size(scope, receive, send)

    async def _refuse_size(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"a request may hold at most {self._max_bytes} bytes"
        refusal = error_response(413, message, "invalid_request_error", "body", {"connection": "close"})
        await refusal(scope, receive, send)


def _declared_length(scope: Scope) -> int:
    """By its header; 0 where none tells. A server has checked that it is a number."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
    return 0
