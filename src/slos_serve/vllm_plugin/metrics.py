"""Prometheus metrics made in the scheduler's process, beside vLLM's own on ``/metrics``.

The scheduler lives in vLLM's engine-core process and ``/metrics`` in the API server: the numbers cross over through the
files of ``PROMETHEUS_MULTIPROC_DIR``, which must be set before either starts (``slos-serve serve`` does). Every series
exists from the start, so a rate over it has a zero to count from; label values are the classes of the class file plus
``custom`` (a request's own numbers) and ``none``, never what a client wrote. Every series has vLLM's labels
``model_name`` and ``engine``, so that servers behind one Prometheus are told apart.

Each method costs about a microsecond a series that it touches; gauges are written only when they change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from slos_serve.core.slo import NO_SLO_CLASS
from slos_serve.core.trust import Denied
from slos_serve.core.verdict import ENGINE_VERDICTS, Verdict
from slos_serve.files.class_file import CUSTOM_CLASS

End = Literal["aborted", "error"]
GaugeMode = Literal["livemin", "livesum", "mostrecent"]
COMMON = ("model_name", "engine")
STATES = ("undecided", Verdict.ADMITTED, Verdict.BEST_EFFORT)
# Ends that count neither as attained nor as broken: the client left in time, or the engine failed.
ENDS: tuple[End, ...] = ("aborted", "error")
FALLBACK_KINDS = ("exception", "overrun", "resting", "unserved", "empty_plan", "other")
PREEMPTION_KINDS = ("slo", "engine", "other")
PLAN_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05)
# Measured over promised: 1 is just in time.
TARGET_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
# Measured over predicted: 1 is exact.
PREDICTION_BUCKETS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 4.0)
MULTIPROC_ENV = "PROMETHEUS_MULTIPROC_DIR"


@dataclass(frozen=True, slots=True)
class EngineLabels:
    """The labels that every series of a server has, as vLLM's own have them.

    Attributes:
        model_name: the name that clients use.
        engine: index of the engine, ``0`` but for data parallel.
    """

    model_name: str = ""
    engine: str = "0"


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of a request's promises.

    Attributes:
        ttft_ok, tpot_ok, e2e_ok: whether each was kept; True where there was none.
        ttft_ratio, tpot_ratio: measured over promised; ``None`` where nothing was promised or measured.
    """

    ttft_ok: bool
    tpot_ok: bool
    e2e_ok: bool = True
    ttft_ratio: float | None = None
    tpot_ratio: float | None = None

    @property
    def attained(self) -> bool:
        """Whether all of them were."""
        return self.ttft_ok and self.tpot_ok and self.e2e_ok


