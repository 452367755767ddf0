"""What became of steps and requests: metrics, events, and one log line for each kind of trouble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from vllm.logger import init_logger

from slos_serve.core.errors import InvalidFieldError, PlanOverrunError
from slos_serve.core.plan import Reason, StepPlan
from slos_serve.core.request import Status
from slos_serve.core.slo import ClassSet
from slos_serve.perf.batch_time import BatchShape
from slos_serve.vllm_plugin.events import EventLog
from slos_serve.vllm_plugin.metrics import SchedulerMetrics, Verdict
from slos_serve.vllm_plugin.request_book import RequestBook, Tracked, stage_kept

logger = init_logger("vllm.slos_serve")
GAUGES_EVERY = 16


class Recorder:
    """Counts, writes and logs for one scheduler; decides nothing."""

    def __init__(self, classes: ClassSet, events_path: Path | None) -> None:
        self.metrics = SchedulerMetrics(slo_class.name for slo_class in classes)
        self.events = EventLog(events_path)
        self.fallbacks: dict[str, int] = {}
        self._logged: set[str] = set()
        self._steps = 0

    def fell_back(self, error: Exception) -> str:
        """A step runs in stock order because of ``error``; returns the kind it is counted as."""
        kind = "overrun" if isinstance(error, PlanOverrunError) else "exception"
        name = f"{kind}: {type(error).__name__}"
        self.fallbacks[name] = self.fallbacks.get(name, 0) + 1
        self.metrics.fallback(kind)
        self._log_once(
            name,
            "slos-serve: planning failed (%s); steps like this run in stock order.",
            error,
        )
        return name

    def starved(self) -> str:
        """A step runs in stock order because vLLM ran nothing of the plan before it; returns its kind."""
        kind = "starved"
        self.fallbacks[kind] = self.fallbacks.get(kind, 0) + 1
        self.metrics.fallback("other")
        return kind

    def refused(self, error: InvalidFieldError) -> None:
        """A request's SLO fields could not be used; it is served without a promise."""
        self.metrics.invalid_field()
        name = f"field {error.field}"
        self.fallbacks[name] = self.fallbacks.get(name, 0) + 1
        self._log_once(name, "slos-serve: request without a promise: %s", error)

    def step(
        self,
        book: RequestBook,
        plan: StepPlan | None,
        *,
        plan_s: float,
        added_s: float,
        shape: BatchShape,
        predicted_s: float,
        fallback: str | None,
        queues: tuple[int, int],
    ) -> None:
        """A step was planned (or fell back) and made."""
        self.metrics.plan(plan_s)
        held_ahead = 0
        if plan is not None:
            held_ahead = int(np.count_nonzero(plan.held_reasons == Reason.HELD_AHEAD))
            self.metrics.held(held_ahead)
            self.metrics.preempted("slo", len(plan.preempt))
        self._steps += 1
        if self._steps % GAUGES_EVERY == 0:
            self._set_queues(book)
        if self.events.enabled:
            self.events.write(
                "step",
                plan_ms=round(plan_s * 1e3, 4),
                added_ms=round(added_s * 1e3, 4),
                num_tokens=shape.new_tokens,
                num_seqs=shape.num_seqs,
                num_running=queues[0],
                num_waiting=queues[1],
                held=held_ahead,
                preempted=0 if plan is None else len(plan.preempt),
                predicted_ms=round(predicted_s * 1e3, 3),
                fallback=fallback,
            )

    def step_done(self, shape: BatchShape, duration_s: float, factor: float) -> None:
        """An executed step was timed."""
        self.metrics.correction(factor)
        if self.events.enabled:
            self.events.write(
                "step_done",
                measured_ms=round(duration_s * 1e3, 3),
                num_tokens=shape.new_tokens,
                context_tokens=shape.context_tokens,
                num_seqs=shape.num_seqs,
                factor=round(factor, 4),
            )

    def request_done(self, tracked: Tracked, status: Status, ended: str) -> None:
        """A request left the engine."""
        slo_class = tracked.slo_class
        name = slo_class.name if slo_class is not None else None
        request = tracked.request
        self.metrics.preempted("engine", max(request.num_preemptions - tracked.planned_preemptions, 0))
        verdict: Verdict = "none" if slo_class is None else "admitted" if tracked.was_admitted else "best_effort"
        ttft_ok = tracked.first_token_s is not None and tracked.first_token_s <= tracked.ttft_due_s
        in_stage = request.num_output_tokens - tracked.stage_offset
        tpot_ok = tracked.stages_ok
        if slo_class is not None and tracked.last_token_s is not None:
            tpot_ok = tpot_ok and stage_kept(tracked, in_stage, tracked.last_token_s)
        if ended in ("stop", "length"):
            self.metrics.request_done(name, verdict, ttft_ok, tpot_ok)
        else:
            self.metrics.request_aborted(name)
        self.events.write(
            "request",
            request_id=request.request_id,
            slo_class=name,
            verdict=verdict,
            lost=verdict == "admitted" and status == Status.BEST_EFFORT,
            reason=tracked.reason,
            prompt_tokens=request.num_prompt_tokens,
            output_tokens=request.num_output_tokens,
            num_preemptions=request.num_preemptions,
            finished=ended,
            ttft_ok=ttft_ok if slo_class is not None else None,
            tpot_ok=tpot_ok if slo_class is not None else None,
        )

    def _set_queues(self, book: RequestBook) -> None:
        slots = np.fromiter(book.by_slot, dtype=np.int64, count=len(book.by_slot))
        rows = book.table.rows
        running = rows["running"][slots] == 1
        status = rows["status"][slots]
        inside = np.bincount(status[running], minlength=3).tolist()
        outside = np.bincount(status[~running], minlength=3).tolist()
        self.metrics.queue("running", *inside)
        self.metrics.queue("waiting", *outside)

    def _log_once(self, name: str, text: str, error: Exception) -> None:
        if name not in self._logged:
            self._logged.add(name)
            logger.warning(text, error)
