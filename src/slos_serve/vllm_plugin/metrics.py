"""Prometheus metrics made in the scheduler's process, beside vLLM's own on ``/metrics``.

The scheduler lives in vLLM's engine-core process and ``/metrics`` in the API server: the numbers cross over through the
files of ``PROMETHEUS_MULTIPROC_DIR``, which must be set before either starts (``slos-serve serve`` does). Every series
exists from the start, so a rate over it has a zero to count from; label values are the classes of the class file plus
``custom`` (a request's own numbers) and ``none``, never what a client wrote.

Each method costs about a microsecond a series that it touches; gauges are written only when they change.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from slos_serve.core.slo import NO_SLO_CLASS
from slos_serve.files.class_file import CUSTOM_CLASS

Verdict = Literal["admitted", "best_effort", "none"]
End = Literal["aborted", "error"]
VERDICTS: tuple[Verdict, ...] = ("admitted", "best_effort", "none")
STATES = ("undecided", "admitted", "best_effort")
# Ends that count neither as attained nor as broken: the client left in time, or the engine failed.
ENDS: tuple[End, ...] = ("aborted", "error")
FALLBACK_KINDS = ("exception", "overrun", "resting", "unserved", "empty_plan", "other")
PREEMPTION_KINDS = ("slo", "engine", "other")
PLAN_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05)
MULTIPROC_ENV = "PROMETHEUS_MULTIPROC_DIR"


class SchedulerMetrics:
    """The series of one scheduler.

    Args:
        class_names: names of the class file; the only free label values.
        registry: where the series are registered; by default one of its own. What ``/metrics`` shows comes through the
            files of ``PROMETHEUS_MULTIPROC_DIR`` whichever registry it is.
    """

    def __init__(self, class_names: Iterable[str], registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._classes = tuple(dict.fromkeys((*class_names, CUSTOM_CLASS, NO_SLO_CLASS)))
        promised = [name for name in self._classes if name != NO_SLO_CLASS]
        requests = self._counter(
            "requests",
            "Requests that ended, by what was decided.",
            "slo_class",
            "verdict",
        )
        attained = self._counter("attained", "Requests that kept every promise.", "slo_class")
        violations = self._counter("slo_violation", "Promises broken, by which.", "slo_class", "type")
        self._requests = {
            (name, verdict): requests.labels(name, verdict) for name in self._classes for verdict in (*VERDICTS, *ENDS)
        }
        self._attained = {name: attained.labels(name) for name in promised}
        self._ttft_violations = {name: violations.labels(name, "ttft") for name in promised}
        self._tpot_violations = {name: violations.labels(name, "tpot") for name in promised}
        self._set_up_steps()

    def _set_up_steps(self) -> None:
        fallbacks = self._counter("step_fallback", "Steps run in the engine's own order, by why.", "kind")
        preemptions = self._counter("preemptions", "Preemptions, by who asked for them.", "kind")
        self._fallbacks = {kind: fallbacks.labels(kind) for kind in FALLBACK_KINDS}
        self._preemptions = {kind: preemptions.labels(kind) for kind in PREEMPTION_KINDS}
        self._armed = Gauge(
            "slos_serve:armed",
            "1 while steps are planned; 0 once the plug-in has disarmed itself or plans nothing.",
            registry=self.registry,
            multiprocess_mode="livemin",
        )
        self._armed.set(1)
        self._dropped = Gauge(
            "slos_serve:telemetry_dropped",
            "Events and metric updates left out because the telemetry queue was full.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._invalid = self._counter(
            "invalid_slo_fields",
            "Requests served without a promise: unusable SLO fields.",
        )
        self._held = self._counter("held_decodes", "Decodes held out of a step because they were ahead.")
        self._plan = Histogram(
            "slos_serve:plan_seconds",
            "Time to plan a step.",
            buckets=PLAN_BUCKETS_S,
            registry=self.registry,
        )
        queue = Gauge(
            "slos_serve:queue_requests",
            "Requests in the engine, by queue and by what was decided.",
            ["queue", "verdict"],
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._queue = {
            (place, state): queue.labels(place, state) for place in ("running", "waiting") for state in STATES
        }
        self._queue_now = dict.fromkeys(self._queue, 0)
        self._correction = Gauge(
            "slos_serve:batch_time_correction",
            "Measured over predicted batch time, as the planner now corrects it.",
            registry=self.registry,
            multiprocess_mode="mostrecent",
        )
        self._correction_now = 1.0
        self._correction.set(1.0)

    def plan(self, seconds: float) -> None:
        """A step was planned in ``seconds``."""
        self._plan.observe(seconds)

    def fallback(self, kind: str, count: int = 1) -> None:
        """``count`` steps ran in the engine's own order; kinds beyond :data:`FALLBACK_KINDS` count as ``other``."""
        self._fallbacks.get(kind, self._fallbacks["other"]).inc(count)

    def armed(self, armed: bool) -> None:
        """Whether steps are planned."""
        self._armed.set(int(armed))

    def telemetry_dropped(self, count: int) -> None:
        """Calls that the telemetry queue has dropped so far."""
        self._dropped.set(count)

    def invalid_field(self) -> None:
        """A request's SLO fields could not be used, so it is served without a promise."""
        self._invalid.inc()

    def preempted(self, kind: str, count: int = 1) -> None:
        """``count`` requests lost their KV cache: ``slo`` (our plan), ``engine`` (vLLM's own)."""
        if count:
            self._preemptions.get(kind, self._preemptions["other"]).inc(count)

    def held(self, count: int) -> None:
        """``count`` decodes were held out of a step."""
        if count:
            self._held.inc(count)

    def queue(
        self,
        place: Literal["running", "waiting"],
        undecided: int,
        admitted: int,
        best_effort: int,
    ) -> None:
        """How many requests are in a queue now, by what was decided."""
        for state, count in zip(STATES, (undecided, admitted, best_effort), strict=True):
            key = (place, state)
            if self._queue_now[key] != count:
                self._queue_now[key] = count
                self._queue[key].set(count)

    def correction(self, factor: float) -> None:
        """The planner now multiplies predicted batch times by ``factor``; told in steps of one percent."""
        rounded = round(factor, 2)
        if rounded != self._correction_now:
            self._correction_now = rounded
            self._correction.set(rounded)

    def request_done(self, slo_class: str | None, verdict: Verdict, ttft_ok: bool, tpot_ok: bool) -> None:
        """A request ended by itself. One without promises (``none``) neither attains nor violates."""
        name = self._label(slo_class)
        self._requests[name, verdict].inc()
        if name == NO_SLO_CLASS:
            return
        if ttft_ok and tpot_ok:
            self._attained[name].inc()
            return
        if not ttft_ok:
            self._ttft_violations[name].inc()
        if not tpot_ok:
            self._tpot_violations[name].inc()

    def request_ended(self, slo_class: str | None, end: End) -> None:
        """A request ended because its client went away or the engine failed; it counts neither way."""
        self._requests[self._label(slo_class), end].inc()

    def _label(self, slo_class: str | None) -> str:
        if slo_class is None:
            return NO_SLO_CLASS
        return slo_class if slo_class in self._classes else CUSTOM_CLASS

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"slos_serve:{name}", text, list(labels), registry=self.registry)
