"""The middleware against a small ASGI application that records what reaches it."""

from __future__ import annotations

import json
import logging
import sys
import tracemalloc
from collections.abc import MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slos_serve import vllm_plugin as plugin
from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, ClassSet, single_stage
from slos_serve.vllm_plugin.asgi import Receive, Scope, Send
from slos_serve.vllm_plugin.middleware import SLOMiddleware

CHAT = single_stage("chat", SLO(ttft_slowdown=5.0, tpot_ms=100.0))
CODE = single_stage("code", SLO(ttft_ms=1500.0, tpot_ms=50.0))
CLASSES = ClassSet({"chat": CHAT, "code": CODE})
WITH_DEFAULT = ClassSet({"chat": CHAT, "code": CODE}, default="code")


class Wire:
    """One request on the wire: hands its chunks to the application and keeps what comes back."""

    def __init__(self, chunks: list[bytes], *, hang_up: bool = False) -> None:
        last = len(chunks) - 1
        self._incoming: list[dict[str, Any]] = [
            {"type": "http.request", "body": chunk, "more_body": index < last or hang_up}
            for index, chunk in enumerate(chunks)
        ]
        self.sent: list[MutableMapping[str, Any]] = []
        self.reads = 0

    async def receive(self) -> dict[str, Any]:
        self.reads += 1
        return self._incoming.pop(0) if self._incoming else {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.sent[1]["body"])["error"]
        return found