class SchedulerMetrics:
    """The series of one scheduler.

    Args:
        class_names: names of the class file; the only free label values.
        labels: what every series is labelled with.
        registry: where the series are registered; by default one of its own. What ``/metrics`` shows comes through the
            files of ``PROMETHEUS_MULTIPROC_DIR`` whichever registry it is.
    """

    def __init__(
        self,
        class_names: Iterable[str],
        labels: EngineLabels | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._labels = labels or EngineLabels()
        self._classes = tuple(dict.fromkeys((*class_names, CUSTOM_CLASS, NO_SLO_CLASS)))
        self._set_up_requests()
        self._set_up_steps()

    def _set_up_requests(self) -> None:
        names, promised = self._classes, [name for name in self._classes if name != NO_SLO_CLASS]
        given = (Verdict.ADMITTED, Verdict.SECOND_BEST, Verdict.BEST_EFFORT)
        by = ("slo_class", "verdict")
        pairs = [(name, verdict) for name in promised for verdict in given]
        self._requests = self._series(
            self._counter("requests", "Requests that ended, by what was decided.", *by),
            [(name, verdict) for name in names for verdict in (*ENGINE_VERDICTS, *ENDS)],
        )
        self._attained = self._series(
            self._counter("attained", "Requests that kept every promise, by what was decided.", *by), pairs
        )
        self._violations = self._series(
            self._counter("slo_violation", "Promises broken, by which.", *by, "type"),
            [(*pair, kind) for pair in pairs for kind in ("ttft", "tpot", "e2e", "task")],
        )
        by_task = [(name, verdict) for name in promised for verdict in (Verdict.ADMITTED, Verdict.BEST_EFFORT)]
        self._tasks = self._series(
            self._counter("tasks", "Tasks that ended, by whether all calls were promised their share.", *by),
            [*by_task, *((name, "aborted") for name in promised)],
        )
        self._tasks_attained = self._series(
            self._counter("tasks_attained", "Tasks whose last answer ended in time.", *by), by_task
        )
        self._ttft_ratio = self._series(
            self._histogram("ttft_over_target", "Time to first token over its target.", TARGET_BUCKETS, *by), pairs
        )
        self._tpot_ratio = self._series(
            self._histogram(
                "tpot_over_target", "Time per output token over its target; the slowest stage.", TARGET_BUCKETS, *by
            ),
            pairs,
        )
        self._length_ratio = self._series(
            self._histogram(
                "answer_over_forecast",
                "Output tokens of an answer over those forecast for its class.",
                PREDICTION_BUCKETS,
                "slo_class",
            ),
            [(name,) for name in names],
        )

    def _set_up_steps(self) -> None:
        fallbacks = self._counter("step_fallback", "Steps run in the engine's own order, by why.", "kind")
        preemptions = self._counter("preemptions", "Preemptions, by who asked for them.", "kind")
        self._fallbacks = self._series(fallbacks, [(kind,) for kind in FALLBACK_KINDS])
        self._preemptions = self._series(preemptions, [(kind,) for kind in PREEMPTION_KINDS])
        self._armed = self._one(
            self._gauge(
                "armed",
                "1 while steps are planned; 0 once the plug-in has disarmed itself or plans nothing.",
                "livemin",
            )
        )
        self._armed.set(1)
        text = "1 while the engine schedules one step ahead."
        self._ahead = self._one(self._gauge("async_scheduling", text, "livemin"))
        self._ahead.set(1)
        text = "1 where the profile was measured on something else and is used in spite of it."
        self._far = self._one(self._gauge("profile_mismatch", text, "livesum"))
        dropped = "Events and metric updates left out because the telemetry queue was full."
        self._dropped = self._one(self._gauge("telemetry_dropped", dropped, "livesum"))
        self._invalid = self._one(
            self._counter("invalid_slo_fields", "Requests served without a promise: unusable SLO fields.")
        )
        text = "Requests served without a promise: their tenant may not have it."
        self._denied = self._series(self._counter("denied", text, "why"), [(why,) for why in Denied])
        self._held = self._one(self._counter("held_decodes", "Decodes held out of a step because they were ahead."))
        self._plan = self._one(self._histogram("plan_seconds", "Time to plan a step.", PLAN_BUCKETS_S))
        self._step_ratio = self._one(
            self._histogram("step_over_prediction", "Measured over predicted step time.", PREDICTION_BUCKETS)
        )
        text = "Requests in the engine, by queue and by what was decided."
        self._queue = self._series(
            self._gauge("queue_requests", text, "livesum", "queue", "verdict"),
            [(place, state) for place in ("running", "waiting") for state in STATES],
        )
        self._queue_now = dict.fromkeys(self._queue, 0)
        text = "Measured over predicted batch time, as the planner now corrects it."
        self._correction = self._one(self._gauge("batch_time_correction", text, "mostrecent"))
        self._correction_now = 1.0
        self._correction.set(1.0)

    def plan(self, seconds: float) -> None:
        """A step was planned in ``seconds``."""
        self._plan.observe(seconds)

    def fallback(self, kind: str, count: int = 1) -> None:
        """``count`` steps ran in the engine's own order; kinds beyond :data:`FALLBACK_KINDS` count as ``other``."""
        self._fallbacks.get((kind,), self._fallbacks["other",]).inc(count)

    def armed(self, armed: bool) -> None:
        """Whether steps are planned."""
        self._armed.set(int(armed))

    def engine(self, *, async_scheduling: bool, profile_mismatch: bool) -> None:
        """What the engine is set to; see the texts of the two gauges."""
        self._ahead.set(int(async_scheduling))
        self._far.set(int(profile_mismatch))

    def telemetry_dropped(self, count: int) -> None:
        """Calls that the telemetry queue has dropped so far."""
        self._dropped.set(count)

    def invalid_field(self) -> None:
        """A request's SLO fields could not be used, so it is served without a promise."""
        self._invalid.inc()

    def denied(self, why: Denied) -> None:
        """A request asked for what its tenant may not have, so it is served without a promise."""
        self._denied[why,].inc()

    def preempted(self, kind: str, count: int = 1) -> None:
        """``count`` requests lost their KV cache: ``slo`` (our plan), ``engine`` (vLLM's own)."""
        if count:
            self._preemptions.get((kind,), self._preemptions["other",]).inc(count)

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

    def step_timed(self, measured_s: float, predicted_s: float) -> None:
        """An executed step took ``measured_s``."""
        if predicted_s > 0.0:
            self._step_ratio.observe(measured_s / predicted_s)

    def answered(self, slo_class: str | None, output_tokens: int, forecast_tokens: float) -> None:
        """An answer ended by itself; ``forecast_tokens`` were expected when it came."""
        if forecast_tokens > 0.0:
            self._length_ratio[self.label(slo_class),].observe(output_tokens / forecast_tokens)

    def request_done(self, slo_class: str | None, verdict: Verdict, kept: Kept) -> None:
        """A request ended by itself. One without promises (``no-slo``) neither attains nor violates."""
        name = self.label(slo_class)
        self._requests[name, verdict].inc()
        if name == NO_SLO_CLASS:
            return
        key = name, verdict
        if kept.ttft_ratio is not None:
            self._ttft_ratio[key].observe(kept.ttft_ratio)
        if kept.tpot_ratio is not None:
            self._tpot_ratio[key].observe(kept.tpot_ratio)
        if kept.attained:
            self._attained[key].inc()
            return
        if not kept.ttft_ok:
            self._violations[(*key, "ttft")].inc()
        if not kept.tpot_ok:
            self._violations[(*key, "tpot")].inc()
        if not kept.e2e_ok:
            self._violations[(*key, "e2e")].inc()

    def task_done(self, slo_class: str, verdict: Verdict, kept: bool | None) -> None:
        """A task ended; ``kept`` is ``None`` where its client left before that was decided."""
        key = self.label(slo_class), verdict
        if kept is None:
            self._tasks[key[0], "aborted"].inc()
            return
        self._tasks[key].inc()
        if kept:
            self._tasks_attained[key].inc()
        else:
            self._violations[(*key, "task")].inc()

    def request_ended(self, slo_class: str | None, end: End) -> None:
        """A request ended because its client went away or the engine failed; it counts neither way."""
        self._requests[self.label(slo_class), end].inc()

    def label(self, slo_class: str | None) -> str:
        """The label of a class: its name where the class file has it."""
        if slo_class is None:
            return NO_SLO_CLASS
        return slo_class if slo_class in self._classes else CUSTOM_CLASS

    def _one(self, metric: Any) -> Any:
        """The one series of a metric without labels of its own."""
        return metric.labels(self._labels.model_name, self._labels.engine)

    def _series(self, metric: Any, keys: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], Any]:
        """The series of a metric by its own labels."""
        return {key: metric.labels(self._labels.model_name, self._labels.engine, *key) for key in keys}

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"slos_serve:{name}", text, [*COMMON, *labels], registry=self.registry)

    def _gauge(self, name: str, text: str, mode: GaugeMode, *labels: str) -> Gauge:
        names = [*COMMON, *labels]
        return Gauge(f"slos_serve:{name}", text, names, registry=self.registry, multiprocess_mode=mode)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"slos_serve:{name}", text, [*COMMON, *labels], buckets=buckets, registry=self.registry)
