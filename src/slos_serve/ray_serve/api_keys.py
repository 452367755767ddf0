"""API keys of the Ray endpoint: 401 without one of them.

Ray stores what a deployment is built with, shows part of it on its dashboard and writes runtime environments to its
logs. So no key is handed to Ray: a deployment gets salted digests, and a request's key is digested and compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from slos_serve.core.errors import InvalidFieldError
from slos_serve.vllm_plugin.api_keys import CHALLENGE, KeyDigests, bearer_key, browser_key
from slos_serve.vllm_plugin.live.routes import LIVE_PATHS

API_KEYS_ENV = "SLOS_SERVE_API_KEYS"
VLLM_API_KEY_ENV = "VLLM_API_KEY"
# Without a key, for probes: says only whether a replica answers.
OPEN_PATHS = ("/health",)


class ApiKeyRequired:
    """ASGI middleware: what brings no known ``Authorization: Bearer KEY`` is answered 401."""

    def __init__(self, app: ASGIApp, keys: KeyDigests) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        on_page = scope["type"] == "http" and _path(scope) in LIVE_PATHS
        key_of = browser_key if on_page else bearer_key
        if self._is_open(scope) or self._keys.accept(key_of(scope)):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        error = {
            "message": "send 'Authorization: Bearer KEY' with a key of this server",
            "type": "authentication_error",
            "param": "authorization",
            "code": 401,
        }
        challenge = CHALLENGE.decode("ascii") if on_page else "Bearer"
        refusal = JSONResponse({"error": error}, 401, headers={"www-authenticate": challenge})
        await refusal(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        if scope["type"] not in ("http", "websocket"):
            return True  # the application's own start and end
        return scope.get("method") == "OPTIONS" or _path(scope) in OPEN_PATHS


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(str(scope.get("root_path", ""))).rstrip("/")


def take_keys(environment: MutableMapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys that the environment names, which are taken out of it: processes started later do not inherit them.

    Raises:
        InvalidFieldError: ``SLOS_SERVE_API_KEYS`` is no JSON list of strings (its value is not shown).
    """
    several = environment.pop(API_KEYS_ENV, "")
    one = environment.pop(VLLM_API_KEY_ENV, "")
    if not several:
        return (one,) if one else ()
    try:
        keys = json.loads(several)
    except ValueError:
        keys = None
    if not isinstance(keys, list) or not all(isinstance(key, str) and key for key in keys):
        raise InvalidFieldError(API_KEYS_ENV, "a value", "a JSON list of keys")
    return tuple(keys)
