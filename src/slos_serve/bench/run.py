"""One benchmark run from settings to result: build requests, send them, score, put into JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.bench.client import ClientSettings, LoadClient, ServerInfo
from slos_serve.bench.datasets import read_dataset, requests_from_dataset
from slos_serve.bench.record import write_record
from slos_serve.bench.report import class_json, client_json, error_counts, throughput_json, warnings_of
from slos_serve.bench.requests import BenchRequest, LoadResult, Response, num_calls
from slos_serve.bench.scoring import check_scorable, ends_by_token, score_responses, score_tasks, targets_for
from slos_serve.bench.trace_load import measure_words_per_token, requests_from_trace, trace_window
from slos_serve.bench.workloads import arrival_times, find_workload, make_requests, with_known_classes
from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.redaction import redacted_text
from slos_serve.core.slo import ClassSet
from slos_serve.metrics.summary import TOTAL, ClassSummary, ScoredRequest, summarize
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.workload.trace_files import read_trace

RESULT_FORMAT = "slos-serve-bench/1"


@dataclass(frozen=True)
class BenchSettings:
    """What to send and how to score it.

    Attributes:
        workload: named workload; ``None`` with a trace or a dataset.
        trace: trace file; ``None`` without.
        dataset: file of prompts; ``None`` without.
        rate_per_s: mean arrivals a second; may be left out with a trace.
        duration_s: length of the arrivals; may be left out with a trace.
        seed: of everything drawn.
        arrival_cv: coefficient of variation of the gaps between arrivals of a named workload.
        length_scale: factor on prompt and answer lengths of a named workload.
        ignore_eos: ask for answers of exactly ``max_tokens``.
    """

    workload: str | None = "mixed"
    trace: Path | None = None
    rate_per_s: float | None = None
    duration_s: float | None = None
    seed: int = 0
    arrival_cv: float = 1.0
    length_scale: float = 1.0
    ignore_eos: bool = False
    dataset: Path | None = None


@dataclass(frozen=True)
class BenchRun:
    """A finished, scored run."""

    settings: BenchSettings
    client_settings: ClientSettings
    server: ServerInfo
    classes: ClassSet
    model: BatchTimeModel | None
    load: LoadResult
    scored: list[ScoredRequest]

    @property
    def summary(self) -> list[ClassSummary]:
        """Per class, then the total."""
        return summarize(self.scored)

    @property
    def tasks(self) -> dict[str, dict[str, int]]:
        """Whole tasks by class: how many were sent, and how many ended in time."""
        found: dict[str, dict[str, int]] = {}
        for score in score_tasks(self.load.responses, self.classes).values():
            row = found.setdefault(score.slo_class, {"tasks": 0, "attained": 0})
            row["tasks"] += 1
            row["attained"] += score.kept
        return found

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        return warnings_of(self.load, self.client_settings.slo_in != "none")

    def as_json(self) -> dict[str, Any]:
        """Everything but the single requests."""
        rows = self.summary
        return {
            "format": RESULT_FORMAT,
            **self.header(),
            "classes": {row.name: class_json(row) for row in rows if row.name != TOTAL},
            "total": class_json(rows[-1]),
            "tasks": self.tasks,
            "throughput": throughput_json(self.load),
            "client": client_json(self.load),
            "errors": error_counts(self.load.responses),
            "warnings": self.warnings,
        }

    def header(self) -> dict[str, Any]:
        """What was run, where and when."""
        return {
            "base_url": redacted_text(self.client_settings.base_url),
            "model": self.server.model,
            "vllm_version": self.server.vllm_version,
            "started": datetime.fromtimestamp(self.load.started_unix_s, UTC).isoformat(timespec="seconds"),
            "workload": self.settings.workload,
            "trace": self.settings.trace.name if self.settings.trace else None,
            "dataset": self.settings.dataset.name if self.settings.dataset else None,
            "rate_per_s": self.settings.rate_per_s,
            "duration_s": self.settings.duration_s,
            "seed": self.settings.seed,
            "arrival_cv": self.settings.arrival_cv,
            "length_scale": self.settings.length_scale,
            "slo_in": self.client_settings.slo_in,
        }

    def write_record(self, path: Path) -> None:
        """Write every request with its token times (JSON lines)."""
        targets = [targets_for(response, self.classes, self.model) for response in self.load.responses]
        write_record(path, self.header(), self.load, self.scored, targets)


async def run_bench(
    settings: BenchSettings,
    client_settings: ClientSettings,
    classes: ClassSet,
    model: BatchTimeModel | None,
    on_start: Callable[[int], None],
    on_end: Callable[[Response], None],
) -> BenchRun:
    """Run once.

    Args:
        settings: what to send.
        client_settings: where to and how; output token ids are asked for when a class needs them.
        classes: what requests are held to.
        model: zero-load times for slowdown SLOs.
        on_start: told how many requests will be sent.
        on_end: told of each answer.

    Raises:
        InvalidFieldError: settings, classes and profile do not fit together.
        ServerUnreachableError: no server there.
    """
    async with LoadClient(client_settings) as client:
        requests = await _requests(settings, classes, client)
        check_scorable(requests, classes, model)
        on_start(num_calls(requests))
        load = await client.run(requests, on_end)
        scored = score_responses(load.responses, classes, model)
        return BenchRun(settings, client_settings, client.server, classes, model, load, scored)


def token_ids_wanted(classes: ClassSet) -> bool:
    """True when a stage of a class ends with a token, which only token ids show."""
    return ends_by_token(classes)


async def _requests(settings: BenchSettings, classes: ClassSet, client: LoadClient) -> Sequence[BenchRequest]:
    if settings.trace is not None:
        timed = trace_window(read_trace(settings.trace), settings.rate_per_s, settings.duration_s)
        words = await measure_words_per_token(client, settings.seed)
        return requests_from_trace(timed, classes, words, settings.seed)
    if settings.rate_per_s is None or settings.duration_s is None:
        raise InvalidFieldError(
            "rate and duration", None, "both --rate and --duration with a named workload or a dataset"
        )
    rng = np.random.default_rng(settings.seed)
    if settings.dataset is not None:
        rows = read_dataset(settings.dataset)
        arrivals_s = arrival_times(rng, settings.rate_per_s, settings.duration_s, settings.arrival_cv)
        return requests_from_dataset(rows, arrivals_s, classes, rng, ignore_eos=settings.ignore_eos)
    parts = with_known_classes(find_workload(settings.workload or ""), classes)
    arrivals_s = arrival_times(rng, settings.rate_per_s, settings.duration_s, settings.arrival_cv)
    return make_requests(parts, arrivals_s, rng, length_scale=settings.length_scale, ignore_eos=settings.ignore_eos)