class Engine:
    """Stands for vLLM: reads the whole body, then answers in two parts and waits for the client to hang up."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.calls = 0
        self.body = b""
        self.scope: Scope = {}
        self.after_body = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        self.scope = scope
        if scope["type"] == "lifespan":
            return
        while True:
            message = await receive()
            self.body += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})
        self.after_body = (await receive())["type"]

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def content_length(self) -> int:
        return int(dict(self.scope["headers"])[b"content-length"])


async def post(
    body: object,
    headers: dict[str, str] | None = None,
    *,
    classes: ClassSet = CLASSES,
    path: str = "/v1/chat/completions",
    engine: Engine | None = None,
    max_body_bytes: int = 10_000,
    chunk: int = 10_000,
    scope: dict[str, Any] | None = None,
) -> tuple[Wire, Engine]:
    engine = Engine() if engine is None else engine
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    wire = Wire([data[at : at + chunk] for at in range(0, max(len(data), 1), chunk)])
    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    raw += [(b"content-length", str(len(data)).encode()), (b"content-type", b"application/json")]
    asked = {"type": "http", "method": "POST", "path": path, "headers": raw, **(scope or {})}
    await SLOMiddleware(engine, classes, max_body_bytes)(asked, wire.receive, wire.send)
    return wire, engine


async def test_without_slo_the_request_passes_byte_for_byte() -> None:
    body = b'{ "model":"m",\n "prompt": "caf\\u00e9" , "vllm_xargs": {"other": 1.50}}'
    wire, engine = await post(body)
    assert engine.body == body
    assert engine.content_length == len(body)
    assert wire.headers == {"a": "b", "x-slo-class": "none"}
    assert [message.get("body") for message in wire.sent[1:]] == [b"one", b"two"]


async def test_the_default_class_is_announced_and_the_body_left_alone() -> None:
    body = b'{"prompt":  "x"}'
    wire, engine = await post(body, classes=WITH_DEFAULT)
    assert engine.body == body
    assert wire.headers["x-slo-class"] == "code"
    assert (wire.headers["x-slo-ttft-ms"], wire.headers["x-slo-tpot-ms"]) == ("1500", "50")


async def test_headers_move_into_the_body() -> None:
    headers = {"x-slo-class": "code", "x-llm-d-slo-ttft-ms": "700", "X-Session-ID": "s-1"}
    wire, engine = await post({"prompt": "é", "n": 2}, headers)
    assert engine.document == {
        "prompt": "é",
        "n": 2,
        "vllm_xargs": {"slo_class": "code", "slo_ttft_ms": 700, "session_id": "s-1"},
    }
    assert engine.content_length == len(engine.body)
    assert wire.headers["x-slo-class"] == "code"
    assert (wire.headers["x-slo-ttft-ms"], wire.headers["x-slo-tpot-ms"]) == ("700", "50")


async def test_a_header_counts_over_the_body_and_other_keys_stay() -> None:
    body = {"prompt": "x", "vllm_xargs": {"slo_class": "chat", "slo_tpot_ms": 80, "mine": [1, "a"]}}
    wire, engine = await post(body, {"x-slo-class": "code"})
    assert engine.document["vllm_xargs"] == {"slo_class": "code", "slo_tpot_ms": 80, "mine": [1, "a"]}
    assert wire.headers["x-slo-tpot-ms"] == "80"


async def test_body_fields_alone_are_checked_and_left_as_they_are() -> None:
    body = b'{"vllm_xargs":  {"slo_class": "chat"}}'
    wire, engine = await post(body)
    assert engine.body == body
    assert wire.headers["x-slo-class"] == "chat"
    assert wire.headers["x-slo-ttft-slowdown"] == "5"
    assert "x-slo-ttft-ms" not in wire.headers


async def test_none_takes_a_request_out_of_the_default_class() -> None:
    wire, engine = await post({"prompt": "x"}, {"x-slo-class": "none"}, classes=WITH_DEFAULT)
    assert engine.document["vllm_xargs"] == {"slo_class": "none"}
    assert wire.headers["x-slo-class"] == "none"


async def test_numbers_work_without_any_class() -> None:
    wire, engine = await post({"prompt": "x"}, {"x-slo-tpot-ms": "33.5"}, classes=ClassSet())
    assert engine.document["vllm_xargs"] == {"slo_tpot_ms": 33.5}
    assert (wire.headers["x-slo-class"], wire.headers["x-slo-tpot-ms"]) == ("custom", "33.5")


async def test_a_session_alone_changes_nothing_without_an_slo() -> None:
    body = b'{"prompt":  "x"}'
    _, engine = await post(body, {"x-session-id": "s"})
    assert engine.body == body
    _, engine = await post(body, {"x-session-id": "s"}, classes=WITH_DEFAULT)
    assert engine.document["vllm_xargs"] == {"session_id": "s"}


@pytest.mark.parametrize(
    ("headers", "xargs", "param"),
    [
        ({"x-slo-class": "gold"}, None, "x-slo-class"),
        ({"x-slo-ttft-ms": "fast"}, None, "x-slo-ttft-ms"),
        ({"x-llm-d-slo-tpot-ms": "-1"}, None, "x-llm-d-slo-tpot-ms"),
        ({}, {"slo_class": "gold"}, "slo_class"),
        ({}, {"slo_class": 5}, "slo_class"),
        ({}, {"slo_tpot_ms": "50"}, "slo_tpot_ms"),
        ({}, {"slo_tpot_ms": True}, "slo_tpot_ms"),
        ({}, {"slo_tpot": 50}, "vllm_xargs"),
        ({"x-slo-tpot-ms": "50"}, {"slo_tpot_ms": -1}, "slo_tpot_ms"),
    ],
)
async def test_a_bad_field_is_refused_in_the_openai_shape(headers: dict[str, str], xargs: object, param: str) -> None:
    wire, engine = await post({"prompt": "x", "vllm_xargs": xargs}, headers)
    assert engine.calls == 0
    assert wire.status == 400
    assert set(wire.error) == {"message", "type", "param", "code"}
    assert (wire.error["type"], wire.error["param"], wire.error["code"]) == ("invalid_request_error", param, 400)
    assert "allowed:" in wire.error["message"]
    assert wire.headers["content-length"] == str(len(wire.sent[1]["body"]))


async def test_a_key_hidden_behind_an_escape_is_still_checked() -> None:
    wire, _ = await post(b'{"vllm_xargs": {"\\u0073lo_class": "gold"}}')
    assert wire.status == 400


async def test_messages_errors_have_anthropics_shape() -> None:
    wire, _ = await post({}, {"x-slo-class": "gold"}, path="/v1/messages")
    assert json.loads(wire.sent[1]["body"])["type"] == "error"


@pytest.mark.parametrize(("fields", "status"), [({"vllm_xargs": None}, 200), ({"model": None}, 400)])
async def test_messages_take_slos_where_vllm_takes_xargs_there(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, None], status: int
) -> None:
    protocol = SimpleNamespace(AnthropicMessagesRequest=SimpleNamespace(model_fields=fields))
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.anthropic.protocol", protocol)
    wire, _ = await post({}, {"x-slo-class": "code"}, path="/v1/messages")
    assert wire.status == status
    wire, _ = await post({}, path="/v1/messages")
    assert wire.status == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"slo_"', b"\xff\xfe", b"[" * 9_000, b'{"vllm_xargs": [1]}', b"1" * 5000]
)
async def test_a_body_that_is_no_request_is_left_to_vllm(body: bytes) -> None:
    wire, engine = await post(body, {"x-slo-class": "code"}, engine=Engine(status=400))
    assert engine.body == body
    assert wire.headers == {"a": "b"}, "nothing was applied, so nothing is announced"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/batch",
        "/inference/v1/generate",
        "/invocations",
        "/cohere/v2/chat",
        "/v1/audio/transcriptions",
        "/v1/embeddings",
        "/pooling/",
    ],
)
@pytest.mark.parametrize("header", ["x-slo-class", "X-SLO-TTFT-MS", "x-llm-d-slo-tpot-ms"])
async def test_an_slo_header_is_refused_on_a_route_where_it_cannot_act(path: str, header: str) -> None:
    wire, engine = await post(b"raw", {header: "5"}, path=path)
    assert engine.calls == 0
    assert (wire.status, wire.error["param"]) == (400, header)
    assert f"not applied on {path.rstrip('/')}" in wire.error["message"]
    assert "/v1/completions" in wire.error["message"]
    wire, engine = await post(b"raw", {"x-session-id": "s"}, path=path)
    assert engine.body == b"raw", "without an SLO header nothing is looked into"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/completions"), ("POST", "/tokenize"), ("POST", "/v1/chat/completions/render")],
)
async def test_routes_without_output_are_not_touched(method: str, path: str) -> None:
    wire, engine = await post(b"raw", {"x-slo-class": "gold"}, path=path, scope={"method": method})
    assert engine.body == b"raw"
    assert wire.headers == {"a": "b"}


async def test_a_root_path_is_taken_off() -> None:
    wire, _ = await post({}, {"x-slo-class": "gold"}, path="/llm/v1/completions", scope={"root_path": "/llm"})
    assert wire.status == 400


async def test_a_body_in_many_chunks_arrives_whole() -> None:
    wire, engine = await post({"prompt": "x" * 500}, {"x-slo-class": "code"}, chunk=7)
    assert engine.document["prompt"] == "x" * 500
    assert wire.headers["x-slo-class"] == "code"


async def test_a_hang_up_after_the_body_reaches_vllm() -> None:
    wire, engine = await post({"prompt": "x"}, {"x-slo-class": "code"})
    assert engine.after_body == "http.disconnect"
    assert wire.reads == 2


async def test_a_hang_up_within_the_body_ends_quietly() -> None:
    engine, wire = Engine(), Wire([b'{"pro'], hang_up=True)
    scope: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await SLOMiddleware(engine, CLASSES)(scope, wire.receive, wire.send)
    assert engine.calls == 0
    assert wire.sent == []


async def test_a_body_too_large_passes_unread_or_is_refused_when_headers_ask_for_an_slo() -> None:
    large = json.dumps({"prompt": "x" * 300}).encode()
    wire, engine = await post(large, max_body_bytes=100, chunk=60)
    assert engine.body == large
    assert wire.headers == {"a": "b"}
    wire, engine = await post(large, max_body_bytes=100)
    assert engine.body == large
    wire, engine = await post(large, {"x-slo-class": "code"}, max_body_bytes=100, chunk=60)
    assert engine.calls == 0
    assert (wire.status, wire.error["param"]) == (413, "body")


def nested_lists(num_bytes: int) -> bytes:
    """The dearest JSON for json.loads: half a second and 200 MiB for 8 MiB of it."""
    return b'{"messages":[' + b"[]," * (num_bytes // 3) + b'0],"vllm_xargs": {"slo_class":"code"}}'


async def test_a_large_body_is_spliced_without_being_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []
    loads = json.loads

    def counted(data: bytes) -> Any:
        loaded.append(len(data))
        return loads(data)

    monkeypatch.setattr(json, "loads", counted)
    body = nested_lists(4_000_000)
    tracemalloc.start()
    try:
        wire, engine = await post(body, {"x-slo-tpot-ms": "40"}, max_body_bytes=2**22, chunk=65_536)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert wire.headers["x-slo-tpot-ms"] == "40"
    assert engine.body == body[:-1].replace(b'{"slo_class":"code"}', b'{"slo_class": "code", "slo_tpot_ms": 40}') + b"}"
    assert engine.content_length == len(engine.body)
    assert sum(loaded) < 100, "only vllm_xargs became objects"
    assert peak < 12 * len(body), "copies of the body, no objects of its values"


@pytest.mark.parametrize(
    "body", [b"{}", b" {\n} ", b'{"a": "}{"}', b'{"vllm_xargs":null,"a":[{}]}', b'{"vllm_xargs": {}}']
)
async def test_fields_are_spliced_into_any_object(body: bytes) -> None:
    _, engine = await post(body, {"x-slo-class": "code"})
    assert engine.document == {**json.loads(body), "vllm_xargs": {"slo_class": "code"}}


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"\\ud800"'])
async def test_what_only_python_reads_is_read_while_it_is_short(value: str) -> None:
    _, engine = await post(f'{{"temperature": {value}}}'.encode(), {"x-slo-class": "code"})
    assert engine.document["vllm_xargs"] == {"slo_class": "code"}
    long = f'{{"temperature": {value}, "prompt": "{"x" * 70_000}"}}'.encode()
    wire, engine = await post(long, {"x-slo-class": "code"}, max_body_bytes=100_000)
    assert engine.calls == 0
    assert (wire.status, wire.error["param"]) == (400, "body")
    wire, engine = await post(long, max_body_bytes=100_000)
    assert engine.body == long


async def test_long_xargs_are_refused() -> None:
    body = {"vllm_xargs": {"slo_class": "code", "mine": "x" * 70_000}}
    wire, engine = await post(body, max_body_bytes=100_000)
    assert (wire.status, wire.error["param"], engine.calls) == (400, "vllm_xargs", 0)


@pytest.mark.parametrize(
    ("headers", "xargs", "param"),
    [
        ({"x-slo-class": "chat"}, {"slo_ttft_ms": 1, "slo_tpot_ms": 5}, "slo_ttft_ms"),
        ({"x-slo-class": "chat", "x-slo-tpot-ms": "5"}, None, "slo_tpot_ms"),
        ({"x-slo-tpot-ms": "5"}, {"slo_ttft_ms": 1}, "slo_ttft_ms"),
    ],
)
async def test_clients_can_be_kept_from_numbers_of_their_own(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], xargs: object, param: str
) -> None:
    monkeypatch.setenv("SLOS_SERVE_CUSTOM_NUMBERS", "0")
    wire, engine = await post({"vllm_xargs": xargs}, headers)
    assert (wire.status, wire.error["param"], engine.calls) == (400, param, 0)
    assert "name of a class only" in wire.error["message"]
    wire, _ = await post({"vllm_xargs": {"slo_class": "chat"}}, {"x-slo-class": "code"})
    assert wire.headers["x-slo-class"] == "code"
    wire, engine = await post({"prompt": "x" * 300}, max_body_bytes=100)
    assert (wire.status, engine.calls) == (413, 0), "a body that is not looked into might bring numbers"


async def test_the_body_limit_is_4_mib_or_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    large = b'{"prompt": "' + b"x" * 2**22 + b'"}'
    for given, status in (("", 413), ("5", 200)):
        monkeypatch.setenv("SLOS_SERVE_MAX_BODY_MIB", given)
        engine, wire = Engine(), Wire([large])
        headers = [(b"x-slo-class", b"code")]
        scope: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        await SLOMiddleware(engine, CLASSES)(scope, wire.receive, wire.send)
        assert wire.status == status
    monkeypatch.setenv("SLOS_SERVE_MAX_BODY_MIB", "much")
    with pytest.raises(InvalidFieldError, match=r"SLOS_SERVE_MAX_BODY_MIB.*'much'.*MiB"):
        SLOMiddleware(Engine(), CLASSES)


async def test_classes_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text("classes: {fast: {tpot_ms: 5}}")
    monkeypatch.setenv("SLOS_SERVE_CLASSES", str(path))
    engine, wire = Engine(), Wire([b'{"vllm_xargs": {"slo_class": "fast"}}'])
    scope: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await SLOMiddleware(engine)(scope, wire.receive, wire.send)
    assert wire.headers["x-slo-class"] == "fast"
    path.write_text("classes: {fast: {tpot: 5}}")
    with pytest.raises(InvalidFieldError, match=r"classes\.yaml:1"):
        SLOMiddleware(engine)


@pytest.mark.parametrize(
    ("scheduler", "warned"), [(None, True), ("slos_serve.vllm_plugin.SLOScheduler", False), ("other.Scheduler", True)]
)
async def test_says_at_start_when_nobody_would_keep_the_slos(
    caplog: pytest.LogCaptureFixture, scheduler: str | None, warned: bool
) -> None:
    application = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(scheduler_cls=scheduler)))
    engine, wire = Engine(), Wire([])
    with caplog.at_level(logging.WARNING):
        await SLOMiddleware(engine, CLASSES)({"type": "lifespan", "app": application}, wire.receive, wire.send)
    assert engine.calls == 1
    assert ("--scheduler-cls" in caplog.text) is warned


def test_importing_the_package_names_both_parts_without_vllm() -> None:
    assert plugin.SLOMiddleware is SLOMiddleware
    with pytest.raises(AttributeError, match="Nothing"):
        _ = plugin.Nothing
