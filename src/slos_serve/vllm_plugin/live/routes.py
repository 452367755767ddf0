"""``/slo`` and ``/slo/state``: the live page and the document that it reads.

The page is one file without anything from elsewhere; a content security policy holds it to that. Where the server has
API keys both routes want one: as ``Authorization: Bearer KEY``, or as the password that a browser asks for. vLLM runs
its middleware outside its own authentication, so the key is checked here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files

from slos_serve.vllm_plugin.api_keys import CHALLENGE, KeyDigests, browser_key
from slos_serve.vllm_plugin.asgi import RawHeaders, Scope, Send
from slos_serve.vllm_plugin.live.state import LiveState, Watch

PAGE_PATH, STATE_PATH = "/slo", "/slo/state"
LIVE_PATHS = (PAGE_PATH, STATE_PATH)


class LiveRoutes:
    """Answers GET and HEAD on both routes.

    Args:
        state: what is shown.
        watch: told that somebody looks.
        keys: keys of the server; empty for none.
    """

    def __init__(self, state: LiveState, watch: Watch, keys: Sequence[str] = ()) -> None:
        self.state = state
        self.watch = watch
        self._keys = KeyDigests.of(keys) if keys else None
        self._page = page()
        self._page_headers = page_headers(self._page)

    async def __call__(self, scope: Scope, path: str, send: Send) -> None:
        """Answer one request for ``path``."""
        if self._keys is not None and not self._keys.accept(browser_key(scope)):
            await _answer(scope, send, 401, [(b"www-authenticate", CHALLENGE), _TEXT], b"send a key of this server\n")
        elif path == PAGE_PATH:
            await _answer(scope, send, 200, self._page_headers, self._page)
        else:
            self.watch.looked()
            await _answer(scope, send, 200, STATE_HEADERS, json.dumps(self.state.document()).encode("ascii"))


_TEXT = (b"content-type", b"text/plain; charset=utf-8")
STATE_HEADERS = [
    (b"content-type", b"application/json"),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
]


def page() -> bytes:
    """The page's text."""
    return files("slos_serve.vllm_plugin.live").joinpath("page.html").read_bytes()


def page_headers(text: bytes) -> RawHeaders:
    """Its headers: only its own script and style run, and it asks only the server that it came from."""
    script, style = _hash(text, b"script"), _hash(text, b"style")
    policy = (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", policy.encode("ascii")),
        (b"cache-control", b"no-store"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    ]


def _hash(text: bytes, tag: bytes) -> str:
    found = re.search(b"<%s>(.*?)</%s>" % (tag, tag), text, re.DOTALL)
    assert found is not None
    return base64.b64encode(hashlib.sha256(found[1]).digest()).decode("ascii")


async def _answer(scope: Scope, send: Send, status: int, headers: RawHeaders, body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode("ascii"))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
