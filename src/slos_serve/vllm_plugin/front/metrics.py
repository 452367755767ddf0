"""Metrics of the front end: what clients were told, how often the engine did the same, and how much room there is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from slos_serve.core.slo import NO_SLO_CLASS
from slos_serve.core.verdict import Verdict, Why
from slos_serve.files.class_file import CUSTOM_CLASS
from slos_serve.routing.headroom import Room
from slos_serve.vllm_plugin.metrics import COMMON, PREDICTION_BUCKETS, EngineLabels

RELOADS = ("taken", "kept_old")
KV_KINDS = ("total", "used", "forecast_peak")


class FrontMetrics:
    """The series of one API process.

    Args:
        class_names: names of the class file; the only free label values.
        labels: what every series is labelled with.
        registry: where the series are registered; by default one of its own.
    """

    def __init__(
        self, class_names: Iterable[str], labels: EngineLabels, registry: CollectorRegistry | None = None
    ) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._names = (labels.model_name, labels.engine)
        self._classes = tuple(dict.fromkeys((*class_names, CUSTOM_CLASS, NO_SLO_CLASS)))
        self._answers = self._made(
            Counter, "answers", "Requests by what their client was told.", "slo_class", "verdict", "reason"
        )
        self._agreement = self._made(
            Counter, "verdict_agreement", "Requests by what the client was told and the engine did.", "told", "did"
        )
        self._ttft = self._made(
            Histogram,
            "ttft_over_prediction",
            "Measured over predicted time to first token of admitted requests.",
            buckets=PREDICTION_BUCKETS,
        ).labels(*self._names)
        text = "Changed class files, by whether they were taken or the old classes were kept."
        self._reloads = self._made(Counter, "class_file_reloads", text, "result")
        for result in RELOADS:
            self._reloads.labels(*self._names, result)
        mode = "livesum"
        text = "Requests of the class's mean length that could be promised now."
        self._headroom = self._made(Gauge, "headroom_requests", text, "slo_class", multiprocess_mode=mode)
        text = "Tokens of the longest prompt of the class that could be promised now."
        self._prefill = self._made(Gauge, "headroom_prefill_tokens", text, "slo_class", multiprocess_mode=mode)
        text = "The smallest headroom of any class."
        self._least = self._made(Gauge, "least_headroom_requests", text, multiprocess_mode=mode).labels(*self._names)
        text = "Predicted time to first token of a 512-token prompt that comes now."
        self._standard = self._made(Gauge, "standard_ttft_seconds", text, multiprocess_mode=mode).labels(*self._names)
        text = "Predicted time per output token of one more stream."
        self._next = self._made(Gauge, "next_tpot_seconds", text, multiprocess_mode=mode).labels(*self._names)
        text = "KV blocks: in all, used now, and at the forecast peak of what is promised."
        self._kv = self._made(Gauge, "kv_blocks", text, "kind", multiprocess_mode=mode)
        self.kv(0, 0, 0)
        for name in self._classes:
            if name != NO_SLO_CLASS:
                self._answers.labels(*self._names, name, Verdict.ADMITTED, Why.FITS)
                self.headroom(name, 0, 0)
        words = (Verdict.ADMITTED, Verdict.SECOND_BEST, Verdict.BEST_EFFORT)
        for told in words:
            for did in words:
                self._agreement.labels(*self._names, told, did)

    def answered(self, slo_class: str | None, verdict: Verdict, reason: Why) -> None:
        """A client was told what becomes of its request."""
        self._answers.labels(*self._names, self._label(slo_class), verdict, reason).inc()

    def class_file_read(self, result: str) -> None:
        """The class file has changed; ``result`` is one of :data:`RELOADS`."""
        self._reloads.labels(*self._names, result).inc()

    def compared(self, told: Verdict, did: Verdict) -> None:
        """A request ended of which the client had been told a verdict."""
        self._agreement.labels(*self._names, told, did).inc()

    def first_token(self, measured_s: float, predicted_s: float) -> None:
        """The first token of an admitted request came."""
        if predicted_s > 0.0:
            self._ttft.observe(measured_s / predicted_s)

    def headroom(self, slo_class: str, requests: int, prefill_tokens: int) -> None:
        """So many typical requests of a class, or one with so long a prompt, could be promised now."""
        self._headroom.labels(*self._names, slo_class).set(requests)
        self._prefill.labels(*self._names, slo_class).set(prefill_tokens)

    def to_routers(self, room: Room) -> None:
        """What routers of others score servers by: one series each, without a class."""
        self._least.set(room.least_headroom)
        self._standard.set(room.standard_ttft_s)
        self._next.set(room.next_tpot_s)

    def kv(self, total: int, used: int, forecast_peak: int) -> None:
        """KV blocks of the engine."""
        for kind, blocks in zip(KV_KINDS, (total, used, forecast_peak), strict=True):
            self._kv.labels(*self._names, kind).set(blocks)

    def _label(self, slo_class: str | None) -> str:
        if slo_class is None:
            return NO_SLO_CLASS
        return slo_class if slo_class in self._classes else CUSTOM_CLASS

    def _made(self, kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
        return kind(f"slos_serve:{name}", text, [*COMMON, *labels], registry=self.registry, **options)
