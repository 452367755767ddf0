"""What a fleet is sized for: a mix of classes whose rate follows a day, from a mix file or a recorded trace.

Both give a stretch of traffic at any rate. A mix draws requests by their shares; a trace replays those of its busiest
hour with its clock stretched or shrunk, so that bursts keep their shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import ClassSet, SLOClass
from slos_serve.files.mix_file import MixClass, MixFile
from slos_serve.workload.arrivals import arrival_times
from slos_serve.workload.calls import CallArray, Workload, empty_calls
from slos_serve.workload.lengths import load_table
from slos_serve.workload.scenarios import DEFAULT_ACCEPTANCE, SCENARIOS, recorded_workload, single_calls
from slos_serve.workload.trace_files import TraceRequest, read_trace

# One per cent of fewer requests is too few to count.
LEAST_REQUESTS = 1000
WINDOW_S = 3600.0
# A trace shorter than this has no course of a day of its own.
LEAST_COURSE_S = 6 * WINDOW_S
# A longer one has a stamp that is wrong, as a rule, and windows without end.
MOST_COURSE_S = 10 * 366 * 24 * WINDOW_S
MAX_OUTPUT_TOKENS = 8192
LIKE = tuple(name for name, known in SCENARIOS.items() if len(known.classes) == 1 and known.share is None)


@dataclass(frozen=True)
class Course:
    """How the rate goes through a day.

    Attributes:
        relative: float64 [parts], rate of each equal part of it over the busiest one's.
        hours: of all parts together.
    """

    relative: NDArray[np.float64]
    hours: float = 24.0

    @classmethod
    def of(cls, rates: ArrayLike, hours: float = 24.0) -> Course:
        """From rates in any unit."""
        given = np.asarray(rates, dtype=np.float64)
        return cls(given / given.max(), hours)


class Traffic(Protocol):
    """Traffic that can be had at any rate."""

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def peak_rps(self) -> float:
        """Requests a second at the busiest time."""

    @property
    def course(self) -> Course:
        """How the rate goes through a day."""

    def at(self, rate_rps: float, seconds: float) -> Workload:
        """About so many seconds of it at a mean rate, :data:`LEAST_REQUESTS` requests at least."""


class MixTraffic:
    """Traffic that a mix file describes.

    Args:
        mix: the file's.
        classes: what the classes are promised; ``None`` for what their scenarios are.
        name: for reports.
        peak_rps: instead of the file's.

    Raises:
        InvalidFieldError: a class or scenario is unknown, or no rate is given.
    """

    def __init__(self, mix: MixFile, classes: ClassSet | None, name: str, peak_rps: float | None = None) -> None:
        peak = mix.peak_rps if peak_rps is None else peak_rps
        if peak is None:
            raise InvalidFieldError("peak_rps", None, "requests a second, in the mix file or by --peak", name)
        self.name, self.peak_rps, self._mix = name, peak, mix
        self._classes = tuple(_class_of(each, classes, name) for each in mix.classes)
        recorded: list[float] = load_table("day_arrivals")["relative_rate"]
        self.course = Course.of(recorded if mix.day is None else mix.day)

    def at(self, rate_rps: float, seconds: float) -> Workload:
        """See :class:`Traffic`; the same requests come first at every rate."""
        count = max(round(rate_rps * seconds), LEAST_REQUESTS)
        random = np.random.default_rng((0, 1))
        shares = np.array([each.share for each in self._mix.classes])
        kinds = random.choice(len(shares), size=count, p=shares / shares.sum())
        calls = empty_calls(count)
        for kind, each in enumerate(self._mix.classes):
            chosen = np.flatnonzero(kinds == kind)
            part = _drawn(each, len(chosen), np.random.default_rng((0, 2, kind)))
            part["class_index"] = kind
            if len(self._classes[kind].stages) == 1:
                part["first_stage_tokens"] = part["output_tokens"]
            calls[chosen] = part
        calls["session"] = np.arange(count)
        calls["acceptance"] = DEFAULT_ACCEPTANCE
        calls["arrival_s"] = arrival_times(self._mix.arrivals, rate_rps, count, np.random.default_rng((0, 3)))
        return Workload(self.name, self._classes, calls)


def _class_of(each: MixClass, classes: ClassSet | None, where: str) -> SLOClass:
    if each.like is not None and each.like not in LIKE:
        raise InvalidFieldError(f"mix.{each.name}.like", each.like, f"one of {sorted(LIKE)}", where)
    if classes is not None:
        if each.name not in classes.classes:
            raise InvalidFieldError("mix", each.name, f"a class of the class file: {sorted(classes.classes)}", where)
        return classes.classes[each.name]
    if each.like is None:
        raise InvalidFieldError(f"mix.{each.name}", "own lengths", "a class file that says what it is promised", where)
    return SCENARIOS[each.like].classes[0]


def _drawn(each: MixClass, count: int, random: Generator) -> CallArray:
    if each.like is not None:
        return SCENARIOS[each.like].build(count, random)
    lengths = []
    for mean in (each.prompt_tokens, each.output_tokens):
        drawn = random.lognormal(np.log(mean) - 0.5 * each.spread**2, each.spread, count)
        lengths.append(np.maximum(np.rint(drawn), 1).astype(np.int64))
    return single_calls(lengths[0], lengths[1], MAX_OUTPUT_TOKENS)


class TraceTraffic:
    """Traffic of a trace file.

    A trace of six hours or more gives the course of the day too; a shorter one is taken for the busiest time.

    Args:
        path: the file.
        classes: what ``slo_class`` refers to.
        limit: read at most this many requests.
        peak_rps: instead of its busiest hour's rate.

    Raises:
        InvalidFieldError: the file or a class in it cannot be used, or it takes more than ten years.
    """

    def __init__(self, path: Path, classes: ClassSet | None, limit: int, peak_rps: float | None = None) -> None:
        requests = read_trace(path, limit)
        recorded_workload(requests, path, classes)  # every class is known
        self.name, self._path, self._classes = path.name, path, classes
        first_s = _session_starts_s(requests)
        span_s = max(requests[-1].arrival_s, 1.0)
        if span_s > MOST_COURSE_S:
            raise InvalidFieldError(
                "timestamp", f"{span_s:g} s", "within ten years of the first one", requests[-1].where
            )
        windows = int(span_s // WINDOW_S) if span_s >= LEAST_COURSE_S else 1
        width_s = WINDOW_S if windows > 1 else span_s
        window = (first_s // width_s).astype(np.int64) if windows > 1 else np.zeros(len(first_s), dtype=np.int64)
        counts = np.bincount(window, minlength=windows)[:windows]
        busiest = int(counts.argmax())
        self._busiest = [request for request, at in zip(requests, window, strict=True) if at == busiest]
        self._recorded_rps = float(counts[busiest]) / width_s
        self.peak_rps = self._recorded_rps if peak_rps is None else peak_rps
        recorded: list[float] = load_table("day_arrivals")["relative_rate"]
        self.course = Course.of(counts, windows * width_s / 3600.0) if windows > 1 else Course.of(recorded)

    def at(self, rate_rps: float, seconds: float) -> Workload:
        """See :class:`Traffic`; fewer requests where the busiest hour has no more."""
        first_s = _session_starts_s(self._busiest)
        begin_s = self._busiest[0].arrival_s
        stretch = self._recorded_rps / rate_rps
        needed = max(round(rate_rps * seconds), LEAST_REQUESTS)
        until_s = begin_s + needed / self._recorded_rps
        taken = [request for request, at_s in zip(self._busiest, first_s, strict=True) if at_s <= until_s]
        workload = recorded_workload(taken, self._path, self._classes)
        workload.calls["arrival_s"] = (workload.calls["arrival_s"] - begin_s) * stretch
        return workload


def _session_starts_s(requests: Sequence[TraceRequest]) -> NDArray[np.float64]:
    """float64 [requests]: when the first request of each one's session came, so that windows hold whole sessions."""
    starts: dict[str, float] = {}
    found = []
    for request in requests:
        own = request.arrival_s
        found.append(starts.setdefault(request.session, own) if request.session else own)
    return np.asarray(found)
