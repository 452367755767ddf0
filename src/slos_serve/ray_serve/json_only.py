"""Requests whose body does not say that it is JSON are refused with 415, as vLLM's own server does."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from slos_serve.ray_serve.answers import error_response
from slos_serve.vllm_plugin.middleware import SLO_PATHS

JSON = "application/json"


class JsonOnly:
    """ASGI middleware for the paths that generate; FastAPI would try to put the raw bytes into its error and fail."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith(SLO_PATHS):
            given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"content-type"), "")
            if given.partition(";")[0].strip().lower() != JSON:
                message = f"content-type is {given or 'not given'!r}; send the body as {JSON}"
                refusal = error_response(415, message, "invalid_request_error", "content-type")
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)
