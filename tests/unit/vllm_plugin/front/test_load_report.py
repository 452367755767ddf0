"""The load report in the head of an answer: asked for, added to vLLM's, left alone otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slos_serve.routing.headroom import Room
from slos_serve.vllm_plugin.asgi import Message
from slos_serve.vllm_plugin.front.load_report import Headers, load_of, reporting, wanted_format
from tests.unit.routing.fleet import loaded
from tests.unit.vllm_plugin.front.builders import desk

LOAD = {"slos_serve_least_headroom_requests": 3.0, "slos_serve_standard_ttft_seconds": 0.25}
KIND = (b"content-type", b"text/event-stream")
OURS_TEXT = "named_metrics.slos_serve_least_headroom_requests=3.0, named_metrics.slos_serve_standard_ttft_seconds=0.25"


async def answered(wanted: str | None, headers: Headers, status: int = 200) -> Headers:
    """The head of an answer that had these headers."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    out = reporting(send, wanted, LOAD)
    await out({"type": "http.response.start", "status": status, "headers": headers})
    await out({"type": "http.response.body", "body": b"x"})
    assert sent[1]["body"] == b"x"
    found: Headers = sent[0]["headers"]
    return found


@pytest.mark.parametrize(
    ("value", "found"), [(b"text", "TEXT"), (b" JSON ", "JSON"), (b"BIN", None), (b"", None), (None, None)]
)
def test_the_format_is_read(value: bytes | None, found: str | None) -> None:
    headers = [] if value is None else [(b"Endpoint-Load-Metrics-Format", value)]
    assert wanted_format(headers) == found


async def test_a_stream_has_a_report() -> None:
    assert await answered("TEXT", [KIND]) == [KIND, (b"endpoint-load-metrics", f"TEXT {OURS_TEXT}".encode())]
    report = (await answered("JSON", [KIND]))[1][1].decode()
    assert json.loads(report.removeprefix("JSON ")) == {"named_metrics": LOAD}


async def test_vllms_report_is_kept_in_one_header_with_ours() -> None:
    text = await answered("TEXT", [(b"endpoint-load-metrics", b"TEXT named_metrics.num_requests_waiting=2.0"), KIND])
    given = f"TEXT named_metrics.num_requests_waiting=2.0, {OURS_TEXT}"
    assert text == [KIND, (b"endpoint-load-metrics", given.encode())]
    theirs = b'JSON {"named_metrics": {"num_requests_waiting": 2.0}}'
    (_, value), *rest = await answered("JSON", [(b"endpoint-load-metrics", theirs)])
    assert not rest
    assert json.loads(value[5:]) == {"named_metrics": {"num_requests_waiting": 2.0, **LOAD}}


async def test_nothing_is_added_where_nobody_asks_or_an_error_is_answered() -> None:
    assert await answered(None, [KIND]) == [KIND]
    assert await answered("TEXT", [KIND], status=429) == [KIND]


def test_the_desk_tells_its_load_once_it_knows_it(tmp_path: Path) -> None:
    front = desk(tmp_path)
    front._post_gauges()
    assert front.load == {}
    front = desk(tmp_path, loaded(3))
    front._post_gauges()
    assert front.load.keys() == load_of(Room(1.0, 1.0, 1.0)).keys() and min(front.load.values()) > 0.0
