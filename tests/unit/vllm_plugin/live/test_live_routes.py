"""The routes of the live page: what they answer, who may ask, and that the page brings everything itself."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slos_serve.core.verdict import Verdict, Why
from slos_serve.vllm_plugin.asgi import Message, Receive, Scope, Send
from slos_serve.vllm_plugin.live.routes import LiveRoutes, page
from slos_serve.vllm_plugin.live.state import LiveState, Watch
from slos_serve.vllm_plugin.middleware import SLOMiddleware
from tests.unit.vllm_plugin.front.builders import desk
from tests.unit.vllm_plugin.live.builders import CLASSES


class Answer:
    """What a client of the middleware gets."""

    def __init__(self, messages: list[Message]) -> None:
        self.status = int(messages[0]["status"])
        self.headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        self.body = b"".join(part["body"] for part in messages[1:])


class Site:
    """The middleware before an application that answers 404."""

    def __init__(self, routes: LiveRoutes | None) -> None:
        self.middleware = SLOMiddleware(self._app, CLASSES)
        self.middleware._live = routes

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"vllm's"})

    async def get(self, path: str, key: str | None = None, method: str = "GET", **scope: Any) -> Answer:
        messages: list[Message] = []

        async def send(message: Message) -> None:
            messages.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        headers = [] if key is None else [(b"Authorization", key.encode())]
        asked = {"type": "http", "method": method, "path": path, "headers": headers, **scope}
        await self.middleware(asked, receive, send)
        return Answer(messages)


def routes(keys: tuple[str, ...] = (), watched: Path | None = None) -> LiveRoutes:
    return LiveRoutes(LiveState("m", CLASSES), Watch(watched), keys)


async def test_the_page_and_its_state(tmp_path: Path) -> None:
    live = routes(watched=tmp_path / "w")
    live.state.told("chat", Verdict.ADMITTED, Why.FITS)
    site = Site(live)
    shown = await site.get("/slo")
    assert (shown.status, shown.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert shown.body == page() and int(shown.headers["content-length"]) == len(page())
    assert not (tmp_path / "w").exists()
    state = await site.get("/slo/state/")
    assert json.loads(state.body)["verdicts"][0]["slo_class"] == "chat"
    assert state.headers["cache-control"] == "no-store"
    assert (tmp_path / "w").exists(), "the engine core is told that somebody looks"
    assert (await site.get("/slo", method="HEAD")).body == b""
    assert (await site.get("/front/slo", root_path="/front")).status == 200
    for path in ("/slo/other", "/slos", "/"):
        assert (await site.get(path)).body == b"vllm's"


async def test_without_the_page_vllm_answers() -> None:
    assert (await Site(None).get("/slo")).status == 404


@pytest.mark.parametrize("path", ["/slo", "/slo/state"])
async def test_a_server_with_keys_wants_one(path: str) -> None:
    site = Site(routes(("sesame", "other")))
    refused = await site.get(path)
    assert refused.status == 401 and refused.headers["www-authenticate"].startswith("Basic ")
    for wrong in ("Bearer guess", "Basic !!!", "Basic " + base64.b64encode(b"sesame").decode(), "sesame", "Bearer "):
        assert (await site.get(path, wrong)).status == 401
    for right in ("Bearer sesame", "bearer other", "Basic " + base64.b64encode(b"me:sesame").decode()):
        assert (await site.get(path, right)).status == 200


async def test_only_the_pages_own_script_and_style_run() -> None:
    policy = (await Site(routes()).get("/slo")).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    for kind in ("script", "style"):
        assert re.search(kind + r"-src 'sha256-[\w+/]{43}='", policy)


def test_the_page_brings_everything_itself() -> None:
    text = page().decode()
    addresses = set(re.findall(r"https?://[^\s\"']+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a name of SVG, not fetched"
    assert not re.search(r"\b(src|srcset|@import|url\()\s*=?", text.replace("script-src", "")), "nothing is loaded"
    assert "innerHTML" not in text and " style=" not in text and " onclick" not in text


async def test_open_front_says_whether_there_is_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    front = desk(tmp_path)
    monkeypatch.setattr("slos_serve.vllm_plugin.middleware._front_of", lambda _: front)
    monkeypatch.setenv("VLLM_API_KEY", "sesame")

    async def start(api_key: list[str] | None) -> Site:
        site = Site(None)
        app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(api_key=api_key, scheduler_cls="slos_serve")))

        async def nothing(*_: Any) -> Any:
            return {"type": "lifespan.startup"}

        site.middleware._app = lambda *_: nothing()
        await site.middleware({"type": "lifespan", "app": app}, nothing, nothing)
        return site

    site = await start(None)
    assert (await site.get("/slo")).status == 401
    assert (await site.get("/slo", "Bearer sesame")).status == 200
    site = await start(["other"])
    assert (await site.get("/slo", "Bearer sesame")).status == 401, "as in vLLM, the command line counts"
    front.live = None
    site = await start(None)
    assert site.middleware._live is None
