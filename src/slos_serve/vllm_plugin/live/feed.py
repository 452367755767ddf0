"""What the engine core tells the live page: counts, queues, the last steps and the streams with their slack.

Everything here runs in the telemetry thread. Counts and queues go out every second, whether or not somebody looks, so
that the page has a history when it is opened. Steps and streams go out twice a second and only while the API process
says, by a file, that somebody looks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from slos_serve.core.slo import NO_SLO_CLASS, ClassSet
from slos_serve.files.class_file import CUSTOM_CLASS
from slos_serve.perf.batch_time import BatchShape
from slos_serve.vllm_plugin.front.link import OutcomeLink, socket_path
from slos_serve.vllm_plugin.live.streams import streams_of

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.recorder import QueueCounts, StepRecord
    from slos_serve.vllm_plugin.request_book import RequestBook

LIVE_KEY = "live"
WATCHED = "watched"
EVERY_S, WATCHED_EVERY_S = 1.0, 0.5
MOST_STEPS = 40


@dataclass(slots=True)
class _Step:
    """A step that was made, and its seconds once it is done."""

    record: StepRecord
    time_s: float
    measured_s: float | None = None

    def composition(self) -> dict[str, Any]:
        """What it was made of. A last prefill chunk of one token counts as a decode."""
        record, drafted = self.record, self.record.drafted
        prefill = [tokens for key, tokens in record.scheduled.items() if tokens > 1 and key not in drafted]
        return {
            "time_s": round(self.time_s, 3),
            "prefill_tokens": sum(prefill),
            "prefills": len(prefill),
            "decodes": max(len(record.scheduled) - len(prefill), 0),
            "drafts": record.shape.draft_tokens,
            "held": record.held,
            "predicted_ms": round(record.predicted_s * 1e3, 2),
            "measured_ms": None if self.measured_s is None else round(self.measured_s * 1e3, 2),
            "stock": record.fallback,
        }


class LiveFeed:
    """Sends one message a round to the API process.

    Args:
        link: where to.
        watched: exists while somebody looks at the page; ``None`` sends counts only.
        clock_s: says when a message is due.
    """

    def __init__(self, link: OutcomeLink, watched: Path | None, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._watched = watched
        self._clock_s = clock_s
        self._sent_s = -EVERY_S
        self._counts: dict[str, dict[str, int]] = {}
        self._attained: dict[str, dict[str, int]] = {}
        self._queue: dict[str, list[int]] = {"running": [0, 0, 0], "waiting": [0, 0, 0]}
        self._armed, self._factor = True, 1.0
        self._steps: deque[_Step] = deque(maxlen=MOST_STEPS)
        self._streams: Callable[[], list[dict[str, Any]]] = list

    @classmethod
    def to(cls, link: OutcomeLink, process: int) -> Self:
        """A feed for an API process."""
        return cls(link, socket_path(WATCHED, process))

    def look_at(self, book: RequestBook, classes: ClassSet, now_s: Callable[[], float]) -> None:
        """Show the streams of a book from now on; ``now_s`` is on its clock."""
        names = [*(slo_class.name for slo_class in classes), CUSTOM_CLASS, NO_SLO_CLASS]

        def streams() -> list[dict[str, Any]]:
            slots = np.array(list(book.by_slot.copy()), dtype=np.int64)
            return streams_of(book.table.rows, slots, names, now_s())

        self._streams = streams

    def step(self, record: StepRecord, time_s: float) -> None:
        """A step was made."""
        self._steps.append(_Step(record, time_s))

    def step_done(self, shape: BatchShape, duration_s: float, factor: float) -> None:
        """An executed step was timed."""
        self._factor = factor
        for step in reversed(self._steps):
            if step.record.shape is shape:
                step.measured_s = duration_s
                return

    def ended(self, slo_class: str, end: str, attained: bool) -> None:
        """A request ended, and is counted on ``/metrics`` under the same two words."""
        counts = self._counts.setdefault(slo_class, {})
        counts[end] = counts.get(end, 0) + 1
        if attained:
            kept = self._attained.setdefault(slo_class, {})
            kept[end] = kept.get(end, 0) + 1

    def gauges(self, queues: QueueCounts, armed: bool) -> None:
        """Requests by queue and by what was decided: undecided, admitted, best effort."""
        self._queue = {"running": list(queues.running), "waiting": list(queues.waiting)}
        self._armed = armed

    def tick(self) -> None:
        """Send what is due."""
        now_s = self._clock_s()
        if now_s - self._sent_s < WATCHED_EVERY_S:
            return
        watched = self._watched is not None and self._watched.exists()
        if not watched and now_s - self._sent_s < EVERY_S:
            return
        self._sent_s = now_s
        message: dict[str, Any] = {
            "requests": self._counts,
            "attained": self._attained,
            "queue": self._queue,
            "armed": self._armed,
            "correction": round(self._factor, 3),
        }
        if watched:
            message |= {"steps": [step.composition() for step in self._steps], "streams": self._streams()}
        self._link.write({LIVE_KEY: message})
