"""A span for each judged request where vLLM traces (``--otlp-traces-endpoint``): what was promised, and why.

The span ``slo_request`` lasts from the request's arrival to the end of its answer. It continues the trace that the
client's headers name, and vLLM's own ``llm_request`` is its child, because vLLM is handed our span as the caller's. Its
attributes are those of the usage chunk (:meth:`slos_serve.core.told.Told.measured`) with ``slo.`` before each name.
Sampling is what the client or the tracer of vLLM says. A fault of ours costs the span, never the request.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slos_serve.vllm_plugin.asgi import RawHeaders, Scope
from slos_serve.vllm_plugin.front.judged import Judged

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

SPAN_NAME = "slo_request"
_TRACE_HEADERS = (b"traceparent", b"tracestate")
_logger = logging.getLogger("vllm.slos_serve")


class RequestSpans:
    """Makes the spans of one server.

    Args:
        tracer: of the provider that vLLM has set up.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._failed = False

    @contextmanager
    def around(self, judged: Judged, scope: Scope) -> Iterator[Scope]:
        """Trace one request; yields the scope to serve it with, whose headers name the span."""
        span, inner = None, scope
        try:
            span = self._begin(scope["headers"])
            inner = {**scope, "headers": _naming(span, scope["headers"])}
        except Exception:
            self._log_once()
        try:
            yield inner
        finally:
            if span is not None:
                self._end(span, judged)

    def _begin(self, headers: RawHeaders) -> Span:
        """A span in the context that is current, as of an instrumented server, else in that of the client."""
        from opentelemetry.trace import SpanKind, get_current_span  # noqa: PLC0415 - only where vLLM traces

        context = None
        if not get_current_span().get_span_context().is_valid:
            given = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
            context = _propagator().extract(given)
        return self._tracer.start_span(SPAN_NAME, context, SpanKind.SERVER)

    def _end(self, span: Span, judged: Judged) -> None:
        try:
            ttft_s = math.inf if judged.first_s is None else judged.first_s - judged.arrival_s
            said = judged.told().measured(ttft_s, math.inf)
            for name, value in said.items():
                if value is not None:
                    span.set_attribute(f"slo.{name}", value if isinstance(value, (int, float)) else str(value))
        except Exception:
            self._log_once()
        finally:
            span.end()

    def _log_once(self) -> None:
        if not self._failed:
            self._failed = True
            _logger.exception("slos-serve: failed to trace a request (said once); it is served all the same.")


def open_spans(vllm_config: Any) -> RequestSpans | None:
    """Spans where vLLM exports its own; ``None`` elsewhere."""
    observed = getattr(vllm_config, "observability_config", None)
    if not getattr(observed, "otlp_traces_endpoint", None):
        return None
    from opentelemetry.trace import get_tracer  # noqa: PLC0415 - a dependency of vLLM, not of ours

    return RequestSpans(get_tracer("slos_serve"))


def _propagator() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415 - as above

    return TraceContextTextMapPropagator()


def _naming(span: Span, headers: RawHeaders) -> RawHeaders:
    """Request headers by which vLLM takes ``span`` for the caller's."""
    from opentelemetry.trace import set_span_in_context  # noqa: PLC0415 - as above

    named: dict[str, str] = {}
    _propagator().inject(named, set_span_in_context(span))
    if not named:  # no tracer: the client's own stay
        return headers
    kept = [(name, value) for name, value in headers if name.lower() not in _TRACE_HEADERS]
    return [*kept, *((name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items())]
