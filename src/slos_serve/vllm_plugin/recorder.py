"""What became of steps and requests: metrics and events. Runs in the telemetry thread; decides nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from slos_serve.core.slo import NO_SLO_CLASS, ClassSet
from slos_serve.core.trust import Denied
from slos_serve.core.verdict import Verdict, Why
from slos_serve.perf.batch_time import BatchShape
from slos_serve.perf.tasks import TaskEnded
from slos_serve.vllm_plugin.events import EventLog
from slos_serve.vllm_plugin.front.link import OutcomeLink
from slos_serve.vllm_plugin.live.feed import LiveFeed
from slos_serve.vllm_plugin.metrics import FALLBACK_KINDS, End, EngineLabels, Kept, SchedulerMetrics
from slos_serve.vllm_plugin.stop_strings import StopStrings

GAUGES_EVERY = 16
# More than any pipeline has.
STEPS_IN_FLIGHT = 32
# Ends that the engine decided on; an abort is the client's, unless a stop string explains it.
FINISHED = ("stop", "length", "repetition")


class QueueCounts(NamedTuple):
    """Requests by what was decided: undecided, admitted, best effort."""

    running: tuple[int, int, int]
    waiting: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One planned step.

    Attributes:
        plan_s: seconds that planning took.
        added_s: seconds that the plug-in added to the step, planning included.
        shape: what was scheduled.
        num_running, num_waiting: requests in the engine after it.
        held: decodes held because they were ahead.
        preempted: requests that the plan preempted.
        predicted_s: predicted seconds of the step.
        fallback: why the step was stock; ``None`` when it was planned.
        scheduled, drafted: tokens of each request, and the drafts among them, as vLLM's output has them.
    """

    plan_s: float
    added_s: float
    shape: BatchShape
    num_running: int
    num_waiting: int
    held: int
    preempted: int
    predicted_s: float
    fallback: str | None
    scheduled: Mapping[str, int]
    drafted: Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request that ended.

    Attributes:
        request_id: vLLM's id.
        slo_class: name of its class; ``None`` without a promise.
        verdict, reason: what was decided and why; for a promise that was given up later, why it was.
        rank: which promise was given: 0 for the one asked for, then those of ``otherwise``; ``None`` for none.
        lost: a promise was given, and given up later.
        prompt_tokens, output_tokens: lengths.
        num_preemptions: preemptions of any kind.
        engine_preemptions: those that vLLM decided on.
        finished: ``stop``, ``length``, ``repetition``, ``abort`` or ``error``.
        ttft_ok, tpot_ok, e2e_ok: whether each promise was kept (for an abort: not broken yet); ``None`` without.
        ttft_s, tpot_s: measured; ``None`` before the first and the second token.
        ttft_ratio, tpot_ratio: measured over promised (of the slowest stage); ``None`` without a promise.
        forecast_tokens: output tokens that the planner expected of it when it came.
    """

    request_id: str
    slo_class: str | None
    verdict: Verdict
    rank: int | None
    lost: bool
    reason: Why
    prompt_tokens: int
    output_tokens: int
    num_preemptions: int
    engine_preemptions: int
    finished: str
    ttft_ok: bool | None
    tpot_ok: bool | None
    e2e_ok: bool | None
    ttft_s: float | None
    tpot_s: float | None
    ttft_ratio: float | None
    tpot_ratio: float | None
    forecast_tokens: float


class Recorder:
    """Counts and writes for one scheduler.

    Args:
        classes: classes served, for metric labels.
        events_path: where events are appended; ``None`` for nowhere.
        stop_strings: tells answers cut by a stop string from clients that left.
        labels: of every series.
        front: tells the API process what became of requests; ``None`` without one.
        live: tells it what the live page shows; ``None`` without a page.

    Raises:
        OSError: the event file cannot be opened.
    """

    def __init__(
        self,
        classes: ClassSet,
        events_path: Path | None,
        stop_strings: StopStrings,
        labels: EngineLabels | None = None,
        front: OutcomeLink | None = None,
        live: LiveFeed | None = None,
    ) -> None:
        self._front = front
        self._live = live
        self.metrics = SchedulerMetrics((slo_class.name for slo_class in classes), labels)
        self.events = EventLog(events_path)
        self._stop_strings = stop_strings
        self._told: dict[str, int] = {}
        # Steps whose tokens have not come yet, with their predicted seconds.
        self._made: deque[tuple[BatchShape, float]] = deque(maxlen=STEPS_IN_FLIGHT)

    def step(self, record: StepRecord, time_s: float) -> None:
        """A step was planned (or fell back) and made."""
        self._made.append((record.shape, record.predicted_s))
        self.metrics.plan(record.plan_s)
        self.metrics.held(record.held)
        self.metrics.preempted("slo", record.preempted)
        if self._live is not None:
            self._live.step(record, time_s)
        if self.events.enabled:
            self.events.write(
                "step",
                time_s,
                plan_ms=round(record.plan_s * 1e3, 4),
                added_ms=round(record.added_s * 1e3, 4),
                num_tokens=record.shape.new_tokens,
                num_seqs=record.shape.num_seqs,
                num_running=record.num_running,
                num_waiting=record.num_waiting,
                held=record.held,
                preempted=record.preempted,
                predicted_ms=round(record.predicted_s * 1e3, 3),
                fallback=record.fallback,
            )

    def step_done(self, shape: BatchShape, duration_s: float, factor: float, time_s: float) -> None:
        """An executed step was timed."""
        self.metrics.correction(factor)
        predicted_s = next((predicted_s for made, predicted_s in self._made if made is shape), 0.0)
        self.metrics.step_timed(duration_s, predicted_s)
        if self._live is not None:
            self._live.step_done(shape, duration_s, factor)
        if self.events.enabled:
            self.events.write(
                "step_done",
                time_s,
                measured_ms=round(duration_s * 1e3, 3),
                num_tokens=shape.new_tokens,
                context_tokens=shape.context_tokens,
                num_seqs=shape.num_seqs,
                factor=round(factor, 4),
            )

    def request_done(self, outcome: Outcome, time_s: float) -> None:
        """A request left the engine."""
        self.metrics.preempted("engine", outcome.engine_preemptions)
        ttft_ok, tpot_ok, e2e_ok = outcome.ttft_ok, outcome.tpot_ok, outcome.e2e_ok
        kept = Kept(
            ttft_ok is not False, tpot_ok is not False, e2e_ok is not False, outcome.ttft_ratio, outcome.tpot_ratio
        )
        if outcome.finished in FINISHED:
            self.metrics.answered(outcome.slo_class, outcome.output_tokens, outcome.forecast_tokens)
        if outcome.finished in FINISHED or (outcome.finished == "abort" and not kept.attained):
            self.metrics.request_done(outcome.slo_class, outcome.verdict, kept)
            self._ended(outcome.slo_class, outcome.verdict, kept.attained)
        else:
            end: End = "error" if outcome.finished == "error" else "aborted"
            self.metrics.request_ended(outcome.slo_class, end)
            self._ended(outcome.slo_class, end, attained=False)
        fields = asdict(outcome)
        del fields["engine_preemptions"]
        self.events.write("request", time_s, **fields)
        if self._front is not None:
            self._front.write(fields)

    def task_done(self, slo_class: str, ended: TaskEnded, time_s: float) -> None:
        """A task ended: its last answer, or ``IDLE_S`` after it."""
        verdict = Verdict.ADMITTED if ended.promised else Verdict.BEST_EFFORT
        self.metrics.task_done(slo_class, verdict, ended.kept)
        self.events.write(
            "task",
            time_s,
            session=ended.key.session,
            slo_class=slo_class,
            verdict=verdict,
            calls=ended.calls,
            spent_s=round(ended.spent_s, 4),
            kept=ended.kept,
        )

    def _ended(self, slo_class: str | None, end: str, attained: bool) -> None:
        if self._live is not None:
            name = self.metrics.label(slo_class)
            self._live.ended(name, end, attained and name != NO_SLO_CLASS)

    def request_aborted(self, outcome: Outcome, tail: list[int], stop: list[str], time_s: float) -> bool:
        """A request with stop strings was aborted; whether a stop string ended it."""
        by_stop = self._stop_strings.ended(tail, stop)
        self.request_done(replace(outcome, finished="stop") if by_stop else outcome, time_s)
        return by_stop

    def gauges(self, queues: QueueCounts, counts: dict[str, int], armed: bool, dropped: int) -> None:
        """Bring gauges and the counters of stock steps up to date."""
        self.metrics.queue("running", *queues.running)
        self.metrics.queue("waiting", *queues.waiting)
        self.metrics.armed(armed)
        self.metrics.telemetry_dropped(dropped)
        if self._live is not None:
            self._live.gauges(queues, armed)
        for kind, count in counts.items():
            new = count - self._told.get(kind, 0)
            if new:
                self._told[kind] = count
                self.metrics.fallback(kind if kind in FALLBACK_KINDS else "exception", new)

    def invalid_field(self) -> None:
        """A request's SLO fields could not be used; it is served without a promise."""
        self.metrics.invalid_field()

    def denied(self, why: Denied) -> None:
        """A request asked for what its tenant may not have; it is served without a promise."""
        self.metrics.denied(why)

    def close(self) -> None:
        """Close the event file and the way to the API process."""
        self.events.close()
        if self._front is not None:
            self._front.close()
