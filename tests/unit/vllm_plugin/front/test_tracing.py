"""Spans of requests: what they say, whose trace they continue, and that a fault of theirs harms no request."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NoOpTracer

from slos_serve.vllm_plugin.front.tracing import RequestSpans, open_spans
from tests.unit.routing.fleet import loaded
from tests.unit.vllm_plugin.front.builders import Server, desk

TRACE, CALLER = 0x0123456789ABCDEF0123456789ABCDEF, 0x0123456789ABCDEF


def from_caller(flags: str = "01") -> tuple[bytes, bytes]:
    """The header of a client that traces; ``flags`` 00 where it keeps no sample of this trace."""
    return (b"Traceparent", f"00-{TRACE:032x}-{CALLER:016x}-{flags}".encode())


class Traced:
    """A server that traces, and its spans."""

    def __init__(self, folder: Path, running: int) -> None:
        self._exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("test")
        self.server = Server(desk(folder, loaded(running)))
        self.server.front.spans = RequestSpans(self.tracer)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def attributes(self) -> dict[str, Any]:
        (span,) = self.spans
        assert span.name == "slo_request"
        return dict(span.attributes or {})


async def test_a_span_says_what_the_client_was_told(tmp_path: Path) -> None:
    traced = Traced(tmp_path, running=5)
    _, headers, _ = await traced.server.ask("chat")
    found = traced.attributes()
    assert (found["slo.class"], found["slo.verdict"], found["slo.reason"]) == ("chat", "admitted", "fits")
    assert found["slo.target_ttft_ms"] == 1000.0 and found["slo.target_tpot_ms"] == 100.0
    assert f"{found['slo.predicted_ttft_ms']:.0f}" == headers["x-slo-predicted-ttft-ms"]
    assert found["slo.ttft_ms"] == 0.0, "the clock of this server stands"


async def test_a_refusal_which_vllm_never_sees_has_a_span_too(tmp_path: Path) -> None:
    traced = Traced(tmp_path, running=5)
    status, _, _ = await traced.server.ask("strict", prompt_tokens=40_000)
    assert status == 429
    assert traced.attributes()["slo.verdict"] == "rejected" and "slo.ttft_ms" not in traced.attributes()


async def test_a_request_without_a_promise_says_so(tmp_path: Path) -> None:
    traced = Traced(tmp_path, running=0)
    await traced.server.ask(None)
    assert traced.attributes()["slo.verdict"] == "no-slo" and "slo.class" not in traced.attributes()


async def test_it_continues_the_clients_trace_and_vllms_span_comes_under_it(tmp_path: Path) -> None:
    traced = Traced(tmp_path, running=0)
    traced.server.headers = [(b"host", b"x"), from_caller(), (b"tracestate", b"a=b")]
    await traced.server.ask("chat")
    (span,) = traced.spans
    assert span.context is not None and span.parent is not None
    assert (span.context.trace_id, span.parent.span_id) == (TRACE, CALLER)
    named = f"00-{TRACE:032x}-{span.context.span_id:016x}-01".encode()
    assert traced.server.scopes[0]["headers"] == [(b"host", b"x"), (b"traceparent", named), (b"tracestate", b"a=b")]


async def test_under_an_instrumented_server_it_comes_under_that_servers_span(tmp_path: Path) -> None:
    traced = Traced(tmp_path, running=0)
    traced.server.headers = [from_caller()]
    with traced.tracer.start_as_current_span("server") as outer:
        await traced.server.ask("chat")
    span = next(one for one in traced.spans if one.name == "slo_request")
    assert span.parent is not None and span.parent.span_id == outer.get_span_context().span_id


async def test_a_trace_that_its_client_does_not_sample_is_not_exported(tmp_path: Path) -> None:
    traced = Traced(tmp_path, running=0)
    traced.server.headers = [from_caller("00")]
    status, _, _ = await traced.server.ask("chat")
    assert status == 200 and traced.spans == []
    assert traced.server.scopes[0]["headers"][-1][1].endswith(b"-00")


@pytest.mark.parametrize("part", ["_begin", "_end"])
async def test_a_fault_costs_the_span_and_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    traced = Traced(tmp_path, running=0)
    if part == "_begin":
        monkeypatch.setattr(traced.tracer, "start_span", lambda *_: 1 / 0)
    else:
        monkeypatch.setattr("opentelemetry.sdk.trace.Span.set_attribute", lambda *_: 1 / 0)
    logger = logging.getLogger("vllm.slos_serve")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.ERROR, logger=logger.name)
    for _ in range(2):
        status, headers, body = await traced.server.ask("chat")
        assert status == 200 and headers["x-slo-verdict"] == "admitted" and b"2" in body
    assert len(traced.spans) == (0 if part == "_begin" else 2), "a span that was begun ends"
    assert sum("failed to trace" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:4318/v1/traces"])
def test_only_where_vllm_traces(endpoint: str | None) -> None:
    config = SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=endpoint))
    assert (open_spans(config) is not None) is (endpoint is not None)
    assert open_spans(SimpleNamespace()) is None


async def test_without_a_tracer_the_clients_headers_stay(tmp_path: Path) -> None:
    traced = Traced(tmp_path, running=0)
    traced.server.front.spans = RequestSpans(NoOpTracer())
    traced.server.headers = [(b"host", b"x"), from_caller()]
    status, _, _ = await traced.server.ask("chat")
    assert status == 200 and from_caller()[1][:50] in traced.server.scopes[0]["headers"][-1][1]
