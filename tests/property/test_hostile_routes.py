"""Whatever comes to the plug-in's own routes or stands in a class file, there is an answer below 500, or a typed error.

A short part runs in ``make test``, 20,000 cases with ``pytest -m long tests/property/test_hostile_routes.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.core.errors import InvalidFieldError
from slos_serve.files.class_file import parse_classes
from slos_serve.vllm_plugin.asgi import Message, Receive, Scope, Send
from slos_serve.vllm_plugin.front.explain import ExplainRoute
from slos_serve.vllm_plugin.live.routes import LiveRoutes
from slos_serve.vllm_plugin.live.state import Watch
from slos_serve.vllm_plugin.middleware import SLOMiddleware
from tests.unit.routing.fleet import loaded
from tests.unit.vllm_plugin.front.builders import desk

SHORT, LONG = 100, 7000  # cases of each of the three tests
TEXT = st.text(st.characters(max_codepoint=255), max_size=40)
PATHS = st.sampled_from(["/slo", "/slo/", "/slo/state", "/slo/explain", "/slo/explain/"])
QUERY_KEYS = st.sampled_from(["class", "prompt_tokens", "max_tokens", "expected_tokens", "other"])
QUERY_VALUES = (
    st.sampled_from(["chat", "strict", "batch", "none", "1", "0", "-1", "512", "1e9", "9" * 30, "nan", ""]) | TEXT
)
QUERIES = st.lists(st.tuples(QUERY_KEYS, QUERY_VALUES), max_size=5).map(
    lambda pairs: "&".join(f"{key}={quote(value)}" for key, value in pairs).encode("ascii")
) | st.binary(max_size=60)
HEADERS = st.lists(st.tuples(st.sampled_from(["authorization", "accept", "x-slo-class"]), TEXT), max_size=3)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
FIELDS = st.sampled_from(
    ["ttft_ms", "tpot_ms", "ttft_slowdown", "stages", "weight", "when_full", "max_stall_ms", "last_round", "x"]
)
CLASSES = st.dictionaries(
    st.text(max_size=8), st.dictionaries(FIELDS, SCALARS | st.lists(SCALARS, max_size=2), max_size=4)
)
FILES = st.dictionaries(
    st.sampled_from(["classes", "default_class", "scheduler", "tenants", "other"]), CLASSES | SCALARS, max_size=3
).map(lambda given: yaml.safe_dump(given)) | st.text(max_size=80)


class Site:
    """The middleware of a server whose engine has published its state."""

    def __init__(self, folder: Path, keys: tuple[str, ...] = ()) -> None:
        front = desk(folder, loaded(5))
        assert front.live is not None
        self.middleware = SLOMiddleware(self._app)
        self.middleware._live = LiveRoutes(front.live, Watch(None), keys)
        self.middleware._explained = ExplainRoute(front, keys)

    async def _app(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def get(self, method: str, path: str, query: bytes, headers: list[tuple[str, str]]) -> tuple[int, bytes]:
        """Status and body of an answer."""
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        told = [(name.encode("ascii"), value.encode("latin-1", errors="ignore")) for name, value in headers]
        scope = {"type": "http", "method": method, "path": path, "query_string": query, "headers": told}
        asyncio.run(self.middleware(scope, receive, send))
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        return int(sent[0]["status"]), bytes(sent[1]["body"])


def open_routes(site: Site, cases: int) -> None:
    """Every request of a server without keys gets a page, a document or a named mistake."""

    @settings(max_examples=cases)
    @given(st.sampled_from(["GET", "HEAD"]), PATHS, QUERIES, HEADERS)
    def check(method: str, path: str, query: bytes, headers: list[tuple[str, str]]) -> None:
        status, body = site.get(method, path, query, headers)
        assert status in (200, 400)
        if method == "GET" and not path.rstrip("/").endswith("/slo"):
            json.loads(body)

    check()


def locked_routes(site: Site, cases: int) -> None:
    """A server with keys tells nothing to anybody who has none."""

    @settings(max_examples=cases)
    @given(PATHS, QUERIES, HEADERS)
    def check(path: str, query: bytes, headers: list[tuple[str, str]]) -> None:
        status, body = site.get("GET", path, query, headers)
        assert status == 401 and b"chat" not in body

    check()


def class_files(cases: int) -> None:
    """A class file is read, or the error names what cannot be used."""

    @settings(max_examples=cases)
    @given(FILES)
    def check(text: str) -> None:
        with contextlib.suppress(InvalidFieldError):
            parse_classes(text, "classes.yaml")

    check()


@pytest.mark.parametrize("cases", [SHORT, pytest.param(LONG, marks=pytest.mark.long)])
def test_routes_of_a_server_without_keys(tmp_path: Path, cases: int) -> None:
    open_routes(Site(tmp_path), cases)


@pytest.mark.parametrize("cases", [SHORT, pytest.param(LONG, marks=pytest.mark.long)])
def test_routes_of_a_server_with_keys(tmp_path: Path, cases: int) -> None:
    locked_routes(Site(tmp_path, ("a key that nobody guesses",)), cases)


@pytest.mark.parametrize("cases", [SHORT, pytest.param(LONG, marks=pytest.mark.long)])
def test_class_files(cases: int) -> None:
    class_files(cases)
