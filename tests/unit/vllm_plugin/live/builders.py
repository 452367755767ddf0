"""What an engine core says to the live page, made by the recorder that says it on a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from slos_serve.core.slo import ClassSet, SLOClass
from slos_serve.core.verdict import Verdict, Why
from slos_serve.files.class_file import parse_classes
from slos_serve.perf.batch_time import BatchShape
from slos_serve.vllm_plugin.front.link import OutcomeLink
from slos_serve.vllm_plugin.live.feed import LIVE_KEY, LiveFeed
from slos_serve.vllm_plugin.metrics import EngineLabels
from slos_serve.vllm_plugin.recorder import Outcome, QueueCounts, Recorder, StepRecord
from slos_serve.vllm_plugin.stop_strings import StopStrings

CLASSES = parse_classes("classes: {chat: {ttft_ms: 1000, tpot_ms: 100}, batch: {}}", "classes.yaml")


class Wire:
    """Stands for the socket to the API process."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def write(self, fields: dict[str, Any]) -> None:
        self.sent.append(fields)

    def close(self) -> None:
        """Nothing is open."""

    def newest(self) -> dict[str, Any]:
        """The newest message for the page."""
        return cast("dict[str, Any]", next(each for each in reversed(self.sent) if LIVE_KEY in each)[LIVE_KEY])


class Engine:
    """A recorder with a feed, on a clock that the test moves."""

    def __init__(self, folder: Path, classes: ClassSet = CLASSES) -> None:
        self.now_s = 1000.0
        self.wire = Wire()
        self.watched = folder / "7.watched"
        link = cast("OutcomeLink", self.wire)
        self.feed = LiveFeed(link, self.watched, lambda: self.now_s)
        stop_strings = cast("StopStrings", None)
        self.recorder = Recorder(classes, None, stop_strings, EngineLabels("m", "0"), None, self.feed)

    def ends(self, slo_class: SLOClass | None, verdict: Verdict, *, kept: bool = True, finished: str = "stop") -> None:
        """A request ends."""
        outcome = Outcome(
            request_id="secret-name",
            slo_class=None if slo_class is None else slo_class.name,
            verdict=verdict,
            rank=0,
            lost=False,
            reason=Why.FITS,
            prompt_tokens=10,
            output_tokens=5,
            num_preemptions=0,
            engine_preemptions=0,
            finished=finished,
            ttft_ok=kept,
            tpot_ok=True,
            e2e_ok=True,
            ttft_s=0.1,
            tpot_s=0.05,
            ttft_ratio=0.5,
            tpot_ratio=0.5,
            forecast_tokens=5.0,
        )
        self.recorder.request_done(outcome, self.now_s)

    def steps(self, scheduled: dict[str, int], drafted: dict[str, list[int]], measured_s: float | None) -> None:
        """A step is made, and done where it was timed."""
        drafts = sum(map(len, drafted.values()))
        shape = BatchShape(new_tokens=sum(scheduled.values()), num_seqs=len(scheduled), draft_tokens=drafts)
        record = StepRecord(0.001, 0.002, shape, 3, 1, 2, 0, 0.040, None, scheduled, drafted)
        self.recorder.step(record, self.now_s)
        if measured_s is not None:
            self.recorder.step_done(shape, measured_s, 1.1, self.now_s)

    def queues(self, running: tuple[int, int, int], waiting: tuple[int, int, int]) -> None:
        """The queues are looked at."""
        self.recorder.gauges(QueueCounts(running, waiting), {}, armed=True, dropped=0)

    def after(self, seconds: float) -> int:
        """Let time pass; how many messages for the page were sent."""
        before = len(self.wire.sent)
        self.now_s += seconds
        self.feed.tick()
        return len(self.wire.sent) - before

    def count(self, name: str, **labels: str) -> float:
        """A sample of ``/metrics``."""
        found = {"model_name": "m", "engine": "0"} | labels
        return self.recorder.metrics.registry.get_sample_value(f"slos_serve:{name}", found) or 0.0
